import CoreML
import Foundation
import PippinChat
import PippinModel
import Tokenizers

/// swift run -c release pippin-generate X.mlpackage X/tokenizer [options] "a text"
@main
struct Generate {
    static let usage = """
        usage: pippin-generate X.mlpackage X/tokenizer [options] TEXT
          --chat             TEXT is a question; without it, questions are read from standard input
          --adapter FILE     X/adapters/NAME.bin
          --max-tokens N     of a text or an answer (256)
          --temperature T    0 takes the most likely token each time (0.7)
          --units UNITS      cpu, gpu, ane or all (gpu): the CPU, and what may compute beside it
        """

    static let units: [String: MLComputeUnits] = [
        "cpu": .cpuOnly, "gpu": .cpuAndGPU, "ane": .cpuAndNeuralEngine, "all": .all,
    ]

    struct Options {
        var paths: [String] = []  // package, tokenizer, text
        var isChat = false
        var adapter: String?
        var maxTokens = 256
        var temperature: Float = 0.7
        var units = MLComputeUnits.cpuAndGPU

        init?(_ arguments: [String]) {
            var rest = arguments[...]
            while let argument = rest.popFirst() {
                switch argument {
                case "--chat":
                    isChat = true
                case "--adapter":
                    guard let path = rest.popFirst() else { return nil }
                    adapter = path
                case "--max-tokens":
                    guard let count = rest.popFirst().flatMap({ Int($0) }), count > 0 else { return nil }
                    maxTokens = count
                case "--temperature":
                    guard let value = rest.popFirst().flatMap({ Float($0) }), value >= 0, value.isFinite else { return nil }
                    temperature = value
                case "--units":
                    guard let name = rest.popFirst(), let chosen = Generate.units[name] else { return nil }
                    units = chosen
                default:
                    guard !argument.hasPrefix("--") else { return nil }
                    paths.append(argument)
                }
            }
            guard paths.count == 3 || (isChat && paths.count == 2) else { return nil }
        }
    }

    static func main() async throws {
        guard let options = Options(Array(CommandLine.arguments.dropFirst())) else {
            print(usage)
            exit(2)
        }
        do {
            try await run(options)
        } catch {
            FileHandle.standardError.write(Data("pippin-generate: \(error)\n".utf8))
            exit(1)
        }
    }

    static func run(_ options: Options) async throws {
        let compiled = try await LanguageModel.compile(packageAt: URL(fileURLWithPath: options.paths[0]))
        let adapter = try options.adapter.map { try Adapter(contentsOf: URL(fileURLWithPath: $0)) }
        let model = try LanguageModel(compiledModelAt: compiled, computeUnits: options.units, adapter: adapter)
        let tokenizer = try await AutoTokenizer.from(modelFolder: URL(fileURLWithPath: options.paths[1]))
        let sampler = Sampler(temperature: options.temperature, topK: 40, topP: 0.95)
        guard options.isChat else {
            return try await write(options, model: model, tokenizer: tokenizer, sampler: sampler)
        }
        let chat = try Chat(model: model, tokenizer: tokenizer)
        if options.paths.count == 3 {
            return try await show(chat.answer(to: options.paths[2], sampler: sampler, maxTokens: options.maxTokens))
        }
        while let question = readLine() {
            try await show(chat.answer(to: question, sampler: sampler, maxTokens: options.maxTokens))
        }
    }

    static func show(_ pieces: AsyncThrowingStream<String, Error>) async throws {
        for try await piece in pieces {
            print(piece, terminator: "")
            fflush(stdout)
        }
        print()
    }

    /// Goes on with a text, and tells how fast.
    static func write(
        _ options: Options, model: LanguageModel, tokenizer: any Tokenizer, sampler: Sampler
    ) async throws {
        let prompt = ModelFacts.startIds + tokenizer.encode(text: options.paths[2], addSpecialTokens: false)
        var text = TextOfTokens(tokenizer: tokenizer)
        var count = 0
        var first = Date()
        for try await token in model.continuation(of: prompt, sampler: sampler, maxTokens: options.maxTokens) {
            if count == 0 {
                first = Date()
            }
            count += 1
            print(text.add(token), terminator: "")
            fflush(stdout)
        }
        let seconds = Date().timeIntervalSince(first)
        guard count > 1 else { return print() }
        print("\n\n\(count) tokens, \(String(format: "%.1f", Double(count - 1) / seconds)) a second behind the first")
    }
}

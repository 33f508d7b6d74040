import CoreML
import Foundation
import PippinModel
import Tokenizers

/// swift run pippin-generate PACKAGE TOKENIZER_FOLDER "a prompt" [ADAPTER.bin]
@main
struct Generate {
    static func main() async throws {
        let arguments = CommandLine.arguments
        guard arguments.count == 4 || arguments.count == 5 else {
            print("usage: pippin-generate X.mlpackage X/tokenizer PROMPT [X/adapters/NAME.bin]")
            exit(2)
        }
        let compiled = try await LanguageModel.compile(packageAt: URL(fileURLWithPath: arguments[1]))
        let adapter = arguments.count == 5 ? try Adapter(contentsOf: URL(fileURLWithPath: arguments[4])) : nil
        let model = try LanguageModel(compiledModelAt: compiled, adapter: adapter)
        let tokenizer = try await AutoTokenizer.from(modelFolder: URL(fileURLWithPath: arguments[2]))
        let prompt = ModelFacts.startIds + tokenizer.encode(text: arguments[3], addSpecialTokens: false)

        let began = Date()
        var tokens: [Int] = []
        var shown = ""
        for try await token in model.continuation(of: prompt, sampler: Sampler(temperature: 0.7, topK: 40, topP: 0.95)) {
            tokens.append(token)
            // A character may take several tokens: what is shown is what was added to the whole text.
            let text = tokenizer.decode(tokens: tokens)
            if text.hasPrefix(shown) && !text.hasSuffix("\u{FFFD}") {
                print(text.dropFirst(shown.count), terminator: "")
                fflush(stdout)
                shown = text
            }
        }
        let seconds = Date().timeIntervalSince(began)
        print("\n\n\(tokens.count) tokens, \(String(format: "%.1f", Double(tokens.count) / seconds)) a second, the prompt included")
    }
}

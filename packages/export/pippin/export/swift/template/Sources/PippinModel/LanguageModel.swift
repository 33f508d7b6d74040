import CoreML

/// What can go wrong beside what Core ML itself reports.
public enum LanguageModelError: Error, CustomStringConvertible {
    case contextIsFull(tokens: Int, length: Int)
    case noTokens
    case noLogits
    case logitsAreNoNumbers(position: Int)
    case adapterLength(got: Int, expected: Int)
    case adapterOfAnotherModel

    public var description: String {
        switch self {
        case .contextIsFull(let tokens, let length):
            return "\(tokens) tokens do not fit in a context of \(length). Start a new text, or export the model with a larger --context."
        case .noTokens:
            return "There are no tokens to read. Give one at least."
        case .noLogits:
            return "The model gave no logits of the type Float16. Export it again."
        case .logitsAreNoNumbers(let position):
            return "Logits of the token at position \(position) are infinite or no numbers: this compute unit does not compute the model. Take another one, such as .cpuOnly, and run verify_on_mac.py to see which do."
        case .adapterLength(let got, let expected):
            return "The adapter has \(got) numbers; this model takes \(expected). Use one that was exported with it."
        case .adapterOfAnotherModel:
            return "The adapter was trained on another model. Use one that was exported with this one."
        }
    }
}

/// A language model and one text that grows, whose keys and values it keeps in Core ML's state.
///
/// Not safe to use from two tasks at once: a state serves one prediction at a time.
public final class LanguageModel {
    /// The text: what the caches hold.
    public private(set) var tokens: [Int] = []

    /// How many tokens the text has.
    public var position: Int { tokens.count }

    private let prefill: MLModel
    private let decode: MLModel
    private var adapter: MLMultiArray?
    private var state: MLState

    /// Loads the functions of a compiled model.
    ///
    /// - Parameters:
    ///   - url: of the .mlmodelc; see `compile(packageAt:)`. In an app, Xcode compiles a package that is added to it.
    ///   - computeUnits: start with CPU and GPU. Then try `.all`, and see whether the check on a Mac still passes.
    ///   - adapter: of this model; nil is the model as it is.
    public init(
        compiledModelAt url: URL,
        computeUnits: MLComputeUnits = .cpuAndGPU,
        adapter: Adapter? = nil
    ) throws {
        func load(_ function: String) throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = computeUnits
            configuration.functionName = function
            return try MLModel(contentsOf: url, configuration: configuration)
        }
        prefill = try load("prefill")
        decode = try load("decode")
        state = decode.makeState()
        try use(adapter)
    }

    /// Goes on with another adapter, from a new text: what is in the caches was computed with the old one.
    public func use(_ adapter: Adapter?) throws {
        if ModelFacts.adapterLength > 0 {
            let values = (adapter ?? Adapter.none).values
            self.adapter = MLMultiArray(MLShapedArray<Float16>(scalars: values, shape: [values.count]))
        } else if let adapter {
            throw LanguageModelError.adapterLength(got: adapter.values.count, expected: 0)
        }
        reset()
    }

    /// Compiles an .mlpackage, and tells where the result lies: move it to where it may stay.
    public static func compile(packageAt url: URL) async throws -> URL {
        try await MLModel.compileModel(at: url)
    }

    /// Forgets the text.
    public func reset() {
        state = decode.makeState()
        tokens = []
    }

    /// Forgets the text behind its first tokens. What the caches hold of it is masked, and is written over.
    public func rewind(to length: Int) {
        precondition(length >= 0 && length <= position, "a text is only made shorter")
        tokens.removeLast(position - length)
    }

    /// Reads tokens behind the text, and gives the logits of the one that comes next: all of them are finite.
    public func read(_ tokens: [Int]) async throws -> [Float] {
        guard !tokens.isEmpty else { throw LanguageModelError.noTokens }
        guard position + tokens.count <= ModelFacts.contextLength else {
            throw LanguageModelError.contextIsFull(
                tokens: position + tokens.count, length: ModelFacts.contextLength)
        }
        var logits: [Float] = []
        var rest = tokens[...]
        while !rest.isEmpty {
            // A part is filled up to its whole length, which must not pass the end of the caches.
            let partFits = position + ModelFacts.prefillLength <= ModelFacts.contextLength
            let count = rest.count > 1 && partFits ? min(rest.count, ModelFacts.prefillLength) : 1
            logits = try await step(Array(rest.prefix(count)))
            rest = rest.dropFirst(count)
        }
        return logits
    }

    private func step(_ tokens: [Int]) async throws -> [Float] {
        let isPrompt = tokens.count > 1
        let length = isPrompt ? ModelFacts.prefillLength : 1
        var ids = tokens.map { Int32($0) }
        ids += [Int32](repeating: 0, count: length - ids.count)
        var features: [String: MLFeatureValue] = [
            "inputIds": MLFeatureValue(
                multiArray: MLMultiArray(MLShapedArray<Int32>(scalars: ids, shape: [1, length]))),
            "position": MLFeatureValue(
                multiArray: MLMultiArray(MLShapedArray<Int32>(scalars: [Int32(position)], shape: [1]))),
            "causalMask": MLFeatureValue(multiArray: mask(length: length)),
        ]
        if let adapter {
            features["adapter"] = MLFeatureValue(multiArray: adapter)
        }
        let input = try MLDictionaryFeatureProvider(dictionary: features)
        let model = isPrompt ? prefill : decode
        let output = try await model.prediction(from: input, using: state)
        guard let logits = output.featureValue(for: "logits")?.shapedArrayValue(of: Float16.self) else {
            throw LanguageModelError.noLogits
        }
        let next = logits[0][tokens.count - 1].scalars.map { Float($0) }
        // Of these a sampler would take a token all the same, and the text would be nonsense.
        guard next.allSatisfy({ $0.isFinite }) else {
            throw LanguageModelError.logitsAreNoNumbers(position: position + tokens.count - 1)
        }
        self.tokens += tokens
        return next
    }

    /// 0 where a token may look, -infinity elsewhere: each token sees those before it and itself, padding too.
    private func mask(length: Int) -> MLMultiArray {
        let context = ModelFacts.contextLength
        var scalars = [Float16](repeating: -Float16.infinity, count: length * context)
        for row in 0..<length {
            let seen = min(position + row + 1, context)
            for column in 0..<seen {
                scalars[row * context + column] = 0
            }
        }
        return MLMultiArray(MLShapedArray<Float16>(scalars: scalars, shape: [1, 1, length, context]))
    }
}

import PippinModel
import Tokenizers

/// What is amiss with a conversation.
public enum ChatError: Error, CustomStringConvertible {
    case noTemplate

    public var description: String {
        switch self {
        case .noTemplate:
            return "The model's tokenizer has no chat template: it was not trained for conversations. Let it continue a text, or export a model that was."
        }
    }
}

/// A conversation, by the chat template among the tokenizer's files.
///
/// The model keeps what it has read. Of each question it reads what is new: the answer before as the template writes it, and
/// the question. One answer at a time; the model is used for nothing else meanwhile.
public final class Chat {
    /// What was said, by "role" and "content".
    public private(set) var messages: [Message] = []

    private let model: LanguageModel
    private let tokenizer: any Tokenizer
    private var known: [Int] = []  // the tokens that the model's caches hold

    /// - Parameters:
    ///   - model: of which the conversation makes a new text.
    ///   - tokenizer: of the same model, with its chat template.
    ///   - system: what comes before the first question; nil leaves it to the template.
    public init(model: LanguageModel, tokenizer: any Tokenizer, system: String? = nil) throws {
        guard tokenizer.hasChatTemplate else { throw ChatError.noTemplate }
        self.model = model
        self.tokenizer = tokenizer
        if let system {
            messages.append(["role": "system", "content": system])
        }
        model.reset()
    }

    /// The answer to a question, in pieces as they come. It belongs to the conversation once it has ended.
    public func answer(
        to question: String,
        sampler: Sampler = Sampler(temperature: 0.7, topP: 0.95),
        maxTokens: Int = 256
    ) throws -> AsyncThrowingStream<String, Error> {
        messages.append(["role": "user", "content": question])
        let prompt = try tokenizer.applyChatTemplate(messages: messages)
        // One token at least is read, so that there are logits.
        let kept = min(zip(known, prompt).prefix { $0 == $1 }.count, prompt.count - 1)
        model.rewind(to: kept)
        return AsyncThrowingStream { stream in
            let task = Task {
                var tokens: [Int] = []
                var answer = TextOfTokens(tokenizer: self.tokenizer)
                defer { self.known = Array((prompt + tokens).prefix(self.model.position)) }
                do {
                    let continuation = self.model.continuation(
                        of: Array(prompt.dropFirst(kept)), sampler: sampler, maxTokens: maxTokens)
                    for try await token in continuation {
                        tokens.append(token)
                        let piece = answer.add(token)
                        if !piece.isEmpty {
                            stream.yield(piece)
                        }
                    }
                    self.messages.append(["role": "assistant", "content": answer.text])
                    stream.finish()
                } catch {
                    stream.finish(throwing: error)
                }
            }
            stream.onTermination = { _ in task.cancel() }
        }
    }
}

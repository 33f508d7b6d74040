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
/// the question. While it answers, the model is used for nothing else; between answers it may be: the next one reads again
/// what the model no longer holds.
public final class Chat {
    /// What was said, up to the last answer that ended, by "role" and "content".
    public private(set) var messages: [Message] = []

    private let model: LanguageModel
    private let tokenizer: any Tokenizer
    private var running: Task<Void, Never>?  // the last answer

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

    /// The answer to a question, in pieces as they come. Both belong to the conversation once it has ended.
    ///
    /// One that is stopped early belongs to it as far as it came; one that fails leaves the conversation as it was. An answer
    /// waits until the one before has left the model.
    public func answer(
        to question: String,
        sampler: Sampler = Sampler(temperature: 0.7, topP: 0.95),
        maxTokens: Int = 256
    ) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { stream in
            let before = self.running
            let task = Task<Void, Never> {
                await before?.value
                guard !Task.isCancelled else { return stream.finish() }
                var said = self.messages
                said.append(["role": "user", "content": question])
                do {
                    let text = try await self.reply(to: said, sampler: sampler, maxTokens: maxTokens) { piece in
                        stream.yield(piece)
                    }
                    said.append(["role": "assistant", "content": text])
                    self.messages = said
                    stream.finish()
                } catch {
                    stream.finish(throwing: error)
                }
            }
            self.running = task
            stream.onTermination = { _ in task.cancel() }
        }
    }

    /// The text that follows messages, which `each` is given in pieces.
    private func reply(
        to asked: [Message], sampler: Sampler, maxTokens: Int, each: (String) -> Void
    ) async throws -> String {
        let prompt = try tokenizer.applyChatTemplate(messages: asked)
        // One token at least is read, so that there are logits.
        let same = zip(model.tokens, prompt).prefix { $0 == $1 }.count
        let kept = max(0, min(same, prompt.count - 1))
        model.rewind(to: kept)
        var answer = TextOfTokens(tokenizer: tokenizer)
        do {
            try await model.generate(from: Array(prompt.dropFirst(kept)), sampler: sampler, maxTokens: maxTokens) { token in
                let piece = answer.add(token)
                if !piece.isEmpty {
                    each(piece)
                }
            }
        } catch {
            // A prediction that was stopped may fail.
            guard Task.isCancelled else { throw error }
        }
        return answer.text
    }
}

extension LanguageModel {
    /// The tokens that continue a prompt, one after the other, up to a stop id (left out), `maxTokens`, or a full context.
    public func continuation(
        of prompt: [Int],
        sampler: Sampler = Sampler(),
        maxTokens: Int = 256,
        stopIds: Set<Int> = ModelFacts.stopIds
    ) -> AsyncThrowingStream<Int, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                guard maxTokens > 0 else { return continuation.finish() }
                do {
                    var logits = try await self.read(prompt)
                    for count in 1...maxTokens {
                        let token = sampler.choose(logits)
                        if stopIds.contains(token) || Task.isCancelled { break }
                        continuation.yield(token)
                        if count == maxTokens || self.position >= ModelFacts.contextLength { break }
                        logits = try await self.read([token])
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }
}

extension LanguageModel {
    /// The tokens that continue a prompt, one after the other, up to a stop id (left out), `maxTokens`, or a full context.
    ///
    /// Where a reader stops early, the model may be busy for one prediction more; `generate` returns when it is not.
    public func continuation(
        of prompt: [Int],
        sampler: Sampler = Sampler(),
        maxTokens: Int = 256,
        stopIds: Set<Int> = ModelFacts.stopIds
    ) -> AsyncThrowingStream<Int, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.generate(from: prompt, sampler: sampler, maxTokens: maxTokens, stopIds: stopIds) { token in
                        continuation.yield(token)
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Gives the same tokens to a function, until the task is cancelled; then the model is busy no more.
    public func generate(
        from prompt: [Int],
        sampler: Sampler = Sampler(),
        maxTokens: Int = 256,
        stopIds: Set<Int> = ModelFacts.stopIds,
        each: (Int) -> Void
    ) async throws {
        guard maxTokens > 0 else { return }
        var logits = try await read(prompt)
        for count in 1...maxTokens {
            let token = sampler.choose(logits)
            if stopIds.contains(token) || Task.isCancelled { break }
            each(token)
            if count == maxTokens || position >= ModelFacts.contextLength { break }
            logits = try await read([token])
        }
    }
}

import Foundation

/// Chooses a token by its logits, which are finite, as those of a `LanguageModel` are.
public struct Sampler {
    /// 0 takes the most likely token; 1 samples as the model says; more is more surprising.
    public var temperature: Float
    /// Samples among so many tokens at most; 0 is among all.
    public var topK: Int
    /// Samples among the fewest tokens whose probabilities reach this sum.
    public var topP: Float

    public init(temperature: Float = 0, topK: Int = 0, topP: Float = 1) {
        precondition(temperature >= 0 && temperature.isFinite, "the temperature must be finite and not negative")
        precondition(topK >= 0, "topK must not be negative")
        precondition(topP > 0 && topP <= 1, "topP must be above 0, and 1 at most")
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
    }

    /// The next token.
    public func choose(_ logits: [Float]) -> Int {
        var generator = SystemRandomNumberGenerator()
        return choose(logits, using: &generator)
    }

    /// The next token, drawn with a generator of one's own: the same one gives the same tokens.
    public func choose<G: RandomNumberGenerator>(_ logits: [Float], using generator: inout G) -> Int {
        guard temperature > 0 else {
            return logits.indices.max { logits[$0] < logits[$1] } ?? 0
        }
        var order = logits.indices.sorted { logits[$0] > logits[$1] }
        if topK > 0 {
            order = Array(order.prefix(topK))
        }
        let largest = logits[order[0]]
        let weights = order.map { exp((logits[$0] - largest) / temperature) }
        let total = weights.reduce(0, +)
        // A token is left out if those before it already reach the sum.
        var kept: Float = 0
        var count = 0
        while count < weights.count && kept < topP * total {
            kept += weights[count]
            count += 1
        }
        var left = Float.random(in: 0..<kept, using: &generator)
        for index in 0..<count {
            left -= weights[index]
            if left < 0 {
                return order[index]
            }
        }
        return order[count - 1]
    }
}

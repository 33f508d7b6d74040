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
        let most = topK > 0 ? topK : Sampler.few
        var order = likeliest(min(most, logits.count), of: logits)
        let largest = logits[order[0]]
        func weight(_ index: Int) -> Float { exp((logits[index] - largest) / temperature) }
        let total = (topK > 0 ? order : Array(logits.indices)).reduce(0) { $0 + weight($1) }
        var (weights, kept) = fewest(order.lazy.map(weight), reaching: topP * total)
        if topK == 0 && weights.count == order.count && order.count < logits.count {
            // Those few may not reach it.
            order = logits.indices.sorted { logits[$0] > logits[$1] }
            (weights, kept) = fewest(order.lazy.map(weight), reaching: topP * total)
        }
        var left = Float.random(in: 0..<kept, using: &generator)
        for (index, weight) in zip(order, weights) {
            left -= weight
            if left < 0 {
                return index
            }
        }
        return order[weights.count - 1]
    }

    // Among all tokens, so many are looked at first: to sort a whole vocabulary takes longer than to compute the logits.
    private static let few = 256

    /// The first of some weights whose sum reaches a number, and that sum. A weight is left out if those before it reach it.
    private func fewest<S: Sequence>(_ weights: S, reaching sum: Float) -> ([Float], Float) where S.Element == Float {
        var taken: [Float] = []
        var kept: Float = 0
        for weight in weights {
            guard kept < sum else { break }
            taken.append(weight)
            kept += weight
        }
        return (taken, kept)
    }

    /// The tokens with the largest logits, the largest first.
    private func likeliest(_ count: Int, of logits: [Float]) -> [Int] {
        var best: [Int] = []
        for index in logits.indices {
            if best.count == count {
                guard logits[index] > logits[best[count - 1]] else { continue }
                best.removeLast()
            }
            var place = best.count
            while place > 0 && logits[best[place - 1]] < logits[index] {
                place -= 1
            }
            best.insert(index, at: place)
        }
        return best
    }
}

import Tokenizers

/// Text out of tokens that come one after the other. A character may take several of them.
public struct TextOfTokens {
    /// What there is so far.
    public private(set) var text = ""

    private let tokenizer: any Tokenizer
    private var tokens: [Int] = []

    public init(tokenizer: any Tokenizer) {
        self.tokenizer = tokenizer
    }

    /// What a token adds to the text: nothing while a character is not whole.
    public mutating func add(_ token: Int) -> String {
        tokens.append(token)
        let whole = tokenizer.decode(tokens: tokens, skipSpecialTokens: true)
        guard whole.hasPrefix(text), !whole.hasSuffix("\u{FFFD}") else { return "" }
        defer { text = whole }
        return String(whole.dropFirst(text.count))
    }
}

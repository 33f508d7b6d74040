import Tokenizers

/// Text out of tokens that come one after the other. A character may take several of them.
public struct TextOfTokens {
    /// What there is so far.
    public private(set) var text = ""

    private let tokenizer: any Tokenizer
    private var tokens: [Int] = []
    // The text of tokens depends on those before them. Two pieces are decoded at a time: one that is out, and the next.
    private var first = 0  // of the piece that is out
    private var next = 0  // behind it

    public init(tokenizer: any Tokenizer) {
        self.tokenizer = tokenizer
    }

    /// What a token adds to the text: nothing while a character is not whole.
    public mutating func add(_ token: Int) -> String {
        tokens.append(token)
        let out = decoded(first..<next).unicodeScalars
        let whole = decoded(first..<tokens.count).unicodeScalars
        guard whole.last != "\u{FFFD}" else { return "" }
        // By scalars, not characters: an accent or a part of an emoji joins a character that is out already.
        let same = zip(out, whole).prefix { $0 == $1 }.count
        let piece = String(whole.dropFirst(same))
        guard !piece.isEmpty else { return "" }
        first = next
        next = tokens.count
        text.unicodeScalars.append(contentsOf: piece.unicodeScalars)
        return piece
    }

    private func decoded(_ range: Range<Int>) -> String {
        tokenizer.decode(tokens: Array(tokens[range]), skipSpecialTokens: true)
    }
}

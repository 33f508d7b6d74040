/// What the package $package was exported with. Written by pippin; export again to change it.
public enum ModelFacts {
    /// Tokens that the caches hold.
    public static let contextLength = $context
    /// Tokens of a prompt that are read at a time.
    public static let prefillLength = $prefill
    /// The size of the vocabulary.
    public static let vocabularySize = $vocab
    /// Numbers of an adapter; 0 where the model takes none.
    public static let adapterLength = $adapter
    /// Tokens that end a text.
    public static let stopIds: Set<Int> = [$stop_ids]
    /// Tokens that the model expects before a text.
    public static let startIds: [Int] = [$start_ids]
    /// Of the weights that were exported. Adapters are trained on one model, and fit no other.
    public static let modelSignature = "$signature"
}

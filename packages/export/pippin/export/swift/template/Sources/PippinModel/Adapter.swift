import Foundation

/// The numbers of a low-rank adapter, as the model takes them: one flat input.
///
/// pippin writes one file for each adapter that is exported with a model, adapters/NAME.bin: the signature of the model, 64
/// characters, and behind it float16, the lowest byte first. The model is stored once for all of them.
public struct Adapter {
    public let values: [Float16]

    /// The model as it is.
    public static let none = Adapter(values: [Float16](repeating: 0, count: ModelFacts.adapterLength))

    private init(values: [Float16]) {
        self.values = values
    }

    /// Reads an adapter that was exported with this model.
    public init(contentsOf url: URL) throws {
        let data = try Data(contentsOf: url)
        let header = ModelFacts.modelSignature.utf8.count
        guard data.count == header + 2 * ModelFacts.adapterLength else {
            throw LanguageModelError.adapterLength(
                got: max(0, data.count - header) / 2, expected: ModelFacts.adapterLength)
        }
        guard data.prefix(header).elementsEqual(ModelFacts.modelSignature.utf8) else {
            throw LanguageModelError.adapterOfAnotherModel
        }
        values = data.withUnsafeBytes { bytes in
            (0..<ModelFacts.adapterLength).map { index in
                let bits = bytes.loadUnaligned(fromByteOffset: header + 2 * index, as: UInt16.self)
                return Float16(bitPattern: UInt16(littleEndian: bits))
            }
        }
    }
}

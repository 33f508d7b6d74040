import Foundation

/// The numbers of a low-rank adapter, as the model takes them: one flat input.
///
/// pippin writes one file for each adapter that is exported with a model, adapters/NAME.bin: float16, the lowest byte first.
/// Adapters can be changed from call to call; the model is stored once.
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
        guard data.count == 2 * ModelFacts.adapterLength else {
            throw LanguageModelError.adapterLength(got: data.count / 2, expected: ModelFacts.adapterLength)
        }
        values = data.withUnsafeBytes { bytes in
            (0..<ModelFacts.adapterLength).map { index in
                let bits = bytes.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)
                return Float16(bitPattern: UInt16(littleEndian: bits))
            }
        }
    }
}

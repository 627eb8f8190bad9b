// SPDX-License-Identifier: Apache-2.0

/// The name of a network for machines, which is also part of file names and of a table's name: 1 to 32 lower-case ASCII
/// letters, digits and hyphens, of which the first is a letter.
public struct NetworkName: Hashable, Comparable, Sendable, CustomStringConvertible {
    public let text: String

    /// The network that is there without a definition.
    public static let standard = NetworkName(valid: "default")

    public static let maximumLength = 32

    /// - Throws: `badName`.
    public init(_ text: String) throws(NetworkError) {
        let bytes = Array(text.utf8)
        let isValid = bytes.allSatisfy { byte in
            Self.isLetter(byte) || (0x30...0x39).contains(byte) || byte == UInt8(ascii: "-")
        }
        guard isValid, let first = bytes.first, Self.isLetter(first), bytes.count <= Self.maximumLength else {
            throw .badName(text)
        }
        self.text = text
    }

    private init(valid text: String) { self.text = text }

    private static func isLetter(_ byte: UInt8) -> Bool { (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte) }

    public var description: String { text }

    public static func < (one: NetworkName, other: NetworkName) -> Bool {
        one.text.utf8.lexicographicallyPrecedes(other.text.utf8)
    }
}

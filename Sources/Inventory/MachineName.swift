// SPDX-License-Identifier: Apache-2.0

/// The name of a defined machine, which is also part of file names: 1 to 64 ASCII letters, digits, `.`, `_` and `-`, of
/// which the first is a letter or digit.
public struct MachineName: Hashable, Sendable, Comparable, CustomStringConvertible {
    public let text: String

    /// Bytes: a socket below a user's directory for run-time files must have a path of at most 107.
    public static let maximumLength = 64

    public init(_ text: String) throws(InventoryError) {
        let bytes = Array(text.utf8)
        let isValid = bytes.allSatisfy { byte in
            Self.isAlphanumeric(byte) || byte == UInt8(ascii: ".") || byte == UInt8(ascii: "_")
                || byte == UInt8(ascii: "-")
        }
        guard isValid, let first = bytes.first, Self.isAlphanumeric(first), bytes.count <= Self.maximumLength else {
            throw .badName(text)
        }
        self.text = text
    }

    private static func isAlphanumeric(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
            UInt8(ascii: "0")...UInt8(ascii: "9"):
            true
        default: false
        }
    }

    public var description: String { text }

    public static func < (one: MachineName, other: MachineName) -> Bool {
        one.text.utf8.lexicographicallyPrecedes(other.text.utf8)
    }
}

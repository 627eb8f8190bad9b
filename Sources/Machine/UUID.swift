// SPDX-License-Identifier: Apache-2.0

/// A universally unique identifier (RFC 9562) of a machine.
public struct UUID: Hashable, Sendable, CustomStringConvertible {
    /// The first byte as it is written in the highest eight bits.
    public let rawValue: UInt128

    public init(rawValue: UInt128) { self.rawValue = rawValue }

    /// Reads 32 hexadecimal digits in groups of 8, 4, 4, 4 and 12, as `uuidgen` prints them.
    public init?(_ text: String) {
        let groups = text.split(separator: "-", omittingEmptySubsequences: false)
        guard groups.map(\.utf8.count) == Self.groups else { return nil }
        let digits = groups.joined()
        // A sign is no digit.
        guard digits.utf8.count == 32, digits.allSatisfy(\.isHexDigit), let value = UInt128(digits, radix: 16) else {
            return nil
        }
        rawValue = value
    }

    /// 122 bits of `hash` as version 8, whose meaning is up to the program that creates them (§5.8).
    public init(ofHash hash: UInt128) {
        let version: UInt128 = 0xf << 76, variant: UInt128 = 3 << 62
        rawValue = hash & ~version & ~variant | 8 << 76 | 2 << 62
    }

    /// The bytes in the order of the text form.
    public var bytes: [UInt8] { (0..<16).map { UInt8(truncatingIfNeeded: rawValue >> (120 - 8 * $0)) } }

    public var description: String {
        let digits = String(rawValue, radix: 16)
        var rest = (String(repeating: "0", count: 32 - digits.count) + digits)[...]
        return Self.groups.map { count in
            defer { rest = rest.dropFirst(count) }
            return String(rest.prefix(count))
        }.joined(separator: "-")
    }

    private static let groups = [8, 4, 4, 4, 12]
}

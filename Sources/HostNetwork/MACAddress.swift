// SPDX-License-Identifier: Apache-2.0

/// A 48-bit Ethernet address (IEEE 802) of one station: never a group's, never zero.
public struct MACAddress: Hashable, Sendable, CustomStringConvertible {
    /// The six bytes as a number, the first byte on the wire in bits 40–47.
    public let rawValue: UInt64

    /// Takes a number whose lower 48 bits are the address.
    /// - Throws: `badMACAddress` for a multicast or all-zero address.
    public init(rawValue: UInt64) throws(HostNetworkError) {
        let value = rawValue & 0xffff_ffff_ffff
        if let problem = Self.problem(of: value) { throw .badMACAddress(Self.format(value), problem) }
        self.rawValue = value
    }

    /// Reads the usual notation, `52:54:00:12:34:56`: six pairs of hexadecimal digits, separated by colons or by
    /// hyphens.
    /// - Throws: `badMACAddress` for other text, and for a multicast or all-zero address.
    public init(parsing text: String) throws(HostNetworkError) {
        guard let value = Self.number(from: text) else { throw .badMACAddress(text, .notation) }
        if let problem = Self.problem(of: value) { throw .badMACAddress(text, problem) }
        rawValue = value
    }

    /// A locally administered station's address (bit 1 of the first byte set, bit 0 clear) whose other 46 bits are
    /// those of `value`.
    public init(locallyAdministered value: UInt64) {
        rawValue = (value & 0xffff_ffff_ffff | Self.localBit) & ~Self.groupBit
    }

    /// A random locally administered address.
    public static func random() -> MACAddress {
        MACAddress(locallyAdministered: UInt64.random(in: 0...UInt64.max))
    }

    /// The six bytes in the order of the wire.
    public var bytes: [UInt8] { (0..<6).map { byte(at: $0) } }

    /// Byte `index` (0–5) in the order of the wire; 0 outside.
    public func byte(at index: Int) -> UInt8 { UInt8(truncatingIfNeeded: rawValue >> (40 - 8 * index)) }

    public var description: String { Self.format(rawValue) }

    /// The reason why an address cannot be a station's.
    public enum Problem: Equatable, Sendable {
        case notation, multicast, zero
    }

    private static let localBit: UInt64 = 0x0200_0000_0000
    private static let groupBit: UInt64 = 0x0100_0000_0000

    private static func problem(of value: UInt64) -> Problem? {
        if value == 0 { return .zero }
        return value & groupBit != 0 ? .multicast : nil
    }

    private static func number(from text: String) -> UInt64? {
        let bytes = Array(text.utf8)
        guard bytes.count == 17, bytes[2] == UInt8(ascii: ":") || bytes[2] == UInt8(ascii: "-") else { return nil }
        var value: UInt64 = 0
        for (position, byte) in bytes.enumerated() {
            if position % 3 == 2 {
                guard byte == bytes[2] else { return nil }
            } else {
                guard let digit = hexadecimalDigit(byte) else { return nil }
                value = value << 4 | digit
            }
        }
        return value
    }

    private static func hexadecimalDigit(_ byte: UInt8) -> UInt64? {
        switch byte {
        case UInt8(ascii: "0")...UInt8(ascii: "9"): UInt64(byte - UInt8(ascii: "0"))
        case UInt8(ascii: "a")...UInt8(ascii: "f"): UInt64(byte - UInt8(ascii: "a") + 10)
        case UInt8(ascii: "A")...UInt8(ascii: "F"): UInt64(byte - UInt8(ascii: "A") + 10)
        default: nil
        }
    }

    private static func format(_ value: UInt64) -> String {
        (0..<6).map { index in
            let byte = UInt8(truncatingIfNeeded: value >> (40 - 8 * index))
            return (byte < 16 ? "0" : "") + String(byte, radix: 16)
        }.joined(separator: ":")
    }
}

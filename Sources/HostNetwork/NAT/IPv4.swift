// SPDX-License-Identifier: Apache-2.0

/// An IPv4 address.
public struct IPv4Address: Hashable, Comparable, Sendable, CustomStringConvertible {
    /// In the host's byte order: 10.0.0.1 is 0x0a000001.
    public let rawValue: UInt32

    public init(rawValue: UInt32) { self.rawValue = rawValue }

    /// Reads four decimal numbers without leading zeros, `192.0.2.1`; nil for other text.
    public init?(_ text: some StringProtocol) {
        let parts = text.split(separator: ".", omittingEmptySubsequences: false)
        guard parts.count == 4 else { return nil }
        var value: UInt32 = 0
        for part in parts {
            guard (1...3).contains(part.utf8.count), part.utf8.allSatisfy({ (0x30...0x39).contains($0) }),
                part == "0" || part.first != "0", let number = UInt8(part)
            else { return nil }
            value = value << 8 | UInt32(number)
        }
        rawValue = value
    }

    /// The four bytes, in the order they are written.
    public var bytes: [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: rawValue >> (24 - 8 * $0)) } }

    public var description: String { bytes.map(String.init).joined(separator: ".") }

    public static func < (one: IPv4Address, other: IPv4Address) -> Bool { one.rawValue < other.rawValue }
}

/// A range of addresses with a common prefix: `192.0.2.0/24`.
public struct Subnet: Hashable, Sendable, CustomStringConvertible {
    /// Its first address.
    public let base: IPv4Address
    /// Bits of the prefix, 0–32.
    public let length: Int

    /// The subnet of an address.
    /// - Parameter length: bits of the prefix; what is outside of 0–32 is taken as the nearest of them.
    public init(of address: IPv4Address, length: Int) {
        self.length = min(32, max(0, length))
        base = IPv4Address(rawValue: address.rawValue & Self.mask(self.length))
    }

    /// Reads `192.0.2.0/24`: an address of the subnet, and the bits of the prefix.
    public init?(_ text: some StringProtocol) {
        let parts = text.split(separator: "/", omittingEmptySubsequences: false)
        guard parts.count == 2, let address = IPv4Address(parts[0]), (1...2).contains(parts[1].utf8.count),
            parts[1].utf8.allSatisfy({ (0x30...0x39).contains($0) }), let length = Int(parts[1]), length <= 32
        else { return nil }
        self.init(of: address, length: length)
    }

    public var mask: IPv4Address { IPv4Address(rawValue: Self.mask(length)) }

    /// Its last address.
    public var last: IPv4Address { IPv4Address(rawValue: base.rawValue | ~Self.mask(length)) }

    /// An address of it, counted from the first.
    public func address(_ offset: UInt32) -> IPv4Address { IPv4Address(rawValue: base.rawValue &+ offset) }

    public func contains(_ address: IPv4Address) -> Bool { address.rawValue & Self.mask(length) == base.rawValue }

    public func overlaps(_ other: Subnet) -> Bool { contains(other.base) || other.contains(base) }

    public var description: String { "\(base)/\(length)" }

    private static func mask(_ length: Int) -> UInt32 { length == 0 ? 0 : ~0 << UInt32(32 - length) }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// An address that a network's DHCP server has given to a guest.
public struct Lease: Equatable, Sendable {
    /// Seconds since 1970; nil for a lease without an end.
    public let end: UInt64?
    public let mac: MACAddress
    public let address: IPv4Address
    /// The guest's own name, or the one that its machine has; nil if it has none.
    public let host: String?

    /// The longest name that is kept, in bytes (RFC 1035 §2.3.4).
    static let longestName = 253

    /// Reads a line of dnsmasq's file: the end, the Ethernet address, the address, the host's name and the client's
    /// identifier, with spaces between them. A part of each line is from a guest, so what is no such line is nil.
    init?(line: some StringProtocol) {
        let words = line.split(separator: " ")
        guard words.count >= 4, let end = UInt64(words[0]), let mac = try? MACAddress(parsing: String(words[1])),
            let address = IPv4Address(words[2])
        else { return nil }
        self.end = end == 0 ? nil : end
        self.mac = mac
        self.address = address
        let name = String(words[3])
        host = name == "*" || name.utf8.count > Self.longestName ? nil : name
    }

    public init(end: UInt64?, mac: MACAddress, address: IPv4Address, host: String?) {
        (self.end, self.mac, self.address, self.host) = (end, mac, address, host)
    }

    /// Bytes; dnsmasq gives out a bounded number of addresses, of about 100 bytes each.
    static let limit = 4 << 20

    /// Those of a file that are within a subnet (nil: any) and have not ended, by address.
    /// - Parameter now: seconds since 1970.
    static func all(in text: [UInt8], subnet: Subnet?, now: UInt64) -> [Lease] {
        String(decoding: text, as: UTF8.self).split(separator: "\n").compactMap { Lease(line: $0) }
            .filter { lease in (lease.end.map { $0 > now } ?? true) && subnet?.contains(lease.address) != false }
            .sorted { $0.address < $1.address }
    }
}

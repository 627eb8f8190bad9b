// SPDX-License-Identifier: Apache-2.0

/// A range of addresses that the host uses: of one of its interfaces, or a route's.
struct UsedRange: Equatable {
    let subnet: Subnet
    /// The interface's index; 0 if the route has none.
    let interface: Int32
}

/// Finds addresses for a network that nothing on the host uses.
enum AddressChoice {
    /// Of the networks that are chosen.
    static let length = 24

    /// What is tried, in this order: parts of private ranges (RFC 1918) that few others choose by themselves.
    static let candidates: [Subnet] =
        (0..<64).map { subnet(10, 213, $0) } + (0..<16).map { subnet(172, 29, $0) }
        + (200..<250).map { subnet(192, 168, $0) }

    private static func subnet(_ first: UInt32, _ second: UInt32, _ third: UInt32) -> Subnet {
        Subnet(of: IPv4Address(rawValue: first << 24 | second << 16 | third << 8), length: length)
    }

    /// What a range would collide with; nil if nothing.
    ///
    /// A default route collides with nothing, nor does one that is split in a few parts, as VPNs have it.
    static func collision(of subnet: Subnet, with used: [UsedRange]) -> UsedRange? {
        used.first { $0.subnet.length >= 4 && $0.subnet.overlaps(subnet) }
    }

    /// - Parameters:
    ///   - last: the range that the network had before, which comes first.
    ///   - servers: addresses that the host must go on to reach, such as those of its name servers.
    static func choose(after last: Subnet?, _ used: [UsedRange], servers: [IPv4Address]) throws(NetworkError) -> Subnet
    {
        let free = (last.map { [$0] } ?? []) + candidates
        guard
            let subnet = free.first(where: { subnet in
                collision(of: subnet, with: used) == nil && !servers.contains(where: subnet.contains)
            })
        else { throw .noRangeFree }
        return subnet
    }
}

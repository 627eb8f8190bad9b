// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// What a network of machines is, as its file has it.
///
///     bridge = "swkvm1"
///     subnet = "10.20.30.0/24"
public struct NetworkDefinition: Equatable, Sendable {
    /// The bridge whose ports its machines are.
    public var bridge: InterfaceName
    /// The addresses of the host and of the guests; nil for a range that is free when the network starts.
    public var subnet: Subnet?

    public init(bridge: InterfaceName, subnet: Subnet? = nil) {
        self.bridge = bridge
        self.subnet = subnet
    }

    /// Of the network `default`, unless it is defined otherwise.
    public static let standard = NetworkDefinition(bridge: InterfaceName(fromKernel: "swkvm0"))

    /// Bits of a network's prefix: room for the host's address and some guests, up to the largest private range.
    public static let possibleLengths = 8...29

    /// Whether a range can be a network's: of a possible size, and of addresses that hosts have (RFC 6890).
    static func isUsable(_ subnet: Subnet) -> Bool {
        let others = [(0, 8), (127, 8), (224, 3)].map { (first: UInt32, length: Int) in
            Subnet(of: IPv4Address(rawValue: first << 24), length: length)
        }
        return possibleLengths.contains(subnet.length) && !others.contains { $0.overlaps(subnet) }
    }

    /// Whether a bridge's name can be in the texts for nft and dnsmasq: letters, digits, `-`, `_` and `.`.
    static func isUsable(_ bridge: InterfaceName) -> Bool {
        bridge.text.utf8.allSatisfy { byte in
            (0x30...0x39).contains(byte) || (0x61...0x7a).contains(byte | 0x20) || byte == UInt8(ascii: "-")
                || byte == UInt8(ascii: "_") || byte == UInt8(ascii: ".")
        }
    }

    /// Bytes; a longer file is no definition.
    static let limit = 4096

    var text: String {
        """
        # A network of machines of swkvm (man swkvm-network).
        bridge = "\(bridge)"

        """ + (subnet.map { "subnet = \"\($0)\"\n" } ?? "")
    }

    /// Reads a definition.
    /// - Returns: nil for a text that is none.
    init?(text: String) {
        var bridge: InterfaceName?
        for line in text.split(separator: "\n") {
            let line = line.drop { $0 == " " || $0 == "\t" }
            if line.isEmpty || line.first == "#" { continue }
            let parts = line.split(separator: "\"", omittingEmptySubsequences: false)
            guard parts.count == 3, parts[2].allSatisfy({ $0 == " " || $0 == "\r" }) else { return nil }
            switch parts[0].filter({ $0 != " " && $0 != "\t" }) {
            case "bridge=": bridge = try? InterfaceName(String(parts[1]))
            case "subnet=":
                guard let subnet = Subnet(parts[1]), Self.isUsable(subnet) else { return nil }
                self.subnet = subnet
            default: return nil
            }
        }
        guard let bridge, Self.isUsable(bridge) else { return nil }
        self.bridge = bridge
    }
}

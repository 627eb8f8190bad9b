// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// dnsmasq(8) as a network's server of addresses and names.
enum DNSMasq {
    static let package = "dnsmasq-base"

    static func find() -> String? { HelperProgram.find("dnsmasq") }

    /// Its whole configuration: the host's own, in /etc, does not count.
    ///
    /// What a guest says of itself counts as little as possible. A client identifier (`dhcp-ignore-clid`) would give it
    /// a second address for another machine's MAC address, and a name of its own (`dhcp-ignore-names`) one that others
    /// look for, such as `wpad`. `bind-dynamic` also checks on which interface a request came in: a host's neighbours
    /// that send to the bridge's address get no answer.
    static func configuration(
        _ files: NetworkFiles, bridge: InterfaceName, subnet: Subnet, user: String
    ) -> String {
        let range = dynamicRange(of: subnet)
        return """
            # Written by swkvm for the network \(files.name), at each start of it.
            interface=\(bridge)
            except-interface=lo
            bind-dynamic
            user=\(user)
            pid-file=\(files.dnsmasqProcess)
            dhcp-range=\(range.lowerBound),\(range.upperBound),\(subnet.mask),12h
            dhcp-leasefile=\(files.leases)
            dhcp-hostsdir=\(files.hosts)
            dhcp-authoritative
            dhcp-no-override
            dhcp-ignore-clid
            dhcp-ignore-names
            no-ping
            quiet-dhcp
            no-hosts
            domain-needed
            host-record=host,\(subnet.address(1))

            """
    }

    /// The addresses for whoever asks. The host has the first one of a subnet, and the last one is the broadcast's.
    static func dynamicRange(of subnet: Subnet) -> ClosedRange<IPv4Address> {
        subnet.address(2)...IPv4Address(rawValue: fixedRange(of: subnet).lowerBound.rawValue &- 1)
    }

    /// The addresses for machines with a name: the upper half, which no guest can use up by asking under many MAC
    /// addresses.
    static func fixedRange(of subnet: Subnet) -> ClosedRange<IPv4Address> {
        let last = subnet.last.rawValue
        return IPv4Address(rawValue: last - (last - subnet.base.rawValue) / 2)...IPv4Address(rawValue: last &- 1)
    }

    /// The address for a machine: the one that it has, if it has one, or else one that no other has.
    /// - Parameters:
    ///   - leases: of the network.
    ///   - lines: those of all machines, as ``host(_:_:_:)`` writes them.
    /// - Returns: nil if all are given out.
    static func address(for mac: MACAddress, in subnet: Subnet, _ leases: [Lease], lines: [String]) -> IPv4Address? {
        if let own = leases.first(where: { $0.mac == mac && $0.address != subnet.address(1) }) { return own.address }
        let given = lines.compactMap { line -> IPv4Address? in
            let words = line.split { $0 == "," || $0 == "\n" }
            return words.count < 2 || words[0] == mac.description ? nil : IPv4Address(words[1])
        }
        let used = Set(given + leases.map(\.address)), range = fixedRange(of: subnet)
        let count = range.upperBound.rawValue - range.lowerBound.rawValue + 1
        // The same one again also where no lease is known any more, mostly.
        let start = mac.bytes.reduce(0 as UInt32) { ($0 &* 31 &+ UInt32($1)) % count }
        return (0..<min(count, 1 << 16)).lazy.map { range.lowerBound.rawValue + (start + $0) % count }
            .map { IPv4Address(rawValue: $0) }.first { !used.contains($0) }
    }

    /// The user that it runs as, from passwd(5): its own, which its package creates, or else nobody.
    static func user(in passwd: [UInt8]) -> String {
        let names = passwd.split(separator: UInt8(ascii: "\n")).map { $0.prefix { $0 != UInt8(ascii: ":") } }
        return names.contains { $0.elementsEqual("dnsmasq".utf8) } ? "dnsmasq" : "nobody"
    }

    /// A machine's line in its file: whoever has this MAC address gets this address and this name, unless the name
    /// means something else there (``isKeyword(_:)``).
    static func host(_ mac: MACAddress, _ address: IPv4Address?, _ name: String) -> String {
        let label = hostName(name)
        return ([mac.description] + [address?.description, isKeyword(label) ? nil : label].compactMap { $0 })
            .joined(separator: ",") + "\n"
    }

    /// The name of that file: two machines may have names that become one here.
    static func hostFile(_ mac: MACAddress) -> String {
        String(mac.description.map { $0 == ":" ? "-" : $0 })
    }

    /// Whether a word of a line for a host is an instruction, or the time that an address is given for (dnsmasq(8),
    /// `dhcp-host`).
    static func isKeyword(_ label: String) -> Bool {
        if label == "ignore" || label == "infinite" { return true }
        let rest = label.utf8.drop { (0x30...0x39).contains($0) }
        return rest.isEmpty
            || rest.count == 1 && rest.count < label.utf8.count && "smhdw".utf8.contains(rest.first! | 0x20)
    }

    /// A machine's name as a name of a host (RFC 952): a dot would begin a domain.
    static func hostName(_ name: String) -> String {
        let label = name.utf8.map { byte in
            byte == UInt8(ascii: ".") || byte == UInt8(ascii: "_") ? UInt8(ascii: "-") : byte
        }
        return String(decoding: label.prefix(63), as: UTF8.self)
    }
}

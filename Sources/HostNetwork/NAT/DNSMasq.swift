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
        // The first address is the host's, and the last one the broadcast's.
        let first = subnet.address(2), last = IPv4Address(rawValue: subnet.last.rawValue &- 1)
        return """
            # Written by swkvm for the network \(files.name), at each start of it.
            interface=\(bridge)
            except-interface=lo
            bind-dynamic
            user=\(user)
            pid-file=\(files.dnsmasqProcess)
            dhcp-range=\(first),\(last),\(subnet.mask),12h
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

    /// The user that it runs as, from passwd(5): its own, which its package creates, or else nobody.
    static func user(in passwd: [UInt8]) -> String {
        let names = passwd.split(separator: UInt8(ascii: "\n")).map { $0.prefix { $0 != UInt8(ascii: ":") } }
        return names.contains { $0.elementsEqual("dnsmasq".utf8) } ? "dnsmasq" : "nobody"
    }

    /// A machine's line in its file: whoever has this address gets this name.
    /// - Returns: nil for a name that means something else to dnsmasq in such a line.
    static func host(_ mac: MACAddress, _ name: String) -> String? {
        let label = hostName(name)
        return isKeyword(label) ? nil : "\(mac),\(label)\n"
    }

    /// The name of that file: two machines may have names that become one here.
    static func hostFile(_ mac: MACAddress) -> String {
        String(mac.description.map { $0 == ":" ? "-" : $0 })
    }

    /// Whether a word of a line for a host is an instruction, or the time that an address is given for (dnsmasq(8),
    /// `dhcp-host`).
    private static func isKeyword(_ label: String) -> Bool {
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

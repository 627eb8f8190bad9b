// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// dnsmasq(8) as a network's server of addresses and names.
enum DNSMasq {
    static let package = "dnsmasq-base"

    static func find() -> String? { HelperProgram.find("dnsmasq") }

    /// Its whole configuration: the host's own, in /etc, does not count.
    static func configuration(
        _ files: NetworkFiles, bridge: InterfaceName, subnet: Subnet, user: String
    ) -> String {
        // The first address is the host's, and the last one the broadcast's.
        let first = subnet.address(2), last = IPv4Address(rawValue: subnet.last.rawValue - 1)
        return """
            # Written by swkvm for the network \(files.name), at each start of it.
            interface=\(bridge)
            except-interface=lo
            bind-interfaces
            user=\(user)
            pid-file=\(files.dnsmasqProcess)
            dhcp-range=\(first),\(last),\(subnet.mask),12h
            dhcp-leasefile=\(files.leases)
            dhcp-hostsdir=\(files.hosts)
            dhcp-authoritative
            dhcp-no-override
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
    static func host(_ mac: MACAddress, _ name: String) -> String { "\(mac),\(hostName(name))\n" }

    /// A machine's name as a name of a host (RFC 952): a dot would begin a domain.
    static func hostName(_ name: String) -> String {
        let label = name.utf8.map { byte in
            byte == UInt8(ascii: ".") || byte == UInt8(ascii: "_") ? UInt8(ascii: "-") : byte
        }
        return String(decoding: label.prefix(63), as: UTF8.self)
    }
}

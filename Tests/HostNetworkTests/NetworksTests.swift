// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@testable import HostNetwork

@Suite(.timed) struct SubnetTests {
    @Test func addressesAreWrittenAsTheyAreRead() {
        for text in ["0.0.0.0", "10.213.0.1", "255.255.255.255"] { #expect(IPv4Address(text)?.description == text) }
        for text in [
            "", "1.2.3", "1.2.3.4.5", "1.2.3.256", "01.2.3.4", "1.2.3.04", "1..2.3", "+1.2.3.4", "1.2.3.4 ", "a.b.c.d",
            "1.2.3.9999999999999999999",
        ] { #expect(IPv4Address(text) == nil, "\(text)") }
    }

    @Test func ranges() throws {
        let subnet = try #require(Subnet("10.20.30.40/24"))
        #expect(
            "\(subnet)" == "10.20.30.0/24" && "\(subnet.mask)" == "255.255.255.0" && "\(subnet.last)" == "10.20.30.255")
        #expect("\(subnet.address(1))" == "10.20.30.1")
        #expect(Subnet("0.0.0.0/0").map { "\($0.mask) \($0.last)" } == "0.0.0.0 255.255.255.255")
        #expect(Subnet("1.2.3.4/32").map { "\($0.mask) \($0.last)" } == "255.255.255.255 1.2.3.4")
        for text in ["10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0/8", "10.0.0.0/008"] {
            #expect(Subnet(text) == nil, "\(text)")
        }
        for (other, overlaps) in [
            ("10.0.0.0/8", true), ("10.20.30.128/25", true), ("10.20.31.0/24", false), ("10.20.30.7/32", true),
            ("0.0.0.0/0", true), ("10.20.28.0/22", true),
        ] { #expect(subnet.overlaps(try #require(Subnet(other))) == overlaps, "\(other)") }
    }

    private func used(_ texts: String...) throws -> [UsedRange] {
        try texts.map { UsedRange(subnet: try #require(Subnet($0)), interface: 3) }
    }

    @Test func aRangeThatNothingUsesIsChosen() throws {
        let first = try #require(Subnet("10.213.0.0/24")), second = try #require(Subnet("10.213.1.0/24"))
        #expect(try AddressChoice.choose(after: nil, [], servers: []) == first)
        #expect(try AddressChoice.choose(after: second, [], servers: []) == second)
        #expect(try AddressChoice.choose(after: second, used("10.213.1.77/32"), servers: []) == first)
        #expect(try AddressChoice.choose(after: nil, used("10.213.0.0/24"), servers: []) == second)
        // A VPN to all of one private range, default routes in halves, and a name server beyond the default route.
        #expect("\(try AddressChoice.choose(after: nil, used("10.0.0.0/8"), servers: []))" == "172.29.0.0/24")
        #expect(
            try AddressChoice.choose(after: nil, used("0.0.0.0/1", "128.0.0.0/1", "0.0.0.0/0"), servers: []) == first)
        #expect(
            try AddressChoice.choose(after: nil, [], servers: [#require(IPv4Address("10.213.0.53"))]) == second)
        #expect(throws: NetworkError.noRangeFree) {
            try AddressChoice.choose(after: nil, used("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"), servers: [])
        }
    }
}

@Suite(.timed) struct LeaseTests {
    private func all(_ text: String, now: UInt64 = 1000, subnet: String? = nil) -> [String] {
        Lease.all(in: Array(text.utf8), subnet: subnet.flatMap { Subnet($0) }, now: now)
            .map { "\($0.address) \($0.mac) \($0.host ?? "-") \($0.end.map { "\($0)" } ?? "-")" }
    }

    @Test func aFile() {
        let text = """
            2000 52:54:00:00:00:02 10.0.0.20 web 01:52:54:00:00:00:02
            0 52:54:00:00:00:01 10.0.0.3 * *
            999 52:54:00:00:00:03 10.0.0.4 old *

            """
        #expect(all(text) == ["10.0.0.3 52:54:00:00:00:01 - -", "10.0.0.20 52:54:00:00:00:02 web 2000"])
        #expect(all(text, subnet: "10.0.0.0/28") == ["10.0.0.3 52:54:00:00:00:01 - -"])
    }

    /// A part of a line is what a guest has sent.
    @Test func whatIsNoLeaseIsSkipped() {
        let long = String(repeating: "a", count: 254)
        for line in [
            "", "duid 00:01:00", "2000", "2000 52:54:00:00:00:02", "2000 52:54:00:00:00:02 10.0.0.20",
            "-1 52:54:00:00:00:02 10.0.0.2 a *", "2000 53:54:00:00:00:02 10.0.0.2 a *",
            "2000 00:00:00:00:00:00 10.0.0.2 a *", "2000 52:54:00:00:00:02 fe80::1 a *",
            "99999999999999999999999 52:54:00:00:00:02 10.0.0.2 a *", "\0\0\0", "2000 06-52:54:00:00:00:02 1.2.3.4 a *",
        ] { #expect(all(line) == [], "\(line)") }
        #expect(all("2000 52:54:00:00:00:02 10.0.0.2 \(long) *") == ["10.0.0.2 52:54:00:00:00:02 - 2000"])
        #expect(Lease.all(in: [0xff, 0xfe, 0x0a, 0x80], subnet: nil, now: 0) == [])
    }

    @Test func bytesAtRandom() {
        var generator = SeededGenerator(seed: 7)
        let line = Array("2000 52:54:00:00:00:02 10.0.0.20 web 01:52\n".utf8)
        for _ in 0..<2000 {
            var bytes = line + line
            for _ in 0..<3 {
                bytes[Int.random(in: 0..<bytes.count, using: &generator)] = UInt8.random(in: 0...255, using: &generator)
            }
            #expect(Lease.all(in: bytes, subnet: nil, now: 0).count <= 4)
        }
    }
}

@Suite(.timed) struct NetworkTextTests {
    private func files(_ name: String = "lab", in home: String = "/h") throws -> NetworkFiles {
        NetworkFiles(name: try NetworkName(name), directories: NetworkDirectories(home: home))
    }

    @Test func names() throws {
        for name in ["default", "a", "lab-2", String(repeating: "a", count: 32)] { _ = try NetworkName(name) }
        for name in ["", "Lab", "2lab", "-a", "a_b", "a.b", "a/b", "a\"b", String(repeating: "a", count: 33)] {
            #expect(throws: NetworkError.badName(name)) { try NetworkName(name) }
        }
    }

    @Test func definitionsAreReadAsTheyAreWritten() throws {
        for definition in [
            NetworkDefinition.standard,
            NetworkDefinition(bridge: try InterfaceName("br-lab"), subnet: Subnet("10.20.30.0/24")),
        ] { #expect(NetworkDefinition(text: definition.text) == definition) }
        for text in [
            "", "bridge = br0", "bridge = \"\"", "bridge = \"a b\"", "bridge = \"b\"\nsubnet = \"1.2.3.4\"",
            "bridge = \"b\"\nmtu = \"3\"", "[network]\nbridge = \"b\"",
            // No room for a guest; larger than any private range; no addresses of hosts.
            "bridge = \"b\"\nsubnet = \"10.0.0.0/30\"", "bridge = \"b\"\nsubnet = \"0.0.0.0/32\"",
            "bridge = \"b\"\nsubnet = \"10.0.0.0/7\"", "bridge = \"b\"\nsubnet = \"0.1.0.0/16\"",
            "bridge = \"b\"\nsubnet = \"127.1.0.0/16\"", "bridge = \"b\"\nsubnet = \"224.0.0.0/8\"",
            "bridge = \"b\"\nsubnet = \"255.255.255.0/24\"",
        ] { #expect(NetworkDefinition(text: text) == nil, "\(text)") }
    }

    @Test func statesAreReadAsTheyAreWritten() throws {
        let settings = [
            nil, Forwarding.Settings(acceptsRedirects: false, interfaces: []),
            Forwarding.Settings(
                acceptsRedirects: true, interfaces: [try InterfaceName("eth0"), try InterfaceName("eth0.5")]),
        ]
        for forwarding in settings {
            let state = NetworkState(
                bridge: try InterfaceName("swkvm0"), subnet: try #require(Subnet("10.213.0.0/24")),
                namespace: 4_026_531_840, forwarding: forwarding)
            #expect(NetworkState(text: state.text) == state && state.hasSetForwarding == (forwarding != nil))
        }
        for text in [
            "", "bridge swkvm0\n", "bridge swkvm0\nsubnet 10.0.0.0/8\nnamespace x", "a", "bridge a\nsubnet 1/2",
            "bridge swkvm0\nsubnet 10.0.0.0/31\nnamespace 3",
        ] {
            #expect(NetworkState(text: text) == nil, "\(text)")
        }
    }

    @Test func namesOfHosts() throws {
        let mac = try MACAddress(parsing: "52:54:00:00:00:02")
        let address = IPv4Address("10.213.0.200")
        #expect(DNSMasq.host(mac, address, "web.2_b") == "52:54:00:00:00:02,10.213.0.200,web-2-b\n")
        // In dnsmasq's words: no address at all; a lease without an end, or of so many minutes.
        for name in ["ignore", "infinite", "120", "0", "2h", "45m", "10s", "2d", "1w", "5H"] {
            #expect(DNSMasq.host(mac, address, name) == "52:54:00:00:00:02,10.213.0.200\n", "\(name)")
        }
        for name in ["Ignore", "3x", "12ab", "h", "2-h", "ignored"] {
            #expect(DNSMasq.host(mac, nil, name) == "52:54:00:00:00:02,\(name)\n")
        }
        #expect(DNSMasq.hostFile(mac) == "52-54-00-00-00-02")
        #expect(DNSMasq.hostName(String(repeating: "a", count: 64)).count == 63)
        #expect(DNSMasq.user(in: Array("root:x:0:0\ndnsmasq:x:101:65534:\n".utf8)) == "dnsmasq")
        #expect(DNSMasq.user(in: Array("root:x:0:0\nnotdnsmasq:x:1:1\n".utf8)) == "nobody")
    }

    @Test func addressesOfMachines() throws {
        let subnet = try #require(Subnet("10.20.30.0/29"))
        #expect("\(DNSMasq.fixedRange(of: subnet))" == "10.20.30.4...10.20.30.6")
        let largest = try #require(Subnet("10.0.0.0/8"))
        #expect("\(DNSMasq.dynamicRange(of: largest))" == "10.0.0.2...10.127.255.255")
        #expect("\(DNSMasq.fixedRange(of: largest))" == "10.128.0.0...10.255.255.254")
        // Three machines get the three addresses, the fourth none; each gets its own again.
        var lines: [String] = [], addresses: [IPv4Address?] = []
        for number in 1...4 {
            let mac = try MACAddress(parsing: "52:54:00:00:00:0\(number)")
            let address = DNSMasq.address(for: mac, in: subnet, [], lines: lines)
            #expect(
                DNSMasq.address(for: mac, in: subnet, [], lines: lines + [DNSMasq.host(mac, address, "a")]) == address)
            lines.append(DNSMasq.host(mac, address, "m\(number)"))
            addresses.append(address)
        }
        #expect(Set(addresses.compactMap { $0?.description }) == ["10.20.30.4", "10.20.30.5", "10.20.30.6"])
        #expect(addresses[3] == nil)
        // A lease of its own comes first; one of another machine is not given away.
        let mac = try MACAddress(parsing: "52:54:00:00:00:09"), other = try MACAddress(parsing: "52:54:00:00:00:08")
        let lease = Lease(end: nil, mac: mac, address: try #require(IPv4Address("10.20.30.2")), host: nil)
        #expect(DNSMasq.address(for: mac, in: subnet, [lease], lines: lines) == lease.address)
        for last in [4, 5, 6] as [UInt32] {
            let taken = Lease(end: nil, mac: other, address: subnet.address(last), host: nil)
            #expect(DNSMasq.address(for: mac, in: subnet, [taken], lines: []) != taken.address)
        }
        #expect(DNSMasq.address(for: mac, in: subnet, [], lines: ["", ",", "junk\n", "a,b,c,d"]) != nil)
    }

    /// dnsmasq itself finds nothing wrong.
    @Test(.enabled(if: DNSMasq.find() != nil, "needs dnsmasq")) func theConfigurationIsValid() throws {
        let program = try #require(DNSMasq.find())
        let path = "/tmp/swkvm-dnsmasq-\(getpid())"
        defer { removeName(path) }
        let text = DNSMasq.configuration(
            try files(), bridge: try InterfaceName("swkvm0"), subnet: try #require(Subnet("10.20.30.0/29")),
            user: "root")
        #expect(text.contains("dhcp-range=10.20.30.2,10.20.30.3,255.255.255.248,12h\n"))
        try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_EXCL, mode: 0o600).writeAll(text.utf8)
        let result = try HelperProgram.run(program, ["dnsmasq", "--test", "--conf-file=\(path)"], patience: 20)
        #expect(result.status == 0, "\(result.text)")
    }

    /// nft accepts the rules, twice, and they leave another table alone.
    @Test(.enabled(if: mayMakeNamespaces && HelperProgram.find("nft") != nil, "needs root and nft"))
    func theRulesAreValid() throws {
        let nft = try #require(HelperProgram.find("nft"))
        let path = "/tmp/swkvm-nft-\(getpid())"
        defer { removeName(path) }
        func apply(_ text: String) throws {
            removeName(path)
            try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_EXCL, mode: 0o600).writeAll(text.utf8)
            let result = try HelperProgram.run(nft, ["nft", "-f", path], patience: 20)
            #expect(result.status == 0, "\(result.text)")
        }
        func has(_ table: String) throws -> Bool {
            try HelperProgram.run(nft, ["nft", "list", "table", "ip", table], patience: 20).status == 0
        }
        let rules = FirewallRules(
            name: try NetworkName("lab-2"), bridge: try InterfaceName("swkvm0"),
            subnet: try #require(Subnet("10.20.30.0/24")))
        try inNewNamespace { _ in
            try apply("table ip theirs {\n chain c {\n }\n}\n")
            try apply(rules.text)
            try apply(rules.text)
            #expect(try has("swkvm_lab-2") && has("theirs"))
            try apply(FirewallRules.removal(of: rules.name))
            try apply(FirewallRules.removal(of: rules.name))
            #expect(try !has("swkvm_lab-2") && has("theirs"))
        }
    }

    @Test func aFirewallThatDropsIsFound() {
        func chains(_ table: String, _ rest: String) -> String {
            "table \(table) {\n\tchain FORWARD {\n\t\ttype filter hook \(rest)\n\t}\n}\n"
        }
        let accepts = chains("ip mine", "forward priority filter; policy accept;")
        for hook in [FirewallRules.Hook.forward, .input] {
            #expect(FirewallRules.dropper(in: accepts, at: hook) == nil)
            #expect(FirewallRules.dropper(in: "", at: hook) == nil)
        }
        for (table, rest, isFound) in [
            ("ip filter", "forward priority filter; policy drop;", true),
            ("inet firewall", "forward priority 0; policy drop;", true),
            ("ip6 filter", "forward priority filter; policy drop;", false),
            ("ip filter", "input priority filter; policy drop;", false),
        ] {
            let text = accepts + chains(table, rest)
            let found = FirewallRules.dropper(in: text, at: .forward)
            let isInput = rest.hasPrefix("input")
            #expect((FirewallRules.dropper(in: text, at: .input) != nil) == isInput, "\(table) \(rest)")
            #expect(found == (isFound ? "chain FORWARD of table \(table)" : nil), "\(table) \(rest)")
        }
    }

    /// What an interface has, and what a route leads to, also on an interface that is down.
    @Test(.enabled(if: mayMakeNamespaces, rootNeeded)) func theRangesOfTheHost() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(InterfaceName("br0"), kind: "bridge")
            let bridge = try #require(try host.netlink.link(named: InterfaceName("br0")))
            try host.netlink.add(to: bridge, address: (10, 213, 0, 9), prefixLength: 22)
            let used = try host.netlink.usedRanges()
            let range = UsedRange(subnet: try #require(Subnet("10.213.0.0/22")), interface: bridge.index)
            #expect(used.contains(range))
            #expect("\(try AddressChoice.choose(after: nil, used, servers: []))" == "10.213.4.0/24")
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import DiskImage
import GuestMemory
import HostNetwork
import Inventory
import Machine
import TestSupport
import Testing

@testable import swkvm

/// What the words of the command line mean.
@Suite(.timed) struct ByteSizeTests {
    @Test(
        arguments: [
            ("0", 0), ("4096", 4096), ("1K", 1 << 10), ("64k", 64 << 10), ("512M", 512 << 20), ("512m", 512 << 20),
            ("2G", 2 << 30), ("2GB", 2 << 30),
            ("2GiB", 2 << 30), ("2gib", 2 << 30), ("1T", 1 << 40), ("100B", 100), ("18446744073709551615", UInt64.max),
            ("007M", 7 << 20),
            ("2Gi", 2 << 30), ("2gi", 2 << 30), ("512Mi", 512 << 20), ("1.5G", 1536 << 20), ("1.5Gi", 1536 << 20),
            ("1.5GiB", 1536 << 20), ("0.5k", 512),
            ("1.000001K", 1024), ("2P", 2 << 50), ("1.25E", 5 << 58), ("15.999999E", 0xfffffef39085f4a1),
        ] as [(String, UInt64)])
    func sizes(text: String, bytes: UInt64) {
        #expect(ByteSize(argument: text)?.bytes == bytes)
    }

    @Test(arguments: [
        "", "K", "G", "iB", "B", "-1", "+1", "1.5", "1.5B", "1..5G", "1.5.5G", ".5G", "1.G", "1.0000001G", "1.-5G",
        "2Kii", "5i", "5iB", "1\u{212A}", "1,5G", "0x10", "12X", "1 G", " 1G", "1G ", "G1", "1GG", "1KiBB",
        "18446744073709551616",
        "18014398509481984K", "16777216T", "99999999999999999999999", "１G", "1\u{0}",
    ])
    func noSizes(text: String) {
        #expect(ByteSize(argument: text) == nil)
    }

    @Test(arguments: [
        (UInt64(512 << 20), "512M"), (2 << 30, "2G"), (1536 << 20, "1536M"), (1 << 40, "1024G"), (4097, "4097"),
        (0, "0"),
    ])
    func isShownAsItWouldBeGiven(bytes: UInt64, text: String) {
        #expect(ByteSize(bytes: bytes).description == text)
        #expect(ByteSize(argument: text)?.bytes == bytes)
    }
}

@Suite(.timed) struct OptionListTests {
    private func items(_ text: String) -> [String] {
        OptionList(text).items.map { $0.key + ($0.value.map { "|" + $0 } ?? "") }
    }

    @Test(
        arguments: [
            ("", [""]), ("a", ["a"]), ("a,b=c", ["a", "b|c"]), ("a=b=c", ["a|b=c"]), ("a,,b,c", ["a,b", "c"]),
            ("a,,,b", ["a,", "b"]),
            (",a", ["", "a"]), ("a,", ["a", ""]), (",,", [","]), ("a=", ["a|"]), ("=", ["|"]),
        ] as [(String, [String])])
    func splits(text: String, expected: [String]) {
        #expect(items(text) == expected)
    }
}

@Suite(.timed) struct DiskArgumentTests {
    @Test func pathAlone() throws {
        let disk = try DiskArgument(parsing: "disk.qcow2").disk
        #expect(disk.path == "disk.qcow2" && disk.options.format == nil && !disk.options.readOnly)
        #expect(
            disk.options.cache == .writeback && disk.options.locking && disk.options.allowsBacking && disk.serial == nil
        )
    }

    @Test func everything() throws {
        let disk = try DiskArgument(parsing: "/a/b,format=raw,ro,cache=none,backing=off,serial=12345678901234567890")
            .disk
        #expect(!disk.options.allowsBacking)
        #expect(disk.path == "/a/b" && disk.options.format == .raw && disk.options.readOnly)
        #expect(disk.options.cache == .none && disk.serial == "12345678901234567890")
        #expect(disk.options.namedFiles == NamedFiles())
        #expect(
            try DiskArgument(parsing: "a.qcow2,backing-dir=/var/bases,backing-dir=b").disk.options.namedFiles
                == NamedFiles(directories: ["/var/bases", "b"]))
        #expect(try DiskArgument(parsing: "a.qcow2,backing=anywhere").disk.options.namedFiles == .anywhere)
    }

    @Test(arguments: [
        ("a,,b.raw,ro", "a,b.raw"), ("a=b.raw,ro", "a=b.raw"), ("=x,ro", "=x"), ("ro,ro", "ro"),
        ("ein pfad ü.raw,ro", "ein pfad ü.raw"),
    ])
    func strangePaths(argument: String, path: String) throws {
        let disk = try DiskArgument(parsing: argument).disk
        #expect(disk.path == path && disk.options.readOnly)
    }

    @Test(arguments: [
        ("", "a disk needs a path"), (",ro", "a disk needs a path"),
        ("d,backing-dir=", "disk d: backing-dir= needs a directory"),
        ("d,format=qed", "disk d: format=qed is not recognized; expected one of raw, qcow2, vmdk, vdi, vpc, vhdx"),
        ("d,format=", "disk d: format= is not recognized"),
        ("d,format", "disk d: 'format' is not recognized"),
        ("d,ro=yes", "disk d: 'ro=yes' is not recognized; expected format=, "),
        ("d,cache=unsafe", "disk d: cache=unsafe is not recognized; expected writeback or none"),
        ("d,serial=", "disk d: a serial number has 1 to 20 bytes, this one 0"),
        ("d,serial=123456789012345678901", "disk d: a serial number has 1 to 20 bytes, this one 21"),
        ("d,", "disk d: '' is not recognized"),
        ("d,RO", "disk d: 'RO' is not recognized"),
    ])
    func mistakes(argument: String, sentence: String) {
        let error = #expect(throws: ArgumentProblem.self) { try DiskArgument(parsing: argument) }
        #expect(error?.description.hasPrefix(sentence) == true, "\(error?.description ?? "")")
    }
}

@Suite(.timed) struct NetworkArgumentTests {
    private func tap(
        _ argument: String
    ) throws -> (name: String, bridge: String?, create: Bool, mtu: Int?, mac: String?)? {
        let network = try #require(try NetworkArgument(parsing: argument).network)
        guard case .tap(let name, let bridge, let mtu) = network.backend else { return nil }
        return (name?.text ?? "", bridge?.name.text, bridge?.create ?? false, mtu, network.mac?.description)
    }

    @Test func tapAlone() throws {
        let network = try #require(try tap("tap=swtap0"))
        #expect(network == ("swtap0", nil, false, nil, nil))
    }

    @Test func everything() throws {
        let network = try #require(try tap("mtu=9000,create,mac=52:54:00:AB:cd:ef,bridge=br0,tap=t"))
        #expect(network == ("t", "br0", true, 9000, "52:54:00:ab:cd:ef"))
    }

    @Test func networksOfTheHost() throws {
        func backend(_ text: String) throws -> NetworkBackend? { try NetworkArgument(parsing: text).network?.backend }
        #expect(try backend("nat") == .nat(.standard))
        #expect(try backend("mtu=1400,nat=lab,mac=52:54:00:12:34:56") == .nat(NetworkName("lab"), mtu: 1400))
        #expect(try backend("bridge=br0") == .tap(nil, bridge: .init(InterfaceName("br0"))))
        #expect(try backend("macvtap=eth0,queues=2") == .macvtap(on: InterfaceName("eth0")))
        let tap = try #require(try NetworkArgument(parsing: "tap=t,bridge=b,netns=blue").network)
        #expect(
            try tap.backend == .tap(InterfaceName("t"), bridge: .init(InterfaceName("b"))) && tap.namespace == "blue")
        #expect(throws: NetworkError.badName("Lab")) { try NetworkArgument(parsing: "nat=Lab") }
        #expect(try NetworkArgument(parsing: "nat,queues=2,offload=off").network?.queues == 2)
    }

    @Test func user() throws {
        func backend(_ text: String) throws -> NetworkBackend? { try NetworkArgument(parsing: text).network?.backend }
        #expect(try backend("user") == .user())
        #expect(
            try backend("mtu=1500,user,publish=2222:22,mac-lock=on,publish=0.0.0.0:53:53/udp,publish=[::1]:80:8080/tcp")
                == .user(
                    publish: [
                        PublishedPort(parsing: "127.0.0.1:2222:22"), PublishedPort(parsing: "0.0.0.0:53:53/udp"),
                        PublishedPort(parsing: "[::1]:80:8080"),
                    ], mtu: 1500))
        #expect(try backend("stream=/run/a=b,,c,mac=52:54:00:12:34:56") == .stream(path: "/run/a=b,c"))
        #expect(try backend("stream=s,mtu=65520") == .stream(path: "s", mtu: 65520))
        let network = try #require(
            try NetworkArgument(parsing: "user,mac=52:54:00:12:34:56,mac-lock=on,rx-bps=1M,tx-pps=5").network)
        #expect(network.mac?.description == "52:54:00:12:34:56" && network.isMACLocked && !network.isOptional)
        #expect(
            network.limits.receive.bytes?.perSecond == 1 << 20 && network.limits.transmit.operations?.perSecond == 5)
        #expect(try NetworkArgument(parsing: "none").network == nil)
    }

    @Test func descriptor() throws {
        let network = try #require(try NetworkArgument(parsing: "fd=7,mac=52-54-00-12-34-56").network)
        #expect(
            network.backend == .descriptor(7) && network.mac?.description == "52:54:00:12:34:56"
                && network.offload == nil)
        for text in ["fd=7:9:8", "fd=7:9:8,queues=3"] {
            let several = try #require(try NetworkArgument(parsing: text).network)
            #expect(several.backend == .descriptors([7, 9, 8]) && several.queues == 3)
        }
        #expect(try NetworkArgument(parsing: "tap=a,queues=8").network?.queues == 8 && network.queues == 1)
        #expect(try NetworkArgument(parsing: "fd=7,offload=on").network?.offload == true)
        #expect(try NetworkArgument(parsing: "tap=a,offload=off").network?.offload == false)
    }

    @Test(arguments: [
        (
            "",
            "'' is not recognized; expected user, publish=, nat, macvtap=, tap=, bridge=, create, netns=, mac=, mac-lock=on|off, mtu=, offload=on|off, queues=, rx-bps=, rx-bps-burst=, rx-pps=, rx-pps-burst=, tx-bps=, tx-bps-burst=, tx-pps=, tx-pps-burst=, fd=, stream= or none"
        ),
        ("tap", "'tap' is not recognized"), ("create=yes", "'create=yes' is not recognized"),
        ("bridge=br0,create", "create requires tap=NAME"),
        ("create", "a network interface needs user, nat, macvtap=NAME, bridge=NAME, tap=NAME"),
        ("macvtap=eth0,tap=t", "macvtap= cannot be combined with tap="),
        ("macvtap=eth0,mtu=1400", "a macvtap has the MTU of its interface: omit mtu="),
        ("macvtap=eth0,nat", "nat cannot be combined with macvtap="),
        ("netns=a,user", "netns= requires tap= or bridge="),
        ("netns=a,nat", "netns= requires tap= or bridge="),
        ("nat,user", "nat cannot be combined with user: give each interface a --net of its own"),
        ("nat=lab,tap=t", "nat cannot be combined with tap="),
        ("nat,bridge=br0", "nat cannot be combined with bridge="),
        ("nat,publish=1:2", "nat cannot be combined with publish="),
        ("tap=a,create", "create requires bridge=NAME"),
        ("tap=a,mtu=67", "mtu=67 is not a valid MTU; expected 68 to 65521"),
        ("tap=a,offload", "offload is not recognized; expected offload=on or offload=off"),
        ("tap=a,offload=yes", "offload=yes is not recognized; expected offload=on"),
        ("tap=a,mtu=65522", "mtu=65522 is not a valid MTU"), ("tap=a,mtu=", "mtu= is not a valid MTU"),
        ("fd=-1", "fd=-1 is not a file descriptor number"),
        ("fd=x", "fd=x is not a file descriptor number"),
        ("fd=2147483648", "fd=2147483648 is not a file descriptor number"),
        ("fd=0", "fd=0 is a standard stream; expected the descriptor of a TAP, 3 or higher"),
        ("fd=2", "fd=2 is a standard stream"),
        ("fd=3,tap=a", "fd= passes a TAP that is already configured"),
        ("fd=3,bridge=a", "fd= passes a TAP that is already configured"),
        ("tap=a,queues=0", "queues=0 is not valid; expected a number from 1 to 8"),
        ("tap=a,queues=9", "queues=9 is not"),
        ("tap=a,queues=", "queues= is not"),
        ("fd=3:", "fd=3: is not a file descriptor number; expected one such as 3, or several"),
        ("fd=3:2", "fd=3:2 is a standard stream"),
        ("fd=3:4,queues=3", "queues=3 needs as many descriptors; fd= has 2"),
        ("fd=3:4:5:6:7:8:9:10:11", "fd= has 9 descriptors; expected 1 to 8"),
        ("fd=3,create", "fd= passes a TAP that is already configured"),
        (
            "mac=52:54:00:12:34:56",
            "a network interface needs user, nat, macvtap=NAME, bridge=NAME, tap=NAME, fd=N or stream=PATH"
        ),
        ("user=x", "'user=x' is not recognized; expected user, publish="),
        ("user,user", "'user' is given twice"),
        ("user,tap=a", "user cannot be combined with tap="),
        ("user,fd=3", "user cannot be combined with fd="),
        ("user,bridge=a", "user cannot be combined with bridge="),
        ("user,create", "user cannot be combined with create"),
        ("user,queues=1", "user cannot be combined with queues="),
        ("user,offload=off", "user cannot be combined with offload="),
        ("user,stream=a", "user cannot be combined with stream="),
        ("stream=a,publish=1:2", "stream= cannot be combined with publish="),
        ("stream=a,tap=b", "stream= cannot be combined with tap="),
        ("stream=", "stream= needs the path of a socket"),
        ("tap=a,publish=1:2", "publish= requires user"),
        ("user,mtu=65521", "mtu=65521 is not a valid MTU; expected 68 to 65520"),
        ("user,mtu=67", "mtu=67 is not a valid MTU; expected 68 to 65520"),
        ("user,mtu=x", "mtu=x is not a valid MTU; expected 68 to 65520"),
        ("stream=a,mtu=0", "mtu=0 is not a valid MTU; expected 68 to 65520"),
        ("stream=a,mtu=65521", "mtu=65521 is not a valid MTU; expected 68 to 65520"),
        ("none,mac=52:54:00:12:34:56", "none cannot be combined with other words"),
        ("none=1", "'none=1' is not recognized"),
        ("fd=3,mtu=1500", "fd= passes a TAP that is already configured"),
    ])
    func mistakes(argument: String, sentence: String) {
        let error = #expect(throws: ArgumentProblem.self) { try NetworkArgument(parsing: argument) }
        #expect(error?.description.hasPrefix(sentence) == true, "\(error?.description ?? "")")
    }

    @Test(arguments: [
        ("tap=", "the name of a network interface is empty"),
        ("tap=sixteen-bytes-xx", "the interface name 'sixteen-bytes-xx' has 16 bytes"),
        ("tap=a,bridge=a/b", "the interface name 'a/b' has the character \"/\""),
        ("tap=a,mac=1:2:3:4:5:6", "'1:2:3:4:5:6' is not a MAC address"),
        ("tap=a,mac=01:00:5e:00:00:01", "01:00:5e:00:00:01 is a multicast address"),
        ("tap=a,mac=00:00:00:00:00:00", "00:00:00:00:00:00 cannot be"),
        (
            "user,publish=",
            "publish= is not a port to publish; expected [ADDRESS:]PORT:GUESTPORT[/udp], such as publish=2222:22"
        ),
        ("user,publish=22", "publish=22 is not a port to publish"),
        ("user,publish=1:2:3:4", "publish=1:2:3:4 is not a port to publish"),
        ("user,publish=1:2/sctp", "publish=1:2/sctp has no valid ports; expected two numbers from 1 to 65535"),
        ("user,publish=0:22", "publish=0:22 has no valid ports"),
        ("user,publish=65536:22", "publish=65536:22 has no valid ports"),
        ("user,publish=22:", "publish=22: has no valid ports"),
        ("user,publish=+22:22", "publish=+22:22 has no valid ports"),
        ("user,publish=localhost:22:22", "publish=localhost:22:22 has no valid address; expected an IPv4 address"),
        ("user,publish=127.1:22:22", "publish=127.1:22:22 has no valid address"),
        ("user,publish=:22:22", "publish=:22:22 has no valid address"),
        ("user,publish=[::x]:22:22", "publish=[::x]:22:22 has no valid address"),
        ("user,publish=[127.0.0.1]:22:22", "publish=[127.0.0.1]:22:22 has no valid address"),
        ("user,publish=::1:22:22", "publish=::1:22:22 is not a port to publish"),
        ("user,publish=[::1]22:22", "publish=[::1]22:22 is not a port to publish"),
    ])
    func badNamesAndAddresses(argument: String, sentence: String) {
        let error = #expect(throws: HostNetworkError.self) { try NetworkArgument(parsing: argument) }
        #expect(error?.description.hasPrefix(sentence) == true, "\(error?.description ?? "")")
    }
}

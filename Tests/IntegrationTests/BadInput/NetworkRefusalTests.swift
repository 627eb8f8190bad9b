// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Addresses, TAPs and bridges that cannot be used.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct NetworkRefusalTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    @Test func macAddresses() throws {
        for mac in [
            "", "52:54:00:12:34", "52:54:00:12:34:5g", "525400123456", "52:54:00:12:34:56:78", "52:54-00:12:34:56",
        ] {
            try expectRefused(["--net", "tap=tap0,mac=\(mac)"], "", status: Status.usage)
        }
        let machine = try Program.machine(["--net", "tap=tap0,mac=zz"], in: host)
        try machine.expectEnd(Status.usage)
        #expect(machine.errors.text.contains("'zz' is not a MAC address: expected six pairs of hexadecimal digits"))
        let multicast = try Program.machine(["--net", "tap=tap0,mac=01:00:5e:00:00:01"], in: host)
        try multicast.expectEnd(Status.usage)
        #expect(multicast.errors.text.contains("01:00:5e:00:00:01 is a multicast address"))
    }

    @Test func interfaceNames() throws {
        for name in ["", "sixteen-bytes-xx", "with space", "a/b", ".", "..", "per%d"] {
            try expectRefused(["--net", "tap=\(name)"], "", status: Status.usage)
            try expectRefused(["--net", "tap=tap0,bridge=\(name)"], "", status: Status.usage)
        }
        let machine = try Program.machine(["--net", "tap=sixteen-bytes-xx"], in: host)
        try machine.expectEnd(Status.usage)
        #expect(
            machine.errors.text.contains(
                "the interface name 'sixteen-bytes-xx' has 16 bytes, the kernel allows at most 15"))
    }

    @Test func bridges() throws {
        try expectRefused(["--net", "tap=tap0,bridge=none0"], "there is no bridge none0: add `,create`")
        try host.shell("ip link add down0 type bridge; ip link add veth0 type veth peer name veth1")
        try expectRefused(["--net", "tap=tap0,bridge=down0"], "the bridge down0 is down: `ip link set down0 up`")
        try expectRefused(["--net", "tap=tap0,bridge=veth0"], "veth0 exists but is not a bridge (it is of kind veth)")
        try expectRefused(
            ["--net", "tap=tap0,bridge=veth0,create"], "veth0 exists but is not a bridge (it is of kind veth)")
    }

    @Test func taps() throws {
        try host.shell("ip link add veth0 type veth peer name veth1; ip tuntap add tun0 mode tun")
        try expectRefused(["--net", "tap=veth0"], "veth0 exists but is not a TAP (it is of kind veth)")
        try expectRefused(["--net", "tap=tun0"], "tun0 exists but is not a TAP (it is a TUN)")
        try host.shell(
            "ip link add br0 type bridge; ip link add br1 type bridge; ip link set br0 up; ip link set br1 up; ip tuntap add tap0 mode tap; ip link set tap0 master br0"
        )
        try expectRefused(["--net", "tap=tap0,bridge=br1"], "the TAP tap0 is a port of br0, not of br1")
        try expectRefused(
            ["--net", "tap=tap1", "--net", "tap=tap1"],
            "two network interfaces use the TAP tap1: give each a TAP of its own", status: Status.usage)
    }

    @Test func theFirstOfTwoInterfacesIsUndone() throws {
        try expectRefused(
            ["--net", "tap=tap0,bridge=new0,create", "--net", "tap=tap1,bridge=none0"], "there is no bridge none0")
    }

    @Test func descriptorsThatAreNoTAP() throws {
        try expectRefused(["--net", "fd=999"], "descriptor 999 is not open")
        let file = try FileDescriptor.open("/dev/null", O_RDWR)
        try expectRefused(["--net", "fd=9"], "descriptor 9 is not a TAP", passing: [(file.rawValue, 9)])
        try expectRefused(["--net", "fd=0"], "", status: Status.usage)
        try expectRefused(
            ["--net", "fd=9", "--net", "fd=9"], "two network interfaces use the descriptor 9", status: Status.usage)
        try expectRefused(
            ["--net", "fd=9:9"], "two network interfaces use the descriptor 9", status: Status.usage,
            withNetwork: false)
        try expectRefused(["--net", "fd=-1"], "", status: Status.usage)
        try expectRefused(["--net", "fd=2147483648"], "", status: Status.usage)
        try expectRefused(["--net", "fd=9,bridge=br0"], "", status: Status.usage)
    }

    /// Numbers that were not passed on, some of which swkvm has given to its own descriptors meanwhile.
    @Test func descriptorsThatSwkvmOpenedItself() throws {
        let disk = directory("disk.qcow2")
        try shell(
            "printf secret > '\(directory("key"))'; '\(Host.swkvm)' image create -q --encrypt --iterations 1000 --key-file '\(directory("key"))' '\(disk)' 1M"
        )
        for number in 3...24 {
            for arguments in [["--net", "fd=\(number)"], ["--disk", "\(disk),key-fd=\(number)"]] {
                // Whatever the tests' own runner has passed on is closed first.
                let closing = "for n in {3..63}; do eval \"exec $n>&-\"; done; exec \"$@\""
                let machine = try Program(["bash", "-c", closing, "bash", Host.swkvm, "run"] + arguments, in: host)
                try machine.expectEnd(arguments[0] == "--net" ? Status.host : Status.input)
                let refusals = [
                    "descriptor \(number) is not open", "descriptor \(number) was not passed on",
                    "descriptor \(number): it is not open",
                    "descriptor \(number): it was not passed on",
                ]
                #expect(refusals.contains { machine.errors.text.contains($0) }, "\(machine.errors.text)")
                #expect(machine.errors.lines.count == 1)
            }
        }
    }

    @Test func equalMACAddresses() throws {
        try expectRefused(
            ["--net", "tap=tap0,mac=52:54:00:00:00:01", "--net", "tap=tap1,mac=52:54:00:00:00:01"],
            "two network interfaces have the MAC address 52:54:00:00:00:01: give each one of its own with mac=",
            status: Status.usage)
    }
}

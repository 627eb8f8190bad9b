// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import HostNetwork

@Suite(.timed) struct NetlinkMessageTests {
    @Test func aMessageIsLaidOutAndAligned() {
        var message = NetlinkMessage(type: 16, flags: 4, fixedPart: UInt64(0x1122_3344_5566_7788))
        message.append(attribute: 3, string: "ab")
        message.append(nested: 18) { $0.append(attribute: 1, number: 0x0a0b_0c0d) }
        message.fillHeader(sequence: 9)
        #expect(
            message.bytes == [
                44, 0, 0, 0, 16, 0, 5, 0, 9, 0, 0, 0, 0, 0, 0, 0,
                0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,
                7, 0, 3, 0, 97, 98, 0, 0,
                12, 0, 18, 0, 8, 0, 1, 0, 13, 12, 11, 10,
            ])
    }

    @Test func attributesAreFound() {
        let run = NetlinkBytes(bytes: [5, 0, 1, 0, 42, 0, 0, 0, 8, 0, 2, 0x80, 1, 2, 3, 4][...])
        #expect(run.attribute(1)?.load(UInt8.self, at: 0) == 42)
        #expect(run.attribute(2)?.load(UInt32.self, at: 0) == 0x0403_0201)
        #expect(run.attribute(3)?.count == nil)
        #expect(run.attribute(1)?.load(UInt16.self, at: 0) == nil)
        #expect(run.attribute(2)?.load(UInt32.self, at: -1) == nil)
    }

    @Test(
        arguments: [
            [], [4], [8, 0, 1], [0, 0, 1, 0], [3, 0, 1, 0], [9, 0, 1, 0, 1, 2, 3, 4], [255, 255, 1, 0, 0, 0, 0, 0],
            [5, 0, 2, 0, 7, 0, 0],
        ] as [[UInt8]])
    func attributesThatLeaveTheirRunAreNotFound(_ bytes: [UInt8]) {
        #expect(NetlinkBytes(bytes: bytes[...]).attribute(1)?.count == nil)
    }

    @Test func slicesStayInside() {
        let bytes = NetlinkBytes(bytes: [0, 1, 2, 3, 4][2...])
        #expect(bytes.load(UInt8.self, at: 0) == 2)
        #expect(bytes.slice(from: 3)?.count == 0)
        #expect(bytes.slice(from: 4)?.count == nil)
        #expect(bytes.slice(from: 2, to: 1)?.count == nil)
        #expect(bytes.slice(from: 0, to: Int.max)?.count == nil)
        #expect(NetlinkBytes(bytes: [97, 98, 0, 99][...]).string == "ab")
    }
}

@Suite(.timed, .enabled(if: mayMakeNamespaces, rootNeeded)) struct RouteNetlinkTests {
    @Test func aNewNamespaceHasALoopback() throws {
        try inNewNamespace { host in
            let loopback = try #require(try host.netlink.link(named: name("lo")))
            #expect(
                loopback.index == 1 && !loopback.isUp && loopback.mtu == 65536 && loopback.kind.isEmpty
                    && loopback.address == nil)
            try host.netlink.set(loopback, up: true)
            #expect(try host.netlink.link(at: 1)?.isUp == true)
            #expect(try host.netlink.link(named: name("nothere")) == nil)
            #expect(try host.netlink.link(at: 12345) == nil)
        }
    }

    @Test func aBridgeIsCreatedChangedAndRemoved() throws {
        try inNewNamespace { host in
            let bridgeName = try name("swbr0")
            let address = try MACAddress(parsing: "52:54:00:00:00:01")
            try host.netlink.createLink(bridgeName, kind: "bridge", address: address)
            let made = try #require(try host.netlink.link(named: bridgeName))
            #expect(
                made.kind == "bridge" && made.address == address && !made.isUp && made.master == 0 && made.tun == nil)

            let other = try MACAddress(parsing: "52:54:00:00:00:02")
            try host.netlink.set(made, address: other)
            try host.netlink.set(made, mtu: 9000)
            try host.netlink.set(made, alias: "a note")
            try host.netlink.set(made, up: true)
            let changed = try #require(try host.netlink.link(at: made.index))
            #expect(changed.address == other && changed.mtu == 9000 && changed.alias == "a note" && changed.isUp)
            try host.netlink.set(made, up: false)
            #expect(try host.netlink.link(at: made.index)?.isUp == false)

            #expect(
                failure { () throws(HostNetworkError) in try host.netlink.createLink(bridgeName, kind: "bridge") }?
                    .errno == EEXIST)
            try host.netlink.delete(made)
            #expect(try host.netlink.link(named: bridgeName) == nil)
            #expect(failure { () throws(HostNetworkError) in try host.netlink.delete(made) }?.errno == ENODEV)
        }
    }

    @Test func anAddressCanBeUsed() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("swbr0"), kind: "bridge")
            let bridge = try #require(try host.netlink.link(named: name("swbr0")))
            try host.netlink.add(to: bridge, address: (192, 0, 2, 1), prefixLength: 24)
            try host.netlink.set(bridge, up: true)
            let socket = FileDescriptor(owning: Glibc.socket(AF_INET, Int32(SOCK_DGRAM.rawValue), 0))
            var address = sockaddr_in()
            address.sin_family = sa_family_t(AF_INET)
            address.sin_addr.s_addr = UInt32(0xc000_0201).bigEndian
            // A socket address of its full size, as bind wants it.
            let bound = unsafe withUnsafePointer(to: &address) {
                unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe bind(socket.rawValue, $0, 16) }
            }
            #expect(bound == 0)
        }
    }

    @Test func portsComeAndGo() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("swbr0"), kind: "bridge")
            try host.netlink.createLink(name("left"), kind: "veth")
            let bridge = try #require(try host.netlink.link(named: name("swbr0")))
            let left = try #require(try host.netlink.link(named: name("left")))
            #expect(try host.netlink.ports(of: bridge.index).isEmpty)
            try host.netlink.set(left, master: bridge)
            #expect(try host.netlink.ports(of: bridge.index).map(\.name.text) == ["left"])
            try host.netlink.set(left, master: nil)
            #expect(try host.netlink.ports(of: bridge.index).isEmpty)
        }
    }

    /// More interfaces than one datagram of a dump can hold.
    @Test func aLongListIsComplete() throws {
        try inNewNamespace { host in
            for index in 0..<100 { try host.netlink.createLink(name("br\(index)"), kind: "bridge") }
            let names = Set(try host.netlink.links().map(\.name.text))
            #expect(names.isSuperset(of: (0..<100).map { "br\($0)" }))
            #expect(names.contains("lo"))
        }
    }

    @Test func theKernelsOwnWordsAreKept() throws {
        try inNewNamespace { host in
            let error = failure { () throws(HostNetworkError) in
                try host.netlink.createLink(InterfaceName("x"), kind: "nonsense")
            }
            #expect(
                error?.description == "creating the nonsense x failed: Operation not supported (Unknown device type)")
        }
    }

    @Test func withoutTheRightASentenceNamesIt() throws {
        try inNewNamespace { _ in
            let error = failureOnOwnThread({ () throws(HostNetworkError) in
                let netlink = try RouteNetlink()
                _ = clinux_drop_thread_capability(CAP_NET_ADMIN)
                try netlink.createLink(InterfaceName("swbr0"), kind: "bridge")
            })
            #expect(
                error?.description == "creating the bridge swbr0 needs CAP_NET_ADMIN: run as root, "
                    + "or have an administrator do it beforehand: `ip link add swbr0 type bridge`")
        }
    }

    @Test func aNamespaceIsAsLongAsItsDescriptor() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("here"), kind: "bridge")
            let first = try NetworkNamespace.current()
            try NetworkNamespace.enterNew()
            let elsewhere = try RouteNetlink()
            #expect(try elsewhere.link(named: name("here")) == nil)
            // A socket stays in the namespace it was opened in.
            #expect(try host.netlink.link(named: name("here")) != nil)
            try first.enter()
            let again = try RouteNetlink()
            #expect(try again.link(named: name("here")) != nil)
        }
    }

    @Test func theLockKeepsOthersOut() throws {
        try inNewNamespace { _ in
            let one = try NetworkNamespace.current()
            let other = try NetworkNamespace.current()
            try one.lock()
            #expect(failure { () throws(HostNetworkError) in try other.lock(patience: 2) } == .namespaceLocked)
            one.unlock()
            #expect(failure { () throws(HostNetworkError) in try other.lock(patience: 1) } == nil)
            // Another namespace has another lock.
            try NetworkNamespace.enterNew()
            let elsewhere = try NetworkNamespace.current()
            #expect(failure { () throws(HostNetworkError) in try elsewhere.lock(patience: 1) } == nil)
            try one.enter()
        }
        #expect(
            HostNetworkError.namespaceLocked.description
                == "another process holds the lock of the network namespace (flock on /proc/self/ns/net): end it and try again"
        )
    }
}

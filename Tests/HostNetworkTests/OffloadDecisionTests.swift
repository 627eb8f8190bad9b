// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
@testable import HostNetwork
import Linux
import TestSupport
import Testing

/// Whether an interface's peer handles offloads.
@Suite(.timed, .enabled(if: mayMakeNamespaces, rootNeeded)) struct OffloadDecisionTests {
    /// A packet socket that gets all frames of an interface, as a userspace datapath has one.
    private func packetReader(of index: Int32) throws -> FileDescriptor {
        let everything: UInt8 = 3  // ETH_P_ALL
        let socket = FileDescriptor(
            owning: Glibc.socket(AF_PACKET, Int32(SOCK_RAW.rawValue | SOCK_CLOEXEC.rawValue), 0))
        // struct sockaddr_ll: the family, the protocol in network byte order, the interface's index, and 12 bytes more.
        let number = UInt32(bitPattern: index)
        let address =
            [UInt8(AF_PACKET), 0, 0, everything] + (0..<4).map { UInt8(truncatingIfNeeded: number >> (8 * $0)) }
            + [UInt8](repeating: 0, count: 12)
        // An address of its full size, as bind wants it.
        let bound = unsafe address.withUnsafeBytes {
            unsafe bind(socket.rawValue, $0.baseAddress!.assumingMemoryBound(to: sockaddr.self), socklen_t($0.count))
        }
        try #require(bound == 0)
        return socket
    }

    /// How it was decided, with the reason.
    private func decision(_ backend: NetworkBackend, offload: Bool? = nil) throws -> String {
        for _ in 0..<1_000 {
            do { return try NetworkAttachment(backend, offload: offload).offloads.description } catch HostNetworkError
                .tapBusy
            { usleep(10_000) }
        }
        return try NetworkAttachment(backend, offload: offload).offloads.description
    }

    @Test func whatIsBehindTheTAPDecidesAboutOffloads() throws {
        try inNewNamespace { host in
            #expect(try decision(.tap(name("swtap0"))) == "offloads on: swtap0 connects to the host itself")
            #expect(
                try decision(.tap(name("swtap0"), bridge: .init(name("swbr0"), create: true)))
                    == "offloads on: it is a port of swbr0, of kind bridge")
            try makePersistentTAP("swtap1")
            let link = try #require(try host.netlink.link(named: name("swtap1")))
            let reader = try packetReader(of: link.index), tap: NetworkBackend = try .tap(name("swtap1"))
            let off = "offloads off: a process reads the frames of swtap1 (AF_PACKET), as a userspace datapath does"
            #expect(try decision(tap) == off)
            // The reader of another interface, and one who looks at a bridge's port, are no matter.
            #expect(try decision(.tap(name("swtap0"))) == "offloads on: swtap0 connects to the host itself")
            #expect(
                try decision(.tap(name("swtap1"), bridge: .init(name("swbr1"), create: true)))
                    == "offloads on: it is a port of swbr1, of kind bridge")
            // The user knows better.
            #expect(try decision(tap, offload: true) == "offloads on: as requested")
            #expect(try decision(tap, offload: false) == "offloads off: as requested")
            _ = consume reader
            #expect(try eventually { try decision(tap) == "offloads on: swtap1 connects to the host itself" })
        }
    }

    @Test func anInheritedDescriptorDecidesAboutOffloads() throws {
        try inNewNamespace { host in
            let plain = try passOn(openTUN("tap0", flags: IFF_TAP | IFF_NO_PI))
            #expect(
                failure { () throws(HostNetworkError) in _ = try NetworkAttachment(.descriptor(plain), offload: true) }?
                    .description
                    == "descriptor \(plain) does not support offloads: open it with IFF_VNET_HDR, or give offload=off")
            let other = try passOn(openTUN("tap1", flags: IFF_TAP | IFF_NO_PI))
            #expect(
                try NetworkAttachment(.descriptor(other)).offloads.description
                    == "offloads off: the descriptor was opened without IFF_VNET_HDR")
            let full = try passOn(openTUN("tap2", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            #expect(
                try NetworkAttachment(.descriptor(full)).offloads.description
                    == "offloads on: tap2 connects to the host itself")

            try host.netlink.createLink(name("below"), kind: "veth")
            let below = try #require(try host.netlink.link(named: name("below")))
            try host.netlink.createLink(name("swmac0"), kind: "macvtap", parent: below.index)
            let link = try #require(try host.netlink.link(named: name("swmac0")))
            let file = try passOn(FileDescriptor.open("/dev/tap\(link.index)", O_RDWR))
            #expect(
                try NetworkAttachment(.descriptor(file)).offloads.description
                    == "offloads on: swmac0, of kind macvtap, is a kernel device")

            let hidden = try openTUN("tap3", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            try NetworkNamespace.enterNew()
            #expect(
                try NetworkAttachment(.descriptor(passOn(hidden))).offloads.description
                    == "offloads on: the peer of the interface is not visible from this network namespace")
        }
    }

    @Test func aLineOfThePacketSocketsIsReadAsTheKernelWritesIt() {
        let head = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode"
        let line = "00000000ebeae1aa 3      3    0003   2     1 0      0      250524"
        #expect(OffloadDecision.isReader(line, of: 2))
        for (other, index) in [
            (head, 2), (line, 25), ("", 2), ("x 3 3", 2), (line.replacing("0003", with: "88cc"), 2),
            (line.replacing(" 1 ", with: " 0 "), 2),
        ] as [(String, Int32)] {
            #expect(!OffloadDecision.isReader(other, of: index))
        }
    }
}

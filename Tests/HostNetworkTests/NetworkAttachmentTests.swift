// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
@testable import HostNetwork
import Linux
import TestSupport
import Testing

@Suite(.timed) struct HostDropsTests {
    /// An interface may have dropped frames before, and another one of its name begins anew.
    @Test func countsWhatIsNew() {
        #expect(HostDrops(7, 3).since(HostDrops(5, 3)) == HostDrops(2, 0))
        #expect(HostDrops(1, 3).since(HostDrops(5, 2)) == HostDrops(1, 1))
    }
}

@Suite(.timed, .enabled(if: mayMakeNamespaces, rootNeeded)) struct NetworkAttachmentTests {
    private func attach(
        _ tap: String?, bridge: String? = nil, create: Bool = false, mtu: Int? = nil
    ) throws -> NetworkAttachment {
        for _ in 0..<1_000 {
            // A descriptor closed by an earlier step may live on for a moment (see `eventually`).
            do { return try NetworkAttachment(backend(tap, bridge, create, mtu)) } catch HostNetworkError.tapBusy {
                usleep(10_000)
            }
        }
        return try NetworkAttachment(backend(tap, bridge, create, mtu))
    }

    private func backend(
        _ tap: String?, _ bridge: String?, _ create: Bool, _ mtu: Int?
    ) throws(HostNetworkError) -> NetworkBackend {
        let name = tap == nil ? nil : try InterfaceName(tap ?? "")
        let port = bridge == nil ? nil : NetworkBackend.BridgePort(try InterfaceName(bridge ?? ""), create: create)
        return .tap(name, bridge: port, mtu: mtu)
    }

    /// The sentence that an attachment fails with.
    private func problem(_ tap: String?, bridge: String? = nil, create: Bool = false, mtu: Int? = nil) -> String? {
        failure { () throws(HostNetworkError) in
            _ = try NetworkAttachment(backend(tap, bridge, create, mtu))
        }?.description
    }

    /// All of swtap0 that somebody sets; the counters of frames go on as the host sends.
    private func settings(_ host: Host) throws -> String {
        let link = try #require(try host.netlink.link(named: name("swtap0")))
        return
            "\(link.index) \(link.mtu) \(link.isUp) \(link.master) \(link.alias) \(link.address?.description ?? "") \(String(describing: link.tun))"
    }

    /// Expects the namespace to have these interfaces, besides those that every one has.
    private func expect(
        _ names: Set<String>, _ host: Host, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        var found: Set<String> = []
        _ = try eventually {
            found = Set(try host.netlink.links().map(\.name.text)).subtracting(["lo", "ifb0", "ifb1"])
            return found == names
        }
        #expect(found == names, sourceLocation: sourceLocation)
    }

    // MARK: TAPs and bridges

    @Test func aTAPIsCreatedUpAndRemoved() throws {
        try inNewNamespace { host in
            do {
                let attachment = try attach("swtap0")
                let link = try #require(try host.netlink.link(named: name("swtap0")))
                #expect(link.isUp && link.master == 0 && link.tun?.isPersistent == false)
                #expect(attachment.mtu == 1500 && attachment.name == "swtap0")
            }
            try expect([], host)
        }
    }

    @Test func bridgeAndTAPAreCreatedAndRemoved() throws {
        try inNewNamespace { host in
            do {
                let attachment = try attach("swtap0", bridge: "swbr0", create: true)
                let bridge = try #require(try host.netlink.link(named: name("swbr0")))
                #expect(bridge.isUp && bridge.alias == Bridge.mark && (bridge.address?.bytes[0] ?? 0) & 2 != 0)
                #expect(try host.netlink.ports(of: bridge.index).map(\.name.text) == [attachment.name])
                // The bridge keeps its address whatever its ports are.
                #expect(try host.netlink.link(named: name(attachment.name))?.address != bridge.address)
                _ = consume attachment
            }
            try expect([], host)
        }
    }

    @Test func theLastMachineRemovesTheBridge() throws {
        try inNewNamespace { host in
            let first = try attach("swtap0", bridge: "swbr0", create: true)
            let second = try attach("swtap1", bridge: "swbr0", create: true)
            try expect(["swbr0", "swtap0", "swtap1"], host)
            _ = consume first
            try expect(["swbr0", "swtap1"], host)
            let third = try attach("swtap2", bridge: "swbr0")
            _ = consume second
            try expect(["swbr0", "swtap2"], host)
            _ = consume third
            try expect([], host)
        }
    }

    /// What a killed process leaves is a marked bridge; the next machine on it takes it away.
    @Test func aBridgeThatWasLeftGoesWithTheNextMachine() throws {
        try inNewNamespace { host in
            _ = try Bridge.create(name("swbr0"), host.netlink)
            _ = try attach("swtap0", bridge: "swbr0")
            try expect([], host)
        }
    }

    @Test func aBridgeWithAnotherPortStays() throws {
        try inNewNamespace { host in
            let attachment = try attach("swtap0", bridge: "swbr0", create: true)
            try host.netlink.createLink(name("uplink"), kind: "veth")
            let uplink = try #require(try host.netlink.link(named: name("uplink")))
            try host.netlink.set(uplink, master: host.netlink.link(named: name("swbr0")))
            _ = consume attachment
            #expect(try host.netlink.link(named: name("swbr0"))?.isUp == true)
            #expect(try host.netlink.link(named: name("uplink"))?.master != 0)
        }
    }

    @Test func aFoundBridgeStays() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("br0"), kind: "bridge")
            try host.netlink.set(#require(try host.netlink.link(named: name("br0"))), up: true)
            _ = try attach("swtap0", bridge: "br0", create: true)
            try expect(["br0"], host)
            #expect(try host.netlink.link(named: name("br0"))?.alias == "")
        }
    }

    @Test func aFoundTAPIsLeftAsItWas() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            let before = try settings(host)
            do {
                let attachment = try attach("swtap0", bridge: "swbr0", create: true, mtu: 4000)
                let link = try #require(try host.netlink.link(named: name("swtap0")))
                #expect(link.isUp && link.mtu == 4000 && attachment.mtu == 4000)
                #expect(try link.master == host.netlink.link(named: name("swbr0"))?.index)
            }
            try expect(["swtap0"], host)
            #expect(try settings(host) == before)
        }
    }

    @Test func aFoundPortKeepsItsBridgeAndState() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            try host.netlink.createLink(name("br0"), kind: "bridge")
            let bridge = try #require(try host.netlink.link(named: name("br0")))
            let tap = try #require(try host.netlink.link(named: name("swtap0")))
            try host.netlink.set(bridge, up: true)
            try host.netlink.set(tap, mtu: 9000)
            try host.netlink.set(tap, master: bridge)
            try host.netlink.set(tap, up: true)
            for bridgeName in ["br0", nil] {
                do {
                    let attachment = try attach("swtap0", bridge: bridgeName)
                    #expect(attachment.mtu == 9000)
                }
                let after = try host.netlink.link(named: name("swtap0"))
                #expect(after?.isUp == true && after?.mtu == 9000 && after?.master == bridge.index)
            }
        }
    }

    @Test func aCreatedTAPTakesItsBridgesMTU() throws {
        try inNewNamespace { host in
            let bridge = try Bridge.create(name("swbr0"), host.netlink)
            try host.netlink.set(bridge, mtu: 9000)
            let attachment = try attach("swtap0", bridge: "swbr0")
            #expect(attachment.mtu == 9000)
            #expect(try host.netlink.link(named: name("swtap0"))?.mtu == 9000)
        }
    }

    // MARK: Refusals, each leaving things as they were

    @Test func aMissingBridgeIsNamed() throws {
        try inNewNamespace { host in
            #expect(
                problem("swtap0", bridge: "swbr0") == "there is no bridge swbr0: add `,create`, or create it with "
                    + "`ip link add swbr0 type bridge` and `ip link set swbr0 up`")
            try expect([], host)
        }
    }

    @Test func aBridgeThatIsDownIsNamed() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("br0"), kind: "bridge")
            #expect(
                problem("swtap0", bridge: "br0", create: true)
                    == "the bridge br0 is down: `ip link set br0 up`")
            try expect(["br0"], host)
        }
    }

    @Test func whatIsNoBridgeIsRefused() throws {
        try inNewNamespace { host in
            #expect(
                problem("swtap0", bridge: "lo", create: true)
                    == "lo exists but is not a bridge (it is hardware or loopback): name another interface")
            try expect([], host)
        }
    }

    @Test func aPortOfAnotherBridgeIsNotTaken() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            try host.netlink.createLink(name("br0"), kind: "bridge")
            let tap = try #require(try host.netlink.link(named: name("swtap0")))
            try host.netlink.set(tap, master: host.netlink.link(named: name("br0")))
            let before = try settings(host)
            #expect(
                problem("swtap0", bridge: "swbr0", create: true)
                    == "the TAP swtap0 is a port of br0, not of swbr0: give bridge=br0, or free it with `ip link set swtap0 nomaster`"
            )
            #expect(try settings(host) == before)
            try expect(["swtap0", "br0"], host)
        }
    }

    @Test func aNameThatIsNoTAPLeavesNoBridge() throws {
        try inNewNamespace { host in
            #expect(
                problem("lo", bridge: "swbr0", create: true)
                    == "lo exists but is not a TAP (it is hardware or loopback): name another interface")
            try expect([], host)
        }
    }

    @Test func aBusyTAPLeavesNoBridge() throws {
        try inNewNamespace { host in
            let holder = try attach("swtap0")
            #expect(
                problem("swtap0", bridge: "swbr0", create: true)
                    == "the TAP swtap0 is in use by another process: end that one or name another TAP")
            try expect(["swtap0"], host)
            _ = consume holder
        }
    }

    /// The last step fails: an interface under a macvtap cannot be a bridge's port.
    @Test func afterAFailureHalfWayAllIsAsBefore() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            let tap = try #require(try host.netlink.link(named: name("swtap0")))
            try host.netlink.createLink(name("above"), kind: "macvtap", parent: tap.index)
            let before = try settings(host)
            #expect(
                problem("swtap0", bridge: "swbr0", create: true, mtu: 1400)?.hasPrefix(
                    "making swtap0 a port of swbr0 failed: Device or resource busy") == true)
            try expect(["swtap0", "above"], host)
            #expect(try settings(host) == before)
        }
    }

    @Test(arguments: [67, 65522, -1, Int.max])
    func anImpossibleMTUIsRefused(_ mtu: Int) throws {
        try inNewNamespace { host in
            #expect(
                problem("swtap0", bridge: "swbr0", create: true, mtu: mtu)
                    == "an MTU of \(mtu) is not possible: give 68 to 65521")
            try expect([], host)
        }
    }

    @Test func theLargestAndSmallestMTUArePossible() throws {
        try inNewNamespace { _ in
            let smallest = try attach("swtap0", mtu: 68)
            let largest = try attach("swtap1", mtu: 65521)
            #expect(smallest.mtu == 68 && largest.mtu == 65521)
        }
    }

    @Test func withoutTheRightNothingIsChanged() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            func unprivileged(_ backend: NetworkBackend) -> String? {
                failureOnOwnThread({ () throws(HostNetworkError) in
                    _ = clinux_drop_thread_capability(CAP_NET_ADMIN)
                    _ = try NetworkAttachment(backend)
                })?.description
            }
            let tap = try name("swtap0")
            #expect(
                unprivileged(.tap(tap)) == "setting swtap0 up needs CAP_NET_ADMIN: run as root, "
                    + "or have an administrator do it beforehand: `ip link set swtap0 up`")
            #expect(
                unprivileged(.tap(tap, bridge: .init(try name("swbr0"), create: true)))
                    == "creating the bridge swbr0 needs CAP_NET_ADMIN: "
                    + "run as root, or have an administrator do it beforehand: `ip link add swbr0 type bridge`")
            try host.netlink.set(#require(try host.netlink.link(named: tap)), up: true)
            // All is as wanted: no right is needed.
            #expect(unprivileged(.tap(tap)) == nil)
            try expect(["swtap0"], host)
        }
    }

    @Test func anInheritedDescriptorChangesNothing() throws {
        try inNewNamespace { host in
            let descriptor = try openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            let before = try #require(try host.netlink.link(named: name("swtap0")))
            try host.netlink.set(before, mtu: 1400)
            let attachment = try NetworkAttachment(.descriptor(passOn(descriptor)))
            #expect(attachment.mtu == 1400 && attachment.hostDrops?.receive == 0)
            #expect(try host.netlink.link(named: name("swtap0"))?.isUp == false)
        }
    }

    /// Machines that start and end at the same time never see the bridge go under their feet.
    @Test func manyMachinesComeAndGoAtOnce() throws {
        try inNewNamespace { host in
            let problems = (0..<6).map { _ in Box<String>() }
            func run(_ index: Int) throws {
                guard index < 6 else { return }
                // A thread starts in its maker's namespace.
                let thread = try Thread.start(name: "machine\(index)") {
                    for round in 0..<4 where problems[index].content == nil {
                        problems[index].content = problem("swtap\(index)x\(round)", bridge: "swbr0", create: true)
                    }
                }
                // All run at the same time: each is joined after the later ones.
                try run(index + 1)
                thread.join()
            }
            try run(0)
            #expect(problems.compactMap(\.content) == [])
            try expect([], host)
        }
    }

    // MARK: Frames

    /// A frame goes from the machine's side through TAP and bridge to the host, and the answer comes back.
    @Test func theHostAnswersThroughTheBridge() throws {
        try inNewNamespace { host in
            let attachment = try attach("swtap0", bridge: "swbr0", create: true)
            let bridge = try #require(try host.netlink.link(named: name("swbr0")))
            try host.netlink.add(to: bridge, address: (192, 0, 2, 1), prefixLength: 24)
            let guest = MACAddress(locallyAdministered: 0x1234)
            // "Who has 192.0.2.1? Tell 192.0.2.2": RFC 826 after the Ethernet header, after the virtio-net header.
            let question =
                [UInt8](repeating: 0, count: 12) + [UInt8](repeating: 0xff, count: 6) + guest.bytes + [8, 6]
                + [0, 1, 8, 0, 6, 4, 0, 1] + guest.bytes + [192, 0, 2, 2] + [0, 0, 0, 0, 0, 0, 192, 0, 2, 1]
            try attachment.queue(0)!.descriptor.writeAll(question)
            let hardware = try #require(bridge.address).bytes
            let answer = try firstFrame(from: attachment.queue(0)!) { $0[24] == 8 && $0[25] == 6 && $0[33] == 2 }
            #expect(Array(answer[12..<18]) == guest.bytes)
            #expect(Array(answer[34..<44]) == hardware + [192, 0, 2, 1])
        }
    }

    /// The first frame that fits, with its header; the host sends others of its own accord.
    private func firstFrame(from queue: TAPQueue, where fits: ([UInt8]) -> Bool) throws -> [UInt8] {
        while true {
            var waiting = pollfd(fd: queue.number, events: Int16(POLLIN), revents: 0)
            try #require(unsafe poll(&waiting, 1, 30_000) == 1)
            var frame = [UInt8](repeating: 0, count: 2048)
            let count = try unsafe frame.withUnsafeMutableBytes { try unsafe queue.descriptor.read(into: $0) }
            if count >= 34, fits(frame) { return Array(frame.prefix(count)) }
        }
    }
}

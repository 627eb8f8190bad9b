// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import GuestMemory
import HostNetwork
import Linux
import TestSupport
import Testing
import Virtio

@testable import Devices

/// Whether this process may make network namespaces with TAPs in them.
private let mayMakeNamespaces: Bool = (try? inNewNamespace { _ = try TAPDevice.create(nil) }) != nil

/// Runs `body` in a network namespace of its own, on the calling thread, and goes back.
private func inNewNamespace(_ body: () throws -> Void) throws {
    let home = try NetworkNamespace.current()
    try NetworkNamespace.enterNew()
    // A thread that stayed in the namespace would run other tests there.
    defer {
        do { try home.enter() } catch { fatalError("cannot go back to the test's own network namespace: \(error)") }
    }
    try body()
}

@Suite(
    .timed,
    .enabled(
        if: mayMakeNamespaces, "needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) to make a network namespace for the test"))
struct NetworkTAPTests {
    /// A card on a TAP on a bridge that has the address 192.0.2.1/24.
    private func onBridge(_ body: (NetworkDriver, RouteNetlinkBox) throws -> Void) throws {
        try inNewNamespace {
            let host = RouteNetlinkBox(try RouteNetlink())
            let port = NetworkBackend.BridgePort(try InterfaceName("swbr0"), create: true)
            let driver = try NetworkDriver(NetworkAttachment(.tap(InterfaceName("swtap0"), bridge: port)))
            let bridge = try #require(try host.netlink.link(named: InterfaceName("swbr0")))
            try host.netlink.add(to: bridge, address: (192, 0, 2, 1), prefixLength: 24)
            try body(driver, host)
        }
    }

    final class RouteNetlinkBox {
        let netlink: RouteNetlink
        init(_ netlink: consuming RouteNetlink) { self.netlink = netlink }
    }

    private func offerBuffers(_ driver: NetworkDriver) throws {
        for slot in 0..<64 as Range<UInt64> {
            try driver.offerBuffer(at: NetworkDriver.buffers + slot * 0x1000, [4096])
        }
        driver.kick(0)
    }

    /// The first frame that fits, header included; the host sends others of its own accord.
    private func firstFrame(_ driver: NetworkDriver, where fits: ([UInt8]) -> Bool) throws -> [UInt8] {
        while true {
            let used = try driver.used(0)
            let bytes = try driver.bytes(NetworkDriver.buffers + UInt64(used.head) * 0x1000, used.written)
            if fits(bytes) { return bytes }
        }
    }

    @Test func theHostAnswers() throws {
        try onBridge { driver, _ in
            try driver.start([.mergeableBuffers, .eventIndex])
            try offerBuffers(driver)
            let guest: [UInt8] = [0x52, 0x54, 0, 0, 0, 2]
            try driver.sendAndWait(
                plainHeader + [UInt8](repeating: 0xff, count: 6) + guest + [8, 6, 0, 1, 8, 0, 6, 4, 0, 1] + guest
                    + [192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1], cut: [12, 14])
            let answer = try firstFrame(driver) { $0.count >= 54 && $0[24...25] == [8, 6] && $0[33] == 2 }
            #expect(Array(answer[12..<18]) == guest)
            #expect(Array(answer[40..<44]) == [192, 0, 2, 1])
        }
    }

    /// The host leaves a checksum to the driver that asked for it, to no other, and to none after its reset.
    @Test func offloadsAreThoseOfTheDriver() throws {
        try onBridge { driver, _ in
            try #require(
                driver.offered.isSuperset(of: [.checksum, .guestChecksum, .guestTSO4, .hostTSO4, .controlGuestOffloads])
            )
            func flagsOfADatagram() throws -> UInt8 {
                try sendBroadcast()
                return try firstFrame(driver) { $0.count > 54 && $0[24...25] == [8, 0] && $0[35] == 17 }[0]
            }
            let needsChecksum: UInt8 = 1
            for offloads in [[.guestChecksum], [], [.guestChecksum, .guestTSO4, .guestTSO6, .guestECN], []]
                as [FeatureSet]
            {
                try driver.start(offloads)
                try offerBuffers(driver)
                #expect(try flagsOfADatagram() == (offloads.isEmpty ? 0 : needsChecksum))
            }
            // By command while it runs.
            try driver.start([.guestChecksum, .controlQueue, .controlGuestOffloads])
            try offerBuffers(driver)
            #expect(try flagsOfADatagram() == needsChecksum)
            #expect(try driver.command([5, 0, 0, 0, 0, 0, 0, 0, 0, 0]) == 0)
            #expect(try flagsOfADatagram() & needsChecksum == 0)
            #expect(try driver.command([5, 0, 2, 0, 0, 0, 0, 0, 0, 0]) == 0)
            #expect(try flagsOfADatagram() == needsChecksum)
            // More than was negotiated.
            #expect(try driver.command([5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]) == 1)

            // What the TAP holds for the driver after the reset.
            driver.write(0, 0x070)
            try sendBroadcast()
            let tap = driver.device.port.attachment.descriptor(ofQueue: 0)
            var frame = [UInt8](repeating: 0, count: 4096)
            repeat {
                var waiting = pollfd(fd: tap, events: Int16(POLLIN), revents: 0)
                try #require(unsafe poll(&waiting, 1, 30_000) == 1)
                // The kernel writes within the array.
                _ = unsafe frame.withUnsafeMutableBytes { unsafe Glibc.read(tap, $0.baseAddress, $0.count) }
            } while frame[24...25] != [8, 0] || frame[35] != 17
            #expect(frame[0] & needsChecksum == 0)
        }
    }

    /// Offsets that do not fit the frame are refused by the TAP; the card goes on.
    @Test func aMalformedHeaderIsTheTAPsToRefuse() throws {
        try onBridge { driver, _ in
            try driver.start([.checksum, .hostTSO4])
            try driver.sendAndWait([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0] + frame(60))
            #expect(driver.device.counters.sendMalformed.value == 1)
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sentFrames == 1)
        }
    }

    @Test func aTAPThatIsDownIsCounted() throws {
        try onBridge { driver, host in
            try driver.start()
            let tap = try #require(try host.netlink.link(named: InterfaceName("swtap0")))
            try host.netlink.set(tap, up: false)
            // Whether the device has heard of it or the TAP refuses the frame.
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sendLinkDown.value == 1)
            try host.netlink.set(tap, up: true)
            try wait { driver.device.isLinkUp }
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sentFrames == 1)
        }
    }

    /// `ip link set … down` and `up`: the cable is pulled and put back, whether a driver is there or not.
    @Test func theTAPsStateIsTheLinks() throws {
        try onBridge { driver, host in
            try driver.start(.linkStatus)
            #expect(driver.configuration(6, 2) == 1)
            let tap = try #require(try host.netlink.link(named: InterfaceName("swtap0")))
            try host.netlink.set(tap, up: false)
            try wait { driver.configuration(6, 2) == 0 }
            #expect(driver.read(0x060) & 2 == 2, "no interrupt for the change")
            driver.write(2, 0x064)
            // A change of another interface is none of this one's.
            let bridge = try #require(try host.netlink.link(named: InterfaceName("swbr0")))
            try host.netlink.set(bridge, up: false)
            try host.netlink.set(bridge, up: true)
            try host.netlink.set(tap, up: true)
            try wait { driver.configuration(6, 2) == 1 }
            try wait { driver.read(0x060) & 2 == 2 }
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sentFrames == 1)

            // Between two drivers, and before the first look of the next.
            driver.device.reset()
            try host.netlink.set(tap, up: false)
            try wait { driver.configuration(6, 2) == 0 }
            try driver.start(.linkStatus)
            #expect(driver.configuration(6, 2) == 0)
        }
    }

    @Test func aTAPThatIsDownAtTheStartIsALinkThatIsDown() throws {
        try onBridge { driver, host in
            try host.netlink.set(#require(try host.netlink.link(named: InterfaceName("swtap0"))), up: false)
            try driver.start(.linkStatus)
            #expect(driver.configuration(6, 2) == 0 && !driver.device.isLinkUp)
        }
    }

    /// `ip link del` under a running machine.
    @Test func aRemovedTAPIsALinkThatIsDown() throws {
        try onBridge { driver, host in
            try driver.start(.linkStatus)
            try offerBuffers(driver)
            let link = try #require(try host.netlink.link(named: InterfaceName("swtap0")))
            // The kernel takes it down before it removes it: the link has changed by then, and its minute has begun.
            try host.netlink.set(link, up: false)
            try wait { !driver.device.isLinkUp }
            try host.netlink.delete(link)
            try wait { driver.lines.all.last == "warning: the link is down: swtap0 was removed from the host" }
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sendLinkDown.value == 1)
            #expect(driver.device.hostDrops == nil)
        }
    }

    /// What the TAP's queue does not hold, in a pause for example, is counted by the host, and reported by the device.
    @Test func whatTheHostDropsIsReported() throws {
        try onBridge { driver, host in
            try driver.start([])
            try offerBuffers(driver)
            driver.device.pause {}
            try wait {
                for _ in 0..<100 { try self.sendBroadcast() }
                return driver.device.hostDrops.map { $0.receive > 1 } == true
            }
            for _ in 0..<2 { driver.device.reportHostDrops() }
            driver.device.deviceEvents.end()
            let drops = try #require(driver.device.hostDrops).receive
            let lines = driver.lines.all.filter { $0.firstRange(of: "dropped by swtap0") != nil }
            #expect(
                lines.count == 2 && lines[1].firstRange(of: "\(drops - 1) more: a frame for the guest") != nil,
                "\(lines)")
            driver.device.resume()
        }
    }

    /// The interface gets a larger MTU while a guest runs that was promised 1500: what is larger does not reach it, and
    /// is counted. The next driver is promised the new one (§5.1.4.1).
    @Test func aPromisedMTUHoldsThoughTheHostsIsRaised() throws {
        try onBridge { driver, host in
            try driver.start([.mtu, .mergeableBuffers])
            try offerBuffers(driver)
            let generation = driver.read(0x0fc)
            for interface in ["swtap0", "swbr0"] {
                try host.netlink.set(#require(try host.netlink.link(named: InterfaceName(interface))), mtu: 9000)
            }
            try wait { driver.device.port.currentMTU == 9000 }
            #expect(driver.configuration(10, 2) == 1500 && driver.read(0x0fc) == generation)
            try sendBroadcast(4000)
            try sendBroadcast(100)
            let datagram = try firstFrame(driver) { $0.count > 54 && $0[24...25] == [8, 0] && $0[35] == 17 }
            #expect(datagram.count == 12 + 14 + 28 + 100)
            #expect(driver.device.counters.receiveAboveMTU.value == 1 && driver.device.counters.receiveDrops >= 1)

            try driver.start([.mtu, .mergeableBuffers])
            #expect(driver.configuration(10, 2) == 9000)
            try offerBuffers(driver)
            try sendBroadcast(3900)
            #expect(
                try firstFrame(driver) { $0.count > 54 && $0[24...25] == [8, 0] && $0[35] == 17 }.count == 12 + 14 + 28
                    + 3900)
            #expect(driver.device.counters.receiveAboveMTU.value == 1)
        }
    }

    /// Moved to another namespace an interface cannot be seen: the cable is in, until it is removed.
    @Test func anInterfaceThatWasMovedKeepsItsCable() throws {
        try inNewNamespace {
            let here = try NetworkNamespace.current()
            try NetworkNamespace.enterNew()
            let there = try NetworkNamespace.current()
            let farNetlink = try RouteNetlink()
            try here.enter()
            let netlink = try RouteNetlink(), tap = try InterfaceName("swtap0")
            let driver = try NetworkDriver(NetworkAttachment(.tap(tap)))
            try driver.start(.linkStatus)
            // Who waits for frames hears of the interface's end.
            try offerBuffers(driver)
            try netlink.move(#require(try netlink.link(named: tap)), to: there)
            // It was switched off on its way.
            try wait { driver.read(0x060) & 2 == 2 && driver.device.isLinkUp }
            let moved = try #require(try farNetlink.link(named: tap))
            try farNetlink.set(moved, up: true)
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sentFrames == 1)
            try farNetlink.delete(moved)
            try wait { !driver.device.isLinkUp }
        }
    }

    /// A macvtap takes frames while it is down, or gone, and drops them: what the kernel says of the interface counts.
    @Test func framesForAMACVTAPThatIsDownOrGoneAreCounted() throws {
        try inNewNamespace {
            let netlink = try RouteNetlink()
            try netlink.createLink(InterfaceName("below"), kind: "veth")
            let below = try #require(try netlink.link(named: InterfaceName("below")))
            let peer = try #require(try netlink.links().first { $0.kind == "veth" && $0.index != below.index })
            try netlink.createLink(InterfaceName("swmac0"), kind: "macvtap", parent: below.index)
            for link in [below, peer, try #require(try netlink.link(named: InterfaceName("swmac0")))] {
                try netlink.set(link, up: true)
            }
            let link = try #require(try netlink.link(named: InterfaceName("swmac0")))
            let file = try FileDescriptor.open("/dev/tap\(link.index)", O_RDWR)
            try #require(fcntl(file.rawValue, F_SETFD, 0) == 0)
            let driver = try NetworkDriver(NetworkAttachment(.descriptor(file.release())))
            try driver.start(.linkStatus)
            try wait { driver.device.isLinkUp }
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sentFrames == 1)
            try netlink.set(link, up: false)
            try wait { !driver.device.isLinkUp }
            try driver.sendAndWait(plainHeader + frame(60))
            try netlink.set(link, up: true)
            try wait { driver.device.isLinkUp }
            // The cable of the interface below.
            try netlink.set(peer, up: false)
            try wait { !driver.device.isLinkUp }
            try driver.sendAndWait(plainHeader + frame(60))
            try netlink.set(peer, up: true)
            try wait { driver.device.isLinkUp }
            #expect(driver.device.counters.sendLinkDown.value == 2 && driver.device.hostDrops?.receive == 0)
            try netlink.delete(link)
            try wait { !driver.device.isLinkUp }
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(driver.device.counters.sendLinkDown.value == 3 && driver.device.counters.sentFrames == 1)
            #expect(driver.device.hostDrops == nil)
        }
    }

    /// Sends a UDP datagram to everybody on the bridge's network.
    private func sendBroadcast(_ count: Int = 5) throws {
        let socket = FileDescriptor(owning: Glibc.socket(AF_INET, Int32(SOCK_DGRAM.rawValue), 0))
        var on: Int32 = 1
        unsafe setsockopt(socket.rawValue, SOL_SOCKET, SO_BROADCAST, &on, 4)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = UInt16(9).bigEndian
        address.sin_addr.s_addr = UInt32(0xc000_02ff).bigEndian
        let text = [UInt8](repeating: 0x73, count: count)
        // A socket address of its full size, as sendto wants it.
        let sent = unsafe withUnsafePointer(to: &address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe sendto(socket.rawValue, text, text.count, 0, $0, 16)
            }
        }
        try #require(sent == text.count)
    }
}

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

@Suite(.timed) struct NetworkDeviceTests {
    // MARK: Negotiation and configuration

    @Test func aDriverSeesAddressStatusAndMTU() throws {
        let (driver, _) = try Wire.make(mtu: 9000)
        #expect(driver.read(0x008) == 1)
        #expect(driver.offered.isSuperset(of: [.mac, .linkStatus, .mtu, .mergeableBuffers, .controlQueue, .version1]))
        #expect((0..<6 as Range<UInt64>).map { driver.configuration($0, 1) } == [0x52, 0x54, 0, 0, 0, 2])
        #expect(driver.configuration(6, 2) == 1)
        #expect(driver.configuration(10, 2) == 9000)
        #expect(driver.configuration(12, 1) == 0xff)
        let sizes = (0..<4 as Range<UInt32>).map { queue in
            driver.write(queue, 0x030)
            return driver.read(0x034)
        }
        #expect(sizes == [256, 256, 64, 0])
    }

    @Test(
        arguments: [
            (.controlReceiveMode, .controlQueue), (.controlMACAddress, .controlQueue),
        ] as [(FeatureSet, FeatureSet)])
    func aFeatureWithoutWhatItNeedsIsRefused(_ feature: FeatureSet, _ needed: FeatureSet) throws {
        let (driver, _) = try Wire.make()
        #expect(!driver.negotiate(feature))
        #expect(driver.negotiate(feature.union(needed)))
    }

    @Test func offloadsNeedEachOther() {
        let checksum: FeatureSet = .checksum, guestChecksum: FeatureSet = .guestChecksum
        for (feature, needed) in [
            (.guestTSO4, guestChecksum), (.guestTSO6, guestChecksum), (.guestUFO, guestChecksum), (.hostTSO4, checksum),
            (.hostTSO6, checksum),
            (.hostUFO, checksum), (.guestECN, [.guestChecksum, .guestTSO4]), (.guestECN, [.guestChecksum, .guestTSO6]),
            (.hostECN, [.checksum, .hostTSO6]), (.controlGuestOffloads, .controlQueue),
        ] as [(FeatureSet, FeatureSet)] {
            #expect(!feature.isConsistentForNetwork)
            #expect(feature.union(needed).isConsistentForNetwork)
        }
    }

    // MARK: The link

    @Test func thePulledCableIsSeenAndCounted() throws {
        let (driver, wire) = try Wire.make()
        try driver.start([.linkStatus, .mergeableBuffers])
        for index in 0..<4 as Range<UInt64> {
            try driver.offerBuffer(at: NetworkDriver.buffers + index * 0x1000, [2048])
        }
        driver.kick(0)
        let generation = driver.read(0x0fc)
        driver.device.port.setLink(up: false, because: "says a test")
        #expect(driver.read(0x060) & 2 == 2)
        #expect(driver.configuration(6, 2) == 0 && driver.read(0x0fc) != generation && !driver.device.isLinkUp)
        // The same again is no change.
        driver.write(2, 0x064)
        driver.device.port.setLink(up: false, because: "says a test")
        #expect(driver.read(0x060) & 2 == 0)

        try driver.sendAndWait(plainHeader + frame(60))
        #expect(driver.device.counters.sendLinkDown.value == 1 && !wire.isReadable)
        try wire.send(plainHeader + frame(60))
        try wait { driver.device.counters.receiveLinkDown.value > 0 }

        driver.device.port.setLink(up: true, because: "says a test")
        #expect(driver.configuration(6, 2) == 1)
        try driver.sendAndWait(plainHeader + frame(61))
        #expect(try wire.next() == plainHeader + frame(61))
        try wire.send(plainHeader + frame(62))
        #expect(try driver.used(0).written == 74)
        #expect(driver.device.counters.receiveDrops == 1)
        #expect(
            driver.lines.all == [
                "warning: the link is down: wire says a test",
                "info: a frame of the guest was dropped: the link is down",
                "info: a frame for the guest was dropped: the link is down",
                "notice: the link is up again: wire says a test",
            ])
    }

    /// The interface is removed while the machine runs: the guest sees the link go down and goes on.
    @Test func aRemovedInterfaceIsALinkThatIsDown() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.linkStatus)
        try driver.offerBuffer(at: NetworkDriver.buffers, [2048])
        driver.kick(0)
        wire.cut()
        try wait { !driver.device.isLinkUp && driver.configuration(6, 2) == 0 }
        driver.device.port.setLink(up: true, because: "says a test")
        #expect(driver.configuration(6, 2) == 0 && !driver.device.isLinkUp)
        for _ in 0..<3 { try driver.sendAndWait(plainHeader + frame(60)) }
        #expect(driver.device.counters.sendLinkDown.value == 3)
        try driver.start(.linkStatus)
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(driver.device.counters.sendLinkDown.value == 4 && !driver.status.contains(.needsReset))
    }

    // MARK: The control queue

    @Test func commandsAreAnswered() throws {
        let (driver, _) = try Wire.make()
        try driver.start([.controlQueue, .controlReceiveMode, .controlMACAddress])
        let ok: UInt8 = 0, error: UInt8 = 1
        #expect(try driver.command([0, 0, 1]) == ok)
        #expect(try driver.command([0, 1, 0]) == ok)
        // An address table of one unicast and two multicast addresses.
        #expect(try driver.command([1, 0, 1, 0, 0, 0] + frame(6) + [2, 0, 0, 0] + frame(12)) == ok)
        #expect(try driver.command([1, 1, 0x52, 0x54, 0, 0xab, 0xcd, 0xef]) == ok)
        #expect((0..<6 as Range<UInt64>).map { driver.configuration($0, 1) } == [0x52, 0x54, 0, 0xab, 0xcd, 0xef])
        #expect(driver.device.address.description == "52:54:00:ab:cd:ef")

        for bad in [
            [], [0], [0, 0], [0, 0, 1, 1], [0, 2, 1], [1], [1, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0, 0, 0],
            [1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], [1, 1],
            [1, 1, 0x52, 0x54, 0, 0, 0],
            [1, 1, 0x53, 0x54, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0], [1, 2, 0], [2, 0, 1, 0], [3, 0],
            [5, 0, 0, 0, 0, 0, 0, 0, 0, 0], [255, 255, 0],
        ] as [[UInt8]] {
            #expect(try driver.command(bad) == error, "\(bad)")
        }
        #expect(driver.device.address.description == "52:54:00:ab:cd:ef")
        // No room for the answer.
        #expect(try driver.command([0, 0, 1], answerLength: 0) == nil)
        #expect(try driver.command([0, 0, 1]) == ok)
        #expect(!driver.status.contains(.needsReset))
    }

    /// Without CTRL_VQ there is no control queue, though the driver makes one ready.
    @Test func aControlQueueThatWasNotNegotiatedIsNotServed() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.ringReset)
        for _ in 0..<2 {
            let address = NetworkDriver.buffers + 0x80_0000
            try driver.memory.ram.write([0, 0, 1, 0xee], at: GuestAddress(address))
            try driver.offer(
                NetworkDriver.control,
                [
                    .init(address: address, length: 3, isWritable: false),
                    .init(address: address + 3, length: 1, isWritable: true),
                ])
            driver.kick(NetworkDriver.control)
            // One that comes after it has been served, and so has this one, if it is.
            try driver.sendAndWait(plainHeader + frame(60))
            #expect(try wire.next().count == 72)
            #expect(try !driver.hasUsed(NetworkDriver.control))
            try driver.restart(NetworkDriver.control)
        }
    }

    /// Who has not negotiated STATUS is not interrupted for it.
    @Test func aLinkThatTheDriverDoesNotAskForIsNoInterrupt() throws {
        let (driver, _) = try Wire.make()
        try driver.start(.mergeableBuffers)
        driver.device.port.setLink(up: false, because: "says a test")
        #expect(driver.read(0x060) & 2 == 0)
        driver.device.port.setLink(up: true, because: "says a test")
        #expect(driver.read(0x060) & 2 == 0)
    }

    @Test func commandsThatWereNotNegotiatedAreErrors() throws {
        let (driver, _) = try Wire.make()
        try driver.start(.controlQueue)
        #expect(try driver.command([0, 0, 1]) == 1)
        #expect(try driver.command([1, 0, 0, 0, 0, 0, 0, 0, 0, 0]) == 1)
        #expect(try driver.command([1, 1, 0x52, 0x54, 0, 0xab, 0xcd, 0xef]) == 1)
    }
}

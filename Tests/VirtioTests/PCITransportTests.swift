// SPDX-License-Identifier: Apache-2.0

import PCI
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// The registers; what is behind them is ``VirtioFunctionTests``.
@Suite(.timed) struct PCITransportTests {
    private let guest: TestGuest
    private let device = RecordingDevice()
    private let driver: PCIHarness
    private let queue0: QueueConfiguration
    private let queue1: QueueConfiguration

    init() throws {
        guest = try TestGuest()
        driver = try PCIHarness(device: device, memory: guest.memory)
        queue0 = DriverQueue(guest, index: 0, size: 8, base: 0x1000).configuration
        queue1 = DriverQueue(guest, index: 1, size: 64, base: TestGuest.highStart).configuration
    }

    private var transport: PCITransport { driver.transport }
    private func configuration(_ offset: Int, _ size: Int) -> UInt32 {
        transport.readConfiguration(at: offset, size: size)
    }

    // MARK: Configuration space

    @Test func identity() {
        #expect(configuration(0, 4) == 0x106a_1af4)
        #expect(configuration(8, 1) == 1, "not transitional")
        #expect(configuration(0x2c, 4) == 0x106a_1af4)
        #expect(configuration(0x3d, 1) == 1)
        #expect(configuration(6, 2) & 0x10 != 0, "capabilities")
    }

    @Test func structuresOfVirtio() throws {
        // Type, offset, length (§4.1.4).
        for (type, offset, length) in [(1, 0, 60), (2, 0x3000, 8), (3, 0x1000, 1), (4, 0x2000, 9)]
            as [(UInt32, UInt32, UInt32)]
        {
            let place = try #require(driver.capability(0x09, type: type))
            #expect(configuration(place + 2, 1) == (type == 2 ? 20 : 16) && configuration(place + 4, 1) == 0)
            #expect(configuration(place + 8, 4) == offset && configuration(place + 12, 4) == length)
        }
        let notifications = try #require(driver.capability(0x09, type: 2))
        #expect(configuration(notifications + 16, 4) == 4)
        let messages = try #require(driver.capability(0x11))
        #expect(configuration(messages + 2, 2) == 0x8002 && configuration(messages + 4, 4) == 0x4000)
        #expect(configuration(messages + 8, 4) == 0x5000)
        // Root complex integrated endpoint, version 2.
        let express = try #require(driver.capability(0x10))
        #expect(configuration(express + 2, 2) == 0x92)
    }

    @Test func theWindowIntoTheBAR() throws {
        let window = try #require(driver.capability(0x09, type: 5))
        func choose(_ bar: UInt32, _ offset: UInt32, _ length: UInt32) {
            transport.writeConfiguration(bar, at: window + 4, size: 1)
            transport.writeConfiguration(offset, at: window + 8, size: 4)
            transport.writeConfiguration(length, at: window + 12, size: 4)
        }
        choose(0, 20, 1)
        transport.writeConfiguration(1, at: window + 16, size: 4)
        #expect(driver.status == 1)
        transport.writeConfiguration(0xff, at: window + 16, size: 4)
        choose(0, 18, 2)
        #expect(configuration(window + 16, 2) == 2)
        choose(0, 0x2000, 4)
        #expect(configuration(window + 16, 4) == 0x4433_2211)
        // A reset through it waits for the device, and is over.
        choose(0, 20, 1)
        transport.writeConfiguration(0, at: window + 16, size: 1)
        #expect(driver.status == 0 && device.events == [.reset])
        for (bar, offset, length) in [
            (1, 20, 1), (0, 21, 2), (0, 20, 0), (0, 20, 3), (0, 20, 8), (0, 0x8000, 1), (0, .max, 1),
        ]
            as [(UInt32, UInt32, UInt32)]
        {
            choose(bar, offset, length)
            transport.writeConfiguration(1, at: window + 16, size: 4)
            _ = configuration(window + 16, 4)
            #expect(driver.status == 0 && device.events == [.reset])
        }
    }

    // MARK: Common configuration

    @Test func fieldsHaveOneWidth() {
        driver.negotiate(.version1)
        for (offset, size) in [
            (20, 2), (20, 4), (16, 4), (18, 1), (22, 1), (24, 4), (28, 1), (0, 1), (0, 8), (33, 4), (32, 2), (56, 4),
        ] as [(UInt64, Int)] {
            #expect(transport.readBAR(0, at: offset, size: size) == UInt64.max >> UInt64(64 - 8 * size))
            transport.writeBAR(0, 0, at: offset, size: size)
            #expect(driver.status == 11)
        }
        #expect(transport.readBAR(1, at: 20, size: 1) == 0xff)
        // What can only be read.
        for (offset, size, value) in [(4, 4, driver.deviceFeatures(word: 0)), (18, 2, 2), (21, 1, 0), (30, 2, 0)]
            as [(UInt64, Int, UInt32)]
        {
            driver.set(offset, size, .max)
            #expect(driver.get(offset, size) == value)
        }
    }

    @Test func ringsAreWrittenWholeOrByHalves() throws {
        driver.negotiate(.version1)
        driver.set(22, 2, 1)
        transport.writeBAR(0, 0x1111_2222_3333_4444, at: 32, size: 8)
        driver.set(44, 4, 0x5555_6666)
        driver.set(48, 4, 0x7777_8888)
        let queue = try #require(transport.function.queue(1))
        #expect(queue.descriptorTable.rawValue == 0x1111_2222_3333_4444)
        #expect(queue.availableRing.rawValue == 0x5555_6666_0000_0000 && queue.usedRing.rawValue == 0x7777_8888)
        #expect(transport.readBAR(0, at: 32, size: 8) == 0x1111_2222_3333_4444)
        #expect(driver.get(36, 4) == 0x1111_2222 && driver.get(32, 4) == 0x3333_4444)
        #expect(driver.get(30, 2) == 1, "queue_notify_off")
    }

    @Test func aResetForgetsWhatWasSelected() {
        for (offset, size) in [(0, 4), (8, 4), (22, 2)] as [(UInt64, Int)] { driver.set(offset, size, 1) }
        #expect(driver.get(24, 2) == 256)
        driver.set(20, 1, 0)
        #expect(driver.get(24, 2) == 8 && driver.get(0, 4) == 0 && driver.get(8, 4) == 0)
    }

    @Test func whatTheDriverWroteCanBeRead() {
        driver.negotiate([.version1, RecordingDevice.wanted])
        driver.set(8, 4, 0)
        #expect(driver.get(12, 4) == 8)
        driver.set(8, 4, 1)
        #expect(driver.get(12, 4) == 1)
    }

    // MARK: Doorbells

    @Test func doorbellsFollowTheBAR() {
        let doorbells = transport.function.doorbells.map { $0.event.rawValue }
        func place(_ address: UInt64?) {
            transport.place(
                address.map { [PCIConfigurationSpace.Placement(bar: 0, range: $0..<$0 + PCITransport.barSize)] } ?? [])
        }
        place(0xc000_0000)
        #expect(driver.platform.doorbells == [0xc000_3000: doorbells[0], 0xc000_3004: doorbells[1]])
        place(0x1_c000_8000)
        #expect(driver.platform.doorbells == [0x1_c000_b000: doorbells[0], 0x1_c000_b004: doorbells[1]])
        place(nil)
        #expect(driver.platform.doorbells.isEmpty)
        // A refusal leaves the way by exits.
        driver.platform.setRefusing(true)
        place(0xc000_0000)
        driver.kick(queue: 1)
        #expect(transport.function.doorbells[1].event.drain() == 1)
        driver.platform.setRefusing(false)
        place(0xc000_8000)
        transport.disconnect()
        #expect(
            driver.platform.doorbells.isEmpty && driver.platform.connectionCount == 0 && driver.platform.routes.isEmpty)
        #expect(driver.platform.mistakes == [])
    }

    @Test func notificationsOfAnyWidthAtTheQueuesAddressAlone() {
        for size in [1, 2, 4, 8] { transport.writeBAR(0, 0xffff, at: PCIHarness.notifications + 4, size: size) }
        for offset in [1, 2, 3, 5, 8, 0xffc] as [UInt64] {
            transport.writeBAR(0, 0, at: PCIHarness.notifications + offset, size: 1)
        }
        #expect(
            transport.function.doorbells[1].event.drain() == 4 && transport.function.doorbells[0].event.drain() == 0)
        #expect(transport.readBAR(0, at: PCIHarness.notifications, size: 2) == 0xffff)
    }

    // MARK: Interrupts

    @Test func vectorsThatDoNotExistAreNone() {
        for offset in [16, 26] as [UInt64] {
            #expect(driver.get(offset, 2) == 0xffff)
            driver.set(offset, 2, 2)
            #expect(driver.get(offset, 2) == 2)
            driver.set(offset, 2, 3)
            #expect(driver.get(offset, 2) == 0xffff, "refused")
        }
        driver.set(22, 2, 2)
        driver.set(26, 2, 1)
        #expect(driver.get(26, 2) == 0xffff, "there is no such queue")
        driver.set(16, 2, 1)
        driver.set(20, 1, 0)
        #expect(driver.get(16, 2) == 0xffff, "a reset of the device")
    }

    @Test func aQueueWithoutVectorInterruptsNobodyAlsoLater() {
        driver.bringUp(.version1, queue0)
        driver.set(22, 2, 0)
        driver.set(26, 2, 0xffff)
        transport.function.interrupts.queues[0].signal()
        #expect(driver.message(ofSource: 0) == nil)
        driver.set(26, 2, 1)
        #expect(driver.message(ofSource: 0) == MSIMessage(address: 0xfee0_0000, data: 0x41))
        #expect(!transport.sources[0].isSignalled)
    }

    @Test func severalQueuesMayShareAVector() {
        driver.bringUp(.version1, queue0, queue1)
        for queue in 0..<2 as Range<UInt32> {
            driver.set(22, 2, queue)
            driver.set(26, 2, 2)
        }
        #expect(driver.message(ofSource: 0)?.data == 0x42 && driver.message(ofSource: 1)?.data == 0x42)
        #expect(driver.message(ofSource: 2)?.data == 0x40)
    }

    @Test func messagesNeedTheBusMaster() {
        driver.bringUp(.version1, queue0)
        transport.writeConfiguration(2, at: 4, size: 2)
        transport.function.interrupts.queues[0].signal()
        #expect(driver.platform.connectionCount == 0)
        #expect(driver.get(PCIHarness.pendingBits, 4) == 2)
        transport.writeConfiguration(6, at: 4, size: 2)
        #expect(driver.takeInterrupt(ofQueue: 0) && driver.get(PCIHarness.pendingBits, 4) == 0)
    }

    @Test func withoutMessagesThePinIsAssertedUntilTheStatusIsRead() {
        driver.enableMessages(0)
        driver.bringUp(.version1, queue0)
        #expect(driver.get(PCIHarness.status, 1) == 0)
        let interrupts = transport.function.interrupts
        interrupts.queues[0].signal()
        interrupts.queues[1].signal()
        #expect(driver.platform.isPinAsserted && configuration(6, 2) & 8 != 0 && configuration(4, 4) & 8 << 16 != 0)
        interrupts.configuration.signal()
        #expect(driver.get(PCIHarness.status, 1) == 3)
        #expect(!driver.platform.isPinAsserted && driver.get(PCIHarness.status, 1) == 0 && configuration(6, 2) & 8 == 0)
        // Disabled by the command register, it stays pending.
        transport.writeConfiguration(0x0406, at: 4, size: 2)
        interrupts.configuration.signal()
        #expect(!driver.platform.isPinAsserted && configuration(7 - 1, 1) & 8 != 0)
        transport.writeConfiguration(0x0006, at: 4, size: 2)
        #expect(driver.platform.isPinAsserted)
        driver.status = 0
        #expect(!driver.platform.isPinAsserted && driver.get(PCIHarness.status, 1) == 0)
        // With messages it is not used.
        driver.enableMessages()
        interrupts.configuration.signal()
        #expect(!driver.platform.isPinAsserted && driver.get(PCIHarness.status, 1) == 0)
        #expect(driver.platform.mistakes == [])
    }

    @Test func anInterruptThatTheHostRefusesIsReported() throws {
        driver.platform.setRefusing(true)
        driver.bringUp(.version1, queue0)
        #expect(driver.platform.connectionCount == 0 && driver.status == 15)
        driver.platform.setRefusing(false)
        // The driver may try again.
        driver.setVector(1, data: 0x51)
        #expect(driver.message(ofSource: 0)?.data == 0x51)
        #expect(driver.platform.mistakes == [])
    }
}

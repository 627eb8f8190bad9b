// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// The registers; what is behind them is ``VirtioFunctionTests``.
@Suite(.timed) struct MMIOTransportTests {
    private let guest: TestGuest
    private let device = RecordingDevice()
    private let transport: MMIOTransport
    private let queue0: QueueConfiguration

    init() throws {
        guest = try TestGuest()
        transport = try MMIOTransport(device: device, memory: guest.memory)
        queue0 = DriverQueue(guest, index: 0, size: 8, base: 0x1000).configuration
    }

    @Test func identity() {
        #expect(transport.get(0x00) == 0x7472_6976)
        #expect(transport.get(0x04) == 2)
        #expect(transport.get(0x08) == 42)
        #expect(transport.get(0x0c) == 0x4d56_4b53)
        // No shared memory (§4.2.2).
        #expect([0xb0, 0xb4, 0xb8, 0xbc].allSatisfy { transport.get($0) == .max })
    }

    @Test func oddAccessesReadOnesAndWriteNothing() {
        transport.negotiate(.version1)
        for (offset, size) in [
            (UInt64(0x70), 1), (0x70, 2), (0x70, 8), (0x71, 4), (0x72, 4), (0x73, 1), (0xfe, 4), (0x70, 0), (0x70, 3),
        ] {
            let ones: [Int: UInt64] = [0: 0, 1: 0xff, 2: 0xffff, 3: 0xff_ffff, 4: 0xffff_ffff, 8: .max]
            #expect(transport.read(at: offset, size: size) == ones[size])
            transport.write(0, at: offset, size: size)
            #expect(transport.status == 11)
        }
        // Registers that are not there, and those that only take or only give.
        for offset in [
            UInt64(0x0c), 0x18, 0x1c, 0x28, 0x2c, 0x3c, 0x40, 0x48, 0x4c, 0x54, 0x58, 0x5c, 0x68, 0x74, 0x88, 0xac,
            0xe0,
        ] {
            transport.set(offset, .max)
        }
        for offset in [UInt64(0x00), 0x04, 0x08, 0x10, 0x34, 0x60, 0xfc] { transport.set(offset, 0) }
        for offset in [UInt64(0x14), 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0x18, 0xe0] {
            #expect(transport.get(offset) == .max)
        }
        #expect(transport.get(0x04) == 2)
        #expect(transport.status == 11)
    }

    @Test func theConfigurationSpaceEndsWithTheWindow() {
        #expect(transport.read(at: 0x108, size: 1) == 0x99)
        for (offset, size, ones) in [
            (0xffc, 4, 0xffff_ffff), (0x1000, 1, 0xff), (.max, 1, 0xff), (.max - 7, 8, .max), (0x101, 2, 0xffff),
        ] as [(UInt64, Int, UInt64)] {
            #expect(transport.read(at: offset, size: size) == ones)
        }
        transport.write(1, at: 0x1000, size: 1)
        transport.write(1, at: .max, size: 1)
        #expect(device.events.isEmpty)
        transport.write(1, at: 0xfff, size: 1)
        #expect(device.events == [.write(1, offset: 0xeff, size: 1)])
    }

    @Test func halvesOfAddressesGoToTheirQueue() throws {
        transport.negotiate(.version1)
        for (offset, value) in [
            (0x30, 1), (0x84, 0x1111_1111), (0x80, 0x2222_2222), (0x90, 0x4444_4444), (0x94, 0x3333_3333),
            (0xa4, 0x5555_5555), (0x38, 0x42),
            (0x30, 0), (0xa0, 0x6666_6666),
        ] as [(UInt64, UInt32)] {
            transport.set(offset, value)
        }
        let queue = try #require(transport.function.queue(1))
        #expect(
            queue.descriptorTable == GuestAddress(0x1111_1111_2222_2222)
                && queue.availableRing == GuestAddress(0x3333_3333_4444_4444))
        #expect(queue.usedRing == GuestAddress(0x5555_5555_0000_0000) && queue.size == 0x42)
        #expect(try #require(transport.function.queue(0)).usedRing == GuestAddress(0x6666_6666))
    }

    @Test func aResetForgetsWhatWasSelected() {
        for offset: UInt64 in [0x14, 0x24, 0x30] { transport.set(offset, 1) }
        #expect(transport.get(0x34) == 256)
        transport.set(0x70, 0)
        #expect(transport.get(0x34) == 8)
        #expect(transport.get(0x10) == transport.deviceFeatures(word: 0))
    }

    @Test func valuesThatQueueReadyAndQueueResetDoNotTake() {
        transport.negotiate([.version1, .ringReset])
        transport.setUp(queue0)
        for value: UInt32 in [2, 3, .max] {
            transport.set(0x44, value)
            #expect(transport.get(0x44) == 1)
        }
        for value: UInt32 in [0, 2, .max] {
            transport.set(0xc0, value)
            #expect(transport.get(0xc0) == 0 && transport.get(0x44) == 1)
        }
        transport.set(0x44, 0)
        #expect(transport.get(0x44) == 0)
        transport.set(0x44, .max)
        #expect(transport.get(0x44) == 0)
    }

    @Test func statusBitsBeyondTheField() {
        transport.set(0x70, 0x100)
        #expect(transport.status == 0)
        #expect(device.events.isEmpty)
    }

    // MARK: Kicks and interrupts

    @Test func kicksThatReachUserSpaceSignalTheDoorbell() {
        for (value, size) in [(UInt64(1), 4), (1, 1), (1, 2), (1, 8), (0xabcd_0001, 2)] {
            transport.write(value, at: MMIOTransport.queueNotifyOffset, size: size)
        }
        for value in [UInt64(2), 0xffff_ffff, .max, 0x1_0000_0001] {
            transport.write(value, at: MMIOTransport.queueNotifyOffset, size: 8)
        }
        transport.write(1, at: 0x51, size: 1)
        #expect(transport.function.doorbells[0].event.drain() == 0)
        #expect(transport.function.doorbells[1].event.drain() == 5)
        #expect(transport.function.counters.exitKicks.value == 5)
    }

    @Test func interruptsStayUntilTheyAreAcknowledged() {
        transport.bringUp(.version1, queue0)
        #expect(transport.get(0x60) == 0)
        transport.function.interrupts.queues[0].signal()
        transport.function.interrupts.queues[0].signal()
        #expect(transport.get(0x60) == 1)
        #expect(transport.get(0x60) == 1, "reading acknowledged")
        transport.function.interrupts.configuration.signal()
        #expect(transport.get(0x60) == 3)
        #expect(transport.irqfd.event.drain() == 3)
        transport.set(0x64, 0)
        transport.set(0x64, 0xffff_fffc)
        #expect(transport.get(0x60) == 3)
        transport.set(0x64, 1)
        #expect(transport.get(0x60) == 2)
        transport.set(0x64, .max)
        #expect(transport.get(0x60) == 0)
        #expect(transport.function.counters.interrupts.value == 3)
    }

    @Test func theInterruptStatusEndsWithAReset() {
        transport.bringUp(.version1, queue0)
        transport.function.interrupts.queues[1].signal()
        transport.function.interrupts.configuration.markNeedsReset()
        #expect(transport.get(0x60) == 3)
        transport.set(0x70, 0)
        #expect(transport.get(0x60) == 0)
    }

    /// One GSI, and one eventfd for it: two on one pin could hide each other's edges.
    @Test func allInterruptsShareTheLine() {
        let interrupts = transport.function.interrupts
        #expect(
            interrupts.queues.allSatisfy { $0.irqfd === transport.irqfd }
                && interrupts.configuration.irqfd === transport.irqfd)
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
import Virtio

@testable import Devices

/// Interrupts that come later, as the driver has set it (virtio 1.3 §5.1.6.5.11).
@Suite(.timed) struct NetworkCoalescingTests {
    private static let features: FeatureSet = [.controlQueue, .typeCoalescing, .queueCoalescing]
    private let base = NetworkDriver.buffers

    private static let setTransmit: UInt8 = 0, setReceive: UInt8 = 1, setQueue: UInt8 = 2, getQueue: UInt8 = 3

    private func bytes(_ values: UInt32...) -> [UInt8] {
        values.flatMap { value in (0..<4).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) } }
    }

    private func set(_ driver: NetworkDriver, _ command: UInt8, packets: UInt32, microseconds: UInt32) throws {
        #expect(try driver.command([6, command] + bytes(packets, microseconds)) == 0)
    }

    /// What VQ_GET says of a queue; nil if it is refused.
    private func parameters(_ driver: NetworkDriver, _ queue: UInt8) throws -> [UInt32]? {
        let answer = try driver.offerCommand(
            [6, Self.getQueue, queue, 0], answerLength: 9, queue: NetworkDriver.control)
        driver.kick(NetworkDriver.control)
        let written = try driver.used(NetworkDriver.control).written
        guard try driver.memory.ram.readUInt8(at: answer) == 0 else {
            #expect(written == 1)
            return nil
        }
        #expect(written == 9)
        return [try driver.memory.ram.readUInt32(at: answer &+ 1), try driver.memory.ram.readUInt32(at: answer &+ 5)]
    }

    /// Forgets interrupts; those of the control queue, too.
    private func forgetInterrupts(_ driver: NetworkDriver) {
        driver.transport.irqfd.event.drain()
        driver.write(3, 0x064)
    }

    private func hasInterrupt(_ driver: NetworkDriver) -> Bool { driver.read(0x060) & 1 != 0 }

    // MARK: Commands

    @Test func parametersAreKeptForEachQueue() throws {
        let (driver, _) = try Wire.make()
        #expect(driver.offered.isSuperset(of: [.typeCoalescing, .queueCoalescing]))
        try driver.start(Self.features)
        #expect(try parameters(driver, 0) == [0, 0])
        try set(driver, Self.setReceive, packets: 8, microseconds: 50)
        try set(driver, Self.setTransmit, packets: .max, microseconds: .max)
        #expect(try parameters(driver, 0) == [8, 50])
        #expect(try parameters(driver, 1) == [.max, .max])
        #expect(try driver.command([6, Self.setQueue, 0, 0, 0, 0] + bytes(3, 4)) == 0)
        #expect(try parameters(driver, 0) == [3, 4])
        #expect(try parameters(driver, 1) == [.max, .max])
        // A queue that was reset has what all of its kind have.
        let ringReset = Self.features.union(.ringReset)
        try driver.start(ringReset)
        #expect(try parameters(driver, 0) == [0, 0], "a reset sets everything back")
        try set(driver, Self.setReceive, packets: 8, microseconds: 50)
        #expect(try driver.command([6, Self.setQueue, 0, 0, 0, 0] + bytes(3, 4)) == 0)
        try driver.restart(NetworkDriver.receive)
        #expect(try parameters(driver, 0) == [8, 50])
    }

    @Test func wrongCommandsAreErrors() throws {
        let (driver, _) = try Wire.make()
        try driver.start(Self.features)
        for command in [
            [6, Self.setReceive] + bytes(1), [6, Self.setReceive] + bytes(1, 2, 3), [6, Self.setTransmit],
            [6, Self.setQueue, 2, 0, 0, 0] + bytes(1, 2), [6, Self.setQueue, 0, 0] + bytes(1, 2),
            [6, Self.setQueue, 0xff, 0xff, 0, 0] + bytes(1, 2), [6, Self.getQueue, 0], [6, 4] + bytes(1, 2),
        ] {
            #expect(try driver.command(command) == 1, "\(command)")
        }
        #expect(try parameters(driver, 2) == nil, "the control queue")
        #expect(try driver.command([6, Self.getQueue, 0, 0]) == 1, "no room for the result")
        #expect(try parameters(driver, 0) == [0, 0])

        // Each feature has commands of its own, and needs the control queue.
        try driver.start([.controlQueue, .typeCoalescing])
        #expect(try parameters(driver, 0) == nil)
        #expect(try driver.command([6, Self.setQueue, 0, 0, 0, 0] + bytes(1, 2)) == 1)
        try driver.start([.controlQueue, .queueCoalescing])
        #expect(try driver.command([6, Self.setReceive] + bytes(1, 2)) == 1)
        #expect(!driver.negotiate(.typeCoalescing) && !driver.negotiate(.queueCoalescing))
    }

    // MARK: Interrupts

    /// An hour is not over when the packets are there.
    @Test(arguments: [[], .eventIndex, .mergeableBuffers] as [FeatureSet])
    func theInterruptComesWithTheLastOfThePackets(extra: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(Self.features.union(extra))
        try set(driver, Self.setReceive, packets: 4, microseconds: 3_600_000_000)
        for index in 0..<9 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [2048]) }
        driver.kick(0)
        for round in 0..<2 {
            forgetInterrupts(driver)
            for count in UInt64(1)...3 {
                try wire.send(plainHeader + frame(60))
                try wait { driver.device.counters.receivedFrames == UInt64(round) * 4 + count }
            }
            try wait { try driver.hasUsed(0) }
            #expect(!hasInterrupt(driver), "round \(round)")
            try wire.send(plainHeader + frame(60))
            try wait { hasInterrupt(driver) }
            for _ in 0..<4 { #expect(try driver.used(0).written == 72) }
        }
        // One at a time again.
        try set(driver, Self.setReceive, packets: 0, microseconds: 0)
        forgetInterrupts(driver)
        try wire.send(plainHeader + frame(60))
        #expect(try driver.used(0).written == 72)
    }

    @Test func theInterruptComesWhenTheTimeIsOver() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(Self.features)
        // Long enough that the frame is there first, and short enough to wait for.
        try set(driver, Self.setReceive, packets: 1000, microseconds: 300_000)
        for index in 0..<3 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [2048]) }
        driver.kick(0)
        for _ in 0..<3 {
            forgetInterrupts(driver)
            let start = TimerFD.now
            try wire.send(plainHeader + frame(60))
            try wait { hasInterrupt(driver) }
            #expect(TimerFD.now - start >= 299, "too early")
            #expect(try driver.used(0).written == 72)
        }
    }

    @Test func transmittedFramesAreCountedApart() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(Self.features)
        try set(driver, Self.setTransmit, packets: 2, microseconds: 3_600_000_000)
        forgetInterrupts(driver)
        try driver.send(plainHeader + frame(60))
        #expect(try wire.next().count == 72)
        try wait { try driver.hasUsed(1) }
        #expect(!hasInterrupt(driver))
        try driver.send(plainHeader + frame(60))
        try wait { hasInterrupt(driver) }
        for _ in 0..<2 { _ = try driver.used(1) }
        // The receive queue has no delay.
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        #expect(try driver.used(0).written == 72)
    }

    /// A shorter delay does not wait for the end of a longer one: the next packet brings the interrupt.
    @Test func withoutDelayWhatIsDelayedComesWithTheNextPacket() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(Self.features)
        try set(driver, Self.setReceive, packets: 0, microseconds: 3_600_000_000)
        for index in 0..<2 as Range<UInt64> { try driver.offerBuffer(at: base + index * 0x1000, [2048]) }
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        try wait { try driver.hasUsed(0) }
        try set(driver, Self.setReceive, packets: 0, microseconds: 0)
        try wire.send(plainHeader + frame(60))
        for _ in 0..<2 { #expect(try driver.used(0).written == 72) }
    }

    @Test func aPauseEndsTheDelay() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(Self.features)
        try set(driver, Self.setReceive, packets: 0, microseconds: 3_600_000_000)
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        forgetInterrupts(driver)
        try wire.send(plainHeader + frame(60))
        try wait { try driver.hasUsed(0) }
        #expect(!hasInterrupt(driver))
        let isQuiet = Guarded(false)
        driver.device.pause { isQuiet.withLock { $0 = true } }
        try wait { isQuiet.withLock { $0 } }
        #expect(hasInterrupt(driver))
        driver.device.resume()
    }

    /// The delay ends with the driver that set it, and no interrupt comes after the reset.
    @Test func aResetEndsTheDelay() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(Self.features)
        try set(driver, Self.setReceive, packets: 0, microseconds: 50_000)
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        try wait { try driver.hasUsed(0) }
        try driver.start(Self.features)
        forgetInterrupts(driver)
        usleep(100_000)
        #expect(!hasInterrupt(driver))
        try driver.offerBuffer(at: base, [2048])
        driver.kick(0)
        try wire.send(plainHeader + frame(60))
        #expect(try driver.used(0).written == 72)
    }
}

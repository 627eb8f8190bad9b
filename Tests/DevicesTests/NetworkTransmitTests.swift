// SPDX-License-Identifier: Apache-2.0

import CSystemCallFilter
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
import Virtio

@testable import Devices

@Suite(.timed) struct NetworkTransmitTests {
    @Test(arguments: [[], .eventIndex] as [FeatureSet])
    func aFrameGoesOut(_ features: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(features)
        for index in 0..<50 {
            try driver.sendAndWait(plainHeader + frame(60 + index))
            #expect(try wire.next() == plainHeader + frame(60 + index))
        }
        #expect(driver.device.counters.sentFrames == 50)
        #expect(driver.device.counters.sentBytes == UInt64((0..<50).reduce(0) { $0 + 60 + $1 }))
        #expect(driver.device.counters.sendDrops == 0)
    }

    /// Wherever the chain is cut, also within the header.
    @Test(arguments: [[12], [1], [11], [13], [0, 12], [5, 7], [5, 0, 8, 0], [72], Array(repeating: 1, count: 71)])
    func aFrameMayBeInPieces(_ lengths: [Int]) throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait(plainHeader + frame(60), cut: lengths)
        #expect(try wire.next() == plainHeader + frame(60))
    }

    /// As many descriptors as the queue has.
    @Test func aChainMayTakeTheWholeQueue() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait(plainHeader + frame(1000), cut: Array(repeating: 3, count: 255))
        #expect(try wire.next() == plainHeader + frame(1000))
    }

    /// As many frames as there can be, at one kick, which is more than is sent in one go.
    @Test(arguments: [[], .eventIndex] as [FeatureSet])
    func aFullQueueGoesOut(_ features: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(features)
        for index in 0..<256 {
            let address = NetworkDriver.buffers + UInt64(index) * 0x1000
            try driver.memory.ram.write(plainHeader + frame(60, seed: index), at: GuestAddress(address))
            try driver.offer(1, [.init(address: address, length: 72, isWritable: false)])
        }
        driver.kick(1)
        for index in 0..<256 {
            try #require(try wire.next() == plainHeader + frame(60, seed: index))
            #expect(try driver.used(1).head == UInt16(index))
        }
    }

    @Test(arguments: [14, 1514, 65554])
    func theSmallestAndTheLargestFrameGoOut(_ count: Int) throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait(plainHeader + frame(count))
        #expect(try wire.next().count == 12 + count)
    }

    @Test(arguments: [0, 1, 11, 12, 13, 25, 65567, 100_000])
    func framesOfNoPossibleLengthAreDropped(_ count: Int) throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait([UInt8](repeating: 0, count: count))
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try wire.next() == plainHeader + frame(60))
        #expect(driver.device.counters.sendMalformed.value == 1 && driver.device.counters.sentFrames == 1)
        #expect(driver.lines.all == ["warning: a malformed frame of the guest was dropped"])
    }

    @Test func framesForWhichTheHostHasNoMemoryAreReported() throws {
        let failures = Lines()
        // The filter is for good: a thread of its own, and those that it starts, have it.
        let thread = try Thread.start(name: "no-memory", stackSize: 1 << 20) {
            guard fail_system_call(writev_number(), ENOBUFS) == 0 else {
                return failures.add(.error, "the host has no filters")
            }
            do {
                let (driver, wire) = try Wire.make()
                try driver.start()
                for _ in 0..<3 { try driver.sendAndWait(plainHeader + frame(60)) }
                #expect(driver.device.counters.sendNoMemory.value == 3 && !wire.isReadable)
                driver.device.deviceEvents.end()
                let line = "a frame of the guest was dropped: the host has no memory for it"
                #expect(
                    driver.lines.all.first == "warning: \(line)"
                        && driver.lines.all.last?.hasSuffix(" more: \(line)") == true)
                #expect(driver.device.deviceEvents.totals["lost_frames"] == 3)
            } catch { failures.add(.error, "\(error)") }
        }
        thread.join()
        #expect(failures.all.isEmpty)
    }

    /// A chain of gigabytes, all in the same buffer.
    @Test func aHugeChainIsDropped() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        let piece = NetworkDriver.Piece(address: 0, length: 16 << 20, isWritable: false)
        try driver.offer(1, Array(repeating: piece, count: 255))
        driver.kick(1)
        #expect(try driver.used(1).written == 0)
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try wire.next() == plainHeader + frame(60))
        #expect(driver.device.counters.sendMalformed.value == 1)
    }

    // MARK: The header

    /// NEEDS_CSUM and the kinds of segmentation, each with what it needs.
    @Test(
        arguments: [
            (1, 0, [.checksum]), (1, 1, [.checksum, .hostTSO4]), (1, 4, [.checksum, .hostTSO6]),
            (1, 3, [.checksum, .hostUFO]),
            (1, 0x81, [.checksum, .hostTSO4, .hostECN]), (1, 0x84, [.checksum, .hostTSO6, .hostECN]),
        ] as [(UInt8, UInt8, FeatureSet)])
    func anOffloadNeedsItsFeatures(_ flags: UInt8, _ segmentation: UInt8, _ features: FeatureSet) throws {
        var header: [UInt8] = [flags, segmentation, 54, 0, 0x78, 5, 34, 0, 16, 0, 0, 0]
        let pool = IOVectorPool(slots: 1, capacity: 1)
        func isTaken(_ granted: FeatureSet) -> Bool {
            // The run is a view of the array for the length of the closure.
            unsafe header.withUnsafeMutableBytes {
                unsafe pool[0].set(0, to: $0)
                return PacketHeader(from: pool[0].run(from: 0, count: 1), features: granted) != nil
            }
        }
        #expect(isTaken(features))
        #expect(isTaken(FeatureSet(rawValue: 0x7fff)))
        for bit in 0..<15 where features.contains(FeatureSet(bit: bit)) {
            #expect(!isTaken(FeatureSet(rawValue: 0x7fff).subtracting(FeatureSet(bit: bit))))
        }
    }

    @Test func theHeaderGoesToTheHostWithoutWhatADriverMustNotSet() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait([0xfe, 0, 54, 0, 0, 0, 34, 0, 16, 0, 0x34, 0x12] + frame(60))
        #expect(try wire.next() == [0, 0, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0] + frame(60))
    }

    @Test(arguments: [[1, 0], [0, 1], [0, 2], [0, 0x80], [0, 5]] as [[UInt8]])
    func whatWasNotNegotiatedIsDropped(_ start: [UInt8]) throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait(start + plainHeader.dropFirst(2) + frame(60))
        try driver.sendAndWait(plainHeader + frame(61))
        #expect(try wire.next() == plainHeader + frame(61))
        #expect(driver.device.counters.sendMalformed.value == 1)
    }

    @Test func aTAPWithoutHeaderGetsTheFrameAlone() throws {
        let (driver, wire) = try Wire.make(headerSize: 0)
        #expect(
            driver.offered.isDisjoint(with: [.checksum, .guestChecksum, .hostTSO4, .guestTSO4, .controlGuestOffloads]))
        try driver.start()
        try driver.sendAndWait(plainHeader + frame(60), cut: [5, 20])
        #expect(try wire.next() == frame(60))
    }

    // MARK: A TAP that takes no more

    /// Frames wait, and go out once each and in order when the host takes them again.
    @Test(arguments: [[], .eventIndex] as [FeatureSet])
    func framesWaitForTheHost(_ features: FeatureSet) throws {
        let (driver, wire) = try Wire.make()
        try driver.start(features)
        let count = 250
        for index in 0..<count {
            try driver.send(plainHeader + frame(4000, seed: index), at: NetworkDriver.buffers + UInt64(index) * 0x2000)
        }
        try wait { driver.device.counters.sendWaits.value > 0 }
        for index in 0..<count { try #require(try wire.next() == plainHeader + frame(4000, seed: index)) }
        for _ in 0..<count { _ = try driver.used(1) }
        #expect(driver.device.counters.sentFrames == UInt64(count) && driver.device.counters.sendDrops == 0)
        #expect(!wire.isReadable)
    }

    @Test func aResetEndsTheWaiting() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        for index in 0..<250 {
            try driver.send(plainHeader + frame(4000, seed: index), at: NetworkDriver.buffers + UInt64(index) * 0x2000)
        }
        try wait { driver.device.counters.sendWaits.value > 0 }
        try driver.start()
        while wire.isReadable { _ = try wire.next() }
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try wire.next() == plainHeader + frame(60))
    }

    /// Both directions at the same time: neither starves the other.
    @Test func bothDirectionsMove() throws {
        let (driver, wire) = try Wire.make()
        try driver.start(.eventIndex)
        for slot in 0..<64 as Range<UInt64> {
            try driver.offerBuffer(at: NetworkDriver.buffers + slot * 0x1000, [2048])
        }
        driver.kick(0)
        for index in 0..<2_000 {
            try wire.send(plainHeader + frame(100, seed: index))
            try driver.send(plainHeader + frame(200, seed: index))
            try #require(try wire.next() == plainHeader + frame(200, seed: index))
            let used = try driver.used(0)
            _ = try driver.used(1)
            try #require(
                try driver.bytes(NetworkDriver.buffers + UInt64(used.head) * 0x1000 + 12, 100)
                    == frame(100, seed: index))
            try driver.offer(
                0,
                [
                    .init(
                        address: NetworkDriver.buffers + UInt64(driver.queues[0].nextDescriptor) * 0x1000, length: 2048,
                        isWritable: true)
                ])
            driver.kick(0)
        }
    }

    @Test(arguments: [0xffff_ffff_ffff_f000, 0xd000_0000, 16 << 20, (16 << 20) - 100] as [UInt64])
    func framesOutsideRAMNeedAReset(_ address: UInt64) throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.offer(1, [.init(address: address, length: 200, isWritable: false)])
        driver.kick(1)
        try wait { driver.status.contains(.needsReset) }
        try driver.start()
        try driver.sendAndWait(plainHeader + frame(60))
        #expect(try wire.next() == plainHeader + frame(60))
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import Linux
import Synchronization
import TestSupport
import Testing
import Virtio

@testable import Devices

/// `mac-lock=on`: the guest has one address.
@Suite(.timed) struct NetworkLockTests {
    private static let own: [UInt8] = [0x52, 0x54, 0, 0, 0, 2]
    private static let foreign: [UInt8] = [0x52, 0x54, 0, 0, 0, 3]

    private func packet(from source: [UInt8], _ count: Int = 60) -> [UInt8] {
        var bytes = frame(count)
        bytes.replaceSubrange(6..<12, with: source)
        return bytes
    }

    /// With a TAP that takes headers and one that does not, wherever the chain is cut.
    @Test(arguments: [12, 0], [[], [12], [12, 14], [18], [20, 3, 1], Array(repeating: 1, count: 60)])
    func framesFromAnotherAddressAreDropped(headerSize: Int, cut: [Int]) throws {
        let (driver, wire) = try Wire.make(headerSize: headerSize, isAddressLocked: true)
        try driver.start()
        let header = headerSize == 0 ? [] : plainHeader
        for source in [
            Self.foreign, [0x53, 0x54, 0, 0, 0, 2], [0x52, 0x54, 0, 0, 0, 0x82], [0, 0, 0, 0, 0, 0],
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff], Array(Self.own.reversed()),
        ] {
            try driver.sendAndWait(plainHeader + packet(from: source), cut: cut)
        }
        try driver.sendAndWait(plainHeader + packet(from: Self.own), cut: cut)
        #expect(try wire.next() == header + packet(from: Self.own))
        #expect(!wire.isReadable)
        let counters = driver.device.counters
        #expect(counters.sendForeignSource.value == 6 && counters.sendDrops == 6 && counters.sentFrames == 1)
        #expect(counters.sentBytes == 60)
        #expect(
            driver.lines.all
                == ["warning: a frame of the guest was dropped: its source MAC is not the interface's (mac-lock=on)"])
    }

    /// The smallest frame, and the largest.
    @Test(arguments: [14, 15, 1514, 65554]) func framesOfAnyLengthGoOut(_ count: Int) throws {
        let (driver, wire) = try Wire.make(isAddressLocked: true)
        try driver.start()
        try driver.sendAndWait(plainHeader + packet(from: Self.own, count))
        #expect(try wire.next() == plainHeader + packet(from: Self.own, count))
    }

    /// As many descriptors as the queue has, and two more entries.
    @Test func aChainMayTakeTheWholeQueue() throws {
        let (driver, wire) = try Wire.make(isAddressLocked: true)
        try driver.start()
        try driver.sendAndWait(plainHeader + packet(from: Self.own, 1000), cut: Array(repeating: 3, count: 255))
        #expect(try wire.next() == plainHeader + packet(from: Self.own, 1000))
    }

    @Test func theDriverCannotChangeTheAddress() throws {
        let (driver, wire) = try Wire.make(isAddressLocked: true)
        try driver.start([.controlQueue, .controlMACAddress])
        #expect(try driver.command([1, 1] + Self.foreign) == 1)
        #expect(try driver.command([1, 1] + Self.own) == 0)
        // The configuration space is not written either.
        driver.transport.write(0x99, at: 0x105, size: 1)
        #expect((0..<6 as Range<UInt64>).map { UInt8(driver.configuration($0, 1)) } == Self.own)
        try driver.sendAndWait(plainHeader + packet(from: Self.foreign))
        try driver.sendAndWait(plainHeader + packet(from: Self.own))
        #expect(try wire.next() == plainHeader + packet(from: Self.own))
        #expect(driver.device.counters.sendForeignSource.value == 1)
    }

    /// Another CPU of the guest changes the address while frames are sent: what was checked is what goes out.
    @Test func theAddressCannotBeChangedAfterTheCheck() throws {
        let (driver, wire) = try Wire.make(isAddressLocked: true)
        try driver.start()
        let address = NetworkDriver.buffers + 0x20_0000
        let ram = driver.memory.ram
        let isDone = Atomic<Bool>(false)
        let changer = try Thread.start(name: "changer") {
            var source = Self.own
            while !isDone.load(ordering: .relaxed) {
                source[5] = source[5] == 2 ? 3 : 2
                try? ram.write(source, at: GuestAddress(address + 12 + 6))
            }
        }
        let result = Result {
            for _ in 0..<2000 {
                try driver.sendAndWait(plainHeader + packet(from: Self.own))
                while wire.isReadable { #expect(Array(try wire.next()[18..<24]) == Self.own) }
            }
        }
        isDone.store(true, ordering: .relaxed)
        changer.join()
        try result.get()
        let counters = driver.device.counters
        #expect(counters.sentFrames + counters.sendForeignSource.value == 2000 && counters.sentFrames > 0)
    }

    @Test func withoutTheLockAnyAddressGoesOut() throws {
        let (driver, wire) = try Wire.make()
        try driver.start()
        try driver.sendAndWait(plainHeader + packet(from: Self.foreign))
        #expect(try wire.next() == plainHeader + packet(from: Self.foreign))
    }
}

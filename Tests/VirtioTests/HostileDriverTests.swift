// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// A driver that breaks the rules of the rings. Each offence is named, and none reaches memory that is not the guest's.
@Suite(.timed) struct HostileDriverTests {
    private let guest: TestGuest
    private var driver: DriverQueue
    private let ends = TestGuest.lowSize

    init() throws {
        guest = try TestGuest()
        driver = DriverQueue(guest)
    }

    /// What the device says to the chain at descriptor 0.
    private mutating func verdict(_ features: FeatureSet = [.version1, .indirectDescriptors]) throws -> VirtqueueError?
    {
        var queue = try driver.device(features)
        try driver.setAvailableIndex(0)
        try driver.offer(0)
        return queue.popError()
    }

    // MARK: Chains

    @Test mutating func loops() throws {
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 0)
        #expect(try verdict() == .chainTooLong(head: 0, limit: 8))
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 5)
        try driver.describe(5, 0x8000, 0, flags: nextFlag, next: 0)
        #expect(try verdict() == .chainTooLong(head: 0, limit: 8))
        try driver.describe(0, 0x8000, 0, flags: nextFlag | writeFlag, next: 0)
        #expect(try verdict() == .chainTooLong(head: 0, limit: 8))
    }

    @Test mutating func aLoopInAnIndirectTable() throws {
        try driver.describe(0, 0x20000, 32, flags: indirectFlag)
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 1, table: 0x20000)
        try driver.describe(1, 0x8000, 1, flags: nextFlag, next: 0, table: 0x20000)
        #expect(try verdict() == .chainTooLong(head: 0, limit: 8))
    }

    @Test mutating func chainsLongerThanTheQueue() throws {
        // All eight descriptors are a chain; a ninth only fits into an indirect table.
        try driver.chain((0..<8).map { .read(0x8000 + $0 * 16, 16) })
        #expect(try verdict() == nil)
        for count in [8, 9, 200] {
            try driver.chain((0..<count).map { .read(0x8000 + UInt64($0) * 16, 16) }, table: 0x20000)
            try driver.describe(0, 0x20000, UInt32(count) * 16, flags: indirectFlag)
            #expect(try verdict() == (count > 8 ? .chainTooLong(head: 0, limit: 8) : nil))
        }
        // Seven direct ones and two in a table.
        try driver.chain((0..<7).map { .read(0x8000 + $0 * 16, 16) } + [.read(0, 0)])
        try driver.describe(7, 0x20000, 32, flags: indirectFlag)
        try driver.chain([.read(0x8000, 1), .read(0x8000, 1)], table: 0x20000)
        #expect(try verdict() == .chainTooLong(head: 0, limit: 8))
    }

    @Test mutating func aListShorterThanTheChain() throws {
        try driver.chain([.read(0x8000, 1), .read(0x8000, 1), .read(0x8000, 1)])
        var queue = try driver.device()
        try driver.offer(0)
        let pool = IOVectorPool(slots: 2, capacity: 2)
        #expect(throws: VirtqueueError.chainTooLong(head: 0, limit: 2)) { try queue.pop(into: pool[0]) }
        #expect(throws: VirtqueueError.chainTooLong(head: 0, limit: 0)) { try queue.pop(into: pool[0], from: 2) }
    }

    @Test mutating func indicesOutOfRange() throws {
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 8)
        #expect(try verdict() == .nextOutOfRange(8, tableSize: 8))
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: .max)
        #expect(try verdict() == .nextOutOfRange(.max, tableSize: 8))
        // Without NEXT the field means nothing.
        try driver.describe(0, 0x8000, 1, next: .max)
        #expect(try verdict() == nil)
        for head in [UInt16(8), 9, 0x8000, .max] {
            var queue = try driver.device()
            try driver.setAvailableIndex(0)
            try driver.offer(head)
            #expect(queue.popError() == .headOutOfRange(head, size: 8))
        }
    }

    @Test(
        "Addresses outside RAM",
        arguments: [
            (TestGuest.lowSize, UInt32(1)), (TestGuest.lowSize - 1, 2), (0, .max), (3 << 30, 1),
            (TestGuest.highStart - 1, 1),
            (TestGuest.highStart - 1, 2), (TestGuest.highStart + TestGuest.highSize, 1),
            (TestGuest.highStart + TestGuest.highSize - 1, 2), (UInt64.max, 1), (UInt64.max, 2), (UInt64.max - 15, 16),
            (UInt64.max - 15, 17), (UInt64.max - 15, .max), (1 << 63, 4096),
        ] as [(UInt64, UInt32)])
    mutating func addressesOutsideRAM(address: UInt64, length: UInt32) throws {
        for flags in [UInt16(0), writeFlag] {
            try driver.describe(0, address, length, flags: flags)
            #expect(try verdict() == .bufferOutsideRAM(GuestAddress(address), count: length))
            try driver.describe(0, 0x20000, 16, flags: indirectFlag)
            try driver.describe(0, address, length, flags: flags, table: 0x20000)
            #expect(try verdict() == .bufferOutsideRAM(GuestAddress(address), count: length))
        }
    }

    @Test mutating func aDescriptorAcrossTwoRegions() throws {
        // Regions that touch in guest memory and in host memory, and still are two.
        let memory = try GuestMemory(
            layout: [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)], backing: .anonymous, shared: false)
        var configuration = driver.configuration
        configuration.isReady = true
        var queue = try Virtqueue(configuration, features: .version1, ram: memory.ram)
        let table = configuration.descriptorTable
        try memory.ram.write(UInt64(0xfff8), at: table)
        try memory.ram.write(UInt32(16), at: table &+ 8)
        try memory.ram.write(UInt16(1), at: configuration.availableRing &+ 2)
        #expect(queue.popError() == .bufferOutsideRAM(GuestAddress(0xfff8), count: 16))
    }

    @Test mutating func writableBeforeReadable() throws {
        try driver.chain([.write(0x8000, 1), .read(0x8000, 1)])
        #expect(try verdict() == .readableAfterWritable(head: 0))
        try driver.chain([.read(0x8000, 1), .write(0x8000, 0), .read(0x8000, 0)])
        #expect(try verdict() == .readableAfterWritable(head: 0))
        try driver.describe(0, 0x8000, 1, flags: writeFlag | nextFlag, next: 1)
        try driver.describe(1, 0x20000, 16, flags: indirectFlag)
        try driver.chain([.read(0x8000, 1)], table: 0x20000)
        #expect(try verdict() == .readableAfterWritable(head: 0))
    }

    @Test mutating func zeroLengths() throws {
        // Legal, without a buffer, wherever the address points.
        try driver.chain([
            .read(.max, 0), .read(0x8000, 4), .read(0, 0), .write(3 << 30, 0), .write(0x9000, 1), .write(ends, 0),
        ])
        var queue = try driver.device()
        try driver.offer(0)
        try queue.popped {
            let chain = try #require($0)
            #expect(chain.entries == 2)
            #expect(chain.readable.lengths == [4])
            #expect(chain.writable.lengths == [1])
        }
        try driver.chain([.read(0, 0)])
        var empty = try driver.device()
        try empty.popped {
            var chain = try #require($0)
            #expect(chain.readable.isEmpty && chain.writable.isEmpty)
            #expect(chain.readable.load(UInt32.self) == nil)
            #expect(!chain.writable.store(UInt8(1)))
            #expect(chain.writable.removeLastByte() == nil)
        }
    }

    @Test mutating func moreThanFourGiBInAChain() throws {
        // Two buffers over all of a 3 GiB region; no page of it is touched.
        let memory = try GuestMemory(size: 3 << 30)
        var configuration = driver.configuration
        configuration.isReady = true
        var queue = try Virtqueue(configuration, features: .version1, ram: memory.ram)
        let table = configuration.descriptorTable
        for index in UInt64(0)..<2 {
            try memory.ram.write(UInt32(3 << 30), at: table &+ (index * 16 + 8))
            try memory.ram.write(nextFlag, at: table &+ (index * 16 + 12))
            try memory.ram.write(UInt16(index) + 1, at: table &+ (index * 16 + 14))
        }
        try memory.ram.write(UInt16(1), at: configuration.availableRing &+ 2)
        #expect(queue.popError() == .chainTooLarge(head: 0))
    }

    // MARK: Indirect tables

    @Test mutating func indirectTables() throws {
        try driver.chain([.read(0x8000, 16), .write(0x9000, 1)], table: 0x20000)
        try driver.describe(0, 0x20000, 32, flags: indirectFlag)
        #expect(try verdict() == nil)
        #expect(try verdict(.version1) == .indirectNotNegotiated(head: 0))
        // WRITE is to be ignored there (§2.7.5.3.2), and so is `next` without NEXT.
        try driver.describe(0, 0x20000, 32, flags: indirectFlag | writeFlag, next: .max)
        #expect(try verdict() == nil)
        // A table at an odd address is a table.
        try driver.chain([.read(0x8000, 16), .write(0x9000, 1)], table: 0x20001)
        try driver.describe(0, 0x20001, 32, flags: indirectFlag)
        #expect(try verdict() == nil)
    }

    @Test mutating func nestedTables() throws {
        try driver.describe(0, 0x20000, 32, flags: indirectFlag)
        try driver.describe(0, 0x20000, 32, flags: indirectFlag, table: 0x20000)
        #expect(try verdict() == .indirectNested(head: 0))
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 1, table: 0x20000)
        try driver.describe(1, 0x30000, 16, flags: indirectFlag, table: 0x20000)
        #expect(try verdict() == .indirectNested(head: 0))
    }

    @Test mutating func indirectAndNext() throws {
        try driver.describe(0, 0x20000, 32, flags: indirectFlag | nextFlag, next: 1)
        #expect(try verdict() == .indirectWithNext(head: 0))
    }

    @Test("Lengths of indirect tables", arguments: [UInt32(0), 1, 8, 15, 17, 31, 40, 16 * 32769, .max, .max - 15])
    mutating func lengthsOfTables(length: UInt32) throws {
        try driver.describe(0, 0, length, flags: indirectFlag)
        #expect(try verdict() == .indirectTableLength(length))
    }

    @Test(
        "Indirect tables outside RAM",
        arguments: [
            TestGuest.lowSize, TestGuest.lowSize - 16, 3 << 30, TestGuest.highStart - 16,
            TestGuest.highStart + TestGuest.highSize - 31,
            UInt64.max, UInt64.max - 31, UInt64.max - 15,
        ])
    mutating func tablesOutsideRAM(address: UInt64) throws {
        try driver.describe(0, address, 32, flags: indirectFlag)
        #expect(try verdict() == .indirectTableOutsideRAM(GuestAddress(address), count: 32))
    }

    @Test mutating func aLargeTableWithAShortChain() throws {
        try driver.chain([.read(0x8000, 16)], table: 0x20000)
        try driver.describe(0, 0x20000, 16 * 32768, flags: indirectFlag)
        #expect(try verdict() == nil)
        // The table's size bounds its own indices, not the queue's.
        try driver.describe(0, 0x20000, 32, flags: indirectFlag)
        try driver.describe(0, 0x8000, 1, flags: nextFlag, next: 2, table: 0x20000)
        #expect(try verdict() == .nextOutOfRange(2, tableSize: 2))
    }

    // MARK: Rings

    @Test("An available index that jumps", arguments: [UInt16(9), 10, 0x7fff, 0x8000, .max])
    mutating func availableIndexJumps(index: UInt16) throws {
        var queue = try driver.device()
        try driver.setAvailableIndex(index)
        #expect(queue.popError() == .availableIndexJumped(from: 0, to: index, size: 8))
        #expect(queue.enableNotifications() == true, "the device would sleep over it")
    }

    @Test mutating func availableIndexGoesBackwards() throws {
        try driver.chain([.read(0x8000, 1)])
        var queue = try driver.device()
        try driver.offer(0, 0)
        #expect(queue.popError() == nil)
        #expect(queue.popError() == nil)
        try driver.setAvailableIndex(1)
        #expect(queue.popError() == .availableIndexJumped(from: 2, to: 1, size: 8))
    }

    @Test mutating func aHeadOfferedWithoutEnd() throws {
        try driver.chain([.read(0x8000, 1)])
        var queue = try driver.device()
        for _ in 0..<8 {
            try driver.offer(0)
            #expect(queue.popError() == nil)
        }
        try driver.offer(0)
        #expect(queue.popError() == .tooManyInFlight(size: 8))
    }

    @Test("Sizes of queues", arguments: [UInt32(0), 3, 5, 12, 16, 32768, 65536, 65544, .max])
    mutating func sizesOfQueues(size: UInt32) {
        driver.configuration.size = size
        #expect(driver.setupError == VirtqueueError.invalidSize(size, maximum: 8))
    }

    @Test mutating func ringsThatAreMisaligned() {
        for offset in [UInt64(1), 2, 4, 8] {
            var other = driver
            other.configuration.descriptorTable = driver.configuration.descriptorTable &+ offset
            #expect(
                other.setupError
                    == VirtqueueError.ringMisaligned(
                        .descriptorTable, other.configuration.descriptorTable, alignment: 16))
        }
        driver.configuration.availableRing = GuestAddress(0x2001)
        #expect(driver.setupError == VirtqueueError.ringMisaligned(.availableRing, GuestAddress(0x2001), alignment: 2))
        driver.configuration.availableRing = GuestAddress(0x2002)
        driver.configuration.usedRing = GuestAddress(0x3002)
        #expect(driver.setupError == VirtqueueError.ringMisaligned(.usedRing, GuestAddress(0x3002), alignment: 4))
    }

    @Test(
        "Rings outside RAM",
        arguments: [
            TestGuest.lowSize, TestGuest.lowSize - 16, 3 << 30, TestGuest.highStart - 16,
            TestGuest.highStart + TestGuest.highSize - 16,
            UInt64.max - 15, 1 << 63,
        ])
    mutating func ringsOutsideRAM(address: UInt64) {
        let good = driver.configuration
        for (part, path, count) in [
            (VirtqueueError.RingPart.descriptorTable, \QueueConfiguration.descriptorTable, UInt64(128)),
            (.availableRing, \.availableRing, 22), (.usedRing, \.usedRing, 70),
        ] {
            driver.configuration = good
            driver.configuration[keyPath: path] = GuestAddress(address)
            #expect(driver.setupError == VirtqueueError.ringOutsideRAM(part, GuestAddress(address), count: count))
        }
    }

    @Test mutating func ringsOverEachOtherHarmOnlyTheGuest() throws {
        driver.configuration.availableRing = driver.configuration.descriptorTable
        driver.configuration.usedRing = driver.configuration.descriptorTable
        var queue = try driver.device([.version1, .eventIndex, .indirectDescriptors])
        for index in UInt16(0)..<64 {
            try driver.setAvailableIndex(index)
            if queue.popError() == nil { queue.push(index % 8, written: .max) }
            _ = queue.publish()
            _ = queue.enableNotifications()
        }
    }

    @Test func everyErrorSaysWhatIsWrong() {
        let errors: [VirtqueueError] = [
            .invalidSize(3, maximum: 8), .ringMisaligned(.usedRing, GuestAddress(2), alignment: 4),
            .ringOutsideRAM(.availableRing, GuestAddress(2), count: 3), .availableIndexJumped(from: 1, to: 2, size: 3),
            .tooManyInFlight(size: 4), .headOutOfRange(9, size: 8), .nextOutOfRange(9, tableSize: 8),
            .chainTooLong(head: 1, limit: 8), .chainTooLarge(head: 1), .bufferOutsideRAM(GuestAddress(2), count: 1),
            .readableAfterWritable(head: 1), .indirectNotNegotiated(head: 1), .indirectNested(head: 1),
            .indirectWithNext(head: 1), .indirectTableLength(1), .indirectTableOutsideRAM(GuestAddress(2), count: 1),
        ]
        #expect(Set(errors.map(\.description)).count == errors.count)
        #expect(errors.map(\.description).contains("the used ring at 0x2 is not aligned to 4 bytes"))
    }
}

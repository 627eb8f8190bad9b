// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// Packed virtqueues (virtio 1.2 §2.8): drivers that keep the rules and drivers that break them.
@Suite(.timed) struct PackedVirtqueueTests {
    private static let plain: FeatureSet = [.version1, .packedRing]
    private static let events: FeatureSet = [.version1, .packedRing, .eventIndex]
    private static let indirect: FeatureSet = [.version1, .packedRing, .indirectDescriptors]

    private let guest: TestGuest

    init() throws { guest = try TestGuest() }

    // MARK: Chains there and back

    @Test func requestsComeInOrderAndGoBackInAny() throws {
        var driver = try PackedDriverQueue(guest), queue = try driver.device()
        #expect(try queue.popped { $0 == nil })
        try driver.offer([.read(0x8000, 16), .write(0x9000, 512), .write(TestGuest.highStart, 1)], id: 0xfedc)
        try driver.offer([.write(0xa000, 64)], id: 7)
        #expect(try queue.hasAvailable() == true)
        let first = try queue.popped { popped in
            let chain = try #require(popped)
            #expect(chain.readable.lengths == [16] && chain.readable.byteCount == 16)
            #expect(chain.writable.lengths == [512, 1] && chain.writable.byteCount == 513)
            return chain.head
        }
        let second = try queue.popped { popped in
            #expect(popped?.writable.lengths == [64])
            return try #require(popped).head
        }
        #expect(try queue.popped { $0 == nil })
        #expect(queue.inFlight == 2 && first != second)

        queue.push(second, written: 64)
        queue.push(first, written: 0)
        #expect(try driver.takeUsed() == nil, "shown before publish")
        #expect(queue.publish() == true)
        #expect(queue.inFlight == 0)
        let used = [try driver.mustHaveUsed(), try driver.mustHaveUsed()]
        #expect(used.map(\.id) == [7, 0xfedc])
        #expect(used.map(\.written) == [64, nil], "nothing written: no WRITE flag")
        #expect(try driver.takeUsed() == nil)
        #expect(queue.publish() == false, "nothing new, so no interrupt")
    }

    /// Sizes need not be powers of two, and chains go around the end of the ring, available and used.
    @Test("Many laps", arguments: [UInt16(1), 2, 3, 7, 8], [plain, events])
    func manyLaps(size: UInt16, features: FeatureSet) throws {
        var driver = try PackedDriverQueue(guest, size: size), queue = try driver.device(features)
        var random = SeededGenerator(seed: UInt64(size))
        let pool = IOVectorPool(slots: 1, capacity: Int(size))
        var free = size, nextID: UInt16 = 0, offered: [(id: UInt16, length: UInt16)] = []
        var held: [(head: UInt16, id: UInt16, length: UInt16)] = [], returned: [(id: UInt16, length: UInt16)] = []
        for _ in 0..<20_000 {
            switch random.below(4) {
            case 0 where free > 0:
                let length = UInt16(random.below(UInt64(free))) + 1
                try driver.offer(
                    (0..<length).map { .write(0x8000 + UInt64($0) * 16, UInt32(nextID) % 500 + 1) }, id: nextID)
                offered.append((nextID, length))
                (free, nextID) = (free - length, nextID &+ 1)
            case 1:
                guard let chain = try queue.pop(into: pool[0]) else { #expect(offered.isEmpty); continue }
                let expected = offered.removeFirst()
                #expect(chain.entries == Int(expected.length))
                #expect(chain.writable.byteCount == UInt64(expected.length) * (UInt64(expected.id) % 500 + 1))
                held.append((chain.head, expected.id, expected.length))
            case 2 where !held.isEmpty:
                let chain = held.remove(at: Int(random.below(UInt64(held.count))))
                queue.push(chain.head, written: UInt32(chain.id) + 1)
                returned.append((chain.id, chain.length))
            case 3:
                #expect(queue.publish() == !returned.isEmpty)
                for expected in returned {
                    let used = try driver.mustHaveUsed()
                    #expect(used.id == expected.id && used.written == UInt32(expected.id) + 1)
                    free += expected.length
                }
                #expect(try driver.takeUsed() == nil)
                returned.removeAll()
            default: break
            }
        }
        #expect(nextID > 500)
        #expect(Int(queue.inFlight) == held.count)
    }

    @Test func rewindGivesChainsBack() throws {
        var driver = try PackedDriverQueue(guest, size: 4), queue = try driver.device()
        // From the second lap on, too.
        for lap in 0..<5 {
            for id in UInt16(0)..<3 { try driver.offer([.write(0xa000, UInt32(id) + 1)], id: id) }
            var heads: [UInt16] = []
            for bytes in UInt64(1)...2 {
                try queue.popped { chain in
                    #expect(chain?.writable.byteCount == bytes, "lap \(lap)")
                    heads.append(try #require(chain).head)
                }
            }
            queue.rewind(1)
            try queue.popped { #expect($0?.writable.byteCount == 2) }
            queue.rewind(2)
            #expect(queue.inFlight == 0)
            queue.rewind(100)
            for bytes in UInt64(1)...3 {
                let head = try queue.popped { chain in
                    #expect(chain?.writable.byteCount == bytes)
                    return try #require(chain).head
                }
                queue.push(head, written: UInt32(bytes))
            }
            #expect(try queue.popped { $0 == nil })
            #expect(queue.publish() == true)
            for id in UInt16(0)..<3 { #expect(try driver.mustHaveUsed().id == id) }
        }
    }

    @Test func indirectTables() throws {
        var driver = try PackedDriverQueue(guest, size: 2), queue = try driver.device(Self.indirect)
        for id in UInt16(0)..<5 {
            try driver.offerIndirect([.read(0x8000, 16), .write(0x9000, 512)], table: 0x20000, id: id)
            let head = try queue.popped { popped in
                let chain = try #require(popped)
                #expect(chain.readable.lengths == [16] && chain.writable.lengths == [512])
                return chain.head
            }
            queue.push(head, written: 5)
            #expect(queue.publish() == true)
            let used = try driver.mustHaveUsed()
            #expect(used.id == id && used.written == 5)
        }
    }

    // MARK: Interrupts and kicks

    @Test func interruptsFollowTheDriversFlags() throws {
        var driver = try PackedDriverQueue(guest), queue = try driver.device()
        // DESC means nothing without EVENT_IDX, and 3 is reserved: better one interrupt too many.
        for flags in [UInt16(0), 1, 0, 2, 3] {
            try driver.setDriverEvents(place: 5, flags: flags)
            try driver.offer([.write(0xa000, 64)], id: 0)
            try queue.complete()
            #expect(queue.publish() == (flags != 1))
            _ = try driver.takeUsed()
        }
    }

    /// The driver names a place; a batch that reaches it interrupts, on both laps and around the end of the ring.
    @Test("Interrupt at the place that the driver names", arguments: UInt16(0)..<10)
    func interruptsAtAPlace(start: UInt16) throws {
        let size: UInt16 = 5
        for batch in 1...size {
            for wanted in 0..<2 * size {
                var driver = try PackedDriverQueue(guest, size: size), queue = try driver.device(Self.events)
                try driver.setDriverEvents(flags: 1)
                for _ in 0..<start {
                    try driver.offer([.write(0xa000, 64)], id: 0)
                    try queue.complete()
                    #expect(queue.publish() == false)
                    _ = try driver.takeUsed()
                }
                // The driver waits for the descriptor that is `wanted` places after the next used one.
                let lap = (start + wanted) % (2 * size)
                let place = lap < size ? lap | 0x8000 : lap - size
                try driver.setDriverEvents(place: place, flags: 2)
                for id in 0..<batch { try driver.offer([.write(0xa000, 64)], id: id) }
                for _ in 0..<batch { try queue.complete() }
                #expect(queue.publish() == (wanted < batch), "from \(start), batch \(batch), waiting for \(wanted)")
            }
        }
        // A place that is none.
        var driver = try PackedDriverQueue(guest, size: size), queue = try driver.device(Self.events)
        try driver.setDriverEvents(place: size, flags: 2)
        try driver.offer([.write(0xa000, 64)], id: 0)
        try queue.complete()
        #expect(queue.publish() == true)
    }

    @Test func kicksAreAskedForByTheDevicesFlags() throws {
        try guest.ram.write(UInt32.max, at: GuestAddress(0x1000 + 8 * 16 + 4))
        var driver = try PackedDriverQueue(guest), queue = try driver.device()
        #expect(try driver.deviceEvents() == (0, 0), "kicks are wanted until the device says otherwise")
        queue.disableNotifications()
        #expect(try driver.deviceEvents().flags == 1)
        #expect(queue.enableNotifications() == false)
        #expect(try driver.deviceEvents().flags == 0)
        // A chain that came while no kick was wanted is not forgotten.
        queue.disableNotifications()
        try driver.offer([.write(0xa000, 64)], id: 0)
        #expect(queue.enableNotifications() == true)
        try queue.popped { #expect($0 != nil) }
        #expect(queue.enableNotifications() == false)
    }

    @Test func eventIndexAsksForTheKickOfTheNextPlace() throws {
        var driver = try PackedDriverQueue(guest, size: 3), queue = try driver.device(Self.events)
        for _ in 0..<10 {
            queue.disableNotifications()
            #expect(queue.enableNotifications() == false)
            #expect(try driver.deviceEvents() == (driver.availableEvent, 2))
            try driver.offer([.write(0xa000, 64)], id: 0)
            try queue.complete()
            #expect(queue.publish() == true)
            _ = try driver.takeUsed()
        }
    }

    // MARK: Drivers that break the rules

    /// What the device says to descriptors, with their AVAIL flags as in the first lap.
    private func verdict(
        _ descriptors: [(address: UInt64, length: UInt32, flags: UInt16)], size: UInt16 = 8,
        _ features: FeatureSet = indirect
    ) throws -> VirtqueueError? {
        let driver = try PackedDriverQueue(guest, size: size)
        for (index, (address, length, flags)) in descriptors.enumerated() {
            try driver.describe(UInt16(index), address, length, flags: flags | PackedDriverQueue.available(true))
        }
        var queue = try driver.device(features)
        return queue.popError()
    }

    @Test func chainsLongerThanTheRing() throws {
        let linked = (address: UInt64(0x8000), length: UInt32(1), flags: nextFlag)
        for size in UInt16(1)...8 {
            #expect(
                try verdict(Array(repeating: linked, count: Int(size)), size: size)
                    == .chainTooLong(head: 0, limit: Int(size)))
        }
        var driver = try PackedDriverQueue(guest, size: 4)
        try driver.offerIndirect((0..<5).map { .read(0x8000 + $0, 1) }, table: 0x20000, id: 0)
        var queue = try driver.device(Self.indirect)
        #expect(queue.popError() == .chainTooLong(head: 0, limit: 4))
    }

    @Test func wrongChains() throws {
        #expect(try verdict([(0x8000, 1, writeFlag | nextFlag), (0x8000, 1, 0)]) == .readableAfterWritable(head: 0))
        let outside = VirtqueueError.bufferOutsideRAM(GuestAddress(3 << 30), count: 1)
        #expect(try verdict([(3 << 30, 1, 0)]) == outside)
        #expect(
            try verdict(Array(repeating: (0, UInt32(1) << 20, nextFlag), count: 7) + [(0, 1 << 20, 0)]) == nil)
        #expect(try verdict([(0x20000, 16, indirectFlag)], Self.plain) == .indirectNotNegotiated(head: 0))
        #expect(try verdict([(0x20000, 16, indirectFlag | nextFlag)]) == .indirectWithNext(head: 0))
        #expect(
            try verdict([(0x8000, 1, nextFlag), (0x20000, 16, indirectFlag)]) == .indirectWithNext(head: 0))
        #expect(try verdict([(0x20000, 24, indirectFlag)]) == .indirectTableLength(24))
        #expect(try verdict([(0x20000, 0, indirectFlag)]) == .indirectTableLength(0))
        #expect(
            try verdict([(3 << 30, 16, indirectFlag)]) == .indirectTableOutsideRAM(GuestAddress(3 << 30), count: 16))
        try guest.ram.write(indirectFlag, at: GuestAddress(0x20000 + 14))
        #expect(try verdict([(0x20000, 16, indirectFlag)]) == .indirectNested(head: 0))
    }

    /// Descriptors that are in flight, made available for the next lap.
    @Test func descriptorsInFlightMadeAvailableAgain() throws {
        let driver = try PackedDriverQueue(guest, size: 4)
        for index in UInt16(0)..<4 {
            try driver.describe(index, 0x8000, 1, flags: PackedDriverQueue.available(true))
        }
        var queue = try driver.device()
        for _ in 0..<4 { #expect(queue.popError() == nil) }
        #expect(queue.popError() == nil, "the ring is full")
        #expect(queue.inFlight == 4)
        try driver.describe(0, 0x8000, 1, flags: PackedDriverQueue.available(false))
        #expect(queue.popError() == .tooManyInFlight(size: 4))

        // Three are free, and a chain of four is said to begin at the first of them.
        queue = try driver.device()
        for index in UInt16(0)..<4 {
            try driver.describe(index, 0x8000, 1, flags: PackedDriverQueue.available(true))
        }
        #expect(queue.popError() == nil)
        for index in UInt16(1)..<4 {
            try driver.describe(index, 0x8000, 1, flags: nextFlag | PackedDriverQueue.available(true))
        }
        #expect(queue.popError() == .tooManyInFlight(size: 4))
    }

    /// One ID for chains in flight is the driver's own loss: it cannot tell them apart, and the device does not care.
    @Test func oneIDTwice() throws {
        var driver = try PackedDriverQueue(guest), queue = try driver.device()
        try driver.offer([.write(0x8000, 1)], id: 3)
        try driver.offer([.write(0x8000, 1), .write(0x8000, 1)], id: 3)
        for _ in 0..<2 { try queue.complete() }
        #expect(queue.publish() == true)
        #expect(queue.inFlight == 0)
        #expect(try driver.mustHaveUsed().id == 3)
    }

    @Test func ringsInWrongPlaces() throws {
        let good = try PackedDriverQueue(guest).configuration
        func error(_ change: (inout QueueConfiguration) -> Void) -> VirtqueueError? {
            var configuration = good
            change(&configuration)
            do throws(VirtqueueError) { try configuration.validate(Self.plain, in: guest.ram) } catch { return error }
            return nil
        }
        let odd = GuestAddress(0x1002), far = GuestAddress(3 << 30)
        #expect(error { _ in } == nil)
        #expect(error { $0.size = 7 } == nil)
        #expect(error { $0.size = 0 } == .invalidSize(0, maximum: 8))
        #expect(error { $0.size = 9 } == .invalidSize(9, maximum: 8))
        #expect(error { $0.descriptorTable = odd } == .ringMisaligned(.descriptorRing, odd, alignment: 16))
        #expect(error { $0.availableRing = odd } == .ringMisaligned(.driverEvents, odd, alignment: 4))
        #expect(error { $0.usedRing = odd } == .ringMisaligned(.deviceEvents, odd, alignment: 4))
        #expect(error { $0.descriptorTable = far } == .ringOutsideRAM(.descriptorRing, far, count: 128))
        #expect(error { $0.availableRing = far } == .ringOutsideRAM(.driverEvents, far, count: 4))
        #expect(error { $0.usedRing = far } == .ringOutsideRAM(.deviceEvents, far, count: 4))
        // The last four bytes of RAM will do.
        #expect(error { $0.usedRing = GuestAddress(TestGuest.lowSize - 4) } == nil)
    }

    /// What a random driver does may be refused, but nothing is taken twice, and no buffer is outside RAM.
    @Test("Random rings", arguments: [UInt64(1), 2, 3, 4])
    func randomRings(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        var chains = 0, errors = 0
        for _ in 0..<1_000 {
            let size = UInt16(random.below(9)) + 1
            let driver = try PackedDriverQueue(guest, size: size)
            var queue = try driver.device([Self.plain, Self.events, Self.indirect][Int(random.below(3))])
            let pool = IOVectorPool(slots: 1, capacity: Int(size))
            var held: Set<UInt16> = []
            do throws(VirtqueueError) {
                for _ in 0..<40 {
                    let address = random.chance(90) ? random.below(TestGuest.lowSize - 600) : random.next()
                    let flags =
                        (random.chance(70) ? PackedDriverQueue.available(random.chance(60)) : 0)
                        | (random.chance(30) ? nextFlag : 0) | (random.chance(70) ? writeFlag : 0)
                        | (random.chance(10) ? indirectFlag : 0)
                    do {
                        try driver.describe(
                            UInt16(random.below(UInt64(size))), address, UInt32(random.below(40)) * 16,
                            id: UInt16(random.below(4)), flags: flags)
                        try driver.setDriverEvents(
                            place: UInt16(truncatingIfNeeded: random.next()), flags: UInt16(random.below(4)))
                    } catch { Issue.record(error) }
                    if let chain = try queue.pop(into: pool[0]) {
                        chains += 1
                        #expect(chain.head < size && held.insert(chain.head).inserted)
                        #expect(chain.entries <= Int(size))
                        chain.writable.fill(count: Int(random.below(600)), with: 0x5a)
                        if random.chance(20) {
                            queue.rewind()
                            held.remove(chain.head)
                        }
                    }
                    if random.chance(50), let head = held.randomElement(using: &random) {
                        queue.push(head, written: UInt32(random.below(100)))
                        held.remove(head)
                    }
                    if random.chance(50) { _ = queue.publish() }
                    if random.chance(50) { _ = queue.enableNotifications() }
                    #expect(Int(queue.inFlight) == held.count)
                }
            } catch {
                errors += 1
                #expect(!error.description.isEmpty)
            }
        }
        // Both outcomes are exercised, not one of them by accident.
        #expect(chains > 1_000 && errors > 200, "\(chains) chains, \(errors) errors")
    }
}

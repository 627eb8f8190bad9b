// SPDX-License-Identifier: Apache-2.0

import Glibc
import GuestMemory
import Linux
import Synchronization
import TestSupport
import Testing
@testable import Virtio

/// A guest that works against a device from several CPUs at once: one drives it with requests that are mostly well
/// formed, one rewrites rings, descriptors and headers under the device's eyes, and one uses the registers of a device
/// that another drives. All of them are random, from one seed.
///
/// `SWKVM_HOSTILE_ROUNDS=N` makes it longer: N rounds from the device's reset to the next; `SWKVM_HOSTILE_SEED=N`
/// repeats a run as far as threads do.
final class HostileGuest: Sendable {
    let transport: MMIOTransport
    let ram: GuestRAM
    /// How many descriptors the queues have.
    private let sizes: [UInt16]
    /// What may be negotiated.
    private let features: FeatureSet
    /// How a request of a queue begins, by the device's section of the specification; empty where the driver only gives
    /// memory.
    private let header: @Sendable (_ queue: Int, inout SeededGenerator) -> [UInt8]
    let seed: UInt64
    private let isOver = Atomic<Bool>(false)

    // A queue's rings are where ``QueueDriver`` has them. Behind them are indirect tables, headers and data.
    private static let ringSpan: UInt64 = 0x1000
    private static let tables: Range<UInt64> = 0x8_0000..<0x9_0000
    private static let headers: Range<UInt64> = 0xa_0000..<0xb_0000
    private static let data: Range<UInt64> = 0x10_0000..<0x20_0000

    init(
        _ transport: MMIOTransport, ram: GuestRAM, sizes: [UInt16], features: FeatureSet,
        header: @escaping @Sendable (_ queue: Int, inout SeededGenerator) -> [UInt8]
    ) {
        (self.transport, self.ram, self.sizes, self.features, self.header) = (transport, ram, sizes, features, header)
        seed = Self.environment("SWKVM_HOSTILE_SEED") ?? UInt64.random(in: 0..<1 << 32)
    }

    private static func environment(_ name: String) -> UInt64? {
        unsafe getenv(name).flatMap { unsafe UInt64(String(cString: $0)) }
    }

    /// Does its worst, while `bystander` is called again and again on a thread of its own; then the device is as the
    /// last round has left it.
    /// - Parameters:
    ///   - rounds: if the environment says nothing else; more until each of `served` and the broken rules are more than
    ///     none.
    ///   - served: what the device has done so far, of each kind.
    func attack(
        rounds: Int, served: () -> [UInt64], bystander: @escaping @Sendable (inout SeededGenerator) -> Void = { _ in }
    ) throws {
        let rounds = Self.environment("SWKVM_HOSTILE_ROUNDS").map(Int.init) ?? rounds
        print("hostile guest: \(rounds) rounds, SWKVM_HOSTILE_SEED=\(seed)")
        var random = SeededGenerator(seed: seed)
        let vandal = try start("vandal", seed: random.next()) { self.vandalize(&$0) }
        let neighbour = try start("neighbour", seed: random.next()) { self.useRegisters(&$0) }
        let other = try start("bystander", seed: random.next(), bystander)
        var round = 0
        while round < rounds
            || (served() + [transport.function.counters.errors.value]).contains(0) && round < 100 * rounds
        {
            drive(&random, served: served)
            round += 1
        }
        isOver.store(true, ordering: .relaxed)
        vandal.join()
        neighbour.join()
        other.join()
    }

    /// A thread that does the same until all is over.
    private func start(
        _ name: String, seed: UInt64, _ body: @escaping @Sendable (inout SeededGenerator) -> Void
    ) throws -> Linux.Thread {
        try .start(name: name, stackSize: 1 << 20) {
            var random = SeededGenerator(seed: seed)
            while !self.isOver.load(ordering: .relaxed) {
                for _ in 0..<1 + random.below(64) { body(&random) }
                Linux.Thread.yield()
            }
        }
    }

    private func write(_ value: UInt32, _ register: UInt64) { transport.write(UInt64(value), at: register, size: 4) }

    // MARK: The driver

    /// From one reset to before the next.
    private func drive(_ random: inout SeededGenerator, served: () -> [UInt64]) {
        let before = served()
        for status: UInt32 in [0, 1, 3] { write(status, 0x070) }
        let wanted =
            random.chance(30)
            ? features.intersection(FeatureSet(rawValue: UInt128(random.next()))).union(.version1)
            : features.union(.version1)
        for word in 0..<FeatureSet.words {
            write(word, 0x024)
            write(wanted[word: word], 0x020)
        }
        write(11, 0x070)
        for queue in sizes.indices { setUp(queue, &random) }
        write(15, 0x070)
        var indices = [UInt16](repeating: 0, count: sizes.count)
        for _ in 0..<40 {
            let queue = Int(random.below(UInt64(sizes.count)))
            for _ in 0..<random.below(8) {
                offer(queue, at: indices[queue], &random)
                indices[queue] &+= 1
            }
            write(UInt32(queue), 0x050)
            if random.chance(5) {
                write(UInt32(queue), 0x030)
                write(1, random.chance(50) ? 0x0c0 : 0x044)
                setUp(queue, &random)
                indices[queue] = 0
            }
            for _ in 0..<random.below(8) { Linux.Thread.yield() }
        }
        // The device's threads get a chance where others have the CPUs.
        for _ in 0..<200 where served() == before && transport.read(at: 0x070, size: 4) & 64 == 0 { usleep(100) }
    }

    /// Empty rings for a queue, mostly in their place.
    private func setUp(_ queue: Int, _ random: inout SeededGenerator) {
        for ring in [QueueDriver.table, QueueDriver.available, QueueDriver.used] {
            try? ram.fill(at: ring &+ UInt64(queue) * Self.ringSpan, count: Self.ringSpan)
        }
        write(UInt32(queue), 0x030)
        write(random.chance(95) ? UInt32(sizes[queue]) : UInt32(truncatingIfNeeded: random.below(300)), 0x038)
        for (register, ring) in [
            (0x080 as UInt64, QueueDriver.table), (0x090, QueueDriver.available), (0x0a0, QueueDriver.used),
        ] {
            let place = random.chance(98) ? ring.rawValue + UInt64(queue) * Self.ringSpan : address(&random)
            write(UInt32(truncatingIfNeeded: place), register)
            write(UInt32(truncatingIfNeeded: place >> 32), register + 4)
        }
        write(1, 0x044)
    }

    /// A chain of a header, data and a byte for the status, as both kinds of devices have requests, at a head of its
    /// own. A header that is longer or shorter than others has its data with it; without one the chain is a buffer for
    /// the device to fill.
    private func offer(_ queue: Int, at index: UInt16, _ random: inout SeededGenerator) {
        let size = sizes[queue], head = index &* 3 % size
        let bytes = header(queue, &random)
        let place = Self.headers.lowerBound + UInt64(head) * 64 + UInt64(queue) * 0x4000
        let data = Self.data.lowerBound + random.below(128) * 0x1000, length: UInt32 = 512 << UInt32(random.below(4))
        if bytes.isEmpty {
            describe(queue, head, data, length, flags: 2)
        } else {
            try? ram.write(bytes, at: GuestAddress(place))
            describe(queue, head, place, UInt32(bytes.count), flags: 1)
            var next = head
            if 12...16 ~= bytes.count {
                next = (next + 1) % size
                describe(queue, next, data, length, flags: random.chance(50) ? 3 : 1)
            }
            describe(queue, (next + 1) % size, place + 48, 1, flags: 2)
        }
        let ring = QueueDriver.available &+ UInt64(queue) * Self.ringSpan
        try? ram.write(head, at: ring &+ (4 + 2 * UInt64(index % size)))
        try? ram.write(index &+ 1, at: ring &+ 2)
    }

    /// Writes one descriptor, which goes on with the one behind it.
    private func describe(_ queue: Int, _ index: UInt16, _ address: UInt64, _ length: UInt32, flags: UInt16) {
        let entry = QueueDriver.table &+ (UInt64(queue) * Self.ringSpan + UInt64(index) * 16)
        try? ram.write(address, at: entry)
        try? ram.write(length, at: entry &+ 8)
        try? ram.write(flags, at: entry &+ 12)
        try? ram.write((index + 1) % sizes[queue], at: entry &+ 14)
    }

    // MARK: The others

    /// Changes one thing in memory.
    private func vandalize(_ random: inout SeededGenerator) {
        let queue = Int(random.below(UInt64(sizes.count))), size = UInt64(sizes[queue]),
            offset = UInt64(queue) * Self.ringSpan
        switch random.below(20) {
        case 0..<8: descriptor(at: (QueueDriver.table &+ (offset + random.below(size) * 16)).rawValue, size, &random)
        case 8..<11: descriptor(at: Self.tables.lowerBound + random.below(0x800) * 16, size, &random)
        case 11..<14:
            let place = Self.headers.lowerBound + UInt64(queue) * 0x4000 + random.below(size) * 64
            try? ram.write(header(queue, &random), at: GuestAddress(place))
        case 14, 15:
            try? ram.write(
                UInt16(random.below(size + (random.chance(2) ? 2 : 0))),
                at: QueueDriver.available &+ (offset + 4 + 2 * random.below(size)))
        case 16:
            // The indices: a device that sees a wrong one stops, so they are seldom far off.
            guard random.chance(10) else { return }
            let place = QueueDriver.available &+ (offset + 2)
            let index = (try? ram.readUInt16(at: place)) ?? 0
            try? ram.write(
                index &+ UInt16(truncatingIfNeeded: random.chance(80) ? random.below(4) : random.next()), at: place)
        case 17:
            try? ram.write(
                UInt16(truncatingIfNeeded: random.next()),
                at: QueueDriver.available &+ (offset + (random.chance(50) ? 0 : 4 + 2 * size)))
        case 18:
            try? ram.write(
                UInt32(truncatingIfNeeded: random.next()),
                at: QueueDriver.used &+ (offset + random.below(1 + 2 * size) * 4))
        default:
            try? ram.write(
                random.next() >> random.below(64), at: GuestAddress(Self.data.lowerBound + random.below(0x2_0000) * 8))
        }
    }

    private func descriptor(at place: UInt64, _ size: UInt64, _ random: inout SeededGenerator) {
        // One of its fields, or all.
        let field = random.below(6), place = GuestAddress(place)
        if field > 3 || field == 0 { try? ram.write(address(&random), at: place) }
        if field > 3 || field == 1 { try? ram.write(length(&random), at: place &+ 8) }
        if field > 3 || field == 2 {
            let flags: UInt16 = (random.chance(60) ? 1 : 0) | (random.chance(50) ? 2 : 0) | (random.chance(15) ? 4 : 0)
            try? ram.write(random.chance(98) ? flags : UInt16(truncatingIfNeeded: random.next()), at: place &+ 12)
        }
        if field > 3 || field == 3 { try? ram.write(UInt16(random.below(size + 1)), at: place &+ 14) }
    }

    /// Mostly data, headers and tables; also the rings themselves, the edges of RAM, and nothing.
    private func address(_ random: inout SeededGenerator) -> UInt64 {
        switch random.below(20) {
        case 0..<10: Self.data.lowerBound + random.below(0x10_0000)
        case 10..<14: Self.headers.lowerBound + random.below(0x400) * 64
        case 14, 15: Self.tables.lowerBound + random.below(0x1000) * 16
        case 16, 17: 0x1_0000 + random.below(0x3_0000)
        case 18: (16 << 20) &- 64 &+ random.below(128)
        default: random.next() >> random.below(40)
        }
    }

    private func length(_ random: inout SeededGenerator) -> UInt32 {
        switch random.below(10) {
        case 0..<4: 16 << UInt32(random.below(9))
        case 4..<8: UInt32(random.below(0x2000))
        case 8: 1
        default: random.chance(10) ? UInt32(truncatingIfNeeded: random.next()) : UInt32(random.below(0x2_0000))
        }
    }

    /// Another CPU at the registers: it looks at all of them, acknowledges, kicks, and now and then changes what it
    /// should not.
    private func useRegisters(_ random: inout SeededGenerator) {
        switch random.below(16) {
        case 0..<6: _ = transport.read(at: random.below(0x40) * 4, size: 4)
        case 6..<9: _ = transport.read(at: 0x100 + random.below(64), size: 1 << Int(random.below(4)))
        case 9, 10: write(UInt32(random.below(4)), 0x064)
        case 11..<14: write(UInt32(random.below(UInt64(sizes.count) + 1)), 0x050)
        case 14: transport.write(random.next(), at: 0x100 + random.below(64), size: 1 << Int(random.below(4)))
        default:
            guard random.chance(2) else { return }
            let registers: [UInt64] = [0x030, 0x038, 0x044, 0x070, 0x0c0, 0x080, 0x094]
            write(
                UInt32(random.below(random.chance(50) ? 2 : 256)), registers[Int(random.below(UInt64(registers.count)))]
            )
        }
    }
}

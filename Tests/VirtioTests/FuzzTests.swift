// SPDX-License-Identifier: Apache-2.0

import CLinux
import Linux
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// A source of bad ideas.
extension SeededGenerator {
    /// A guest address: mostly RAM, often at an edge of something.
    fileprivate mutating func address() -> UInt64 {
        let edges: [UInt64] = [
            0, 0x1000, TestGuest.lowSize, 3 << 30, TestGuest.highStart, TestGuest.highStart + TestGuest.highSize,
            1 << 63, .max,
        ]
        switch below(4) {
        case 0: return edges[Int(below(UInt64(edges.count)))] &+ below(64) &- 32
        case 1: return TestGuest.highStart + below(TestGuest.highSize)
        case 2: return below(TestGuest.lowSize)
        default: return below(TestGuest.lowSize) & ~15
        }
    }

    fileprivate mutating func length() -> UInt32 {
        switch below(4) {
        case 0: UInt32(below(8))
        case 1: UInt32(below(64)) * 16
        case 2: UInt32(below(0x2000))
        default: chance(20) ? UInt32(truncatingIfNeeded: next()) : 512
        }
    }
}

/// Bounded runs with fixed seeds: what a random driver does may be refused, but it holds no surprise.
@Suite(.timed) struct FuzzTests {
    @Test("Random rings", arguments: [UInt64(1), 2, 3, 4])
    func randomRings(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let guest = try TestGuest()
        let ranges = guest.memory.regions.map {
            unsafe UInt(bitPattern: $0.host)..<UInt(bitPattern: $0.host) + UInt($0.size)
        }
        var chains = 0, errors = 0
        for _ in 0..<800 {
            var features: FeatureSet = .version1
            if random.chance(50) { features.insert(.eventIndex) }
            if random.chance(80) { features.insert(.indirectDescriptors) }
            let size = UInt16(1) << UInt16(random.below(6))
            var driver = DriverQueue(guest, size: size)
            try guest.ram.fill(at: GuestAddress(0x1000), count: 0x1000)
            var queue = try driver.device(features)
            let pool = IOVectorPool(slots: 1, capacity: Int(size))
            for _ in 0..<random.below(8) + 1 {
                for index in 0..<size {
                    try driver.describe(
                        index, random.address(), random.length(), flags: randomFlags(&random),
                        next: UInt16(random.below(UInt64(size) + 1)))
                }
                // Tables of descriptors wherever indirect ones may point.
                for _ in 0..<16 {
                    try driver.describe(
                        0, random.address(), random.length(), flags: randomFlags(&random),
                        next: UInt16(random.below(4)),
                        table: random.below(TestGuest.lowSize / 16 - 1024) * 16 + 0x4000)
                }
                for _ in 0..<random.below(UInt64(size)) {
                    try driver.offer(UInt16(random.below(UInt64(size) + (random.chance(5) ? 2 : 0))))
                }
                if random.chance(3) { try driver.setAvailableIndex(UInt16(truncatingIfNeeded: random.next())) }
                do throws(VirtqueueError) {
                    for _ in 0..<size {
                        guard let chain = try queue.pop(into: pool[0]) else { break }
                        chains += 1
                        #expect(chain.head < size && chain.entries <= Int(size))
                        #expect(chain.readable.count + chain.writable.count == chain.entries)
                        for run in [chain.readable, chain.writable] {
                            #expect(run.byteCount == run.lengths.reduce(0) { $0 + UInt64($1) })
                            for index in 0..<run.count { #expect(unsafe isWithin(ranges, run.base[index])) }
                        }
                        chain.writable.fill(count: Int(random.below(600)), with: 0x5a)
                        queue.push(chain.head, written: random.length())
                    }
                    _ = queue.publish()
                    _ = queue.enableNotifications()
                } catch {
                    errors += 1
                    #expect(!error.description.isEmpty)
                    break
                }
            }
            #expect(queue.inFlight <= size)
        }
        // Both outcomes are exercised, not one of them by accident.
        #expect(chains > 300 && errors > 300, "\(chains) chains, \(errors) errors")
    }

    private func randomFlags(_ random: inout SeededGenerator) -> UInt16 {
        var flags: UInt16 = 0
        if random.chance(40) { flags |= nextFlag }
        if random.chance(50) { flags |= writeFlag }
        if random.chance(15) { flags |= indirectFlag }
        if random.chance(2) { flags |= UInt16(truncatingIfNeeded: random.next()) }
        return flags
    }

    private func isWithin(_ ranges: [Range<UInt>], _ buffer: iovec) -> Bool {
        let start = unsafe UInt(bitPattern: buffer.iov_base), count = UInt(unsafe buffer.iov_len)
        return ranges.contains { $0.contains(start) && count <= $0.upperBound - start } && count > 0
    }

    @Test("Random registers", arguments: [UInt64(11), 12, 13])
    func randomRegisters(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let guest = try TestGuest(), device = try EchoDevice()
        let transport = try MMIOTransport(device: device, memory: guest.memory)
        try device.start()
        var lives = 0, breaks = 0
        for _ in 0..<300 {
            // Often a good beginning, or nothing is ever reached.
            var driver = DriverQueue(guest)
            try guest.ram.fill(at: GuestAddress(0x1000), count: 0x1000)
            if random.chance(70) {
                transport.bringUp([.version1, .ringReset, .indirectDescriptors], driver.configuration)
                for index in UInt16(0)..<8 {
                    try driver.describe(
                        index, random.address(), random.length(), flags: randomFlags(&random),
                        next: UInt16(random.below(9)))
                }
                for _ in 0..<random.below(8) { try driver.offer(UInt16(random.below(9))) }
                transport.function.doorbells[0].event.signal()
            }
            for _ in 0..<60 {
                let offset = random.chance(90) ? random.below(0x140) & ~3 : random.next() >> random.below(64)
                let size = random.chance(90) ? 4 : Int(random.below(10))
                let value = random.chance(60) ? random.below(16) : random.next() >> random.below(64)
                if random.chance(30) {
                    let read = transport.read(at: offset, size: size)
                    #expect(size >= 8 || read >> UInt64(8 * size) == 0, "bits beyond the access")
                } else {
                    transport.write(value, at: offset, size: size)
                }
                let status = DeviceStatus(rawValue: transport.status)
                if status.contains(.driverOK) { #expect(status.isSuperset(of: [.acknowledge, .driver, .featuresOK])) }
                if status.contains(.featuresOK) { #expect(status.isSuperset(of: [.acknowledge, .driver])) }
                if status.contains(.driver) { #expect(status.contains(.acknowledge)) }
                if status.contains(.driverOK) { lives += 1 }
                if status.contains(.needsReset) { breaks += 1 }
            }
        }
        #expect(lives > 1000 && breaks > 100, "\(lives) live, \(breaks) broken")

        // After all that, a good driver works.
        var driver = DriverQueue(guest)
        try guest.ram.fill(at: GuestAddress(0x1000), count: 0x1000)
        transport.bringUp(.version1, driver.configuration)
        #expect(transport.status == 15)
        try guest.ram.write([41], at: GuestAddress(0x8000))
        try driver.chain([.read(0x8000, 1), .write(0x8001, 1)])
        try driver.offer(0)
        transport.write(0, at: MMIOTransport.queueNotifyOffset, size: 4)
        transport.set(0x30, 0)
        transport.set(0x44, 0)  // returns when the queue is at rest
        #expect(try guest.ram.readUInt8(at: GuestAddress(0x8001)) == 42)
    }
}

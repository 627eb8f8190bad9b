// SPDX-License-Identifier: Apache-2.0

import CAllocationCounter
import Linux
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// The way of a request allocates nothing, in any build.
@Suite(.timed) struct AllocationTests {
    @Test func theCounterCounts() {
        let before = allocation_count()
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 4000, alignment: 8)
        unsafe memory.deallocate()
        #expect(allocation_count() > before)
    }

    @Test("Requests", arguments: [FeatureSet.version1, [.version1, .eventIndex, .indirectDescriptors]])
    func requestsAllocateNothing(features: FeatureSet) throws {
        let guest = try TestGuest(), ram = guest.ram
        var driver = DriverQueue(guest, size: 16), queue = try driver.device(features)
        if features.contains(.indirectDescriptors) {
            try driver.chain(
                [.read(0x8000, 10), .read(0x8100, 6), .write(0x9000, 4096), .write(0xa000, 1)], table: 0x20000)
            try driver.describe(0, 0x20000, 64, flags: indirectFlag)
        } else {
            try driver.chain([.read(0x8000, 10), .read(0x8100, 6), .write(0x9000, 4096), .write(0xa000, 1)])
        }
        let pool = IOVectorPool(slots: 2, capacity: 16)
        let interrupt = QueueInterrupt(try IRQFD(), counters: DeviceCounters())
        let available = driver.configuration.availableRing &+ 2
        let requests = 100_000
        var done = 0, sum: UInt64 = 0

        let before = allocation_count()
        for request in 1...requests {
            try ram.write(UInt16(truncatingIfNeeded: request), at: available)  // head 0 in every entry
            queue.disableNotifications()
            while var chain = try queue.pop(into: pool[request & 1]) {
                sum &+= chain.readable.load(UInt64.self, at: 6) ?? 1
                let status = chain.writable.removeLastByte()
                chain.writable.store(UInt32(1), at: 2)
                chain.writable.fill(at: 100, count: 8)
                chain.readable.removeFirst(12)
                status?.store(0)
                queue.push(chain.head, written: 1)
                done += 1
            }
            if queue.publish() { interrupt.signal() }
            if queue.enableNotifications() { sum = 1 }
        }
        let allocations = allocation_count() - before
        // Unoptimized code makes a generic type's metadata when a way is gone first, once for a type: a few are no
        // allocation a request.
        #expect(allocations < 32)
        #expect(done == requests && sum == 0)
    }
}

// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// A driver that keeps the rules.
@Suite(.timed) struct VirtqueueTests {
    @Test func requestsComeInOrderAndGoBackWithTheirLengths() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device()
        try driver.chain([.read(0x8000, 16), .write(0x9000, 512), .write(TestGuest.highStart, 1)], at: 2)
        try driver.chain([.write(0xa000, 64)], at: 6)
        #expect(try queue.popped { $0 == nil })
        try driver.offer(2, 6)
        try queue.popped { popped in
            let chain = try #require(popped)
            #expect(chain.head == 2)
            #expect(chain.entries == 3)
            #expect(chain.readable.lengths == [16] && chain.readable.byteCount == 16)
            #expect(chain.writable.lengths == [512, 1] && chain.writable.byteCount == 513)
        }
        try queue.popped { #expect($0?.head == 6) }
        #expect(try queue.popped { $0 == nil })
        #expect(queue.inFlight == 2)

        queue.push(6, written: 64)
        queue.push(2, written: 513)
        #expect(try driver.usedIndex() == 0, "shown before publish")
        #expect(queue.publish() == true)
        #expect(queue.inFlight == 0)
        #expect(try driver.usedIndex() == 2)
        #expect(try driver.used(0) == (6, 64))
        #expect(try driver.used(1) == (2, 513))
        #expect(queue.publish() == false, "nothing new, so no interrupt")
    }

    @Test func interruptsFollowTheDriversFlag() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device()
        try driver.chain([.write(0xa000, 64)])
        for flags in [UInt16(0), 1, 0] {
            try driver.setAvailableFlags(flags)
            try driver.offer(0)
            try queue.complete()
            #expect(queue.publish() == (flags == 0))
        }
    }

    @Test func kicksAreAskedForByTheDevicesFlag() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device()
        queue.disableNotifications()
        #expect(try driver.usedFlags() == 1)
        #expect(queue.enableNotifications() == false)
        #expect(try driver.usedFlags() == 0)
        // A chain that came while no kick was wanted is not forgotten.
        queue.disableNotifications()
        try driver.chain([.write(0xa000, 64)])
        try driver.offer(0)
        #expect(queue.enableNotifications() == true)
        try queue.popped { #expect($0 != nil) }
        #expect(queue.enableNotifications() == false)
    }

    /// §2.7.10.1: with VIRTIO_F_EVENT_IDX the device sets the flags to 0, whatever the driver has left there; without,
    /// it may use them.
    @Test(arguments: [.version1, [.version1, .eventIndex]] as [FeatureSet])
    func theDevicesFlagsBeginAsZero(features: FeatureSet) throws {
        let guest = try TestGuest()
        let driver = DriverQueue(guest)
        try guest.ram.write(UInt16(0xffff), at: driver.configuration.usedRing)
        let queue = try driver.device(features)
        #expect(try driver.usedFlags() == 0)
        _ = consume queue
    }

    @Test func eventIndexAsksForTheNextKick() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device([.version1, .eventIndex])
        try driver.chain([.write(0xa000, 64)])
        try driver.offer(0, 0, 0)
        for _ in 0..<3 { try queue.complete() }
        queue.disableNotifications()
        #expect(try driver.usedFlags() == 0, "the flag is not used with VIRTIO_F_EVENT_IDX (§2.7.10)")
        #expect(queue.enableNotifications() == false)
        #expect(try driver.availableEvent() == 3)
    }

    /// The driver names `used_event`; a batch that passes it interrupts, whatever the indices are modulo 2^16.
    @Test("Interrupt at used_event", arguments: [0, 7, 32_700, 65_400])
    func eventIndexInterrupts(start: Int) throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device([.version1, .eventIndex])
        try driver.chain([.write(0xa000, 64)])
        for _ in 0..<start {
            try driver.offer(0)
            try queue.complete()
            _ = queue.publish()
        }
        for batch in UInt16(1)...8 {
            for event in UInt16(0)..<12 {
                // Entries before … before + batch − 1 become used; the driver waits for entry before + event − 2.
                let before = try driver.usedIndex()
                try driver.setUsedEvent(before &+ event &- 2)
                for _ in 0..<batch {
                    try driver.offer(0)
                    try queue.complete()
                }
                #expect(
                    queue.publish() == (event >= 2 && event - 2 < batch), "batch \(batch) at \(before), event \(event)")
            }
        }
    }

    @Test("More than 65,536 requests", arguments: [FeatureSet.version1, [.version1, .eventIndex]])
    func indicesWrap(features: FeatureSet) throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest, size: 4), queue = try driver.device(features)
        for head in UInt16(0)..<4 { try driver.chain([.write(0xa000, 64)], at: head) }
        let pool = IOVectorPool(slots: 1, capacity: 4)
        var interrupts = 0, surprises = 0
        for request in 0..<150_000 {
            let head = UInt16(request % 4)
            try driver.setUsedEvent(UInt16(truncatingIfNeeded: request))
            try driver.offer(head)
            guard let chain = try queue.pop(into: pool[0]), chain.head == head else { surprises += 1; break }
            queue.push(chain.head, written: UInt32(request))
            if queue.publish() { interrupts += 1 }
            if queue.enableNotifications() { surprises += 1 }
        }
        #expect(surprises == 0)
        #expect(interrupts == 150_000)
        #expect(try driver.usedIndex() == UInt16(truncatingIfNeeded: 150_000))
        #expect(try driver.used(UInt16(truncatingIfNeeded: 149_999)) == (3, 149_999))
        if features.contains(.eventIndex) {
            #expect(try driver.availableEvent() == UInt16(truncatingIfNeeded: 150_000))
        }
    }

    @Test func rewindGivesChainsBack() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device()
        for head in UInt16(0)..<3 { try driver.chain([.write(0xa000 + UInt64(head), 1)], at: head) }
        try driver.offer(0, 1, 2)
        for expected in [UInt16(0), 1] { try queue.popped { #expect($0?.head == expected) } }
        queue.rewind(1)
        try queue.popped { #expect($0?.head == 1) }
        queue.rewind(2)
        #expect(queue.inFlight == 0)
        for expected in [UInt16(0), 1, 2] { try queue.popped { #expect($0?.head == expected) } }
        #expect(try queue.popped { $0 == nil })
        queue.rewind(100)
        #expect(queue.inFlight == 0)
        try queue.popped { #expect($0?.head == 0) }
    }

    @Test func chainsOfSeveralRequestsMakeOneRun() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest), queue = try driver.device()
        try driver.chain([.write(0x8000, 10), .write(0x9000, 20)], at: 0)
        try driver.chain([.write(0xa000, 30)], at: 2)
        try driver.offer(0, 2)
        let pool = IOVectorPool(slots: 2, capacity: 16)
        let first = try #require(try queue.pop(into: pool[1]))
        let second = try #require(try queue.pop(into: pool[1], from: first.entries))
        let run = pool[1].prefix(first.entries + second.entries)
        #expect(run.lengths == [10, 20, 30])
        #expect(run.byteCount == 60)
    }

    @Test func aQueueOfOne() throws {
        let guest = try TestGuest()
        var driver = DriverQueue(guest, size: 1),
            queue = try driver.device([.version1, .eventIndex, .indirectDescriptors])
        for request in 0..<5 {
            try driver.describe(0, 0xa000, 8, flags: writeFlag)
            try driver.offer(0)
            try queue.complete(written: 8)
            try driver.setUsedEvent(UInt16(request))
            #expect(queue.publish() == true)
        }
    }

    @Test func aQueueOf32768() throws {
        let memory = try GuestMemory(size: 4 << 20)
        var configuration = QueueConfiguration(index: 0, maximumSize: 32768)
        configuration.availableRing = GuestAddress(1 << 20)
        configuration.usedRing = GuestAddress(2 << 20)
        var queue = try Virtqueue(configuration, features: .version1, ram: memory.ram)
        try memory.ram.write(UInt16(32767), at: GuestAddress(32767 * 16 + 14))
        try memory.ram.write(UInt32(5), at: GuestAddress(32767 * 16 + 8))
        try memory.ram.write(UInt16(32767), at: GuestAddress((1 << 20) + 4))
        try memory.ram.write(UInt16(1), at: GuestAddress((1 << 20) + 2))
        try queue.popped { #expect($0?.head == 32767 && $0?.readable.byteCount == 5) }
    }
}

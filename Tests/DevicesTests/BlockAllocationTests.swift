// SPDX-License-Identifier: Apache-2.0

import CAllocationCounter
@testable import Devices
import DiskImage
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

/// The I/O thread's side of the block device, run in the test's own thread.
@Suite(.timed) struct BlockAllocationTests {
    @Test(arguments: [true, false]) func requestsAllocateNothing(usesRing: Bool) throws {
        let disk = try TemporaryDisk(TemporaryDisk.pattern(1 << 20))
        // The device and its driver set the queue up; its rings then serve an engine of our own on the same disk.
        let driver = try BlockDriver(disk.device(readOnly: true))
        let image = try DiskImage(path: disk.path, options: DiskImageOptions(locking: false))
        let statistics = BlockStatistics()
        var engine = BlockEngine(
            try DiskEngine(image, depth: BlockDriver.queueSize, segments: BlockDriver.queueSize, usesRing: usesRing),
            queue: 0, queueSize: BlockDriver.queueSize, capacity: DiskCapacity(1 << 20), largestTransfer: 1 << 20,
            isReadOnly: false, serial: "x",
            cache: WriteCache(), statistics: statistics, events: .none, onError: .report, stop: DiskStop(onStop: {}))
        var configuration = QueueConfiguration(index: 0, maximumSize: UInt16(BlockDriver.queueSize))
        configuration.descriptorTable = BlockDriver.table
        configuration.availableRing = BlockDriver.available
        configuration.usedRing = BlockDriver.used
        configuration.isReady = true
        let epoll = try Epoll()
        try engine.activate(
            Activation(
                features: [.version1, .blockFlush], queues: [configuration], memory: driver.memory,
                interrupts: driver.transport.function.interrupts,
                doorbells: driver.transport.function.doorbells, counters: driver.transport.function.counters),
            epoll: epoll)

        // Eight chains, reads and writes, offered again and again.
        for index in 0..<8 {
            let base = BlockDriver.data + UInt64(index) * 0x4000
            let isRead = index % 2 == 0
            try driver.ram.write(BlockDriver.header(isRead ? 0 : 1, UInt64(index * 100)), at: GuestAddress(base))
            _ = try driver.offer([
                BlockDriver.Buffer(address: base, length: 16, isWritable: false),
                BlockDriver.Buffer(address: base + 0x1000, length: 8192, isWritable: isRead),
                BlockDriver.Buffer(address: base + 0x800, length: 1, isWritable: true),
            ])
        }
        for index in 0..<BlockDriver.queueSize {
            try driver.ram.write(UInt16(index % 8 * 3), at: BlockDriver.available &+ (4 + 2 * UInt64(index)))
        }
        let rounds = 2000
        var offered: UInt16 = 0
        var before: UInt = 0
        for round in 0...rounds {
            // The first round is for what the runtime makes once in a process.
            if round == 1 { before = allocation_count() }
            offered &+= 8
            try driver.ram.write(offered, at: BlockDriver.available &+ 2)
            try engine.notified(queue: 0, epoll: epoll)
            while try driver.ram.readUInt16(at: BlockDriver.used &+ 2) != offered {
                try engine.ready(token: DeviceWorkerToken.firstOfEngine, events: .input, epoll: epoll)
            }
        }
        let allocations = allocation_count() - before
        // Unoptimized code makes a generic type's metadata when a way is gone first, once for a type: a few are no
        // allocation a request.
        #expect(allocations < 32)
        #expect(statistics.reads == UInt64(rounds * 4 + 4) && statistics.writes == UInt64(rounds * 4 + 4))
        #expect(statistics.failures == 0)
        engine.reset(epoll: epoll)
    }
}

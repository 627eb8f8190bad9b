// SPDX-License-Identifier: Apache-2.0

import DiskImage
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing

@testable import Devices
@testable import Virtio

/// `bps=` and `iops=`. Only lower bounds of time are tested: those hold on any host.
@Suite(.timed) struct BlockLimitTests {
    private let disk: TemporaryDisk

    init() throws { disk = try TemporaryDisk(TemporaryDisk.pattern(256 << 10)) }

    private func device(_ limit: RateLimit, queues: Int = 1) throws -> BlockDevice {
        try BlockDevice(
            name: "blk0", image: DiskImage(path: disk.path), queues: queues,
            queueSize: UInt16(BlockDriver.queueSize), limit: limit)
    }

    private func milliseconds(_ body: () throws -> Void) throws -> UInt64 {
        let start = TimerFD.now
        try body()
        return TimerFD.now - start
    }

    @Test func requestsWaitForTheirTurn() throws {
        let device = try device(RateLimit(operations: .init(perSecond: 100, burst: 2)))
        let driver = try BlockDriver(device)
        let time = try milliseconds { () throws in
            for _ in 0..<12 { #expect(try driver.request(BlockRequestType.read, in: 512).status == 0) }
        }
        // The first two at once, then one each 10 ms.
        #expect(time >= 95)
        #expect(device.throttled > 0 && device.statistics.reads == 12)
    }

    @Test func bytesAreOfReadsWritesAndZeroes() throws {
        let device = try device(RateLimit(bytes: .init(perSecond: 1 << 20, burst: 64 << 10)))
        let driver = try BlockDriver(device, features: [.version1, .blockFlush, .blockWriteZeroes])
        let time = try milliseconds { () throws in
            #expect(try driver.request(BlockRequestType.write, out: TemporaryDisk.pattern(64 << 10)).status == 0)
            #expect(try driver.request(BlockRequestType.read, in: 64 << 10).status == 0)
            // 64 KiB from sector 8 on.
            let range: [UInt8] = [8, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0]
            #expect(try driver.request(BlockRequestType.writeZeroes, out: range).status == 0)
            #expect(try driver.request(BlockRequestType.read, in: 512).status == 0)
        }
        // Three times 64 KiB, of which the first are there at once.
        #expect(time >= 120)
    }

    /// A queue that waits has taken nothing: a reset, a pause or the end of the queue need not wait for it. The next
    /// request is due in a minute.
    @Test func whatWaitsHoldsNothingUp() throws {
        let device = try device(RateLimit(bytes: .init(perSecond: 1024, burst: 1)))
        let driver = try BlockDriver(device)
        func offerAndWaitForTheLimit(_ waits: UInt64) throws {
            _ = try driver.offer([
                .init(address: BlockDriver.data, length: 16, isWritable: false),
                .init(address: BlockDriver.data + 0x1000, length: 513, isWritable: true),
            ])
            driver.kick()
            try wait { device.throttled >= waits }
        }
        #expect(try driver.request(BlockRequestType.read, in: 64 << 10).status == 0)
        try offerAndWaitForTheLimit(1)
        let quiet = Guarded(false)
        device.pause { quiet.withLock { $0 = true } }
        try wait { quiet.withLock { $0 } }
        device.resume()
        #expect(try driver.usedCount() == 0)
        device.stopQueue(0)
        #expect(try driver.usedCount() == 0)
        device.reset()
        // The limit is the disk's, not the driver's.
        try driver.start([.version1])
        let before = device.throttled
        try offerAndWaitForTheLimit(before)
        #expect(try driver.usedCount() == 0)
        #expect(device.statistics.reads == 1)
    }

    /// Several queues have one limit together.
    @Test func queuesShareTheLimit() throws {
        let device = try device(RateLimit(operations: .init(perSecond: 100, burst: 1)), queues: 2)
        let driver = try BlockDriver(device, features: [.version1, .blockMultiqueue], queues: 2)
        let time = try milliseconds { () throws in
            for index in 0..<10 {
                driver.queue = index % 2
                #expect(try driver.request(BlockRequestType.read, in: 512).status == 0)
            }
        }
        #expect(time >= 85)
    }

    /// Also where a request is the driver's mistake.
    @Test func badRequestsCountToo() throws {
        let device = try device(RateLimit(operations: .init(perSecond: 100, burst: 1)))
        let driver = try BlockDriver(device)
        let time = try milliseconds { () throws in
            for _ in 0..<6 { #expect(try driver.request(77).status == 2) }
        }
        #expect(time >= 45)
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import Devices
import DiskImage
import Glibc
import GuestMemory
import Linux
import TestSupport
import Testing
@testable import Virtio

/// A block device with several queues, each with its own thread.
@Suite(.timed) struct BlockMultiqueueTests {
    static let features: FeatureSet = [.version1, .blockFlush, .blockMultiqueue]
    let contents = TemporaryDisk.pattern(256 << 10)
    let disk: TemporaryDisk

    init() throws { disk = try TemporaryDisk(contents) }

    /// A write that is offered and not waited for; its status byte comes to the end of its memory.
    private func offerWrite(_ driver: BlockDriver, sector: UInt64, _ bytes: [UInt8]) throws {
        let place = BlockDriver.data + 0x10_0000 + sector * 0x1000
        try driver.ram.write(BlockDriver.header(BlockRequestType.write, sector) + bytes, at: GuestAddress(place))
        try driver.ram.write([0xee], at: GuestAddress(place + 0xfff))
        _ = try driver.offer([
            BlockDriver.Buffer(address: place, length: 16 + bytes.count, isWritable: false),
            BlockDriver.Buffer(address: place + 0xfff, length: 1, isWritable: true),
        ])
    }

    private func status(_ driver: BlockDriver, sector: UInt64) throws -> UInt8 {
        try driver.ram.readBytes(at: GuestAddress(BlockDriver.data + 0x10_0000 + sector * 0x1000 + 0xfff), count: 1)[0]
    }

    /// What the configuration space says, and that a device with one queue offers nothing.
    @Test func theDeviceSaysHowManyItHas() throws {
        let one = try disk.device()
        #expect(!one.features.contains(.blockMultiqueue) && one.maximumQueueSizes.count == 1)
        #expect(try BlockDriver(one).configuration(34, 2) == 1)
        let several = try BlockDevice(
            name: "blk1", image: DiskImage(path: disk.path, options: DiskImageOptions(locking: false)), queues: 3,
            queueSize: 64)
        #expect(several.features.contains(.blockMultiqueue) && several.maximumQueueSizes == [64, 64, 64])
        let driver = try BlockDriver(several, features: Self.features, queues: 3)
        #expect(driver.configuration(34, 2) == 3)
        driver.write(0x030, 3)
        #expect(driver.read(0x034) == 0)
    }

    @Test(arguments: [true, false]) func everyQueueServes(usesRing: Bool) throws {
        let driver = try BlockDriver(disk.device(queues: 3, usesRing: usesRing), features: Self.features, queues: 3)
        for round in 0..<6 {
            driver.queue = round % 3
            let piece = TemporaryDisk.pattern(4096, seed: round)
            #expect(try driver.request(BlockRequestType.write, sector: UInt64(round * 8), out: piece).status == 0)
            driver.queue = (round + 1) % 3
            #expect(try driver.request(BlockRequestType.flush).status == 0)
            #expect(try driver.request(BlockRequestType.read, sector: UInt64(round * 8), in: 4096).data == piece)
        }
        let statistics = driver.device.statistics
        #expect(statistics.reads == 6 && statistics.writes == 6 && statistics.flushes == 6)
        for queue in statistics.queues {
            #expect(queue.reads.value == 2 && queue.writes.value == 2 && queue.flushes.value == 2)
            #expect(queue.readBytes.value == 2 * 4096 && queue.writtenBytes.value == 2 * 4096)
            #expect(queue.discards.value == 0 && queue.failures.value == 0)
        }
    }

    /// Sectors of the same clusters, written through all queues at once.
    @Test(arguments: [true, false]) func neighboursInACluster(usesRing: Bool) throws {
        let path = disk.path + ".qcow2"
        defer { unsafe unlink(path) }
        try ImageCreation(path: path, format: .qcow2, size: 1 << 20).create()
        let driver = try BlockDriver(
            BlockDevice(
                name: "blk1", image: DiskImage(path: path), queues: 4, queueSize: UInt16(BlockDriver.queueSize),
                usesRing: usesRing), features: Self.features, queues: 4)
        let sectors: [UInt64] = Array(0..<64)
        for sector in sectors {
            driver.queue = Int(sector % 4)
            try offerWrite(driver, sector: sector * 3, TemporaryDisk.pattern(512, seed: Int(sector)))
        }
        for queue in 0..<4 {
            driver.queue = queue
            driver.kick()
        }
        for queue in 0..<4 {
            driver.queue = queue
            try driver.wait(for: 16)
        }
        for sector in sectors {
            #expect(try status(driver, sector: sector * 3) == 0)
            driver.queue = Int((sector + 1) % 4)
            #expect(
                try driver.request(BlockRequestType.read, sector: sector * 3, in: 512).data
                    == TemporaryDisk.pattern(512, seed: Int(sector)))
        }
        let between = try driver.request(BlockRequestType.read, sector: 1, in: 1024).data
        #expect(between == [UInt8](repeating: 0, count: 1024))
    }

    /// While all queues write; the driver is informed, and each queue goes on.
    @Test(arguments: ["raw", "qcow2"], [true, false]) func aDiskIsMadeLonger(format: String, usesRing: Bool) throws {
        let path = disk.path + "." + format
        defer { unsafe unlink(path) }
        let isRaw = format == "raw"
        // With clusters of 4 KiB, the longer disk needs another L1 table.
        var image = ImageCreation(path: path, format: isRaw ? .raw : .qcow2, size: 2 << 20)
        if !isRaw { image.options.clusterSize = 4096 }
        try image.create()
        let device = try BlockDevice(
            name: "blk1", image: DiskImage(path: path), queues: 3, queueSize: UInt16(BlockDriver.queueSize),
            usesRing: usesRing)
        let driver = try BlockDriver(device, features: Self.features, queues: 3)
        for round in 0..<4 {
            let size = UInt64(16 << 20) << UInt64(round)
            for sector in 0..<UInt64(24) {
                driver.queue = Int(sector % 3)
                try offerWrite(driver, sector: sector * 8, TemporaryDisk.pattern(512, seed: Int(sector)))
            }
            for queue in 0..<3 {
                driver.queue = queue
                driver.kick()
            }
            let result = Outcome()
            device.resize(to: size) { result.set($0) }
            #expect(result.wait() == .success(size), "\(format)")
            for queue in 0..<3 {
                driver.queue = queue
                try driver.wait(for: 8)
            }
            #expect(device.capacity == size && driver.configuration(0, 8) == size / 512)
            for queue in 0..<3 {
                driver.queue = queue
                let sector = size / 512 - UInt64(queue + 1) * 8, bytes = TemporaryDisk.pattern(4096, seed: queue)
                #expect(
                    try driver.request(BlockRequestType.read, sector: sector, in: 512).data
                        == [UInt8](repeating: 0, count: 512))
                #expect(try driver.request(BlockRequestType.write, sector: sector, out: bytes).status == 0)
                driver.queue = (queue + 1) % 3
                #expect(try driver.request(BlockRequestType.read, sector: sector, in: 4096).data == bytes)
                #expect(try driver.request(BlockRequestType.read, sector: size / 512, in: 512).status == 1)
            }
        }
        if isRaw {
            // Another program has made it longer.
            #expect(unsafe truncate(path, 256 << 20) == 0)
            let result = Outcome()
            device.resize(to: nil) { result.set($0) }
            #expect(result.wait() == .success(256 << 20))
        }
    }

    /// Also of a device that is not active, or with one active queue, and as often as the driver resets it meanwhile.
    @Test(arguments: [nil, [.version1, .blockFlush], Self.features] as [FeatureSet?])
    func aDiskIsMadeLongerDuringResets(
        features: FeatureSet?
    ) throws {
        let device = try disk.device(queues: 3)
        let driver = try features.map { try BlockDriver(device, features: $0, queues: 3) }
        if driver == nil { try device.start() }
        for round in 1...20 {
            let result = Outcome(), size = UInt64(round) << 20
            device.resize(to: size) { result.set($0) }
            if round % 2 == 0 { device.reset() }
            #expect(result.wait() == .success(size))
        }
        let result = Outcome()
        device.resize(to: 512) { result.set($0) }
        if case .success = result.wait() { Issue.record("it has shrunk") }
    }

    /// A driver that does not take the feature has the first queue and no other.
    @Test func withoutTheFeatureThereIsOneQueue() throws {
        let driver = try BlockDriver(disk.device(queues: 2), features: [.version1, .blockFlush], queues: 2)
        driver.queue = 1
        try offerWrite(driver, sector: 1, TemporaryDisk.pattern(512, seed: 9))
        driver.kick()
        driver.queue = 0
        #expect(try driver.request(BlockRequestType.read, sector: 1, in: 512).data == Array(contents[512..<1024]))
        // The reset waits for all that is under way: nobody has touched it.
        driver.write(0x070, 0)
        #expect(try status(driver, sector: 1) == 0xee)
        #expect(try disk.contents() == contents)
    }

    /// One queue is stopped and set up anew while the others go on; a reset stops all.
    @Test func queuesStopOneByOne() throws {
        let driver = try BlockDriver(disk.device(queues: 2), features: Self.features.union(.ringReset), queues: 2)
        for round in 0..<5 {
            driver.queue = 1
            try offerWrite(driver, sector: UInt64(round), TemporaryDisk.pattern(512, seed: round))
            driver.kick()
            driver.write(0x030, 1)
            driver.write(0x044, 0)
            #expect(driver.read(0x044) == 0)
            driver.queue = 0
            #expect(
                try driver.request(BlockRequestType.read, sector: 100, in: 512).data == Array(contents[51200..<51712]))
            driver.queue = 1
            try driver.setUp()
            #expect(try driver.request(BlockRequestType.flush).status == 0)
        }
        for _ in 0..<5 {
            for queue in 0..<2 {
                driver.queue = queue
                try offerWrite(driver, sector: UInt64(20 + queue), TemporaryDisk.pattern(512, seed: queue))
                driver.kick()
            }
            try driver.start(Self.features)
            driver.queue = 1
            #expect(
                try driver.request(BlockRequestType.read, sector: 100, in: 512).data == Array(contents[51200..<51712]))
        }
    }

    /// A rule broken on one queue makes the whole device quiet until the reset.
    @Test func aBrokenRuleStopsAllQueues() throws {
        let driver = try BlockDriver(disk.device(queues: 2), features: Self.features, queues: 2)
        driver.queue = 1
        #expect(try driver.request(BlockRequestType.flush).status == 0)
        // A head that is no descriptor.
        try driver.ram.write(UInt16(0xffff), at: BlockDriver.available &+ (0x1000 + 4 + 2))
        try driver.ram.write(UInt16(2), at: BlockDriver.available &+ (0x1000 + 2))
        driver.kick()
        while !driver.transport.function.interrupts.configuration.needsReset { driver.transport.irqfd.event.wait() }
        #expect(driver.read(0x070) & 64 != 0)
        driver.queue = 0
        try offerWrite(driver, sector: 5, TemporaryDisk.pattern(512, seed: 5))
        driver.kick()
        driver.write(0x070, 0)
        #expect(try status(driver, sector: 5) == 0xee)
        try driver.start(Self.features)
        driver.queue = 0
        #expect(try driver.request(BlockRequestType.read, sector: 5, in: 512).data == Array(contents[2560..<3072]))
    }
}

/// The answer to a resize, once it is there.
private final class Outcome: Sendable {
    private let state = Guarded<Result<UInt64, DiskImageError>?>(nil)
    private let monitor = Monitor()

    func set(_ result: Result<UInt64, DiskImageError>) {
        monitor.locked {
            #expect(state.withLock { $0 } == nil, "it is called once")
            state.withLock { $0 = result }
            monitor.broadcast()
        }
    }

    func wait() -> Answer {
        monitor.locked {
            while true {
                switch state.withLock({ $0 }) {
                case .success(let size): return .success(size)
                case .failure(let error): return .failure("\(error)")
                case nil: monitor.wait()
                }
            }
        }
    }

    enum Answer: Equatable { case success(UInt64), failure(String) }
}

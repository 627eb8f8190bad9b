// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import Devices
@testable import DiskImage
import Glibc
import GuestMemory
import Linux
import Synchronization
import TestSupport
import Testing
@testable import Virtio

/// Guests that ask for much at once: what a reset, and so the end of the machine, waits for is bounded in bytes.
@Suite(.timed) struct BlockBoundsTests {
    private static let features: FeatureSet = [.version1, .blockFlush, .indirectDescriptors]
    private static let mebi: UInt64 = 1 << 20
    /// What size_max and seg_max of the driver's queue make.
    private static let largest = 4 * mebi * UInt64(BlockDriver.queueSize - 2)
    private static let table = GuestAddress(0x40_000), header = GuestAddress(0x50_000), status = GuestAddress(0x50_100)

    /// Any number of requests of the same kind, over the same 8 MiB of RAM, as a guest of a few pages can make them:
    /// one indirect table for all.
    private func offer(_ driver: BlockDriver, _ type: UInt32, requests: Int, bytes: UInt64) throws {
        try driver.ram.write(BlockDriver.header(type, 0), at: Self.header)
        var entries: [(GuestAddress, UInt64, UInt16)] = [(Self.header, 16, 1)]
        var left = bytes
        while left > 0 {
            let piece = min(left, 8 * Self.mebi)
            entries.append((GuestAddress(BlockDriver.data), piece, type == BlockRequestType.read ? 3 : 1))
            left -= piece
        }
        entries.append((Self.status, 1, 2))
        for (index, entry) in entries.enumerated() {
            let place = Self.table &+ UInt64(index) * 16
            try driver.ram.write(entry.0.rawValue, at: place)
            try driver.ram.write(UInt32(entry.1), at: place &+ 8)
            try driver.ram.write(entry.2, at: place &+ 12)
            try driver.ram.write(UInt16(index + 1), at: place &+ 14)
        }
        for index in 0..<requests {
            let place = BlockDriver.table &+ (UInt64(driver.queue) * 0x1000 + UInt64(index) * 16)
            try driver.ram.write(Self.table.rawValue, at: place)
            try driver.ram.write(UInt32(16 * entries.count), at: place &+ 8)
            try driver.ram.write(UInt32(4), at: place &+ 12)
            try driver.ram.write(
                UInt16(index), at: BlockDriver.available &+ (UInt64(driver.queue) * 0x1000 + 4 + 2 * UInt64(index)))
        }
        try driver.ram.write(UInt16(requests), at: BlockDriver.available &+ (UInt64(driver.queue) * 0x1000 + 2))
        driver.kick()
    }

    /// A sparse disk.
    private func disk(_ size: UInt64) throws -> TemporaryDisk {
        let disk = try TemporaryDisk([])
        let status = unsafe truncate(disk.path, off_t(size))
        #expect(status == 0)
        return disk
    }

    @Test(arguments: [true, false]) func aRequestBeyondWhatIsAnnouncedIsAnError(usesRing: Bool) throws {
        let disk = try disk(2 * Self.largest)
        let driver = try BlockDriver(disk.device(usesRing: usesRing))
        #expect(driver.configuration(8, 4) * driver.configuration(12, 4) == Self.largest)
        for type in [BlockRequestType.read, BlockRequestType.write] {
            for (bytes, expected) in [
                (Self.largest + 512, 1 as UInt8), (Self.largest + 8 * Self.mebi, 1), (Self.largest, 0),
            ] {
                // A write of that much to a file would take long: the reads show that it is the size that counts.
                guard type == BlockRequestType.read || expected == 1 else { continue }
                try driver.start([.version1, .blockFlush, .indirectDescriptors])
                try driver.ram.write(UInt8(0xee), at: Self.status)
                try offer(driver, type, requests: 1, bytes: bytes)
                try driver.wait(for: 1)
                #expect(try driver.ram.readUInt8(at: Self.status) == expected, "\(bytes) bytes")
                #expect(
                    driver.written[0] == (expected == 0 ? UInt32(bytes + 1) : type == BlockRequestType.read ? 0 : 1))
            }
        }
    }

    /// The system calls of a disk that stops at its first one, until somebody has asked for a reset and waits.
    private final class Gate: Sendable {
        let bytes = Atomic<UInt64>(0)
        private let calls = Atomic<Int>(0)
        private let hasBegun = Atomic<Bool>(false)
        private let isResetting = Atomic<Bool>(false)
        /// The thread that will ask for the reset: the one that makes this.
        private let state: String

        init() throws {
            let own = try String(decoding: readFile("/proc/thread-self/stat", limit: 4096), as: UTF8.self)
            state = "/proc/self/task/\(own.prefix { $0 != " " })/stat"
        }

        func pass(_ count: UInt64) {
            bytes.wrappingAdd(count, ordering: .relaxed)
            guard calls.wrappingAdd(1, ordering: .relaxed).oldValue == 0 else { return }
            hasBegun.store(true, ordering: .releasing)
            while !isResetting.load(ordering: .acquiring) || !isAsleep { usleep(200) }
        }

        private var isAsleep: Bool {
            guard let bytes = try? readFile(state, limit: 4096) else { return true }
            return String(decoding: bytes, as: UTF8.self).contains(") S ")
        }

        /// Resets the device once a call is under way.
        func reset(_ driver: BlockDriver) {
            while !hasBegun.load(ordering: .acquiring) { usleep(200) }
            isResetting.store(true, ordering: .releasing)
            driver.write(0x070, 0)
        }
    }

    private func calls(_ gate: Gate) -> FileCalls {
        var calls = FileCalls.host
        @Sendable func moved(_ vectors: UnsafePointer<iovec>, _ count: Int32) -> Int {
            // As many as the engine says there are.
            let sum = (0..<Int(count)).reduce(0) { unsafe $0 + vectors[$1].iov_len }
            gate.pass(UInt64(sum))
            return sum
        }
        unsafe calls.read = { _, vectors, count, _ in unsafe moved(vectors, count) }
        unsafe calls.write = { _, vectors, count, _ in unsafe moved(vectors, count) }
        return calls
    }

    /// 64 requests of 248 MiB each: after the reset no further part of one begins.
    @Test(arguments: [BlockRequestType.read, BlockRequestType.write]) func aResetBeginsNoFurtherPartOfARequest(
        type: UInt32
    ) throws {
        let disk = try disk(Self.largest), gate = try Gate()
        let shared = try SharedImage(
            DiskImage(path: disk.path, options: DiskImageOptions()), calls: calls(gate), isExclusive: true)
        let driver = try BlockDriver(
            BlockDevice(
                name: "blk0", shared: shared, queues: 1, queueSize: UInt16(BlockDriver.queueSize), usesRing: false))
        try offer(driver, type, requests: BlockDriver.queueSize, bytes: Self.largest)
        gate.reset(driver)
        // The turn that the device's thread was in, and another: not 16 GiB.
        #expect(gate.bytes.load(ordering: .relaxed) <= 128 * Self.mebi)
        #expect(driver.device.statistics.reads == 0 && driver.device.statistics.writes == 0)
        try driver.start([.version1, .blockFlush])
        #expect(try driver.request(BlockRequestType.read, in: 512).status == 0)
    }

    /// Nothing is read from the disk here: the device's own thread writes the zeroes.
    @Test func aResetEndsTheReadingOfZeroes() throws {
        let disk = try TemporaryDisk([]), gate = try Gate()
        let path = disk.path + ".qcow2"
        try ImageCreation(path: path, format: .qcow2, size: 1 << 40).create()
        defer { unsafe unlink(path) }
        var calls = FileCalls.host
        calls.bulkWork = { if $0 == .zeroes { gate.pass(1) } }
        let driver = try BlockDriver(
            BlockDevice(
                name: "blk0", shared: SharedImage(DiskImage(path: path, options: DiskImageOptions()), calls: calls),
                queues: 2,
                queueSize: UInt16(BlockDriver.queueSize), usesRing: false),
            features: [.version1, .blockFlush, .blockMultiqueue, .indirectDescriptors], queues: 2)
        try offer(driver, BlockRequestType.read, requests: BlockDriver.queueSize, bytes: Self.largest)
        gate.reset(driver)
        #expect(gate.bytes.load(ordering: .relaxed) <= 32, "pieces of 4 MiB")
        #expect(driver.device.statistics.reads == 0)
    }

    /// Operations that wait in the kernel are cancelled.
    @Test func aResetCancelsWhatTheKernelHas() throws {
        let disk = try disk(Self.largest)
        let image = try DiskImage(path: disk.path, options: DiskImageOptions(readOnly: true))
        // A pipe in the file's place, into which nobody writes.
        var ends: [Int32] = [-1, -1]
        #expect(unsafe pipe(&ends) == 0)
        let file = image.descriptor(0), output = ends[1]
        #expect(dup2(ends[0], file) == file)
        close(ends[0])
        let driver = try BlockDriver(BlockDevice(name: "blk0", image: image, queueSize: UInt16(BlockDriver.queueSize)))
        try offer(driver, BlockRequestType.read, requests: 8, bytes: 4 * Self.mebi)
        // For a device that waits: the reads end as the pipe does.
        let end = Rescue(output)
        driver.write(0x070, 0)
        #expect(!end.wasNeeded(), "the reset waited for the reads")
        #expect(driver.read(0x070) == 0)
    }

    /// Closes a descriptor when a test has made no progress for long.
    private final class Rescue {
        private final class State: Sendable {
            let isOver = Atomic<Bool>(false)
            let wasNeeded = Atomic<Bool>(false)
        }

        private let state = State()
        private var thread: Thread?

        init(_ descriptor: Int32) {
            thread = try? Thread.start(name: "rescue") { [state] in
                for _ in 0..<100_000 where !state.isOver.load(ordering: .acquiring) { usleep(200) }
                if !state.isOver.load(ordering: .acquiring) { state.wasNeeded.store(true, ordering: .releasing) }
                close(descriptor)
            }
        }

        func wasNeeded() -> Bool {
            state.isOver.store(true, ordering: .releasing)
            if let thread = thread.take() { thread.join() }
            return state.wasNeeded.load(ordering: .acquiring)
        }
    }

    /// Writes that allocate are cancelled in the middle: the image has no error, and is closed as it should be.
    @Test(arguments: [(true, 1), (false, 1), (true, 2)]) func anImageIsSoundAfterWritesWereGivenUp(
        usesRing: Bool, queues: Int
    ) throws {
        let disk = try TemporaryDisk([])
        let path = disk.path + ".qcow2"
        var creation = ImageCreation(path: path, format: .qcow2, size: 1 << 30)
        creation.options.clusterSize = 4096
        try creation.create()
        defer { unsafe unlink(path) }
        for round in 0..<4 {
            let image = try DiskImage(path: path, options: DiskImageOptions())
            let driver = try BlockDriver(
                BlockDevice(
                    name: "blk0", image: image, queues: queues, queueSize: UInt16(BlockDriver.queueSize),
                    usesRing: usesRing),
                features: queues > 1 ? Self.features.union(.blockMultiqueue) : Self.features, queues: queues)
            for queue in 0..<queues {
                driver.queue = queue
                // Not whole clusters at the end of each: copies.
                try offer(driver, BlockRequestType.write, requests: 4, bytes: 2 * Self.mebi - 512 * UInt64(round))
            }
            driver.write(0x070, 0)
        }
        let report = try DiskImage.check(path: path, options: DiskImageOptions(readOnly: true, locking: false))
        #expect(report.isSound)
    }
}

// SPDX-License-Identifier: Apache-2.0

import CSystemCallFilter
import DiskImage
import Glibc
import GuestMemory
import Linux
import Synchronization
import TestSupport
import Testing

@testable import Devices
@testable import Virtio

/// `--on-disk-error`: a disk on a file system of a few MiB, which it fills, and which gets room again.
@Suite(.timed, .enabled(if: geteuid() == 0, "needs root to mount a file system for the test")) struct BlockStopTests {
    /// A disk on a small file system.
    private final class Small: Sendable {
        let path: String
        private let filler: String
        let lines = Lines()
        private let stops = Atomic<Int>(0)

        init(_ directory: String, image: String) {
            path = directory + "/" + image
            filler = directory + "/filler"
        }

        func device(_ policy: DiskErrorPolicy, queues: Int = 1) throws -> BlockDevice {
            try BlockDevice(
                name: "blk0", image: DiskImage(path: path), queues: queues, queueSize: UInt16(BlockDriver.queueSize),
                events: DeviceEvents(log: lines.add), onError: policy,
                onStop: { [self] in stops.add(1, ordering: .sequentiallyConsistent) })
        }

        func makeRoom() { unlink(filler) }

        /// As the machine's control does; returns when the device is quiet.
        func pause(_ device: BlockDevice) {
            let quiet = Guarded(false), monitor = Monitor()
            device.pause {
                monitor.locked {
                    quiet.withLock { $0 = true }
                    monitor.broadcast()
                }
            }
            monitor.locked { while !quiet.withLock({ $0 }) { monitor.wait() } }
        }

        var stopCount: Int { stops.load(ordering: .sequentiallyConsistent) }

        func waitForStop(_ count: Int = 1) throws { try wait { self.stopCount >= count } }
    }

    /// More than there is room for, and less than there will be, even if all of it was written once in vain.
    private static let piece = 64 << 10, count = 20

    /// Runs `body` with a file system of 4 MiB, of which a file takes 3, and with a disk of 16 MiB on it.
    /// - Parameter image: `raw`, or options of qemu-img for a qcow2 image.
    private func onSmallFileSystem(_ image: String, _ body: @escaping @Sendable (Small) throws -> Void) throws {
        let failures = Lines()
        var template = Array("/tmp/swkvm-stop.XXXXXX".utf8CString)
        // It ends with a NUL.
        let directory = unsafe template.withUnsafeMutableBufferPointer {
            unsafe String(cString: mkdtemp($0.baseAddress!))
        }
        defer { rmdir(directory) }
        // The namespace is for good: a thread of its own, and those that it starts, have it.
        let thread = try Thread.start(name: "small", stackSize: 4 << 20) {
            do {
                guard mount_small_file_system(directory, "size=4M") == 0 else { throw SystemCallError.last("mount") }
                let small = Small(directory, image: image == "raw" ? "disk.raw" : "disk.qcow2")
                let make =
                    image == "raw"
                    ? "truncate -s 16M disk.raw" : "qemu-img create -q -f qcow2 -o \(image) disk.qcow2 16M"
                guard system("cd \(directory) && \(make) && head -c 3M /dev/zero >filler") == 0 else {
                    throw NothingCame(description: "no image")
                }
                try body(small)
                if image != "raw" {
                    // Its locks may outlast the device by a moment, in a process that another test is starting: -U
                    // takes none.
                    let check = "qemu-img check -U disk.qcow2 >check.log 2>&1 || { cat check.log >&2; exit 1; }"
                    #expect(system("cd \(directory) && \(check)") == 0, "the image is not clean")
                }
            } catch { failures.add(.error, "\(error)") }
        }
        thread.join()
        #expect(failures.all.isEmpty, "\(failures.all)")
    }

    /// Writes in flight together. Those that fail wait until there is room, and all is on the disk then.
    /// - Parameter isWriteback: false of a driver that does not flush, each of whose writes is durable when it is
    ///   completed.
    @Test(arguments: [
        ("raw", true), ("cluster_size=64k", true), ("cluster_size=4k,refcount_bits=64", true),
        ("cluster_size=512", true),
        ("cluster_size=16k,extended_l2=on", true), ("raw", false), ("cluster_size=64k", false),
    ])
    func nothingIsLostWhereThereIsNoRoom(image: String, isWriteback: Bool) throws {
        try onSmallFileSystem(image) { small in
            let count = Self.count
            let content = TemporaryDisk.pattern(Self.piece * count, seed: 3)
            do {
                let device = try small.device(.enospc)
                let driver = try BlockDriver(device, features: isWriteback ? [.version1, .blockFlush] : [.version1])
                try offerWrites(driver, content)
                driver.kick()
                try small.waitForStop()
                // Nothing is taken any more.
                try offerFlush(driver, index: count)
                driver.kick()
                small.pause(device)
                #expect(device.isStopped)
                #expect(try driver.usedCount() < count, "nothing failed")
                #expect(try status(count, driver) == 0xee, "a flush was taken of a disk that has stopped")
                // There is no room yet: it fails again.
                device.resume()
                try small.waitForStop(2)
                small.pause(device)
                #expect(device.isStopped)
                #expect(try driver.usedCount() < count + 1)
                small.makeRoom()
                device.resume()
                try driver.wait(for: count + 1)
                for index in 0...count { #expect(try status(index, driver) == 0, "request \(index)") }
                #expect(!device.isStopped && small.stopCount == 2)
                #expect(device.statistics.stops.value == 2 && device.statistics.failures == 0)
                #expect(device.statistics.writtenBytes == UInt64(content.count))
                // One line each time, also within a minute.
                #expect(
                    small.lines.all.count == 2
                        && small.lines.all.allSatisfy {
                            $0.contains("No space left on device") && $0.contains("; the machine is paused, and")
                        },
                    "\(small.lines.all)")
                device.reset()
            }
            try expectContent(content, small)
        }
    }

    /// What is on the disk when everything has been closed.
    private func expectContent(_ content: [UInt8], _ small: Small) throws {
        let driver = try BlockDriver(small.device(.report))
        for index in 0..<content.count / Self.piece {
            let (status, _, data) = try driver.request(
                BlockRequestType.read, sector: UInt64(index * Self.piece / 512), in: Self.piece)
            #expect(
                status == 0 && data == Array(content[index * Self.piece..<(index + 1) * Self.piece]), "piece \(index)")
        }
        driver.device.reset()
    }

    /// A write that fails in one queue stops the others too.
    @Test func theOtherQueuesTakeNothing() throws {
        try onSmallFileSystem("cluster_size=64k") { small in
            let count = Self.count
            let content = TemporaryDisk.pattern(Self.piece * count, seed: 4)
            do {
                let device = try small.device(.enospc, queues: 2)
                let driver = try BlockDriver(device, features: [.version1, .blockFlush, .blockMultiqueue], queues: 2)
                try offerWrites(driver, content)
                driver.kick()
                try small.waitForStop()
                driver.queue = 1
                try offerFlush(driver, index: count)
                driver.kick()
                small.pause(device)
                #expect(try status(count, driver) == 0xee)
                small.makeRoom()
                device.resume()
                try driver.wait(for: 1)
                #expect(try status(count, driver) == 0)
                driver.queue = 0
                try driver.wait(for: count)
                for index in 0..<count { #expect(try status(index, driver) == 0, "request \(index)") }
                device.reset()
            }
            try expectContent(content, small)
        }
    }

    /// A pause that is cancelled before it comes to the disk.
    @Test(arguments: ["raw", "cluster_size=64k"]) func resumesWhereItWasNotPausedYet(_ image: String) throws {
        try onSmallFileSystem(image) { small in
            let content = TemporaryDisk.pattern(Self.piece * Self.count, seed: 5)
            do {
                let device = try small.device(.enospc)
                let driver = try BlockDriver(device)
                try offerWrites(driver, content)
                driver.kick()
                try small.waitForStop()
                small.makeRoom()
                // What is in flight meanwhile may stop it again.
                try wait {
                    device.resume()
                    return try driver.usedCount() == Self.count
                }
                for index in 0..<Self.count { #expect(try status(index, driver) == 0, "request \(index)") }
                device.reset()
            }
            try expectContent(content, small)
        }
    }

    /// A driver that resets its device, or a machine that ends, while requests wait.
    @Test(arguments: ["raw", "cluster_size=64k"]) func aResetWhileStoppedForgetsThem(_ image: String) throws {
        try onSmallFileSystem(image) { small in
            let device = try small.device(.enospc)
            let driver = try BlockDriver(device)
            for round in 1...3 {
                try offerWrites(driver, TemporaryDisk.pattern(Self.piece * Self.count))
                driver.kick()
                try small.waitForStop(round)
                if round == 2 { small.pause(device) }
                try driver.start([.version1, .blockFlush])
                #expect(!device.isStopped)
            }
            small.makeRoom()
            let (status, _, _) = try driver.request(
                BlockRequestType.write, sector: 30_000, out: [UInt8](repeating: 5, count: 4096))
            #expect(status == 0)
            #expect(try driver.request(BlockRequestType.flush).status == 0)
            device.reset()
        }
    }

    /// Any error of the host stops, if it is to; by default one that is not about room does not. A file that is too
    /// short fails reads.
    @Test func otherErrors() throws {
        try onSmallFileSystem("raw") { small in
            let fill = "printf content >\(small.path) && truncate -s 1M \(small.path)"
            for policy in [DiskErrorPolicy.enospc, .stop] {
                guard system(fill) == 0 else { throw NothingCame(description: "no content") }
                let device = try small.device(policy)
                let driver = try BlockDriver(device)
                #expect(truncate(small.path, 0) == 0)
                let before = small.stopCount
                if policy == .stop {
                    let resuming = try Thread.start(name: "resuming") {
                        while small.stopCount == before { usleep(1000) }
                        _ = system(fill)
                        device.resume()
                    }
                    let (status, _, data) = try driver.request(BlockRequestType.read, in: 512)
                    #expect(status == 0 && data.prefix(7) == Array("content".utf8)[...])
                    resuming.join()
                } else {
                    #expect(try driver.request(BlockRequestType.read, in: 512).status == 1)
                }
                #expect(small.stopCount - before == (policy == .stop ? 1 : 0))
                device.reset()
            }
        }
    }

    @Test(arguments: ["raw", "cluster_size=64k"]) func whatIsReportedIsAnError(_ image: String) throws {
        try onSmallFileSystem(image) { small in
            let driver = try BlockDriver(small.device(.report))
            let piece = [UInt8](repeating: 1, count: 512 << 10)
            let statuses = try (0..<4).map {
                try driver.request(BlockRequestType.write, sector: UInt64($0 * 1024), out: piece).status
            }
            #expect(statuses.first == 0 && statuses.last == 1, "\(statuses)")
            #expect(small.stopCount == 0 && !driver.device.isStopped)
            #expect(small.lines.all.first?.hasSuffix("; the guest gets an I/O error") == true)
            driver.device.reset()
        }
    }

    @Test(arguments: ["raw", "cluster_size=64k"]) func whatIsIgnoredSucceedsForTheGuest(_ image: String) throws {
        try onSmallFileSystem(image) { small in
            let device = try small.device(.ignore)
            let driver = try BlockDriver(device)
            let piece = [UInt8](repeating: 1, count: 512 << 10)
            let statuses = try (0..<4).map {
                try driver.request(BlockRequestType.write, sector: UInt64($0 * 1024), out: piece).status
            }
            #expect(statuses == [0, 0, 0, 0])
            let statistics = device.statistics
            #expect(statistics.ignored.value > 0 && statistics.failures == 0)
            #expect(statistics.writes == 4 - statistics.ignored.value)
            #expect(statistics.writtenBytes == statistics.writes * UInt64(piece.count))
            #expect(
                small.lines.all.first?.hasSuffix("; ignored: success is reported to the guest") == true)
            device.reset()
        }
    }

    // MARK: Requests

    private func statusAddress(_ index: Int) -> GuestAddress { GuestAddress(0xf0_0000 + UInt64(index)) }

    private func status(_ index: Int, _ driver: BlockDriver) throws -> UInt8 {
        try driver.ram.readBytes(at: statusAddress(index), count: 1)[0]
    }

    /// Puts writes of all pieces of the content on the queue, one behind the other on the disk.
    private func offerWrites(_ driver: BlockDriver, _ content: [UInt8]) throws {
        for index in 0..<content.count / Self.piece {
            let data = GuestAddress(BlockDriver.data + UInt64(index * Self.piece))
            try driver.ram.write(Array(content[index * Self.piece..<(index + 1) * Self.piece]), at: data)
            try offer(
                driver, index, BlockRequestType.write, sector: UInt64(index * Self.piece / 512),
                [.init(address: data.rawValue, length: Self.piece, isWritable: false)])
        }
    }

    private func offerFlush(_ driver: BlockDriver, index: Int) throws {
        try offer(driver, index, BlockRequestType.flush, sector: 0, [])
    }

    private func offer(
        _ driver: BlockDriver, _ index: Int, _ type: UInt32, sector: UInt64, _ data: [QueueDriver.Buffer]
    ) throws {
        let header = GuestAddress(0xe0_0000 + UInt64(index) * 16)
        try driver.ram.write(BlockDriver.header(type, sector), at: header)
        try driver.ram.write([0xee as UInt8], at: statusAddress(index))
        _ = try driver.offer(
            [.init(address: header.rawValue, length: 16, isWritable: false)] + data
                + [.init(address: statusAddress(index).rawValue, length: 1, isWritable: true)])
    }
}

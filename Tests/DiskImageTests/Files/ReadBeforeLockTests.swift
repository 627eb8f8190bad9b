// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import DiskImage

/// What is read of an image before its lock is held may be another's by the time it is.
@Suite(.timed) struct ReadBeforeLockTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// Each of many that come at once makes the disk longer, or says that another has it.
    @Test(arguments: ["disk.raw", "disk.qcow2"]) func everyResizeThatIsReportedDoneCounts(name: String) throws {
        let path = directory.file(name)
        qemuImage("create", "-q", "-f", name.hasSuffix("raw") ? "raw" : "qcow2", path, "1M")
        let done = try race(path, threads: 12, rounds: 8) { engine in
            try engine.resize(to: engine.image.size + (1 << 20))
        }
        let image = try DiskImage(path: path, options: readOnly)
        #expect(image.size == UInt64(1 + done) << 20)
        #expect(done > 0)
    }

    /// The same for snapshots, whose table is read when the image is opened.
    @Test func everySnapshotThatIsReportedMadeIsThere() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        let done = try race(path, threads: 12, rounds: 4) { engine in try engine.createSnapshot(named: "one") }
        let engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try engine.snapshots().count == done)
        #expect(done > 0)
        expectSound(path)
    }

    /// Opens an image for writing in many threads at once, and does something to it.
    /// - Returns: how many could; for the others it was locked.
    private func race(
        _ path: String, threads: Int, rounds: Int, _ change: @escaping @Sendable (inout DiskEngine) throws -> Void
    ) throws -> Int {
        let counts = Guarded((done: 0, others: [String]()))
        do {
            // They have ended when it goes.
            let running = ThreadPool()
            for _ in 0..<threads {
                try running.add(
                    Thread.start(name: "racer", stackSize: 1 << 20) {
                        for _ in 0..<rounds {
                            do {
                                var engine = try DiskEngine(DiskImage(path: path), depth: 1)
                                try change(&engine)
                                counts.withLock { $0.done += 1 }
                            } catch DiskImageError.locked {
                            } catch {
                                counts.withLock { $0.others.append("\(error)") }
                            }
                        }
                    })
            }
        }
        #expect(counts.withLock { $0.others } == [])
        return counts.withLock { $0.done }
    }

    /// Who waits for the lock of a file sees the size that it has afterwards.
    @Test func aFileThatGrowsBeforeTheLockHasItsNewSize() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 1, count: 4096))
        let size = try openWhileHeld(path) {
            #expect(truncate(path, 8192) == 0)
        } examine: {
            $0.size
        }
        #expect(size == 8192)
    }

    /// Who waits for the lock of a file gets the one that has the name afterwards.
    @Test func aFileThatIsReplacedBeforeTheLockIsOpenedAnew() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 1, count: 4096))
        let other = try directory.write("other.raw", [UInt8](repeating: 2, count: 4096))
        let identity = ImageFile.Identity(ofPath: other)
        let found = try openWhileHeld(path) {
            #expect(rename(other, path) == 0)
        } examine: {
            $0.identities[0]
        }
        #expect(found == identity)
    }

    /// The same for the file that a new image replaces: one that was put there meanwhile and is in use stays.
    @Test func aFileThatIsPutThereMeanwhileAndInUseIsNotReplaced() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 1, count: 4096))
        let other = try directory.write("other.raw", [UInt8](repeating: 2, count: 4096))
        let user = try DiskImage(path: other)
        let error = Guarded<DiskImageError?>(nil)
        try whileHeld(path) {
            #expect(rename(other, path) == 0)
        } wait: {
            do throws(DiskImageError) { _ = try NewFile(path: path, replacing: true) } catch let found {
                error.withLock { $0 = found }
            }
        }
        #expect(error.withLock { $0 } == .locked(path: path, forWriting: true))
        withExtendedLifetime(user.size) {}
    }

    private func openWhileHeld<Answer: Sendable>(
        _ path: String, change: () -> Void, examine: @escaping @Sendable (DiskImage) -> Answer
    ) throws -> Answer {
        let answer = Guarded<Result<Answer, DiskImageError>?>(nil)
        try whileHeld(path, change) {
            do throws(DiskImageError) {
                let found = examine(try DiskImage(path: path))
                answer.withLock { $0 = .success(found) }
            } catch {
                answer.withLock { $0 = .failure(error) }
            }
        }
        return try #require(answer.withLock { $0 }).get()
    }

    /// Has a thread wait for a file that is in use, and the file changed and let go when the thread has opened it.
    private func whileHeld(_ path: String, _ change: () -> Void, wait: @escaping @Sendable () -> Void) throws {
        var holder: Holder? = Holder(try ImageFile(path: path, writable: true, cache: .writeback, locking: true))
        let identity = try #require(ImageFile.Identity(ofPath: path))
        let before = Self.descriptors(identity)
        let waiter = try Thread.start(name: "waiter", stackSize: 1 << 20, wait)
        while Self.descriptors(identity) == before { sched_yield() }
        change()
        holder?.letGo()
        holder = nil
        waiter.join()
    }

    private final class Holder {
        private var file: ImageFile?
        init(_ file: consuming ImageFile) { self.file = consume file }
        func letGo() { file = nil }
    }

    /// How many descriptors of this process are a file's.
    private static func descriptors(_ identity: ImageFile.Identity) -> Int {
        (0..<4096).count { number in
            var status = stat()
            return unsafe fstat(Int32(number), &status) == 0 && ImageFile.Identity(status) == identity
        }
    }
}

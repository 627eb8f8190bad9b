// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Encryption, decompression and what else takes long, by one engine: the other's requests come and go meanwhile.
@Suite(.timed) struct BulkWorkTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// The other engine, which does whole requests in the middle of the first one's work.
    private final class Neighbour: @unchecked Sendable {
        // In the one thread of the test.
        var engine: DiskEngine?
        var wanted: BulkWork?
        var met: [BulkWork] = []
        var read: [UInt8] = []
        var failure: String?

        /// Called by the first engine's work. If that had the image's lock, this would stop the process: a thread does
        /// not take it twice.
        func hear(_ work: BulkWork) {
            met.append(work)
            guard work == wanted else { return }
            // What is done here is work, too.
            wanted = nil
            do {
                try engine!.write(256 << 10, [UInt8](repeating: 7, count: 512))
                try engine!.write(260 << 10, [UInt8](repeating: 8, count: 4096))
                try engine!.perform(.flush)
                read = try engine!.read(256 << 10, 8192)
            } catch {
                failure = "\(error)"
            }
        }
    }

    @Test(arguments: BulkWork.allCases, [true, false]) func othersGoOnMeanwhile(work: BulkWork, usesRing: Bool) throws {
        // The old contents end before the disk does, so that it has zeroes behind.
        let old = work == .decompression ? [UInt8](repeating: 5, count: 512 << 10) : randomBytes(512 << 10, seed: 3)
        try directory.write("base.raw", old)
        var contents = old + [UInt8](repeating: 0, count: 512 << 10)
        let path = directory.file("disk.qcow2")
        var options = unlocked
        if work == .decompression {
            try directory.write("base.raw", contents)
            qemuImage(
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", directory.file("base.raw"), path)
        } else {
            let encrypted = try Encrypted(directory)
            var layout = QCOW2Options()
            layout.clusterSize = 4096
            _ = try encrypted.create(
                "disk.qcow2", size: contents.count, layout, backing: BackingReference(name: "base.raw", format: .raw))
            options = encrypted.options()
        }
        let neighbour = Neighbour()
        var calls = FileCalls.host
        calls.bulkWork = { neighbour.hear($0) }
        do {
            let shared = try SharedImage(DiskImage(path: path, options: options), calls: calls)
            var engine = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            neighbour.engine = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            // The slice is in memory, and what is read back is encrypted.
            try engine.write(4096, Array(contents[4096..<8192]))
            neighbour.wanted = work
            switch work {
            case .encryption:
                contents.replaceSubrange(8192..<16384, with: repeatElement(1, count: 8192))
                try engine.write(8192, [UInt8](repeating: 1, count: 8192))
            case .decryption, .decompression:
                #expect(try engine.read(4096, 8192) == Array(contents[4096..<12288]))
            case .merging:
                contents.replaceSubrange(20992..<21504, with: repeatElement(2, count: 512))
                try engine.write(20992, [UInt8](repeating: 2, count: 512))
            case .zeroes:
                #expect(try engine.read(508 << 10, 8192) == Array(contents[508 << 10..<516 << 10]))
            }
            #expect(neighbour.wanted == nil && neighbour.met.contains(work))
            #expect(neighbour.failure == nil)
            contents.replaceSubrange(256 << 10..<256 << 10 + 512, with: repeatElement(7, count: 512))
            contents.replaceSubrange(260 << 10..<264 << 10, with: repeatElement(8, count: 4096))
            #expect(isSame(neighbour.read, Array(contents[256 << 10..<264 << 10])))
            neighbour.engine = nil
        }
        options.readOnly = true
        var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4)
        #expect(try isSame(engine.readAll(), contents))
    }

    /// A cluster's copy is merged while its neighbour in the cluster waits, and is gone on with then: claims last as
    /// long as the work.
    @Test(arguments: [true, false]) func aClaimLastsAsLongAsTheWork(usesRing: Bool) throws {
        let old = randomBytes(64 << 10, seed: 4)
        try directory.write("base.raw", old)
        let path = directory.file("disk.qcow2")
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", directory.file("base.raw"), "-F", "raw", path)
        final class Second: @unchecked Sendable {
            var engine: DiskEngine?
            let memory = SharedImageTests.Buffer([UInt8](repeating: 2, count: 512))
            var isWanted = false
            var isWaiting = false
        }
        let second = Second()
        var calls = FileCalls.host
        calls.bulkWork = { work in
            guard work == .merging, second.isWanted, let request = second.engine!.acquire() else { return }
            second.isWanted = false
            // The same cluster: it has to wait, and does not see what is half done.
            unsafe second.engine!.start(
                request, .write, offset: 1024, length: 512, vectors: second.memory.vector, count: 1)
            try? second.engine!.submit()
            second.isWaiting = second.engine!.nextCompletion() == nil && second.engine!.waitsForOthers()
        }
        do {
            let shared = try SharedImage(DiskImage(path: path, options: unlocked), calls: calls)
            var first = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            second.engine = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            #expect(try first.read(0, 512) == Array(old[0..<512]))
            second.isWanted = true
            try first.write(512, [UInt8](repeating: 1, count: 512))
            #expect(second.isWaiting)
            let ended = try second.engine!.waitForCompletion()
            #expect(ended?.error == 0)
            second.engine!.release(try #require(ended).request)
            try first.perform(.flush)
            second.engine = nil
        }
        expectSound(path)
        var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false)))
        let expected =
            Array(old[..<512]) + [UInt8](repeating: 1, count: 512) + [UInt8](repeating: 2, count: 512) + old[1536...]
        #expect(try engine.readAll() == expected)
    }
}

extension DiskEngine {
    /// Whether a request waits for what another engine does.
    fileprivate func waitsForOthers() -> Bool { hasWaiting }
}

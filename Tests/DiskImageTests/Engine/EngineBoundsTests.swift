// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// How much an engine has under way, does in a turn of its owner's, and still does of what is given up.
@Suite(.timed) struct EngineBoundsTests {
    let directory = TemporaryDirectory()
    private static let mebi: UInt64 = 1 << 20

    /// A sparse raw image.
    private func image(_ size: UInt64) throws -> DiskImage {
        let path = try directory.write("disk.raw", [])
        let status = unsafe truncate(path, off_t(size))
        #expect(status == 0)
        return try DiskImage(path: path, options: readOnly)
    }

    /// Memory of 4 MiB, as often as a request needs it.
    private final class Memory {
        let start = UnsafeMutableRawPointer.allocate(byteCount: 4 << 20, alignment: 4096)
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 64)

        init() { for index in 0..<64 { unsafe vectors[index] = iovec(iov_base: start, iov_len: 4 << 20) } }

        deinit {
            unsafe vectors.deallocate()
            unsafe start.deallocate()
        }
    }

    private func start(_ engine: inout DiskEngine, _ memory: Memory, bytes: UInt64) throws {
        let free = engine.acquire()
        let request = try #require(free)
        unsafe engine.start(
            request, .read, offset: 0, length: bytes, vectors: memory.vectors, count: Int(bytes / (4 * Self.mebi)))
    }

    /// A pipe in the place of an image's file: reads end when there is something, or are cancelled.
    private func pipe(insteadOf file: Int32) -> (input: Int32, output: Int32) {
        var ends: [Int32] = [-1, -1]
        #expect(unsafe Glibc.pipe(&ends) == 0)
        #expect(dup2(ends[0], file) == file)
        return (ends[0], ends[1])
    }

    @Test func theBytesUnderWayAreBounded() throws {
        let image = try image(256 * Self.mebi)
        let ends = pipe(insteadOf: image.descriptor(0))
        defer { close(ends.input); close(ends.output) }
        let memory = Memory()
        var engine = try DiskEngine(image, depth: 64, segments: 64)
        guard engine.usesRing else { return withKnownIssue("no io_uring here") { Issue.record("not tried") } }
        for _ in 0..<64 { try start(&engine, memory, bytes: 8 * Self.mebi) }
        try engine.submit()
        let (underWay, outstanding, inFlight) = (engine.bytesInFlight, engine.outstanding, engine.inFlight)
        // Calls of 4 MiB each, though the requests have 8.
        #expect(underWay == WorkBudget.maximumBytesInFlight && outstanding == 16 && inFlight == 64)
        engine.cancelAll()
        let (left, after) = (engine.bytesInFlight, engine.inFlight)
        #expect(left == 0 && after == 0)
        // All can be taken again.
        for _ in 0..<64 { try start(&engine, memory, bytes: 4 * Self.mebi) }
        engine.cancelAll()
        let last = engine.inFlight
        #expect(last == 0)
    }

    @Test func enginesThatShareADiskShareTheBound() throws {
        let image = try SharedImage(self.image(64 * Self.mebi))
        for share in [1, 2, 64] {
            let engine = try DiskEngine(image, depth: 1, segments: 1, share: share)
            let most = engine.maximumBytesInFlight
            #expect(
                most == max(WorkBudget.maximumBytesInFlight / UInt64(share), WorkBudget.largestCall) || !engine.usesRing
            )
        }
    }

    /// Requests that are more than a turn are done, turn by turn.
    @Test(arguments: [true, false]) func aTurnIsBounded(usesRing: Bool) throws {
        let path = directory.file("disk.qcow2")
        try ImageCreation(path: path, format: .qcow2, size: 1 << 40).create()
        let memory = Memory()
        unsafe memset(memory.start, 0xff, 4 << 20)
        var engine = try DiskEngine(DiskImage(path: path), depth: 8, segments: 64, usesRing: usesRing)
        engine.beginTurn()
        for _ in 0..<4 { try start(&engine, memory, bytes: 128 * Self.mebi) }
        try engine.submit()
        var turns = 0, ended = 0
        while ended < 4 {
            while let completion = engine.nextCompletion() {
                #expect(completion.error == 0)
                engine.release(completion.request)
                ended += 1
            }
            let isOver = engine.isTurnOver
            // 64 MiB of zeroes are a turn.
            #expect(isOver || ended == 4)
            turns += 1
            guard turns < 100 else { break }
            engine.beginTurn()
        }
        #expect(turns >= 8 && turns <= 12, "\(turns) turns")
        #expect(unsafe memory.start.load(as: UInt64.self) == 0)
    }

    /// A change of size is more than a turn, and waits for its own requests: those have no other turn.
    @Test(arguments: [true, false], [1, 2]) func aResizeIsNotBoundedByATurn(usesRing: Bool, engines: Int) throws {
        let path = directory.file("disk.qcow2")
        try ImageCreation(path: path, format: .qcow2, size: 64 << 20).create()
        do {
            let shared = try SharedImage(DiskImage(path: path), calls: .host, isExclusive: engines == 1)
            var engine = try DiskEngine(shared, depth: 8, segments: 8, usesRing: usesRing, share: engines)
            let other = engines == 1 ? nil : try DiskEngine(shared, depth: 8, segments: 8, usesRing: usesRing, share: 2)
            for size in [20 << 30, 1 << 40] as [UInt64] {
                engine.beginTurn()
                try engine.resize(to: size)
                let now = engine.size
                #expect(now == size)
                // The owner's next turn is bounded again.
                engine.beginTurn()
                try engine.perform(.writeZeroes, at: 0, length: 1 << 16)
            }
            _ = consume other
        }
        qemuImage("check", "-q", path)
    }

    /// An owner that keeps all requests does not take one that was never started for one that succeeded.
    @Test func whatHasNoRequestFails() throws {
        var engine = try DiskEngine(image(Self.mebi), depth: 2)
        for _ in 0..<2 {
            let free = engine.acquire()
            #expect(free != nil)
        }
        #expect(throws: DiskImageError.self) { try engine.perform(.flush) }
    }

    /// Giving up waits for what the kernel has also when it takes no calls any more, and what it never got does not
    /// come later.
    @Test func givingUpWaitsThoughTheKernelTakesNoCalls() throws {
        let image = try image(Self.mebi)
        let ends = pipe(insteadOf: image.descriptor(0))
        defer { close(ends.input); close(ends.output) }
        var engine = try DiskEngine(image, depth: 4)
        guard engine.usesRing else { return withKnownIssue("no io_uring here") { Issue.record("not tried") } }
        let buffers = (0..<3).map { _ in SharedImageTests.Buffer([UInt8](repeating: 0, count: 4096)) }
        func read(_ buffer: SharedImageTests.Buffer) throws {
            let free = engine.acquire()
            unsafe engine.start(try #require(free), .read, offset: 0, length: 4096, vectors: buffer.vector, count: 1)
        }
        try read(buffers[0])
        try engine.submit()
        // Another file has the ring's number: calls fail. It is readable when the ring is, which stays there under
        // another number.
        let ring = engine.descriptor, kept = dup(ring)
        let epoll = try Epoll()
        try epoll.add(kept, .input, token: 0)
        #expect(dup2(epoll.rawValue, ring) == ring)
        try read(buffers[1])
        let contents = randomBytes(4096, seed: 1), output = ends.output
        let writer = try Thread.start(name: "writer") {
            usleep(20_000)
            unsafe contents.withUnsafeBytes { _ = unsafe write(output, $0.baseAddress, $0.count) }
        }
        engine.cancelAll()
        #expect(buffers[0].contents == contents)
        writer.join()
        let inFlight = engine.inFlight, queued = engine.queued(below: .max)
        #expect(inFlight == 0 && queued == 0)
        // The kernel takes calls again: of the second read it never hears.
        #expect(dup2(kept, ring) == ring)
        close(kept)
        try read(buffers[2])
        unsafe contents.reversed().withUnsafeBytes { _ = unsafe write(output, $0.baseAddress, $0.count) }
        let completion = try engine.waitForCompletion()
        #expect(completion?.error == 0 && buffers[2].contents == contents.reversed())
        #expect(buffers[1].contents == [UInt8](repeating: 0, count: 4096))
    }
}

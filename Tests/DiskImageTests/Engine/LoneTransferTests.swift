// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Which transfers are system calls of the engine's thread, and what becomes of those.
@Suite(.timed) struct LoneTransferTests {
    let directory = TemporaryDirectory()
    private typealias Buffer = SharedImageTests.Buffer
    private let memory = Memory()

    /// The memory of all requests, which lives as long as the test.
    private final class Memory {
        var buffers: [Buffer] = []
    }

    /// Counts the transfers that are system calls, and may decide upon their results.
    private final class Calls: Sendable {
        private let state = Guarded((writes: 0, reads: 0))
        var writes: Int { state.withLock { $0.writes } }
        var reads: Int { state.withLock { $0.reads } }

        /// - Parameters:
        ///   - write: the result of a write by its number, or nil for the host's.
        ///   - read: the same for a read.
        func calls(
            write: @escaping @Sendable (Int) -> Int? = { _ in nil },
            read: @escaping @Sendable (Int) -> Int? = { _ in nil }
        ) -> FileCalls {
            var calls = FileCalls.host
            unsafe calls.write = { [self] file, vectors, count, offset in
                let number = state.withLock {
                    $0.writes += 1; return $0.writes - 1
                }
                guard let result = write(number) else {
                    return unsafe FileCalls.host.write(file, vectors, count, offset)
                }
                guard result > 0 else { return result }
                // A part of the first vector.
                var first = unsafe vectors[0]
                unsafe first.iov_len = result
                return unsafe FileCalls.host.write(file, &first, 1, offset)
            }
            unsafe calls.readCached = { [self] file, vectors, count, offset in
                let number = state.withLock {
                    $0.reads += 1; return $0.reads - 1
                }
                if let result = read(number) { return result }
                return unsafe FileCalls.host.readCached(file, vectors, count, offset)
            }
            return calls
        }
    }

    /// An engine with a ring on a raw disk, unless the host has none.
    private func engine(
        _ calls: FileCalls, bytes: [UInt8] = randomBytes(1 << 20, seed: 1), cache: CacheMode = .writeback
    ) throws -> DiskEngine? {
        let path = try directory.write("disk.raw", bytes)
        let image = try DiskImage(path: path, options: DiskImageOptions(cache: cache, locking: false))
        let engine = try DiskEngine(image, depth: 8, segments: 4, calls: calls, usesRing: true)
        guard engine.usesRing else {
            withKnownIssue("no io_uring here") { Issue.record("not tried") }
            return nil
        }
        return engine
    }

    private func start(
        _ engine: inout DiskEngine, _ operation: DiskOperation, _ offset: UInt64, _ buffer: Buffer
    ) throws {
        memory.buffers.append(buffer)
        let free = engine.acquire()
        unsafe engine.start(
            try #require(free), operation, offset: offset, length: UInt64(buffer.bytes.count), vectors: buffer.vector,
            count: 1)
    }

    /// All requests end. Returns their errors.
    private func end(_ engine: inout DiskEngine) throws -> [Int32] {
        var errors: [Int32] = []
        while let completion = try engine.waitForCompletion() {
            errors.append(completion.error)
            engine.release(completion.request)
        }
        return errors
    }

    @Test(arguments: [512, 4096, Int(LoneTransfer.largest)]) func aLoneTransferIsASystemCall(size: Int) throws {
        let calls = Calls()
        guard var engine = try engine(calls.calls()) else { return }
        let piece = randomBytes(size, seed: 2)
        try engine.write(8192, piece)
        #expect(calls.writes == 1 && calls.reads == 0)
        #expect(try directory.read("disk.raw")[8192..<8192 + size] == piece[...])
        #expect(try engine.read(8192, size) == piece)
        #expect(calls.writes == 1 && calls.reads == 1)
    }

    /// One comes back from the call that looks for completions, without anything that wakes the owner.
    @Test func aLoneTransferHasEndedOnceItIsSubmitted() throws {
        let calls = Calls()
        guard var engine = try engine(calls.calls()) else { return }
        for round in 0..<100 {
            engine.beginTurn()
            let isWrite = round % 3 == 0
            try start(&engine, isWrite ? .write : .read, UInt64(round) * 4096, Buffer(randomBytes(4096, seed: 3)))
            // Not before: another one may follow.
            let queued = engine.queued(below: .max)
            #expect(calls.writes + calls.reads == round && queued == 1)
            try engine.submit()
            let completion = engine.nextCompletion()
            #expect(completion?.error == 0 && calls.writes + calls.reads == round + 1)
            let ended = try #require(completion)
            engine.release(ended.request)
        }
    }

    @Test func whatIsNotAloneGoesToTheRing() throws {
        let calls = Calls()
        guard var engine = try engine(calls.calls()) else { return }
        for count in 2...8 {
            let buffers = (0..<count).map { Buffer(randomBytes(4096, seed: UInt64($0))) }
            for (index, buffer) in buffers.enumerated() {
                try start(&engine, index % 2 == 0 ? .write : .read, UInt64(index) << 16, buffer)
            }
            #expect(try end(&engine) == Array(repeating: 0, count: count))
        }
        #expect(calls.writes == 0 && calls.reads == 0)
        // Nor what would wait for a flush that has been begun, or have it wait.
        try start(&engine, .write, 0, Buffer(randomBytes(4096, seed: 1)))
        let free = engine.acquire()
        engine.start(try #require(free), .flush, offset: 0, length: 0)
        #expect(try end(&engine) == [0, 0])
        #expect(calls.writes == 0)
        // The next one is alone again.
        try engine.write(0, randomBytes(4096, seed: 7))
        #expect(calls.writes == 1)
    }

    /// While the kernel has a request, another one does not keep the thread.
    @Test func aTransferBesideOneOfTheRingGoesToTheRing() throws {
        let calls = Calls()
        guard var engine = try engine(calls.calls()) else { return }
        // A pipe in the file's place: reads end when there is something.
        var ends: [Int32] = [-1, -1]
        #expect(unsafe pipe(&ends) == 0)
        let file = engine.image.descriptor(0), kept = dup(file)
        #expect(dup2(ends[0], file) == file)
        let buffers = (0..<2).map { _ in Buffer([UInt8](repeating: 0, count: 4096)) }
        try start(&engine, .read, 0, buffers[0])
        try engine.submit()
        // A pipe has no offsets: the ring was asked next.
        let first = engine.nextCompletion()
        #expect(first == nil && calls.reads == 1)
        #expect(dup2(kept, file) == file)
        try start(&engine, .write, 0, buffers[1])
        try start(&engine, .read, 4096, buffers[1])
        for _ in 0..<2 {
            let ended = try engine.waitForCompletion()
            let completion = try #require(ended)
            engine.release(completion.request)
        }
        let left = engine.inFlight
        #expect(calls.writes == 0 && calls.reads == 1 && left == 1)
        let contents = randomBytes(4096, seed: 1)
        #expect(unsafe contents.withUnsafeBytes { unsafe write(ends[1], $0.baseAddress, $0.count) } == 4096)
        #expect(try end(&engine) == [0])
        #expect(buffers[0].contents == contents)
        for number in ends + [kept] { close(number) }
    }

    /// Neither a large copy nor a disk without the page cache keeps the thread.
    @Test func largeTransfersAndDirectIOGoToTheRing() throws {
        let calls = Calls()
        guard var engine = try engine(calls.calls()) else { return }
        let large = randomBytes(Int(LoneTransfer.largest) + 512, seed: 2)
        try engine.write(0, large)
        #expect(try engine.read(0, large.count) == large)
        #expect(calls.writes == 0 && calls.reads == 0)
        guard var direct = try self.engine(calls.calls(), cache: .none) else { return }
        let buffer = Buffer(randomBytes(4096, seed: 3))
        try start(&direct, .write, 4096, buffer)
        #expect(try end(&direct) == [0])
        try start(&direct, .read, 4096, buffer)
        #expect(try end(&direct) == [0])
        #expect(calls.writes == 0 && calls.reads == 0)
        #expect(try directory.read("disk.raw")[4096..<8192] == buffer.contents[...])
    }

    /// What the page cache does not have, or has in part, the ring reads; a file system that cannot tell is asked once.
    @Test(arguments: [EAGAIN, EOPNOTSUPP, EINTR, ESPIPE]) func aReadThatWouldWaitGoesToTheRing(error: Int32) throws {
        let calls = Calls(), contents = randomBytes(1 << 20, seed: 1)
        guard var engine = try engine(calls.calls(read: { _ in -Int(error) }), bytes: contents) else { return }
        for offset in [0, 512, 1024, 8192] {
            #expect(try engine.read(UInt64(offset), 4096) == Array(contents[offset..<offset + 4096]))
        }
        #expect(calls.reads == (error == EOPNOTSUPP ? 1 : 4))
    }

    @Test func aReadOfWhichThePageCacheHasAPartGoesToTheRing() throws {
        let calls = Calls(), contents = randomBytes(1 << 20, seed: 1)
        guard var engine = try engine(calls.calls(read: { $0 == 0 ? 512 : 0 }), bytes: contents) else { return }
        #expect(try engine.read(512, 4096) == Array(contents[512..<4608]))
        #expect(try engine.read(1024, 4096) == Array(contents[1024..<5120]))
        #expect(calls.reads == 2)
    }

    /// The last sector of a file that ends within it reads as zeroes from there on.
    @Test func theEndOfTheFileIsReadAsEver() throws {
        let calls = Calls(), contents = randomBytes(4096 + 100, seed: 1)
        guard var engine = try engine(calls.calls(), bytes: contents) else { return }
        #expect(try engine.read(4096, 512) == contents[4096...] + [UInt8](repeating: 0, count: 412))
        #expect(try engine.read(0, 4608) == contents + [UInt8](repeating: 0, count: 412))
    }

    @Test func shortAndInterruptedWritesAreContinued() throws {
        let calls = Calls(), piece = randomBytes(4096, seed: 2)
        guard
            var engine = try engine(calls.calls(write: { [1000, -Int(EINTR), 1, -Int(EAGAIN), nil][min($0, 4)] }))
        else { return }
        try engine.write(512, piece)
        #expect(calls.writes == 5)
        #expect(try directory.read("disk.raw")[512..<4608] == piece[...])
    }

    @Test(arguments: [ENOSPC, EIO, EFBIG, EDQUOT]) func anErrorIsTheRequests(error: Int32) throws {
        let calls = Calls()
        // The first is done in part, then fails; the second fails at once; the third succeeds.
        guard var engine = try engine(calls.calls(write: { [1024, -Int(error), -Int(error), nil][min($0, 3)] }))
        else { return }
        let buffer = Buffer(randomBytes(4096, seed: 2))
        for (offset, failed) in [(8192, 9216), (4096, 4096)] as [(UInt64, UInt64)] {
            try start(&engine, .write, offset, buffer)
            let ended = try engine.waitForCompletion()
            let completion = try #require(ended)
            let reason = SystemCallError("write", errno: error)
            let (failure, canRetry) = (engine.failure(of: completion), engine.canRetry(completion))
            #expect(completion.error == error && canRetry)
            #expect(failure == .transfer(path: directory.file("disk.raw"), offset: failed, length: nil, reason))
            #expect(completion.isOutOfRoom == (error == ENOSPC || error == EDQUOT))
            engine.release(completion.request)
        }
        try start(&engine, .write, 8192, buffer)
        #expect(try end(&engine) == [0])
        #expect(try directory.read("disk.raw")[8192..<12288] == buffer.contents[...])
    }

    /// What is given up before it is submitted is not done.
    @Test(arguments: [DiskOperation.write, .read]) func whatIsGivenUpBeforeItIsSubmittedIsNotDone(
        operation: DiskOperation
    ) throws {
        let calls = Calls(), contents = randomBytes(1 << 20, seed: 1)
        guard var engine = try engine(calls.calls(), bytes: contents) else { return }
        let buffer = Buffer([UInt8](repeating: 7, count: 4096))
        try start(&engine, operation, 4096, buffer)
        engine.cancelAll()
        let (left, outstanding, queued) = (engine.inFlight, engine.outstanding, engine.queued(below: .max))
        #expect(left == 0 && outstanding == 0 && queued == 0)
        #expect(calls.writes == 0 && calls.reads == 0)
        #expect(buffer.contents == [UInt8](repeating: 7, count: 4096))
        #expect(try directory.read("disk.raw") == contents)
        // The engine goes on.
        try start(&engine, .read, 4096, buffer)
        #expect(try end(&engine) == [0])
        #expect(buffer.contents == Array(contents[4096..<8192]))
    }

    /// An engine goes while it holds one, or has the result of one.
    @Test(arguments: [true, false]) func anEngineGoesWithOne(isSubmitted: Bool) throws {
        let calls = Calls(), contents = randomBytes(1 << 20, seed: 1)
        let buffer = Buffer([UInt8](repeating: 7, count: 4096))
        do {
            guard var engine = try engine(calls.calls(), bytes: contents) else { return }
            try start(&engine, .write, 4096, buffer)
            if isSubmitted { try engine.submit() }
        }
        #expect(calls.writes == (isSubmitted ? 1 : 0))
        let written = isSubmitted ? buffer.contents : Array(contents[4096..<8192])
        #expect(try Array(directory.read("disk.raw")[4096..<8192]) == written)
    }

    /// Requests one at a time and several at a time, with flushes among them, do what an array does; the image is
    /// sound.
    @Test(arguments: ["raw", "qcow2"], [1, 2]) func lonelyAndBusyTimesTakeTurns(format: String, engines: Int) throws {
        let calls = Calls(), path = directory.file("disk.\(format)"), disk = Model()
        qemuImage("create", "-q", "-f", format, path, "\(Model.size)")
        do {
            let image = try DiskImage(path: path, options: DiskImageOptions(locking: false))
            let shared = SharedImage(image, calls: calls.calls(), isExclusive: engines == 1)
            var first = try DiskEngine(shared, depth: 8, segments: 4)
            guard first.usesRing else { return withKnownIssue("no io_uring here") { Issue.record("not tried") } }
            if engines == 1 {
                for round in 0..<300 { try work(&first, round, disk) }
            } else {
                var second = try DiskEngine(shared, depth: 8, segments: 4)
                for round in 0..<150 {
                    try work(&first, 2 * round, disk)
                    try work(&second, 2 * round + 1, disk)
                }
            }
            #expect(try first.readAll() == disk.bytes)
            #expect(calls.writes > 10 && calls.reads > 10)
        }
        if format == "qcow2" { expectSound(path) }
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try engine.readAll() == disk.bytes)
    }

    private final class Model {
        static let size = 4 << 20
        var bytes = [UInt8](repeating: 0, count: size)
        var generator = SeededGenerator(seed: 0x10e)
    }

    /// One request, or several in each third round, and a flush from time to time.
    private func work(_ engine: inout DiskEngine, _ round: Int, _ disk: Model) throws {
        let count = round % 3 == 0 ? Int.random(in: 2...4, using: &disk.generator) : 1
        var reads: [(buffer: Buffer, range: Range<Int>)] = []
        for place in (0..<32).shuffled(using: &disk.generator).prefix(count) {
            let offset = place << 17 | Int.random(in: 0..<64, using: &disk.generator) << 9
            let length = Int.random(in: 1...160, using: &disk.generator) << 9
            let range = offset..<min(offset + length, Model.size)
            let buffer = Buffer(randomBytes(range.count, seed: disk.generator.next()))
            if Bool.random(using: &disk.generator) {
                reads.append((buffer, range))
                try start(&engine, .read, UInt64(offset), buffer)
            } else {
                disk.bytes.replaceSubrange(range, with: buffer.contents)
                try start(&engine, .write, UInt64(offset), buffer)
            }
        }
        let errors = try end(&engine)
        #expect(errors == Array(repeating: 0, count: count), "round \(round)")
        for read in reads { #expect(read.buffer.contents == Array(disk.bytes[read.range]), "round \(round)") }
        if round % 10 == 9 { try engine.perform(.flush) }
    }
}

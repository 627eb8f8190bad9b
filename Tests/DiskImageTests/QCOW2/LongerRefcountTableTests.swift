// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// The refcount table ends, and the host fails while a longer one is put in its place.
@Suite(.timed) struct LongerRefcountTableTests {
    let directory = TemporaryDirectory(inMemory: true)

    enum Step: Int, CaseIterable, Sendable {
        /// The new table and its blocks are made durable.
        case synchronisation
        /// The header names the table. That it was written the host denies.
        case header
        /// That is made durable.
        case headerSynchronisation
    }

    private static let size = 256 << 10, seed: UInt64 = 23
    /// Where the table of such an image ends, in bytes of the file.
    private static let end = 2 << 20

    /// An image with 8 KiB of data and 4 KiB of its file left that the table counts.
    private func makeImage(size: Int = size) throws -> (path: String, bytes: [UInt8]) {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "\(size)")
        qemuIO(path, ["write -P 3 0 8k"])
        var bytes = try directory.read("disk.qcow2")
        #expect(bytes.bigEndian32(at: 56) == 1)
        bytes += [UInt8](repeating: 0, count: Self.end - 4096 - bytes.count)
        try directory.write("disk.qcow2", bytes)
        return (path, bytes)
    }

    /// The calls of a log, in which one step fails, once.
    private func calls(_ log: CrashLog, failing: Step) -> FileCalls {
        // How many of the steps, and of what comes before the first, have come.
        let come = Guarded(0)
        let host = log.calls
        var calls = host
        unsafe calls.write = { file, vectors, count, offset in
            let result = unsafe host.write(file, vectors, count, offset)
            return come.withLock { come in
                if come == 0, offset == off_t(Self.end) { come = 1 }
                guard come == 2, offset == 48 else { return result }
                come = 3
                return failing == .header ? -Int(EIO) : result
            }
        }
        calls.synchronize = { file in
            let isFailing = come.withLock { come in
                guard come == 1 || come == 3 else { return false }
                come += 1
                return come == 2 ? failing == .synchronisation : failing == .headerSynchronisation
            }
            return isFailing ? -Int(EIO) : host.synchronize(file)
        }
        return calls
    }

    private func open(_ path: String, _ calls: FileCalls) throws -> DiskEngine {
        try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4, segments: 4, calls: calls)
    }

    private func contents(_ path: String) throws -> [UInt8] {
        var engine = try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false)), depth: 4, usesRing: false)
        return try engine.readAll()
    }

    /// It is unknown afterwards which table the image has: nothing is written any more; whenever the
    /// process is killed, or the power fails, the image has no errors; and opened anew it goes on.
    @Test(arguments: Step.allCases) func nothingIsWrittenAfterAFailure(step: Step) throws {
        let (path, start) = try makeImage()
        let log = CrashLog([path])
        var state = CrashState(flushed: try contents(path))
        let last = randomBytes(12 << 10, seed: Self.seed)
        do {
            var engine = try open(path, calls(log, failing: step))
            engine.allocateAtEnd()
            try engine.write(8 << 10, [UInt8](repeating: 4, count: 512))
            try engine.perform(.flush)
            state.flushed.replaceSubrange(8 << 10..<(8 << 10) + 512, with: repeatElement(4, count: 512))
            log.append(.flushed(1))
            state.history = [(16 << 10..<28 << 10, last)]
            expectFailure(path, .write) { try engine.write(16 << 10, last) }
            // In place, elsewhere, and what would give clusters back.
            expectFailure(path, .write) { try engine.write(0, last) }
            expectFailure(path, .write) { try engine.write(64 << 10, last) }
            expectFailure(path, .writeZeroesUnmapping) {
                try engine.perform(.writeZeroesUnmapping, at: 0, length: 4096)
            }
            for _ in 0..<2 { expectFailure(path, .flush) { try engine.perform(.flush) } }
            let now = try engine.readAll()
            let isKept = isSame(Array(now[..<(16 << 10)]), Array(state.flushed[..<(16 << 10)]))
            #expect(isKept)
            // As the file is for the next user when the process is killed now.
            try expectUse(directory.write("killed.qcow2", directory.read("disk.qcow2")), state)
        }
        try expectUse(path, state)
        try log.replay([start], prefixes: .max, seed: Self.seed, tears: false, overtakes: true) {
            files, flushed, comment in
            let path = try directory.write("crashed.qcow2", files[0])
            try expectNoErrors(path, comment)
            guard flushed == 1 else { return }
            let wrong = try state.unexplained(contents(path))
            #expect(wrong.isEmpty, "sectors at \(wrong.prefix(5)), \(comment)")
        }
    }

    /// The same where nobody asks for anything more.
    @Test(arguments: Step.allCases) func aCloseWritesNothingAfterAFailure(step: Step) throws {
        let (path, _) = try makeImage()
        let state = CrashState(
            flushed: try contents(path), history: [(16 << 10..<28 << 10, randomBytes(12 << 10, seed: Self.seed))])
        do {
            var engine = try open(path, calls(CrashLog([path]), failing: step))
            engine.allocateAtEnd()
            expectFailure(path, .write) { try engine.write(16 << 10, state.history[0].bytes) }
        }
        try expectUse(path, state)
    }

    private func expectFailure(
        _ path: String, _ operation: DiskOperation, _ body: () throws -> Void,
        sourceLocation: SourceLocation = #_sourceLocation
    ) {
        #expect(
            throws: DiskImageError.request(path: path, SystemCallError("\(operation)", errno: EIO)),
            sourceLocation: sourceLocation
        ) { try body() }
    }

    /// The image has no errors, shows what it may show, and is written as ever.
    private func expectUse(
        _ path: String, _ state: CrashState, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        expectSound(path, leaksAllowed: true, sourceLocation: sourceLocation)
        var expected = try contents(path)
        let wrong = state.unexplained(expected)
        #expect(wrong.isEmpty, "sectors at \(wrong.prefix(5))", sourceLocation: sourceLocation)
        let bytes = randomBytes(24 << 10, seed: Self.seed + 1)
        do {
            var engine = try open(path, .host)
            engine.allocateAtEnd()
            try engine.write(100 << 10, bytes)
            try engine.perform(.flush)
        }
        expected.replaceSubrange(100 << 10..<124 << 10, with: bytes)
        expectSound(path, leaksAllowed: true, sourceLocation: sourceLocation)
        let isRight = try isSame(contents(path), expected)
        #expect(isRight, sourceLocation: sourceLocation)
    }

    /// The host tells of what it has lost once. A flush whose own synchronisation comes later, and tells nothing, fails
    /// as well.
    @Test(arguments: [Step.synchronisation, .headerSynchronisation]) func aFlushUnderWayHearsOfIt(step: Step) throws {
        let (path, _) = try makeImage()
        var engine = try open(path, calls(CrashLog([path]), failing: step))
        engine.allocateAtEnd()
        try engine.write(8 << 10, [UInt8](repeating: 4, count: 512))
        let memory = SharedImageTests.Buffer(randomBytes(12 << 10, seed: Self.seed))
        let flush = engine.acquire(), write = engine.acquire()
        engine.start(try #require(flush), .flush, offset: 0, length: 0)
        // It waits for the lock of the mapping, which is given back before the commit's last synchronisation.
        let isLocked = engine.image.isLocked
        #expect(isLocked)
        unsafe engine.start(
            try #require(write), .write, offset: 16 << 10, length: 12 << 10, vectors: memory.vector, count: 1)
        for _ in 0..<2 {
            let ended = try engine.waitForCompletion()
            let completion = try #require(ended)
            #expect(completion.error == EIO, "\(completion.operation)")
            engine.release(completion.request)
        }
        withExtendedLifetime(memory) {}
    }

    /// A change of size that has failed reads the image's metadata anew. That is not to open it anew.
    @Test(arguments: Step.allCases) func aChangeOfSizeDoesNotForgetIt(step: Step) throws {
        let size = 232 << 10
        let (path, _) = try makeImage(size: size)
        let before = try contents(path)
        do {
            var engine = try open(path, calls(CrashLog([path]), failing: step))
            engine.allocateAtEnd()
            #expect(throws: DiskImageError.self) { try engine.resize(to: UInt64(Self.size), preallocation: .metadata) }
            let now = engine.image.size
            #expect(now == UInt64(size))
            expectFailure(path, .write) { try engine.write(0, [UInt8](repeating: 4, count: 512)) }
            expectFailure(path, .flush) { try engine.perform(.flush) }
        }
        try expectUse(path, CrashState(flushed: before))
    }
}

extension DiskEngine {
    /// As if all before the file's end were in use.
    fileprivate mutating func allocateAtEnd() { image.withQCOW2 { $0.refcounts?.allocateAtEnd() } }
}

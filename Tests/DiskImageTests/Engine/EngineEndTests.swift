// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// What becomes of operations that the kernel has when their engine goes.
@Suite(.timed) struct EngineEndTests {
    let directory = TemporaryDirectory()

    /// They are waited for also when the kernel takes no more calls: it still writes to the memory of requests.
    @Test(arguments: [false, true]) func operationsAreWaitedForWhateverHappens(isShared: Bool) throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 8192))
        let shared =
            isShared
            ? try SharedImage(DiskImage(path: path, options: readOnly))
            : try SharedImage(exclusive: DiskImage(path: path, options: readOnly))
        var engine = try DiskEngine(shared, depth: 4)
        guard engine.usesRing else { return withKnownIssue("no io_uring here") { Issue.record("not tried") } }
        // A pipe in the file's place: a read ends when there is something.
        var ends: [Int32] = [-1, -1]
        #expect(unsafe pipe(&ends) == 0)
        defer { for end in ends { close(end) } }
        let file = shared.image.descriptor(0)
        #expect(dup2(ends[0], file) == file)
        let buffers = (0..<2).map { _ in SharedImageTests.Buffer([UInt8](repeating: 0, count: 4096)) }
        try start(&engine, buffers[0])
        try engine.submit()
        // Of a second one the kernel never hears: another file has the ring's number, so calls fail. It is readable
        // when the ring is, which stays there under another number.
        let ring = engine.descriptor, kept = dup(ring)
        let epoll = try Epoll()
        try epoll.add(kept, .input, token: 0)
        #expect(dup2(epoll.rawValue, ring) == ring)
        if isShared {
            // Nor of the wakeup, which is none of the operations.
            engine.pipeline.attachment.wakeup?.event.signal()
            waitUntilReadable(kept)
            let none = engine.nextCompletion()
            #expect(none == nil)
        }
        try start(&engine, buffers[1])
        let queued = engine.queued(below: UInt64(engine.pipeline.attachment.operations.count))
        #expect(throws: DiskImageError.self) { try engine.submit() }
        let left = engine.queued(below: .max), outstanding = engine.outstanding
        #expect(queued == 1 && left == 0 && outstanding == 1)
        // The read ends once this thread waits for it, or has not waited.
        let contents = randomBytes(4096, seed: 1), output = ends[1], isOver = Flag(), leaving = try ThreadState()
        let writer = try Thread.start(name: "writer") {
            while !leaving.isAsleep, !isOver.isSet { usleep(200) }
            unsafe contents.withUnsafeBytes { _ = unsafe write(output, $0.baseAddress, $0.count) }
        }
        _ = consume engine
        let found = buffers[0].contents
        isOver.set()
        writer.join()
        #expect(found == contents)
        close(kept)
    }

    /// What the kernel does not take ends with an error, whichever of the engine's calls it was that would have handed
    /// it over; what it has goes on.
    @Test(arguments: [1, 3, 8]) func requestsThatTheKernelRefusesEnd(count: Int) throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 8192))
        let image = try DiskImage(path: path, options: readOnly), file = image.descriptor(0)
        var engine = try DiskEngine(image, depth: 16)
        guard engine.usesRing else { return withKnownIssue("no io_uring here") { Issue.record("not tried") } }
        // A pipe in the file's place: a read ends when there is something.
        var ends: [Int32] = [-1, -1]
        #expect(unsafe pipe(&ends) == 0)
        defer { for end in ends { close(end) } }
        #expect(dup2(ends[0], file) == file)
        let buffers = (0...count).map { _ in SharedImageTests.Buffer([UInt8](repeating: 0, count: 4096)) }
        try start(&engine, buffers[0])
        try engine.submit()
        // Another file has the ring's number: calls fail.
        let ring = engine.descriptor, kept = dup(ring)
        let other = try Epoll()
        #expect(dup2(other.rawValue, ring) == ring)
        for buffer in buffers[1...] { try start(&engine, buffer) }
        var errors: [Int32] = []
        while let ended = engine.nextCompletion() {
            errors.append(ended.error)
            engine.release(ended.request)
        }
        #expect(errors == Array(repeating: EIO, count: count))
        let inFlight = engine.inFlight
        #expect(inFlight == 1)
        #expect(throws: DiskImageError.self) { try engine.submit() }
        // Heard once.
        try engine.submit()
        let contents = randomBytes(4096, seed: 1)
        unsafe contents.withUnsafeBytes { _ = unsafe write(ends[1], $0.baseAddress, $0.count) }
        waitUntilReadable(kept)
        let first = engine.nextCompletion()
        #expect(first?.error == 0 && buffers[0].contents == contents)
        if let first { engine.release(first.request) }
        // The kernel takes calls again.
        #expect(dup2(kept, ring) == ring)
        close(kept)
        try start(&engine, buffers[1])
        unsafe contents.withUnsafeBytes { _ = unsafe write(ends[1], $0.baseAddress, $0.count) }
        let last = try engine.waitForCompletion()
        #expect(last?.error == 0 && buffers[1].contents == contents)
    }

    /// Requests are submitted to a ring eight at a time, whether or not the owner submits them.
    @Test func aDiskHasWorkWhileMoreIsStarted() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 8192))
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly), depth: 16)
        guard engine.usesRing else { return withKnownIssue("no io_uring here") { Issue.record("not tried") } }
        let buffers = (0..<9).map { _ in SharedImageTests.Buffer([UInt8](repeating: 0, count: 4096)) }
        var queued: [Int] = []
        for buffer in buffers {
            try start(&engine, buffer)
            queued.append(engine.queued(below: .max))
        }
        #expect(queued == [1, 2, 3, 4, 5, 6, 7, 0, 1])
        try engine.submit()
        var ended = 0
        while try engine.waitForCompletion() != nil { ended += 1 }
        #expect(ended == 9)
    }

    private func start(_ engine: inout DiskEngine, _ buffer: SharedImageTests.Buffer) throws {
        let free = engine.acquire()
        unsafe engine.start(
            try #require(free), .read, offset: 0, length: UInt64(buffer.bytes.count), vectors: buffer.vector, count: 1)
    }

    private final class Flag: Sendable {
        private let value = Atomic(false)
        var isSet: Bool { value.load(ordering: .acquiring) }
        func set() { value.store(true, ordering: .releasing) }
    }

    /// How the thread that makes it is doing.
    private struct ThreadState: Sendable {
        private let path: String

        init() throws {
            // It begins with the thread's number.
            let own = try String(decoding: readFile("/proc/thread-self/stat", limit: 4096), as: UTF8.self)
            path = "/proc/self/task/\(own.prefix { $0 != " " })/stat"
        }

        var isAsleep: Bool {
            guard let bytes = try? readFile(path, limit: 4096) else { return false }
            // Behind the name.
            return String(decoding: bytes, as: UTF8.self).contains(") S ")
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// What becomes of requests when a remote disk's server goes, and comes again.
@Suite(.timed) struct NBDReconnectTests {
    private let directory = TemporaryDirectory()
    private let reports = Reports()

    private func open(_ address: String, readOnly: Bool = false) throws -> DiskEngine {
        // Stated, as a server that fails the first read cannot be asked what the export begins as.
        var options = DiskImageOptions(format: .raw, readOnly: readOnly)
        options.report = { [reports] in reports.add($0) }
        return try DiskEngine(DiskImage(path: address, options: options), depth: 64, segments: 64)
    }

    /// A server that is killed again and again under a workload: nothing is lost, nothing is wrong.
    @Test func aWorkloadGoesOnOverConnections() throws {
        let content = randomBytes(4 << 20, seed: 3)
        try directory.write("disk.raw", content)
        let server = try NBDServer(directory, image: directory.file("disk.raw"))
        var engine = try open(server.address("", "&reconnect=60"))
        var workload = RemoteWorkload(content, seed: 4)
        var kills = 0
        let killer = Killer()
        try workload.run(&engine, steps: 800) { step in
            guard step % 10 == 5 else { return }
            kills += 1
            // From another thread, somewhere in the middle of what comes now.
            try killer.run(server, after: step * 7 % 5000)
        }
        killer.join()
        #expect(try engine.readAll() == workload.model)
        // A connection for each time that the server came back, and a few lines about all of them.
        let connections = engine.image.remote?.generation ?? 0
        #expect(connections >= kills / 2)
        #expect(
            reports.all.contains { $0.contains("connection lost") }
                && reports.all.contains { $0.contains("reconnected after") })
        #expect(reports.all.count < kills / 2, "\(reports.all)")
        _ = consume engine
        #expect(try directory.read("disk.raw") == workload.model)
    }

    @Test func withoutPatienceRequestsFailAndLaterOnesSucceed() throws {
        let content = randomBytes(1 << 20, seed: 5)
        try directory.write("disk.raw", content)
        let server = try NBDServer(directory, image: directory.file("disk.raw"))
        var engine = try open(server.address("", "&reconnect=0"))
        #expect(try engine.read(0, 512) == Array(content[..<512]))
        server.kill()
        for _ in 0..<3 {
            #expect(
                throws: DiskImageError.request(
                    path: server.address("", "&reconnect=0"), SystemCallError("read", errno: EIO))
            ) { try engine.read(0, 512) }
        }
        try server.start()
        // The connection is sought again by itself.
        var bytes: [UInt8]?
        while bytes == nil { bytes = try? engine.read(4096, 512) }
        #expect(bytes == Array(content[4096..<4608]))
        #expect(reports.all.contains { $0.contains("reconnected after") })
    }

    /// For tools, which wait in calls.
    @Test func aToolWaitsToo() throws {
        let content = randomBytes(1 << 20, seed: 5)
        try directory.write("disk.raw", content)
        let server = try NBDServer(directory, image: directory.file("disk.raw"), ["-r"])
        let image = try DiskImage(path: server.address("", "&reconnect=60"), options: readOnly)
        let remote = image.remote, disk = try #require(remote)
        server.kill()
        let killer = Killer()
        try killer.run { try server.start() }
        var bytes = [UInt8](repeating: 0, count: content.count)
        try bytes.withIOMemory { try disk.read($0, at: 0) }
        killer.join()
        #expect(bytes == content)
        server.kill()
        // Given up by somebody else.
        try killer.run { disk.cancel() }
        #expect(throws: DiskImageError.self) { try bytes.withIOMemory { try disk.read($0, at: 0) } }
        killer.join()
    }

    /// Another disk under the same name is not this one.
    @Test(arguments: ["size", "read-only"]) func anotherDiskIsNotUsed(what: String) throws {
        let server = try NBDServer(directory, nbdkit: "memory", "1M")
        var engine = try open(server.address("", "&reconnect=60"))
        try engine.write(0, [1, 2, 3])
        server.kill()
        let other =
            what == "size"
            ? try NBDServer(directory, nbdkit: "memory", "2M") : try NBDServer(directory, nbdkit: "-r", "memory", "1M")
        #expect(
            throws: DiskImageError.request(
                path: server.address("", "&reconnect=60"), SystemCallError("read", errno: EIO))
        ) { try engine.read(0, 3) }
        #expect(
            reports.all.contains {
                $0.contains(
                    what == "size"
                        ? "a disk of 2097152 bytes, previously 1048576" : "a read-only disk, previously writable")
            })
        #expect(engine.image.remote?.failure?.contains("another disk") == true)
        _ = consume other
    }

    /// A server that is there and says nothing cannot hold up who wants to end.
    @Test func theEndComesWithoutTheServer() throws {
        // One thread: with several nbdkit aborts now and then when a client has gone whose requests they have
        // (assertion on the socket, 1.32).
        let server = try NBDServer(directory, nbdkit: "--threads=1", "memory", "1M")
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 1)
        defer {
            memory.deallocate()
            vectors.deallocate()
        }
        vectors[0] = iovec(iov_base: memory, iov_len: 4096)
        var engine = try open(server.address())
        server.stop()
        for _ in 0..<5 {
            let request = engine.acquire()
            engine.start(try #require(request), .read, offset: 0, length: 4096, vectors: vectors, count: 1)
        }
        try engine.submit()
        engine.image.remote?.drain(within: 50)
        for _ in 0..<5 {
            let completion = try engine.waitForCompletion()
            #expect(completion?.error == EIO)
            engine.release(try #require(completion).request)
        }
        #expect(engine.inFlight == 0)
        // And it goes on when the server does.
        server.resume()
        #expect(try engine.read(0, 512) == [UInt8](repeating: 0, count: 512))
        // The engine's own end, with a request under way.
        server.stop()
        let request = engine.acquire()
        engine.start(try #require(request), .read, offset: 0, length: 4096, vectors: vectors, count: 1)
        _ = consume engine
    }

    /// A server that says that it shuts down has not refused the request.
    @Test func aServerThatShutsDown() throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=error", "memory", "1M", "error=ESHUTDOWN", "error-pread-rate=100%",
            "error-file=\(directory.file("fails"))")
        try directory.write("fails", [])
        var engine = try open(server.address("", "&reconnect=60"))
        let killer = Killer()
        let file = directory.file("fails")
        try killer.run {
            usleep(20_000)
            unlink(file)
        }
        #expect(try engine.read(0, 512) == [UInt8](repeating: 0, count: 512))
        killer.join()
        #expect(reports.all.contains { $0.contains("the server shuts down") })
    }
}

/// A thread beside the test's that does something to its server.
final class Killer {
    private var threads: [Slot] = []

    private final class Slot {
        let thread: Thread
        init(_ thread: consuming Thread) { self.thread = thread }
    }

    /// Kills the server in so many microseconds and starts it again.
    func run(_ server: NBDServer, after microseconds: Int) throws {
        join()
        try run {
            usleep(UInt32(microseconds))
            server.kill()
            try server.start()
        }
    }

    func run(_ body: @escaping @Sendable () throws -> Void) throws {
        threads.append(
            Slot(
                try Thread.start(name: "killer") {
                    do { try body() } catch { Issue.record("\(error)") }
                }))
    }

    func join() {
        // Threads are joined as they go.
        threads = []
    }
}

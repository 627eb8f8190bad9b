// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Servers that are there, complete the handshake, and do not answer: patience, pauses and the host's log are for
/// what is answered.
@Suite(.timed) struct NBDOutageTests {
    private let directory = TemporaryDirectory()
    private let reports = Reports()
    /// So many connections later a server behaves: a request that never ends would succeed then, and not keep the test.
    private static let enough = 400

    private func open(_ server: ScriptedNBDServer, patience: Int) throws -> DiskEngine {
        var options = DiskImageOptions(format: .raw)
        options.report = { [reports] in reports.add($0) }
        options.reconnect = patience
        return try DiskEngine(DiskImage(path: server.address, options: options), depth: 16, segments: 4)
    }

    /// However the connection comes to its end without an answer, the request fails after its patience, attempts
    /// become rare, and the log says it once.
    @Test(arguments: ["after the handshake", "at a request", "by shutting down"]) func aServerThatOnlyShakesHands(
        how: String
    ) throws {
        let server = try ScriptedNBDServer(directory, randomBytes(1 << 20, seed: 1)) { connection, request in
            // The first connection opens the disk.
            guard connection > 0 || request != nil, connection < Self.enough else { return .answer }
            switch how {
            case "after the handshake": return .close
            case "at a request": return request == nil ? .answer : .close
            default: return request == nil ? .answer : .shutDown
            }
        }
        defer { server.stop() }
        var engine = try open(server, patience: 1)
        #expect(throws: DiskImageError.request(path: server.address, SystemCallError("read", errno: EIO))) {
            try engine.read(0, 512)
        }
        // 100, 200, 400, 800 ms: what goes into the patience, and the first of all.
        #expect(server.connections <= 7, "\(server.connections) connections")
        #expect(reports.all.count == 1 && reports.all[0].contains("connection lost"), "\(reports.all.prefix(4))")
        _ = consume engine
    }

    /// The reason is the connection's, not a file's.
    @Test func theReasonOfARequestThatHasWaitedInVain() throws {
        // The first connection opens the disk.
        let server = try ScriptedNBDServer(directory, randomBytes(1 << 20, seed: 1)) { connection, request in
            (connection > 0 || request != nil) && connection < Self.enough ? .close : .answer
        }
        defer { server.stop() }
        var engine = try open(server, patience: 1)
        let buffer = SharedImageTests.Buffer([UInt8](repeating: 0, count: 512))
        let free = engine.acquire()
        unsafe engine.start(try #require(free), .read, offset: 1024, length: 512, vectors: buffer.vector, count: 1)
        let completion = try engine.waitForCompletion()
        #expect(completion?.error == EIO)
        let reason = completion.flatMap { engine.failure(of: $0) }
        #expect(
            reason
                == .remote(
                    path: server.address,
                    reason: "read: no connection to the server for 1 s (at byte 1024 of the remote disk)"))
        #expect(reports.all.allSatisfy { $0.hasPrefix("disk \"\(server.address)\": ") }, "\(reports.all)")
        _ = consume engine
    }

    /// Others are answered, so the server is there: the one request that it does not survive ends all the same.
    @Test(arguments: [512, 4096]) func aRequestThatTheServerDoesNotSurvive(bytes: Int) throws {
        let writes = Counter()
        // A write of a part of a block reads the block first, which is answered.
        let server = try ScriptedNBDServer(directory, randomBytes(1 << 20, seed: 1), minimumBlock: 4096) {
            connection, request in
            guard connection < Self.enough else { return .answer }
            switch request {
            case .write:
                _ = writes.next(connection)
                return .ignore
            case .read: return writes[connection] > 0 ? .answerAndClose : .answer
            default: return .answer
            }
        }
        defer { server.stop() }
        var engine = try open(server, patience: 1)
        let content = try engine.read(0, 4096)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 8192, alignment: 4096)
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 2)
        defer {
            memory.deallocate()
            vectors.deallocate()
        }
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: 8192)
        vectors[0] = iovec(iov_base: memory, iov_len: 4096)
        vectors[1] = iovec(iov_base: memory + 4096, iov_len: bytes)
        // A read is always under way beside the write.
        let acquired = engine.acquire(), write = try #require(acquired)
        engine.start(write, .write, offset: 8192, length: UInt64(bytes), vectors: vectors + 1, count: 1)
        var reads = 0, outcome: Int32?
        while outcome == nil {
            let next = engine.acquire(), read = try #require(next)
            engine.start(read, .read, offset: 0, length: 4096, vectors: vectors, count: 1)
            try engine.submit()
            var isRead = false
            while !isRead {
                let got = try engine.waitForCompletion(), completion = try #require(got)
                if completion.request == write {
                    outcome = completion.error
                } else {
                    #expect(completion.error == 0)
                    isRead = true
                    reads += 1
                }
                engine.release(completion.request)
            }
        }
        #expect(outcome == EIO)
        #expect(reads > 0 && server.connections < 40, "\(reads) reads, \(server.connections) connections")
        // Two lines at most for each ten seconds.
        #expect(reports.all.count <= 4, "\(reports.all)")
        #expect(Array(UnsafeRawBufferPointer(start: memory, count: 4096)) == content)
        _ = consume engine
    }

    /// A server that answers one command for each connection is slow, and useful.
    @Test func anAnswerIsProgress() throws {
        let answered = Counter()
        let server = try ScriptedNBDServer(directory, randomBytes(1 << 20, seed: 1)) { connection, request in
            guard request != nil else { return .answer }
            return answered.next(connection) == 0 ? .answer : .close
        }
        defer { server.stop() }
        var engine = try open(server, patience: 60)
        var bytes: [UInt8] = []
        for place in 0..<5 { bytes += try engine.read(UInt64(place) << 12, 4096) }
        #expect(bytes == Array(server.bytes[..<bytes.count]))
        #expect(server.connections == 5)
        #expect(reports.all.filter { $0.contains("connection lost") }.count == 1, "\(reports.all)")
        _ = consume engine
    }

    // MARK: - The state of an outage, by a clock of the test's

    @Test func patienceBeginsAtTheLossAfterTheLastAnswer() {
        var outage = NBDOutage()
        #expect(outage.lost(1000, "gone", patience: 10_000).wasUseful)
        // Connected, and closed again, with a command that waits.
        for time in [1100, 1400, 3000] {
            _ = outage.connected(time, isAwaited: true)
            #expect(!outage.lost(time + 50, "gone", patience: 10_000).wasUseful)
            #expect(outage.began == 1000)
        }
        _ = outage.connected(4000, isAwaited: true)
        outage.asked(4001)
        _ = outage.answered(4002)
        #expect(outage.began == nil)
        #expect(outage.lost(5000, "gone", patience: 10_000).wasUseful)
        #expect(outage.began == 5000)
    }

    @Test func timeWithoutRequestsDoesNotCount() {
        var outage = NBDOutage()
        _ = outage.lost(1000, "gone", patience: 10_000)
        _ = outage.connected(1500, isAwaited: false)
        // An hour later the guest asks for something, and the server goes at this moment.
        outage.asked(3_601_500)
        #expect(!outage.lost(3_601_501, "gone", patience: 10_000).wasUseful)
        #expect(outage.began == 3_601_000)
    }

    @Test func theLogCountsLossesInEachQuietTime() {
        var outage = NBDOutage()
        var lines: [String] = []
        func add(_ line: String?) { if let line { lines.append(line) } }
        // A server that answers one command and closes, for as long as two quiet times and a bit.
        for step in 0..<(2 * NBDOutage.quietTime / 10 + 5) {
            let now = step * 10
            add(outage.overdue(now, patience: 10_000))
            add(outage.lost(now, "gone", patience: 10_000).line)
            add(outage.connected(now + 1, isAwaited: true))
            outage.asked(now + 1)
            add(outage.answered(now + 2))
        }
        let steps = NBDOutage.quietTime / 10
        #expect(
            lines == [
                "connection lost: gone; requests wait up to 10 s for a reconnect",
                "reconnected after 1 s; waiting requests are sent again",
                "connection lost and restored (\(steps - 1) times since the last message): gone",
                "connection lost and restored (\(steps) times since the last message): gone",
            ])
        // One that is gone for good when others have just been logged is logged when the quiet time is over.
        lines = []
        add(outage.lost(2 * NBDOutage.quietTime + 100, "for good", patience: 10_000).line)
        #expect(lines.isEmpty)
        let due = outage.logsAt
        add(outage.overdue((due ?? 0) - 1, patience: 10_000))
        #expect(lines.isEmpty)
        add(outage.overdue(due ?? 0, patience: 10_000))
        #expect(
            lines == [
                "connection lost (6 times since the last message): for good; requests wait up to 10 s for a reconnect"
            ])
        #expect(outage.logsAt == nil)
        // Nothing waits: its return is logged by itself.
        add(outage.connected(2 * NBDOutage.quietTime + 70_100, isAwaited: false))
        #expect(lines.last == "reconnected after 70 s; no requests were waiting")
    }

    /// While nothing is asked, each outage has a time of its own.
    @Test func outagesOfAnIdleDisk() {
        var outage = NBDOutage()
        var lines: [String] = []
        func add(_ line: String?) { if let line { lines.append(line) } }
        for second in [0, 20, 40, 100] {
            add(outage.overdue(second * 1000, patience: 10_000))
            add(outage.lost(second * 1000, "gone", patience: 10_000).line)
            add(outage.connected(second * 1000 + 9000, isAwaited: false))
        }
        // A loss in the quiet time is reported by the end, and so is one from which the server has not come back.
        add(outage.last(110_000))
        add(outage.lost(111_000, "for good", patience: 10_000).line)
        add(outage.last(112_000))
        add(outage.last(113_000))
        #expect(
            lines == [
                "connection lost: gone; requests wait up to 10 s for a reconnect",
                "reconnected after 9 s; no requests were waiting",
                "connection lost and restored (2 times since the last message): gone",
                "connection lost and restored (1 time since the last message): gone",
                "connection lost: for good",
            ])
    }
}

/// Counts from nought, for each key.
private final class Counter: @unchecked Sendable {
    private let monitor = Monitor()
    private var counts: [Int: Int] = [:]

    subscript(key: Int) -> Int { monitor.locked { counts[key, default: 0] } }

    func next(_ key: Int) -> Int {
        monitor.locked {
            defer { counts[key, default: 0] += 1 }
            return counts[key, default: 0]
        }
    }
}

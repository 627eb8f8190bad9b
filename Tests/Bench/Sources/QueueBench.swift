// SPDX-License-Identifier: Apache-2.0

import DiskImage
import Glibc
import Linux

/// Two engines of one image, each in a thread of its own like those of a disk's queues, compared with one engine with
/// as many requests in flight.
///
/// The images are in the page cache: the threads' own work and their waits for each other are measured.
enum QueueBench {
    private struct Load {
        let name: String
        let size: Int
        let count: Int
        let writes: Bool
    }

    private static let loads = [
        Load(name: "random 4 KiB, read", size: 4096, count: 100_000, writes: false),
        Load(name: "random 64 KiB, read", size: 64 << 10, count: 20_000, writes: false),
        Load(name: "random 64 KiB, write", size: 64 << 10, count: 10_000, writes: true),
    ]

    private static let size: UInt64 = 256 << 20
    /// Requests in flight, of all engines together.
    private static let depth = 64

    static func run(_ setup: Setup) throws -> [Row] {
        let key = "\(setup.work)/key"
        try writeFile(key, Array("a password of no importance".utf8))
        defer { unlink(key) }
        var rows: [Row] = []
        for (name, isEncrypted, preallocation) in [
            ("qcow2, full", false, Preallocation.full), ("LUKS in qcow2, full", true, .full),
            ("qcow2, empty", false, .off),
        ] {
            let path = "\(setup.work)/queues.qcow2"
            defer { unlink(path) }
            var creation = ImageCreation(path: path, format: .qcow2, size: size)
            creation.preallocation = preallocation
            if isEncrypted {
                creation.options.encryption = ImageEncryption(key: try DiskKey(.file(key)), cost: .iterations(1000))
            }
            try creation.create()
            // Unallocated clusters are only read.
            for load in loads where preallocation == .full || !load.writes {
                let seconds = try interleave(
                    setup.runs,
                    [
                        { try requests(load, path, isEncrypted ? key : nil, engines: 2) },
                        { try requests(load, path, isEncrypted ? key : nil, engines: 1) },
                    ])
                let samples = seconds.map { Sample($0.map { Double(load.count) / $0 / 1e3 }) }
                rows.append(
                    Row(
                        name: "\(name), two queues: \(load.name)", unit: "1000/s", ours: samples[0],
                        peer: ("one queue", samples[1])))
            }
        }
        return rows
    }

    /// Seconds for all requests of a load.
    private static func requests(_ load: Load, _ path: String, _ key: String?, engines: Int) throws -> Double {
        var options = DiskImageOptions(readOnly: !load.writes)
        if let key { options.keys = [try DiskKey(.file(key))] }
        let image = try DiskImage(path: path, options: options)
        let shared = engines == 1 ? SharedImage(exclusive: image) : SharedImage(image)
        var workers: [Worker] = []
        for index in 0..<engines {
            workers.append(
                try Worker(shared, load, count: load.count / engines, depth: depth / engines, seed: UInt64(index)))
        }
        for worker in workers { worker.turns.ready.wait() }
        let seconds = time {
            for worker in workers { worker.turns.start.open() }
            for worker in workers { worker.turns.end.wait() }
        }
        for worker in workers {
            if let failure = worker.turns.failure { throw BenchError("a request failed: \(failure)") }
        }
        return seconds
    }

    /// Blocks one thread until another opens it.
    private final class Gate: Sendable {
        private let event: EventFD
        init() { event = try! EventFD() }
        func open() { event.signal() }
        func wait() { event.wait() }
    }

    /// An engine in a thread, which is joined by `deinit`.
    private final class Worker {
        /// The thread's turns, and its result.
        final class Turns: @unchecked Sendable {
            let ready = Gate(), start = Gate(), end = Gate()
            // Read after `end`.
            var failure: String?
        }

        let turns: Turns
        private let thread: Linux.Thread

        init(_ shared: SharedImage, _ load: Load, count: Int, depth: Int, seed: UInt64) throws {
            let turns = Turns()
            self.turns = turns
            thread = try Linux.Thread.start(name: "engine\(seed)", stackSize: 1 << 20) {
                do {
                    var engine = try DiskEngine(shared, depth: depth, segments: 1)
                    let memory = UnsafeMutableRawPointer.allocate(byteCount: depth * load.size, alignment: 4096)
                    let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: depth)
                    defer {
                        memory.deallocate()
                        vectors.deallocate()
                    }
                    memory.initializeMemory(as: UInt8.self, repeating: 1, count: depth * load.size)
                    for index in 0..<depth {
                        (vectors + index).initialize(
                            to: iovec(iov_base: memory + index * load.size, iov_len: load.size))
                    }
                    turns.ready.open()
                    turns.start.wait()
                    try Self.serve(&engine, load, count, vectors, seed)
                } catch {
                    turns.failure = "\(error)"
                    turns.ready.open()
                }
                turns.end.open()
            }
        }

        private static func serve(
            _ engine: inout DiskEngine, _ load: Load, _ count: Int, _ vectors: UnsafeMutablePointer<iovec>,
            _ seed: UInt64
        ) throws {
            var state = seed &* 0x1234_5678_9abc_def1 | 1
            var started = 0, done = 0
            while done < count {
                while started < count, let request = engine.acquire() {
                    state ^= state << 13
                    state ^= state >> 7
                    state ^= state << 17
                    let offset = state % (QueueBench.size / UInt64(load.size)) * UInt64(load.size)
                    engine.start(
                        request, load.writes ? .write : .read, offset: offset, length: UInt64(load.size),
                        vectors: vectors + request, count: 1)
                    started += 1
                }
                var ended = try engine.waitForCompletion()
                while let completion = ended {
                    guard completion.error == 0 else { throw BenchError("errno \(completion.error)") }
                    engine.release(completion.request)
                    done += 1
                    ended = engine.nextCompletion()
                }
            }
        }
    }
}

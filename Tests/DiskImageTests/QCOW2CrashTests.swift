import CLinux
@testable import DiskImage
import Glibc
import Linux
import Synchronization
import Testing

/// Power that fails at any moment, and hosts that fail at any call.
@Suite struct QCOW2CrashTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// What came to the image's file, in its order.
    final class Log: Sendable {
        enum Entry: Sendable {
            case write(offset: Int, bytes: [UInt8])
            case hole(offset: Int, length: Int)
            case synchronize
            /// The guest's flush number n has ended.
            case flushed(Int)
        }

        private let entries = Mutex<[Entry]>([])
        var all: [Entry] { entries.withLock { $0 } }
        func append(_ entry: Entry) { entries.withLock { $0.append(entry) } }

        var calls: FileCalls {
            unsafe FileCalls(
                read: FileCalls.host.read,
                write: { file, vectors, count, offset in
                    let result = unsafe FileCalls.host.write(file, vectors, count, offset)
                    var bytes: [UInt8] = []
                    for index in 0..<Int(count) { unsafe bytes += UnsafeRawBufferPointer(start: vectors[index].iov_base, count: vectors[index].iov_len) }
                    self.append(.write(offset: Int(offset), bytes: Array(bytes.prefix(max(0, result)))))
                    return result
                },
                synchronize: { _ in
                    self.append(.synchronize)
                    return 0
                },
                allocate: { file, mode, offset, length in
                    self.append(.hole(offset: Int(offset), length: Int(length)))
                    return FileCalls.host.allocate(file, mode, offset, length)
                })
        }
    }

    /// What a flush made durable, and what was done until the next one ended.
    struct State {
        var flushed: [UInt8]
        var history: [(range: Range<Int>, bytes: [UInt8])] = []
    }

    private static func apply(_ entry: Log.Entry, to file: inout [UInt8]) {
        switch entry {
        case .write(let offset, let bytes):
            if file.count < offset + bytes.count { file += [UInt8](repeating: 0, count: offset + bytes.count - file.count) }
            file.replaceSubrange(offset..<offset + bytes.count, with: bytes)
        case .hole(let offset, let length):
            let end = min(file.count, offset + length)
            if offset < end { file.replaceSubrange(offset..<end, with: repeatElement(0, count: end - offset)) }
        case .synchronize, .flushed: break
        }
    }

    /// Every prefix of what came to the file, and for each what is left when some writes since the last synchronisation are lost.
    @Test(arguments: ["cluster_size=512,refcount_bits=16", "cluster_size=4k,compat=0.10", "cluster_size=4k,refcount_bits=1"], [false, true])
    func whatWasFlushedSurvivesAndNothingIsDamaged(options: String, hasBacking: Bool) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 5) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 256 << 10
        let path = directory.file("disk.qcow2")
        var contents = [UInt8](repeating: 0, count: size)
        if hasBacking {
            contents = randomBytes(size, seed: seed)
            let base = try directory.write("base.raw", contents)
            qemuImage("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path)
        } else {
            qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "\(size)")
        }
        var file = try directory.read("disk.qcow2")
        let log = Log()
        var workload = Workload(contents, seed: seed, maximum: 16 << 10)
        var states = [State(flushed: contents)]
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(locking: false, metadataCacheSize: 0)), depth: 8, segments: 8, calls: log.calls)
            for round in 0..<(environment("SWKVM_CRASH_ROUNDS") ?? 30) {
                try workload.round(&engine)
                if round % 3 == 2 {
                    try engine.perform(.flush)
                    log.append(.flushed(states.count))
                    states[states.count - 1].history = workload.history
                    workload.history = []
                    states.append(State(flushed: workload.model))
                }
            }
            states[states.count - 1].history = workload.history
        }
        var generator = SeededGenerator(seed: seed)
        var durable = file, number = 0
        var pending: [Log.Entry] = []
        let entries = log.all
        // About 90 prefixes of each of the six combinations, unless all are wanted.
        let step = environment("SWKVM_CRASH_STEP") ?? max(1, entries.count / 90)
        for (index, entry) in entries.enumerated() {
            Self.apply(entry, to: &file)
            switch entry {
            case .synchronize:
                durable = file
                pending = []
            case .flushed(let n): number = n
            case .write, .hole: pending.append(entry)
            }
            guard index % step == 0 else { continue }
            try examine(file, states[number], "prefix \(index) of \(entries.count), seed \(seed)")
            // Of what was not synchronised, any part may have reached the disk.
            guard !pending.isEmpty, index / step % 2 == 0 else { continue }
            var reordered = durable
            for entry in pending where Bool.random(using: &generator) { Self.apply(entry, to: &reordered) }
            try examine(reordered, states[number], "lost writes at \(index) of \(entries.count), seed \(seed)")
        }
    }

    /// An image after the power failed: sound but for leaks. A sector is as it was flushed, or as somebody made it since, or, if it was
    /// touched, zeroes (what a discard leaves).
    private func examine(_ file: [UInt8], _ state: State, _ comment: String) throws {
        let path = try directory.write("crashed.qcow2", file)
        expectSound(path, leaksAllowed: true, comment)
        var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false)), depth: 4, usesRing: false)
        let now = try engine.readAll()
        var wrong: [Int] = []
        for sector in stride(from: 0, to: now.count, by: 512) {
            if isEqual(now, sector, state.flushed, sector) { continue }
            let bytes = now[sector..<sector + 512]
            let changes = state.history.filter { $0.range.contains(sector) }
            let isKnown = changes.contains { change in
                let start = sector - change.range.lowerBound
                return change.bytes[start..<start + 512] == bytes
            }
            if !isKnown, changes.isEmpty || bytes.contains(where: { $0 != 0 }) { wrong.append(sector) }
        }
        let damage = engine.image.damage
        #expect(damage == nil && wrong.isEmpty, "sectors at \(wrong), \(comment)")
    }

    /// One call of a workload fails, each in its turn: the guest hears of it, the image stays sound, and what did not fail is there.
    @Test(arguments: [(ENOSPC, true), (EIO, true), (ENOSPC, false), (EIO, false)])
    func everyCallMayFail(error: Int32, hasBacking: Bool) throws {
        let seed: UInt64 = 99
        let size = 512 << 10
        let contents = hasBacking ? randomBytes(size, seed: 3) : [UInt8](repeating: 0, count: size)
        try directory.write("base.raw", contents)
        let path = directory.file("disk.qcow2")
        if hasBacking {
            qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw", path)
        } else {
            qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "\(size)")
        }
        let start = try directory.read("disk.qcow2")
        var victim = 0, total = 1
        let step = environment("SWKVM_FAULT_STEP") ?? 5
        while victim < total {
            try directory.write("disk.qcow2", start)
            let counter = FaultTests.Counter()
            var workload = Workload(contents, seed: seed, maximum: 16 << 10)
            let failing = victim
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 8, segments: 8, calls: FaultTests.calls { call in
                    _ = counter.next()
                    return call == failing ? .error(error) : .none
                })
                for round in 0..<12 {
                    try workload.round(&engine, mayFail: true)
                    // What failed holds what nobody knows; the rest holds what the array does.
                    try workload.learn(&engine)
                    if round % 3 == 2 { try? engine.perform(.flush) }
                }
                total = max(total, counter.next())
                #expect(try (try? engine.readAll()) ?? engine.readAll() == workload.model, "call \(failing)")
                try? engine.perform(.flush)
            }
            expectSound(path, leaksAllowed: true, "call \(failing)")
            victim += step
        }
        #expect(total > 100)
    }
}

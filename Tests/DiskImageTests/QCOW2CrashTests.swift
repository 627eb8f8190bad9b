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
            case size(Int, grows: Bool)
            case synchronize
            /// The guest's flush number n has ended.
            case flushed(Int)
        }

        private let entries = Mutex<[Entry]>([])
        var all: [Entry] { entries.withLock { $0 } }
        func append(_ entry: Entry) { entries.withLock { $0.append(entry) } }

        /// Calls of several threads come one after the other, in the order of the log.
        var calls: FileCalls {
            unsafe FileCalls(
                read: FileCalls.host.read,
                write: { file, vectors, count, offset in
                    self.entries.withLock { entries in
                        let result = unsafe FileCalls.host.write(file, vectors, count, offset)
                        var bytes: [UInt8] = []
                        for index in 0..<Int(count) { unsafe bytes += UnsafeRawBufferPointer(start: vectors[index].iov_base, count: vectors[index].iov_len) }
                        entries.append(.write(offset: Int(offset), bytes: Array(bytes.prefix(max(0, result)))))
                        return result
                    }
                },
                synchronize: { _ in
                    self.append(.synchronize)
                    return 0
                },
                allocate: { file, mode, offset, length in
                    self.entries.withLock {
                        $0.append(mode == 0 ? .size(Int(offset + length), grows: true) : .hole(offset: Int(offset), length: Int(length)))
                        return FileCalls.host.allocate(file, mode, offset, length)
                    }
                },
                truncate: { file, size in
                    self.entries.withLock {
                        $0.append(.size(Int(size), grows: false))
                        return FileCalls.host.truncate(file, size)
                    }
                })
        }
    }

    /// What a flush made durable, and what was done until the next one ended.
    struct State {
        var flushed: [UInt8]
        var history: [(range: Range<Int>, bytes: [UInt8])] = []
    }

    static func apply(_ entry: Log.Entry, to file: inout [UInt8]) {
        switch entry {
        case .write(let offset, let bytes):
            if file.count < offset + bytes.count { file += [UInt8](repeating: 0, count: offset + bytes.count - file.count) }
            file.replaceSubrange(offset..<offset + bytes.count, with: bytes)
        case .hole(let offset, let length):
            let end = min(file.count, offset + length)
            if offset < end { file.replaceSubrange(offset..<end, with: repeatElement(0, count: end - offset)) }
        case .size(let size, let grows):
            if file.count < size { file += [UInt8](repeating: 0, count: size - file.count) } else if !grows { file.removeLast(file.count - size) }
        case .synchronize, .flushed: break
        }
    }

    /// Every prefix of what came to the file, and for each what is left when some writes since the last synchronisation are lost.
    @Test(arguments: 
        ["cluster_size=512,refcount_bits=16", "cluster_size=4k,compat=0.10", "cluster_size=4k,refcount_bits=1", "cluster_size=16k,extended_l2=on",
         "encrypted 512", "encrypted 4096", "encrypted 16384"], [false, true])
    func whatWasFlushedSurvivesAndNothingIsDamaged(options: String, hasBacking: Bool) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 5) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 256 << 10
        let path = directory.file("disk.qcow2")
        var contents = [UInt8](repeating: 0, count: size)
        var imageOptions = DiskImageOptions(locking: false, metadataCacheSize: 0)
        if options.hasPrefix("encrypted") {
            // Of what kind does not matter to the order of writes, so one that tries keys quickly.
            let encrypted = try Encrypted(directory)
            imageOptions.keys = [encrypted.key]
            var layout = QCOW2Options()
            layout.clusterSize = UInt64(options.split(separator: " ")[1])!
            layout.extendedL2 = layout.clusterSize == 16384
            if hasBacking {
                contents = randomBytes(size, seed: seed)
                try directory.write("base.raw", contents)
            }
            _ = try encrypted.create("disk.qcow2", size: size, layout, backing: hasBacking ? BackingReference(name: "base.raw", format: .raw) : nil)
        } else if hasBacking {
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
            var engine = try DiskEngine(DiskImage(path: path, options: imageOptions), depth: 8, segments: 8, calls: log.calls)
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
        try replay(log, states, &file, seed: seed, keys: imageOptions.keys)
    }

    /// Examines what the file would be, had the power failed: after about 150 of the log's entries, unless all are wanted.
    private func replay(_ log: Log, _ states: [State], _ file: inout [UInt8], seed: UInt64, keys: [DiskKey] = []) throws {
        var generator = SeededGenerator(seed: seed)
        var durable = file, number = 0
        var pending: [Log.Entry] = []
        let entries = log.all
        let step = environment("SWKVM_CRASH_STEP") ?? max(1, entries.count / 150)
        for (index, entry) in entries.enumerated() {
            Self.apply(entry, to: &file)
            switch entry {
            case .synchronize:
                durable = file
                pending = []
            case .flushed(let n): number = n
            case .write, .hole, .size: pending.append(entry)
            }
            guard index % step == 0 else { continue }
            try examine(file, states[number], keys, "prefix \(index) of \(entries.count), seed \(seed)")
            // Of what was not synchronised, any part may have reached the disk.
            guard !pending.isEmpty, index / step % 2 == 0 else { continue }
            var reordered = durable
            for entry in pending where Bool.random(using: &generator) { Self.apply(entry, to: &reordered) }
            try examine(reordered, states[number], keys, "lost writes at \(index) of \(entries.count), seed \(seed)")
        }
    }

    /// The same with two engines, each in a thread with sectors of its own between those of the other. The flush that counts is now the one's and now the
    /// other's, and covers what has ended at both.
    @Test(arguments: ["cluster_size=4k", "cluster_size=512,refcount_bits=16", "cluster_size=16k,extended_l2=on"], [false, true])
    func whatWasFlushedByEitherOfTwoSurvives(options: String, usesBacking: Bool) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 6) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 256 << 10
        let path = directory.file("disk.qcow2")
        var contents = [UInt8](repeating: 0, count: size)
        if usesBacking {
            contents = randomBytes(size, seed: seed)
            let base = try directory.write("base.raw", contents)
            qemuImage("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path)
        } else {
            qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "\(size)")
        }
        var file = try directory.read("disk.qcow2")
        let log = Log()
        var states = [State(flushed: contents)]
        do {
            let shared = try SharedImage(DiskImage(path: path, options: DiskImageOptions(locking: false, metadataCacheSize: 0)), calls: log.calls)
            let crew = EngineCrew(shared, count: 2, contents, seed: seed, usesRing: false)
            for phase in 0..<10 {
                let history = try crew.run(rounds: 3)
                states[states.count - 1].history = history
                crew.flush(phase % 2)
                log.append(.flushed(states.count))
                states.append(State(flushed: crew.model))
            }
        }
        try replay(log, states, &file, seed: seed)
    }

    /// An image after the power failed: sound but for leaks. A sector is as it was flushed, or as somebody made it since, or, if it was
    /// touched, zeroes (what a discard leaves).
    private func examine(_ file: [UInt8], _ state: State, _ keys: [DiskKey], _ comment: String) throws {
        let path = try directory.write("crashed.qcow2", file)
        try expectNoErrors(path, comment, isEncrypted: !keys.isEmpty)
        var options = DiskImageOptions(readOnly: true, locking: false)
        options.keys = keys
        var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4, usesRing: false)
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

    /// Our check finds no errors; for one in eight nor does qemu-img's, with which ours agrees (`CheckTests`).
    private func expectNoErrors(_ path: String, _ comment: String, isEncrypted: Bool = false) throws {
        let report = try DiskImage.check(path: path, options: unlocked)
        #expect(report.errors == 0, "\(report.findings.prefix(5)) \(comment)")
        guard Self.examined.next() % 8 == 0 else { return }
        if isEncrypted { try Encrypted(directory).expectSound(path, leaksAllowed: true, comment) } else { expectSound(path, leaksAllowed: true, comment) }
    }

    private static let examined = FaultTests.Counter()

    // MARK: - The image as a whole

    /// What a flush, or something that changes the image as a whole, has left.
    struct Whole {
        var disk: [UInt8]
        var snapshots: [(id: String, contents: [UInt8])]
        var history: [(range: Range<Int>, bytes: [UInt8])] = []
    }

    /// Power that fails while snapshots are made, applied and deleted and the disk gets longer and shorter: each of these has happened or it has not.
    @Test(arguments: ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on", "cluster_size=4k,refcount_bits=64"])
    func whatChangesTheImageHappensInFullOrNotAtAll(options: String) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 11) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 200 << 10, isOld = options.contains("0.10")
        let path = directory.file("disk.qcow2")
        // Longer than the disk, which must not show when that grows.
        let base = randomBytes(300 << 10, seed: seed)
        try directory.write("base.raw", base)
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", path, "\(size)")
        var file = try directory.read("disk.qcow2")
        let log = Log()
        var life = Lifetime(Array(base.prefix(size)), seed: seed, maximum: 16 << 10, canKeep: true, canResize: !isOld)
        var states = [Whole(disk: life.workload.model, snapshots: [])]
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(locking: false, metadataCacheSize: 0)), depth: 8, segments: 8, calls: log.calls)
            for round in 0..<(environment("SWKVM_CRASH_ROUNDS") ?? 24) {
                try life.workload.round(&engine)
                try engine.perform(.flush)
                log.append(.flushed(states.count))
                states[states.count - 1].history = life.workload.history
                life.workload.history = []
                states.append(Whole(disk: life.workload.model, snapshots: life.snapshots))
                if round % 3 == 2, !isOld { try life.resize(&engine) } else { try life.changeSnapshots(&engine) }
                log.append(.flushed(states.count))
                states.append(Whole(disk: life.workload.model, snapshots: life.snapshots))
            }
        }
        var generator = SeededGenerator(seed: seed)
        var durable = file, number = 0
        var pending: [Log.Entry] = []
        let entries = log.all
        let step = environment("SWKVM_CRASH_STEP") ?? max(1, entries.count / 200)
        for (index, entry) in entries.enumerated() {
            Self.apply(entry, to: &file)
            switch entry {
            case .synchronize:
                durable = file
                pending = []
            case .flushed(let n): number = n
            case .write, .hole, .size: pending.append(entry)
            }
            guard index % step == 0 else { continue }
            try examine(file, states, number, "prefix \(index) of \(entries.count), seed \(seed)")
            guard !pending.isEmpty, index / step % 2 == 0 else { continue }
            var reordered = durable
            for entry in pending where Bool.random(using: &generator) { Self.apply(entry, to: &reordered) }
            try examine(reordered, states, number, "lost writes at \(index) of \(entries.count), seed \(seed)")
        }
    }

    /// The image is sound, and is as state `number` has it, with or without what was done since, or already as the next.
    private func examine(_ file: [UInt8], _ states: [Whole], _ number: Int, _ comment: String) throws {
        let path = try directory.write("crashed.qcow2", file)
        try expectNoErrors(path, comment)
        var found: [(id: String?, contents: [UInt8])] = []
        var ids: [String?] = [nil]
        while let id = ids.popLast() {
            var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, snapshot: id)), depth: 4, usesRing: false)
            found.append((id, try engine.readAll()))
            if id == nil { ids += try engine.snapshots().map { $0.id } }
        }
        let candidates = [states[number]] + (number + 1 < states.count ? [states[number + 1]] : [])
        let fits = candidates.contains { state in
            guard found.count == state.snapshots.count + 1 else { return false }
            return found.allSatisfy { id, contents in
                if let id { return state.snapshots.contains { $0.id == id && $0.contents == contents } }
                guard contents.count == state.disk.count else { return false }
                return stride(from: 0, to: contents.count, by: 512).allSatisfy { sector in
                    if isEqual(contents, sector, state.disk, sector) { return true }
                    let bytes = contents[sector..<sector + 512]
                    let changes = state.history.filter { $0.range.contains(sector) }
                    return changes.contains { $0.bytes[sector - $0.range.lowerBound..<sector - $0.range.lowerBound + 512] == bytes }
                        || (!changes.isEmpty && bytes.allSatisfy { $0 == 0 })
                }
            }
        }
        #expect(fits, "\(found.count - 1) snapshots, \(found[0].contents.count) bytes; \(comment)")
    }

    /// Power that fails during a repair: what could be read can be read at every moment, and a repair can be made again.
    @Test(arguments: ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on"], [CheckReport.Repair.leaks, .all])
    func aRepairCanBeInterrupted(options: String, repair: CheckReport.Repair) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        qemuIO(path, ["write -P 3 0 400k"])
        qemuImage("snapshot", "-c", "one", path)
        qemuIO(path, ["write -P 4 100k 100k"])
        var file = try directory.read("disk.qcow2")
        let contents: [UInt8]
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
            contents = try engine.readAll()
        }
        let block = Int(file.bigEndian64(at: Int(file.bigEndian64(at: 48))))
        let clusters = file.count >> Int(file.bigEndian32(at: 20))
        // Shared clusters counted too often, with which no flag goes; and, for the other repair, clusters not counted at all.
        for cluster in 3..<min(clusters, 200) where file[block + cluster * 2 + 1] == 2 { file[block + cluster * 2 + 1] = 5 }
        if repair == .all { for cluster in stride(from: 4, to: min(clusters, 200), by: 7) { file[block + cluster * 2 + 1] = 0 } }
        try directory.write("disk.qcow2", file)
        let log = Log()
        let before = try DiskImage.check(path: path, options: unlocked)
        #expect(before.leaks > 0 && (before.errors > 0) == (repair == .all))
        do {
            let image = try ImageFile(path: path, writable: true, cache: .writeback, locking: false)
            let report = try DiskImage.check(image, repair, calls: log.calls)
            #expect(report.isSound)
        }
        expectSound(path)
        var durable = file
        var pending: [Log.Entry] = []
        var generator = SeededGenerator(seed: 6)
        for (index, entry) in log.all.enumerated() {
            Self.apply(entry, to: &file)
            if case .synchronize = entry {
                durable = file
                pending = []
            } else { pending.append(entry) }
            var reordered = durable
            for entry in pending where Bool.random(using: &generator) { Self.apply(entry, to: &reordered) }
            for image in [file, reordered] {
                let path = try directory.write("crashed.qcow2", image)
                if repair == .leaks { try expectNoErrors(path, "\(index)") }
                #expect(try DiskImage.check(path: path, options: unlocked, repair: repair).isSound, "\(index)")
                var engine = try DiskEngine(DiskImage(path: path, options: readOnly), depth: 4, usesRing: false)
                #expect(try engine.readAll() == contents, "\(index)")
            }
        }
    }

    // MARK: - Hosts that fail

    /// One call fails while snapshots are made, applied and deleted and the disk gets longer and shorter: what failed has not happened, or, where
    /// nobody can know, is refused to be built upon until the image is opened again. The image is sound.
    @Test(arguments: [ENOSPC, EIO]) func everyCallOfAChangeMayFail(error: Int32) throws {
        let path = directory.file("disk.qcow2")
        let contents = randomBytes(256 << 10, seed: 12)
        try directory.write("base.raw", contents)
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw", path)
        let start = try directory.read("disk.qcow2")
        // The first time nothing fails, and the calls are counted.
        var victim = -1, total = 1, failures = 0
        let step = environment("SWKVM_FAULT_STEP") ?? 1
        while victim < total {
            try directory.write("disk.qcow2", start)
            let counter = FaultTests.Counter()
            let failing = victim
            // The states that the disk may be in: when something fails, the old one or the new.
            var possible = [contents], isWrite = false
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4, segments: 4, calls: FaultTests.calls { call in
                    _ = counter.next()
                    return call == failing ? .error(error) : .none
                })
                let steps: [([UInt8], (inout DiskEngine) throws -> Void)] = {
                    var disk = contents
                    disk.replaceSubrange(8192..<40960, with: repeatElement(7, count: 32768))
                    let short = Array(disk[..<(100 << 10)])
                    return [
                        (disk, { try $0.write(8192, [UInt8](repeating: 7, count: 32768)) }), (disk, { try $0.perform(.flush) }),
                        (disk, { try $0.createSnapshot(named: "one") }), (short, { try $0.resize(to: 100 << 10, shrinks: true) }),
                        (short + [UInt8](repeating: 0, count: 924 << 10), { try $0.resize(to: 1 << 20, preallocation: .metadata) }),
                        (disk, { try $0.applySnapshot("one") }), (disk, { try $0.deleteSnapshot("one") }),
                    ]
                }()
                for (index, (disk, change)) in steps.enumerated() {
                    do { try change(&engine) } catch {
                        failures += 1
                        // What no flush has made durable may be as it was.
                        possible += index < 2 ? [contents, disk] : [disk]
                        isWrite = index == 0
                        break
                    }
                    possible = [disk]
                }
                total = max(total, counter.next())
            }
            expectSound(path, leaksAllowed: true, "call \(failing)")
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4)
            let now = try engine.readAll()
            #expect(possible.contains(now) || isWrite, "call \(failing): \(now.count) bytes")
            // And it can be gone on with.
            try engine.write(0, [UInt8](repeating: 9, count: 4096))
            _ = consume engine
            expectSound(path, leaksAllowed: true, "call \(failing)")
            victim = victim < 0 ? 0 : victim + step
        }
        #expect(total > 60 && failures > total / 2 / step, "\(total) calls, \(failures) failures")
    }

    /// A host that does everything in pieces and is interrupted all the time.
    @Test func shortTransfersAndInterruptsChangeNothing() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "400k")
        var life = Lifetime([UInt8](repeating: 0, count: 400 << 10), seed: 4, maximum: 16 << 10, canKeep: true, canResize: true)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 8, segments: 8, calls: FaultTests.calls { call in
                switch call % 4 {
                case 0, 2: .short
                case 1: .error(EINTR)
                default: .none
                }
            })
            for round in 0..<80 {
                try life.step(&engine)
                if round % 10 == 5 { try life.changeSnapshots(&engine) }
                if round % 10 == 9 { try life.resize(&engine) }
            }
        }
        expectSound(path)
        try life.expectContents(path)
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
        let step = environment("SWKVM_FAULT_STEP") ?? 3
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

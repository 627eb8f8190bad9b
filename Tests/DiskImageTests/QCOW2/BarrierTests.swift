// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Power that fails during what a random workload seldom does, or never: its synchronisations have a test here that
/// fails without them. Every prefix of what came to the file is replayed, and for each what is left when the last write
/// has overtaken all others, or some of them.
@Suite(.timed) struct BarrierTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// As many clusters as fit in 32 KiB need a refcount block or two of their own, and an L2 table.
    private static let options = "cluster_size=512,refcount_bits=64", size = 256 << 10
    private static let seed: UInt64 = 17

    /// A close with new refcount blocks, tables and clusters, and with some that go, none of which any flush has made
    /// durable.
    @Test(arguments: [false, true]) func aCloseKeepsTheOrderOfACommit(hasDataFile: Bool) throws {
        let path = directory.file("disk.qcow2")
        let data = hasDataFile ? [directory.file("data")] : []
        qemuImage([
            "create", "-q", "-f", "qcow2", "-o", Self.options + data.map { ",data_file=\($0)" }.joined(), path,
            "\(Self.size)",
        ])
        qemuIO(path, ["write -P 3 0 48k"])
        let names = ["disk.qcow2"] + (hasDataFile ? ["data"] : [])
        let start = try names.map { try directory.read($0) }
        let log = CrashLog([path] + data)
        var state = CrashState(flushed: try contents(path))
        do {
            var engine = try open(path, log)
            try state.write(&engine, at: 20 << 10, [UInt8](repeating: 4, count: 512))
            try state.write(&engine, at: 64 << 10, randomBytes(40 << 10, seed: Self.seed))
            try state.zero(&engine, at: 4 << 10, 16 << 10)
            let isCommitted = log.all.contains { $0.isSynchronisation }
            #expect(!isCommitted, "what is closed has nothing to make durable")
        }
        let isClosed = log.all.contains { $0.isSynchronisation }
        #expect(isClosed)
        try replay(log, start, names) { _ in state }
    }

    /// Features that only those keep true who know them are switched off, durably, before anything else of the image
    /// changes.
    @Test func autoclearBitsGoBeforeTheFirstChange() throws {
        let path = directory.file("disk.qcow2"), size = 256 << 10
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "\(size)")
        qemuIO(path, ["write -P 1 0 64k"])
        var start = try directory.read("disk.qcow2")
        start[88] = 0x80
        try directory.write("disk.qcow2", start)
        let log = CrashLog([path])
        let contents = [UInt8](repeating: 1, count: 64 << 10) + [UInt8](repeating: 0, count: size - 64 << 10)
        _ = try log.record(path, unlocked, contents, seed: 3, maximum: 16 << 10, rounds: 6)
        var off = 0
        try log.replay([start], prefixes: .max, seed: 3, overtakes: true) { files, _, comment in
            guard files[0][88] == 0x80 else { return off += 1 }
            let isUnchanged = Array(files[0].prefix(start.count)) == start
            #expect(isUnchanged, "\(comment)")
        }
        #expect(off > 10)
    }

    /// The refcount table ends at 2 MiB: what is written from there on is counted in a longer one.
    @Test func aLongerRefcountTableIsDurableBeforeItIsTheImages() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", Self.options, path, "\(Self.size)")
        qemuIO(path, ["write -P 3 0 8k"])
        var start = try directory.read("disk.qcow2")
        #expect(start.bigEndian32(at: 56) == 1)
        start += [UInt8](repeating: 0, count: 2 << 20 - 4096 - start.count)
        try directory.write("disk.qcow2", start)
        let log = CrashLog([path])
        var states = [CrashState(flushed: try contents(path))]
        do {
            var engine = try open(path, log)
            // As if all before the file's end were in use.
            engine.image.withQCOW2 { $0.refcounts?.allocateAtEnd() }
            for round in 0..<3 {
                try states[round].write(
                    &engine, at: (16 + round * 12) << 10, randomBytes(12 << 10, seed: Self.seed + UInt64(round)))
                // The old table goes with the first commit that comes after.
                try states[round].zero(&engine, at: (2 * round) << 10, 1 << 10)
                try engine.perform(.flush)
                log.append(.flushed(round + 1))
                states.append(CrashState(flushed: try engine.readAll()))
            }
        }
        let now = try directory.read("disk.qcow2")
        #expect(now.bigEndian64(at: 48) != start.bigEndian64(at: 48) && now.bigEndian32(at: 56) > 1, "it did not grow")
        expectSound(path)
        try replay(log, [start], ["disk.qcow2"]) { states[$0] }
    }

    /// While a commit makes counts durable the mapping stays as it is: what needs new clusters waits, and is not
    /// written before it is counted. Nor is a refcount block made that the commit, whose synchronisation did not cover
    /// it, would enter into the refcount table.
    /// - Parameter isSynchronised: whether that synchronisation is over when the others come, and nobody has looked
    ///   yet.
    @Test(arguments: [false, true]) func theMappingIsLockedDuringACommit(isSynchronised: Bool) throws {
        let path = directory.file("disk.qcow2")
        let base = randomBytes(Self.size, seed: Self.seed)
        try directory.write("base.raw", base)
        qemuImage("create", "-q", "-f", "qcow2", "-o", Self.options, "-b", "base.raw", "-F", "raw", path)
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        var state = CrashState(flushed: base)
        do {
            var engine = try open(path, log)
            // In new refcount blocks, so that the commit has a synchronisation for the table as well, which comes after
            // the data below. That needs one more.
            try state.write(&engine, at: 0, randomBytes(36 << 10, seed: Self.seed + 1))
            let blocks = log.newRefcountBlocks
            #expect(blocks > 0)
            let bytes = randomBytes(28 << 10, seed: Self.seed + 2)
            state.history += [
                (36 << 10..<64 << 10, bytes), (200 << 10..<210 << 10, [UInt8](repeating: 0, count: 10 << 10)),
            ]
            let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 512)
            defer { unsafe memory.deallocate() }
            unsafe memory.copyBytes(from: bytes)
            var vector = unsafe iovec(iov_base: memory.baseAddress, iov_len: memory.count)
            try unsafe withUnsafePointer(to: &vector) { vector in
                let flush = engine.acquire(), zeroes = engine.acquire(), write = engine.acquire()
                engine.start(try #require(flush), .flush, offset: 0, length: 0)
                let isLocked = engine.image.isLocked
                #expect(isLocked)
                if isSynchronised { try engine.submit() }
                // Clusters for a part of the disk that has a table, and a table for one that has none.
                unsafe engine.start(
                    try #require(write), .write, offset: 36 << 10, length: 28 << 10, vectors: vector, count: 1)
                engine.start(try #require(zeroes), .writeZeroes, offset: 200 << 10, length: 10 << 10)
                #expect(log.newRefcountBlocks == blocks)
                for _ in 0..<3 {
                    let completion = try engine.waitForCompletion()
                    #expect(completion?.error == 0)
                    engine.release(try #require(completion).request)
                }
            }
            #expect(log.newRefcountBlocks > blocks)
        }
        expectSound(path)
        try replay(log, [start], ["disk.qcow2"]) { _ in state }
    }

    /// Other programs do not bear a VDI file that ends within a block: whenever its table refers to one, the file has
    /// all of it, however little was written.
    @Test func aBlockOfVDIIsInTheFileInFull() throws {
        let image = SmallImage.vdiOfSmallBlocks
        try image.make(in: directory)
        let path = directory.file(image.names[0])
        let start = try directory.read(image.names[0])
        let blockSize = 4096, table = 512, count = (image.size + blockSize - 1) / blockSize
        let log = CrashLog([path])
        do {
            var engine = try DiskEngine(
                DiskImage(path: path, options: image.options), depth: 4, segments: 4, calls: log.calls)
            for block in [10, 3] {
                try engine.write(UInt64(block * blockSize), [UInt8](repeating: 5, count: 512))
                try engine.perform(.flush)
            }
        }
        var referred = 0
        try log.replay([start], prefixes: .max, seed: Self.seed, overtakes: true) { files, _, comment in
            for entry in 0..<count {
                let number = files[0].littleEndian32(at: table + entry * 4)
                guard number != .max else { continue }
                referred += 1
                #expect(4096 + (Int(number) + 1) * blockSize <= files[0].count, "\(files[0].count) bytes, \(comment)")
            }
        }
        #expect(referred > 2)
    }

    // MARK: - Repairs

    enum Damage: CaseIterable {
        /// An L2 entry that is put right where it is.
        case entry
        /// Counts, which are written anew.
        case counts
        /// Nothing but the mark of an image that was not closed.
        case mark
    }

    /// When a repair returns, what it says to have put right is durable.
    @Test(arguments: Damage.allCases) func aRepairIsDurableWhenItReturns(damage: Damage) throws {
        let (path, sound) = try makeImage()
        let contents = try self.contents(path)
        var start = sound
        switch damage {
        case .entry: start[Int(start.firstL2Table) + 7] |= 2
        case .counts: start[Int(start.firstRefcountBlock) + 6 * 8 + 7] = 0
        case .mark: start[79] |= UInt8(QCOW2Header.Incompatible.dirty)
        }
        try directory.write("disk.qcow2", start)
        let log = CrashLog([path])
        let report = try repair(path, log)
        #expect(report.isSound && (report.errorsFixed > 0) == (damage != .mark))
        log.append(.flushed(1))
        try log.replay([start], prefixes: .max, seed: Self.seed, overtakes: true) { files, returned, comment in
            let path = try directory.write("crashed.qcow2", files[0])
            if returned == 1 {
                try expectNoErrors(path, comment)
                #expect(!files[0].isMarked, "\(comment)")
            }
            #expect(try DiskImage.check(path: path, options: unlocked, repair: .all).isSound, "\(comment)")
            #expect(try self.contents(path) == contents, "\(comment)")
        }
    }

    /// A program that keeps counts lazily was killed. Its flushes made data and mapping durable; the counts it had only
    /// written, or not even that. As long as they are not durable the image says that it was not closed.
    @Test(arguments: [false, true]) func anImageIsMarkedUntilItIsSound(hasWrittenCounts: Bool) throws {
        let (path, sound) = try makeImage()
        let contents = try self.contents(path)
        let block = Int(sound.firstRefcountBlock)
        var start = sound
        start[79] |= UInt8(QCOW2Header.Incompatible.dirty)
        // Of all but the tables that a new image has.
        let late = block + 6 * 8..<block + 512
        let counts = Array(start[late])
        start.replaceSubrange(late, with: repeatElement(0, count: late.count))
        var now = start
        let log = CrashLog([path])
        if hasWrittenCounts {
            now.replaceSubrange(late, with: counts)
            log.append(.write(file: 0, offset: late.lowerBound, bytes: counts))
        }
        try directory.write("disk.qcow2", now)
        let report = try repair(path, log)
        #expect(report.isSound && (report.errorsFixed == 0) == hasWrittenCounts)
        try log.replay([start], prefixes: .max, seed: Self.seed, overtakes: true) { files, _, comment in
            let path = try directory.write("crashed.qcow2", files[0])
            if !files[0].isMarked { try expectNoErrors(path, comment) }
            #expect(try self.contents(path) == contents, "\(comment)")
        }
    }

    // MARK: - Helpers

    /// A sound image with a few clusters, all of which one refcount block counts.
    private func makeImage() throws -> (path: String, bytes: [UInt8]) {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", Self.options, path, "\(Self.size)")
        qemuIO(path, ["write -P 3 0 8k"])
        return (path, try directory.read("disk.qcow2"))
    }

    private func repair(_ path: String, _ log: CrashLog) throws -> CheckReport {
        try DiskImage.check(
            ImageFile(path: path, writable: true, cache: .writeback, locking: false), .all, calls: log.calls)
    }

    private func open(_ path: String, _ log: CrashLog) throws -> DiskEngine {
        try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(locking: false, allowsDataFile: true)), depth: 8,
            segments: 8, calls: log.calls)
    }

    private func contents(_ path: String) throws -> [UInt8] {
        var engine = try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, allowsDataFile: true)),
            depth: 4, usesRing: false)
        return try engine.readAll()
    }

    /// The image is sound but for leaks at every moment, and there is a reason for what it shows.
    private func replay(
        _ log: CrashLog, _ start: [[UInt8]], _ names: [String], _ state: (_ flushed: Int) -> CrashState
    ) throws {
        try log.replay(start, prefixes: .max, seed: Self.seed, overtakes: true) { files, flushed, comment in
            for (name, bytes) in zip(names, files) { try directory.write(name, bytes) }
            let path = directory.file(names[0])
            try expectNoErrors(path, comment)
            let wrong = try state(flushed).unexplained(contents(path))
            #expect(wrong.isEmpty, "sectors at \(wrong.prefix(5)), \(comment)")
        }
    }
}

extension CrashLog {
    /// How many refcount blocks were made: each in the first of the 64 clusters that it counts, where nothing else ever
    /// is.
    fileprivate var newRefcountBlocks: Int {
        var places: Set<Int> = []
        for case .write(_, let offset, _) in all where offset > 0 && offset % (64 * 512) == 0 { places.insert(offset) }
        return places.count
    }
}

extension CrashState {
    /// Writes to a disk and notes it.
    fileprivate mutating func write(_ engine: inout DiskEngine, at offset: Int, _ bytes: [UInt8]) throws {
        history.append((offset..<offset + bytes.count, bytes))
        try engine.write(UInt64(offset), bytes)
    }

    fileprivate mutating func zero(_ engine: inout DiskEngine, at offset: Int, _ length: Int) throws {
        history.append((offset..<offset + length, [UInt8](repeating: 0, count: length)))
        try engine.perform(.writeZeroesUnmapping, at: UInt64(offset), length: UInt64(length))
    }
}

extension [UInt8] {
    // Of a qcow2 file.
    fileprivate var firstRefcountBlock: UInt64 { bigEndian64(at: Int(bigEndian64(at: 48))) }
    fileprivate var firstL2Table: UInt64 { bigEndian64(at: Int(bigEndian64(at: 40))) & QCOW2Image.L1Entry.offset }
    fileprivate var isMarked: Bool { bigEndian64(at: 72) & QCOW2Header.Incompatible.dirty != 0 }
}

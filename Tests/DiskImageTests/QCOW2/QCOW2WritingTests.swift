// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Images that we wrote, judged by qemu-img.
@Suite(.timed) struct QCOW2WritingTests {
    var directory = TemporaryDirectory(inMemory: true)

    /// One combination of how an image is made.
    struct Kind: CustomTestStringConvertible, Sendable {
        var options: String
        var start = Start.empty
        var size = 768 << 10 | 5 << 9

        enum Start: String, CaseIterable { case empty, compressed, rawBacking, qcow2Backing, shortBacking, snapshot }

        var testDescription: String { "\(options) \(start)" }
    }

    static let kinds: [Kind] = {
        var kinds: [Kind] = []
        for cluster in ["512", "4k", "64k"] {
            for (index, start) in Kind.Start.allCases.enumerated() {
                kinds.append(Kind(options: "cluster_size=\(cluster),compat=0.10", start: start))
                // Narrow counts cannot count a snapshot of compressed clusters that share one.
                let widths =
                    start == .snapshot ? [8, 64] : [[1, 16], [2, 32], [4, 64], [8, 16], [16, 1], [16]][index]
                for bits in widths {
                    kinds.append(Kind(options: "cluster_size=\(cluster),refcount_bits=\(bits)", start: start))
                }
            }
        }
        for start in Kind.Start.allCases {
            kinds.append(Kind(options: "cluster_size=16k,extended_l2=on", start: start))
            kinds.append(Kind(options: "cluster_size=128k,extended_l2=on", start: start))
        }
        // In the place of DATA comes a file of the test's own.
        for start in [Kind.Start.empty, .rawBacking, .qcow2Backing, .shortBacking] {
            kinds.append(Kind(options: "cluster_size=4k,data_file=DATA", start: start))
            kinds.append(Kind(options: "cluster_size=16k,extended_l2=on,data_file=DATA", start: start))
        }
        kinds.append(Kind(options: "cluster_size=64k,data_file=DATA,data_file_raw=on"))
        return kinds
    }()

    /// Makes an image and returns what it contains.
    func make(_ kind: Kind, _ name: String = "disk.qcow2", seed: UInt64) throws -> [UInt8] {
        let path = directory.file(name)
        let kind = Kind(
            options: kind.options.split(separator: "DATA", omittingEmptySubsequences: false).joined(
                separator: directory.file("data.raw")), start: kind.start, size: kind.size)
        var contents = [UInt8](repeating: 0, count: kind.size)
        let old = QCOW2ImageTests.sparse(kind.start == .shortBacking ? 333 << 10 | 512 : kind.size, seed: seed)
        let raw = try directory.write("start.raw", old)
        switch kind.start {
        case .empty:
            qemuImage("create", "-q", "-f", "qcow2", "-o", kind.options, path, "\(kind.size)")
        case .compressed, .snapshot:
            qemuImage("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", kind.options, raw, path)
            contents = old
            if kind.start == .snapshot {
                qemuIO(path, ["write -P 7 100k 300k", "write -z 600k 70k"])
                contents.replaceSubrange(100 << 10..<400 << 10, with: repeatElement(7, count: 300 << 10))
                contents.replaceSubrange(600 << 10..<670 << 10, with: repeatElement(0, count: 70 << 10))
                qemuImage("snapshot", "-c", "before", path)
            }
        case .rawBacking, .shortBacking:
            qemuImage("create", "-q", "-f", "qcow2", "-o", kind.options, "-b", raw, "-F", "raw", path, "\(kind.size)")
            contents.replaceSubrange(0..<old.count, with: old)
        case .qcow2Backing:
            qemuImage(
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", raw, directory.file("base.qcow2")
            )
            qemuImage(
                "create", "-q", "-f", "qcow2", "-o", kind.options, "-b", "base.qcow2", "-F", "qcow2", path,
                "\(kind.size)")
            contents = old
        }
        return contents
    }

    /// What qemu-img makes of an image.
    func contents(_ path: String) throws -> [UInt8] {
        qemuImage("convert", "-U", "-f", "qcow2", "-O", "raw", path, directory.file("out.raw"))
        return try directory.read("out.raw")
    }

    /// Fewer of the host's clusters than writes: what is freed is used again, and its space is given back.
    @Test func freedClustersAreUsedAgain() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", path, "64M")
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        for round in 0..<20 {
            try engine.write(UInt64(round) << 21, randomBytes(1 << 20, seed: UInt64(round)))
            try engine.perform(.flush)
            try engine.perform(.discard, at: UInt64(round) << 21, length: 1 << 20)
            try engine.perform(.flush)
        }
        _ = consume engine
        // While it is used the file is longer, ahead of what is written.
        let status = try FileDescriptor.open(path, O_RDONLY).status()
        #expect(status.st_size <= 3 << 20 && status.st_blocks * 512 <= 1 << 20, "\(status.st_size) \(status.st_blocks)")
        expectSound(path)
    }

    @Test func whatMustNotBeWrittenIsRefused() throws {
        for (bit, word) in [(UInt8(2), "corrupt")] {
            let path = directory.file("\(bit).qcow2")
            qemuImage("create", "-q", "-f", "qcow2", path, "1M")
            var bytes = try directory.read("\(bit).qcow2")
            bytes[79] = bit
            try directory.write("\(bit).qcow2", bytes)
            let error = try #require(openError(path))
            #expect("\(error)".contains(word) && "\(error)".contains("add ,ro"))
            // Nothing was changed, and it can be read.
            #expect(try directory.read("\(bit).qcow2") == bytes)
            _ = try DiskImage(path: path, options: readOnly)
        }
    }

    /// Unknown autoclear bits are cleared by the first change and not by looking; unknown extensions stay.
    @Test func featuresThatOnlyOthersKeepTrueAreSwitchedOff() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        var bytes = try directory.read("disk.qcow2")
        bytes[88] = 0x80
        try directory.write("disk.qcow2", bytes)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            _ = try engine.read(0, 65536)
            try engine.perform(.flush)
        }
        #expect(try directory.read("disk.qcow2") == bytes)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.write(0, [1] + [UInt8](repeating: 0, count: 511))
        }
        let after = try directory.read("disk.qcow2")
        #expect(after[88..<96].allSatisfy { $0 == 0 })
        // The rest of the header, its extensions among it, is as it was.
        #expect(after[96..<4096] == bytes[96..<4096])
        expectSound(path)
    }

    /// A small write takes a subcluster and no more, which the file shows.
    @Test func subclustersAreAllocatedOneByOne() throws {
        let path = directory.file("disk.qcow2")
        let base = try directory.write("base.raw", randomBytes(4 << 20, seed: 8))
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=128k,extended_l2=on", "-b", base, "-F", "raw", path)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        let before = try FileDescriptor.open(path, O_RDONLY).status().st_blocks
        // A whole subcluster, a part of one, and two in the middle of a cluster whose others are zeroes.
        try engine.write(8192, [UInt8](repeating: 1, count: 4096))
        try engine.write(256 << 10 | 512, [UInt8](repeating: 2, count: 512))
        try engine.perform(.writeZeroes, at: 512 << 10, length: 128 << 10)
        try engine.write(600 << 10, [UInt8](repeating: 3, count: 8192))
        try engine.perform(.flush)
        #expect(
            try FileDescriptor.open(path, O_RDONLY).status().st_blocks - before
                <= (4096 + 4096 + 8192 + 4096 + 128 << 10) / 512)
        _ = consume engine
        expectSound(path)
        let map = run(["qemu-img", "map", "--output=json", "-f", "qcow2", path]).output
        #expect(map.contains("\"start\": 8192, \"length\": 4096, \"depth\": 0"))
        #expect(map.contains("\"start\": 262144, \"length\": 4096, \"depth\": 0"))
        #expect(map.contains("\"start\": 614400, \"length\": 8192, \"depth\": 0, \"present\": true, \"zero\": false"))
    }

    /// The name that the image has, or the user, and nothing else: not the image itself, and no file that is not there.
    @Test func dataFilesAreThoseThatAreNamed() throws {
        let path = directory.file("disk.qcow2"), data = directory.file("data.raw"), other = directory.file("other.raw")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(data)", path, "1M")
        try directory.write("other.raw", [UInt8](repeating: 7, count: 1 << 20))
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(dataFile: data)))
            let files = engine.image.files
            #expect(files == [path, data])
            try engine.write(0, [UInt8](repeating: 1, count: 65536))
            #expect(throws: DiskImageError.self) { try engine.createSnapshot(named: "one") }
        }
        expectSound(path)
        #expect(try directory.read("data.raw").prefix(65536).allSatisfy { $0 == 1 })
        var engine = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(readOnly: true, dataFile: other)))
        #expect(try engine.read(0, 65536) == [UInt8](repeating: 7, count: 65536))
        #expect(
            openError(path, DiskImageOptions(locking: false, dataFile: path))
                == .dataFile(of: path, .backingLoop(path: path)))
        #expect(openError(path, DiskImageOptions(locking: false)) == .dataFileNotAllowed(path: path, name: data))
        #expect(run(["rm", data]).status == 0)
        let missing = SystemCallError("open", errno: ENOENT)
        #expect(
            openError(path, DiskImageOptions(locking: false, allowsDataFile: true))
                == .dataFile(of: path, .system(path: data, missing)))
        #expect(
            openError(path, DiskImageOptions(locking: false, dataFile: data))
                == .dataFile(of: path, .system(path: data, missing)))
    }

    /// A data file that is named is looked at by those too who do without one: it is there, it is another file, and it
    /// is long enough. An image that an external data file is not supported for conversion has none to be named.
    @Test func aNamedDataFileIsLookedAt() throws {
        let path = directory.file("disk.qcow2"), data = directory.file("data.raw"),
            plain = directory.file("plain.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(data),cluster_size=4k", path, "1M")
        qemuImage("create", "-q", "-f", "qcow2", plain, "1M")
        let options = DiskImageOptions(locking: false, dataFile: data)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: options))
            for cluster in [0, 3, 200, 255] as [UInt64] {
                try engine.write(cluster * 4096, randomBytes(4096, seed: cluster))
            }
        }
        #expect(try DiskImage.check(path: path, options: options).isSound)
        let alone = try ImageInformation(path: path, locking: false),
            both = try ImageInformation(path: path, locking: false, dataFile: data)
        #expect(alone.qcow2?.dataFile == data && alone.qcow2?.dataFilePath == nil && both.qcow2?.dataFilePath == data)
        #expect(both.allocated == alone.allocated && alone.qcow2?.dataFileAllocated == nil)
        #expect(try #require(both.qcow2?.dataFileAllocated) >= 16384)

        let unused = DiskImageError.dataFileUnused(path: plain, name: data)
        #expect(openError(plain, options) == unused)
        #expect(throws: unused) { _ = try DiskImage.check(path: plain, options: options) }
        #expect(throws: unused) { _ = try ImageInformation(path: plain, locking: false, dataFile: data) }
        let raw = DiskImageError.dataFileUnused(path: data, name: data)
        #expect(throws: raw) { _ = try DiskImage(path: data, options: options) }
        #expect(throws: raw) { _ = try ImageInformation(path: data, locking: false, dataFile: data) }
        let itself = DiskImageError.dataFile(of: path, .backingLoop(path: path))
        #expect(throws: itself) {
            _ = try DiskImage.check(path: path, options: DiskImageOptions(locking: false, dataFile: path))
        }
        #expect(throws: itself) { _ = try ImageInformation(path: path, locking: false, dataFile: path) }

        // What a file that was cut has lost is an error, which a repair turns into the zeroes that are read.
        #expect(run(["truncate", "-s", "800k", data]).status == 0)
        #expect(try DiskImage.check(path: path, options: DiskImageOptions(locking: false)).isSound)
        let report = try DiskImage.check(path: path, options: options)
        #expect(
            report.errors == 2 && report.leaks == 0
                && report.findings.allSatisfy { $0.description.hasSuffix("beyond the end of the data file") })
        let repaired = try DiskImage.check(path: path, options: options, repair: .all)
        #expect(repaired.errors == 0 && repaired.errorsFixed == 2)
        expectSound(path)
        var engine = try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, dataFile: data)))
        #expect(try engine.read(3 * 4096, 4096) == randomBytes(4096, seed: 3))
        #expect(try engine.read(200 * 4096, 56 * 4096) == [UInt8](repeating: 0, count: 56 * 4096))
        #expect(run(["rm", data]).status == 0)
        #expect(throws: DiskImageError.dataFile(of: path, .system(path: data, SystemCallError("open", errno: ENOENT))))
        { _ = try DiskImage.check(path: path, options: options) }
    }

    /// Data that was not durable when a commit began, and is linked after it, is made durable before the mapping by the
    /// next one.
    @Test func theMappingNeverOvertakesItsData() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        try engine.write(0, [UInt8](repeating: 1, count: 65536))
        let file = engine.metadataFile
        let run = try engine.image.withQCOW2 { qcow2 throws(MetadataError) in try qcow2.allocate(1, at: 65536, file)
        }!
        // The whole commit passes while the data is on its way.
        try engine.perform(.flush)
        #expect(engine.image.withQCOW2 { $0.needsBarrier } == false)
        engine.image.withQCOW2 { $0.link(run, at: 65536, sequence: 0) }
        #expect(engine.image.withQCOW2 { $0.needsBarrier } == true)
        // And while that is made durable, the mapping stays as it is.
        let isWritten = try engine.image.beginCommit(.host), isLocked = engine.image.isLocked
        #expect(isWritten && isLocked)
        engine.image.unlock()
    }

    /// A refcount table that has to grow, twice, with clusters so small that a table has few entries.
    @Test(arguments: [16, 64]) func theRefcountTableGrows(bits: Int) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=\(bits)", path, "40M")
        let contents = randomBytes(40 << 20, seed: 77)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        for offset in stride(from: 0, to: contents.count, by: 1 << 20) {
            try engine.write(UInt64(offset), Array(contents[offset..<offset + (1 << 20)]))
        }
        try engine.perform(.flush)
        #expect(try engine.readAll() == contents)
        _ = consume engine
        expectSound(path)
        #expect(try self.contents(path) == contents)
    }

    @Test(arguments: Share.of(kinds)) func randomOperationsDoWhatAnArrayDoes(kind: Kind) throws {
        let seed = kind.testDescription.utf8.reduce(UInt64(environment("SWKVM_SEED") ?? 1)) { $0 &* 31 &+ UInt64($1) }
        let path = directory.file("disk.qcow2")
        var workload = Workload(try make(kind, seed: seed), seed: seed, maximum: 80 << 10)
        let rounds = environment("SWKVM_ROUNDS") ?? 40
        for session in 0..<3 {
            // With few slices in memory, then many; with and without io_uring.
            let options = DiskImageOptions(
                locking: false, metadataCacheSize: session == 0 ? 0 : 32 << 20, allowsDataFile: true)
            var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 8, usesRing: session != 1)
            for round in 0..<rounds {
                try workload.round(&engine)
                if round % 9 == 8 { try engine.perform(.flush) }
            }
            #expect(try engine.readAll() == workload.model, "seed \(seed)")
            let damage = engine.image.damage
            #expect(damage == nil)
            _ = consume engine
            expectSound(path, "seed \(seed), session \(session)")
            #expect(try contents(path) == workload.model, "seed \(seed)")
        }
        let operations = workload.operations
        #expect(operations > 3 * rounds)
        // Who knows nothing of the image finds the disk in its data file.
        if kind.options.contains("raw=on") {
            let model = workload.model
            #expect(try directory.read("data.raw").prefix(kind.size).elementsEqual(model))
        }
        if kind.start == .snapshot {
            // The snapshot has what it had.
            qemuImage("snapshot", "-a", "before", path)
            expectSound(path)
            #expect(try contents(path) == make(kind, "again.qcow2", seed: seed))
        }
    }
}

/// A number that the environment sets, for longer runs.
func environment(_ name: String) -> Int? {
    unsafe getenv(name).flatMap { unsafe Int(String(cString: $0)) }
}

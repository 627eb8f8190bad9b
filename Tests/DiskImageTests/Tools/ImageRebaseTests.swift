// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// An image keeps its disk when it gets another backing file, or none.
@Suite(.timed) struct ImageRebaseTests {
    private let directory = TemporaryDirectory(inMemory: true)

    /// A disk with data in some places, which differ with the seed.
    private func disk(_ size: Int, seed: UInt64) -> [UInt8] {
        var generator = SeededGenerator(seed: seed)
        var bytes = [UInt8](repeating: 0, count: size)
        for _ in 0..<12 {
            let start = Int.random(in: 0..<size / 512, using: &generator) * 512,
                end = min(size, start + Int.random(in: 1...200, using: &generator) * 512)
            bytes.replaceSubrange(start..<end, with: randomBytes(end - start, seed: generator.next()))
        }
        return bytes
    }

    /// Backing files that are not there, shorter than the disk, and longer.
    enum Backing: String, CaseIterable { case none, shorter, longer }

    private func make(_ backing: Backing, _ name: String, size: Int, seed: UInt64) throws -> BackingReference? {
        switch backing {
        case .none: return nil
        case .shorter: try directory.write(name, disk(size / 2 + 512, seed: seed))
        case .longer: try directory.write(name, disk(size + 200 * 512, seed: seed))
        }
        return BackingReference(name: name, format: .raw)
    }

    static let layouts = [
        "cluster_size=64k", "cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=64k,extended_l2=on",
        "cluster_size=64k,compression_type=zstd",
    ]

    @Test(arguments: layouts, Backing.allCases) func theDiskStaysAsItIs(layout: String, before: Backing) throws {
        let size = 3 << 20 | 5 << 9
        for (round, after) in Backing.allCases.enumerated() where before != .none || after != .none {
            let old = try make(before, "old.raw", size: size, seed: 1),
                new = try make(after, "new.raw", size: size, seed: UInt64(2 + round))
            let path = directory.file("disk.qcow2")
            qemuImage(
                ["create", "-q", "-f", "qcow2", "-o", layout, path] + (old.map { ["-b", $0.name, "-F", "raw"] } ?? [])
                    + ["\(size)"])
            qemuIO(path, ["write -P 5 100k 50k", "write -z 300k 100k", "write -c -P 6 1M 64k", "discard 600k 128k"])
            let contents = try readDisk(path)
            var rebase = ImageRebase(path: path)
            rebase.backing = new
            try rebase.run()
            #expect(try readDisk(path) == contents, "\(before) → \(after)")
            qemuImage("convert", "-f", "qcow2", "-O", "raw", path, directory.file("copy.raw"))
            #expect(try directory.read("copy.raw") == contents, "\(before) → \(after), read by qemu-img")
            expectSound(path)
            #expect(try ImageInformation(path: path).backing?.name == new?.name)
        }
    }

    static let windowLayouts = [
        "cluster_size=64k", "cluster_size=2M", "cluster_size=4k", "cluster_size=512", "cluster_size=64k,extended_l2=on",
        "cluster_size=16k,compat=0.10",
        "cluster_size=64k,data_file=DATA", "cluster_size=16k,lazy_refcounts=on", "LUKS",
    ]

    /// More than there is memory for at a time, in pieces of all sizes: to another backing file, to none, and back into
    /// one.
    @Test(arguments: Share.of(windowLayouts), [1, 2] as [UInt64]) func manyWindows(layout: String, seed: UInt64) throws
    {
        let size = 44 << 20 | 7 << 9, path = directory.file("disk.qcow2"), encrypted = try Encrypted(directory)
        var generator = SeededGenerator(seed: seed)
        // Of the first two a part is the same; the last has compressed clusters.
        let common = pieces(size, 60, &generator)
        let one = write(pieces(size, 60, &generator) + common, in: [UInt8](repeating: 0, count: size))
        let other = write(pieces(size, 60, &generator) + common, in: [UInt8](repeating: 0, count: size + (1 << 20)))
        try directory.write("one.raw", Array(one[..<(size - 3 << 20)]))
        try directory.write("other.raw", other)
        // With holes.
        for name in ["one.raw", "other.raw"] {
            #expect(run(["fallocate", "--dig-holes", directory.file(name)]).status == 0)
        }
        qemuImage(
            "convert", "-c", "-f", "raw", "-O", "qcow2", directory.file("other.raw"), directory.file("last.qcow2"))
        var options = DiskImageOptions(locking: false, allowsDataFile: true)
        if layout == "LUKS" {
            options.keys = [encrypted.key]
            _ = try encrypted.create("disk.qcow2", size: size, backing: BackingReference(name: "one.raw", format: .raw))
        } else {
            qemuImage(
                "create", "-q", "-f", "qcow2", "-o", layout.replacing("DATA", with: directory.file("data")), "-b",
                "one.raw", "-F", "raw", path, "\(size)")
        }
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: options))
            for (offset, bytes) in pieces(size, 40, &generator) { try engine.write(UInt64(offset), bytes) }
            for _ in 0..<20 {
                let start = Int.random(in: 0..<size >> 9, using: &generator) << 9,
                    length = min(size - start, Int.random(in: 1...2000, using: &generator) << 9)
                try engine.perform(.writeZeroesUnmapping, at: UInt64(start), length: UInt64(length))
            }
            try engine.perform(.flush)
        }
        let contents = try readDisk(path, options)
        for backing in [
            BackingReference(name: "other.raw", format: .raw), nil,
            BackingReference(name: "last.qcow2", format: .qcow2),
        ] {
            var rebase = ImageRebase(path: path)
            rebase.options = options
            rebase.backing = backing
            try rebase.run()
            let comment = "\(backing?.name ?? "none"), seed \(seed)"
            #expect(try isSame(readDisk(path, options), contents), "\(comment)")
            if layout == "LUKS" { encrypted.expectSound(path, comment) } else { expectSound(path, comment) }
        }
        var commit = ImageCommit(path: path)
        commit.options = options
        try commit.run()
        #expect(try isSame(readDisk(path, options), contents))
        expectSound(directory.file("last.qcow2"))
        if layout == "LUKS" { encrypted.expectSound(path) } else { expectSound(path) }
    }

    /// Data for some places of a disk.
    private func pieces(
        _ size: Int, _ count: Int, _ generator: inout SeededGenerator
    ) -> [(offset: Int, bytes: [UInt8])] {
        (0..<count).map { _ in
            let start = Int.random(in: 0..<size >> 9, using: &generator) << 9
            // Most are small, some are longer than a window.
            let length = min(
                size - start,
                Int.random(in: 1...(1 << Int.random(in: 1...13, using: &generator)), using: &generator) << 9)
            return (start, randomBytes(length, seed: generator.next()))
        }
    }

    private func write(_ pieces: [(offset: Int, bytes: [UInt8])], in disk: [UInt8]) -> [UInt8] {
        var disk = disk
        for (offset, bytes) in pieces { disk.replaceSubrange(offset..<offset + bytes.count, with: bytes) }
        return disk
    }

    /// A name that nobody could read is refused before anything is changed.
    @Test func namesThatDoNotFit() throws {
        for (clusterSize, length) in [(65536, 1024), (512, 600), (65536, 0)] {
            let path = directory.file("\(clusterSize).qcow2")
            qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=\(clusterSize)", path, "1M")
            let before = try directory.read("\(clusterSize).qcow2")
            for isUnsafe in [false, true] {
                var rebase = ImageRebase(path: path)
                rebase.backing = BackingReference(name: String(repeating: "n", count: length), format: .raw)
                rebase.isUnsafe = isUnsafe
                #expect(throws: DiskImageError.self) { try rebase.run() }
                #expect(try directory.read("\(clusterSize).qcow2") == before)
            }
        }
    }

    /// Features that only those keep true who know them are not, once the header is another.
    @Test func unknownAutoclearFeaturesGo() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuImage("bitmap", "--add", path, "kept")
        var bytes = try directory.read("disk.qcow2")
        bytes[95] |= 0x20
        try directory.write("disk.qcow2", bytes)
        var rebase = ImageRebase(path: path)
        rebase.isUnsafe = true
        rebase.backing = BackingReference(name: "base.raw", format: .raw)
        try rebase.run()
        #expect(try directory.read("disk.qcow2")[95] == 1)
    }

    /// A backing loop is reported as such, and the image stays unchanged.
    @Test(arguments: [false, true]) func theNewBackingFileMustNotStandOnTheImage(withLocks: Bool) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuImage("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", directory.file("over.qcow2"))
        let before = try directory.read("disk.qcow2")
        for name in ["over.qcow2", "disk.qcow2"] {
            var rebase = ImageRebase(path: path)
            rebase.options.locking = withLocks
            rebase.backing = BackingReference(name: name, format: .qcow2)
            var refusal = ""
            do { try rebase.run() } catch { refusal = "\(error)" }
            #expect(refusal.contains("contains a loop"), "\(name): \(refusal)")
        }
        #expect(try directory.read("disk.qcow2") == before)
        // A commit into a backing file that is the image itself.
        qemuImage("rebase", "-u", "-b", "disk.qcow2", "-F", "qcow2", path)
        var refusal = ""
        do { _ = try ImageCommit(path: path).run() } catch { refusal = "\(error)" }
        #expect(refusal.contains("contains a loop"), "\(refusal)")
    }

    private func readDisk(_ path: String, _ options: DiskImageOptions = DiskImageOptions()) throws -> [UInt8] {
        var options = options
        options.readOnly = true
        var engine = try DiskEngine(DiskImage(path: path, options: options))
        return try engine.readAll()
    }
}

/// What an image has goes into its backing file, and nothing of it stays.
@Suite(.timed) struct ImageCommitTests {
    private let directory = TemporaryDirectory(inMemory: true)

    @Test(
        arguments: ImageRebaseTests.layouts + ["cluster_size=64k,lazy_refcounts=on,refcount_bits=64"], ["raw", "qcow2"])
    func theBackingFileGetsAll(layout: String, format: String) throws {
        let base = directory.file("base.\(format)"), path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", format, base, "1M")
        qemuIO(base, ["write -P 1 0 1M"], format: format)
        qemuImage("create", "-q", "-f", "qcow2", "-o", layout, "-b", base, "-F", format, path, "3M")
        qemuIO(path, ["write -P 5 100k 50k", "write -z 300k 100k", "write -c -P 6 2M 64k"])
        let hasBitmap = format == "raw" && !layout.contains("0.10")
        if hasBitmap { qemuImage("bitmap", "--add", path, "kept") }
        qemuImage("convert", "-f", "qcow2", "-O", "raw", path, directory.file("before.raw"))
        let before = try directory.read("before.raw"),
            file = try ImageFile(path: path, writable: false, cache: .writeback, locking: false).identity
        let information = try ImageInformation(path: path)

        var commit = ImageCommit(path: path)
        commit.keepsContents = true
        try commit.run()
        for name in ["base.\(format)", "disk.qcow2"] {
            qemuImage(
                "convert", "-f", name == "disk.qcow2" ? "qcow2" : format, "-O", "raw", directory.file(name),
                directory.file("after.raw"))
            #expect(try directory.read("after.raw") == before)
        }
        commit.keepsContents = false
        try commit.run()
        qemuImage("convert", "-f", "qcow2", "-O", "raw", path, directory.file("after.raw"))
        #expect(try directory.read("after.raw") == before)
        var map = ImageMap(try DiskImage(path: path, options: readOnly))
        while let extent = try map.next() { #expect(extent.depth == 1, "\(extent)") }
        expectSound(path)
        // It is the same file, with its layout and bitmaps, and without what lay in it.
        #expect(try ImageFile(path: path, writable: false, cache: .writeback, locking: false).identity == file)
        #expect(try ImageInformation(path: path).qcow2 == information.qcow2)
        if hasBitmap { #expect(run(["qemu-img", "info", path]).output.contains("name: kept")) }
        #expect(try DiskImage.check(path: path).allocatedClusters == 0)
        // Where nothing that stays lies behind it, the file gets short.
        if !hasBitmap { #expect(try directory.read("disk.qcow2").count <= 12 * Int(#require(information.clusterSize))) }
    }

    /// A snapshot shows the backing file where it has nothing of its own.
    @Test func snapshotsAreNotChangedUnasked() throws {
        let base = try directory.write("base.raw", randomBytes(1 << 20, seed: 1)), path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
        qemuImage("snapshot", "-c", "one", path)
        qemuIO(path, ["write -P 5 100k 50k"])
        for keeps in [false, true] {
            var commit = ImageCommit(path: path)
            commit.keepsContents = keeps
            #expect(refusal { () throws(DiskImageError) in try commit.run() }.contains("its snapshots"))
        }
        #expect(try directory.read("base.raw") == randomBytes(1 << 20, seed: 1))
        var rebase = ImageRebase(path: path)
        #expect(refusal { () throws(DiskImageError) in try rebase.run() }.contains("its snapshots"))
        rebase.isUnsafe = true
        rebase.backing = BackingReference(name: "moved.raw", format: .raw)
        try rebase.run()
    }

    private func refusal(_ body: () throws(DiskImageError) -> Void) -> String {
        do throws(DiskImageError) { try body(); return "" } catch { return error.description }
    }
}

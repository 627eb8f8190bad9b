// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import DiskImage

/// What gives space back works where there is none: snapshots are deleted, disks made shorter, leaks repaired, images
/// emptied.
@Suite(.timed) struct FullFileSystemTests {
    let directory = TemporaryDirectory(inMemory: true)

    static let layouts = [
        "cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=4k,refcount_bits=1",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,refcount_bits=64",
    ]

    /// The calls of a file system without a free block.
    /// - Parameter reuses: whether a file's own blocks can be used again once it has given them back; elsewhere others
    ///   are quicker.
    static func full(_ calls: FileCalls, reuses: Bool) -> FileCalls {
        let free = Guarded(0)
        @Sendable func blocks(_ file: Int32) -> Int {
            var status = stat()
            return unsafe fstat(file, &status) == 0 ? Int(status.st_blocks) / 8 : 0
        }
        @Sendable func giving(_ file: Int32, _ call: () -> Int) -> Int {
            let before = blocks(file)
            let result = call()
            if reuses { free.withLock { $0 += max(0, before - blocks(file)) } }
            return result
        }
        return unsafe FileCalls(
            read: calls.read,
            write: { file, vectors, count, offset in
                var bytes = 0
                for index in 0..<Int(count) { unsafe bytes += vectors[index].iov_len }
                var needed = 0
                for page in stride(from: Int(offset) & ~4095, to: Int(offset) + bytes, by: 4096)
                where lseek(file, off_t(page), CLINUX_SEEK_DATA) != off_t(page) {
                    needed += 1
                }
                guard
                    free.withLock({ left in
                        guard needed <= left else { return false }
                        left -= needed
                        return true
                    })
                else { return -Int(ENOSPC) }
                return unsafe calls.write(file, vectors, count, offset)
            },
            synchronize: calls.synchronize,
            allocate: { file, mode, offset, length in
                mode == 0 ? -Int(ENOSPC) : giving(file) { calls.allocate(file, mode, offset, length) }
            },
            truncate: { file, size in giving(file) { calls.truncate(file, size) } })
    }

    /// Something that gives space back, and what is to be there afterwards.
    enum Verb: String, CaseIterable, CustomTestStringConvertible {
        case deleteFirst, deleteMiddle, deleteLast, shrink, shrinkToNothing, leaks
        var testDescription: String { rawValue }

        /// What is left of the snapshots "one", "two" and "three".
        var left: [String] {
            switch self {
            case .deleteFirst: ["two", "three"]
            case .deleteMiddle: ["one", "three"]
            case .deleteLast: ["one", "two"]
            case .shrink, .shrinkToNothing: ["one", "two", "three"]
            case .leaks: []
            }
        }
        var newSize: UInt64? {
            switch self {
            case .shrink: 100 << 10
            case .shrinkToNothing: 0
            default: nil
            }
        }

        func carryOut(_ path: String, _ calls: FileCalls) throws {
            if self == .leaks {
                let file = try ImageFile(path: path, writable: true, cache: .writeback, locking: false)
                #expect(try DiskImage.check(file, .leaks, calls: calls).isSound)
                return
            }
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4, segments: 4, calls: calls)
            if let newSize { return try engine.resize(to: newSize, shrinks: true) }
            try engine.deleteSnapshot(self == .deleteFirst ? "one" : self == .deleteMiddle ? "two" : "three")
        }
    }

    /// An image with three snapshots that have some clusters alone and others together, with holes where it has free
    /// clusters.
    private func makeImage(_ options: String, _ verb: Verb) throws -> String {
        let path = directory.file("disk.qcow2")
        // One-bit counts have no room for snapshots.
        let isNarrow = options.contains("refcount_bits=1") && !options.contains("16")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "300k")
        qemuIO(path, ["write -P 1 0 200k"])
        if !isNarrow {
            for (number, name) in ["one", "two", "three"].enumerated() {
                qemuImage("snapshot", "-c", name, path)
                qemuIO(path, ["write -P \(number + 2) \(number * 40)k 40k"])
            }
        }
        if verb == .leaks {
            // All of the snapshots is lost, as after a crash: clusters that are counted once too often, or for nothing.
            var file = try directory.read("disk.qcow2")
            file.store(UInt32(0), at: 60)
            file.store(UInt64(0), at: 64)
            try directory.write("disk.qcow2", file)
        }
        return path
    }

    /// What a disk, or one of its snapshots, contains.
    static func contents(_ path: String, snapshot: String? = nil) throws -> [UInt8] {
        var engine = try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, snapshot: snapshot)),
            depth: 4, usesRing: false)
        return try engine.readAll()
    }

    /// The names of an image's snapshots.
    static func names(_ path: String) throws -> [String] {
        try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false)), usesRing: false
        ).snapshots().map(\.name)
    }

    /// What a disk's user has written since the last flush is lost where its metadata finds no room at the end: that is
    /// said, since no request fails for it.
    @Test(arguments: [ImageFormat.qcow2, .vdi]) func metadataThatIsNotWrittenAtTheEndIsReported(
        format: ImageFormat
    ) throws {
        let path = directory.file("disk.\(format.rawValue)")
        qemuImage("create", "-q", "-f", format.rawValue, path, "4M")
        let isFull = Guarded(false), reports = Reports()
        var calls = FileCalls.host
        unsafe calls.write = { file, vectors, count, offset in
            unsafe isFull.withLock { $0 } ? -Int(ENOSPC) : FileCalls.host.write(file, vectors, count, offset)
        }
        var options = DiskImageOptions(format: format, locking: false)
        options.report = { reports.add($0) }
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4, segments: 4, calls: calls)
            try engine.write(0, [UInt8](repeating: 1, count: 4096))
            isFull.withLock { $0 = true }
        }
        let reason = DiskImageError.system(path: path, SystemCallError("write", errno: ENOSPC))
        #expect(
            reports.all == [
                "\(reason): the last metadata was not written; what was written since the last flush may be lost"
            ])
    }

    private static func blocks(_ path: String) -> Int {
        var status = stat()
        return unsafe stat(path, &status) == 0 ? Int(status.st_blocks) : -1
    }

    /// Every verb, where nothing is free and where freed clusters can be used.
    @Test(arguments: Verb.allCases, [true, false]) func whatGivesSpaceBackNeedsNone(verb: Verb, reuses: Bool) throws {
        for options in Self.layouts
        where !options.hasSuffix("refcount_bits=1") || verb == .shrink || verb == .shrinkToNothing {
            let path = try makeImage(options, verb)
            let isNarrow = options.hasSuffix("refcount_bits=1")
            let isOld = options.contains("0.10")
            // Snapshots of version 2 do not tell their size.
            if isOld, verb.newSize != nil { continue }
            let disk = try Self.contents(path)
            let before = Self.blocks(path)
            let snapshots = isNarrow ? [] : try verb.left.map { ($0, try Self.contents(path, snapshot: $0)) }
            try verb.carryOut(path, Self.full(.host, reuses: reuses))
            expectSound(path, options)
            let size = verb.newSize.map(Int.init) ?? disk.count
            #expect(try Self.contents(path) == Array(disk.prefix(size)), "\(options)")
            #expect(try Set(Self.names(path)) == Set(snapshots.map(\.0)), "\(options)")
            for (name, old) in snapshots {
                #expect(try Self.contents(path, snapshot: name) == old, "\(options) \(name)")
            }
            // What others still have is not freed, and several small clusters are in one block of the host's.
            if verb.newSize == nil || isNarrow, options != "cluster_size=512" {
                #expect(Self.blocks(path) < before, "\(options)")
            }
            // It can be gone on with.
            if size > 8192 {
                var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
                try engine.write(0, [UInt8](repeating: 9, count: 8192))
                _ = consume engine
                expectSound(path, options)
            }
        }
    }

    /// Power that fails meanwhile: the verb has happened or it has not, and what is left can be repaired.
    @Test(arguments: Share.of(Verb.allCases), [true, false]) func whatGivesSpaceBackInPlaceCanBeInterrupted(
        verb: Verb, reuses: Bool
    ) throws {
        for options in ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on"] {
            let isOld = options.contains("0.10")
            if isOld, verb.newSize != nil { continue }
            let path = try makeImage(options, verb)
            let disk = try Self.contents(path)
            let size = verb.newSize.map(Int.init) ?? disk.count
            let all = verb == .leaks ? [] : ["one", "two", "three"]
            let snapshots = Dictionary(
                uniqueKeysWithValues: try all.map { ($0, try Self.contents(path, snapshot: $0)) })
            let start = try directory.read("disk.qcow2")
            let log = CrashLog([path])
            try verb.carryOut(path, Self.full(log.calls, reuses: reuses))
            try log.replay([start], prefixes: environment("SWKVM_CRASH_STEP") == nil ? 16 : .max, seed: 8) {
                files, _, comment in
                let comment = "\(options) \(comment)"
                let path = try directory.write("crashed.qcow2", files[0])
                let now = try Self.contents(path)
                let left = try Self.names(path)
                #expect(now == disk || now == Array(disk.prefix(size)), "\(comment)")
                #expect(Set(left) == Set(all) || Set(left) == Set(verb.left), "\(left) \(comment)")
                for name in left {
                    #expect(try Self.contents(path, snapshot: name) == snapshots[name], "\(name) \(comment)")
                }
                // Flags that do not fit the counts yet are announced by the dirty bit, or, in version 2, cost a copy.
                let isDirty = !isOld && files[0][79] & 1 != 0
                if !isDirty, !isOld { try expectNoErrors(path, comment) }
                if isDirty {
                    // The next opening repairs it.
                    _ = try DiskImage(path: path, options: unlocked)
                    try expectNoErrors(path, comment)
                }
                #expect(try DiskImage.check(path: path, options: unlocked, repair: .all).isSound, "\(comment)")
                #expect(try Self.contents(path) == now && Self.names(path) == left, "\(comment)")
            }
        }
    }

    /// An image that is committed is emptied.
    @Test(arguments: [true, false]) func aCommittedImageIsEmptied(reuses: Bool) throws {
        let base = try directory.write("base.raw", randomBytes(1 << 20, seed: 2))
        let path = directory.file("overlay.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", base, "-F", "raw", path)
        qemuIO(path, ["write -P 7 0 300k"])
        let disk = try Self.contents(path)
        let before = Self.blocks(path)
        var commit = ImageCommit(path: path)
        commit.options.locking = false
        commit.calls = Self.full(.host, reuses: reuses)
        try commit.run()
        #expect(try Self.contents(path) == disk)
        #expect(try directory.read("base.raw") == disk)
        expectSound(path)
        #expect(Self.blocks(path) < before / 2)
    }

    /// An image that was not closed, whose refcounts are repaired when it is opened.
    @Test func aDirtyImageIsOpened() throws {
        let path = try makeImage("cluster_size=4k", .leaks)
        var file = try directory.read("disk.qcow2")
        file[79] |= 1
        try directory.write("disk.qcow2", file)
        let image = try ImageFile(path: path, writable: true, cache: .writeback, locking: false)
        var check = QCOW2Check(
            header: try QCOW2Header(image),
            file: TableFile(
                path: path,
                file: MetadataFile(calls: Self.full(.host, reuses: false), number: image.descriptor.rawValue)))
        #expect(try check.run(.all, repairsEntries: false).isSound)
        expectSound(path)
    }

    /// A file system that is really full, to the last block.
    @Test(.enabled(if: getuid() == 0, "a file system of its own needs root"), arguments: ["tmpfs", "ext4"])
    func aFileSystemThatIsReallyFull(kind: String) throws {
        let mount = directory.file("small")
        #expect(run(["mkdir", mount]).status == 0)
        var command = ["mount", "-t", "tmpfs", "-o", "size=12M", "swkvm-test", mount]
        if kind == "ext4" {
            let device = try directory.write("device", [])
            #expect(truncate(device, 16 << 20) == 0)
            let made = run(["mkfs.ext4", "-q", "-F", "-m", "0", device])
            // Not every machine has it, or loop devices.
            guard made.status == 0 else { return }
            command = ["mount", "-o", "loop", device, mount]
        }
        let mounted = run(command)
        if kind == "ext4", mounted.status != 0 { return }
        try #require(mounted.status == 0, "\(mounted.output)")
        defer { #expect(run(["umount", mount]).status == 0) }
        let path = mount + "/disk.qcow2"
        qemuImage("create", "-q", "-f", "qcow2", path, "64M")
        qemuIO(path, ["write -P 1 0 3M"])
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            for name in ["one", "two"] {
                try engine.createSnapshot(named: name)
                try engine.write(1 << 20, [UInt8](repeating: name == "one" ? 2 : 3, count: 1 << 20))
            }
        }
        func fill() {
            let append = "oflag=append conv=notrunc"
            _ = run([
                "sh", "-c", "cd '\(mount)'; for n in 4k 512; do dd if=/dev/zero of=fill bs=$n \(append); done; sync",
            ])
        }
        fill()
        let second = try Self.contents(path, snapshot: "two")
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.deleteSnapshot("one")
        }
        expectSound(path)
        #expect(try Self.contents(path, snapshot: "two") == second)
        fill()
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.resize(to: 2 << 20, shrinks: true)
            try engine.deleteSnapshot("two")
        }
        expectSound(path)
        #expect(
            try Self.contents(path) == [UInt8](repeating: 1, count: 1 << 20) + [UInt8](repeating: 3, count: 1 << 20))
    }
}

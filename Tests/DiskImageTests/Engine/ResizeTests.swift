// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Disks that get longer and shorter.
@Suite(.timed) struct ResizeTests {
    let directory = TemporaryDirectory(inMemory: true)

    private func contents(_ path: String) throws -> [UInt8] {
        qemuImage("convert", "-U", "-f", "qcow2", "-O", "raw", path, directory.file("out.raw"))
        return try directory.read("out.raw")
    }

    @Test(
        arguments: ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=64k,refcount_bits=1"],
        Preallocation.allCases)
    func growsByZeroes(options: String, preallocation: Preallocation) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "\(100 << 10 | 512)")
        var contents = randomBytes(100 << 10 | 512, seed: 1)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.write(0, contents)
            // To where another L1 entry is needed, and then another cluster of the L1 table.
            for size in [101 << 10, 700 << 10, 5 << 20 | 1 << 10] {
                try engine.resize(to: UInt64(size), preallocation: preallocation)
                contents += [UInt8](repeating: 0, count: size - contents.count)
                #expect(try engine.readAll() == contents)
                expectSound(path)
                try engine.write(UInt64(size - 1024), [UInt8](repeating: 7, count: 1024))
                contents.replaceSubrange(size - 1024..<size, with: [UInt8](repeating: 7, count: 1024))
            }
        }
        expectSound(path)
        #expect(try self.contents(path) == contents)
        let status = try FileDescriptor.open(path, O_RDONLY).status()
        switch preallocation {
        case .off: #expect(status.st_size < 4 << 20)
        case .metadata: #expect(status.st_size > 5 << 20 && status.st_blocks * 512 < 4 << 20)
        case .falloc, .full: #expect(status.st_blocks * 512 > 5 << 20)
        }
    }

    /// What a shrunken disk had is not there when it grows again, and a backing file that is longer does not show.
    @Test(arguments: ["cluster_size=4k", "cluster_size=64k", "cluster_size=4k,compat=0.10"], [false, true])
    func whatWasBeyondTheEndIsGone(options: String, hasBacking: Bool) throws {
        let path = directory.file("disk.qcow2")
        let base = randomBytes(1 << 20, seed: 2)
        try directory.write("base.raw", base)
        if hasBacking {
            qemuImage("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", path)
        } else {
            qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        }
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        if !hasBacking { try engine.write(0, base) }
        #expect(throws: DiskImageError.self) { try engine.resize(to: 300 << 10) }
        #expect(throws: DiskImageError.self) { try engine.resize(to: 1000, shrinks: true) }
        #expect(try engine.readAll() == base)
        for size in [700 << 10 | 512, 333 << 10 | 1536] {
            try engine.resize(to: UInt64(size), shrinks: true)
            #expect(try engine.readAll() == Array(base[..<size]))
            try engine.resize(to: 1 << 20)
            #expect(try engine.readAll() == base[..<size] + [UInt8](repeating: 0, count: 1 << 20 - size))
            expectSound(path)
        }
        try engine.resize(to: 0, shrinks: true)
        try engine.resize(to: 1 << 20)
        #expect(try engine.readAll().allSatisfy { $0 == 0 })
        _ = consume engine
        expectSound(path)
        if !hasBacking { #expect(try FileDescriptor.open(path, O_RDONLY).status().st_blocks < 1 << 10) }
    }

    /// The last cluster has nothing beyond the end that somebody else would show: qemu-img makes a disk longer and
    /// leaves that cluster as it is.
    @Test(
        // A snapshot's disk can have another size in version 3, and its clusters are counted twice.
        arguments: ["", ",extended_l2=on", ",cluster_size=2M"].flatMap { options in
            ["data", "compressed", "snapshot"].map { (options, $0) }
        }
            + [",compat=0.10", ",refcount_bits=1"].flatMap { options in ["data", "compressed"].map { (options, $0) } })
    func othersFindNothingBeyondTheEnd(options: String, kind: String) throws {
        let contents = randomBytes(256 << 10, seed: 6).map { $0 & 0xf }
        let path = directory.file("disk.qcow2"), size = 100 << 10 | 512
        try directory.write("source.raw", contents)
        qemuImage(
            ["convert"] + (kind == "compressed" ? ["-c"] : []) + [
                "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=off\(options)", directory.file("source.raw"), path,
            ])
        if kind == "snapshot" { qemuImage("snapshot", "-c", "whole", path) }
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.resize(to: UInt64(size), shrinks: true)
            let found = engine.image.size
            #expect(found == UInt64(size))
            #expect(try engine.readAll() == Array(contents[..<size]))
        }
        expectSound(path)
        qemuImage("resize", "-q", "-f", "qcow2", path, "256k")
        #expect(try self.contents(path) == contents[..<size] + [UInt8](repeating: 0, count: contents.count - size))
        if kind == "snapshot" {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.applySnapshot("whole")
            #expect(try engine.readAll() == contents)
        }
        expectSound(path)
    }

    @Test func snapshotsKeepTheirSize() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
        let contents = randomBytes(1 << 20, seed: 3)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        try engine.write(0, contents)
        try engine.createSnapshot(named: "whole")
        try engine.resize(to: 100 << 10, shrinks: true)
        expectSound(path)
        try engine.write(0, [UInt8](repeating: 1, count: 4096))
        try engine.applySnapshot("whole")
        #expect(try engine.readAll() == contents)
        try engine.resize(to: 64 << 20)
        try engine.applySnapshot("whole")
        #expect(try engine.readAll() == contents)
        _ = consume engine
        expectSound(path)
        let old = directory.file("old.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "compat=0.10", old, "1M")
        qemuImage("snapshot", "-c", "one", old)
        var other = try DiskEngine(DiskImage(path: old, options: unlocked))
        #expect(throws: DiskImageError.self) { try other.resize(to: 2 << 20) }
    }

    @Test(arguments: [Preallocation.off, .falloc, .full]) func rawFiles(preallocation: Preallocation) throws {
        let contents = randomBytes(100 << 10, seed: 4)
        let path = try directory.write("disk.raw", contents)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        try engine.resize(to: 1 << 20, preallocation: preallocation)
        #expect(try engine.readAll() == contents + [UInt8](repeating: 0, count: 924 << 10))
        let blocks = try FileDescriptor.open(path, O_RDONLY).status().st_blocks
        #expect((blocks >= 2048) == (preallocation != .off))
        try engine.write((1 << 20) - 512, [UInt8](repeating: 1, count: 512))
        #expect(throws: DiskImageError.self) { try engine.resize(to: 2 << 20, preallocation: .metadata) }
        #expect(throws: DiskImageError.self) { try engine.resize(to: 512) }
        try engine.resize(to: 512, shrinks: true)
        #expect(try directory.read("disk.raw") == Array(contents[..<512]))
    }

    /// A host that takes no more bytes in the middle of the preallocation: the image is as it was, its file as long.
    @Test(
        arguments: [
            "cluster_size=4k", "cluster_size=64k", "cluster_size=4k,compat=0.10", "cluster_size=64k,extended_l2=on",
            "cluster_size=512,refcount_bits=1",
        ], [Preallocation.metadata, .falloc, .full])
    func aFailedPreallocationLeavesTheFileAsItWas(options: String, preallocation: Preallocation) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "\(512 << 10 | 512)")
        let contents = randomBytes(512 << 10 | 512, seed: 6)
        var limit = Int.max
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.write(0, contents)
        }
        let before = try FileDescriptor.open(path, O_RDONLY).status().st_size
        for extra in [0, 512, 100 << 10, 3 << 20] {
            limit = Int(before) + extra
            do {
                var engine = try DiskEngine(
                    DiskImage(path: path, options: unlocked), depth: 4, segments: 4, calls: Self.limited(to: limit))
                #expect(throws: DiskImageError.self) { try engine.resize(to: 16 << 20, preallocation: preallocation) }
                #expect(engine.image.exactSize == 512 << 10 | 512)
                #expect(try engine.readAll() == contents)
            }
            // A longer L1 table may have been placed, with what counts it.
            let room = options.hasPrefix("cluster_size=64k") ? 0 : 64 << 10
            let after = try FileDescriptor.open(path, O_RDONLY).status().st_size
            #expect(after <= Int(before) + room, "\(extra)")
            expectSound(path)
        }
        #expect(try self.contents(path) == contents)
        // It can be gone on with.
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        try engine.resize(to: 16 << 20, preallocation: preallocation)
        #expect(try engine.readAll() == contents + [UInt8](repeating: 0, count: 16 << 20 - contents.count))
        _ = consume engine
        expectSound(path)
    }

    /// The calls of a file system in which a file has at most so many bytes.
    private static func limited(to limit: Int) -> FileCalls {
        let calls = FileCalls.host
        return unsafe FileCalls(
            read: calls.read,
            write: { file, vectors, count, offset in
                var bytes = 0
                for index in 0..<Int(count) { unsafe bytes += vectors[index].iov_len }
                return unsafe Int(offset) + bytes > limit
                    ? -Int(ENOSPC) : calls.write(file, vectors, count, offset)
            },
            synchronize: calls.synchronize,
            allocate: { file, mode, offset, length in
                mode == 0 && Int(offset + length) > limit ? -Int(ENOSPC) : calls.allocate(file, mode, offset, length)
            },
            truncate: { file, size in Int(size) > limit ? -Int(ENOSPC) : calls.truncate(file, size) })
    }

    /// A file system that is too small for what is to be set aside: the disk stays as it was, and so does the space.
    @Test(.enabled(if: getuid() == 0, "a file system of its own needs root")) func aFullFileSystemLeavesTheDiskAsItWas()
        throws
    {
        let mount = directory.file("small")
        #expect(run(["mkdir", mount]).status == 0)
        let mounted = run(["mount", "-t", "tmpfs", "-o", "size=2M", "swkvm-test", mount])
        try #require(mounted.status == 0, "\(mounted.output)")
        defer { #expect(run(["umount", mount]).status == 0) }
        for (name, format) in [("disk.qcow2", "qcow2"), ("disk.raw", "raw")] {
            let path = "\(mount)/\(name)"
            qemuImage("create", "-q", "-f", format, path, "512k")
            let contents = randomBytes(512 << 10, seed: 5)
            var before: Int?
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
                try engine.write(0, contents)
                try engine.perform(.flush)
                before = try FileDescriptor.open(path, O_RDONLY).status().st_size
                for mode in [Preallocation.full, .falloc] {
                    #expect(throws: DiskImageError.self) { try engine.resize(to: 8 << 20, preallocation: mode) }
                }
                let size = engine.image.size
                #expect(size == 512 << 10)
                #expect(try engine.readAll() == contents)
                try engine.write(0, contents)
            }
            if format == "qcow2" { expectSound(path) }
            let status = try FileDescriptor.open(path, O_RDONLY).status()
            #expect(status.st_blocks < 3 << 10)
            #expect(status.st_size <= before ?? 0, "\(name)")
            #expect(run(["rm", path]).status == 0)
        }
    }
}

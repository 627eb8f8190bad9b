// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Images made by qemu-img and qemu-io, read back byte for byte.
@Suite(.timed) struct QCOW2ImageTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// Data with runs of zeroes in it, so that there are allocated and unallocated clusters of all sizes.
    static func sparse(_ size: Int, seed: UInt64) -> [UInt8] {
        var generator = SeededGenerator(seed: seed)
        var bytes: [UInt8] = []
        bytes.reserveCapacity(size)
        while bytes.count < size {
            let run = Int.random(in: 1...200_000, using: &generator)
            switch Int.random(in: 0..<3, using: &generator) {
            case 0: bytes += [UInt8](repeating: 0, count: run)
            case 1: bytes += randomBytes(run, seed: generator.next())
            // What compresses.
            default: bytes += [UInt8](repeating: UInt8.random(in: 1...255, using: &generator), count: run)
            }
        }
        return Array(bytes.prefix(size))
    }

    /// Reads an image in full, in requests of several sizes, with and without io_uring, and with the smallest of
    /// caches.
    func expect(_ path: String, _ contents: [UInt8], sourceLocation: SourceLocation = #_sourceLocation) throws {
        for (usesRing, cacheSize, chunk) in [(true, 32 << 20, 777 * 512), (false, 0, 65536), (true, 0, contents.count)]
        {
            let options = DiskImageOptions(readOnly: true, metadataCacheSize: cacheSize)
            var engine = try DiskEngine(DiskImage(path: path, options: options), usesRing: usesRing)
            let size = engine.image.size
            #expect(size == UInt64(contents.count), sourceLocation: sourceLocation)
            #expect(try engine.readAll(chunk: max(512, chunk)) == contents, sourceLocation: sourceLocation)
            let damage = engine.image.damage
            #expect(damage == nil, sourceLocation: sourceLocation)
        }
    }

    @Test(arguments: [512, 1024, 4096, 65536, 1 << 21], ["0.10", "1.1"])
    func readsWhatQEMUConverted(clusterSize: Int, compatibility: String) throws {
        let contents = Self.sparse(clusterSize < 65536 ? 500 << 10 : 3 << 20 | 512, seed: UInt64(clusterSize))
        let raw = try directory.write("in.raw", contents)
        let path = directory.file("disk.qcow2")
        let options = "cluster_size=\(clusterSize),compat=\(compatibility)"
        qemuImage("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        try expect(path, contents)
        qemuImage("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        try expect(path, contents)
    }

    @Test(arguments: ["512", "4k", "64k", "2M", "64k,extended_l2=on"]) func readsZstd(clusterSize: String) throws {
        let contents = Self.sparse(3 << 20 | 512, seed: 31)
        let raw = try directory.write("in.raw", contents)
        let path = directory.file("disk.qcow2")
        qemuImage(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd,cluster_size=\(clusterSize)", raw,
            path)
        try expect(path, contents)
    }

    @Test(arguments: ["off", "metadata", "falloc", "full"]) func readsPreallocatedImages(preallocation: String) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "preallocation=\(preallocation)", path, "1000k")
        var contents = [UInt8](repeating: 0, count: 1000 << 10)
        try expect(path, contents)
        qemuIO(path, ["write -P 0x5a 100k 30k"])
        contents.replaceSubrange(100 << 10..<130 << 10, with: [UInt8](repeating: 0x5a, count: 30 << 10))
        try expect(path, contents)
    }

    /// Subclusters, zero clusters in both forms, and plain writes, in every alternation.
    @Test(arguments: [
        "cluster_size=4k", "cluster_size=64k", "cluster_size=16k,extended_l2=on", "cluster_size=128k,extended_l2=on",
    ])
    func readsWhatQEMUWroteInPieces(options: String) throws {
        let seed: UInt64 = 0xc0ffee
        var generator = SeededGenerator(seed: seed)
        let size = 2 << 20
        var contents = Self.sparse(size, seed: seed)
        let base = try directory.write("base.raw", contents)
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path)
        var commands: [String] = []
        for _ in 0..<60 {
            let offset = Int.random(in: 0..<size / 512, using: &generator) * 512
            let length = min(size - offset, Int.random(in: 1...200, using: &generator) * 512)
            switch Int.random(in: 0..<4, using: &generator) {
            case 0, 1:
                let pattern = UInt8.random(in: 1...255, using: &generator)
                commands.append("write -P \(pattern) \(offset) \(length)")
                contents.replaceSubrange(offset..<offset + length, with: [UInt8](repeating: pattern, count: length))
            case 2:
                commands.append("write -z \(offset) \(length)")
                contents.replaceSubrange(offset..<offset + length, with: [UInt8](repeating: 0, count: length))
            default:
                commands.append("write -z -u \(offset) \(length)")
                contents.replaceSubrange(offset..<offset + length, with: [UInt8](repeating: 0, count: length))
            }
        }
        qemuIO(path, commands)
        try expect(path, contents)
    }

    @Test func readsThroughChains() throws {
        // raw ← qcow2 v2 of small clusters ← compressed qcow2 ← qcow2, each larger than the last, each with something
        // of its own.
        var contents = Self.sparse(700 << 10, seed: 11)
        try directory.write("0.raw", contents)
        func overlay(
            _ name: String, _ backing: String, _ format: String, _ options: String, size: Int,
            _ writes: [(offset: Int, length: Int, pattern: UInt8)]
        ) {
            qemuImage(
                "create", "-q", "-f", "qcow2", "-o", options, "-b", backing, "-F", format, directory.file(name),
                "\(size)")
            contents += [UInt8](repeating: 0, count: size - contents.count)
            qemuIO(directory.file(name), writes.map { "write -P \($0.pattern) \($0.offset) \($0.length)" })
            for write in writes {
                contents.replaceSubrange(
                    write.offset..<write.offset + write.length,
                    with: [UInt8](repeating: write.pattern, count: write.length))
            }
        }
        // Names relative to the image's directory, an absolute one, and QEMU's prefix for local files.
        overlay(
            "1.qcow2", "0.raw", "raw", "cluster_size=512,compat=0.10", size: 1 << 20,
            [(1000 * 512, 512, 1), (900 << 10, 4096, 2)])
        overlay(
            "2.qcow2", directory.file("1.qcow2"), "qcow2", "cluster_size=4096", size: 1 << 20 | 512,
            [(0, 512, 3), (600 << 10, 200 << 10, 4)])
        overlay(
            "3.qcow2", "file:\(directory.file("2.qcow2"))", "qcow2", "cluster_size=64k", size: 2 << 20,
            [(1 << 20, 100 << 10, 5), (650 << 10, 512, 6)])
        let path = directory.file("3.qcow2")
        try expect(path, contents)
        let files = try DiskImage(path: path, options: readOnly).files
        #expect(files == ["3.qcow2", "2.qcow2", "1.qcow2", "0.raw"].map(directory.file))
        #expect(
            openError(path, DiskImageOptions(readOnly: true, allowsBacking: false))
                == .backingNotAllowed(path: path, name: "file:\(directory.file("2.qcow2"))"))
        // Smaller than its backing file.
        qemuImage(
            "create", "-q", "-f", "qcow2", "-b", "3.qcow2", "-F", "qcow2", directory.file("4.qcow2"), "\(333 << 10)")
        try expect(directory.file("4.qcow2"), Array(contents[..<(333 << 10)]))
    }

    @Test func aBackingFileWithoutStatedFormatGoesByItsName() throws {
        let contents = randomBytes(65536, seed: 12)
        try directory.write("base.raw", contents)
        try directory.write("base", contents)
        let path = directory.file("top.qcow2")
        for name in ["base.raw", "base"] {
            qemuImage("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", path)
            // qemu-img insists on a format; under another type nobody knows the header extension that states it.
            var bytes = try directory.read("top.qcow2")
            let place = try #require(bytes.indices.first { bytes[$0...].starts(with: [0xe2, 0x79, 0x2a, 0xca]) })
            bytes[place] = 0x12
            try directory.write("top.qcow2", bytes)
            // A name that says nothing is that of a raw one.
            try expect(path, contents)
        }
        for name in ["http://host/disk", "json:{\"driver\":\"file\"}", "file:", "file:base.raw"] {
            qemuImage("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path)
            #expect(openError(path, readOnly) == .backing(of: path, .backingName(path: path, name: name)))
        }
        qemuImage("rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "qed", path)
        #expect(
            openError(path, readOnly)
                == .backing(of: path, .formatUnsupported(path: directory.file("base.raw"), name: "qed")))
        qemuImage("rebase", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", path)
        let missing = SystemCallError("open", errno: ENOENT)
        #expect(openError(path, readOnly) == .backing(of: path, .system(path: directory.file("gone.raw"), missing)))
    }

    @Test func chainsThatLeadBackAreRefused() throws {
        let a = directory.file("a.qcow2"), b = directory.file("b.qcow2")
        for path in [a, b] { qemuImage("create", "-q", "-f", "qcow2", path, "1M") }
        qemuImage("rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", a)
        #expect(openError(a, readOnly) == .backing(of: a, .backingLoop(path: a)))
        qemuImage("rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", a)
        qemuImage("rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", b)
        #expect(openError(a, readOnly) == .backing(of: a, .backing(of: b, .backingLoop(path: a))))
        // Under another name it is the same file.
        let status = unsafe symlink("a.qcow2", directory.file("c.qcow2"))
        #expect(status == 0)
        qemuImage("rebase", "-u", "-f", "qcow2", "-b", "c.qcow2", "-F", "qcow2", b)
        #expect(
            openError(a, readOnly) == .backing(of: a, .backing(of: b, .backingLoop(path: directory.file("c.qcow2")))))
    }

    @Test func chainsHaveALimit() throws {
        let limit = DiskImage.maximumChainLength
        var bytes: [UInt8] = []
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", directory.file("0.qcow2"), "64k")
        qemuImage(
            "create", "-q", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "0000.qcow2", "-F", "qcow2",
            directory.file("top.qcow2"), "64k")
        bytes = try directory.read("top.qcow2")
        // The name's place in the header, whose digits are then replaced.
        let name = Int(bytes.bigEndian64(at: 8))
        for index in 1...limit {
            let digits = String(index - 1 + 10000).dropFirst()
            bytes.replaceSubrange(name..<name + 4, with: digits.utf8)
            try directory.write("\(String(index + 10000).dropFirst()).qcow2", bytes)
        }
        try directory.write("0000.qcow2", directory.read("0.qcow2"))
        // 0000 … 0063 are 64 images, 0064 is one too many.
        _ = try DiskImage(path: directory.file("0063.qcow2"), options: readOnly)
        var error = openError(directory.file("0064.qcow2"), readOnly)
        while case .backing(_, let inner) = error { error = inner }
        #expect(error == .backingTooDeep(path: directory.file("0000.qcow2")))
    }

    @Test func dirtyAndCorruptImagesCanBeRead() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuIO(path, ["write -P 7 0 64k"])
        var bytes = try directory.read("disk.qcow2")
        bytes[79] |= 3
        try directory.write("disk.qcow2", bytes)
        try expect(path, [UInt8](repeating: 7, count: 65536) + [UInt8](repeating: 0, count: (1 << 20) - 65536))
    }

    @Test func aLargeDiskCostsNothingBeforeItIsUsed() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1T")
        qemuIO(path, ["write -P 9 1000G 64k"])
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        let size = engine.image.size
        #expect(size == 1 << 40)
        #expect(try engine.read(1000 << 30, 65536) == [UInt8](repeating: 9, count: 65536))
        #expect(try engine.read((1000 << 30) + 65536, 1 << 20).allSatisfy { $0 == 0 })
        #expect(try engine.read((1 << 40) - 512, 512).allSatisfy { $0 == 0 })
    }

    /// With caches of a few blocks and a chain of images, requests evict each other's metadata all the time.
    @Test func manyRequestsGetOnWithTheSmallestOfCaches() throws {
        let seed: UInt64 = 99
        var generator = SeededGenerator(seed: seed)
        let contents = Self.sparse(2 << 20, seed: seed)
        try directory.write("0.raw", contents)
        qemuImage(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", directory.file("0.raw"),
            directory.file("1.qcow2"))
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", "1.qcow2", "-F", "qcow2",
            directory.file("2.qcow2"))
        qemuIO(directory.file("2.qcow2"), (0..<64).map { "write -P \($0 + 1) \($0 * 32768) 512" })
        var expected = contents
        for index in 0..<64 {
            expected.replaceSubrange(
                index * 32768..<index * 32768 + 512, with: [UInt8](repeating: UInt8(index + 1), count: 512))
        }

        let options = DiskImageOptions(readOnly: true, metadataCacheSize: 0)
        var engine = try DiskEngine(
            DiskImage(path: directory.file("2.qcow2"), options: options), depth: 64, segments: 4)
        let length = 5120
        var memory = [UInt8](repeating: 0, count: 64 * length)
        try unsafe memory.withUnsafeMutableBytes { memory in
            let vectors = UnsafeMutableBufferPointer<iovec>.allocate(capacity: 64)
            defer { unsafe vectors.deallocate() }
            for _ in 0..<8 {
                var offsets = [Int](repeating: 0, count: 64)
                unsafe memory.initializeMemory(as: UInt8.self, repeating: 0xee)
                while let request = engine.acquire() {
                    offsets[request] = Int.random(in: 0...(expected.count - length) / 512, using: &generator) * 512
                    unsafe vectors[request] = iovec(iov_base: memory.baseAddress! + request * length, iov_len: length)
                    unsafe engine.start(
                        request, .read, offset: UInt64(offsets[request]), length: UInt64(length),
                        vectors: vectors.baseAddress! + request, count: 1)
                }
                for _ in 0..<64 {
                    let ended = try engine.waitForCompletion()
                    let completion = try #require(ended)
                    let offset = offsets[completion.request], start = completion.request * length
                    #expect(completion.error == 0)
                    #expect(
                        unsafe expected[offset..<offset + length].elementsEqual(memory[start..<start + length]),
                        "seed \(seed), offset \(offset)")
                    engine.release(completion.request)
                }
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct RawImageTests {
    let directory = TemporaryDirectory()

    @Test(arguments: [true, false], [CacheMode.writeback, .none])
    func readsAndWritesWhatItIsTold(usesRing: Bool, cache: CacheMode) throws {
        var contents = randomBytes(1 << 20, seed: 1)
        let path = try directory.write("disk.raw", contents)
        do {
            var engine = try DiskEngine(
                DiskImage(path: path, options: DiskImageOptions(cache: cache)), usesRing: usesRing)
            #expect(engine.usesRing == usesRing)
            let size = engine.image.size
            #expect(size == 1 << 20)
            #expect(try engine.readAll(chunk: 100_352) == contents)
            // Aligned for direct I/O, for sectors only, and for nothing.
            for (offset, count) in [(65536, 131_072), (512, 1024), (54_321, 12_345)] {
                let piece = randomBytes(count, seed: UInt64(offset))
                try engine.write(UInt64(offset), piece)
                contents.replaceSubrange(offset..<offset + count, with: piece)
            }
            try engine.perform(.flush)
            #expect(try engine.readAll() == contents)
        }
        #expect(try directory.read("disk.raw") == contents)
    }

    @Test func aPartOfASectorAtTheEndIsPaddedAndWritable() throws {
        let contents = randomBytes(1000, seed: 3)
        let path = try directory.write("odd.img", contents)
        var engine = try DiskEngine(DiskImage(path: path))
        let size = engine.image.size
        #expect(size == 1024)
        #expect(try engine.readAll() == contents + [UInt8](repeating: 0, count: 24))
        let sector = randomBytes(512, seed: 4)
        try engine.write(512, sector)
        #expect(try engine.readAll() == contents[..<512] + sector)
        #expect(try directory.read("odd.img").count == 1024)
    }

    @Test func anEmptyFileIsADiskWithoutSectors() throws {
        var engine = try DiskEngine(DiskImage(path: directory.write("empty.raw", [])))
        let size = engine.image.size
        #expect(size == 0)
        #expect(throws: DiskImageError.self) { try engine.read(0, 512) }
        #expect(try engine.read(0, 0) == [])
    }

    @Test func rangesOutsideOfTheDiskFail() throws {
        let path = try directory.write("disk.raw", randomBytes(4096, seed: 5))
        var engine = try DiskEngine(DiskImage(path: path))
        for offset: UInt64 in [4096, 3585, .max, .max - 511, 1 << 63] {
            #expect(throws: DiskImageError.request(path: path, SystemCallError("read", errno: EINVAL))) {
                try engine.read(offset, 512)
            }
            #expect(throws: DiskImageError.request(path: path, SystemCallError("write", errno: EINVAL))) {
                try engine.write(offset, [UInt8](repeating: 1, count: 512))
            }
            #expect(throws: DiskImageError.request(path: path, SystemCallError("discard", errno: EINVAL))) {
                try engine.perform(.discard, at: offset, length: 512)
            }
        }
        #expect(throws: DiskImageError.self) { try engine.perform(.discard, at: 512, length: .max) }
        #expect(try directory.read("disk.raw").count == 4096)
    }

    @Test func vectorsThatContradictTheLengthFail() throws {
        var engine = try DiskEngine(DiskImage(path: directory.write("disk.raw", randomBytes(4096, seed: 5))))
        var memory = [UInt8](repeating: 7, count: 512)
        let error = try unsafe memory.withUnsafeMutableBytes { memory in
            var vector = unsafe iovec(iov_base: memory.baseAddress, iov_len: 512)
            return try unsafe withUnsafePointer(to: &vector) { vector in
                let free = engine.acquire()
                let request = try #require(free)
                unsafe engine.start(request, .read, offset: 0, length: 1024, vectors: vector, count: 1)
                return try engine.waitForCompletion()?.error
            }
        }
        #expect(error == EINVAL)
        #expect(memory.allSatisfy { $0 == 7 })
    }

    @Test func aReadOnlyDiskRefusesEveryChange() throws {
        let contents = randomBytes(4096, seed: 6)
        let path = try directory.write("disk.raw", contents)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(throws: DiskImageError.request(path: path, SystemCallError("write", errno: EROFS))) {
            try engine.write(0, [UInt8](repeating: 0, count: 512))
        }
        for operation in [DiskOperation.discard, .writeZeroes, .writeZeroesUnmapping] {
            #expect(throws: DiskImageError.request(path: path, SystemCallError("\(operation)", errno: EROFS))) {
                try engine.perform(operation, at: 0, length: 512)
            }
        }
        try engine.perform(.flush)
        #expect(try directory.read("disk.raw") == contents)
    }

    @Test(arguments: [true, false]) func discardAndWriteZeroesLeaveZeroes(usesRing: Bool) throws {
        var contents = randomBytes(1 << 20, seed: 7)
        let path = try directory.write("disk.raw", contents)
        var engine = try DiskEngine(DiskImage(path: path), usesRing: usesRing)
        for (operation, range) in [
            (DiskOperation.discard, 65536..<131072), (.writeZeroes, 262144..<300032),
            (.writeZeroesUnmapping, 512..<1024),
        ] {
            try engine.perform(operation, at: UInt64(range.lowerBound), length: UInt64(range.count))
            contents.replaceSubrange(range, with: repeatElement(0, count: range.count))
            #expect(try engine.readAll() == contents)
        }
        #expect(try directory.read("disk.raw") == contents)
    }

    @Test func aHoleGivesItsSpaceBack() throws {
        let path = try directory.write("disk.raw", randomBytes(1 << 20, seed: 8))
        let file = try FileDescriptor.open(path, O_RDONLY)
        let before = try file.status().st_blocks
        var engine = try DiskEngine(DiskImage(path: path))
        try engine.perform(.writeZeroesUnmapping, at: 0, length: 1 << 19)
        #expect(try file.status().st_blocks <= before - (1 << 19) / 512)
        #expect(try file.status().st_size == 1 << 20)
    }

    @Test func aFileThatIsCutWhileInUseGivesErrors() throws {
        let path = try directory.write("disk.raw", randomBytes(1 << 20, seed: 9))
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        let status = unsafe truncate(path, 1 << 19)
        #expect(status == 0)
        #expect(throws: DiskImageError.request(path: path, SystemCallError("read", errno: EIO))) {
            try engine.read(1 << 19, 512)
        }
        #expect(throws: DiskImageError.self) { try engine.read((1 << 19) - 512, 1024) }
        #expect(try engine.read((1 << 19) - 512, 512).count == 512)
    }

    /// Random operations, many in flight on ranges that do not overlap, against an array.
    @Test(arguments: [true, false]) func manyRequestsInFlightDoWhatAnArrayDoes(usesRing: Bool) throws {
        let seed: UInt64 = 0x5eed
        var generator = SeededGenerator(seed: seed)
        let block = 16384, blocks = 64
        var model = randomBytes(block * blocks, seed: seed)
        let path = try directory.write("disk.raw", model)
        var engine = try DiskEngine(DiskImage(path: path), depth: 16, segments: 8, usesRing: usesRing)
        // Each request has a piece of this memory, cut into vectors of odd lengths.
        var memory = [UInt8](repeating: 0, count: block * 16)
        try unsafe memory.withUnsafeMutableBytes { memory in
            let vectors = UnsafeMutableBufferPointer<iovec>.allocate(capacity: 16 * 8)
            defer { unsafe vectors.deallocate() }
            for round in 0..<60 {
                var expectations: [(request: Int, range: Range<Int>, bytes: [UInt8]?)] = []
                for place in (0..<blocks).shuffled(using: &generator).prefix(16) {
                    let offset = place * block + Int.random(in: 0..<block / 2, using: &generator) / 512 * 512
                    let length = Int.random(in: 1...block / 1024, using: &generator) * 512
                    let free = engine.acquire()
                    let request = try #require(free)
                    let piece = unsafe UnsafeMutableRawBufferPointer(
                        rebasing: memory[request * block..<request * block + length])
                    let cuts = ([0, length] + (0..<7).map { _ in Int.random(in: 0...length, using: &generator) })
                        .sorted()
                    for index in 0..<8 {
                        unsafe vectors[request * 8 + index] = iovec(
                            iov_base: piece.baseAddress! + cuts[index], iov_len: cuts[index + 1] - cuts[index])
                    }
                    let operation = [DiskOperation.read, .write, .write, .discard, .writeZeroes].randomElement(
                        using: &generator)!
                    switch operation {
                    case .read:
                        unsafe piece.initializeMemory(as: UInt8.self, repeating: 0xee)
                        expectations.append((request, offset..<offset + length, Array(model[offset..<offset + length])))
                    case .write:
                        unsafe piece.copyBytes(from: randomBytes(length, seed: generator.next()))
                        unsafe model.replaceSubrange(offset..<offset + length, with: piece)
                        expectations.append((request, offset..<offset + length, nil))
                    default:
                        model.replaceSubrange(offset..<offset + length, with: repeatElement(0, count: length))
                        expectations.append((request, offset..<offset + length, nil))
                    }
                    if operation == .read || operation == .write {
                        unsafe engine.start(
                            request, operation, offset: UInt64(offset), length: UInt64(length),
                            vectors: vectors.baseAddress! + request * 8, count: 8)
                    } else {
                        engine.start(request, operation, offset: UInt64(offset), length: UInt64(length))
                    }
                }
                let none = engine.acquire()
                #expect(none == nil)
                for _ in 0..<16 {
                    let ended = try engine.waitForCompletion()
                    let completion = try #require(ended)
                    #expect(completion.error == 0, "seed \(seed), round \(round)")
                    let expectation = try #require(expectations.first { $0.request == completion.request })
                    #expect(completion.length == UInt64(expectation.range.count))
                    if let bytes = expectation.bytes {
                        let start = completion.request * block
                        #expect(
                            unsafe bytes.elementsEqual(memory[start..<start + bytes.count]),
                            "seed \(seed), round \(round)")
                    }
                    engine.release(completion.request)
                }
                let inFlight = engine.inFlight
                #expect(inFlight == 0)
            }
        }
        #expect(try engine.readAll() == model)
        #expect(try directory.read("disk.raw") == model)
    }
}

@Suite(.timed) struct OpeningTests {
    let directory = TemporaryDirectory()

    @Test func theNameTellsTheFormat() throws {
        for name in ["a.raw", "a.img", "A.IMG", "/x.qcow2/a.raw"] {
            #expect(try ImageFormat(extensionOf: name) == .raw)
        }
        for name in ["a.qcow2", "a.QCOW2", "a.qcow", "/x.raw/b.c.qcow2"] {
            #expect(try ImageFormat(extensionOf: name) == .qcow2)
        }
        for name in ["a", "", "disk.unknown", "a.raw/b", "raw", ".", "/dev/vda"] {
            #expect(throws: DiskImageError.formatUnknown(path: name)) { try ImageFormat(extensionOf: name) }
        }
    }

    @Test func theContentsNeverChooseTheFormat() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        let bytes = try directory.read("disk.qcow2")
        let raw = try directory.write("disk.raw", bytes)
        var engine = try DiskEngine(DiskImage(path: raw, options: DiskImageOptions(format: .raw)))
        #expect(try engine.read(0, bytes.count / 512 * 512) == Array(bytes.prefix(bytes.count / 512 * 512)))
        let format = engine.image.format
        #expect(format == .raw)
    }

    @Test func whatIsNoQCOW2SaysSo() throws {
        let path = try directory.write("disk.qcow2", [0x00, 0x61, 0x62, 0xff] + [UInt8](repeating: 0, count: 1000))
        let error = try #require(openError(path, readOnly))
        #expect(error == .notQCOW2(path: path, found: [0x00, 0x61, 0x62, 0xff]))
        #expect(
            "\(error)"
                == "disk \"\(path)\": not a qcow2 image: starts with \"\\x00ab\\xff\", expected \"QFI\\xfb\"; if it is a raw image, specify format=raw"
        )
        try directory.write("disk.qcow2", [])
        #expect(openError(path, readOnly) == .notQCOW2(path: path, found: []))
        try directory.write("disk.qcow2", [0x51, 0x46])
        #expect(openError(path, readOnly) == .notQCOW2(path: path, found: [0x51, 0x46]))
    }

    @Test func whatIsNoFileIsRefused() throws {
        #expect(
            openError(directory.path, DiskImageOptions(format: .raw, readOnly: true)) == .notAFile(path: directory.path)
        )
        let missing = directory.file("missing.raw")
        #expect(openError(missing) == .system(path: missing, SystemCallError("open", errno: ENOENT)))
        #expect(openError("/dev/null", DiskImageOptions(format: .raw)) == .notAFile(path: "/dev/null"))
        // A pipe without a writer must not keep us waiting.
        let pipe = directory.file("pipe.raw")
        let status = unsafe mkfifo(pipe, 0o600)
        #expect(status == 0)
        #expect(openError(pipe, readOnly) == .notAFile(path: pipe))
    }

    @Test func directIOIsRefusedWhereThereIsNone() throws {
        // procfs has regular files, and no direct I/O.
        let path = "/proc/version"
        let error = openError(path, DiskImageOptions(format: .raw, readOnly: true, cache: .none, locking: false))
        #expect(error == .directUnavailable(path: path, SystemCallError("open", errno: EINVAL)))
    }

    @Test func namesAreShownWithoutTheirControlCharacters() {
        let error = DiskImageError.backingName(path: "a\u{1b}[2J\"\n.qcow2", name: "x:y")
        #expect(
            "\(error)".hasPrefix(
                "disk \"a\\u{1B}[2J\\\"\\n.qcow2\": its backing file \"x:y\" is neither the path of a local file nor an address"
            ))
    }
}

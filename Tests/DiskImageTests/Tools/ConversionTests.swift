// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// What a conversion reads and writes in each way of using the page cache, and what it compresses.
@Suite(.timed) struct ConversionTests {
    private let directory = TemporaryDirectory()

    /// 9 MiB and a bit: data longer than a piece, zeroes, a hole, and an end that is aligned to nothing.
    private func makeSource() throws -> [UInt8] {
        let noise = randomBytes(1 << 20, seed: 11), text = (0..<4096).map { UInt8($0 / 17) }
        var bytes: [UInt8] = []
        for _ in 0..<5 { bytes += noise }
        bytes += [UInt8](repeating: 0, count: 3 << 20)
        for _ in 0..<256 { bytes += text }
        bytes += text.prefix(1234)
        let file = try FileDescriptor.open(directory.file("source.raw"), O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644)
        #expect(ftruncate(file.rawValue, off_t(bytes.count)) == 0)
        for range in [0..<(6 << 20), (8 << 20)..<bytes.count] {
            #expect(
                unsafe bytes.withUnsafeBytes {
                    unsafe pwrite(
                        file.rawValue, $0.baseAddress! + range.lowerBound, range.count, off_t(range.lowerBound))
                } == range.count)
        }
        return bytes
    }

    /// What the page cache has of a file, in which a conversion finds it.
    enum Cached: CaseIterable { case nothing, all, everyOtherPart }

    private func prepare(_ path: String, _ cached: Cached) throws {
        let file = try FileDescriptor.open(path, O_RDWR)
        #expect(fsync(file.rawValue) == 0)
        switch cached {
        case .all: return
        case .nothing: #expect(posix_fadvise(file.rawValue, 0, 0, POSIX_FADV_DONTNEED) == 0)
        case .everyOtherPart:
            for part in 0..<5 {
                #expect(posix_fadvise(file.rawValue, off_t(part) << 21, 1 << 20, POSIX_FADV_DONTNEED) == 0)
            }
        }
    }

    @Test(arguments: ToolCache.allCases, Cached.allCases) func contents(cache: ToolCache, cached: Cached) throws {
        let bytes = try makeSource()
        var from = directory.file("source.raw")
        for (name, format) in [
            ("one.qcow2", ImageFormat.qcow2), ("two.raw", .raw), ("three.qcow2", .qcow2), ("four.raw", .raw),
        ] {
            try prepare(from, cached)
            var conversion = ImageConversion(source: from, target: directory.file(name), format: format)
            conversion.cache = cache
            conversion.threads = 2
            // Once is enough: without optimisation compressing takes long.
            if name == "three.qcow2", cache == .automatic, cached == .nothing { conversion.compresses = true }
            try conversion.run()
            from = directory.file(name)
            if format == .raw {
                let made = try readFile(from, limit: 1 << 30)
                #expect(made.count == (bytes.count + 511) & ~511)
                #expect(
                    unsafe memcmp(made, bytes + [UInt8](repeating: 0, count: made.count - bytes.count), made.count) == 0
                )
            } else {
                let check = run(["qemu-img", "check", from])
                #expect(check.status == 0, "\(check.output)")
            }
        }
    }

    @Test func readsAheadAroundTheCache() throws {
        let bytes = try makeSource()
        try prepare(directory.file("source.raw"), .nothing)
        var options = DiskImageOptions(readOnly: true)
        options.sparesCache = true
        let reader = ImageReader(try DiskImage(path: directory.file("source.raw"), options: options))
        let buffers = try TransferBuffer(4 << 20, "")
        var ahead = ReadAhead(buffers: 2)
        let memory = buffers.memory.prefix(1 << 20)
        guard let descriptor = reader.direct(memory, from: 1 << 20, ofFile: 0) else {
            // A file system without O_DIRECT has nothing to read ahead around the cache.
            return withKnownIssue("no O_DIRECT in \(directory.path)") { Issue.record("not tried") }
        }
        let tail = buffers.memory.piece(2 << 20, 1 << 20)
        let isStarted = ahead.start(ReadAhead.Read(memory: memory, place: 1 << 20, file: 0, buffer: 0), descriptor)
        // Goes beyond the end of the file.
        let isTailStarted = ahead.start(
            ReadAhead.Read(memory: tail, place: UInt64(bytes.count - 1234) - 4096, file: 0, buffer: 1), descriptor)
        #expect(isStarted && isTailStarted)
        ahead.submit()
        let failed = try ahead.wait(0)
        #expect(failed.isEmpty)
        #expect(memory.array == Array(bytes[(1 << 20)..<(2 << 20)]))
        let again = try ahead.wait(1)
        #expect(again.count == 1 && again.first?.memory.distance(from: tail) == 0)
        // Small ones and what the cache has are left to it.
        #expect(reader.direct(buffers.memory.prefix(32 << 10), from: 0, ofFile: 0) == nil)
        _ = try readFile(directory.file("source.raw"), limit: 1 << 30)
        #expect(reader.direct(memory, from: 3 << 20, ofFile: 0) == nil)
    }

    /// What the kernel has goes on being waited for when it takes no more calls: it still writes to the buffers.
    @Test func readsAheadAreWaitedForWhateverHappens() throws {
        var ends: [Int32] = [-1, -1]
        #expect(pipe(&ends) == 0)
        defer { for end in ends { close(end) } }
        let buffers = try TransferBuffer(8192, "")
        var ahead = ReadAhead(buffers: 2)
        guard let ring = ahead.descriptor else {
            return withKnownIssue("no io_uring here") { Issue.record("not tried") }
        }
        let pieces = [buffers.memory.piece(0, 4096), buffers.memory.piece(4096, 4096)]
        // From a pipe, at no place: it ends when there is something.
        let isStarted = ahead.start(ReadAhead.Read(memory: pieces[0], place: .max, file: 0, buffer: 0), ends[0])
        #expect(isStarted)
        ahead.submit()
        // Of a second one it never hears: another file has the ring's number, so calls fail. The ring stays there under
        // another number.
        let kept = dup(ring), null = open("/dev/null", O_RDONLY | O_CLOEXEC)
        #expect(kept >= 0 && null >= 0 && dup2(null, ring) == ring)
        let isQueued = ahead.start(ReadAhead.Read(memory: pieces[1], place: .max, file: 0, buffer: 1), ends[0])
        #expect(isQueued)
        ahead.submit()
        #expect(throws: SystemCallError.self) { _ = try ahead.wait(1) }
        let contents = randomBytes(4096, seed: 1), output = ends[1]
        let writer = try Linux.Thread.start(name: "writer") {
            contents.withUnsafeBytes { _ = write(output, $0.baseAddress, $0.count) }
        }
        ahead.drain()
        #expect(pieces[0].array == contents)
        writer.join()
        // So that the ring's own end finds it.
        #expect(dup2(kept, ring) == ring)
        close(kept)
        close(null)
    }

    @Test func compressibility() {
        let judge = Compressibility()
        var random = SeededGenerator(seed: 5)
        func likely(_ make: (Int) -> UInt8, _ count: Int = 65536) -> Bool {
            let bytes = (0..<count).map(make)
            return bytes.withReadableIOMemory { judge.isLikely($0) }
        }
        let noise = (0..<65536).map { _ in UInt8(truncatingIfNeeded: random.next()) }
        for count in [4096, 65536] { #expect(!likely({ noise[$0] }, count)) }
        #expect(likely { UInt8($0 % 251) })
        #expect(likely { noise[$0] & 0x3f })
        // All bytes are as frequent, and each kilobyte comes twice.
        #expect(likely { noise[$0 / 2048 * 1024 + $0 % 1024] })
        // Too far away for a reference of 4 KiB.
        #expect(!likely { noise[$0 % 32768] })
        // A part that is worth it among parts that are not.
        #expect(likely { $0 / 16384 == 3 ? UInt8($0 % 17) : noise[$0] })
    }

    @Test(arguments: [CompressionType.zlib, .zstd]) func compressedSize(type: CompressionType) throws {
        // Text, noise and both.
        var random = SeededGenerator(seed: 3)
        var bytes: [UInt8] = []
        for part in 0..<9 {
            for index in 0..<65536 {
                let isNoise = part % 3 == 0 || (part % 3 == 1 && index % 1024 < 700)
                bytes.append(
                    isNoise ? UInt8(truncatingIfNeeded: random.next()) : UInt8(97 + (random.next() >> 40) % 13))
            }
        }
        try directory.write("source.raw", bytes)
        var conversion = ImageConversion(
            source: directory.file("source.raw"), target: directory.file("ours.qcow2"), format: .qcow2)
        conversion.compresses = true
        conversion.options.compression = type
        try conversion.run()
        let theirs = run([
            "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=\(type)", directory.file("source.raw"),
            directory.file("theirs.qcow2"),
        ])
        #expect(theirs.status == 0, "\(theirs.output)")
        let sizes = try ["ours", "theirs"].map { try directory.read("\($0).qcow2").count }
        // Cluster by cluster at most a sixty-fourth is given away, and the rest of the file's last one.
        #expect(sizes[0] * 64 <= sizes[1] * 65 + 64 * 65536, "\(sizes)")
        #expect(run(["qemu-img", "compare", directory.file("source.raw"), directory.file("ours.qcow2")]).status == 0)
    }
}

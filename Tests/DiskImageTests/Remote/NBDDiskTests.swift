// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Remote disks as qemu-nbd and nbdkit serve them.
@Suite(.timed) struct NBDDiskTests {
    private let directory = TemporaryDirectory()
    private let content: [UInt8]

    init() throws {
        content = randomBytes(1 << 20, seed: 1) + [UInt8](repeating: 0, count: 2 << 20) + randomBytes(1 << 20, seed: 2)
        try directory.write("disk.raw", content)
        #expect(run(["fallocate", "--dig-holes", directory.file("disk.raw")]).status == 0)
    }

    private func open(
        _ address: String, readOnly: Bool = false, depth: Int = 64, segments: Int = 64
    ) throws -> DiskEngine {
        try DiskEngine(
            DiskImage(path: address, options: DiskImageOptions(readOnly: readOnly)), depth: depth, segments: segments)
    }

    // MARK: - Contents

    @Test func readsWhatTheServerHas() throws {
        let server = try NBDServer(directory, image: directory.file("disk.raw"), ["-r"])
        var engine = try open(server.address(), readOnly: true)
        #expect(engine.image.size == UInt64(content.count) && engine.image.format == .raw && !engine.usesRing)
        #expect(try engine.readAll() == content)
        #expect(try engine.read(1 << 20 - 511, 1022) == Array(content[1 << 20 - 511..<1 << 20 + 511]))
    }

    /// Requests of all kinds, many at a time, with segments in a row and scattered, against a model; with servers that
    /// take only whole blocks too.
    @Test(arguments: [1, 512, 4096, 65536]) func randomRequests(block: Int) throws {
        let file = directory.file("disk.raw")
        let server =
            block == 1
            ? try NBDServer(directory, image: file)
            : try NBDServer(
                directory, nbdkit: "--filter=blocksize-policy", "file", file, "blocksize-minimum=\(block)",
                "blocksize-preferred=65536",
                "blocksize-maximum=131072", "blocksize-error-policy=error")
        do {
            var engine = try open(server.address(), depth: 32)
            #expect(engine.image.remote?.export.minimumBlock == UInt64(block))
            var workload = RemoteWorkload(content, seed: 7)
            try workload.run(&engine, steps: 1500)
            #expect(try engine.readAll() == workload.model)
        }
        let model = try directory.read("disk.raw")
        var engine = try open(server.address())
        #expect(try engine.readAll() == model)
    }

    @Test func zeroesAndDiscardsGoToTheServer() throws {
        let server = try NBDServer(directory, image: directory.file("disk.raw"))
        var engine = try open(server.address())
        func blocks() throws -> Int { try FileDescriptor.open(directory.file("disk.raw"), O_RDONLY).status().st_blocks }
        let before = try blocks()
        try engine.perform(.discard, at: 0, length: 512 << 10)
        try engine.perform(.flush)
        #expect(try blocks() <= before - 1024)
        try engine.perform(.writeZeroesUnmapping, at: 512 << 10, length: 256 << 10)
        #expect(try blocks() <= before - 1536)
        // Zeroes whose space stays.
        try engine.perform(.writeZeroes, at: 0, length: 512 << 10)
        #expect(try blocks() >= before - 512)
        #expect(try engine.read(0, 768 << 10) == [UInt8](repeating: 0, count: 768 << 10))
    }

    /// Servers with few features: what they lack is done in another way, or not at all if it is only a hint.
    @Test func zeroesAreWrittenWhereTheServerMakesNone() throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=nozero", "--filter=noextents", "file", directory.file("disk.raw"))
        var engine = try open(server.address())
        #expect(engine.image.remote?.export.canZero == false)
        for operation: DiskOperation in [.writeZeroes, .writeZeroesUnmapping] {
            try engine.perform(operation, at: 1000, length: 300_000)
            #expect(
                try engine.read(0, 301_500) == Array(content[..<1000]) + [UInt8](repeating: 0, count: 300_000)
                    + Array(content[301_000..<301_500]))
            try engine.write(0, Array(content[..<400_000]))
        }
    }

    @Test func theLastSectorOfADiskThatEndsWithinIt() throws {
        try directory.write("odd.raw", Array(content[..<100_001]))
        let server = try NBDServer(directory, nbdkit: "file", directory.file("odd.raw"))
        var engine = try open(server.address())
        #expect(engine.image.size == 100_352)
        #expect(try engine.readAll() == Array(content[..<100_001]) + [UInt8](repeating: 0, count: 351))
        // What the server has no place for is not written, and it is not said that it was.
        #expect(throws: DiskImageError.request(path: server.address(), SystemCallError("write", errno: ENOSPC))) {
            try engine.write(99_840, [UInt8](repeating: 1, count: 512))
        }
        try engine.write(99_328, [UInt8](repeating: 2, count: 512))
        try engine.perform(.discard, at: 99_840, length: 512)
        try engine.perform(.writeZeroes, at: 99_840, length: 512)
        #expect(try engine.read(99_328, 1024) == [UInt8](repeating: 2, count: 512) + [UInt8](repeating: 0, count: 512))
    }

    // MARK: - Tools

    @Test(arguments: [true, false]) func mapAndConvertKnowHoles(hasStatus: Bool) throws {
        let server =
            hasStatus
            ? try NBDServer(directory, image: directory.file("disk.raw"), ["-r", "-x", "a disk"])
            : try NBDServer(directory, nbdkit: "--filter=noextents", "file", directory.file("disk.raw"))
        let address = hasStatus ? server.address("a%20disk") : server.address()
        do {
            var map = ImageMap(try DiskImage(path: address, options: readOnly))
            var extents: [ImageExtent] = []
            while let extent = try map.next() { extents.append(extent) }
            #expect(extents.map(\.length).reduce(0, +) == UInt64(content.count))
            #expect(extents.map(\.readsAsZeroes) == (hasStatus ? [false, true, false] : [false]))
        }
        // Several threads and one connection: qemu-nbd serves one at a time.
        for (name, format) in [("new.qcow2", ImageFormat.qcow2), ("new.raw", .raw)] {
            var conversion = ImageConversion(source: address, target: directory.file(name), format: format)
            conversion.threads = 4
            try conversion.run()
            #expect(
                run([
                    "qemu-img", "compare", "-f", format.rawValue, "-F", "raw", "-U", directory.file(name),
                    directory.file("disk.raw"),
                ]).status == 0)
        }
        #expect(try ImageComparison(address, with: directory.file("new.raw")).run() == .identical)
        let information = try ImageInformation(path: address)
        #expect(information.remote?.blockStatus == true && information.allocated == nil && information.format == .raw)
    }

    @Test func bench() throws {
        let server = try NBDServer(directory, nbdkit: "memory", "64M")
        var bench = ImageBench(path: server.address())
        bench.count = 5000
        bench.writes = true
        bench.flushInterval = 100
        #expect(try bench.run().requests == 5000)
    }

    // MARK: - What cannot be

    @Test func refusals() throws {
        let reading = try NBDServer(directory, image: directory.file("disk.raw"), ["-r", "-x", "here"])
        func reason(_ address: String, _ options: DiskImageOptions = readOnly) -> String {
            openError(address, options).map { "\($0)" } ?? ""
        }
        #expect(
            reason(reading.address("here"), DiskImageOptions()).contains("the server exports it read-only; or add ,ro"))
        #expect(reason(reading.address("nowhere")).contains("no export named 'nowhere'"))
        #expect(
            reason(reading.address("here").replacing("socket=", with: "socket=/nowhere")).contains(
                "connect: No such file or directory"))
        #expect(reason("nbd+unix:///x?socket=/" + String(repeating: "x", count: 200)).contains("1 to 107 bytes"))
        let silent = try NBDServer(directory, nbdkit: "memory", "1M", socket: "silent")
        silent.kill()
        #expect(reason(silent.address()).contains("connect: Connection refused"))
    }

    @Test func aServerThatSaysNothing() throws {
        var ends: [Int32] = [0, 0]
        #expect(socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &ends) == 0)
        let other = FileDescriptor(owning: ends[1])
        do throws(DiskImageError) {
            _ = try NBDDisk(path: "nbd://test/", socket: FileDescriptor(owning: ends[0]), time: 1000)
            Issue.record("it connected")
        } catch {
            #expect("\(error)".contains("no answer within 1 seconds"))
        }
        _ = consume other
    }

    @Test func errorsOfTheServerAreThoseOfRequests() throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
        var engine = try open(server.address())
        #expect(throws: DiskImageError.request(path: server.address(), SystemCallError("write", errno: ENOSPC))) {
            try engine.write(0, [1, 2, 3])
        }
        #expect(try engine.read(0, 3) == [0, 0, 0])
    }
}

/// Requests against a model, several in flight wherever they do not touch the same bytes.
struct RemoteWorkload {
    private(set) var model: [UInt8]
    private var generator: SeededGenerator

    init(_ content: [UInt8], seed: UInt64) {
        model = content
        generator = SeededGenerator(seed: seed)
    }

    /// - Parameter between: called before each batch.
    mutating func run(_ engine: inout DiskEngine, steps: Int, between: (Int) throws -> Void = { _ in }) throws {
        let batch = 8, area = model.count / batch
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: model.count + 4096 * batch, alignment: 4096)
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: batch * 64)
        defer {
            memory.deallocate()
            vectors.deallocate()
        }
        for step in 0..<steps / batch {
            try between(step)
            var expected: [(place: Range<Int>, memory: Int)?] = Array(repeating: nil, count: 64)
            for slot in 0..<batch {
                // Each has its own part of the disk: what happens at the same time has no order.
                let start = slot * area + Int.random(in: 0..<area, using: &generator)
                let length = min(
                    1 << Int.random(in: 0...17, using: &generator) + Int.random(in: 0...1000, using: &generator),
                    (slot + 1) * area - start)
                let acquired = engine.acquire(), request = try #require(acquired)
                let range = start..<start + length
                switch Int.random(in: 0..<8, using: &generator) {
                case 0...2:
                    let base = slot * (area + 4096)
                    let count = cut(vectors + slot * 64, memory.baseAddress! + base, length)
                    expected[request] = (range, base)
                    engine.start(
                        request, .read, offset: UInt64(start), length: UInt64(length), vectors: vectors + slot * 64,
                        count: count)
                case 3...5:
                    let bytes = randomBytes(length, seed: generator.next())
                    let base = slot * (area + 4096)
                    let count = cut(vectors + slot * 64, memory.baseAddress! + base, length)
                    put(bytes, vectors + slot * 64, count)
                    model.replaceSubrange(range, with: bytes)
                    engine.start(
                        request, .write, offset: UInt64(start), length: UInt64(length), vectors: vectors + slot * 64,
                        count: count)
                case 6:
                    model.replaceSubrange(range, with: repeatElement(0, count: length))
                    engine.start(
                        request, Bool.random(using: &generator) ? .writeZeroes : .writeZeroesUnmapping,
                        offset: UInt64(start), length: UInt64(length))
                default:
                    engine.start(request, .flush, offset: 0, length: 0)
                }
            }
            while let completion = try engine.waitForCompletion() {
                #expect(completion.error == 0, "\(completion)")
                if completion.operation == .read, let (place, base) = expected[completion.request] {
                    let slot = base / (area + 4096)
                    #expect(take(vectors + slot * 64, place.count) == Array(model[place]), "read of \(place)")
                }
                engine.release(completion.request)
            }
        }
    }

    /// Vectors over memory: one, several in a row, or several with gaps.
    private mutating func cut(
        _ vectors: UnsafeMutablePointer<iovec>, _ memory: UnsafeMutableRawPointer, _ length: Int
    ) -> Int {
        let kind = Int.random(in: 0..<3, using: &generator)
        let pieces = kind == 0 ? 1 : Int.random(in: 1...20, using: &generator)
        var count = 0, done = 0, place = memory
        while done < length {
            let size = count + 1 == pieces ? length - done : min(length - done, max(1, length / pieces))
            vectors[count] = iovec(iov_base: place, iov_len: size)
            place += size + (kind == 2 ? 64 : 0)
            done += size
            count += 1
        }
        return count
    }

    private func put(_ bytes: [UInt8], _ vectors: UnsafeMutablePointer<iovec>, _ count: Int) {
        var done = 0
        for index in 0..<count {
            bytes.withUnsafeBytes {
                vectors[index].iov_base.copyMemory(from: $0.baseAddress! + done, byteCount: vectors[index].iov_len)
            }
            done += vectors[index].iov_len
        }
    }

    private func take(_ vectors: UnsafeMutablePointer<iovec>, _ length: Int) -> [UInt8] {
        var bytes: [UInt8] = [], index = 0
        while bytes.count < length {
            bytes += UnsafeRawBufferPointer(start: vectors[index].iov_base, count: vectors[index].iov_len)
            index += 1
        }
        return bytes
    }
}

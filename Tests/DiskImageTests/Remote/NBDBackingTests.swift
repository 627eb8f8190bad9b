// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A qcow2 image with a remote backing file: two kinds of queues for one engine.
@Suite(.timed) struct NBDBackingTests {
    private let directory = TemporaryDirectory()
    private let content: [UInt8]

    init() throws {
        content = randomBytes(1 << 20, seed: 1) + [UInt8](repeating: 0, count: 2 << 20) + randomBytes(1 << 20, seed: 2)
        try directory.write("base.raw", content)
    }

    private var overlay: String { directory.file("over.qcow2") }
    /// An image names a remote disk, which is the user's word here.
    private let following = DiskImageOptions(readOnly: true, namedFiles: .anywhere)

    /// Makes the overlay, by qemu-img, whose name for the base is the address.
    private func makeOverlay(_ address: String, _ options: String = "cluster_size=65536", size: Int? = nil) {
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", options, "-u", "-b", address, "-F", "raw", overlay,
            "\(size ?? content.count)")
    }

    private func open(
        readOnly: Bool = false, depth: Int = 32, usesRing: Bool = true, reports: Reports? = nil
    ) throws -> DiskEngine {
        var options = DiskImageOptions(readOnly: readOnly, namedFiles: .anywhere)
        if let reports { options.report = { reports.add($0) } }
        return try DiskEngine(
            DiskImage(path: overlay, options: options), depth: depth, segments: 64, usesRing: usesRing)
    }

    private func commit() -> ImageCommit {
        var commit = ImageCommit(path: overlay)
        commit.options.namedFiles = .anywhere
        return commit
    }

    /// What qemu-img reads in the overlay, and that it finds nothing wrong with it.
    private func expectQEMUReads(_ expected: [UInt8], sourceLocation: SourceLocation = #_sourceLocation) throws {
        let check = run(["qemu-img", "check", "-q", overlay])
        #expect(check.status == 0, "\(check.output)", sourceLocation: sourceLocation)
        qemuImage(
            "convert", "-f", "qcow2", "-O", "raw", overlay, directory.file("seen.raw"), sourceLocation: sourceLocation)
        #expect(try directory.read("seen.raw") == expected, sourceLocation: sourceLocation)
    }

    // MARK: - The disk

    /// Requests of all kinds, many at a time: the overlay's clusters come from the file, or are copied from the server,
    /// the rest is read there.
    @Test(arguments: [true, false], ["cluster_size=65536", "cluster_size=4096", "cluster_size=65536,extended_l2=on"])
    func randomRequests(usesRing: Bool, layout: String) throws {
        let server = try NBDServer(directory, image: directory.file("base.raw"), ["-r"])
        makeOverlay(server.address(), layout)
        var workload = RemoteWorkload(content, seed: 5)
        for _ in 0..<2 {
            var engine = try open(usesRing: usesRing)
            #expect(engine.usesRing == usesRing && engine.image.maximumEngines == 1)
            try workload.run(&engine, steps: 400)
            #expect(try engine.readAll() == workload.model)
            try engine.perform(.flush)
        }
        try expectQEMUReads(workload.model)
        #expect(try directory.read("base.raw") == content)
    }

    @Test(arguments: [4096, 65536]) func aServerOfWholeBlocks(block: Int) throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=blocksize-policy", "-r", "file", directory.file("base.raw"),
            "blocksize-minimum=\(block)",
            "blocksize-preferred=65536", "blocksize-maximum=131072", "blocksize-error-policy=error")
        makeOverlay(server.address(), "cluster_size=1024")
        var engine = try open()
        var workload = RemoteWorkload(content, seed: 6)
        try workload.run(&engine, steps: 400)
        #expect(try engine.readAll() == workload.model)
    }

    /// What is beyond the base's end is zero; a sector that it has in part ends in zeroes.
    @Test func aShorterBase() throws {
        try directory.write("short.raw", Array(content[..<100_001]))
        let server = try NBDServer(directory, nbdkit: "-r", "file", directory.file("short.raw"))
        makeOverlay(server.address())
        var engine = try open()
        var expected = content[..<100_001] + [UInt8](repeating: 0, count: content.count - 100_001)
        #expect(try engine.readAll() == Array(expected))
        try engine.write(98_000, [1, 2, 3])
        try engine.write(200_000, [4, 5, 6])
        expected.replaceSubrange(98_000..<98_003, with: [1, 2, 3])
        expected.replaceSubrange(200_000..<200_003, with: [4, 5, 6])
        #expect(try engine.readAll() == Array(expected))
    }

    /// Two overlays on top of each other, and the names that people give.
    @Test func aLongerChain() throws {
        let server = try NBDServer(directory, image: directory.file("base.raw"), ["-r", "-x", "a disk"])
        for (path, backing, format) in [
            ("middle.qcow2", server.address("a%20disk"), "raw"), ("over.qcow2", "middle.qcow2", "qcow2"),
        ] {
            let reference = BackingReference(name: backing, format: try #require(ImageFormat(rawValue: format)))
            var creation = ImageCreation(path: directory.file(path), format: .qcow2)
            creation.backingOptions.namedFiles = .anywhere
            creation.backing = reference
            #expect(try creation.create() == UInt64(content.count))
        }
        do {
            var engine = try open()
            #expect(engine.image.files == [overlay, directory.file("middle.qcow2"), server.address("a%20disk")])
            #expect(try engine.readAll() == content)
        }
        let chain = try ImageInformation.chain(path: overlay, namedFiles: .anywhere)
        #expect(chain.map(\.format) == [.qcow2, .qcow2, .raw] && chain[2].remote?.size == UInt64(content.count))
        try expectQEMUReads(content)
    }

    // MARK: - Servers that fail

    @Test func aWorkloadGoesOnOverConnections() throws {
        let server = try NBDServer(directory, image: directory.file("base.raw"), ["-r"])
        makeOverlay(server.address(), "cluster_size=4096")
        let reports = Reports()
        var options = DiskImageOptions(namedFiles: .anywhere)
        options.reconnect = 60
        options.report = { reports.add($0) }
        var engine = try DiskEngine(DiskImage(path: overlay, options: options), depth: 32, segments: 64)
        var workload = RemoteWorkload(content, seed: 7)
        let killer = Killer()
        try workload.run(&engine, steps: 400) { step in
            if step % 10 == 5 { try killer.run(server, after: step * 7 % 3000) }
        }
        killer.join()
        #expect(try engine.readAll() == workload.model)
        #expect(reports.all.contains { $0.contains("reconnected after") })
        try engine.perform(.flush)
        _ = consume engine
        try expectQEMUReads(workload.model)
    }

    /// Who needs the base gets its error, a write that would have to copy from it too; what the overlay has is there,
    /// and it stays whole.
    @Test func errorsOfTheBase() throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=error", "-r", "file", directory.file("base.raw"), "error-pread=EIO",
            "error-pread-rate=100%",
            "error-pread-file=\(directory.file("fails"))")
        makeOverlay(server.address())
        var engine = try open()
        try engine.write(0, Array(content[..<65536]))
        try directory.write("fails", [])
        let failed = { (call: String) in DiskImageError.request(path: overlay, SystemCallError(call, errno: EIO)) }
        #expect(throws: failed("read")) { try engine.read(65536, 512) }
        #expect(throws: failed("write")) { try engine.write(65536, [1, 2, 3]) }
        #expect(try engine.read(0, 65536) == Array(content[..<65536]))
        try engine.write(131_072, [UInt8](repeating: 9, count: 65536))
        try engine.perform(.flush)
        unlink(directory.file("fails"))
        var expected = content
        expected.replaceSubrange(131_072..<196_608, with: repeatElement(9, count: 65536))
        #expect(try engine.readAll() == expected)
        _ = consume engine
        try expectQEMUReads(expected)
    }

    /// A server that says nothing holds up neither the requests that do not need it nor the end.
    @Test func aServerThatStops() throws {
        let server = try NBDServer(directory, image: directory.file("base.raw"), ["-r"])
        makeOverlay(server.address())
        var engine = try open()
        try engine.write(0, Array(content[..<65536]))
        server.stop()
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 8192, alignment: 4096)
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 2)
        defer {
            memory.deallocate()
            vectors.deallocate()
        }
        for index in 0..<2 { vectors[index] = iovec(iov_base: memory + 4096 * index, iov_len: 4096) }
        let far = engine.acquire(), near = engine.acquire()
        engine.start(try #require(far), .read, offset: 1 << 19, length: 4096, vectors: vectors, count: 1)
        engine.start(try #require(near), .read, offset: 4096, length: 4096, vectors: vectors + 1, count: 1)
        let first = try engine.waitForCompletion()
        #expect(first?.request == near && first?.error == 0)
        #expect(Array(UnsafeRawBufferPointer(start: memory + 4096, count: 4096)) == Array(content[4096..<8192]))
        engine.release(try #require(near))
        // As when a device is reset.
        engine.image.remote?.drain(within: 50)
        let second = try engine.waitForCompletion()
        #expect(second?.request == far && second?.error == EIO)
        engine.release(try #require(far))
        // And with a request under way when the engine goes.
        let last = engine.acquire()
        engine.start(try #require(last), .read, offset: 1 << 19, length: 4096, vectors: vectors, count: 1)
        try engine.submit()
        _ = consume engine
    }

    // MARK: - Tools

    @Test func toolsSeeIt() throws {
        #expect(run(["fallocate", "--dig-holes", directory.file("base.raw")]).status == 0)
        let server = try NBDServer(directory, image: directory.file("base.raw"))
        makeOverlay(server.address())
        qemuIO(overlay, ["write -P 7 524288 65536", "write -z 0 65536"])
        var expected = content
        expected.replaceSubrange(0..<65536, with: repeatElement(0, count: 65536))
        expected.replaceSubrange(524_288..<589_824, with: repeatElement(7, count: 65536))
        do {
            var map = ImageMap(try DiskImage(path: overlay, options: following))
            #expect(map.files == [overlay, server.address()])
            var extents: [ImageExtent] = []
            while let extent = try map.next() { extents.append(extent) }
            #expect(
                extents.map(\.depth) == [0, 1, 0, 1, 1, 1]
                    && extents.map(\.readsAsZeroes) == [true, false, false, false, true, false], "\(extents)")
        }
        // Several threads, and a server of one client.
        var conversion = ImageConversion(source: overlay, target: directory.file("flat.raw"), format: .raw)
        conversion.sourceOptions.namedFiles = .anywhere
        conversion.threads = 4
        try conversion.run()
        #expect(try directory.read("flat.raw") == expected)
        var comparison = ImageComparison(overlay, with: directory.file("flat.raw"))
        comparison.firstOptions = following
        #expect(try comparison.run() == .identical)
        // What differs from the remote disk, from an image on that very disk.
        conversion = ImageConversion(source: overlay, target: directory.file("thin.qcow2"), format: .qcow2)
        conversion.sourceOptions.namedFiles = .anywhere
        conversion.threads = 4
        conversion.backing = BackingReference(name: server.address(), format: .raw)
        try conversion.run()
        #expect(try ImageInformation(path: directory.file("thin.qcow2")).allocated ?? .max < 600 << 10)
        qemuImage("compare", "-f", "qcow2", "-F", "raw", directory.file("thin.qcow2"), directory.file("flat.raw"))
        // Into the remote disk: the overlay is empty afterwards, and shows the same.
        #expect(try commit().run() == server.address())
        #expect(try directory.read("base.raw") == expected)
        try expectQEMUReads(expected)
        #expect(try ImageInformation(path: overlay).backing?.name == server.address())
    }

    @Test func rebase() throws {
        let server = try NBDServer(directory, image: directory.file("base.raw"), ["-r"])
        try directory.write("other.raw", randomBytes(content.count, seed: 9))
        qemuImage("create", "-q", "-f", "qcow2", "-b", directory.file("other.raw"), "-F", "raw", overlay)
        let expected = try directory.read("other.raw")
        var rebase = ImageRebase(path: overlay)
        rebase.options.namedFiles = .anywhere
        rebase.backing = BackingReference(name: server.address(), format: .raw)
        try rebase.run()
        try expectQEMUReads(expected)
        // To another image on that remote disk, and away from both.
        qemuImage("create", "-q", "-f", "qcow2", "-b", server.address(), "-F", "raw", directory.file("middle.qcow2"))
        rebase.backing = BackingReference(name: "middle.qcow2", format: .qcow2)
        try rebase.run()
        try expectQEMUReads(expected)
        rebase.backing = nil
        try rebase.run()
        server.kill()
        try expectQEMUReads(expected)
    }

    /// The server has several writes of a commit at a time, neighbouring clusters come in one, and the flush when all
    /// have ended.
    @Test func aCommitHasManyRequestsInFlight() throws {
        let log = directory.file("log")
        let server = try NBDServer(
            directory, nbdkit: "--filter=log", "--filter=delay", "file", directory.file("base.raw"), "logfile=\(log)",
            "delay-write=20ms")
        makeOverlay(server.address())
        qemuIO(overlay, stride(from: 0, to: 2 << 20, by: 256 << 10).map { "write -P 7 \($0) 128k" })
        try commit().run()
        var writes = 0, inFlight = 0, most = 0, atFlushes: [Int] = []
        for line in String(decoding: try directory.read("log"), as: UTF8.self).split(separator: "\n") {
            if line.contains("...Write ") {
                inFlight -= 1
            } else if line.contains(" Write ") {
                writes += 1
                inFlight += 1
                most = max(most, inFlight)
            } else if line.contains(" Flush ") {
                atFlushes.append(inFlight)
            }
        }
        #expect(writes == 8 && most > 1, "\(writes) writes, \(most) at a time")
        #expect(!atFlushes.isEmpty && atFlushes.allSatisfy { $0 == 0 }, "in flight at flushes: \(atFlushes)")
    }

    /// Without a flush nobody could say when the overlay may be emptied.
    @Test func commitWantsAFlush() throws {
        let server = try NBDServer(
            directory,
            [
                "nbdkit", "-f", "-U", "SOCKET", "eval", "get_size=echo \(content.count)", "can_write=exit 0",
                "can_flush=exit 3", "pwrite=cat >/dev/null",
                "pread=dd if=/dev/zero count=$3 iflag=count_bytes",
            ])
        makeOverlay(server.address())
        do throws(DiskImageError) {
            try commit().run()
            Issue.record("it was committed")
        } catch {
            #expect("\(error)".contains("does not support flush"), "\(error)")
        }
        var kept = commit()
        kept.keepsContents = true
        try kept.run()
    }

    // MARK: - What cannot be

    @Test func whatIsNotAllowed() throws {
        let server = try NBDServer(directory, image: directory.file("base.raw"), ["-r"])
        makeOverlay(server.address())
        #expect(
            openError(overlay, DiskImageOptions(readOnly: true, allowsBacking: false))
                == .backingNotAllowed(path: overlay, name: server.address()))
        // The names of data files are written to: an image does not choose where on the network.
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "data_file=\(directory.file("data.raw"))",
            directory.file("data.qcow2"), "1M")
        let error = openError(directory.file("data.qcow2"), DiskImageOptions(dataFile: server.address()))
        #expect(error == .dataFile(of: directory.file("data.qcow2"), .remoteNotPossible(path: server.address())))
        func reason(_ name: String, _ format: String = "raw") -> String {
            qemuImage("create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", format, overlay, "4M")
            return openError(overlay, following).map { "\($0)" } ?? ""
        }
        #expect(
            reason("json:{\"driver\":\"nbd\",\"path\":\"/s\"}").contains(
                "is neither the path of a local file nor an address"))
        #expect(reason("http://host/disk").contains("is neither the path of a local file nor an address"))
        #expect(reason("nbd:host:10809").contains("not the address of a remote disk"))
        #expect(reason(server.address(), "qcow2").contains(NBDLocation.isRaw))
        #expect(reason(server.address("nowhere")).contains("no export named 'nowhere'"))
        // No server there: the overlay says whose fault it is.
        server.kill()
        #expect(reason(server.address()).contains("backing file: disk \"\(server.address())\": "))
    }
}

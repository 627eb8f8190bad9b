// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A remote disk as the target of a conversion.
@Suite(.timed) struct NBDTargetTests {
    private let directory = TemporaryDirectory()
    private let content: [UInt8]
    /// What the remote disk had before, which is longer.
    private let before: [UInt8]

    init() throws {
        content =
            randomBytes(3 << 20, seed: 1) + [UInt8](repeating: 0, count: 5 << 20) + randomBytes(100_000, seed: 2)
            + [UInt8](repeating: 0, count: 3 << 20 - 100_000) + randomBytes(70_144, seed: 3)
        before = randomBytes(13 << 20, seed: 4)
        try directory.write("source.raw", content)
        try directory.write("disk.raw", before)
        qemuImage("convert", "-f", "raw", "-O", "qcow2", directory.file("source.raw"), directory.file("source.qcow2"))
    }

    private func conversion(_ target: String, source: String = "source.qcow2", threads: Int = 3) -> ImageConversion {
        var conversion = ImageConversion(source: directory.file(source), target: target, format: .raw)
        conversion.replacing = true
        conversion.threads = threads
        return conversion
    }

    private func result(
        _ conversion: ImageConversion, _ progress: (ImageProgress) -> Bool = { _ in true }
    ) -> DiskImageError? {
        do throws(DiskImageError) { try conversion.run(progress) } catch { return error }
        return nil
    }

    private func failure(
        _ conversion: ImageConversion, _ progress: (ImageProgress) -> Bool = { _ in true }
    ) -> DiskImageError? {
        let error = result(conversion, progress)
        #expect(error != nil, "it was converted")
        return error
    }

    /// What of the disk is the source's is the source's, zeroes too, and the rest is what it was.
    private func expectConverted() throws {
        #expect(try directory.read("disk.raw") == content + before[content.count...])
    }

    @Test(arguments: ["source.qcow2", "source.raw"]) func zeroesTakeNoSpace(source: String) throws {
        let server = try NBDServer(directory, image: directory.file("disk.raw"))
        func blocks() throws -> Int { try FileDescriptor.open(directory.file("disk.raw"), O_RDONLY).status().st_blocks }
        let full = try blocks()
        try conversion(server.address(), source: source).run()
        try expectConverted()
        #expect(try blocks() <= full - 7 << 11)
    }

    /// Servers that can do less, or only whole blocks.
    @Test(arguments: [
        ["--filter=nozero"], ["--filter=nozero", "--filter=noextents"],
        [
            "--filter=blocksize-policy", "blocksize-minimum=65536", "blocksize-preferred=65536",
            "blocksize-maximum=131072", "blocksize-error-policy=error",
        ],
        [
            "--filter=blocksize-policy", "--filter=nozero", "blocksize-minimum=4096", "blocksize-preferred=4096",
            "blocksize-maximum=1M", "blocksize-error-policy=error",
        ],
    ])
    func otherServers(_ words: [String]) throws {
        let filters = words.filter { $0.hasPrefix("--") }, parameters = words.filter { !$0.hasPrefix("--") }
        let server = try NBDServer(
            directory, ["nbdkit", "-f", "-U", "SOCKET"] + filters + ["file", directory.file("disk.raw")] + parameters)
        try conversion(server.address()).run()
        try expectConverted()
    }

    /// What is zero already is not written where writing would be the only way.
    @Test func aNewDiskIsNotFilledWithZeroes() throws {
        let size = 256 << 20
        run(["truncate", "-s", "\(size)", directory.file("new.raw")])
        qemuImage("create", "-q", "-f", "qcow2", directory.file("empty.qcow2"), "\(size)")
        let server = try NBDServer(directory, nbdkit: "--filter=nozero", "file", directory.file("new.raw"))
        try conversion(server.address(), source: "empty.qcow2").run()
        #expect(try FileDescriptor.open(directory.file("new.raw"), O_RDONLY).status().st_blocks == 0)
    }

    /// Everything has been written when the flush comes, which is the last word.
    @Test func itEndsInAFlush() throws {
        let log = directory.file("log")
        let server = try NBDServer(
            directory, nbdkit: "--filter=log", "file", directory.file("disk.raw"), "logfile=\(log)")
        try conversion(server.address()).run()
        try expectConverted()
        let lines = String(decoding: try directory.read("log"), as: UTF8.self).split(separator: "\n")
        let last = try #require(
            lines.lastIndex {
                $0.contains(" Write ") || $0.contains(" Zero ") || $0.contains("...Write ") || $0.contains("...Zero ")
            })
        #expect(lines[last...].contains { $0.contains(" Flush ") })
        // Zeroes are not cut into pieces as data is.
        #expect(
            lines.contains { $0.contains(" Zero ") && $0.contains("count=0x400000") },
            "\(lines.filter { $0.contains(" Zero ") })")
    }

    // MARK: - Faults

    @Test(arguments: [
        ("pwrite", "EIO", "write", EIO), ("pwrite", "ENOSPC", "write", ENOSPC), ("zero", "EIO", "write zeroes", EIO),
        ("zero", "ENOSPC", "write zeroes", ENOSPC),
    ])
    func errorsAreTold(call: String, name: String, what: String, code: Int32) throws {
        for rate in ["100%", "40%"] {
            let server = try NBDServer(
                directory, nbdkit: "--filter=error", "file", directory.file("disk.raw"), "error-\(call)=\(name)",
                "error-\(call)-rate=\(rate)")
            // Where not every call fails, all of a conversion's may have luck.
            var attempts = 0, error: DiskImageError?
            while error == nil, attempts < 50 {
                attempts += 1
                error = result(conversion(server.address()))
            }
            #expect(
                error
                    == .failedInPlace(
                        path: server.address(), .request(path: server.address(), SystemCallError(what, errno: code))))
            #expect("\(error.map(\.description) ?? "")".contains("may be partly overwritten"))
        }
    }

    /// A server that is killed and comes again in the middle of it.
    @Test func theServerComesAgain() throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=delay", "file", directory.file("disk.raw"), "delay-write=100ms")
        let killer = Killer()
        var kills = 0
        try conversion(server.address("", "&reconnect=60"), threads: 1).run { progress in
            if progress.done < progress.total, kills < 2 {
                kills += 1
                do { try killer.run(server, after: 1000) } catch { Issue.record("\(error)") }
            }
            return true
        }
        killer.join()
        #expect(kills > 0)
        try expectConverted()
    }

    @Test func aServerThatIsGoneForGood() throws {
        let server = try NBDServer(
            directory, nbdkit: "--filter=delay", "file", directory.file("disk.raw"), "delay-write=100ms")
        let address = server.address("", "&reconnect=0")
        let error = failure(conversion(address)) { progress in
            server.kill()
            return true
        }
        guard case .failedInPlace(address, .remote(address, _)) = error else {
            return #expect(Bool(false), "\(String(describing: error))")
        }
    }

    /// Whatever it waits for: a write, or the flush at the end.
    @Test(arguments: ["pwrite", "flush"]) func itCanBeGivenUp(call: String) throws {
        var calls = [
            "get_size": "echo 20M", "can_write": "exit 0", "can_flush": "exit 0", "can_zero": "exit 3",
            "pread": "dd if=/dev/zero count=$3 iflag=count_bytes", "pwrite": "cat >/dev/null", "flush": "exit 0",
        ]
        // As long as the directory is there.
        let file = directory.file("waits")
        calls[call] = "touch '\(file)'; while [ -e '\(file)' ]; do sleep 0.1; done"
        let server = try NBDServer(
            directory, ["nbdkit", "-f", "-U", "SOCKET", "eval"] + calls.map { "\($0.key)=\($0.value)" })
        let error = failure(conversion(server.address())) { _ in access(file, F_OK) != 0 }
        #expect(error == .interruptedInPlace(path: server.address()))
        #expect("\(error.map(\.description) ?? "")".contains("it is partly overwritten"))
    }

    // MARK: - What cannot be

    @Test func refusals() throws {
        let server = try NBDServer(directory, image: directory.file("disk.raw"), ["-e", "4"])
        let address = server.address()
        var refused = conversion(address)
        refused.replacing = false
        #expect(failure(refused) == .exists(path: address))
        refused = conversion(address)
        refused.format = .qcow2
        #expect(failure(refused) == .remoteNotPossible(path: address, reason: NBDLocation.isRaw))
        refused = conversion(address)
        refused.preallocation = .full
        #expect(failure(refused).map { "\($0)".contains("the server allocates the space") } == true)
        refused = conversion(address)
        refused.source = address
        #expect(failure(refused) == .sameFile(path: address, other: address))
        try directory.write("large.raw", before + [UInt8](repeating: 0, count: 512))
        #expect(
            failure(conversion(address, source: "large.raw"))
                == .tooSmall(path: address, needed: UInt64(before.count + 512), size: UInt64(before.count)))
        let reading = try NBDServer(directory, nbdkit: "-r", "file", directory.file("disk.raw"), socket: "reading")
        #expect(failure(conversion(reading.address())) == .remoteReadOnly(path: reading.address()))
        // And none of it has changed the disk.
        #expect(try directory.read("disk.raw") == before)
    }

    @Test func otherVerbs() throws {
        let server = try NBDServer(directory, image: directory.file("disk.raw"))
        let address = server.address()
        func reason(_ body: () throws -> Void) -> String {
            do { try body() } catch { return "\(error)" }
            return "it was done"
        }
        #expect(
            reason { try ImageCreation(path: address, format: .raw, size: 1 << 20).create() }.contains(
                "must be created on its server; swkvm image convert --force writes"))
        #expect(
            reason { _ = try DiskImage.check(path: address) }.contains(
                "only the metadata of qcow2 images can be checked"))
        #expect(
            reason { _ = try DiskImage.check(path: address, options: DiskImageOptions(format: .qcow2)) }.contains(
                NBDLocation.isRaw))
        #expect(reason { try ImageCommit(path: address).run() }.contains(NBDLocation.isRaw))
        #expect(reason { try ImageRebase(path: address).run() }.contains(NBDLocation.isRaw))
        #expect(
            reason { _ = try DiskImage(path: address, options: DiskImageOptions(format: .qcow2)) }.contains(
                NBDLocation.isRaw))
        #expect(
            reason {
                var engine = try DiskEngine(DiskImage(path: address), depth: 1)
                try engine.resize(to: 20 << 20)
            }.contains("the server determines the size"))
        #expect(try directory.read("disk.raw") == before)
    }
}

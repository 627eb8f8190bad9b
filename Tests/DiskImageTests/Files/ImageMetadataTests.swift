// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import TestSupport
import Testing

/// What a format says of a file is asked without an engine, and without the image that the file is part of.
@Suite(.timed) struct ImageMetadataTests {
    let directory = TemporaryDirectory(inMemory: true)
    private static let size = 2 << 20

    /// Reads all of a disk, as anybody can who has a file and its metadata: what has to be read for an answer, and then
    /// what the answer says.
    private func contents(
        _ metadata: inout some ImageMetadata & ~Copyable, _ file: borrowing ImageFile
    ) throws -> [UInt8] {
        let calls = FileCalls.host, number = file.descriptor.rawValue
        var contents = [UInt8](repeating: 0xee, count: Self.size)
        try contents.withIOMemory { memory in
            var offset = 0, compressed: UInt64 = 0, steps = 0
            while offset < Self.size {
                steps += 1
                try #require(steps < 10_000)
                var length: UInt64 = 0
                switch metadata.locate(UInt64(offset), UInt64(Self.size - offset), &compressed) {
                case .data(let place, let found):
                    length = found
                    let got = calls.transfer(number, memory.piece(offset, Int(found)), at: place, isRead: true)
                    // The last cluster of a file may be cut short.
                    memory.piece(offset + max(0, got), Int(found) - max(0, got)).clear()
                case .zero(let found), .unallocated(let found):
                    length = found
                    memory.piece(offset, Int(found)).clear()
                case .memory(let bytes):
                    length = UInt64(bytes.count)
                    memory.piece(offset, bytes.count).copy(from: bytes)
                case .load(let load):
                    let got = calls.transfer(number, load.buffer, at: load.offset, isRead: true)
                    #expect(metadata.complete(load, bytes: max(0, got), error: 0) == 0)
                    metadata.unpin(load)
                case .wait, .commit, .failed:
                    Issue.record("no answer at \(offset)")
                    return
                }
                if length > 0 { compressed = 0 }
                offset += Int(length)
            }
        }
        return contents
    }

    /// An image in which there is something of each kind, and what qemu-img reads from it.
    private func makeImage(
        _ format: String, _ options: [String], _ commands: [String]
    ) throws -> (path: String, contents: [UInt8]) {
        let path = directory.file("disk.\(format)"), raw = directory.file("disk.raw")
        qemuImage(["create", "-q", "-f", format] + options + [path, "\(Self.size)"])
        qemuIO(path, commands, format: format)
        qemuImage("convert", "-f", format, "-O", "raw", path, raw)
        return (path, try directory.read("disk.raw"))
    }

    @Test(arguments: [
        [], ["-o", "compression_type=zstd"], ["-o", "extended_l2=on,cluster_size=64k"], ["-o", "compat=0.10"],
    ]) func qcow2(options: [String]) throws {
        let (path, expected) = try makeImage(
            "qcow2", options,
            [
                "write -P 1 0 96k", "write -P 2 300k 4k", "write -c -P 3 512k 64k", "write -P 4 1M 128k",
                "discard 1M 64k", "write -P 5 2047k 1k",
            ])
        let file = try ImageFile(path: path, writable: false, cache: .writeback, locking: false)
        var metadata = try QCOW2Image(file, metadataCacheSize: 1 << 20)
        #expect(metadata.clusterSize == 65536)
        let found = try contents(&metadata, file)
        #expect(found == expected)
        let isUndamaged = metadata.damage == nil
        #expect(isUndamaged)
    }

    @Test func vdi() throws {
        let (path, expected) = try makeImage("vdi", [], ["write -P 1 0 96k", "write -P 2 1500k 4k"])
        let file = try ImageFile(path: path, writable: false, cache: .writeback, locking: false)
        var metadata = try BlockMapImage(VDIHeader(file).layout, file, cacheSize: 1 << 20)
        #expect(metadata.clusterSize == 1 << 20)
        let found = try contents(&metadata, file)
        #expect(found == expected)
    }

    /// A damaged entry is reported by the metadata itself.
    @Test func damage() throws {
        let (path, _) = try makeImage("qcow2", [], ["write -P 1 0 96k"])
        var bytes = try directory.read("disk.qcow2")
        // The L1 table's first entry leads far beyond the end of the file.
        let place = Int(bytes.bigEndian64(at: 40))
        bytes.replaceSubrange(place..<place + 8, with: [0x80, 0x0f, 0, 0, 0, 0, 0, 0])
        try directory.write("disk.qcow2", bytes)
        let file = try ImageFile(path: path, writable: false, cache: .writeback, locking: false)
        var metadata = try QCOW2Image(file, metadataCacheSize: 1 << 20)
        var compressed: UInt64 = 0
        let lookup = metadata.locate(4096, 4096, &compressed)
        guard case .failed(EIO) = lookup else { return #expect(Bool(false), "\(lookup)") }
        let damage = metadata.damage
        #expect(damage?.diskOffset == 4096)
    }
}

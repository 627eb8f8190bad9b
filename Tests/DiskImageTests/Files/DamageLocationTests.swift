// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A damage is reported with the table, and the byte of the file of the entry, that cannot be right.
@Suite(.timed) struct DamageLocationTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// What is reported about an image whose byte `offset` of the disk cannot be read, or not be written.
    private func damage(
        of name: String, _ bytes: [UInt8], at offset: UInt64, writing: Bool = false,
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> String {
        let path = try directory.write(name, bytes)
        var engine = try DiskEngine(DiskImage(path: path, options: writing ? DiskImageOptions() : readOnly))
        #expect(throws: DiskImageError.self, sourceLocation: sourceLocation) {
            if writing {
                try engine.write(offset, [UInt8](repeating: 5, count: 4096))
            } else {
                _ = try engine.read(offset, 4096)
            }
        }
        let found = engine.image.damage
        let damage = "\(try #require(found, sourceLocation: sourceLocation))"
        let start = "disk \"\(path)\": damaged or invalid: "
        #expect(damage.hasPrefix(start), "\(damage)", sourceLocation: sourceLocation)
        return String(damage.dropFirst(start.count))
    }

    private func expect(
        _ name: String, _ bytes: [UInt8], at offset: UInt64, writing: Bool = false, _ expected: String,
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let found = try damage(of: name, bytes, at: offset, writing: writing, sourceLocation: sourceLocation)
        #expect(found == expected, sourceLocation: sourceLocation)
    }

    // MARK: - qcow2

    private func qcow2(_ options: String, _ commands: [String] = ["write -P 3 0 3M"]) throws -> [UInt8] {
        let path = directory.file("good.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "4M")
        qemuIO(path, commands)
        return try directory.read("good.qcow2")
    }

    @Test func l1Table() throws {
        var bytes = try qcow2("cluster_size=4096")
        let l1 = Int(bytes.bigEndian64(at: 40))
        // An L2 table maps 2 MiB.
        bytes.store(1 << 63 | 1 << 40 as UInt64, at: l1 + 8)
        let expected =
            "L1 table at byte \(l1), entry at byte \(l1 + 8): an L2 table at byte 1099511627776, beyond the end of the file "
            + "(at byte 2101248 of the disk)"
        try expect("bad.qcow2", bytes, at: 2_101_248, expected)
        try expect("bad.qcow2", bytes, at: 2_101_248, writing: true, expected)
    }

    @Test(arguments: [false, true]) func l2Table(isExtended: Bool) throws {
        var bytes = try qcow2("cluster_size=16k" + (isExtended ? ",extended_l2=on" : ""))
        let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00)
        let entry = l2 + 5 * (isExtended ? 16 : 8)
        bytes.store(1 << 63 | 1 << 40 as UInt64, at: entry)
        let expected =
            "L2 table at byte \(l2), entry at byte \(entry): a data cluster at byte 1099511627776, beyond the end of the file "
            + "(at byte 86016 of the disk)"
        try expect("bad.qcow2", bytes, at: 5 * 16384 + 4096, expected)
        try expect("bad.qcow2", bytes, at: 5 * 16384 + 4096, writing: true, expected)
    }

    @Test func compressedCluster() throws {
        var bytes = try qcow2("cluster_size=64k", ["write -P 1 0 64k", "write -c -P 3 64k 64k"])
        let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00)
        let place = Int(bytes.bigEndian64(at: l2 + 8) & ((1 << 54) - 1))
        for index in place..<place + 8 { bytes[index] = 0xff }
        try expect(
            "bad.qcow2", bytes, at: 65536,
            "L2 table at byte \(l2), entry at byte \(l2 + 8): a compressed cluster at byte \(place) that does not decompress "
                + "(at byte 65536 of the disk)")
    }

    /// Which of the image's own tables a data cluster would overwrite.
    @Test func dataOverMetadata() throws {
        let good = try qcow2("cluster_size=4096")
        let l1 = Int(good.bigEndian64(at: 40)), table = Int(good.bigEndian64(at: 48))
        let l2 = Int(good.bigEndian64(at: l1) & 0x00ff_ffff_ffff_fe00)
        let block = Int(good.bigEndian64(at: table))
        for (place, name) in [
            (l1, "the L1 table"), (l2, "an L2 table"), (table, "the refcount table"), (block, "a refcount block"),
        ] {
            var bytes = good
            bytes.store(1 << 63 | UInt64(place), at: l2 + 16)
            try expect(
                "bad.qcow2", bytes, at: 8192, writing: true,
                "L2 table at byte \(l2), entry at byte \(l2 + 16): a data cluster at byte \(place), which overlaps \(name) "
                    + "(at byte 8192 of the disk)")
        }
    }

    @Test func refcountBlock() throws {
        var bytes = try qcow2("cluster_size=4096")
        let block = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 48))))
        let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40)) + 8) & 0x00ff_ffff_ffff_fe00)
        let entry = block + l2 / 4096 * 2
        bytes[entry + 1] = 0
        try expect(
            "bad.qcow2", bytes, at: 3 << 20, writing: true,
            "refcount block at byte \(block), entry at byte \(entry): an L2 table at byte \(l2), whose cluster has a refcount of 0"
        )
    }

    @Test func refcountTable() throws {
        var bytes = try qcow2("cluster_size=4096")
        let table = Int(bytes.bigEndian64(at: 48))
        bytes.store(0 as UInt64, at: table)
        try expect(
            "bad.qcow2", bytes, at: 3 << 20, writing: true,
            "refcount table at byte \(table), entry at byte \(table): the header at byte 0, whose cluster has a refcount of 0"
        )
        bytes.store(1 << 40 as UInt64, at: table + 8)
        let path = try directory.write("bad.qcow2", bytes)
        let error = "\(try #require(openError(path)))"
        #expect(
            error.contains(
                "refcount table at byte \(table), entry at byte \(table + 8): a refcount block at byte 1099511627776, beyond the end"
            ), "\(error)")
    }

    /// A table as long as can be whose every block has counts: the search for a free cluster ends, and says where.
    /// What is lost is space, so the image is not marked and the rest of it can be written.
    @Test func clustersBeyondTheEnd() throws {
        var bytes = try qcow2("cluster_size=512", ["write -P 3 0 512"])
        bytes += [UInt8](repeating: 0, count: (bytes.count + 511) / 512 * 512 - bytes.count)
        let block = UInt64(bytes.count)
        bytes += [UInt8](repeating: 0, count: 512)
        for count in 0..<256 { bytes[Int(block) + 2 * count + 1] = 1 }
        let table = UInt64(bytes.count)
        // Of 128 bytes a table's cluster has 64 entries; a block has the counts of 256 clusters.
        let entries = 64 * 160
        for _ in 0..<entries { bytes += (0..<8).map { UInt8(truncatingIfNeeded: block >> UInt64(56 - 8 * $0)) } }
        bytes.store(table, at: 48)
        bytes.replaceSubrange(56..<60, with: [0, 0, 0, 160])
        let end = bytes.count / 512
        try expect(
            "bad.qcow2", bytes, at: 1 << 20, writing: true,
            "refcount block at byte \(block), entry at byte \(Int(block) + end % 256 * 2): clusters from byte \(end * 512) on, "
                + "beyond the end of the file, have refcounts")
        #expect(try directory.read("bad.qcow2")[79] == 0)
        var engine = try DiskEngine(DiskImage(path: directory.file("bad.qcow2")))
        try engine.write(0, [UInt8](repeating: 6, count: 512))
    }

    /// A table of a file that was cut while it was open is no damage, but its place is known.
    @Test func aTableThatIsCutWhileTheImageIsOpen() throws {
        let bytes = try qcow2("cluster_size=4096")
        let path = try directory.write("cut.qcow2", bytes)
        let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40)) + 8) & 0x00ff_ffff_ffff_fe00)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(truncate(path, off_t(l2)) == 0)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 512, alignment: 512)
        let vector = UnsafeMutablePointer<iovec>.allocate(capacity: 1)
        defer {
            unsafe memory.deallocate()
            unsafe vector.deallocate()
        }
        unsafe vector.initialize(to: iovec(iov_base: memory, iov_len: 512))
        let acquired = engine.acquire(), request = try #require(acquired)
        unsafe engine.start(request, .read, offset: 2 << 20, length: 512, vectors: vector, count: 1)
        let completion = try engine.waitForCompletion(), ended = try #require(completion)
        #expect(ended.error == EIO && !ended.isDamage)
        let failure = engine.failure(of: ended)
        #expect(
            "\(try #require(failure))" == "disk \"\(path)\": read: Input/output error (at byte \(l2) of the file)")
        engine.release(request)
    }

    // MARK: - Tables of blocks

    private func image(_ format: String, _ name: String, size: String) throws -> [UInt8] {
        let path = directory.file(name)
        qemuImage("create", "-q", "-f", format, path, size)
        qemuIO(path, ["write -P 3 0 \(size)"], format: format)
        return try directory.read(name)
    }

    @Test func vdi() throws {
        var bytes = try image("vdi", "good.vdi", size: "4M")
        let map = Int(bytes.littleEndian32(at: 0x154))
        bytes.replaceSubrange(map + 8..<map + 12, with: littleEndian(0x0010_0000 as UInt32))
        let place = Int(bytes.littleEndian32(at: 0x158)) + 1 << 40
        try expect(
            "bad.vdi", bytes, at: 2 << 20,
            "block map at byte \(map), entry at byte \(map + 8): a block at byte \(place), beyond the end of the file "
                + "(at byte 2097152 of the disk)")
    }

    @Test func vmdk() throws {
        let good = try image("vmdk", "good.vmdk", size: "40M")
        let grains = Int(good.littleEndian64(at: 56)) * 512
        // The second table, of the second 32 MiB.
        let table = Int(good.littleEndian32(at: grains + 4)) * 512
        var bytes = good
        bytes.replaceSubrange(table + 12..<table + 16, with: littleEndian(0x0fff_ffff as UInt32))
        try expect(
            "bad.vmdk", bytes, at: 32 << 20 + 3 << 16,
            "grain table at byte \(table), entry at byte \(table + 12): a block at byte \(0x0fff_ffff * 512), "
                + "beyond the end of the file (at byte \(32 << 20 + 3 << 16) of the disk)")
        bytes = good
        bytes.replaceSubrange(grains + 4..<grains + 8, with: littleEndian(0x0fff_ffff as UInt32))
        try expect(
            "bad.vmdk", bytes, at: 33 << 20,
            "grain directory at byte \(grains), entry at byte \(grains + 4): a table of blocks at byte \(0x0fff_ffff * 512), "
                + "beyond the end of the file (at byte 34603008 of the disk)")
    }

    @Test func vhd() throws {
        var bytes = try image("vpc", "good.vhd", size: "8M")
        let table = Int(bytes.bigEndian64(at: 512 + 16))
        bytes.replaceSubrange(table + 4..<table + 8, with: [0x0f, 0xff, 0xff, 0xff])
        try expect(
            "bad.vhd", bytes, at: 2 << 20,
            "block allocation table at byte \(table), entry at byte \(table + 4): a block at byte \(0x0fff_ffff * 512 + 512), "
                + "beyond the end of the file (at byte 2097152 of the disk)")
    }

    @Test func vhdx() throws {
        var bytes = try image("vhdx", "good.vhdx", size: "32M")
        let path = directory.file("good.vhdx")
        let file = try ImageFile(path: path, writable: false, cache: .writeback, locking: false)
        let layout = try VHDXHeader(file).layout
        guard case .array(let start) = layout.table else { return #expect(Bool(false)) }
        let entry = Int(start) + 8
        bytes[entry] = 7
        let second = layout.blockSize
        try expect(
            "bad.vhdx", bytes, at: second,
            "block allocation table at byte \(start), entry at byte \(entry): a block in the state 7, which is invalid "
                + "(at byte \(second) of the disk)")
    }
}

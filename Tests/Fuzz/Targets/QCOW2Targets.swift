// SPDX-License-Identifier: Apache-2.0

import DiskImage
import Glibc

extension FuzzTarget {
    /// qcow2 images. An input is the first 512 bytes of each cluster, whatever the size of those.
    static let qcow2 = [
        // The guest's requests.
        FuzzTarget(
            name: "qcow2", seeds: [plain(), plain(compression: .zlib), plain(compression: .zstd), withSubclusters()]
        ) { bytes in
            let file = MemoryFile(clusters(bytes))
            return isKeptSound(file) { uses(file, .qcow2) }
        },
        // What looks at an image as a whole, or changes it: information, check, repair, snapshots, other sizes.
        FuzzTarget(name: "qcow2-whole", seeds: [withSnapshot(), withBitmap(), withNames(), withSubclusters()]) {
            bytes in
            let file = MemoryFile(clusters(bytes))
            return isKeptSound(file) { isChanged(file) }
        },
        // A LUKS header behind the other clusters. Its key material is zeroes, for which the seeds' digests are made.
        FuzzTarget(name: "luks", seeds: [encrypted(.xts), encrypted(.cbc)]) { bytes in
            let end = encryptedStart + encryptedLength
            let file = MemoryFile([(0, bytes)] + (bytes.count < end ? [(end - 1, [0])] : [])),
                password = MemoryFile([(0, Array("a password".utf8))])
            return isKeptSound(file) {
                guard let key = try? DiskKey(.file(password.path)) else { fatalError("no key") }
                // An input could ask for hours of hashing; seeds want little.
                return uses(file, .qcow2) {
                    $0.keys = [key]; $0.maximumKeyWork = 4000
                }
            }
        },
    ]

    /// Where the pieces of an input lie in the file.
    private static func clusters(_ bytes: [UInt8]) -> [(place: Int, bytes: [UInt8])] {
        // The field as it is: what is no size of a cluster is refused by the header's check.
        let bits = bytes.count >= 24 && (9...21).contains(bytes[23]) ? Int(bytes[23]) : 9
        guard bits > 9 else { return [(0, bytes)] }
        let pieces = stride(from: 0, to: bytes.count, by: 512).map {
            (place: ($0 >> 9) << bits, bytes: Array(bytes[$0..<min($0 + 512, bytes.count)]))
        }
        // A whole last cluster.
        return pieces + (bytes.count % 512 == 0 && !bytes.isEmpty ? [(((bytes.count >> 9) << bits) - 1, [0])] : [])
    }

    /// Whatever is done to an image without errors leaves it without errors.
    private static func isKeptSound(_ file: borrowing MemoryFile, _ body: () -> Bool) -> Bool {
        let options = DiskImageOptions(format: .qcow2, locking: false)
        _ = try? ImageInformation(path: file.path, format: .qcow2, locking: false)
        let before = try? DiskImage.check(path: file.path, options: options)
        let isAccepted = body()
        if let before, before.errors == 0 {
            guard let after = try? DiskImage.check(path: file.path, options: options) else {
                fatalError("an image without errors cannot be checked any more")
            }
            precondition(after.errors == 0, "\(after.findings)")
        }
        return isAccepted
    }

    private static func isChanged(_ file: borrowing MemoryFile) -> Bool {
        var options = DiskImageOptions(
            format: .qcow2, readOnly: true, locking: false, allowsBacking: false, metadataCacheSize: 64 << 10)
        var names: [String] = []
        if let engine = try? DiskEngine(DiskImage(path: file.path, options: options), depth: 2, usesRing: false) {
            names = ((try? engine.snapshots()) ?? []).map(\.id)
        }
        for name in names.prefix(3) {
            options.snapshot = name
            guard let image = try? DiskImage(path: file.path, options: options),
                var engine = try? DiskEngine(image, depth: 2, usesRing: false)
            else { continue }
            var memory = [UInt8](repeating: 0, count: Int(min(engine.image.size, 8192)))
            _ = memory.withUnsafeMutableBytes { buffer in try? engine.perform(.read, at: 0, memory: buffer) }
        }
        options.snapshot = nil
        options.readOnly = false
        let isAccepted: Bool
        if let image = try? DiskImage(path: file.path, options: options),
            var engine = try? DiskEngine(image, depth: 2, usesRing: false)
        {
            isAccepted = true
            let size = engine.image.size
            func write(_ offset: UInt64, _ value: UInt8) {
                var memory = [UInt8](repeating: value, count: 1024)
                guard size >= offset + 1024 else { return }
                _ = memory.withUnsafeMutableBytes { buffer in try? engine.perform(.write, at: offset, memory: buffer) }
            }
            _ = try? engine.createSnapshot(named: "fuzz")
            write(0, 1)
            if let first = names.first { _ = try? engine.applySnapshot(first) }
            write(512, 2)
            _ = try? engine.applySnapshot("fuzz")
            for name in names.prefix(2) { _ = try? engine.deleteSnapshot(name) }
            _ = try? engine.resize(to: engine.image.size &+ 32 << 10)
            _ = try? engine.resize(to: engine.image.size / 2 & ~511, shrinks: true)
            _ = try? engine.deleteSnapshot("fuzz")
            write(1024, 3)
        } else {
            isAccepted = false
        }
        // What was repaired in full has no errors, which a second look would find.
        let check = DiskImageOptions(format: .qcow2, locking: false)
        if let report = try? DiskImage.check(path: file.path, options: check, repair: .all) {
            let again = try? DiskImage.check(path: file.path, options: check)
            precondition(
                again?.errors == report.errors,
                "\(report.errors) errors were left by a repair, and then there were \(again?.errors ?? -1)")
        }
        return isAccepted
    }

    // MARK: - Seeds

    private enum Compression { case zlib, zstd }

    /// What stands in the header beside the usual: clusters 1 to 4 are the refcount table, one block of counts, the L1
    /// and an L2 table.
    private static func header(
        clusterBits: Int = 9, incompatible: UInt64 = 0, autoclear: UInt64 = 0, refcountOrder: UInt64 = 4,
        extensions: [UInt8] = [], clusters: Int, compressionType: UInt64? = nil
    ) -> [UInt8] {
        var file = [UInt8](repeating: 0, count: clusters * 512)
        let cluster = UInt64(1) << UInt64(clusterBits), length = compressionType == nil ? 104 : 112
        for (place, value, width) in [
            (0, 0x5146_49fb, 4), (4, 3, 4), (20, UInt64(clusterBits), 4), (24, 40 << 10, 8), (36, 2, 4),
            (40, 3 * cluster, 8), (48, cluster, 8), (56, 1, 4), (72, incompatible, 8),
            (88, autoclear, 8), (96, refcountOrder, 4), (100, UInt64(length), 4), (512, 2 * cluster, 8),
        ] as [(Int, UInt64, Int)] { put(&file, place, value, width, isBig: true) }
        if let compressionType { put(&file, 104, compressionType, 1) }
        file.replaceSubrange(length..<length + extensions.count, with: extensions)
        put(&file, 3 * 512, 1 << 63 | 4 * cluster, 8, isBig: true)
        return file
    }

    private static func count(_ file: inout [UInt8], _ counts: [UInt64]) {
        for (cluster, count) in counts.enumerated() { put(&file, 2 * 512 + cluster * 2, count, 2, isBig: true) }
    }

    /// A header extension, padded.
    private static func headerExtension(_ type: UInt64, _ contents: [UInt8]) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 8)
        put(&bytes, 0, type, 4, isBig: true)
        put(&bytes, 4, UInt64(contents.count), 4, isBig: true)
        return bytes + contents + [UInt8](repeating: 0, count: (8 - contents.count % 8) % 8)
    }

    /// One cluster with data and one of zeroes, and perhaps one that is compressed, of bytes `x`.
    private static func plain(compression: Compression? = nil) -> [UInt8] {
        var file = header(
            incompatible: compression == .zstd ? 8 : 0, clusters: compression == nil ? 6 : 7,
            compressionType: compression == .zstd ? 1 : nil)
        count(&file, [UInt64](repeating: 1, count: file.count / 512))
        put(&file, 4 * 512, 1 << 63 | 5 * 512, 8, isBig: true)
        put(&file, 4 * 512 + 8, 1, 8, isBig: true)
        guard let compression else { return file }
        put(&file, 4 * 512 + 16, 1 << 62 | 6 * 512, 8, isBig: true)
        let bytes: [UInt8]
        switch compression {
        case .zlib: bytes = deflated([UInt8](repeating: 0x78, count: 512), windowBits: -12)
        // A frame of one segment of 512 bytes: one block, of one byte that is repeated.
        case .zstd: bytes = [0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x01, 0x03, 0x10, 0x00, 0x78]
        }
        file.replaceSubrange(6 * 512..<6 * 512 + bytes.count, with: bytes)
        return file
    }

    /// Clusters of 16 KiB: one has subclusters with data, with zeroes, and unallocated ones.
    private static func withSubclusters() -> [UInt8] {
        var file = header(clusterBits: 14, incompatible: 16, clusters: 6)
        count(&file, [UInt64](repeating: 1, count: 6))
        put(&file, 4 * 512, 1 << 63 | 5 << 14, 8, isBig: true)
        put(&file, 4 * 512 + 8, 0xff00 << 32 | 0x0f, 8, isBig: true)
        put(&file, 4 * 512 + 24, 0xffff_ffff << 32, 8, isBig: true)
        return file
    }

    /// A snapshot that shares all with the disk but an L1 table.
    private static func withSnapshot() -> [UInt8] {
        var file = header(clusters: 8)
        count(&file, [1, 1, 1, 1, 2, 2, 1, 1])
        put(&file, 60, 1, 4, isBig: true)
        put(&file, 64, 6 * 512, 8, isBig: true)
        for table in [3, 7] { put(&file, table * 512, 4 * 512, 8, isBig: true) }
        put(&file, 4 * 512, 5 * 512, 8, isBig: true)
        put(&file, 4 * 512 + 8, 1, 8, isBig: true)
        let place = 6 * 512
        for (field, value, width) in [
            (0, 7 * 512, 8), (8, 2, 4), (12, 1, 2), (14, 4, 2), (16, 1 << 30, 4), (36, 16, 4), (48, 40 << 10, 8),
        ] as [(Int, UInt64, Int)] {
            put(&file, place + field, value, width, isBig: true)
        }
        file.replaceSubrange(place + 56..<place + 61, with: "1kept".utf8)
        return file
    }

    /// A bitmap that is consistent, with a cluster of its own, and a snapshot's worth of nothing else.
    private static func withBitmap() -> [UInt8] {
        var contents = [UInt8](repeating: 0, count: 24)
        for (place, value, width) in [(0, 1, 4), (8, 32, 8), (16, 6 * 512, 8)] as [(Int, UInt64, Int)] {
            put(&contents, place, value, width, isBig: true)
        }
        var file = header(autoclear: 1, extensions: headerExtension(0x2385_2875, contents), clusters: 9)
        count(&file, [UInt64](repeating: 1, count: 9))
        put(&file, 4 * 512, 1 << 63 | 5 * 512, 8, isBig: true)
        let place = 6 * 512
        for (field, value, width) in [(0, 7 * 512, 8), (8, 1, 4), (16, 1, 1), (17, 9, 1), (18, 4, 2)]
            as [(Int, UInt64, Int)]
        { put(&file, place + field, value, width, isBig: true) }
        file.replaceSubrange(place + 24..<place + 28, with: "bits".utf8)
        put(&file, 7 * 512, 8 * 512, 8, isBig: true)
        put(&file, 8 * 512, 0xa5, 1)
        return file
    }

    /// Names for two features, and an extension that nobody knows.
    private static func withNames() -> [UInt8] {
        func name(_ kind: UInt8, _ bit: UInt8, _ text: String) -> [UInt8] {
            [kind, bit] + text.utf8 + [UInt8](repeating: 0, count: 46 - text.utf8.count)
        }
        let names = headerExtension(
            0x6803_f857, name(0, 0, "dirty bit") + name(0, 63, "something new") + name(1, 0, "lazy refcounts"))
        var file = header(extensions: names + headerExtension(0x1234_5678, Array("whatever".utf8)), clusters: 6)
        count(&file, [UInt64](repeating: 1, count: 6))
        put(&file, 4 * 512, 1 << 63 | 5 * 512, 8, isBig: true)
        return file
    }

    private enum Cipher { case xts, cbc }

    /// Where the LUKS header begins, and bytes of it with the longer of the keys.
    private static let encryptedStart = 6 * 512, encryptedLength = 1024 + 32 * 4000

    /// Data that was written with a key that the password opens, by one round of hashing.
    private static func encrypted(_ cipher: Cipher) -> [UInt8] {
        var pointer = [UInt8](repeating: 0, count: 16)
        put(&pointer, 0, UInt64(encryptedStart), 8, isBig: true)
        put(&pointer, 8, UInt64(encryptedLength), 8, isBig: true)
        var file = header(refcountOrder: 0, extensions: headerExtension(0x0537_be77, pointer), clusters: 6)
        put(&file, 32, 2, 4, isBig: true)
        // Counts of one bit, for all of the LUKS header, too.
        for cluster in 0..<6 + encryptedLength / 512 { file[2 * 512 + cluster / 8] |= 1 << UInt8(cluster % 8) }
        put(&file, 4 * 512, 1 << 63 | 5 * 512, 8, isBig: true)
        put(&file, 4 * 512 + 8, 1, 8, isBig: true)
        var luks = [UInt8](repeating: 0, count: 592)
        luks.replaceSubrange(0..<8, with: Array("LUKS".utf8) + [0xba, 0xbe, 0, 1])
        luks.replaceSubrange(8..<11, with: "aes".utf8)
        let mode = cipher == .xts ? "xts-plain64" : "cbc-essiv:sha256", hash = cipher == .xts ? "sha256" : "sha1"
        luks.replaceSubrange(40..<40 + mode.utf8.count, with: mode.utf8)
        luks.replaceSubrange(72..<72 + hash.utf8.count, with: hash.utf8)
        // Salts are zeroes. What the digest of the key that comes out is, was found by taking it out.
        let digest: [UInt8] =
            cipher == .xts
            ? [
                0x86, 0x03, 0xe3, 0x16, 0x07, 0xce, 0xa4, 0x29, 0x42, 0x26, 0xf9, 0x42, 0xba, 0xd9, 0x1d, 0x55, 0x16,
                0x02, 0x91, 0xe2,
            ]
            : [
                0x83, 0xb4, 0x34, 0xf5, 0x6c, 0x75, 0x98, 0x46, 0x24, 0xe4, 0x59, 0x92, 0xad, 0x2b, 0x0c, 0xb3, 0xe7,
                0xf1, 0xe0, 0x9f,
            ]
        luks.replaceSubrange(112..<132, with: digest)
        put(&luks, 104, UInt64(encryptedLength / 512), 4, isBig: true)
        put(&luks, 108, cipher == .xts ? 32 : 16, 4, isBig: true)
        put(&luks, 164, 1, 4, isBig: true)
        luks.replaceSubrange(168..<204, with: "01234567-89ab-cdef-0123-456789abcdef".utf8)
        for slot in 0..<8 {
            let place = 208 + 48 * slot
            put(&luks, place, slot == 0 ? 0x00ac_71f3 : 0x0000_dead, 4, isBig: true)
            put(&luks, place + 4, slot == 0 ? 1 : 0, 4, isBig: true)
            put(&luks, place + 40, 2, 4, isBig: true)
            put(&luks, place + 44, 4000, 4, isBig: true)
        }
        return file + luks
    }
}

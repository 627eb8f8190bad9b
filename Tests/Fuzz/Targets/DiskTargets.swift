// SPDX-License-Identifier: Apache-2.0

import CLinux
import DiskImage
import Glibc
import Linux

/// A file without a name, which others open by its descriptor.
struct MemoryFile: ~Copyable {
    private let descriptor: FileDescriptor
    var path: String { "/proc/self/fd/\(descriptor.rawValue)" }

    /// - Parameter pieces: what is in it; all else are zeroes.
    init(_ pieces: [(place: Int, bytes: [UInt8])]) {
        let number = clinux_memfd_create("fuzz", UInt32(MFD_CLOEXEC))
        guard number >= 0 else { fatalError("memfd_create") }
        descriptor = FileDescriptor(owning: number)
        for (place, bytes) in pieces where !bytes.isEmpty {
            guard bytes.withUnsafeBytes({ pwrite(number, $0.baseAddress, $0.count, place) }) == bytes.count else {
                fatalError("pwrite")
            }
        }
    }
}

extension FuzzTarget {
    /// Images of each format, read and, where that is possible, written: what a header, a table or an entry says may be
    /// anything.
    ///
    /// An input that ends with a sector is the beginning of a file, whose rest is zeroes: data that says nothing.
    /// Another is all of it.
    static let disks =
        qcow2 + [
            FuzzTarget(name: "vdi", seeds: [vdi()]) { bytes in uses(MemoryFile(extended(bytes, to: 1024 + 8192)), .vdi)
            },
            FuzzTarget(name: "vmdk", seeds: [sparseVMDK(), descriptor()]) { bytes in
                uses(MemoryFile(extended(bytes, to: 16384)), .vmdk)
            },
            // Checksums are corrected here, since random inputs rarely have valid ones. The footer comes last.
            FuzzTarget(name: "vhd", seeds: [vhd()]) { bytes in
                var bytes = bytes
                sum(&bytes, at: 0, count: 512, checksum: 64)
                sum(&bytes, at: 512, count: 1024, checksum: 36)
                sum(&bytes, at: bytes.count - 512, count: 512, checksum: 64)
                guard bytes.count % 512 == 0, bytes.count >= 512 else { return uses(MemoryFile([(0, bytes)]), .vhd) }
                return uses(
                    MemoryFile(
                        [(0, bytes.dropLast(512)), (max(bytes.count - 512, 2048 + 512 + 4096), bytes.suffix(512))].map {
                            ($0, Array($1))
                        }), .vhd)
            },
            FuzzTarget(name: "vhdx", seeds: [vhdx(), vhdx(hasLog: true)]) { bytes in
                uses(MemoryFile(vhdxFile(bytes)), .vhdx)
            },
        ]

    private static func extended(_ bytes: [UInt8], to size: Int) -> [(place: Int, bytes: [UInt8])] {
        [(0, bytes)] + (bytes.count % 512 == 0 && bytes.count < size ? [(size - 1, [0])] : [])
    }

    /// Opens a file as an image and uses its disk's start, middle and end.
    /// - Parameter configure: changes how it is opened.
    static func uses(
        _ file: borrowing MemoryFile, _ format: ImageFormat, configure: (inout DiskImageOptions) -> Void = { _ in }
    ) -> Bool {
        var isAccepted = false
        for isReadOnly in [true, false] {
            var options = DiskImageOptions(
                format: format, readOnly: isReadOnly, locking: false, allowsBacking: false, metadataCacheSize: 64 << 10)
            options.cache = .writeback
            configure(&options)
            guard let image = try? DiskImage(path: file.path, options: options),
                var engine = try? DiskEngine(image, depth: 4, segments: 4, usesRing: false)
            else { continue }
            isAccepted = true
            let size = engine.image.size
            precondition(size % 512 == 0 && size <= DiskImage.maximumSize, "a disk of \(size) bytes")
            var memory = [UInt8](repeating: 0x5a, count: Int(min(size, 32 << 10)))
            let count = memory.count
            for offset in [0, size / 2 & ~511, size - UInt64(count)] where count > 0 && offset <= size - UInt64(count) {
                memory.withUnsafeMutableBytes { buffer in
                    _ = try? engine.perform(.read, at: offset, memory: buffer)
                    guard !isReadOnly else { return }
                    let piece = UnsafeMutableRawBufferPointer(rebasing: buffer[..<min(count, 1536)])
                    piece.initializeMemory(as: UInt8.self, repeating: 0x77)
                    guard (try? engine.perform(.write, at: offset, memory: piece)) != nil else { return }
                    // What was written is there, unless the image has the same place twice.
                    _ = try? engine.perform(.read, at: offset, memory: piece)
                    _ = try? engine.perform(.discard, at: offset, length: UInt64(count))
                }
                if !isReadOnly { _ = try? engine.perform(.flush) }
            }
            // The sentence is made, too.
            if let damage = engine.image.damage { precondition("\(damage)".hasPrefix("disk ")) }
        }
        return isAccepted
    }

    // MARK: - Seeds

    /// Blocks of 4 KiB, the second and the first of eight allocated.
    private static func vdi() -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 1024)
        for (place, value) in [
            (0x40, 0xbeda_107f), (0x44, 0x1_0001), (0x48, 0x190), (0x4c, 1), (0x154, 512), (0x158, 1024), (0x168, 512),
            (0x170, 32 << 10), (0x178, 4096),
            (0x180, 8), (0x184, 2),
        ] as [(Int, UInt64)] { put(&file, place, value, 4) }
        for (block, entry) in [1, 0, 0xffff_ffff, 0xffff_fffe, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff, 0xffff_ffff]
            .enumerated() as EnumeratedSequence<[UInt64]>
        {
            put(&file, 512 + 4 * block, entry, 4)
        }
        return file
    }

    /// Grains of 4 KiB, two of sixteen allocated.
    private static func sparseVMDK() -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 9 * 512)
        put(&file, 0, 0x564d_444b, 4)
        for (place, value) in [
            (4, 1), (8, 3), (12, 128), (20, 8), (28, 1), (36, 1), (44, 512), (48, 2), (56, 3), (64, 16),
        ] as [(Int, UInt64)] {
            put(&file, place, value, place == 4 || place == 8 || place == 44 ? 4 : 8)
        }
        let text = Array(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 128 SPARSE \"a\"\n"
                .utf8)
        file.replaceSubrange(512..<512 + text.count, with: text)
        put(&file, 2 * 512, 4, 4)
        put(&file, 3 * 512, 8, 4)
        for table in [4, 8] {
            put(&file, table * 512, 16, 4)
            put(&file, table * 512 + 8, 24, 4)
        }
        return file
    }

    private static func descriptor() -> [UInt8] {
        Array(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\nRDONLY 128 ZERO\nRW 64 ZERO\n"
                .utf8)
    }

    /// Blocks of 4 KiB, one of eight allocated.
    private static func vhd() -> [UInt8] {
        var file = [UInt8](repeating: 0, count: 2048 + 512)
        for footer in [0, file.count - 512] {
            file.replaceSubrange(footer..<footer + 8, with: "conectix".utf8)
            for (place, value, width) in [
                (12, 0x1_0000, 4), (16, 512, 8), (28, 0x77696e20, 4), (40, 32 << 10, 8), (48, 32 << 10, 8), (60, 3, 4),
            ] as [(Int, UInt64, Int)] {
                put(&file, footer + place, value, width, isBig: true)
            }
        }
        file.replaceSubrange(512..<520, with: "cxsparse".utf8)
        for (place, value, width) in [(8, .max, 8), (16, 1536, 8), (24, 0x1_0000, 4), (28, 8, 4), (32, 4096, 4)]
            as [(Int, UInt64, Int)]
        {
            put(&file, 512 + place, value, width, isBig: true)
        }
        for block in 0..<8 { put(&file, 1536 + 4 * block, block == 2 ? 4 : 0xffff_ffff, 4, isBig: true) }
        return file
    }

    /// The parts of a VHDX that say something, one after the other: the header, the table of regions, that of metadata,
    /// metadata, entries of blocks, and the log's only entry, a header and a sector of data.
    private static let vhdxParts = [
        (place: 64 << 10, size: 96), (192 << 10, 96), (1 << 20, 224), (1 << 20 | 64 << 10, 64), (2 << 20, 64),
        (3 << 20, 96), (3 << 20 | 4096, 4096),
    ]

    private static func vhdx(hasLog: Bool = false) -> [UInt8] {
        var header = [UInt8](repeating: 0, count: 96), regions = header, table = [UInt8](repeating: 0, count: 224),
            items = [UInt8](repeating: 0, count: 64), blocks = items
        header.replaceSubrange(0..<4, with: "head".utf8)
        put(&header, 8, 1, 8)
        put(&header, 66, 1, 2)
        regions.replaceSubrange(0..<4, with: "regi".utf8)
        put(&regions, 8, 2, 4)
        func entry(_ bytes: inout [UInt8], _ place: Int, _ first: UInt64, _ second: UInt64, _ values: [(UInt64, Int)]) {
            put(&bytes, place, first, 8, isBig: true)
            put(&bytes, place + 8, second, 8, isBig: true)
            var place = place + 16
            for (value, width) in values {
                put(&bytes, place, value, width)
                place += width
            }
        }
        entry(&regions, 16, 0x6677_c22d_23f6_0042, 0x9d64_115e_9bfd_4a08, [(2 << 20, 8), (1 << 20, 4), (1, 4)])
        entry(&regions, 48, 0x06a2_7c8b_9047_9a4b, 0xb8fe_575f_050f_886e, [(1 << 20, 8), (1 << 20, 4), (1, 4)])
        table.replaceSubrange(0..<8, with: "metadata".utf8)
        put(&table, 10, 3, 2)
        entry(&table, 32, 0x3767_a1ca_36fa_434d, 0xb3b6_33f0_aa44_e76b, [(64 << 10, 4), (8, 4), (4, 4)])
        entry(&table, 64, 0x2442_a52f_1bcd_7648, 0xb211_5dbe_d83b_f4b8, [(64 << 10 | 8, 4), (8, 4), (6, 4)])
        entry(&table, 96, 0x1dbf_4181_6fa9_0947, 0xba47_f233_a8fa_ab5f, [(64 << 10 | 16, 4), (4, 4), (6, 4)])
        put(&items, 0, 1 << 20, 4)
        put(&items, 8, 4 << 20, 8)
        put(&items, 16, 512, 4)
        put(&blocks, 8, 2 << 20 | 6, 8)
        put(&blocks, 16, 2, 8)
        var log = [UInt8](repeating: 0, count: 96), data = [UInt8](repeating: 0, count: 4096)
        put(&header, 68, 1 << 20, 4)
        put(&header, 72, 3 << 20, 8)
        if hasLog {
            // The table's first sector waits in the log, with the same bytes.
            put(&header, 48, 1, 8)
            log.replaceSubrange(0..<4, with: "loge".utf8)
            for (place, value, width) in [
                (8, 8192, 4), (16, 5, 8), (24, 1, 4), (32, 1, 8), (48, 4 << 20, 8), (56, 4 << 20, 8), (80, 2 << 20, 8),
                (88, 5, 8),
            ] as [(Int, UInt64, Int)] {
                put(&log, place, value, width)
            }
            log.replaceSubrange(64..<68, with: "desc".utf8)
            data.replaceSubrange(8..<64, with: blocks[8..<64])
            data.replaceSubrange(0..<4, with: "data".utf8)
            put(&data, 4, 0, 4)
            put(&data, 4092, 5, 4)
        }
        return header + regions + table + items + blocks + log + data
    }

    /// The pieces of the file that an input is; all else are zeroes, up to its end at 4 MiB.
    private static func vhdxFile(_ input: [UInt8]) -> [(place: Int, bytes: [UInt8])] {
        var rest = input[...]
        var pieces: [(place: Int, bytes: [UInt8])] = [(0, Array("vhdxfile".utf8)), (4 << 20 - 1, [0])]
        for (place, size) in vhdxParts {
            var bytes = Array(rest.prefix(size))
            rest = rest.dropFirst(size)
            if let structure = [64 << 10: 4096, 192 << 10: 64 << 10][place] {
                bytes += [UInt8](repeating: 0, count: structure - bytes.count)
                put(&bytes, 4, UInt64(CRC32C.checksum(bytes, zeroes: 4..<8)), 4)
            }
            pieces.append((place, bytes))
        }
        // The log's entry is summed as a whole.
        let data = pieces.removeLast(), log = pieces.removeLast()
        var entry =
            log.bytes + [UInt8](repeating: 0, count: 4096 - log.bytes.count) + data.bytes
            + [UInt8](repeating: 0, count: 4096 - data.bytes.count)
        if entry.starts(with: "loge".utf8) { put(&entry, 4, UInt64(CRC32C.checksum(entry, zeroes: 4..<8)), 4) }
        return pieces + [(log.place, entry)]
    }

    // MARK: - Bytes

    /// The complement of the sum of a structure's other bytes, if there is room for it.
    private static func sum(_ bytes: inout [UInt8], at place: Int, count: Int, checksum: Int) {
        guard place >= 0, bytes.count >= place + count else { return }
        put(&bytes, place + checksum, 0, 4)
        put(
            &bytes, place + checksum, UInt64(~bytes[place..<place + count].reduce(UInt32(0)) { $0 &+ UInt32($1) }), 4,
            isBig: true)
    }
}

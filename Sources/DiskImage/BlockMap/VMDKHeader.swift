// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The header of a sparse extent of VMDK, which is a file of its own or the whole image.
struct VMDKHeader {
    static let magic: [UInt8] = Array("KDMV".utf8)
    static let size = 512
    /// The offset of the header's flag for a file that was not closed.
    static let uncleanPlace: UInt64 = 72
    static let directoryAtEnd = UInt64.max

    enum Flags {
        static let newlines: UInt32 = 1
        static let redundantTable: UInt32 = 1 << 1
        static let zeroGrains: UInt32 = 1 << 2
        static let compressed: UInt32 = 1 << 16
        static let markers: UInt32 = 1 << 17
    }

    let layout: BlockMapLayout
    let isCompressed: Bool
    /// Where the descriptor is, if it is in this file.
    let descriptor: Range<UInt64>?
    let directory: GrainDirectory
    let version: UInt32
    /// The end of what comes before the first grain.
    let overhead: UInt64

    /// Reads and checks the header of a file, its footer if it has one, and its grain directory.
    init(_ file: borrowing ImageFile) throws(DiskImageError) {
        let path = file.path
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .invalid(path: path, reason: reason()) }
        }
        guard file.size >= UInt64(Self.size) else {
            throw .truncated(path: path, what: "the header", needed: UInt64(Self.size), size: file.size)
        }
        var header = try file.read("the header", count: Self.size, at: 0)
        guard Array(header.prefix(4)) == Self.magic else {
            throw .notOfFormat(path: path, format: "sparse VMDK", reason: "it has the wrong signature")
        }
        if header.littleEndian64(at: 56) == Self.directoryAtEnd { header = try Self.footer(file) }
        version = header.littleEndian32(at: 4)
        guard (1...3).contains(version) else { throw .unsupported(path: path, feature: "VMDK version \(version)") }
        let flags = header.littleEndian32(at: 8)
        let algorithm = header.littleEndian16(at: 77)
        // QEMU uses the algorithm, VMware the flag.
        isCompressed = flags & Flags.compressed != 0 || algorithm == 1
        if isCompressed {
            guard algorithm == 1 else { throw .unsupported(path: path, feature: "VMDK compression \(algorithm)") }
            guard flags & Flags.markers != 0 else {
                throw .unsupported(path: path, feature: "compressed grains without markers")
            }
        }
        let grain = header.littleEndian64(at: 20)
        try require(grain.nonzeroBitCount == 1 && grain >= 2, "grains of \(grain) sectors")
        guard grain <= 4096 else { throw .unsupported(path: path, feature: "grains of \(grain) sectors") }
        let perTable = header.littleEndian32(at: 44)
        guard perTable == UInt32(GrainDirectory.entriesPerTable) else {
            throw .unsupported(path: path, feature: "grain tables of \(perTable) entries")
        }
        let capacity = header.littleEndian64(at: 12)
        try require(capacity <= DiskImage.maximumSize >> 9, "a disk of \(capacity) sectors")
        layout = BlockMapLayout(
            size: capacity * 512, blockBits: UInt64(grain.trailingZeroBitCount) + 9,
            entries: .vmdk(hasZeroGrains: flags & Flags.zeroGrains != 0, isCompressed: isCompressed), table: .directory)

        let tables =
            (layout.blockCount + UInt64(GrainDirectory.entriesPerTable) - 1) / UInt64(GrainDirectory.entriesPerTable)
        guard tables <= UInt64(GrainDirectory.maximumTables) else {
            throw .unsupported(path: path, feature: "a grain directory of \(tables) entries")
        }
        func table(_ what: String, at sector: UInt64) throws(DiskImageError) -> UInt64 {
            let (end, overflow) = (sector &* 512).addingReportingOverflow(tables * 4)
            guard sector <= UInt64.max >> 9, !overflow, end <= file.size else {
                throw .truncated(
                    path: path, what: what, needed: overflow || sector > UInt64.max >> 9 ? .max : end, size: file.size)
            }
            return sector * 512
        }
        // Streams say that they have a second directory and have none, or what was one before they were compressed.
        let second = flags & Flags.redundantTable != 0 && !isCompressed ? header.littleEndian64(at: 48) : 0
        let place = try table("the grain directory", at: header.littleEndian64(at: 56))
        let copy = try second == 0 ? nil : table("the second grain directory", at: second)
        directory = try GrainDirectory(file, count: Int(tables), at: place, copy: copy)

        let descriptorSector = header.littleEndian64(at: 28), descriptorSectors = header.littleEndian64(at: 36)
        if descriptorSector == 0 || descriptorSectors == 0 {
            descriptor = nil
        } else {
            try require(
                descriptorSectors <= UInt64(VMDKDescriptor.maximumSize) >> 9 && descriptorSector <= file.size >> 9,
                "a descriptor of \(descriptorSectors) sectors")
            descriptor = descriptorSector * 512..<min((descriptorSector + descriptorSectors) * 512, file.size)
        }
        let overhead = header.littleEndian64(at: 64)
        self.overhead = overhead <= file.size >> 9 ? overhead * 512 : file.size
    }

    /// The header at the end of a file that was written from start to end: behind a marker of 512 bytes, with another
    /// behind it.
    private static func footer(_ file: borrowing ImageFile) throws(DiskImageError) -> [UInt8] {
        guard file.size >= 4 * 512 else {
            throw .truncated(path: file.path, what: "the footer", needed: 4 * 512, size: file.size)
        }
        let bytes = try file.read("the footer", count: 3 * 512, at: (file.size - 3 * 512) & ~511)
        let isFooter = bytes.littleEndian32(at: 8) == 0 && bytes.littleEndian32(at: 12) == VMDKMarker.footer
        let isEnd = bytes[1024..<1040].allSatisfy { $0 == 0 }
        guard isFooter, isEnd, bytes[512..<516].elementsEqual(magic),
            bytes.littleEndian64(at: 512 + 56) != directoryAtEnd
        else {
            throw .invalid(path: file.path, reason: "no footer at its end; it may be truncated")
        }
        return Array(bytes[512..<1024])
    }

    /// What new grains need; refuses files that cannot be written.
    func allocator(_ file: borrowing ImageFile) throws(DiskImageError) -> BlockAllocator {
        guard !isCompressed else {
            throw .notWritable(
                path: file.path, reason: "its grains are compressed; convert it with swkvm image convert")
        }
        guard version < 3 else { throw .notWritable(path: file.path, reason: "VMDK version 3 is supported read-only") }
        guard layout.blockSize >= 2 * UInt64(GrainDirectory.tableSize) else {
            throw .notWritable(path: file.path, reason: "it has grains of \(layout.blockSize) bytes")
        }
        var ranges: [Range<UInt64>] = [0..<UInt64(Self.size)]
        if let descriptor { ranges.append(descriptor) }
        ranges += directory.ranges
        let metadata = ByteRanges(ranges)
        guard !metadata.overlap else { throw .invalid(path: file.path, reason: "two of its tables overlap") }
        // Sectors have 32 bits.
        let next = (max(file.size, overhead) + layout.blockSize - 1) >> layout.blockBits
        return BlockAllocator(
            base: 0, next: next, limit: (1 << 41) >> layout.blockBits, pristine: next, uncleanPlace: Self.uncleanPlace,
            metadata: metadata)
    }

    // MARK: - New images

    /// The header of a new sparse file.
    static func new(_ parts: VMDKLayout, hasDescriptor: Bool) -> [UInt8] {
        new(
            version: 1, flags: Flags.newlines | Flags.redundantTable, size: parts.size,
            descriptorSectors: hasDescriptor ? VMDKLayout.descriptorSectors : 0,
            copy: parts.copyDirectory / 512, directory: parts.directory / 512, overhead: parts.overhead / 512,
            compression: 0)
    }

    /// The header of a new compressed file, or its footer.
    /// - Parameter directory: a sector, in the footer; ``directoryAtEnd`` in the header.
    static func new(stream size: UInt64, directory: UInt64, overhead: UInt64) -> [UInt8] {
        new(
            version: 3, flags: Flags.newlines | Flags.compressed | Flags.markers, size: size,
            descriptorSectors: VMDKLayout.descriptorSectors, copy: 0,
            directory: directory, overhead: overhead / 512, compression: 1)
    }

    private static func new(
        version: UInt32, flags: UInt32, size: UInt64, descriptorSectors: UInt64, copy: UInt64, directory: UInt64,
        overhead: UInt64, compression: UInt16
    ) -> [UInt8] {
        var header = magic + littleEndian(version) + littleEndian(flags)
        header += littleEndian(size / 512) + littleEndian(BlockMapBuilder.grainSize / 512)
        header += littleEndian(UInt64(descriptorSectors == 0 ? 0 : 1)) + littleEndian(descriptorSectors)
        header += littleEndian(UInt32(GrainDirectory.entriesPerTable))
        header += littleEndian(copy) + littleEndian(directory) + littleEndian(overhead)
        // Closed; then characters that reveal a conversion of line ends.
        header += [0, 0x0a, 0x20, 0x0d, 0x0a] + littleEndian(compression)
        return header + [UInt8](repeating: 0, count: Self.size - header.count)
    }
}

/// What stands between the parts of a file that is written from start to end.
enum VMDKMarker {
    static let endOfStream: UInt32 = 0
    static let table: UInt32 = 1
    static let directory: UInt32 = 2
    static let footer: UInt32 = 3
}

/// The places of grain tables, and of the second copy of each where a file has two.
struct GrainDirectory {
    static let entriesPerTable = 512
    static let tableSize = 2048
    /// 62 TiB, the most of VMDK, in grains of 64 KiB.
    static let maximumTables = 2 << 20

    /// Sectors; 0 where there is no table.
    private var tables: [UInt32] = []
    private var copies: [UInt32] = []
    private var place: UInt64 = 0
    private var copyPlace: UInt64 = 0
    /// Entries that the file does not have.
    private var dirty: Range<Int>?

    /// None: a format without one.
    init() {}

    /// - Parameter count: at most ``maximumTables``; the entries are in the file.
    init(_ file: borrowing ImageFile, count: Int, at place: UInt64, copy: UInt64?) throws(DiskImageError) {
        self.place = place
        tables = try Self.read(file, count, place)
        guard let copy else { return }
        copyPlace = copy
        copies = try Self.read(file, count, copy)
    }

    private static func read(
        _ file: borrowing ImageFile, _ count: Int, _ place: UInt64
    ) throws(DiskImageError) -> [UInt32] {
        var entries: [UInt32] = []
        entries.reserveCapacity(count)
        while entries.count < count {
            let piece = min(count - entries.count, 16384)
            let bytes = try file.read("the grain directory", count: piece * 4, at: place + UInt64(entries.count * 4))
            for entry in 0..<piece { entries.append(bytes.littleEndian32(at: entry * 4)) }
        }
        return entries
    }

    /// The byte where a table begins; 0 for none.
    func place(ofTable table: Int) -> UInt64 { UInt64(tables[table]) * 512 }

    /// The entry with its offset.
    func entry(ofTable table: Int) -> TableEntry {
        TableEntry(table: .grainDirectory, start: place, offset: place + UInt64(table * 4))
    }

    /// The same for its second copy.
    func place(ofCopy table: Int) -> UInt64 { table < copies.count ? UInt64(copies[table]) * 512 : 0 }

    /// The directories and all tables.
    var ranges: [Range<UInt64>] {
        var ranges = [place..<place + UInt64(tables.count * 4)]
        if !copies.isEmpty { ranges.append(copyPlace..<copyPlace + UInt64(copies.count * 4)) }
        for sector in tables where sector != 0 {
            ranges.append(UInt64(sector) * 512..<UInt64(sector) * 512 + UInt64(Self.tableSize))
        }
        for sector in copies where sector != 0 {
            ranges.append(UInt64(sector) * 512..<UInt64(sector) * 512 + UInt64(Self.tableSize))
        }
        return ranges
    }

    /// A new table at a sector, and its copy right behind it.
    mutating func set(_ table: Int, sector: UInt32) {
        tables[table] = sector
        if table < copies.count { copies[table] = sector + UInt32(Self.tableSize / 512) }
        dirty = min(dirty?.lowerBound ?? table, table)..<max(dirty?.upperBound ?? 0, table + 1)
    }

    var isDirty: Bool { dirty != nil }

    mutating func write(_ file: MetadataFile) throws(MetadataError) {
        guard let dirty else { return }
        try file.write(tables[dirty].flatMap { littleEndian($0) }, at: place + UInt64(dirty.lowerBound * 4))
        if !copies.isEmpty {
            try file.write(copies[dirty].flatMap { littleEndian($0) }, at: copyPlace + UInt64(dirty.lowerBound * 4))
        }
        self.dirty = nil
    }
}

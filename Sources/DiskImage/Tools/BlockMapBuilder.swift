// SPDX-License-Identifier: Apache-2.0

/// Writes a new VDI, or a new sparse file of VMDK: clusters follow each other in the order of the disk behind one
/// table, whose place is known from the start, or two copies of it.
struct BlockMapBuilder: ImageBuilder {
    /// Bytes of a VMDK's grain, as in all common programs.
    static let grainSize: UInt64 = 64 << 10
    /// Entries of a VDI's table, at most: as many as ``VDIHeader/allocator(_:)`` looks through.
    static let maximumBlocks: UInt64 = 1 << 26

    private enum Kind {
        /// A VDI image; in a static one every block is allocated.
        case vdi(isStatic: Bool)
        case vmdk(VMDKLayout, descriptor: [UInt8])
    }

    let layout: BlockMapLayout
    /// The byte of the file where clusters begin.
    let dataStart: UInt64
    private let kind: Kind
    /// Where the copies of the table are.
    private let tables: [UInt64]
    /// Bytes of the table.
    private let tableSize: UInt64
    /// The clusters of the file that have been given out.
    private var count: UInt64 = 0
    /// The piece of the table being filled, and which one it is; those before it have been written.
    private var slice: [UInt8]
    private var sliceIndex: UInt64 = 0

    private static let sliceSize = 4096

    /// A VDI of blocks of 1 MiB, which is what QEMU reads. The blocks begin at a MiB, so that each lies on whole pages.
    init(vdi size: UInt64, isStatic: Bool) {
        let blocks = (size + (1 << 20 - 1)) >> 20
        let start = (UInt64(VDIHeader.size) + blocks * 4 + (1 << 20 - 1)) & ~(1 << 20 - 1)
        layout = BlockMapLayout(
            size: size, blockBits: 20, entries: .vdi(data: start), table: .array(offset: UInt64(VDIHeader.size)))
        dataStart = start
        kind = .vdi(isStatic: isStatic)
        tables = [UInt64(VDIHeader.size)]
        tableSize = blocks * 4
        slice = [UInt8](repeating: 0xff, count: Self.sliceSize)
    }

    /// A sparse file of VMDK.
    /// - Parameter descriptor: empty in a file of several.
    init(vmdk size: UInt64, descriptor: [UInt8]) {
        let parts = VMDKLayout(size: size)
        layout = BlockMapLayout(
            size: size, blockBits: UInt64(Self.grainSize.trailingZeroBitCount),
            entries: .vmdk(hasZeroGrains: false, isCompressed: false), table: .directory)
        dataStart = parts.overhead
        kind = .vmdk(parts, descriptor: descriptor)
        // Tables have no gaps between them, so that all of them are one.
        tables = [parts.copies, parts.tables]
        tableSize = parts.tableCount * UInt64(GrainDirectory.tableSize)
        slice = [UInt8](repeating: 0, count: Self.sliceSize)
    }

    mutating func allocate(_ count: UInt64) -> UInt64 {
        defer { self.count += count }
        return dataStart + self.count << layout.blockBits
    }

    mutating func map(
        _ cluster: UInt64, count: UInt64, to place: UInt64, subclusters: UInt32, _ file: borrowing NewFile
    ) throws(DiskImageError) {
        // The last byte of VMDK that a sector's number of 32 bits reaches.
        if case .vmdk = kind, place + count << layout.blockBits > 512 * UInt64(UInt32.max) {
            throw .impossible(
                path: file.path,
                reason:
                    "its file would be longer than 2 TiB; monolithicFlat and twoGbMaxExtentSparse images can hold more")
        }
        for index in 0..<count {
            let place = place + index << layout.blockBits
            try openTable(of: cluster + index, file)
            let entry = if case .vdi = kind { (place - dataStart) >> layout.blockBits } else { place >> 9 }
            let offset = Int((cluster + index) * 4 % UInt64(Self.sliceSize))
            slice.replaceSubrange(offset..<offset + 4, with: littleEndian(UInt32(truncatingIfNeeded: entry)))
        }
    }

    mutating func mapCompressed(
        _ cluster: UInt64, length: Int, _ file: borrowing NewFile
    ) throws(DiskImageError) -> UInt64? { nil }

    mutating func openTable(of cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {
        try writeSlices(upTo: cluster * 4 / UInt64(Self.sliceSize), file)
    }

    /// Writes the piece being filled and empty ones behind it; `end` becomes the one that is filled.
    private mutating func writeSlices(upTo end: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {
        while sliceIndex < end {
            let place = sliceIndex * UInt64(Self.sliceSize)
            let isEmpty = slice.allSatisfy { $0 == 0 }
            for table in tables where !isEmpty {
                try file.write(
                    Array(slice.prefix(Int(min(UInt64(Self.sliceSize), tableSize - place)))), at: table + place)
            }
            sliceIndex += 1
            if case .vdi = kind {
                slice = [UInt8](repeating: 0xff, count: Self.sliceSize)
            } else {
                // The file reads as zeroes already, which is what an empty one of VMDK has.
                slice = [UInt8](repeating: 0, count: Self.sliceSize)
                sliceIndex = end
            }
        }
    }

    mutating func writeMetadata(_ file: borrowing NewFile) throws(DiskImageError) -> UInt64 {
        if case .vdi(isStatic: true) = kind {
            let place = allocate(layout.blockCount)
            try map(0, count: layout.blockCount, to: place, subclusters: .max, file)
        }
        try writeSlices(upTo: (tableSize + UInt64(Self.sliceSize) - 1) / UInt64(Self.sliceSize), file)
        let end = dataStart + count << layout.blockBits
        try file.setSize(end)
        switch kind {
        case .vdi(let isStatic):
            try file.write(VDIHeader.new(layout, dataOffset: dataStart, allocated: count, isStatic: isStatic), at: 0)
        case .vmdk(let parts, let descriptor):
            try file.write(parts.directory(ofTablesAt: parts.copies), at: parts.copyDirectory)
            try file.write(parts.directory(ofTablesAt: parts.tables), at: parts.directory)
            if !descriptor.isEmpty { try file.write(descriptor, at: UInt64(VMDKHeader.size)) }
            try file.write(VMDKHeader.new(parts, hasDescriptor: !descriptor.isEmpty), at: 0)
        }
        return end
    }
}

/// Where the parts of a new sparse VMDK file lie: header and descriptor, then two directories, each with its tables
/// behind it, then grains.
struct VMDKLayout {
    /// Bytes of the disk, or the extent.
    let size: UInt64
    let tableCount: UInt64
    /// Bytes of the file.
    let copyDirectory: UInt64
    let copies: UInt64
    let directory: UInt64
    let tables: UInt64
    /// Where grains begin.
    let overhead: UInt64

    /// Sectors that the descriptor may take.
    static let descriptorSectors: UInt64 = 20

    init(size: UInt64) {
        self.size = size
        let covered = UInt64(GrainDirectory.entriesPerTable) * BlockMapBuilder.grainSize
        tableCount = (size + covered - 1) / covered
        let directorySize = (tableCount * 4 + 511) & ~511, tableSize = tableCount * UInt64(GrainDirectory.tableSize)
        copyDirectory = UInt64(VMDKHeader.size) + Self.descriptorSectors * 512
        copies = copyDirectory + directorySize
        directory = copies + tableSize
        tables = directory + directorySize
        overhead = (tables + tableSize + BlockMapBuilder.grainSize - 1) & ~(BlockMapBuilder.grainSize - 1)
    }

    func directory(ofTablesAt start: UInt64) -> [UInt8] {
        (0..<tableCount).flatMap { table in
            littleEndian(UInt32(truncatingIfNeeded: (start + table * UInt64(GrainDirectory.tableSize)) >> 9))
        }
    }
}

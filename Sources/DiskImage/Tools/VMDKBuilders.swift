// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// What comes before the bytes of a compressed grain of VMDK: the sector of the disk that it begins with, and how many
/// bytes there are.
enum VMDKGrain {
    static let headerSize = 12
    /// More than zlib makes of a grain that cannot be compressed, with header and padding.
    static let room = Int(BlockMapBuilder.grainSize) + 1024
}

extension Compressor {
    /// Compresses a grain and puts its header before it and zeroes behind it, up to a whole sector.
    /// - Parameter output: ``VMDKGrain/room`` bytes.
    /// - Returns: bytes of it all; nil when zlib fails.
    func storeGrain(_ grain: IOMemory, sector: UInt64, into output: IOMemory) -> Int? {
        let headerSize = VMDKGrain.headerSize
        // Behind the header there is room for whatever zlib makes of a grain, and for a sector's padding.
        guard let size = compress(grain, into: output.piece(headerSize, VMDKGrain.room - 512 - headerSize)) else {
            return nil
        }
        output.store(littleEndian: sector, 0)
        output.store(littleEndian: UInt32(truncatingIfNeeded: size), 8)
        let end = headerSize + size, whole = (end + 511) & ~511
        output.piece(end, whole - end).clear()
        return whole
    }
}

/// Writes a new compressed VMDK (streamOptimized), as it can be read from start to end: each table behind its grains,
/// then the directory, a footer with its offset, and the end; markers of a sector describe what follows.
struct VMDKStreamBuilder: ImageBuilder {
    private let size: UInt64
    private let descriptor: [UInt8]
    /// The next byte of the file, which begins a sector.
    private var end: UInt64 = Self.overhead
    /// The first sectors of the tables.
    private var directory: [UInt32]
    /// The table being filled, and which one it is.
    private var table = [UInt8](repeating: 0, count: GrainDirectory.tableSize)
    private var tableIndex: Int?

    /// What comes before the first grain: a grain's size, as others have it.
    private static let overhead = BlockMapBuilder.grainSize

    init(size: UInt64, descriptor: [UInt8]) {
        self.size = size
        self.descriptor = descriptor
        directory = [UInt32](repeating: 0, count: Int(VMDKLayout(size: size).tableCount))
    }

    mutating func allocate(_ count: UInt64) -> UInt64 { end }

    mutating func map(
        _ cluster: UInt64, count: UInt64, to place: UInt64, subclusters: UInt32, _ file: borrowing NewFile
    ) throws(DiskImageError) {
        throw .impossible(
            path: file.path, reason: "zlib could not compress a grain, and this subformat has no uncompressed grains")
    }

    /// - Parameter length: header and padding included.
    mutating func mapCompressed(
        _ cluster: UInt64, length: Int, _ file: borrowing NewFile
    ) throws(DiskImageError) -> UInt64? {
        try openTable(of: cluster, file)
        let place = try take(UInt64(length), file)
        let offset = Int(cluster % UInt64(GrainDirectory.entriesPerTable)) * 4
        table.replaceSubrange(offset..<offset + 4, with: littleEndian(place))
        return UInt64(place) * 512
    }

    mutating func openTable(of cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {
        let index = Int(cluster / UInt64(GrainDirectory.entriesPerTable))
        guard index != tableIndex else { return }
        try writeTable(file)
        tableIndex = index
    }

    private mutating func writeTable(_ file: borrowing NewFile) throws(DiskImageError) {
        guard let tableIndex else { return }
        directory[tableIndex] = try write(VMDKMarker.table, table, file)
        table = [UInt8](repeating: 0, count: table.count)
        self.tableIndex = nil
    }

    mutating func writeMetadata(_ file: borrowing NewFile) throws(DiskImageError) -> UInt64 {
        try writeTable(file)
        let bytes = directory.flatMap { littleEndian($0) }
        let place = try write(VMDKMarker.directory, bytes + [UInt8](repeating: 0, count: -bytes.count & 511), file)
        _ = try write(
            VMDKMarker.footer, VMDKHeader.new(stream: size, directory: UInt64(place), overhead: Self.overhead), file)
        // The marker of the end is all zeroes.
        _ = try take(512, file)
        try file.setSize(end)
        try file.write(descriptor, at: UInt64(VMDKHeader.size))
        try file.write(
            VMDKHeader.new(stream: size, directory: VMDKHeader.directoryAtEnd, overhead: Self.overhead), at: 0)
        return end
    }

    /// Writes a marker, and whole sectors behind it.
    /// - Returns: the first sector behind the marker.
    private mutating func write(
        _ marker: UInt32, _ bytes: [UInt8], _ file: borrowing NewFile
    ) throws(DiskImageError) -> UInt32 {
        let start = try take(512 + UInt64(bytes.count), file)
        let head = littleEndian(UInt64(bytes.count / 512)) + littleEndian(UInt32(0)) + littleEndian(marker)
        try file.write(head + [UInt8](repeating: 0, count: 512 - head.count) + bytes, at: UInt64(start) * 512)
        return start + 1
    }

    /// The next whole sectors of the file, named by the first.
    private mutating func take(_ length: UInt64, _ file: borrowing NewFile) throws(DiskImageError) -> UInt32 {
        // Sectors have 32 bits.
        guard (end + length) >> 9 <= UInt64(UInt32.max) else {
            throw .impossible(
                path: file.path, reason: "its file would be longer than 2 TiB, the maximum of a compressed VMDK")
        }
        defer { end += length }
        return UInt32(truncatingIfNeeded: end >> 9)
    }
}

/// Writes the sparse files of a VMDK, one after the other.
struct VMDKSplitBuilder: ImageBuilder {
    private let extents: NewExtents
    private var current: BlockMapBuilder
    private var index = 0

    private static var clustersPerExtent: UInt64 { VMDKDescriptor.splitSize / BlockMapBuilder.grainSize }

    init(_ extents: NewExtents) {
        self.extents = extents
        current = BlockMapBuilder(vmdk: extents.files[0].size, descriptor: [])
    }

    /// Clusters of the open file; a run never crosses the border of two, since ``ConversionWork`` cuts its pieces
    /// there.
    mutating func allocate(_ count: UInt64) -> UInt64 { UInt64(index) * extents.window + current.allocate(count) }

    mutating func map(
        _ cluster: UInt64, count: UInt64, to place: UInt64, subclusters: UInt32, _ file: borrowing NewFile
    ) throws(DiskImageError) {
        try openTable(of: cluster, file)
        try current.map(
            cluster % Self.clustersPerExtent, count: count, to: place % extents.window, subclusters: subclusters,
            extents.files[index].file)
    }

    mutating func mapCompressed(
        _ cluster: UInt64, length: Int, _ file: borrowing NewFile
    ) throws(DiskImageError) -> UInt64? { nil }

    mutating func openTable(of cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {
        try open(Int(cluster / Self.clustersPerExtent))
        try current.openTable(of: cluster % Self.clustersPerExtent, extents.files[index].file)
    }

    /// Completes the files before one, which is then the open one.
    private mutating func open(_ next: Int) throws(DiskImageError) {
        while index < next {
            _ = try current.writeMetadata(extents.files[index].file)
            index += 1
            current = BlockMapBuilder(vmdk: extents.files[index].size, descriptor: [])
        }
    }

    mutating func writeMetadata(_ file: borrowing NewFile) throws(DiskImageError) -> UInt64 {
        try open(extents.files.count - 1)
        return try current.writeMetadata(extents.files[index].file)
    }
}

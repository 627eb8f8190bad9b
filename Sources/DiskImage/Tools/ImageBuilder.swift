// SPDX-License-Identifier: Apache-2.0

/// Writes what of a new image is not the disk's data, from front to back: places for clusters, in ascending order of
/// the disk, tables as they are complete, the header at the end. One thread at a time uses it; it is asked once for a
/// run of clusters, not for each byte.
///
/// What VDI calls a block and VMDK a grain is a cluster here.
protocol ImageBuilder {
    /// Makes the table of a cluster the one being filled, so that it lies before what it maps.
    mutating func openTable(of cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError)

    /// Neighbouring clusters of the file, named by their first byte.
    mutating func allocate(_ count: UInt64) -> UInt64

    /// Maps neighbouring clusters of the disk, the first of which has the number `cluster`, to clusters of the file.
    /// - Parameter subclusters: with subclusters, which of each are allocated.
    mutating func map(
        _ cluster: UInt64, count: UInt64, to place: UInt64, subclusters: UInt32, _ file: borrowing NewFile)
        throws(DiskImageError)

    /// A place for the `length` bytes of a compressed cluster of the disk, which is mapped there; nil when the format
    /// can have no such place, so that the cluster is to be stored as it is.
    mutating func mapCompressed(
        _ cluster: UInt64, length: Int, _ file: borrowing NewFile
    ) throws(DiskImageError) -> UInt64?

    /// Has a cluster of the disk read as zeroes whatever is under the image; in one that stands alone nothing is needed
    /// for that.
    mutating func mapZeroes(_ cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError)

    /// Writes the metadata that is left. The data has been written, or will be before the file gets its name.
    /// - Returns: bytes of the file.
    mutating func writeMetadata(_ file: borrowing NewFile) throws(DiskImageError) -> UInt64
}

extension ImageBuilder {
    mutating func mapZeroes(_ cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {}
}

extension QCOW2Builder: ImageBuilder {}

/// What a new image consists of: where the disk's data goes, and what writes the rest.
struct ImagePlan {
    /// Bytes of the disk that are found to be zero as a whole: a cluster, or a page where the disk lies as it is.
    let unit: UInt64
    /// Where the disk begins in a file that has it as it is; nil where the builder gives each cluster its place.
    let flatStart: UInt64?
    /// nil where there is nothing but data and a descriptor.
    var builder: (any ImageBuilder)?
    /// The text that the image's own file consists of, if the data is in others.
    private let descriptor: [UInt8]
    /// The files of a VMDK in several files, which all data goes to; the image's own then has the descriptor.
    let extents: NewExtents?
    /// Every cluster is compressed and has a header of VMDK's (``VMDKGrain``) before it.
    var isStream = false
    /// Pages of zeroes within a cluster are not written: the clusters are large, and have no refcounts.
    var keepsHoles = false

    /// - Parameters:
    ///   - subformat: checked, see ``ImageSubformat/resolve(_:format:compresses:_:)``; nil for raw and qcow2.
    ///   - volume: what encrypts a qcow2 image.
    init(
        _ format: ImageFormat, _ subformat: ImageSubformat?, _ options: QCOW2Options, size: UInt64,
        backing: BackingReference?, path: String,
        replacing: Bool, cache: ToolCache = .writeback, sources: [ImageFile.Identity] = [], volume: LUKSVolume? = nil
    ) throws(DiskImageError) {
        var text: [UInt8] = []
        switch subformat {
        case nil:
            let isRaw = format == .raw
            unit = isRaw ? 4096 : options.clusterSize
            flatStart = isRaw ? 0 : nil
            builder = isRaw ? nil : QCOW2Builder(options, size: size, backing: backing, volume: volume)
            extents = nil
        case .dynamic, .fixed:
            let builder = BlockMapBuilder(vdi: size, isStatic: subformat == .fixed)
            unit = subformat == .fixed ? 4096 : builder.layout.blockSize
            flatStart = subformat == .fixed ? builder.dataStart : nil
            extents = nil
            self.builder = builder
            keepsHoles = true
        case .monolithicSparse:
            builder = try BlockMapBuilder(
                vmdk: size, descriptor: VMDKDescriptor.text(of: .monolithicSparse, path, size: size).text)
            unit = BlockMapBuilder.grainSize
            flatStart = nil
            extents = nil
        case .streamOptimized:
            builder = try VMDKStreamBuilder(
                size: size, descriptor: VMDKDescriptor.text(of: .streamOptimized, path, size: size).text)
            unit = BlockMapBuilder.grainSize
            flatStart = nil
            extents = nil
            isStream = true
        case .monolithicFlat, .twoGbMaxExtentFlat, .twoGbMaxExtentSparse:
            let names: [String]
            (text, names) = try VMDKDescriptor.text(of: subformat ?? .monolithicFlat, path, size: size)
            let isSparse = subformat == .twoGbMaxExtentSparse
            let extents = try NewExtents(
                names, of: path, diskSize: size,
                extentSize: subformat == .monolithicFlat ? .max : VMDKDescriptor.splitSize,
                // A sparse extent is longer than what it has of the disk.
                window: isSparse ? 1 << 33 : nil, replacing: replacing, cache: cache, sources: sources)
            unit = isSparse ? BlockMapBuilder.grainSize : 4096
            flatStart = isSparse ? nil : 0
            builder = isSparse ? VMDKSplitBuilder(extents) : nil
            self.extents = extents
        }
        descriptor = text
    }

    /// Gives what holds the disk as it is its length, and its space if that is wanted before there is data.
    func prepare(_ file: borrowing NewFile, size: UInt64, _ preallocation: Preallocation) throws(DiskImageError) {
        guard let flatStart else { return }
        if let extents { return try extents.prepare(reserves: preallocation == .falloc) }
        try file.setSize(flatStart + size)
        if preallocation == .falloc { try file.reserve(flatStart, size) }
    }

    /// Writes the metadata that is left when the data has been written, or will be before anything has its name.
    mutating func writeMetadata(_ file: borrowing NewFile, _ preallocation: Preallocation) throws(DiskImageError) {
        let end = try builder?.writeMetadata(file) ?? 0
        if preallocation == .falloc, flatStart == nil { try file.reserve(0, end) }
        if !descriptor.isEmpty { try file.write(descriptor, at: 0) }
    }

    /// Gives all files their names, the image's own last. After an error none has one, but for what was replaced.
    func publish(_ file: inout NewFile, durably: Bool) throws(DiskImageError) {
        try extents?.publish(durably: durably)
        do throws(DiskImageError) { try file.publish(durably: durably) } catch {
            extents?.withdraw()
            throw error
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// Writes a new qcow2 image from front to back: clusters are given out in the order of the file, L2 tables are written
/// as they are complete, and the header, without which the file is no image, comes last.
///
/// Nothing refers to the file before it is complete, so there is no order to keep and nothing to synchronise; reference
/// counts follow from the layout. The disk's clusters are mapped in ascending order. One thread at a time uses it.
struct QCOW2Builder {
    let options: QCOW2Options
    /// Bytes of the disk.
    let size: UInt64
    let clusterSize: UInt64
    private let backing: BackingReference?
    /// The LUKS header and its place, if the data is encrypted.
    private let volume: LUKSVolume?
    private let volumePlace: UInt64

    private let clusterBits: UInt64
    private let entriesPerTable: UInt64
    private let entrySize: Int
    /// The next cluster of the file.
    private var nextCluster: UInt64 = 1
    private var l1: [UInt64]
    /// The L2 table being filled, and which one it is.
    private var table: [UInt8]
    private var tableIndex: Int?
    /// Where the last compressed cluster ends, in a cluster of the file that has room left; else 0.
    private var compressedEnd: UInt64 = 0
    /// References to clusters of the file beyond the first one, which those with compressed data have.
    private var moreReferences: [UInt32] = []

    private static let copied: UInt64 = 1 << 63
    private static let maximumRefcountTable: UInt64 = 8 << 20

    /// The options have been checked.
    init(_ options: QCOW2Options, size: UInt64, backing: BackingReference?, volume: LUKSVolume? = nil) {
        self.options = options
        self.volume = volume
        // The first cluster behind the header.
        volumePlace = options.clusterSize
        if let volume { nextCluster += (volume.region + options.clusterSize - 1) / options.clusterSize }
        self.size = size
        self.backing = backing
        clusterSize = options.clusterSize
        clusterBits = UInt64(options.clusterSize.trailingZeroBitCount)
        entrySize = options.extendedL2 ? 16 : 8
        entriesPerTable = options.clusterSize / UInt64(entrySize)
        let clusters = (size + options.clusterSize - 1) >> clusterBits
        // One entry also for an empty disk, whose table would otherwise be a cluster without a reference.
        l1 = [UInt64](repeating: 0, count: max(1, Int((clusters + entriesPerTable - 1) / entriesPerTable)))
        table = [UInt8](repeating: 0, count: Int(options.clusterSize))
    }

    /// log2 of the most bytes of a file in which compressed data can be named.
    private var compressedPlaceBits: UInt64 { 62 - (clusterBits - 8) }

    // MARK: - Clusters

    /// Neighbouring clusters of the file, named by their first byte.
    mutating func allocate(_ count: UInt64) -> UInt64 {
        let place = nextCluster << clusterBits
        nextCluster += count
        return place
    }

    /// Maps neighbouring clusters of the disk, the first of which has the number `cluster`, to clusters of the file.
    /// - Parameter subclusters: with subclusters, which of each are allocated.
    mutating func map(
        _ cluster: UInt64, count: UInt64 = 1, to place: UInt64, subclusters: UInt32 = .max, _ file: borrowing NewFile
    ) throws(DiskImageError) {
        for index in 0..<count {
            try set(cluster + index, (place + (index << clusterBits)) | Self.copied, UInt64(subclusters), file)
        }
    }

    /// Has a cluster of the disk read as zeroes, as only version 3 can.
    mutating func mapZeroes(_ cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {
        // With subclusters, each has a bit for that.
        try set(cluster, options.extendedL2 ? 0 : 1, UInt64(UInt32.max) << 32, file)
    }

    /// A place for the `length` bytes of a compressed cluster of the disk, which is mapped there; nil when the format
    /// can have no such place, so that the cluster is to be stored as it is.
    mutating func mapCompressed(
        _ cluster: UInt64, length: Int, _ file: borrowing NewFile
    ) throws(DiskImageError) -> UInt64? {
        try openTable(of: cluster, file)
        let limit = options.refcountBits >= 32 ? UInt64(UInt32.max) : (1 << UInt64(options.refcountBits)) - 1
        var place = compressedEnd
        let inLast = Int(compressedEnd >> clusterBits)
        // What is left of the last cluster of the file, if that can be counted once more and what follows it is free.
        if place == 0 || UInt64(inLast) + 1 != nextCluster || UInt64(references(inLast)) + 2 > limit {
            place = nextCluster << clusterBits
        }
        let end = place + UInt64(length)
        guard end >> compressedPlaceBits == 0 else { return nil }
        let first = place >> clusterBits, last = (end - 1) >> clusterBits
        for index in first...last {
            if index >= nextCluster { nextCluster = index + 1 } else { countAgain(Int(index)) }
        }
        compressedEnd = end & (clusterSize - 1) == 0 ? 0 : end
        let sectors = ((end - 1) >> 9) - (place >> 9)
        try set(cluster, 1 << 62 | (sectors << compressedPlaceBits) | place, 0, file)
        return place
    }

    private func references(_ cluster: Int) -> UInt32 { cluster < moreReferences.count ? moreReferences[cluster] : 0 }

    private mutating func countAgain(_ cluster: Int) {
        if cluster >= moreReferences.count {
            moreReferences += [UInt32](repeating: 0, count: max(1024, cluster + 1 - moreReferences.count))
        }
        moreReferences[cluster] += 1
    }

    // MARK: - Tables

    private mutating func set(
        _ cluster: UInt64, _ entry: UInt64, _ bitmap: UInt64, _ file: borrowing NewFile
    ) throws(DiskImageError) {
        try openTable(of: cluster, file)
        let offset = Int(cluster % entriesPerTable) * entrySize
        table.store(entry, at: offset)
        if options.extendedL2 { table.store(bitmap, at: offset + 8) }
    }

    /// Makes the table of a cluster the one being filled.
    mutating func openTable(of cluster: UInt64, _ file: borrowing NewFile) throws(DiskImageError) {
        let index = Int(cluster / entriesPerTable)
        guard index != tableIndex else { return }
        try writeTable(file)
        tableIndex = index
        l1[index] = allocate(1) | Self.copied
    }

    private mutating func writeTable(_ file: borrowing NewFile) throws(DiskImageError) {
        guard let index = tableIndex else { return }
        try file.write(table, at: l1[index] & ~Self.copied)
        table = [UInt8](repeating: 0, count: table.count)
        tableIndex = nil
    }

    // MARK: - The end

    /// Writes the metadata that is left. The data has been written, or will be before the file gets its name.
    /// - Returns: bytes of the file.
    mutating func writeMetadata(_ file: borrowing NewFile) throws(DiskImageError) -> UInt64 {
        try writeTable(file)
        let l1Bytes = bigEndian(l1)
        let l1Place = allocate(clusters(UInt64(l1Bytes.count)))
        try file.write(l1Bytes, at: l1Place)

        // Blocks count themselves and the table.
        let perBlock = clusterSize * 8 / UInt64(options.refcountBits)
        var blocks: UInt64 = 0, tableClusters: UInt64 = 0, total = nextCluster
        while true {
            let neededBlocks = (total + perBlock - 1) / perBlock
            let neededTable = clusters(neededBlocks * 8)
            if neededBlocks == blocks, neededTable == tableClusters { break }
            (blocks, tableClusters) = (neededBlocks, neededTable)
            total = nextCluster + blocks + tableClusters
        }
        guard tableClusters << clusterBits <= Self.maximumRefcountTable else {
            throw .impossible(
                path: file.path,
                reason:
                    "\(total) clusters of \(clusterSize) bytes cannot be counted with \(options.refcountBits) bits each; use larger clusters or fewer bits"
            )
        }
        let blockPlace = allocate(blocks), tablePlace = allocate(tableClusters)
        try writeRefcounts(total, blocks: blocks, perBlock: perBlock, at: blockPlace, file)
        let places = (0..<blocks).map { (block: UInt64) -> UInt64 in blockPlace + (block << clusterBits) }
        try file.write(bigEndian(places), at: tablePlace)
        try file.setSize(nextCluster << clusterBits)

        var area = QCOW2HeaderArea(options, size: size, backing: backing)
        if let volume {
            try file.write(volume.bytes, at: volumePlace)
            var pointer = [UInt8](repeating: 0, count: 16)
            pointer.store(volumePlace, at: 0)
            pointer.store(volume.region, at: 8)
            area.set32(QCOW2HeaderArea.Field.encryptionMethod, 2)
            area.insertExtension(QCOW2HeaderArea.Extension.encryption, pointer)
        }
        area.set32(QCOW2HeaderArea.Field.l1Count, UInt32(l1.count))
        area.set64(QCOW2HeaderArea.Field.l1Offset, l1Place)
        area.set64(QCOW2HeaderArea.Field.refcountTableOffset, tablePlace)
        area.set32(QCOW2HeaderArea.Field.refcountTableClusters, UInt32(tableClusters))
        guard let header = area.bytes(clusterSize: Int(clusterSize)) else {
            throw .impossible(
                path: file.path,
                reason: "the names of backing and data file do not fit into a cluster of \(clusterSize) bytes")
        }
        try file.write(header, at: 0)
        return nextCluster << clusterBits
    }

    private func clusters(_ bytes: UInt64) -> UInt64 { max(1, (bytes + clusterSize - 1) >> clusterBits) }

    /// Writes the counts of `total` clusters, in pieces of at most a MiB or a block.
    private func writeRefcounts(
        _ total: UInt64, blocks: UInt64, perBlock: UInt64, at place: UInt64, _ file: borrowing NewFile
    ) throws(DiskImageError) {
        let perPiece = max(1, UInt64(1 << 20) >> clusterBits)
        var block: UInt64 = 0
        while block < blocks {
            let count = min(perPiece, blocks - block)
            var bytes = [UInt8](repeating: 0, count: Int(count << clusterBits))
            let first = block * perBlock
            for cluster in first..<min(total, first + count * perBlock) {
                store(UInt64(references(Int(cluster))) + 1, Int(cluster - first), &bytes)
            }
            try file.write(bytes, at: place + (block << clusterBits))
            block += count
        }
    }

    private func store(_ count: UInt64, _ index: Int, _ bytes: inout [UInt8]) {
        let width = options.refcountBits
        if width < 8 {
            // Narrow counts begin with a byte's lowest bit.
            let bit = index * width
            bytes[bit / 8] |= UInt8(truncatingIfNeeded: count) << UInt8(bit % 8)
        } else {
            for byte in 0..<min(8, width / 8) {
                bytes[index * width / 8 + width / 8 - 1 - byte] = UInt8(truncatingIfNeeded: count >> UInt64(8 * byte))
            }
        }
    }

    private func bigEndian(_ entries: [UInt64]) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: entries.count * 8)
        bytes.withIOMemory { memory in
            for (index, entry) in entries.enumerated() { memory.store(bigEndian: entry, index * 8) }
        }
        return bytes
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// New metadata of an image, written beside the old and put in its place by one write of the header.
///
/// Everything that a change needs (tables with other flags, reference counts, a list of snapshots) goes to clusters
/// that nothing uses, before and after. Then it is made durable, then the header's first sector names it, which a disk
/// writes as a whole or not at all: whenever the power fails the image is the old one or the new one, and neither is
/// damaged. What fails before leaves the old one.
///
/// Nothing else uses the image meanwhile.
struct MetadataReplacement: ~Copyable {
    let header: QCOW2Header
    let file: TableFile
    /// The header's new fields.
    var fields: [UInt8]
    /// The new refcount of each cluster.
    var counts: ClusterCounts
    /// How often each is counted before.
    private let oldCounts: ClusterCounts
    private let fileSize: UInt64
    /// Indicates whether what is not counted afterwards may be freed on the host: in an image that stays damaged
    /// it may be in use.
    private let releasesSpace: Bool
    /// Where the search for single clusters continues.
    private var next: UInt64 = 1
    /// The names of the bitmaps that the image has no more afterwards.
    private(set) var lostBitmaps: [String] = []
    /// The header has been written: the new metadata is effective.
    private(set) var isCommitted = false

    /// What is counted afterwards, before more is said.
    enum Basis {
        /// The refcounts of the image.
        case counted
        /// The references found by a scan.
        case used
        /// The refcounts of the image without leaks. In a damaged image, refcounts that are too low stay so.
        case countedAndUsed
        /// The higher of both: what is in use is not all known.
        case countedOrUsed
    }

    /// A replacement after which everything is as before, but for the counts, until more is said. Clusters that were
    /// counted or in use are left alone.
    init(_ scan: borrowing QCOW2Scan, counting basis: Basis = .counted) throws(DiskImageError) {
        let path = scan.file.path
        let fields = try scan.file.read(scan.header.fixedLength, at: 0)
        var oldCounts = try scan.counts.copy(path: path)
        // What is in use without a refcount must not be allocated either.
        for cluster in 0..<scan.references.end where scan.references[cluster] != 0 && oldCounts[cluster] == 0 {
            oldCounts[cluster] = 1
        }
        var counts = try basis == .counted ? scan.counts.copy(path: path) : scan.references.copy(path: path)
        let header = scan.header
        // The old refcount structure goes; a new one comes with the commit.
        let bits = UInt64(header.clusterBits)
        for block in scan.refcountBlocks where block != 0 { counts.add(-1, to: block >> bits) }
        let table = header.refcountTableOffset >> bits
        counts.add(-1, to: table..<table + UInt64(header.refcountTableClusters))
        if basis == .countedAndUsed {
            for cluster in 0..<counts.end where counts[cluster] > scan.counts[cluster] {
                counts[cluster] = scan.counts[cluster]
            }
        }
        if basis == .countedOrUsed {
            for cluster in 0..<scan.counts.end where scan.counts[cluster] > scan.references[cluster] {
                counts.add(Int64(scan.counts[cluster] - scan.references[cluster]), to: cluster)
            }
        }
        releasesSpace = basis != .countedAndUsed || scan.report.errors == 0
        self.header = header
        self.fields = fields
        self.oldCounts = oldCounts
        self.counts = counts
        file = scan.file
        fileSize = scan.fileSize
        if header.version >= 3 {
            // Of the features that only those keep true who know them these are known, and stay true while the disk
            // does not change.
            self.fields.store(
                header.autoclearFeatures & (QCOW2Header.Autoclear.bitmaps | header.keptAutoclearFeatures), at: 88)
        }
    }

    private var clusterBits: UInt64 { UInt64(header.clusterBits) }
    typealias L1Entry = QCOW2Image.L1Entry
    typealias L2Entry = QCOW2Image.L2Entry

    // MARK: - Clusters

    /// Takes neighbouring clusters and counts them.
    mutating func allocate(_ count: UInt64, times: UInt32 = 1) throws(DiskImageError) -> UInt64 {
        var first = count == 1 ? next : 1
        var found: UInt64 = 0
        while found < count {
            guard first + found < counts.capacity else {
                throw .system(path: file.path, SystemCallError("pwrite", errno: EFBIG))
            }
            if isFree(first + found) { found += 1 } else { (first, found) = (first + found + 1, 0) }
        }
        for cluster in first..<first + count { counts[cluster] = times }
        if count == 1 { next = first + 1 }
        return first << clusterBits
    }

    private func isFree(_ cluster: UInt64) -> Bool { counts[cluster] == 0 && oldCounts[cluster] == 0 }

    /// The clusters of a table, freed.
    mutating func free(_ place: UInt64, bytes: UInt64) {
        counts.add(-1, to: place >> clusterBits..<place >> clusterBits + header.clusters(for: bytes))
    }

    // MARK: - Tables

    /// Counts all that an L1 table's entries refer to, so many times more.
    mutating func refer(_ l1: [UInt64], _ change: Int64) throws(DiskImageError) {
        for entry in l1 where entry & L1Entry.offset != 0 {
            let table = entry & L1Entry.offset
            counts.add(change, to: table >> clusterBits)
            try refer(table: try file.readTable(Int(header.clusterSize / 8), at: table), change)
        }
    }

    /// The same for the entries of an L2 table, from one of them on.
    mutating func refer(table: [UInt64], from first: Int = 0, _ change: Int64) throws(DiskImageError) {
        let words = header.hasExtendedL2 ? 2 : 1
        for index in stride(from: first * words, to: table.count, by: words) where table[index] != 0 {
            let entry = table[index]
            if entry & L2Entry.compressed != 0 {
                let (place, length) = header.compressedRange(entry)
                counts.add(change, to: place >> clusterBits..<(place + length - 1) >> clusterBits + 1)
            } else if entry & L2Entry.offset != 0, !header.hasDataFile {
                counts.add(change, to: (entry & L2Entry.offset) >> clusterBits)
            }
        }
    }

    /// The L1 table with flags that fit the counts, and new L2 tables for those whose flags, or entries, change.
    /// - Parameters:
    ///   - uses: how many of the L1 tables that are written refer to it.
    ///   - edit: changes entries of the L2 table with a number, whose references it has counted; returns whether it
    ///     did.
    private mutating func refreshed(
        _ l1: [UInt64], uses: UInt32, edit: (Int, inout [UInt64]) -> Bool
    ) throws(DiskImageError) -> [UInt64] {
        var result = l1
        let words = header.hasExtendedL2 ? 2 : 1
        for index in l1.indices {
            let table = l1[index] & L1Entry.offset
            guard table != 0 else {
                // The table may be long, and stays the caller's as long as nothing of it changes.
                if l1[index] != 0 { result[index] = 0 }
                continue
            }
            var entries = try file.readTable(Int(header.clusterSize / 8), at: table)
            var isChanged = edit(index, &entries)
            for place in stride(from: 0, to: entries.count, by: words)
            where entries[place] & L2Entry.compressed == 0 && entries[place] & L2Entry.offset != 0
                && !header.hasDataFile
            {
                let isOnce = counts[(entries[place] & L2Entry.offset) >> clusterBits] == 1
                guard (entries[place] & L2Entry.copied != 0) != isOnce else { continue }
                entries[place] ^= L2Entry.copied
                isChanged = true
            }
            var place = table
            if isChanged {
                counts.add(-Int64(uses), to: table >> clusterBits)
                place = try allocate(1, times: uses)
                try file.writeTable(entries, at: place)
            }
            result[index] = place | (counts[place >> clusterBits] == 1 ? L1Entry.copied : 0)
        }
        return result
    }

    /// Has the image use an L1 table in place of its own, after ``refreshed(_:uses:edit:)``.
    /// - Returns: its entries as they are written.
    @discardableResult
    mutating func setL1(
        _ l1: [UInt64], uses: UInt32 = 1, edit: (Int, inout [UInt64]) -> Bool = { _, _ in false }
    ) throws(DiskImageError) -> [UInt64] {
        // Before the flags are read: in a damaged image they may be about the clusters of the old one.
        free(header.l1Offset, bytes: UInt64(header.l1TableSize) * 8)
        let refreshed = try self.refreshed(l1, uses: uses, edit: edit)
        let place = try writeL1(refreshed)
        fields.store(UInt32(refreshed.count), at: 36)
        fields.store(place, at: 40)
        return refreshed
    }

    /// Writes an L1 table to a place of its own.
    mutating func writeL1(_ l1: [UInt64]) throws(DiskImageError) -> UInt64 {
        guard !l1.isEmpty else { return 0 }
        let place = try allocate(header.clusters(for: UInt64(l1.count) * 8))
        try file.writeTable(l1, at: place)
        let padding = [UInt64](
            repeating: 0, count: Int(header.clusters(for: UInt64(l1.count) * 8) * header.clusterSize / 8) - l1.count)
        try file.writeTable(padding, at: place + UInt64(l1.count * 8))
        return place
    }

    mutating func setSnapshots(_ snapshots: QCOW2SnapshotTable) throws(DiskImageError) {
        free(header.snapshotTableOffset, bytes: snapshots.length)
        let bytes = snapshots.encoded()
        var place: UInt64 = 0
        if !bytes.isEmpty {
            let clusters = header.clusters(for: UInt64(bytes.count))
            place = try allocate(clusters)
            try file.write(
                bytes + [UInt8](repeating: 0, count: Int(clusters * header.clusterSize) - bytes.count), at: place)
        }
        fields.store(UInt32(snapshots.entries.count), at: 60)
        fields.store(place, at: 64)
    }

    mutating func setSize(_ size: UInt64) { fields.store(size, at: 24) }

    /// The disk has other contents afterwards, so the bitmaps are invalid: their clusters are freed.
    mutating func clearBitmaps(_ scan: borrowing QCOW2Scan) {
        guard header.version >= 3 else { return }
        fields.store(header.autoclearFeatures & header.keptAutoclearFeatures, at: 88)
        for clusters in scan.bitmapClusters { counts.add(-1, to: clusters) }
        lostBitmaps = scan.bitmapNames
    }

    // MARK: - The end

    /// Writes the reference counts, and then the header.
    mutating func commit() throws(DiskImageError) {
        try writeCounts()
        try file.synchronize()
        isCommitted = true
        try file.write(fields, at: 0)
        try file.synchronize()
        // What the header says of them means nothing any more, which others would warn of.
        if !lostBitmaps.isEmpty, let place = header.bitmaps?.lastExtension {
            try file.write([UInt8](repeating: 0, count: 8), at: place)
        }
        if releasesSpace { releaseSpace() }
    }

    /// Nothing of what was written is the image's: where the file ended, it ends, and what was free takes no space.
    func abandon() {
        _ = try? file.truncate(to: fileSize)
        var written: Range<UInt64> = 0..<0
        for cluster in 0..<min(counts.end, header.clusters(for: fileSize))
        where counts[cluster] != 0 && oldCounts[cluster] == 0 {
            if written.upperBound != cluster {
                if !written.isEmpty {
                    file.file.punch(written.lowerBound << clusterBits, UInt64(written.count) << clusterBits)
                }
                written = cluster..<cluster
            }
            written = written.lowerBound..<cluster + 1
        }
        if !written.isEmpty { file.file.punch(written.lowerBound << clusterBits, UInt64(written.count) << clusterBits) }
    }

    /// The new refcounts of every cluster, in new blocks with a new table.
    private mutating func writeCounts() throws(DiskImageError) {
        let perBlock = UInt64(1) << header.refcountBlockBits
        var blocks: [UInt64] = []
        var table: (place: UInt64, clusters: UInt64)?
        // Each block and table that is placed may need another.
        while true {
            let needed = (counts.usedEnd + perBlock - 1) >> header.refcountBlockBits
            let wanted = max(1, header.clusters(for: needed * 8))
            if let placed = table, placed.clusters < wanted {
                free(placed.place, bytes: placed.clusters << clusterBits)
                table = nil
            }
            if table == nil {
                guard wanted << clusterBits <= 8 << 20 else {
                    throw .system(path: file.path, SystemCallError("pwrite", errno: EFBIG))
                }
                table = (try allocate(wanted), wanted)
                continue
            }
            if blocks.count < Int(needed) { blocks += [UInt64](repeating: 0, count: Int(needed) - blocks.count) }
            var isPlaced = false
            for block in blocks.indices where blocks[block] == 0 && isUsed(block, perBlock) {
                blocks[block] = try allocate(1)
                isPlaced = true
            }
            if !isPlaced, (counts.usedEnd + perBlock - 1) >> header.refcountBlockBits == needed { break }
        }
        guard let table else { return }
        let maximum = header.maximumCount
        for (index, place) in blocks.enumerated() where place != 0 {
            let first = UInt64(index) * perBlock
            for cluster in first..<min(first + perBlock, counts.end) where UInt64(counts[cluster]) > maximum {
                throw .countsTooNarrow(
                    path: file.path, bits: 1 << header.refcountOrder, needed: UInt64(counts[cluster]))
            }
            try file.write(encoded(first, perBlock), at: place)
        }
        let entries = Int(table.clusters * header.clusterSize / 8)
        try file.writeTable(blocks + [UInt64](repeating: 0, count: entries - blocks.count), at: table.place)
        fields.store(table.place, at: 48)
        fields.store(UInt32(table.clusters), at: 56)
    }

    private func isUsed(_ block: Int, _ perBlock: UInt64) -> Bool {
        let first = UInt64(block) * perBlock
        return first < counts.end && (first..<min(first + perBlock, counts.end)).contains { counts[$0] != 0 }
    }

    /// The counts of `count` clusters in the file's form.
    private func encoded(_ first: UInt64, _ count: UInt64) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Int(header.clusterSize))
        for index in 0..<Int(min(count, counts.end - first)) {
            let value = counts[first + UInt64(index)]
            if value != 0 { header.store(count: UInt64(value), index, in: &bytes) }
        }
        return bytes
    }

    /// The image no longer uses what it did: the space goes back to the host. This is best effort: a failure costs
    /// space.
    private func releaseSpace() {
        let end = counts.usedEnd
        var first: UInt64?
        for cluster in 0..<max(oldCounts.end, counts.end) {
            let isFreed = cluster < end && counts[cluster] == 0 && oldCounts[cluster] != 0
            if isFreed, first == nil { first = cluster }
            if !isFreed, let start = first {
                file.file.punch(start << clusterBits, (cluster - start) << clusterBits)
                first = nil
            }
        }
        if let start = first { file.file.punch(start << clusterBits, (end - start) << clusterBits) }
        if end << clusterBits < fileSize { _ = try? file.truncate(to: end << clusterBits) }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

extension DiskImageError {
    /// Indicates whether the host has no room for what was to be written.
    var isOutOfSpace: Bool {
        guard case .system(_, let error) = self else { return false }
        return [ENOSPC, EDQUOT, EFBIG].contains(error.errno)
    }
}

/// Changes that free space and need none, for a full file system, where ``MetadataReplacement`` has no room for new
/// metadata beside the old.
///
/// They are made in place, and one write of the header's first sector makes them effective. Steps before it have no
/// effect on the image; steps after it free clusters that have a refcount but no reference (``reduceCounts(_:to:)``),
/// which a power failure may leave as leaks. Nothing else uses the image meanwhile.
struct MetadataReduction: ~Copyable {
    let header: QCOW2Header
    let file: TableFile
    private let fileSize: UInt64
    /// The header has been written: the change is effective.
    var isCommitted = false
    /// The names of the bitmaps that the image has no more afterwards.
    private(set) var lostBitmaps: [String] = []

    static let sector = 512
    /// The unit in which file systems allocate and free space.
    private static let page = 4096
    /// Clusters that are examined as a new location for the table.
    private static let maximumCandidates = 1 << 16
    /// Bytes of a table that are read together.
    private static let pieceSize = 64 << 10

    init(_ scan: borrowing QCOW2Scan) {
        header = scan.header
        file = scan.file
        fileSize = scan.fileSize
    }

    private var clusterBits: UInt64 { UInt64(header.clusterBits) }

    /// Writes the header's new fields; all of them are in one sector.
    private mutating func commit(_ fields: [UInt8]) throws(DiskImageError) {
        try file.synchronize()
        isCommitted = true
        try file.write(fields, at: 0)
        try file.synchronize()
    }

    // MARK: - Snapshots

    /// Takes a snapshot out of the table of snapshots.
    mutating func remove(_ entry: QCOW2SnapshotTable.Entry, _ scan: borrowing QCOW2Scan) throws(DiskImageError) {
        var table = scan.snapshots
        guard
            let index = table.entries.firstIndex(where: {
                $0.l1Offset == entry.l1Offset && $0.id == entry.id && $0.name == entry.name
            })
        else {
            throw .noSnapshot(path: file.path, name: entry.snapshot.id)
        }
        table.entries.remove(at: index)
        var fields = try file.read(header.fixedLength, at: 0)
        fields.store(UInt32(table.entries.count), at: 60)
        if table.entries.isEmpty {
            fields.store(UInt64(0), at: 64)
        } else if index < table.entries.count {
            var reordered = table
            reordered.entries.append(entry)
            var before = table
            before.entries.removeSubrange(index...)
            let start = before.encoded().count
            let bytes = reordered.encoded()
            if start / Self.sector == (bytes.count - 1) / Self.sector {
                // As the last one it is gone when the header counts one less. All that moves is in one sector, which is
                // stored as a whole or not at all.
                try file.write(Array(bytes[start...]), at: header.snapshotTableOffset + UInt64(start))
            } else {
                fields.store(try replaceTable(table.encoded(), at: start, index, scan), at: 64)
            }
        }
        try commit(fields)
    }

    /// Writes the table of the other snapshots to another place: to free clusters or, if the host has no room there, to
    /// clusters that the snapshot has alone. Those are free once its entry has no L1 table: if the power fails just
    /// then the snapshot is still listed, cannot be read any more, and can be deleted again. Where no place is left it
    /// stays where it is: ``absorb(_:_:)``.
    /// - Parameters:
    ///   - start: where in the old table the snapshot's entry begins.
    ///   - index: its number there.
    /// - Returns: the place.
    private mutating func replaceTable(
        _ bytes: [UInt8], at start: Int, _ index: Int, _ scan: borrowing QCOW2Scan
    ) throws(DiskImageError) -> UInt64 {
        do throws(DiskImageError) { return try place(bytes, scan) } catch {
            guard error.isOutOfSpace else { throw error }
            guard let own = try ownPlace(of: scan.snapshots.entries[index], for: bytes.count, scan) else {
                guard try absorb(index, scan) else { throw error }
                return header.snapshotTableOffset
            }
            try file.synchronize()
            isCommitted = true
            // The number of its L1 entries.
            try file.write([0, 0, 0, 0], at: header.snapshotTableOffset + UInt64(start + 8))
            try file.synchronize()
            try file.write(bytes, at: own)
            return own
        }
    }

    /// Neighbouring clusters that a snapshot has alone, and the host blocks for; nil if there are not as many.
    private func ownPlace(
        of entry: QCOW2SnapshotTable.Entry, for bytes: Int, _ scan: borrowing QCOW2Scan
    ) throws(DiskImageError) -> UInt64? {
        let l1 = entry.l1Offset >> clusterBits
        var clusters = Array(l1..<l1 + header.clusters(for: UInt64(entry.l1Size) * 8))
        for entry in try file.readL1(entry.l1Offset, entry.l1Size, fileSize) {
            let table = entry & QCOW2Image.L1Entry.offset
            guard table != 0, scan.counts[table >> clusterBits] == 1, clusters.count < Self.maximumCandidates else {
                continue
            }
            clusters.append(table >> clusterBits)
            let words = header.hasExtendedL2 ? 2 : 1
            let entries = try file.readTable(Int(header.clusterSize / 8), at: table)
            for place in stride(from: 0, to: entries.count, by: words)
            where entries[place] & QCOW2Image.L2Entry.compressed == 0 && entries[place] & QCOW2Image.L2Entry.offset != 0
            {
                clusters.append((entries[place] & QCOW2Image.L2Entry.offset) >> clusterBits)
            }
        }
        let wanted = header.clusters(for: UInt64(bytes))
        var run: Range<UInt64> = 0..<0
        for cluster in clusters.sorted() where scan.counts[cluster] == 1 && scan.references[cluster] == 1 {
            if run.upperBound != cluster { run = cluster..<cluster }
            run = run.lowerBound..<cluster + 1
            guard UInt64(run.count) >= wanted else { continue }
            let place = (run.upperBound - wanted) << clusterBits
            let hole = lseek(file.file.number, off_t(truncatingIfNeeded: place), CLINUX_SEEK_HOLE)
            if hasData(place), hole >= off_t(truncatingIfNeeded: place) + off_t(bytes) { return place }
        }
        return nil
    }

    /// Writes bytes to clusters of their own, which are counted when this returns.
    private func place(_ bytes: [UInt8], _ scan: borrowing QCOW2Scan) throws(DiskImageError) -> UInt64 {
        do throws(DiskImageError) { return try placeOnce(bytes, scan) } catch {
            guard error.isOutOfSpace else { throw error }
        }
        try releaseZeroes(scan, atLeast: bytes.count + Self.page)
        return try placeOnce(bytes, scan)
    }

    private func placeOnce(_ bytes: [UInt8], _ scan: borrowing QCOW2Scan) throws(DiskImageError) -> UInt64 {
        let wanted = header.clusters(for: UInt64(bytes.count))
        let end = min(
            header.clusters(for: fileSize) + wanted, UInt64(scan.refcountBlocks.count) << header.refcountBlockBits)
        var first: UInt64 = 1
        var found: UInt64 = 0
        var failure: DiskImageError?
        while first + found < end {
            let cluster = first + found
            let isFree =
                scan.counts[cluster] == 0 && scan.references[cluster] == 0
                && scan.refcountBlocks[Int(cluster >> header.refcountBlockBits)] != 0
            guard isFree else {
                (first, found) = (cluster + 1, 0)
                continue
            }
            found += 1
            guard found == wanted else { continue }
            // One that the host has room for already, or one at the end, which it may have.
            if hasData(first << clusterBits) || first + found >= end || cluster >= header.clusters(for: fileSize) {
                do throws(DiskImageError) {
                    try file.write(bytes, at: first << clusterBits)
                    try scan.store(in: first..<first + found) { _ in 1 }
                    return first << clusterBits
                } catch {
                    guard error.isOutOfSpace else { throw error }
                    file.file.punch(first << clusterBits, found << clusterBits)
                    if (first + found) << clusterBits > fileSize { _ = try? file.truncate(to: fileSize) }
                    failure = error
                }
            }
            (first, found) = (first + 1, 0)
        }
        throw failure ?? .system(path: file.path, SystemCallError("pwrite", errno: ENOSPC))
    }

    private func hasData(_ offset: UInt64) -> Bool {
        lseek(file.file.number, off_t(truncatingIfNeeded: offset), CLINUX_SEEK_DATA)
            == off_t(truncatingIfNeeded: offset)
    }

    /// Punches holes where the image's tables are zeroes, which does not change them and frees blocks of the host.
    private func releaseZeroes(_ scan: borrowing QCOW2Scan, atLeast wanted: Int) throws(DiskImageError) {
        var released = 0
        let tables =
            [(header.l1Offset, UInt64(header.l1TableSize) * 8), (header.snapshotTableOffset, scan.snapshots.length)]
            + scan.snapshots.entries.map { ($0.l1Offset, UInt64($0.l1Size) * 8) }
            + scan.refcountBlocks.filter { $0 != 0 }.map { ($0, 1) }
        for (start, length) in tables where released < wanted {
            let end = min(start + header.clusters(for: length) << clusterBits, fileSize)
            var position = start
            while position < end, released < wanted {
                let count = min(Self.pieceSize, Int(end - position))
                let bytes = try file.read(count, at: position)
                for page in stride(from: 0, to: count - Self.page + 1, by: Self.page)
                where bytes[page..<page + Self.page].allSatisfy({ $0 == 0 }) {
                    guard (position + UInt64(page)) % UInt64(Self.page) == 0, hasData(position + UInt64(page)) else {
                        continue
                    }
                    file.file.punch(position + UInt64(page), UInt64(Self.page))
                    released += Self.page
                }
                position += UInt64(count)
            }
        }
    }

    // MARK: - The disk

    /// Makes the disk shorter.
    /// - Returns: whether entries beyond its end are left, in a table that snapshots have too.
    mutating func shrink(to newSize: UInt64, _ scan: borrowing QCOW2Scan) throws(DiskImageError) -> Bool {
        var fields = try file.read(header.fixedLength, at: 0)
        let kept = max(1, Int(header.l1Entries(for: newSize)))
        fields.store(newSize, at: 24)
        // What the table has beyond that is no part of it any more.
        fields.store(UInt32(min(kept, header.l1TableSize)), at: 36)
        if header.version >= 3 { fields.store(header.autoclearFeatures & header.keptAutoclearFeatures, at: 88) }
        lostBitmaps = scan.bitmapNames
        try commit(fields)
        if let place = header.bitmaps?.lastExtension { try file.write([UInt8](repeating: 0, count: 8), at: place) }
        let tableCover = UInt64(header.clusterBits + header.l2Bits)
        let rest = newSize & ((1 << tableCover) - 1)
        // A disk without bytes has a table of one entry, and needs none.
        let last = newSize == 0 ? 0 : (newSize - 1) >> tableCover
        guard rest != 0 || newSize == 0 else { return false }
        let entry = try file.readL1(header.l1Offset + last * 8, 1, fileSize)[0]
        let table = entry & QCOW2Image.L1Entry.offset
        guard table != 0 else { return false }
        if newSize == 0 {
            try file.writeTable([0], at: header.l1Offset)
            try file.synchronize()
            return false
        }
        guard scan.counts[table >> clusterBits] == 1 else { return true }
        let words = header.hasExtendedL2 ? 2 : 1
        try clear(table + header.clusters(for: rest) * UInt64(words * 8)..<table + header.clusterSize)
        try file.synchronize()
        return false
    }

    /// Has the image hold nothing of its own, whose backing file shows the same.
    mutating func removeContents() throws(DiskImageError) {
        isCommitted = true
        try clear(header.l1Offset..<min(header.l1Offset + UInt64(header.l1TableSize) * 8, fileSize))
        try file.synchronize()
    }

    /// Makes a range of a table zeroes, where it is not yet: a hole stays one.
    private func clear(_ range: Range<UInt64>) throws(DiskImageError) {
        var position = range.lowerBound
        while position < range.upperBound {
            // To the end of the sector.
            let count = min(Int(range.upperBound - position), Self.sector - Int(position) % Self.sector)
            if try file.read(count, at: position).contains(where: { $0 != 0 }) {
                try file.write([UInt8](repeating: 0, count: count), at: position)
            }
            position += UInt64(count)
        }
    }
}

// MARK: - Counts

extension QCOW2Scan {
    /// Changes counts in place, in those sectors alone in which one changes: each is the old one or the new at any
    /// time.
    /// - Parameter wanted: a cluster's new refcount.
    /// - Returns: whether any has changed.
    @discardableResult
    borrowing func store(in clusters: Range<UInt64>, _ wanted: (UInt64) -> UInt32) throws(DiskImageError) -> Bool {
        let perBlock = UInt64(1) << header.refcountBlockBits
        var isChanged = false
        for (index, place) in refcountBlocks.enumerated() where place != 0 {
            let first = UInt64(index) * perBlock
            let range =
                max(
                    first, clusters.lowerBound)..<max(
                    max(first, clusters.lowerBound), min(first + perBlock, clusters.upperBound))
            guard range.contains(where: { wanted($0) != counts[$0] }) else { continue }
            var block = try file.read(Int(header.clusterSize), at: place)
            var sectors: Set<Int> = []
            for cluster in range where wanted(cluster) != counts[cluster] {
                header.store(count: UInt64(wanted(cluster)), Int(cluster - first), in: &block)
                sectors.insert(Int(cluster - first) << header.refcountOrder / 8 / 512)
            }
            for sector in sectors.sorted() {
                try file.write(Array(block[sector * 512..<sector * 512 + 512]), at: place + UInt64(sector * 512))
            }
            isChanged = true
        }
        return isChanged
    }

    /// The end of the clusters that are counted or used.
    var countedEnd: UInt64 { max(references.end, counts.end) }
}

extension QCOW2Header {
    /// Changes a count of a refcount block that is in memory.
    func store(count: UInt64, _ index: Int, in block: inout [UInt8]) {
        if refcountOrder < 3 {
            // Narrow counts begin with a byte's lowest bit.
            let bit = index << refcountOrder
            let mask = UInt8((1 << (1 << refcountOrder)) - 1) << UInt8(bit % 8)
            block[bit / 8] = block[bit / 8] & ~mask | UInt8(truncatingIfNeeded: count << UInt64(bit % 8)) & mask
        } else {
            let width = 1 << (refcountOrder - 3)
            for byte in 0..<width {
                block[(index + 1) * width - 1 - byte] = UInt8(truncatingIfNeeded: count >> UInt64(8 * byte))
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// All that the tables of an image refer to, counted, beside what its reference counts say.
///
/// The image must not be written meanwhile. Every entry is checked; one that cannot be right is an error of the report
/// and counts for nothing. Each table is read once, however many refer to it.
struct QCOW2Scan: ~Copyable {
    let header: QCOW2Header
    let file: TableFile
    let fileSize: UInt64
    /// Bytes of the file with the data, where that is known to be another one.
    private let dataSize: UInt64?
    private(set) var report = CheckReport()
    /// How often each cluster is referred to.
    private(set) var references: ClusterCounts
    /// How often the image counts each.
    private(set) var counts: ClusterCounts
    private(set) var snapshots = QCOW2SnapshotTable()
    /// The places of the refcount blocks by their number in the table; 0 for none, and for those that cannot be.
    private(set) var refcountBlocks: [UInt64] = []
    /// Those that cannot be.
    private var lostBlocks: Set<Int> = []
    /// L2 and L1 entries that cannot be right, by their place in the file, which zeroes would repair. An extended L2
    /// entry has two words.
    private(set) var broken: [Broken] = []

    /// What the image's bitmaps take, their directory and tables included, and their names.
    private(set) var bitmapClusters: [Range<UInt64>] = []
    private(set) var bitmapNames: [String] = []

    /// A snapshot's L1 table or a bitmap could not be read: more may be in use than was found.
    private(set) var isIncomplete = false

    struct Broken {
        let place: UInt64
        let replacement: [UInt64]
        /// How often the table that it is in is referred to as one. More references to the cluster mean that it may be
        /// no table at all.
        let uses: UInt32
    }

    typealias L1Entry = QCOW2Image.L1Entry
    typealias L2Entry = QCOW2Image.L2Entry

    /// A table that the end of the file cuts, and what else is beyond it.
    private(set) var cut: Cut?
    /// Snapshots that are left: those whose entry and whose L1 table's beginning are in the file.
    private(set) var keptSnapshots: [QCOW2SnapshotTable.Entry] = []
    private(set) var lostSnapshots = 0
    /// Some of what the bitmaps consist of is beyond the end of the file.
    private(set) var bitmapsAreCut = false

    /// A table at the end of the file that would be longer.
    struct Cut {
        /// Where its last cluster ends.
        var end: UInt64
        /// Bytes of its entries.
        var unit: UInt64
    }

    private static let maximumBroken = 1 << 20
    private static let l1Reserved: UInt64 = 0x7f00_0000_0000_01ff
    private static let l2Reserved: UInt64 = 0x3f00_0000_0000_01fe

    /// Reads and counts everything.
    static func scan(
        _ header: QCOW2Header, _ file: TableFile, fileSize: UInt64, dataSize: UInt64? = nil
    ) throws(DiskImageError) -> QCOW2Scan {
        // Room for what is written before what it replaces goes: no more than there is already, and an L1 table.
        let capacity = header.clusters(for: fileSize) &* 2 &+ (UInt64(64 << 20) >> UInt64(header.clusterBits)) &+ 1024
        let references = try ClusterCounts(capacity: capacity, path: file.path)
        let counts = try ClusterCounts(capacity: capacity, path: file.path)
        var scan = QCOW2Scan(header, file, fileSize: fileSize, dataSize: dataSize, references, counts)
        try scan.scanAll()
        return scan
    }

    private init(
        _ header: QCOW2Header, _ file: TableFile, fileSize: UInt64, dataSize: UInt64?,
        _ references: consuming ClusterCounts, _ counts: consuming ClusterCounts
    ) {
        self.header = header
        self.file = file
        self.fileSize = fileSize
        self.dataSize = dataSize
        self.references = references
        self.counts = counts
    }

    private mutating func scanAll() throws(DiskImageError) {
        report.totalClusters = header.clusters(for: header.size)
        references.add(1, to: 0)
        // Only the entries that the disk needs must be in the file.
        if !noteCut("the L1 table", at: header.l1Offset, UInt64(header.l1Count) * 8) {
            refer("the L1 table", at: header.l1Offset, UInt64(header.l1TableSize) * 8)
        }
        try scanRefcounts()
        try scanMapping()
        try scanBitmaps()
        if case .luks(let offset, let length) = header.encryption { refer("the LUKS header", at: offset, length) }
        compare()
        try checkFlags()
        report.imageEnd = max(references.usedEnd, counts.usedEnd) << clusterBits
    }

    private var clusterSize: UInt64 { header.clusterSize }
    private var clusterBits: UInt64 { UInt64(header.clusterBits) }

    // MARK: - References

    /// A reference to a range of the file. The last cluster may be truncated.
    @discardableResult
    private mutating func refer(
        _ what: @autoclosure () -> String, at place: UInt64, _ length: UInt64, times: UInt32 = 1
    ) -> Bool {
        guard length > 0 else { return true }
        let (end, overflow) = place.addingReportingOverflow(length)
        guard !overflow, place < fileSize, end <= fileSize || end - fileSize < clusterSize else {
            report.error("\(what()) at byte \(place) ends beyond the file")
            return false
        }
        references.add(Int64(times), to: place >> clusterBits..<(end - 1) >> clusterBits + 1)
        return true
    }

    /// A table that begins in the file and would end beyond it is an error; what there is of it counts.
    /// - Parameter unit: bytes of its entries.
    /// - Returns: whether it is one, the clusters of which that are there are counted.
    private mutating func noteCut(
        _ what: @autoclosure () -> String, at place: UInt64, _ length: UInt64, unit: UInt64 = 8, times: UInt32 = 1
    ) -> Bool {
        let (end, overflow) = place.addingReportingOverflow(length)
        guard !overflow, place < fileSize, end > fileSize else { return false }
        report.error("\(what()) at byte \(place) is truncated by the end of the file")
        let whole = (end + clusterSize - 1) & ~(clusterSize - 1)
        cut = Cut(end: max(cut?.end ?? 0, whole), unit: max(cut?.unit ?? 0, unit))
        references.add(Int64(times), to: place >> clusterBits..<(fileSize - 1) >> clusterBits + 1)
        return true
    }

    private mutating func scanRefcounts() throws(DiskImageError) {
        let tableSize = UInt64(header.refcountTableClusters) << clusterBits
        if !noteCut("the refcount table", at: header.refcountTableOffset, tableSize) {
            refer("the refcount table", at: header.refcountTableOffset, tableSize)
        }
        refcountBlocks = try file.readL1(header.refcountTableOffset, Int(tableSize / 8), fileSize)
        let perBlock = UInt64(1) << header.refcountBlockBits
        for index in refcountBlocks.indices where refcountBlocks[index] != 0 {
            let place = refcountBlocks[index]
            guard place & (clusterSize - 1) == 0, place < fileSize, clusterSize <= fileSize - place else {
                report.error("refcount block \(index) at byte \(place), which is not a cluster of the file")
                refcountBlocks[index] = 0
                lostBlocks.insert(index)
                continue
            }
            references.add(1, to: place >> clusterBits)
            let block = try file.read(Int(clusterSize), at: place)
            let first = UInt64(index) * perBlock
            header.forEachCount(block) { count, value in
                // Beyond what there is room for nothing can be in use.
                if first + count < counts.capacity {
                    counts[first + count] = UInt32(clamping: value)
                } else {
                    report.leak("cluster \(first + count), far beyond the end of the file, has a refcount")
                }
            }
        }
    }

    /// Indicates whether a cluster beyond the end of the file is counted, or was counted where the file has no counts
    /// any more.
    private func mayHaveBeen(_ cluster: UInt64) -> Bool {
        let block = cluster >> header.refcountBlockBits
        guard block < UInt64(refcountBlocks.count) else { return false }
        let isCut = header.refcountTableOffset >= fileSize || (fileSize - header.refcountTableOffset) / 8 <= block
        return counts[cluster] > 0 || isCut || lostBlocks.contains(Int(block))
    }

    /// The tables of the disk and of the snapshots, and how many L1 entries refer to each.
    private mutating func scanMapping() throws(DiskImageError) {
        // Those of the disk first, in its order, so that fragments can be counted.
        var order: [UInt64] = []
        var uses: [UInt64: UInt32] = [:]
        try collect("the disk", header.l1Offset, header.l1TableSize, &order, &uses)
        let ownTables = order.count
        snapshots = try QCOW2SnapshotTable(header, file, fileSize: fileSize, allowingCut: true)
        refer("the snapshot table", at: header.snapshotTableOffset, snapshots.length)
        if snapshots.lostCount > 0 {
            report.error(
                "the table of \(header.snapshotCount) snapshots at byte \(header.snapshotTableOffset) is beyond the end of the file, "
                    + (snapshots.entries.isEmpty
                        ? "and so are all snapshots" : "except for \(snapshots.entries.count) of them"))
            isIncomplete = true
        }
        var l1Bytes: UInt64 = 0
        defer { lostSnapshots = header.snapshotCount - keptSnapshots.count }
        for entry in snapshots.entries {
            let name = "the L1 table of snapshot \(entry.snapshot.id)"
            let length = UInt64(entry.l1Size) * 8
            // One that was there by the counts, as far as they are left, and is beyond the end, is lost, and the
            // snapshot with it.
            if entry.l1Offset < fileSize || length == 0 || !mayHaveBeen(entry.l1Offset >> clusterBits) {
                keptSnapshots.append(entry)
            }
            guard entry.l1Offset & (clusterSize - 1) == 0 else {
                report.error("\(name) at byte \(entry.l1Offset), which is not cluster-aligned")
                isIncomplete = true
                continue
            }
            guard noteCut(name, at: entry.l1Offset, length) || refer(name, at: entry.l1Offset, length) else {
                isIncomplete = true
                continue
            }
            // Tables of their own have room in the file.
            l1Bytes += length
            guard l1Bytes <= fileSize &+ UInt64(QCOW2Header.maximumL1Size) else {
                throw .invalid(path: file.path, reason: "the L1 tables of its snapshots overlap")
            }
            try collect("snapshot \(entry.snapshot.id)", entry.l1Offset, entry.l1Size, &order, &uses)
        }
        for (index, table) in order.enumerated() {
            try scanTable(table, uses: uses[table] ?? 1, isOwn: index < ownTables)
        }
    }

    private mutating func collect(
        _ whose: String, _ offset: UInt64, _ count: Int, _ order: inout [UInt64], _ uses: inout [UInt64: UInt32]
    ) throws(DiskImageError) {
        // What is beyond the end of the file says nothing.
        let there = offset < fileSize ? Int(min(UInt64(count), (fileSize - offset) / 8)) : 0
        for (index, entry) in try file.readTable(there, at: offset).enumerated() where entry != 0 {
            let table = entry & L1Entry.offset
            let place = offset + UInt64(index) * 8
            guard table & (clusterSize - 1) == 0, table < fileSize else {
                report.error(
                    "L1 entry \(index) of \(whose): an L2 table at byte \(table), which is not a cluster of the file")
                repair(place, [0], uses: 1)
                continue
            }
            if entry & Self.l1Reserved != 0 {
                report.error("L1 entry \(index) of \(whose) has reserved bits set")
                repair(place, [entry & ~Self.l1Reserved], uses: 1)
            }
            guard table != 0 else { continue }
            if let known = uses[table] {
                uses[table] = known == .max ? .max : known + 1
            } else {
                uses[table] = 1
                order.append(table)
            }
        }
    }

    private mutating func repair(_ place: UInt64, _ replacement: [UInt64], uses: UInt32) {
        if broken.count < Self.maximumBroken {
            broken.append(Broken(place: place, replacement: replacement, uses: uses))
        }
    }

    /// The clusters that an L2 table refers to.
    private mutating func scanTable(_ table: UInt64, uses: UInt32, isOwn: Bool) throws(DiskImageError) {
        let words = header.hasExtendedL2 ? 2 : 1
        if !noteCut("the L2 table", at: table, clusterSize, unit: UInt64(8 * words), times: uses) {
            references.add(Int64(uses), to: table >> clusterBits)
        }
        let entries = try file.readL1(table, Int(clusterSize / 8), fileSize)
        var next: UInt64 = 0
        for index in stride(from: 0, to: entries.count, by: words) {
            let entry = entries[index], bitmap = words == 2 ? entries[index + 1] : 0
            guard entry != 0 || bitmap != 0 else { continue }
            if let problem = header.problem(of: entry, bitmap, fileSize: fileSize) {
                report.error("entry \(index / words) of the L2 table at byte \(table): \(problem)")
                repair(table + UInt64(index) * 8, header.zeroEntry, uses: uses)
                continue
            }
            if entry & L2Entry.compressed != 0 {
                let (place, length) = header.compressedRange(entry)
                refer("a compressed cluster", at: place, length, times: uses)
                if isOwn {
                    report.allocatedClusters += 1
                    report.compressedClusters += 1
                    // By their nature.
                    report.fragmentedClusters += 1
                }
                continue
            }
            if entry & (header.hasExtendedL2 ? Self.l2Reserved | 1 : Self.l2Reserved) != 0 {
                report.error("entry \(index / words) of the L2 table at byte \(table) has reserved bits set")
                repair(
                    table + UInt64(index) * 8,
                    [entry & ~(header.hasExtendedL2 ? Self.l2Reserved | 1 : Self.l2Reserved)], uses: uses)
            }
            let place = entry & L2Entry.offset
            guard place != 0 || (header.hasDataFile && entry & L2Entry.copied != 0) else { continue }
            if let dataSize, place >= dataSize {
                report.error(
                    "entry \(index / words) of the L2 table at byte \(table): a data cluster at byte \(place), beyond the end of the data file"
                )
                repair(table + UInt64(index) * 8, header.zeroEntry, uses: uses)
                continue
            }
            // A data file's clusters are not counted.
            if !header.hasDataFile { references.add(Int64(uses), to: place >> clusterBits) }
            if isOwn {
                report.allocatedClusters += 1
                if next != 0, place != next { report.fragmentedClusters += 1 }
                next = place + clusterSize
            }
        }
    }

    /// The bitmaps that the image says are true: their directory, tables and data.
    private mutating func scanBitmaps() throws(DiskImageError) {
        guard let directory = header.bitmaps else { return }
        // Until all of it has been read.
        let wasIncomplete = isIncomplete
        isIncomplete = true
        let found = try QCOW2BitmapDirectory(directory, header, file, fileSize: fileSize)
        if let problem = found.problem {
            bitmapsAreCut = directory.offset >= fileSize || directory.size > fileSize - directory.offset
            return report.error(problem)
        }
        bitmapNames = found.entries.map(\.bitmap.name)
        referToBitmap("the directory of bitmaps", at: directory.offset, directory.size)
        var tableBytes: UInt64 = 0, isWhole = true
        for entry in found.entries {
            guard QCOW2BitmapDirectory.hasTable(entry, header, fileSize: fileSize) else {
                report.error("a bitmap's table of \(entry.count) entries at byte \(entry.table)")
                if entry.table >= fileSize || entry.count * 8 > fileSize - entry.table { bitmapsAreCut = true }
                isWhole = false
                continue
            }
            referToBitmap("the table of a bitmap", at: entry.table, entry.count * 8)
            // Tables of their own have room in the file.
            tableBytes += entry.count * 8
            guard tableBytes <= fileSize else { return report.error("the tables of its bitmaps overlap") }
            try QCOW2BitmapDirectory.forEachPlace(entry, file) { place in
                referToBitmap("a bitmap", at: place, clusterSize)
            }
        }
        isIncomplete = wasIncomplete || !isWhole
    }

    private mutating func referToBitmap(_ what: String, at place: UInt64, _ length: UInt64) {
        guard length > 0 else { return }
        guard refer(what, at: place, length) else {
            if place >= fileSize || length > fileSize - place { bitmapsAreCut = true }
            return
        }
        let (first, count) = (place >> clusterBits, header.clusters(for: length))
        if let last = bitmapClusters.last, last.upperBound == first {
            bitmapClusters[bitmapClusters.count - 1] = last.lowerBound..<first + count
        } else {
            bitmapClusters.append(first..<first + count)
        }
    }

    // MARK: - Comparing

    private mutating func compare() {
        let end = max(references.end, counts.end)
        for cluster in 0..<end {
            let wanted = references[cluster], counted = counts[cluster]
            if wanted == counted { continue }
            if counted > wanted {
                report.leak("cluster \(cluster) has a refcount of \(counted) and \(wanted) references")
            } else {
                report.error("cluster \(cluster) has \(wanted) references and a refcount of \(counted)")
            }
        }
    }

    /// The COPIED flags of the disk's own tables, for clusters with a refcount of one: a writer relies on them.
    private mutating func checkFlags() throws(DiskImageError) {
        let words = header.hasExtendedL2 ? 2 : 1
        var seen: Set<UInt64> = []
        for (index, entry) in try file.readL1(header, fileSize).enumerated() {
            let table = entry & L1Entry.offset
            guard table != 0, table & (clusterSize - 1) == 0, table < fileSize, clusterSize <= fileSize - table else {
                continue
            }
            let count = counts[table >> clusterBits], isOnce = entry & L1Entry.copied != 0
            if isOnce != (count == 1) {
                report.error(
                    "L1 entry \(index) \(isOnce ? "has" : "lacks") the flag of a refcount of one; the refcount of its table is \(count)"
                )
            }
            guard seen.insert(table).inserted else { continue }
            let entries = try file.readTable(Int(clusterSize / 8), at: table)
            for index in stride(from: 0, to: entries.count, by: words) where entries[index] != 0 {
                let entry = entries[index]
                guard !header.hasDataFile,
                    header.problem(of: entry, words == 2 ? entries[index + 1] : 0, fileSize: fileSize) == nil
                else { continue }
                let place = entry & L2Entry.offset
                guard entry & L2Entry.compressed == 0, place != 0 else { continue }
                let isOnce = counts[place >> clusterBits] == 1
                if (entry & L2Entry.copied != 0) != isOnce {
                    report.error(
                        "entry \(index / words) of the L2 table at byte \(table) \(isOnce ? "lacks" : "has") the flag of a refcount of one, in contrast to its cluster"
                    )
                }
            }
        }
    }
}

extension QCOW2Header {
    /// log2 of the counts in a refcount block.
    var refcountBlockBits: UInt64 { UInt64(clusterBits + 3 - refcountOrder) }

    /// The highest count.
    var maximumCount: UInt64 { refcountOrder == 6 ? .max : (1 << (1 << UInt64(refcountOrder))) - 1 }

    /// What an L2 entry becomes that is to read as zeroes.
    var zeroEntry: [UInt64] {
        if hasExtendedL2 { return [0, 0xffff_ffff << 32] }
        return [version >= 3 ? QCOW2Image.L2Entry.zero : 0]
    }

    /// Why an L2 entry with its bitmap, if it has one, cannot be right; nil if it can.
    func problem(of entry: UInt64, _ bitmap: UInt64, fileSize: UInt64) -> String? {
        if entry & QCOW2Image.L2Entry.compressed != 0 {
            if hasDataFile { return "a compressed cluster in an image with an external data file" }
            if bitmap != 0 { return "a compressed cluster with subclusters" }
            let (place, length) = compressedRange(entry)
            let (end, overflow) = place.addingReportingOverflow(length)
            guard !overflow, place < fileSize, end <= fileSize || end - fileSize < clusterSize else {
                return "a compressed cluster at byte \(place), beyond the end of the file"
            }
            return nil
        }
        if version < 3, entry & 1 != 0 { return "a zero cluster in an image of version 2" }
        let place = entry & QCOW2Image.L2Entry.offset
        guard place & (clusterSize - 1) == 0 else {
            return "a data cluster at byte \(place), which is not cluster-aligned"
        }
        guard hasDataFile || place < fileSize || place == 0 else {
            return "a data cluster at byte \(place), beyond the end of the file"
        }
        guard hasExtendedL2 else { return nil }
        if bitmap & bitmap >> 32 & 0xffff_ffff != 0 { return "a subcluster that is both zero and allocated" }
        if place == 0, !hasDataFile, bitmap & 0xffff_ffff != 0 { return "allocated subclusters without a cluster" }
        return nil
    }

    /// Calls with every count of a refcount block that is not 0, and its number in the block.
    func forEachCount(_ block: [UInt8], _ body: (UInt64, UInt64) -> Void) {
        let order = refcountOrder
        block.withReadableIOMemory { bytes in
            // Most of a block is zeroes, or a run; eight bytes at a time pass quickly. A block is at least 512 bytes
            // long.
            for word in 0..<bytes.count / 8 where bytes.load(word * 8, as: UInt64.self) != 0 {
                let value = bytes.load(bigEndian: word * 8, as: UInt64.self)
                let perWord = 64 >> order
                for index in 0..<perWord {
                    let count: UInt64
                    if order >= 3 {
                        let width = UInt64(1) << UInt64(order)
                        let shifted = value >> (64 - width * UInt64(index + 1))
                        count = order == 6 ? shifted : shifted & ((1 << width) - 1)
                    } else {
                        // Narrow counts begin with a byte's lowest bit.
                        let bit = index << order
                        let byte = value >> UInt64(56 - bit / 8 * 8) & 0xff
                        count = byte >> UInt64(bit % 8) & ((1 << (1 << UInt64(order))) - 1)
                    }
                    if count != 0 { body(UInt64(word * perWord + index), count) }
                }
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The metadata of one open qcow2 image: its L1 table, caches of L2 tables and of decompressed clusters, and, in one
/// that is written, reference counts.
struct QCOW2Image: ImageMetadata, ~Copyable {
    let header: QCOW2Header
    let statistics: FileStatistics
    /// What was first found wrong, and where.
    private(set) var damage: FoundDamage?

    /// Bytes that the file has, or will have when what is allocated has been written.
    private(set) var fileSize: UInt64
    /// What is missing at the end of the file is damage, where it is met.
    let isSalvaging: Bool
    /// How long it really is, once it was made longer ahead of what is written.
    var grownSize: UInt64
    /// `header.l1Count` entries, in the file's byte order.
    var l1: BigEndianTable
    /// Pieces of L2 tables, each known by the number of the piece of the disk that it maps.
    var l2Slices: BlockCache
    let sliceBits: Int
    /// Decompressed clusters, each known by its place in the file. A block is a cluster, followed by room for its
    /// compressed bytes.
    private var clusters: BlockCache
    private let decompressor: Decompressor
    /// Held while the decompressor's only state is used.
    private let decompression = Lock()

    // What follows is for an image that is written.

    var refcounts: Refcounts?
    /// Indicates whether another image shows where this one has nothing, so that zeroes must be explicit. One that gets
    /// a backing file has it before its header does.
    var hasBacking: Bool
    /// L1 entries that the file does not have.
    var dirtyL1: Range<Int>?
    /// While a commit has written reference counts and not yet what refers to the clusters, neither changes.
    var isLocked = false
    /// Why nothing can be written any more, an errno value: the host may have lost data that it had accepted.
    var failure: Int32 = 0
    var autoclearFeatures: UInt64
    /// What the first change makes untrue.
    var bitmaps: LiveBitmaps?
    /// The image is marked as damaged.
    var isMarked = false

    enum L1Entry {
        static let offset: UInt64 = 0x00ff_ffff_ffff_fe00
        static let copied: UInt64 = 1 << 63
    }

    enum L2Entry {
        static let offset: UInt64 = 0x00ff_ffff_ffff_fe00
        /// The cluster is counted once, so it is written in place.
        static let copied: UInt64 = 1 << 63
        static let zero: UInt64 = 1
        static let compressed: UInt64 = 1 << 62
    }

    /// L2 tables are cached in pieces of this many bytes: a random access does not pay for a whole table of 2 MiB.
    private static let sliceSize = 4096
    private static let subclusters = 32

    /// - Parameters:
    ///   - snapshot: whose id or name has the state that is read in place of the current one.
    ///   - size: bytes of the disk, if it is to have others than the header says; its L1 table has room for them.
    ///   - salvaging: whether a truncated file is opened anyway, to read what is left of it.
    ///   - statistics: those of the caches.
    init(
        _ file: borrowing ImageFile, metadataCacheSize: Int, writable: Bool = false, snapshot: String? = nil,
        size: UInt64? = nil, salvaging: Bool = false, statistics: FileStatistics = FileStatistics()
    ) throws(DiskImageError) {
        var header = try QCOW2Header(file, allowingCut: salvaging)
        let tableFile = TableFile(path: file.path, file: MetadataFile(calls: .host, number: file.descriptor.rawValue))
        let snapshots =
            try writable || snapshot != nil
            ? QCOW2SnapshotTable(header, tableFile, fileSize: file.size, allowingCut: salvaging) : QCOW2SnapshotTable()
        if let snapshot {
            guard let index = snapshots.index(of: snapshot) else { throw .noSnapshot(path: file.path, name: snapshot) }
            let entry = snapshots.entries[index]
            try header.map(
                entry.snapshot.size, entry.l1Offset, entries: UInt64(entry.l1Size),
                "the L1 table of snapshot \(entry.snapshot.id)", file, allowingCut: salvaging)
        }
        if let size { try header.map(size, header.l1Offset, entries: UInt64(header.l1TableSize), "the L1 table", file) }
        let entrySize = header.hasExtendedL2 ? 16 : 8
        let sliceSize = min(Self.sliceSize, Int(header.clusterSize))
        let sliceBits = (sliceSize / entrySize).trailingZeroBitCount
        let covered = UInt64(header.clusterBits + sliceBits)
        // Rounded up; the size is far from 2^64.
        let wanted = (header.size >> covered) &+ 1
        let allowed = UInt64(min(max(metadataCacheSize, 0), 1 << 30) / sliceSize)
        let clusterSize = Int(header.clusterSize)
        var l1 = try BigEndianTable(count: header.l1Count, file.path)
        let l2Slices = try BlockCache(
            blockSize: sliceSize, count: Int(max(8, min(wanted, allowed))), statistics: statistics.mapping, file.path)
        // The compressed form is at most two clusters long, by the width of its length field.
        let clusters = try BlockCache(
            blockSize: 3 * clusterSize, count: 8, statistics: statistics.decompressed, file.path)
        guard let decompressor = Decompressor(header.compression) else {
            throw .system(path: file.path, SystemCallError("inflateInit", errno: ENOMEM))
        }
        // The header's check has found the entries in the file, or, of one that is salvaged, the first of them.
        let there = Int(min(UInt64(header.l1Count), (file.size - min(file.size, header.l1Offset)) / 8))
        try file.read("the L1 table", into: l1.bytes(0..<there), at: header.l1Offset)
        for index in there..<header.l1Count { l1[index] = Self.missingEntry }

        if writable {
            try header.requireWritable(file.path)
            var metadata = MetadataClusters()
            // L1 entries are checked when they are used; one that cannot be right protects nothing of value.
            var tables: [UInt64] = []
            for index in 0..<header.l1Count {
                let table = l1[index] & L1Entry.offset
                if table != 0 { tables.append(table >> UInt64(header.clusterBits)) }
            }
            metadata.insert(tables)
            let l1First = header.l1Offset >> UInt64(header.clusterBits)
            let l1Clusters = (UInt64(header.l1TableSize) * 8 + header.clusterSize - 1) >> UInt64(header.clusterBits)
            metadata.insert(l1First..<l1First + l1Clusters)
            metadata.insert(CollectionOfOne(0))
            func protect(_ place: UInt64, _ length: UInt64) {
                let first = place >> UInt64(header.clusterBits)
                metadata.insert(first..<first + header.clusters(for: length))
            }
            if case .luks(let offset, let length) = header.encryption { protect(offset, length) }
            if snapshots.length > 0 { protect(header.snapshotTableOffset, snapshots.length) }
            // Those of snapshots are not written, and the guest's data is not to be in them either.
            for entry in snapshots.entries where entry.l1Offset <= file.size {
                protect(entry.l1Offset, UInt64(entry.l1Size) * 8)
            }
            refcounts = try Refcounts(header, file, metadata: metadata, statistics: statistics.refcounts)
            bitmaps = try LiveBitmaps(header, tableFile, fileSize: file.size)
        } else {
            refcounts = nil
            bitmaps = nil
        }
        hasBacking = header.backingName != nil
        autoclearFeatures = header.autoclearFeatures
        // The start of a table that the end of the file cuts is there.
        fileSize = salvaging ? header.clusters(for: file.size) << UInt64(header.clusterBits) : file.size
        grownSize = file.size
        isSalvaging = salvaging
        self.header = header
        self.statistics = statistics
        self.sliceBits = sliceBits
        self.l1 = l1
        self.l2Slices = l2Slices
        self.clusters = clusters
        self.decompressor = decompressor
    }

    /// The header with what has changed since it was read: the place of the refcount table, and autoclear features.
    var currentHeader: QCOW2Header {
        switch refcounts {
        case .some(let refcounts):
            header.with(refcountTable: refcounts.tableOffset, refcounts.tableClusters, autoclear: autoclearFeatures)
        case nil: header
        }
    }

    var clusterSize: UInt64 { header.clusterSize }

    mutating func locate(_ offset: UInt64, _ length: UInt64, _ compressedEntry: inout UInt64) -> RangeLookup {
        // Of an image that is written, the entry may have changed meanwhile.
        if compressedEntry != 0, refcounts == nil { return compressed(compressedEntry, offset, length) }
        // Below the disk's size, so below `l1Count`, which was computed from it.
        let table = l1[Int(offset >> tableCover)] & L1Entry.offset
        if table == 0 { return .unallocated(length: min(length, restOfTable(offset))) }
        switch slice(offset, table: table) {
        case .entries(let entries): return walk(entries, offset, length, &compressedEntry)
        case .unresolved(let lookup): return lookup
        }
    }

    /// log2 of the bytes that an L2 table maps.
    var tableCover: UInt64 { UInt64(header.clusterBits + header.l2Bits) }

    func restOfTable(_ offset: UInt64) -> UInt64 { (1 << tableCover) - (offset & ((1 << tableCover) - 1)) }

    /// The number of the slice that maps an offset.
    func sliceNumber(_ offset: UInt64) -> UInt64 { offset >> UInt64(header.clusterBits + sliceBits) }

    /// The place of a slice of an L2 table.
    func place(ofSlice slice: UInt64, table: UInt64) -> UInt64 {
        table + (slice & ((1 << UInt64(header.l2Bits - sliceBits)) - 1)) * UInt64(l2Slices.blockSize)
    }

    enum Slice {
        /// The slot of the cache that it is in.
        case entries(Int)
        /// A load, a wait or a failure.
        case unresolved(RangeLookup)
    }

    /// The slice of the L2 table at `table`, which is not 0, for an offset.
    mutating func slice(_ offset: UInt64, table: UInt64) -> Slice {
        guard table & (header.clusterSize - 1) == 0 else {
            return .unresolved(damaged(missing(table) ?? .l2TableMisaligned(offset: table), at: offset))
        }
        guard table <= fileSize, header.clusterSize <= fileSize - table else {
            return .unresolved(damaged(missing(table) ?? .l2TableBeyondEnd(offset: table), at: offset))
        }
        let slice = sliceNumber(offset)
        switch l2Slices.find(slice) {
        case .ready(let entries): return .entries(entries)
        case .loading: return .unresolved(.wait)
        case .failed(let error): return .unresolved(.failed(error))
        case .missing:
            guard let slot = l2Slices.reserve(slice) else { return .unresolved(l2Slices.isDirty ? .commit : .wait) }
            return .unresolved(
                .load(
                    MetadataLoad(
                        kind: .table, slot: slot, offset: place(ofSlice: slice, table: table),
                        buffer: l2Slices.block(slot), diskOffset: offset)))
        }
    }

    /// The file has been given clusters up to this byte.
    mutating func extend(to end: UInt64) { fileSize = max(fileSize, end) }

    @discardableResult
    mutating func complete(_ load: MetadataLoad, bytes: Int, error: Int32) -> Int32 {
        var error = error
        switch load.kind {
        case .table:
            // It was inside the file when the image was opened, so a short read means that the file was truncated
            // since.
            if error == 0, bytes < load.length {
                if isSalvaging { markMissing(load, from: bytes) } else { error = EIO }
            }
            l2Slices.complete(load.slot, error: error)
        case .compressed:
            if error == 0, !(load.isIntact ?? decompress(load, bytes)) {
                _ = damaged(.compressedClusterBroken(offset: load.offset), at: load.diskOffset)
                error = EIO
            }
            clusters.complete(load.slot, error: error)
        }
        return error
    }

    func decompress(_ load: MetadataLoad, _ bytes: Int) -> Bool {
        decompression.lock()
        defer { decompression.unlock() }
        return decompressor.decompress(
            load.buffer.prefix(bytes), into: clusters.block(load.slot).prefix(Int(header.clusterSize)))
    }

    mutating func unpin(_ load: MetadataLoad) {
        switch load.kind {
        case .table: l2Slices.unpin(load.slot)
        case .compressed: clusters.unpin(load.slot)
        }
    }

    // MARK: - L2 entries

    /// Collects as many units as are stored alike, one after the other. `entries` is a slice of `1 << sliceBits`
    /// entries.
    private mutating func walk(
        _ entries: Int, _ offset: UInt64, _ length: UInt64, _ compressedEntry: inout UInt64
    ) -> RangeLookup {
        let unitBits = UInt64(header.clusterBits - (header.hasExtendedL2 ? 5 : 0))
        let unitsInSlice = 1 << (sliceBits + (header.hasExtendedL2 ? 5 : 0))
        let unitSize: UInt64 = 1 << unitBits
        let first = Int(offset >> unitBits) & (unitsInSlice - 1)
        let inUnit = offset & (unitSize - 1)

        let unit = self.unit(entries, first)
        if case .compressed(let entry) = unit {
            if let damage = misplaced(unit, at: offset) { return damaged(damage, at: offset) }
            compressedEntry = entry
            return compressed(entry, offset, length)
        }
        if case .damaged(let damage) = unit { return damaged(damage, at: offset) }
        if let damage = misplaced(unit, at: offset - inUnit) { return damaged(damage, at: offset) }

        // The run's length, from the start of its first unit.
        var run = unitSize
        var next = first + 1
        while run - inUnit < length, next < unitsInSlice, unit.continues(with: self.unit(entries, next), after: run) {
            run += unitSize
            next += 1
        }
        let found = min(length, run - inUnit)
        switch unit {
        case .unallocated: return .unallocated(length: found)
        case .zero: return .zero(length: found)
        case .data(let place): return .data(offset: place + inUnit, length: found)
        case .compressed, .damaged: return .failed(EIO)
        }
    }

    /// Reads and checks the entry of a unit; `index` is below the slice's number of units.
    func unit(_ entries: Int, _ index: Int) -> StoredUnit {
        guard header.hasExtendedL2 else {
            let entry = l2Entry(entries, index)
            if entry & L2Entry.compressed != 0 { return .compressed(entry) }
            if entry & L2Entry.zero != 0 { return header.version >= 3 ? .zero : .damaged(.zeroFlagInVersion2) }
            return cluster(entry)
        }
        let entry = l2Entry(entries, index / Self.subclusters * 2)
        if entry & L2Entry.compressed != 0 { return .compressed(entry) }
        // Subcluster n: bit n says allocated, bit 32 + n reads as zeroes.
        let bitmap = l2Entry(entries, index / Self.subclusters * 2 + 1)
        let subcluster = UInt64(index % Self.subclusters)
        switch (bitmap >> subcluster & 1, bitmap >> (subcluster + 32) & 1) {
        case (0, 0): return .unallocated
        case (0, _): return .zero
        case (_, 0):
            guard case .data(let place) = cluster(entry) else {
                let damage = cluster(entry)
                return damage == .unallocated ? .damaged(.clusterMisaligned(offset: 0)) : damage
            }
            return .data(place + subcluster << UInt64(header.clusterBits - 5))
        default: return .damaged(.subclusterBothZeroAndAllocated)
        }
    }

    /// In a file of its own data has the place that it has on the disk; `offset` is that of the unit.
    func misplaced(_ unit: StoredUnit, at offset: UInt64) -> ImageDamage? {
        guard header.hasDataFile else { return nil }
        switch unit {
        case .data(let place) where place != offset: return .clusterMisplaced(offset: place)
        case .compressed: return .clusterMisplaced(offset: offset)
        default: return nil
        }
    }

    private func cluster(_ entry: UInt64) -> StoredUnit {
        let place = entry & L2Entry.offset
        // A file of its own has the guest's data from its first byte on.
        if place == 0, !header.hasDataFile || entry & L2Entry.copied == 0 { return .unallocated }
        guard place & (header.clusterSize - 1) == 0 else {
            return .damaged(missing(place) ?? .clusterMisaligned(offset: place))
        }
        if header.hasDataFile { return .data(place) }
        // The last cluster of the file may be cut short, what is missing reads as zeroes; none starts beyond the end.
        guard place < fileSize else { return .damaged(missing(place) ?? .clusterBeyondEnd(offset: place)) }
        return .data(place)
    }

    /// Of an entry that cannot be right: whether it is because there is none.
    private func missing(_ place: UInt64) -> ImageDamage? {
        isSalvaging && place == Self.missingEntry ? .entryMissing : nil
    }

    private mutating func compressed(_ entry: UInt64, _ offset: UInt64, _ length: UInt64) -> RangeLookup {
        let (place, sectorLength) = header.compressedRange(entry)
        guard place < fileSize else { return damaged(.clusterBeyondEnd(offset: place), at: offset) }
        let inCluster = offset & (header.clusterSize - 1)

        switch clusters.find(place) {
        case .ready(let slot):
            return .memory(clusters.block(slot).piece(Int(inCluster), Int(min(length, header.clusterSize - inCluster))))
        case .loading: return .wait
        case .failed(let error): return .failed(error)
        case .missing:
            guard let slot = clusters.reserve(place) else { return .wait }
            // The last sector may be cut short by the end of the file.
            let bytes = min(sectorLength, fileSize - place)
            return .load(
                MetadataLoad(
                    kind: .compressed, slot: slot, offset: place,
                    buffer: clusters.block(slot).piece(Int(header.clusterSize), Int(bytes)),
                    diskOffset: offset))
        }
    }

    mutating func damaged(_ damage: ImageDamage, at offset: UInt64) -> RangeLookup {
        // Salvaging reports each of them.
        if self.damage == nil || isSalvaging {
            self.damage = FoundDamage(damage: damage, entry: entry(at: offset), diskOffset: offset)
        }
        return .failed(EIO)
    }

    /// Notes a damage of what counts clusters.
    mutating func note(_ damage: FoundDamage) { self.damage = damage }

    /// A word of the slice in a slot of the cache.
    @inline(__always) func l2Entry(_ entries: Int, _ index: Int) -> UInt64 { l2Slices.word(index, of: entries) }
}

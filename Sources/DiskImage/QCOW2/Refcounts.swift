// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The reference counts of the clusters of an image that is open for writing: clusters are allocated and freed here.
///
/// Counts change in memory; ``writeSlices(_:)`` and ``writeTable(_:)`` bring them to the file, in the order of
/// docs/qcow2.md. What is freed stays taken until nothing durable and nothing under way can reach it: see
/// ``release(before:_:)``.
struct Refcounts: ~Copyable {
    private struct Free {
        var run: ClusterRun
        /// Operations with smaller numbers may still use the clusters.
        var sequence: UInt64
    }

    /// An allocation since the counts were last made durable: nothing may refer to its clusters before they are.
    var needsBarrier = false
    /// Where tables are that only a damaged image would have the guest's data in.
    private(set) var metadata: MetadataClusters

    /// What was first found wrong.
    private(set) var damage: Damage?

    enum Damage {
        /// A cluster of the image's own metadata has a refcount of 0, by this entry.
        case countedAsFree(UInt64, TableEntry)
        /// All clusters from this one on, beyond the end of the file, have refcounts, as far as they were searched; the
        /// entry is the first one's.
        case countedBeyondEnd(UInt64, TableEntry)
    }

    private let clusterBits: UInt64
    private let order: UInt64
    private(set) var tableOffset: UInt64
    var tableClusters: Int { table.count >> Int(clusterBits - 3) }
    /// Places of refcount blocks; 0 where every count is 0.
    private var table: [UInt64]
    /// Entries that the file does not have.
    private var dirtyTable: Range<Int>?
    private var slices: BlockCache
    /// Where the search for free clusters continues.
    private var next: UInt64 = 0
    /// No cluster from here on was ever used.
    private var pristine: UInt64
    private var frees: [Free] = []
    /// How many of them no durable reference will be left to when the commit under way has written the mapping.
    private var sealed = 0

    private static let sliceSize = 4096
    private static let maximumTableSize: UInt64 = 8 << 20
    /// Slices that are looked through for one allocation.
    private static let maximumSearch = 4096
    /// As many lists of freed clusters as are kept without a commit.
    private static let maximumFrees = 4096

    init(
        _ header: QCOW2Header, _ file: borrowing ImageFile, metadata: consuming MetadataClusters,
        statistics: CacheStatistics
    ) throws(DiskImageError) {
        let clusterSize = header.clusterSize
        let bytes = try file.read(
            "the refcount table", count: header.refcountTableClusters << header.clusterBits,
            at: header.refcountTableOffset)
        var table: [UInt64] = []
        table.reserveCapacity(bytes.count / 8)
        for entry in 0..<bytes.count / 8 {
            let place = bytes.bigEndian64(at: entry * 8)
            guard place & (clusterSize - 1) == 0, place < file.size else {
                let start = header.refcountTableOffset
                let entry = TableEntry(table: .refcountTable, start: start, offset: start + UInt64(entry * 8))
                let reason = place < file.size ? "which is not cluster-aligned" : "beyond the end of the file"
                throw .invalid(path: file.path, reason: "\(entry): a refcount block at byte \(place), \(reason)")
            }
            table.append(place)
        }
        metadata.insert(table.lazy.filter { $0 != 0 }.map { $0 >> UInt64(header.clusterBits) })
        let tableStart = header.refcountTableOffset >> UInt64(header.clusterBits)
        metadata.insert(tableStart..<tableStart + UInt64(header.refcountTableClusters))

        let sliceSize = min(Self.sliceSize, Int(clusterSize))
        slices = try BlockCache(blockSize: sliceSize, count: 1024, statistics: statistics, file.path)
        clusterBits = UInt64(header.clusterBits)
        order = UInt64(header.refcountOrder)
        tableOffset = header.refcountTableOffset
        self.table = table
        pristine = (file.size &+ (clusterSize - 1)) >> clusterBits
        self.metadata = metadata
        frees.reserveCapacity(Self.maximumFrees)
    }

    // MARK: - Allocation

    /// Takes at most `wanted` neighbouring clusters, at least one.
    mutating func allocate(_ wanted: UInt64, _ file: MetadataFile) throws(MetadataError) -> ClusterRun {
        var searched = 0
        while true {
            // In an image that is full for as long as this, free clusters are left to another session. One that is full
            // beyond its end lies.
            if searched == Self.maximumSearch { next = max(next, pristine) }
            guard searched <= 2 * Self.maximumSearch else {
                throw damaged(.countedBeyondEnd(pristine, entry(of: pristine)))
            }
            searched += 1
            let block = next >> blockBits
            if block >= UInt64(table.count) || table[Int(block)] == 0 { try addBlock(block, file) }
            guard let slot = try slot(of: next, file) else { throw .failed(EIO) }
            let sliceEnd = ((next >> sliceBits) + 1) << sliceBits
            while next < sliceEnd, get(slot, next) != 0 { next += 1 }
            guard next < sliceEnd else { continue }
            var run = ClusterRun(first: next, count: 0, isPristine: next >= pristine)
            while next < sliceEnd, run.count < wanted, get(slot, next) == 0 {
                // A count of 0 for a table of the image itself: whatever is written would destroy more.
                guard !metadata.contains(next) else { throw damaged(.countedAsFree(next, entry(of: next))) }
                set(slot, next, 1)
                next += 1
                run.count += 1
            }
            slices.markDirty(slot)
            needsBarrier = true
            pristine = max(pristine, next)
            return run
        }
    }

    private mutating func damaged(_ damage: Damage) -> MetadataError {
        if self.damage == nil { self.damage = damage }
        return .failed(EIO)
    }

    /// The entry with the count of a cluster: that of a refcount block, or of the table if it has no block.
    private func entry(of cluster: UInt64) -> TableEntry {
        let index = cluster >> blockBits
        guard index < UInt64(table.count) else {
            return TableEntry(table: .refcountTable, start: tableOffset, offset: nil)
        }
        let block = table[Int(index)]
        guard block != 0 else {
            return TableEntry(table: .refcountTable, start: tableOffset, offset: tableOffset + index * 8)
        }
        let bits = (cluster & (1 << blockBits - 1)) << order
        return TableEntry(table: .refcountBlock, start: block, offset: block + bits / 8)
    }

    /// What a cluster is, if it is one of the table or a block.
    func kind(ofCluster cluster: UInt64) -> QCOW2Metadata? {
        let first = tableOffset >> clusterBits
        if cluster >= first, cluster - first < UInt64(tableClusters) { return .refcountTable }
        return cluster != 0 && table.contains { $0 >> clusterBits == cluster } ? .refcountBlock : nil
    }

    /// Looks for free clusters beyond all that were ever used, until some are freed.
    mutating func allocateAtEnd() { next = max(next, pristine) }

    /// Notes that a reference to clusters has gone. `sequence`: operations with smaller numbers may still use them.
    mutating func free(_ run: ClusterRun, _ sequence: UInt64) {
        if frees.count > sealed, let last = frees.last, last.run.first &+ last.run.count == run.first,
            last.run.first >> sliceBits == run.first >> sliceBits
        {
            frees[frees.count - 1].run.count &+= run.count
            frees[frees.count - 1].sequence = max(last.sequence, sequence)
        } else {
            frees.append(Free(run: run, sequence: sequence))
        }
    }

    /// The references that have gone so far are those that the next ``release(before:_:)`` is about.
    mutating func seal() { sealed = frees.count }
    var hasFrees: Bool { !frees.isEmpty }
    var hasManyFrees: Bool { frees.count >= Self.maximumFrees }

    /// Decrements the refcounts of the sealed references, and frees the space of clusters that have none left. Clusters
    /// that an operation may still use (`before` is the number of the first one) stay for later. No durable reference
    /// may be left.
    mutating func release(before: UInt64, _ file: MetadataFile) throws(MetadataError) {
        var kept: [Free] = []
        var failure: MetadataError?
        for free in frees.prefix(sealed) {
            guard free.sequence <= before, failure == nil else {
                kept.append(free)
                continue
            }
            do throws(MetadataError) { try release(free.run, file) } catch { failure = error }
        }
        frees.replaceSubrange(0..<sealed, with: kept)
        sealed = 0
        // In the file sooner rather than later; it need not be durable.
        try writeSlices(file)
        if let failure { throw failure }
    }

    private mutating func release(_ run: ClusterRun, _ file: MetadataFile) throws(MetadataError) {
        var hole = run.first..<run.first
        for cluster in run.first..<run.first &+ run.count {
            guard let slot = try slotMakingRoom(cluster, file) else { continue }
            let count = get(slot, cluster)
            // A count of 0 for what was in use is damage; there is nothing to take away.
            guard count > 0, !metadata.contains(cluster) else { continue }
            if count == 1 {
                // The hole is made before anybody can have the cluster again.
                if hole.upperBound != cluster {
                    punch(hole, file)
                    hole = cluster..<cluster
                }
                hole = hole.lowerBound..<cluster + 1
            }
            set(slot, cluster, count - 1)
            slices.markDirty(slot)
            if count == 1 { next = min(next, cluster) }
        }
        punch(hole, file)
    }

    private func punch(_ clusters: Range<UInt64>, _ file: MetadataFile) {
        guard !clusters.isEmpty else { return }
        file.punch(clusters.lowerBound << clusterBits, UInt64(clusters.count) << clusterBits)
    }

    mutating func protect(_ cluster: UInt64, _ isMetadata: Bool) {
        if isMetadata { metadata.insert(cluster..<cluster + 1) } else { metadata.remove(cluster) }
    }

    /// The end of what was ever used, in clusters.
    var end: UInt64 { pristine }

    // MARK: - Commits

    var isDirty: Bool { slices.isDirty || dirtyTable != nil }
    var isTableDirty: Bool { dirtyTable != nil }

    mutating func writeSlices(_ file: MetadataFile) throws(MetadataError) {
        while let slot = slices.dirtySlot {
            let place = place(ofSlice: slices.key(slot))
            // A block is `blockSize` bytes long.
            try file.write(slices.block(slot), at: place)
            slices.cleanFirst()
        }
    }

    /// Comes after the blocks, which the table makes part of the image, are durable.
    mutating func writeTable(_ file: MetadataFile) throws(MetadataError) {
        guard let range = dirtyTable else { return }
        try file.write(bigEndian(table[range]), at: tableOffset &+ UInt64(range.lowerBound * 8))
        dirtyTable = nil
    }

    // MARK: - Blocks

    /// log2 of the counts in a block.
    private var blockBits: UInt64 { clusterBits + 3 - order }
    /// log2 of the counts in a slice.
    private var sliceBits: UInt64 { UInt64(slices.blockSize.trailingZeroBitCount) + 3 - order }

    private func place(ofSlice slice: UInt64) -> UInt64 {
        let perBlock = blockBits - sliceBits
        return table[Int(slice >> perBlock)] &+ (slice & ((1 << perBlock) - 1)) * UInt64(slices.blockSize)
    }

    private mutating func slotMakingRoom(_ cluster: UInt64, _ file: MetadataFile) throws(MetadataError) -> Int? {
        do throws(MetadataError) { return try slot(of: cluster, file) } catch {
            guard error == .needsCommit else { throw error }
            try writeSlices(file)
            return try slot(of: cluster, file)
        }
    }

    /// The slice with the count of a cluster; nil where all counts are 0.
    private mutating func slot(of cluster: UInt64, _ file: MetadataFile) throws(MetadataError) -> Int? {
        guard cluster >> blockBits < UInt64(table.count), table[Int(cluster >> blockBits)] != 0 else { return nil }
        let slice = cluster >> sliceBits
        if let slot = slices.slot(of: slice) {
            _ = slices.find(slice)
            return slot
        }
        guard let slot = slices.reserve(slice) else { throw .needsCommit }
        do throws(MetadataError) {
            try file.read(into: slices.block(slot), at: place(ofSlice: slice))
            slices.complete(slot, error: 0)
            slices.unpin(slot)
        } catch {
            slices.complete(slot, error: EIO)
            slices.unpin(slot)
            throw error
        }
        return slot
    }

    /// A new block, in the first of the clusters that it counts.
    private mutating func addBlock(_ block: UInt64, _ file: MetadataFile) throws(MetadataError) {
        guard block < UInt64(table.count) else { return try growTable(block, file) }
        let cluster = block << blockBits
        guard !metadata.contains(cluster) else { throw damaged(.countedAsFree(cluster, entry(of: cluster))) }
        try file.write(counts(1, size: 1 << Int(clusterBits)), at: cluster << clusterBits)
        table[Int(block)] = cluster << clusterBits
        metadata.insert(cluster..<cluster + 1)
        dirtyTable = min(dirtyTable?.lowerBound ?? .max, Int(block))..<max(dirtyTable?.upperBound ?? 0, Int(block) + 1)
        needsBarrier = true
        pristine = max(pristine, cluster + 1)
    }

    /// A longer table, in the clusters that the first new blocks count, which come before it. It is durable when this
    /// returns.
    /// - Throws: ``MetadataError/lost(_:)`` when it is unknown which table the image has: neither may be changed any
    ///   more.
    private mutating func growTable(_ block: UInt64, _ file: MetadataFile) throws(MetadataError) {
        let entriesPerCluster: UInt64 = 1 << (clusterBits - 3)
        var blocks: UInt64 = 1, clusters: UInt64 = 1
        while true {
            let entries = max(block &+ blocks &+ 1, UInt64(table.count) * 3 / 2)
            clusters = (entries + entriesPerCluster - 1) / entriesPerCluster
            if blocks << blockBits >= blocks + clusters { break }
            blocks += 1
        }
        guard clusters << clusterBits <= Self.maximumTableSize else { throw .failed(EFBIG) }
        let first = block << blockBits
        for cluster in first..<first + blocks + clusters where metadata.contains(cluster) {
            throw damaged(.countedAsFree(cluster, entry(of: cluster)))
        }
        let oldOffset = tableOffset, oldClusters = UInt64(table.count) / entriesPerCluster
        // Whatever comes of it, they are written: the file must not be cut where they are.
        pristine = max(pristine, first + blocks + clusters)

        var grown = table
        grown.reserveCapacity(Int(clusters * entriesPerCluster))
        grown += [UInt64](repeating: 0, count: Int(clusters * entriesPerCluster) - table.count)
        for index in 0..<blocks { grown[Int(block + index)] = (first + index) << clusterBits }
        let place = (first + blocks) << clusterBits
        // Counts of blocks and table; as they come one after the other, the blocks' bytes do as well.
        try writeSlices(file)
        try file.write(counts(Int(blocks + clusters), size: Int(blocks << clusterBits)), at: first << clusterBits)
        try file.write(bigEndian(grown[...]), at: place)
        try file.synchronize()
        // Offset and length are neighbours in one sector of the header.
        do throws(MetadataError) { try file.write(bigEndian([place]) + withBytes(UInt32(clusters)), at: 48) } catch {
            throw .lost(error.code)
        }
        try file.synchronize()

        table = grown
        tableOffset = place
        dirtyTable = nil
        metadata.insert(first..<first + blocks + clusters)
        for cluster in 0..<oldClusters { metadata.remove(oldOffset >> clusterBits + cluster) }
        free(ClusterRun(first: oldOffset >> clusterBits, count: oldClusters), 0)
    }

    /// New blocks in which the first `count` clusters are counted once.
    private func counts(_ count: Int, size: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: size)
        for index in 0..<count {
            let bit = index << Int(order)
            // Narrow counts begin with a byte's lowest bit, wide ones are big-endian.
            if order < 3 {
                bytes[bit / 8] |= 1 << UInt8(bit % 8)
            } else {
                bytes[bit / 8 + (1 << Int(order)) / 8 - 1] = 1
            }
        }
        return bytes
    }

    private func bigEndian(_ entries: ArraySlice<UInt64>) -> [UInt8] {
        entries.flatMap { entry in (0..<8).map { UInt8(truncatingIfNeeded: entry >> UInt64(56 - 8 * $0)) } }
    }

    private func withBytes(_ value: UInt32) -> [UInt8] {
        (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(24 - 8 * $0)) }
    }

    // MARK: - Counts

    // A slice has `1 << sliceBits` counts, so all that is reached below is inside of it.

    private func get(_ slot: Int, _ cluster: UInt64) -> UInt64 {
        let index = Int(cluster & ((1 << sliceBits) - 1))
        let bytes = slices.block(slot)
        switch order {
        case 0, 1, 2:
            let bit = index << Int(order)
            return UInt64(bytes.load(bit / 8, as: UInt8.self)) >> UInt64(bit % 8) & ((1 << (1 << order)) - 1)
        case 3: return UInt64(bytes.load(index, as: UInt8.self))
        case 4: return UInt64(bytes.load(bigEndian: index * 2, as: UInt16.self))
        case 5: return UInt64(bytes.load(bigEndian: index * 4, as: UInt32.self))
        default: return bytes.load(bigEndian: index * 8)
        }
    }

    private func set(_ slot: Int, _ cluster: UInt64, _ count: UInt64) {
        let index = Int(cluster & ((1 << sliceBits) - 1))
        let bytes = slices.block(slot)
        switch order {
        case 0, 1, 2:
            let bit = index << Int(order)
            let mask = UInt8((1 << (1 << order)) - 1) << UInt8(bit % 8)
            let old = bytes.load(bit / 8, as: UInt8.self)
            bytes.store(old & ~mask | UInt8(truncatingIfNeeded: count) << UInt8(bit % 8), bit / 8)
        case 3: bytes.store(UInt8(truncatingIfNeeded: count), index)
        case 4: bytes.store(bigEndian: UInt16(truncatingIfNeeded: count), index * 2)
        case 5: bytes.store(bigEndian: UInt32(truncatingIfNeeded: count), index * 4)
        default: bytes.store(bigEndian: count, index * 8)
        }
    }
}

/// The clusters that hold tables, sorted; they change rarely and are asked for often.
struct MetadataClusters {
    private var clusters: [UInt64] = []

    func contains(_ cluster: UInt64) -> Bool {
        let index = position(cluster)
        return index < clusters.count && clusters[index] == cluster
    }

    mutating func insert(_ new: some Collection<UInt64>) {
        if new.count > 16 {
            clusters += new
            clusters.sort()
        } else {
            for cluster in new { clusters.insert(cluster, at: position(cluster)) }
        }
    }

    mutating func remove(_ cluster: UInt64) {
        let index = position(cluster)
        if index < clusters.count, clusters[index] == cluster { clusters.remove(at: index) }
    }

    /// Where a cluster is, or would be.
    private func position(_ cluster: UInt64) -> Int {
        var low = 0, high = clusters.count
        while low < high {
            let middle = (low + high) / 2
            if clusters[middle] < cluster { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

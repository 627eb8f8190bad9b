// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

extension QCOW2Header {
    /// Refuses images that can be read and must not, or cannot, be written.
    func requireWritable(_ path: String) throws(DiskImageError) {
        if isCorrupt {
            throw .notWritable(
                path: path, reason: "it is marked as corrupt: repair it with swkvm image check --repair all")
        }
    }
}

extension QCOW2Image {
    mutating func target(
        _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, diskSize: UInt64, sequence: UInt64,
        _ file: MetadataFile
    ) -> WriteTarget {
        guard failure == 0 else { return .unresolved(.failed(failure)) }
        let index = Int(offset >> tableCover)
        // Below the disk's size, so below `l1Count`.
        let l1Entry = l1[index]
        let readsAsZeroes = operation == .discard || (operation != .write && !hasBacking)
        if l1Entry & L1Entry.offset == 0, readsAsZeroes { return .done(length: min(length, restOfTable(offset))) }
        do throws(MetadataError) {
            // The table must be there and ours alone. While it is neither, nothing under it is written in place.
            if l1Entry & L1Entry.offset == 0 || l1Entry & L1Entry.copied == 0 {
                guard !isLocked else { return .unresolved(.wait) }
                try makeTable(index, l1Entry, at: offset, sequence, file)
            }
        } catch {
            return .unresolved(error.lookup)
        }
        let table = l1[index] & L1Entry.offset
        switch slice(offset, table: table) {
        case .unresolved(let lookup): return .unresolved(lookup)
        case .entries(let entries) where header.hasExtendedL2:
            return operation == .write
                ? subclusterWriteTarget(entries, offset, length)
                : subclusterZeroTarget(entries, operation, offset, length, diskSize: diskSize, sequence)
        case .entries(let entries):
            return operation == .write
                ? writeTarget(entries, offset, length)
                : zeroTarget(entries, operation, offset, length, diskSize: diskSize, sequence)
        }
    }

    // MARK: - Data

    private mutating func writeTarget(_ entries: Int, _ offset: UInt64, _ length: UInt64) -> WriteTarget {
        let inCluster = offset & (header.clusterSize - 1)
        let first = Int(offset >> UInt64(header.clusterBits)) & (1 << sliceBits - 1)
        let unit = self.unit(entries, first)
        if case .damaged(let damage) = unit { return .unresolved(damaged(damage, at: offset)) }
        if let damage = misplaced(unit, at: offset - inCluster) { return .unresolved(damaged(damage, at: offset)) }
        if case .data(let place) = unit, isOurs(entries, first) {
            guard !isMetadata(place) else { return .unresolved(damaged(inMetadata(place), at: offset)) }
            var run = header.clusterSize
            var next = first + 1
            while run - inCluster < length, next < 1 << sliceBits,
                unit.continues(with: self.unit(entries, next), after: run),
                isOurs(entries, next), !isMetadata(place + run)
            {
                run += header.clusterSize
                next += 1
            }
            return .inPlace(offset: place + inCluster, length: min(length, run - inCluster))
        }
        guard !isLocked else { return .unresolved(.wait) }
        guard inCluster == 0, length >= header.clusterSize else { return .part(part(isZero: readsAsZeroes(unit))) }
        var count: UInt64 = 1
        while (count + 1) << UInt64(header.clusterBits) <= length, first + Int(count) < 1 << sliceBits {
            let next = first + Int(count)
            if case .data = self.unit(entries, next), isOurs(entries, next) { break }
            count += 1
        }
        return .clusters(count)
    }

    /// All of a new cluster.
    private func part(isZero: Bool) -> WriteTarget.Part {
        WriteTarget.Part(range: 0..<header.clusterSize, isZero: isZero, place: nil)
    }

    /// Indicates whether a data cluster has no other references.
    private func isOurs(_ entries: Int, _ index: Int) -> Bool {
        // A cluster in an external data file is never shared.
        header.hasDataFile || l2Entry(entries, index) & L2Entry.copied != 0
    }

    func readsAsZeroes(_ unit: StoredUnit) -> Bool { unit == .zero || (unit == .unallocated && !hasBacking) }

    func isMetadata(_ place: UInt64) -> Bool {
        switch refcounts {
        case .some(let refcounts):
            !header.hasDataFile && refcounts.metadata.contains(place >> UInt64(header.clusterBits))
        case nil: false
        }
    }

    mutating func allocate(
        _ count: UInt64, at offset: UInt64, for part: WriteTarget.Part?, _ file: MetadataFile
    ) throws(MetadataError) -> ClusterRun {
        if let part, let place = part.place { return try extend(part, place, at: offset) }
        var run = try allocate(count, at: offset, file)
        if let part { run.units = header.units(part.range) }
        growAhead(file)
        return run
    }

    func place(of run: ClusterRun) -> UInt64 { run.first << UInt64(header.clusterBits) }

    /// Clusters for at most as many of the guest's clusters from `offset` on; their slice stays in the cache.
    mutating func allocate(_ count: UInt64, at offset: UInt64, _ file: MetadataFile) throws(MetadataError) -> ClusterRun
    {
        guard let slot = l2Slices.slot(of: sliceNumber(offset)) else { throw .failed(EIO) }
        if header.hasDataFile {
            // Each cluster has its place there, which is not counted.
            l2Slices.pin(slot, 1)
            return ClusterRun(first: offset >> UInt64(header.clusterBits), count: count)
        }
        let run = try takeClusters(count, file)
        l2Slices.pin(slot, 1)
        extend(to: (run.first + run.count) << UInt64(header.clusterBits))
        return run
    }

    private mutating func takeClusters(_ count: UInt64, _ file: MetadataFile) throws(MetadataError) -> ClusterRun {
        do throws(MetadataError) {
            guard let run = try refcounts?.allocate(count, file) else { throw .failed(EROFS) }
            return run
        } catch {
            throw note(error)
        }
    }

    /// Has nothing be written any more once the host has lost something.
    private mutating func note(_ error: MetadataError) -> MetadataError {
        if case .lost(let error) = error, failure == 0 { failure = error }
        return error
    }

    /// The cluster at a place, which is the guest's already, while subclusters of it are written that are not yet.
    private mutating func extend(
        _ part: WriteTarget.Part, _ place: UInt64, at offset: UInt64
    ) throws(MetadataError) -> ClusterRun {
        guard let slot = l2Slices.slot(of: sliceNumber(offset)) else { throw .failed(EIO) }
        l2Slices.pin(slot, 1)
        return ClusterRun(
            first: place >> UInt64(header.clusterBits), count: 1, units: header.units(part.range), isLinked: true)
    }

    mutating func link(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        // Pinned since the allocation.
        guard let slot = l2Slices.slot(of: sliceNumber(offset)) else { return }
        // A commit may have come between the allocation and the end of the write, whose data its synchronisation did
        // not cover.
        refcounts?.needsBarrier = true
        let first = Int(offset >> UInt64(header.clusterBits)) & (1 << sliceBits - 1)
        for index in 0..<Int(run.count) {
            let entry = (run.first + UInt64(index)) << UInt64(header.clusterBits) | L2Entry.copied
            header.hasExtendedL2
                ? link(slot, first + index, entry, run, sequence) : replace(slot, first + index, with: entry, sequence)
        }
        l2Slices.markDirty(slot)
        l2Slices.pin(slot, -1)
    }

    mutating func abandon(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        if let slot = l2Slices.slot(of: sliceNumber(offset)) { l2Slices.pin(slot, -1) }
        if !run.isLinked, !header.hasDataFile { refcounts?.free(run, sequence) }
    }

    // MARK: - Zeroes

    private mutating func zeroTarget(
        _ entries: Int, _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, diskSize: UInt64,
        _ sequence: UInt64
    ) -> WriteTarget {
        let clusterSize = header.clusterSize
        let inCluster = offset & (clusterSize - 1)
        var index = Int(offset >> UInt64(header.clusterBits)) & (1 << sliceBits - 1)
        if header.hasDataFile, case .data(let place) = self.unit(entries, index) {
            // The place stays the cluster's: a hole made later could be made over something newer.
            if let damage = misplaced(.data(place), at: offset - inCluster) {
                return .unresolved(damaged(damage, at: offset))
            }
            return .inPlace(offset: place + inCluster, length: min(length, clusterSize - inCluster))
        }
        // The disk's end makes its last cluster a whole one.
        if inCluster != 0 || (length < clusterSize && offset + length < diskSize) {
            let piece = min(length, clusterSize - inCluster)
            switch self.unit(entries, index) {
            case .damaged(let damage): return .unresolved(damaged(damage, at: offset))
            case _ where operation == .discard, .zero: return .done(length: piece)
            case .unallocated where !hasBacking: return .done(length: piece)
            case .data(let place) where isOurs(entries, index):
                guard !isMetadata(place) else {
                    return .unresolved(damaged(inMetadata(place), at: offset))
                }
                return .inPlace(offset: place + inCluster, length: piece)
            case .data, .unallocated, .compressed: return isLocked ? .unresolved(.wait) : .part(part(isZero: false))
            }
        }
        // Version 2 has no zero clusters: where a backing file would show, zeroes are data.
        let zero: UInt64 = hasBacking ? L2Entry.zero : 0
        let canFree = header.version >= 3 || !hasBacking
        var done: UInt64 = 0
        var changed = false
        while done < length, index < 1 << sliceBits, length - done >= clusterSize || offset + length >= diskSize {
            let unit = self.unit(entries, index)
            if case .data = unit, header.hasDataFile { break }
            if case .damaged(let damage) = unit {
                if done == 0 { return .unresolved(damaged(damage, at: offset)) }
                break
            }
            let isEmpty = unit == .unallocated && (operation == .discard || !hasBacking)
            if !isEmpty, l2Entry(entries, index) != L2Entry.zero {
                guard !isLocked, refcounts?.hasManyFrees != true else {
                    if done == 0 { return .unresolved(isLocked ? .wait : .commit) }
                    break
                }
                if canFree {
                    replace(entries, index, with: zero, sequence)
                    changed = true
                } else if operation != .discard {
                    // As the data of a write, so that the cluster's own place can stay.
                    if done > 0 { break }
                    if case .data(let place) = unit, isOurs(entries, index), !isMetadata(place) {
                        return .inPlace(offset: place, length: min(length, clusterSize))
                    }
                    return .part(part(isZero: false))
                }
            }
            done += min(clusterSize, length - done)
            index += 1
        }
        if changed, let slot = l2Slices.slot(of: sliceNumber(offset)) { l2Slices.markDirty(slot) }
        return .done(length: done)
    }

    /// Gives an entry another value and frees what the old one referred to.
    mutating func replace(_ entries: Int, _ index: Int, with new: UInt64, _ sequence: UInt64) {
        let old = l2Entry(entries, index)
        l2Slices.setWord(index, of: entries, to: new)
        if old & L2Entry.compressed != 0 {
            let (place, length) = header.compressedRange(old)
            let first = place >> UInt64(header.clusterBits), last = (place + length - 1) >> UInt64(header.clusterBits)
            refcounts?.free(ClusterRun(first: first, count: last - first + 1), sequence)
        } else if old & L2Entry.offset != 0, !header.hasDataFile {
            refcounts?.free(ClusterRun(first: (old & L2Entry.offset) >> UInt64(header.clusterBits), count: 1), sequence)
        }
    }

    // MARK: - Tables

    /// Makes the L2 table of an L1 entry one that only this entry refers to: a new one, or a copy of what a snapshot
    /// shares.
    private mutating func makeTable(
        _ index: Int, _ old: UInt64, at offset: UInt64, _ sequence: UInt64, _ file: MetadataFile
    ) throws(MetadataError) {
        let size = Int(header.clusterSize)
        let oldTable = old & L1Entry.offset
        guard oldTable & (header.clusterSize - 1) == 0, oldTable <= fileSize,
            oldTable == 0 || header.clusterSize <= fileSize - oldTable
        else {
            _ = damaged(.l2TableBeyondEnd(offset: oldTable), at: offset)
            throw .failed(EIO)
        }
        var contents = [UInt8](repeating: 0, count: size)
        if oldTable != 0 {
            try contents.withIOMemory { (memory) throws(MetadataError) in try file.read(into: memory, at: oldTable) }
        }
        let run = try takeClusters(1, file)
        let place = run.first << UInt64(header.clusterBits)
        do throws(MetadataError) { try file.write(contents, at: place) } catch {
            refcounts?.free(run, sequence)
            throw error
        }
        extend(to: place + header.clusterSize)
        l1[index] = place | L1Entry.copied
        dirtyL1 = min(dirtyL1?.lowerBound ?? index, index)..<max(dirtyL1?.upperBound ?? 0, index + 1)
        refcounts?.protect(run.first, true)
        guard oldTable != 0 else { return }
        refcounts?.protect(oldTable >> UInt64(header.clusterBits), false)
        refcounts?.free(ClusterRun(first: oldTable >> UInt64(header.clusterBits), count: 1), sequence)
    }

    // MARK: - Commits

    /// Indicates whether the commit has to make reference counts and data durable before it writes the mapping.
    var needsBarrier: Bool {
        switch refcounts {
        case .some(let refcounts): refcounts.needsBarrier
        case nil: false
        }
    }

    mutating func beginCommit(_ file: MetadataFile) throws(MetadataError) -> Bool {
        guard failure == 0 else { throw .failed(failure) }
        // Data in a file of its own is made durable by every flush, and before the mapping.
        guard needsBarrier || header.hasDataFile else { return false }
        try refcounts?.writeSlices(file)
        isLocked = true
        return true
    }

    mutating func writeAllocationTable(_ file: MetadataFile) throws(MetadataError) -> Bool {
        guard refcounts?.isTableDirty == true else { return false }
        try refcounts?.writeTable(file)
        return true
    }

    /// Writes L2 slices and L1 entries.
    mutating func writeMapping(_ file: MetadataFile) throws(MetadataError) {
        if isLocked { refcounts?.needsBarrier = false }
        try writeTables(file)
    }

    private mutating func writeTables(_ file: MetadataFile) throws(MetadataError) {
        while let slot = l2Slices.dirtySlot {
            let slice = l2Slices.key(slot)
            let table = l1[Int(slice >> UInt64(header.l2Bits - sliceBits))] & L1Entry.offset
            try file.write(l2Slices.block(slot), at: place(ofSlice: slice, table: table))
            l2Slices.cleanFirst()
        }
        if let range = dirtyL1 {
            try file.write(l1.bytes(range), at: header.l1Offset + UInt64(range.lowerBound * 8))
            dirtyL1 = nil
        }
        refcounts?.seal()
    }

    var isDirty: Bool {
        if l2Slices.isDirty || dirtyL1 != nil { return true }
        switch refcounts {
        case .some(let refcounts): return refcounts.isDirty || refcounts.hasFrees
        case nil: return false
        }
    }

    mutating func release(before sequence: UInt64, _ file: MetadataFile) throws(MetadataError) {
        try refcounts?.release(before: sequence, file)
    }

    var isPrepared: Bool { autoclearFeatures & ~header.keptAutoclearFeatures == 0 }

    mutating func prepareChange(_ file: MetadataFile) throws(MetadataError) -> [String]? {
        isPrepared ? nil : try clearAutoclearFeatures(file)?.names
    }

    /// Before the first change: features that only those keep true who know them are switched off.
    /// - Returns: the bitmaps that the image has no more, if it had any. The next commit frees their space.
    private mutating func clearAutoclearFeatures(_ file: MetadataFile) throws(MetadataError) -> LiveBitmaps? {
        let kept = autoclearFeatures & header.keptAutoclearFeatures
        guard kept != autoclearFeatures else { return nil }
        var features = [UInt8](repeating: 0, count: 8)
        features.store(kept, at: 0)
        try file.write(features, at: 88)
        do throws(MetadataError) { try file.synchronize() } catch { throw note(error) }
        autoclearFeatures = kept
        defer { bitmaps = nil }
        if let bitmaps {
            // What the header says of them means nothing any more, which others would warn of; it may be lost.
            if let place = header.bitmaps?.lastExtension {
                _ = try? file.write([UInt8](repeating: 0, count: 8), at: place)
            }
            for run in bitmaps.clusters { refcounts?.free(run, 0) }
        }
        return bitmaps
    }

    /// All steps of a commit, synchronously, when the image is closed.
    mutating func close(_ file: MetadataFile, _ data: MetadataFile) throws(MetadataError) {
        trim(file)
        guard refcounts != nil, failure == 0, isDirty else { return }
        if header.hasDataFile { try data.synchronize() }
        try refcounts?.writeSlices(file)
        try file.synchronize()
        try refcounts?.writeTable(file)
        try file.synchronize()
        try writeTables(file)
        try file.synchronize()
        // Failing costs space and nothing else.
        _ = try? refcounts?.release(before: .max, file)
    }
}

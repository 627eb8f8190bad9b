// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// Writing with extended L2 entries: each is followed by a word with two bits for each of the cluster's 32 subclusters,
/// so that parts of a cluster can be allocated, be zeroes, or be left to the backing file.
extension QCOW2Header {
    /// The subclusters of a part of a cluster; all of one without subclusters.
    func units(_ range: Range<UInt64>) -> Range<Int> {
        let unit = UInt64(clusterBits - 5)
        return hasExtendedL2
            ? Int(range.lowerBound >> unit)..<Int((range.upperBound + (1 << unit) - 1) >> unit) : 0..<32
    }
}

extension QCOW2Image {
    private static let allUnits: UInt64 = 0xffff_ffff

    private var unitSize: UInt64 { header.clusterSize / 32 }

    /// The allocation bits of some subclusters; those that say that they read as zeroes are 32 bits above.
    private func mask(_ units: Range<Int>) -> UInt64 {
        (Self.allUnits >> UInt64(32 - units.count)) << UInt64(units.lowerBound)
    }

    private mutating func store(_ bitmap: UInt64, _ entries: Int, _ index: Int) {
        l2Slices.setWord(index * 2 + 1, of: entries, to: bitmap)
    }

    /// The first of a cluster's subclusters that cannot be right.
    private func damage(_ entries: Int, _ index: Int) -> ImageDamage? {
        let place = l2Entry(entries, index * 2) & L2Entry.offset, bitmap = l2Entry(entries, index * 2 + 1)
        if l2Entry(entries, index * 2) & L2Entry.compressed != 0 { return nil }
        if header.hasDataFile { return nil }
        if bitmap & bitmap >> 32 & Self.allUnits == 0,
            bitmap & Self.allUnits == 0 || (place != 0 && place & (header.clusterSize - 1) == 0 && place < fileSize)
        {
            return nil
        }
        for unit in 0..<32 {
            if case .damaged(let damage) = self.unit(entries, index * 32 + unit) { return damage }
        }
        return nil
    }

    mutating func subclusterWriteTarget(_ entries: Int, _ offset: UInt64, _ length: UInt64) -> WriteTarget {
        let clusterSize = header.clusterSize
        let inCluster = offset & (clusterSize - 1)
        let first = Int(offset >> UInt64(header.clusterBits)) & (1 << sliceBits - 1)
        if let damage = damage(entries, first) { return .unresolved(damaged(damage, at: offset)) }
        let entry = l2Entry(entries, first * 2), allocated = l2Entry(entries, first * 2 + 1) & Self.allUnits
        let end = min(inCluster + length, clusterSize)
        var units = header.units(inCluster..<end)
        if isOwn(entry) {
            let place = entry & L2Entry.offset
            if let damage = misplaced(.data(place), at: offset - inCluster) {
                return .unresolved(damaged(damage, at: offset))
            }
            guard !isMetadata(place) else { return .unresolved(damaged(inMetadata(place), at: offset)) }
            let isThere = { (unit: Int) in allocated >> UInt64(unit) & 1 == 1 }
            if isThere(units.lowerBound) {
                return .inPlace(offset: place + inCluster, length: inPlaceLength(entries, first, inCluster, length))
            }
            guard !isLocked else { return .unresolved(.wait) }
            // As far as none is allocated.
            units = units.lowerBound..<(units.first(where: isThere) ?? units.upperBound)
            return .part(part(entries, first, units, inCluster..<min(end, UInt64(units.upperBound) * unitSize), place))
        }
        guard !isLocked else { return .unresolved(.wait) }
        guard inCluster == 0, length >= clusterSize else {
            if entry & L2Entry.compressed != 0 {
                units = 0..<32
            } else if entry & L2Entry.offset != 0, allocated != 0 {
                // The others that are allocated come along to the new cluster.
                units =
                    min(
                        units.lowerBound, allocated.trailingZeroBitCount)..<max(
                        units.upperBound, 64 - allocated.leadingZeroBitCount)
            }
            return .part(part(entries, first, units, inCluster..<end, nil))
        }
        var count: UInt64 = 1
        while (count + 1) << UInt64(header.clusterBits) <= length, first + Int(count) < 1 << sliceBits,
            !isOwn(l2Entry(entries, (first + Int(count)) * 2))
        { count += 1 }
        return .clusters(count)
    }

    /// A cluster of the file that has no other references.
    private func isOwn(_ entry: UInt64) -> Bool {
        entry & L2Entry.compressed == 0
            && (header.hasDataFile
                ? entry & (L2Entry.offset | L2Entry.copied) != 0
                : entry & L2Entry.offset != 0 && entry & L2Entry.copied != 0)
    }

    /// Bytes from a place in a cluster, whose subcluster is allocated, that follow each other in the file and are ours.
    private func inPlaceLength(_ entries: Int, _ cluster: Int, _ inCluster: UInt64, _ length: UInt64) -> UInt64 {
        let start = Int(inCluster / unitSize) + cluster * 32
        let inUnit = inCluster % unitSize
        let unit = self.unit(entries, start)
        var run = unitSize, next = start + 1
        while run - inUnit < length, next < 32 << sliceBits, unit.continues(with: self.unit(entries, next), after: run),
            isOwn(l2Entry(entries, next / 32 * 2)), !isMetadata(l2Entry(entries, next / 32 * 2) & L2Entry.offset)
        {
            run += unitSize
            next += 1
        }
        return min(length, run - inUnit)
    }

    /// `covered` bytes of a cluster's subclusters are written.
    private func part(
        _ entries: Int, _ cluster: Int, _ units: Range<Int>, _ covered: Range<UInt64>, _ place: UInt64?
    ) -> WriteTarget.Part {
        // The subclusters that the range does not cover, or not in full.
        let isZero = units.allSatisfy { unit in
            let bytes = UInt64(unit) * unitSize..<UInt64(unit + 1) * unitSize
            return covered.lowerBound <= bytes.lowerBound && bytes.upperBound <= covered.upperBound
                ? true : readsAsZeroes(self.unit(entries, cluster * 32 + unit))
        }
        return WriteTarget.Part(
            range: UInt64(units.lowerBound) * unitSize..<UInt64(units.upperBound) * unitSize, isZero: isZero,
            place: place)
    }

    /// Subclusters have been written, in a new cluster or in the one that the guest has.
    mutating func link(_ entries: Int, _ index: Int, _ entry: UInt64, _ run: ClusterRun, _ sequence: UInt64) {
        let old = l2Entry(entries, index * 2 + 1)
        let written = mask(run.units)
        // What the old cluster had is in the new one, or is not read.
        let allocated = run.isLinked ? old & Self.allUnits | written : written
        store(allocated | old & ~Self.allUnits & ~(written << 32), entries, index)
        if !run.isLinked { replace(entries, index * 2, with: entry, sequence) }
    }

    mutating func subclusterZeroTarget(
        _ entries: Int, _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, diskSize: UInt64,
        _ sequence: UInt64
    ) -> WriteTarget {
        let clusterSize = header.clusterSize
        let inCluster = offset & (clusterSize - 1)
        let index = Int(offset >> UInt64(header.clusterBits)) & (1 << sliceBits - 1)
        if let damage = damage(entries, index) { return .unresolved(damaged(damage, at: offset)) }
        let entry = l2Entry(entries, index * 2), bitmap = l2Entry(entries, index * 2 + 1)
        if header.hasDataFile, case .data(let place) = self.unit(entries, index * 32 + Int(inCluster / unitSize)) {
            // The place stays the subcluster's: a hole made later could be made over something newer.
            if let damage = misplaced(.data(entry & L2Entry.offset), at: offset - inCluster) {
                return .unresolved(damaged(damage, at: offset))
            }
            return .inPlace(offset: place + inCluster % unitSize, length: min(length, unitSize - inCluster % unitSize))
        }
        // The disk's end makes its last subcluster a whole one, and its last cluster.
        let isLast = offset + length >= diskSize
        let end =
            isLast && offset - inCluster + clusterSize >= diskSize ? clusterSize : min(inCluster + length, clusterSize)
        let isWhole = inCluster == 0 && end == clusterSize
        let whole =
            (inCluster + unitSize - 1) / unitSize
            * unitSize..<max((inCluster + unitSize - 1) / unitSize * unitSize, end / unitSize * unitSize)
        if entry & L2Entry.compressed != 0, !isWhole {
            if operation == .discard { return .done(length: min(length, end - inCluster)) }
            guard !isLocked else { return .unresolved(.wait) }
            return .part(WriteTarget.Part(range: 0..<clusterSize, isZero: false, place: nil))
        }
        guard inCluster % unitSize == 0, !whole.isEmpty else {
            let unit = Int(inCluster / unitSize)
            let piece = min(length, UInt64(unit + 1) * unitSize - inCluster)
            return zeroPiece(entries, index, unit, operation, offset, piece)
        }
        var units = Int(whole.lowerBound / unitSize)..<Int(whole.upperBound / unitSize)
        if header.hasDataFile, let next = units.first(where: { bitmap >> UInt64($0) & 1 == 1 }) {
            units = units.lowerBound..<next
        }
        let wholeEnd = UInt64(units.upperBound) * unitSize
        let written = mask(units)
        // Without a backing file what is not allocated is zeroes.
        let zeroes = hasBacking ? written << 32 : 0
        let changed = bitmap & ~(written | written << 32) | zeroes
        let keepsUnallocated = operation == .discard && bitmap & written == 0 && entry & L2Entry.compressed == 0
        if keepsUnallocated || (changed == bitmap && entry & L2Entry.compressed == 0) {
            return .done(length: min(length, wholeEnd - inCluster))
        }
        guard !isLocked, refcounts?.hasManyFrees != true else { return .unresolved(isLocked ? .wait : .commit) }
        // A discard of some that are allocated leaves those to the backing file that it has.
        let left = operation == .discard && hasBacking ? bitmap | (bitmap & written) << 32 : bitmap | zeroes
        store(
            entry & L2Entry.compressed != 0 ? zeroes : left & ~written & (hasBacking ? .max : ~(written << 32)),
            entries, index)
        // Nothing is in the cluster any more.
        if l2Entry(entries, index * 2 + 1) & Self.allUnits == 0, entry != 0 {
            replace(entries, index * 2, with: 0, sequence)
        }
        if let slot = l2Slices.slot(of: sliceNumber(offset)) { l2Slices.markDirty(slot) }
        return .done(length: min(length, wholeEnd - inCluster))
    }

    /// A part of a subcluster.
    private mutating func zeroPiece(
        _ entries: Int, _ index: Int, _ unit: Int, _ operation: DiskOperation, _ offset: UInt64, _ piece: UInt64
    ) -> WriteTarget {
        let state = self.unit(entries, index * 32 + unit)
        if operation == .discard || readsAsZeroes(state) { return .done(length: piece) }
        let inCluster = offset & (header.clusterSize - 1)
        let entry = l2Entry(entries, index * 2)
        if case .data(let place) = state, isOwn(entry) {
            guard !isMetadata(entry & L2Entry.offset) else {
                return .unresolved(damaged(inMetadata(entry & L2Entry.offset), at: offset))
            }
            return .inPlace(offset: place + inCluster % unitSize, length: piece)
        }
        guard !isLocked else { return .unresolved(.wait) }
        // As for a write of these bytes.
        switch subclusterWriteTarget(entries, offset, piece) {
        case .part(let part): return .part(WriteTarget.Part(range: part.range, isZero: false, place: part.place))
        case let other: return other
        }
    }
}

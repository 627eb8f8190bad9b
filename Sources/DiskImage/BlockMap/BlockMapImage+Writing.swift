// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// Where the new blocks of a VDI or VMDK file come from: neither format counts its blocks, so they come from the end of
/// the file, or from places that nothing refers to.
struct BlockAllocator {
    /// The place of block 0; a block's number is what a ``ClusterRun`` is about.
    let base: UInt64
    /// The first number that was never given.
    var next: UInt64
    /// Numbers below `next` that nothing refers to, the lowest last.
    var holes: [UInt64] = []
    /// Numbers from here on do not exist.
    let limit: UInt64
    /// No block from here on was ever written.
    let pristine: UInt64
    /// The value of `next` in a VDI header, and its offset; nil in VMDK.
    var header: (place: UInt64, count: UInt64)?
    /// Where VMDK notes that a file was not closed; nil in VDI.
    var uncleanPlace: UInt64?
    var isMarkedUnclean = false
    /// Tables and headers, which no block lies in.
    var metadata: ByteRanges
    /// A block was allocated since the last barrier.
    var needsBarrier = false
}

extension BlockMapImage {
    func place(of run: ClusterRun) -> UInt64 {
        (allocator?.base ?? 0) + run.first << layout.blockBits
    }

    mutating func target(
        _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, diskSize: UInt64, sequence: UInt64,
        _ file: MetadataFile
    ) -> WriteTarget {
        guard failure == 0 else { return .unresolved(.failed(failure)) }
        let block = offset >> layout.blockBits
        let inBlock = offset & (layout.blockSize - 1)
        var found = slice(ofBlock: block, offset)
        if case .absent = found {
            if operation != .write { return .done(length: min(length, restOfSlice(offset))) }
            guard !isLocked else { return .unresolved(.wait) }
            do throws(MetadataError) { try makeTable(Int(sliceNumber(ofBlock: block)), file) } catch {
                return .unresolved(error.lookup)
            }
            found = slice(ofBlock: block, offset)
        }
        switch found {
        case .absent: return .unresolved(.failed(EIO))
        case .unresolved(let lookup): return .unresolved(lookup)
        case .entries(let entries):
            let (unit, run) = self.run(entries, block, inBlock: inBlock, length)
            switch unit {
            case .damaged(let damage): return .unresolved(damaged(damage, at: offset))
            case .compressed: return .unresolved(.failed(EROFS))
            case .data(let place):
                if let other = allocator?.metadata.first(in: place, inBlock + run) {
                    // What comes before the table is the guest's.
                    guard other > place + inBlock else {
                        return .unresolved(damaged(.blockInMetadata(offset: place), at: offset))
                    }
                    return .inPlace(offset: place + inBlock, length: other - place - inBlock)
                }
                return .inPlace(offset: place + inBlock, length: run)
            case .unallocated, .zero:
                if operation != .write { return .done(length: run) }
                guard !isLocked else { return .unresolved(.wait) }
                let whole = run >> layout.blockBits
                return inBlock == 0 && whole > 0
                    ? .clusters(whole) : .part(WriteTarget.Part(range: 0..<layout.blockSize, isZero: true, place: nil))
            }
        }
    }

    mutating func allocate(
        _ count: UInt64, at offset: UInt64, for part: WriteTarget.Part?, _ file: MetadataFile
    ) throws(MetadataError) -> ClusterRun {
        guard let slot = slices.slot(of: sliceNumber(ofBlock: offset >> layout.blockBits)) else { throw .failed(EIO) }
        let run = try takeBlocks(count, file)
        slices.pin(slot, 1)
        return run
    }

    private mutating func takeBlocks(_ count: UInt64, _ file: MetadataFile) throws(MetadataError) -> ClusterRun {
        guard var allocator else { throw .failed(EROFS) }
        var run: ClusterRun
        if let hole = allocator.holes.popLast() {
            run = ClusterRun(first: hole, count: 1)
        } else {
            guard allocator.next < allocator.limit else { throw .failed(EFBIG) }
            run = ClusterRun(
                first: allocator.next, count: min(count, allocator.limit - allocator.next),
                isPristine: allocator.next >= allocator.pristine)
            let end = allocator.base + (allocator.next + run.count) << layout.blockBits
            // Others do not bear a file that ends within a block.
            if end > fileSize { try file.write([0], at: end - 1) }
            fileSize = max(fileSize, end)
            allocator.next += run.count
        }
        if let place = allocator.uncleanPlace, !allocator.isMarkedUnclean {
            try file.write([1], at: place)
            allocator.isMarkedUnclean = true
        }
        allocator.needsBarrier = true
        self.allocator = allocator
        return run
    }

    mutating func link(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        // Pinned since the allocation.
        let block = offset >> layout.blockBits
        guard let slot = slices.slot(of: sliceNumber(ofBlock: block)) else { return }
        // A commit may have come between the allocation and the end of the write, whose data its synchronisation did
        // not cover.
        allocator?.needsBarrier = true
        for index in 0..<run.count {
            let entry: UInt32
            if case .vdi = layout.entries {
                entry = UInt32(truncatingIfNeeded: run.first + index)
            } else {
                entry = UInt32(truncatingIfNeeded: (place(of: run) + index << layout.blockBits) >> 9)
            }
            let place = Int((block + index) & ((1 << sliceBits) - 1)) * 4
            // A run is within its slice.
            slices.block(slot).store(littleEndian: entry, place)
        }
        slices.markDirty(slot)
        slices.pin(slot, -1)
    }

    mutating func abandon(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        if let slot = slices.slot(of: sliceNumber(ofBlock: offset >> layout.blockBits)) { slices.pin(slot, -1) }
        for index in (0..<run.count).reversed() { allocator?.holes.append(run.first + index) }
    }

    /// A grain table that was missing: a new one, and the second copy of it, in a new grain.
    private mutating func makeTable(_ table: Int, _ file: MetadataFile) throws(MetadataError) {
        let run = try takeBlocks(1, file)
        let place = self.place(of: run)
        do throws(MetadataError) {
            try file.write([UInt8](repeating: 0, count: 2 * GrainDirectory.tableSize), at: place)
        } catch {
            allocator?.holes.append(run.first)
            throw error
        }
        directory.set(table, sector: UInt32(truncatingIfNeeded: place >> 9))
        allocator?.metadata.insert(place..<place + layout.blockSize)
    }

    // MARK: - Commits

    mutating func beginCommit(_ file: MetadataFile) throws(MetadataError) -> Bool {
        guard failure == 0 else { throw .failed(failure) }
        guard let allocator, allocator.needsBarrier else { return false }
        try writeCount(file)
        isLocked = true
        return true
    }

    /// VDI's header says how many blocks there are, by which other programs find the place of a new one.
    private mutating func writeCount(_ file: MetadataFile) throws(MetadataError) {
        guard let allocator, let header = allocator.header, header.count != allocator.next else { return }
        try file.write(littleEndian(UInt32(truncatingIfNeeded: allocator.next)), at: header.place)
        self.allocator?.header = (header.place, allocator.next)
    }

    /// The count of blocks has its place in the header.
    mutating func writeAllocationTable(_ file: MetadataFile) throws(MetadataError) -> Bool { false }

    /// Writes the slices and the directory.
    mutating func writeMapping(_ file: MetadataFile) throws(MetadataError) {
        if isLocked { allocator?.needsBarrier = false }
        while let slot = slices.dirtySlot {
            let slice = slices.key(slot)
            let (place, length) = self.place(ofSlice: slice)
            // A block has at least `length` bytes.
            try file.write(slices.block(slot).prefix(length), at: place)
            let copy = directory.place(ofCopy: Int(slice))
            if copy != 0 { try file.write(slices.block(slot).prefix(length), at: copy) }
            slices.cleanFirst()
        }
        try directory.write(file)
    }

    /// Blocks are never freed.
    mutating func release(before sequence: UInt64, _ file: MetadataFile) throws(MetadataError) {}

    /// None of the formats has a mark for it.
    mutating func markDamage(_ file: MetadataFile) {}

    mutating func close(_ file: MetadataFile, _ data: MetadataFile) throws(MetadataError) {
        guard let allocator, failure == 0 else { return }
        if allocator.needsBarrier || slices.isDirty || directory.isDirty {
            try writeCount(file)
            try file.synchronize()
            try writeMapping(file)
            try file.synchronize()
        }
        if let place = allocator.uncleanPlace, allocator.isMarkedUnclean { try file.write([0], at: place) }
    }
}

/// Ranges of a file, sorted; what touches or overlaps is one.
struct ByteRanges: Equatable, Sendable {
    private(set) var ranges: [Range<UInt64>] = []
    /// Indicates whether two of what was put in overlap.
    private(set) var overlap = false

    init(_ unsorted: [Range<UInt64>] = []) {
        for range in unsorted.sorted(by: { $0.lowerBound < $1.lowerBound }) where !range.isEmpty {
            guard let last = ranges.last, range.lowerBound <= last.upperBound else {
                ranges.append(range)
                continue
            }
            if range.lowerBound < last.upperBound { overlap = true }
            ranges[ranges.count - 1] = last.lowerBound..<max(last.upperBound, range.upperBound)
        }
    }

    mutating func insert(_ range: Range<UInt64>) { self = ByteRanges(ranges + [range]) }

    /// The first byte from `start` on, of `length`, that is in one of them.
    func first(in start: UInt64, _ length: UInt64) -> UInt64? {
        var low = 0, high = ranges.count
        while low < high {
            let middle = (low + high) / 2
            if ranges[middle].upperBound <= start { low = middle + 1 } else { high = middle }
        }
        guard low < ranges.count, ranges[low].lowerBound < start &+ length else { return nil }
        return max(start, ranges[low].lowerBound)
    }
}

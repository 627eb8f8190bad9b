// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The metadata of one open file whose table maps its disk's equal blocks, as ``BlockMapLayout`` describes.
///
/// The table is kept in pieces as they are needed.
struct BlockMapImage: ImageMetadata, ~Copyable {
    let layout: BlockMapLayout
    let statistics: FileStatistics
    /// What was first found wrong, and where.
    private(set) var damage: FoundDamage?
    /// Bytes that the file has, or will have when what is allocated has been written.
    var fileSize: UInt64
    /// Pieces of the table, each known by its number.
    var slices: BlockCache
    /// log2 of the entries of a slice.
    let sliceBits: UInt64
    /// Where VMDK has the pieces of its table; empty in other formats.
    var directory: GrainDirectory
    /// Decompressed grains, each known by its place in the file. A block is a grain, followed by room for its
    /// compressed bytes.
    private var grains: BlockCache
    private let inflater: Inflater
    /// Held while the inflater's only state is used.
    private let decompression = Lock()
    /// What VHDX has to be laid over the table.
    private let log: VHDXLog

    // What follows is for an image that is written.

    var allocator: BlockAllocator?
    var isLocked = false
    var failure: Int32 = 0
    /// That of the descriptor that a VMDK file has in itself.
    private var contentID: VMDKContentID

    /// Bytes of the header of a compressed grain: the sector of the disk, and the length of what follows.
    private static let grainHeader = 12

    /// - Parameter layout: checked: the table, if it is an array, is inside the file.
    init(
        _ layout: BlockMapLayout, _ file: borrowing ImageFile, cacheSize: Int,
        directory: GrainDirectory = GrainDirectory(),
        allocator: BlockAllocator? = nil, contentID: VMDKContentID = VMDKContentID(), log: VHDXLog = VHDXLog()
    ) throws(DiskImageError) {
        let sliceSize = layout.table == .directory ? GrainDirectory.tableSize : 4096
        let sliceBits = UInt64(sliceSize.trailingZeroBitCount) - layout.entryBits
        let wanted = layout.entryCount >> sliceBits + 1
        let count = max(8, min(wanted, UInt64(min(max(cacheSize, 0), 1 << 30) / sliceSize)))
        // Deflate makes nothing longer by more than this.
        let room = Int(layout.blockSize) + Int(layout.blockSize >> 8) + 1024
        var isCompressed = false
        if case .vmdk(_, true) = layout.entries { isCompressed = true }
        let statistics = FileStatistics()
        let slices = try BlockCache(
            blockSize: sliceSize, count: Int(count), statistics: statistics.mapping, file.path)
        // Without compressed grains it is not used.
        let grains = try BlockCache(
            blockSize: isCompressed ? Int(layout.blockSize) + room : 1, count: 8,
            statistics: isCompressed ? statistics.decompressed : CacheStatistics(), file.path)
        guard let inflater = Inflater(windowBits: 15) else {
            throw .system(path: file.path, SystemCallError("inflateInit", errno: ENOMEM))
        }
        self.layout = layout
        self.statistics = statistics
        self.sliceBits = sliceBits
        self.slices = slices
        self.grains = grains
        self.directory = directory
        self.allocator = allocator
        self.inflater = inflater
        self.log = log
        self.contentID = contentID
        fileSize = max(file.size, log.fileSize)
    }

    var clusterSize: UInt64 { layout.blockSize }

    mutating func locate(_ offset: UInt64, _ length: UInt64, _ compressedPlace: inout UInt64) -> RangeLookup {
        if compressedPlace != 0 { return compressed(compressedPlace, offset, length) }
        let block = offset >> layout.blockBits
        switch slice(ofBlock: block, offset) {
        case .absent: return .unallocated(length: min(length, restOfSlice(offset)))
        case .unresolved(let lookup): return lookup
        case .entries(let entries):
            let (unit, run) = run(entries, block, inBlock: offset & (layout.blockSize - 1), length)
            switch unit {
            case .unallocated: return .unallocated(length: run)
            case .zero: return .zero(length: run)
            case .data(let place): return .data(offset: place + (offset & (layout.blockSize - 1)), length: run)
            case .damaged(let damage): return damaged(damage, at: offset)
            case .compressed(let place):
                compressedPlace = place
                return compressed(place, offset, length)
            }
        }
    }

    enum Slice {
        /// The slot of the cache that it is in.
        case entries(Int)
        /// An absent table: none of its blocks is allocated.
        case absent
        /// A load, a wait, a commit or a failure.
        case unresolved(RangeLookup)
    }

    func sliceNumber(ofBlock block: UInt64) -> UInt64 { layout.index(ofBlock: block) >> sliceBits }

    /// The place and length in the file of a slice that is there.
    func place(ofSlice slice: UInt64) -> (offset: UInt64, length: Int) {
        switch layout.table {
        case .array(let offset):
            let first = slice << sliceBits
            return (
                offset + first << layout.entryBits,
                Int(min(1 << sliceBits, layout.entryCount - first) << layout.entryBits)
            )
        case .directory:
            return (directory.place(ofTable: Int(slice)), GrainDirectory.tableSize)
        }
    }

    mutating func slice(ofBlock block: UInt64, _ offset: UInt64) -> Slice {
        let slice = sliceNumber(ofBlock: block)
        let (place, length) = self.place(ofSlice: slice)
        if layout.table == .directory {
            if place == 0 { return .absent }
            guard place <= fileSize, UInt64(length) <= fileSize - place else {
                return .unresolved(damaged(.blockTableBeyondEnd(offset: place), at: offset))
            }
        }
        switch slices.find(slice) {
        case .ready(let entries): return .entries(entries)
        case .loading: return .unresolved(.wait)
        case .failed(let error): return .unresolved(.failed(error))
        case .missing:
            guard let slot = slices.reserve(slice) else { return .unresolved(slices.isDirty ? .commit : .wait) }
            return .unresolved(
                .load(
                    MetadataLoad(
                        kind: .table, slot: slot, offset: place, buffer: slices.block(slot).prefix(length),
                        diskOffset: offset)))
        }
    }

    /// Bytes of the disk up to the end of what an offset's slice maps, in a table that is a directory's.
    func restOfSlice(_ offset: UInt64) -> UInt64 {
        let covered = layout.blockBits + sliceBits
        return (1 << covered) - offset & ((1 << covered) - 1)
    }

    @discardableResult
    mutating func complete(_ load: MetadataLoad, bytes: Int, error: Int32) -> Int32 {
        var error = error
        switch load.kind {
        case .table:
            // It was inside the file when the image was opened, so a short read means that the file was truncated
            // since.
            if error == 0, bytes < load.length { error = EIO }
            if error == 0, !log.isEmpty { log.apply(to: load.buffer, at: load.offset) }
            slices.complete(load.slot, error: error)
        case .compressed:
            if error == 0, !(load.isIntact ?? decompress(load, bytes)) {
                _ = damaged(.compressedGrainBroken(offset: load.offset), at: load.diskOffset)
                error = EIO
            }
            grains.complete(load.slot, error: error)
        }
        return error
    }

    mutating func unpin(_ load: MetadataLoad) {
        switch load.kind {
        case .table: slices.unpin(load.slot)
        case .compressed: grains.unpin(load.slot)
        }
    }

    func unreadableLength(at offset: UInt64, isTable: Bool) -> UInt64 {
        let unit = max(4096, layout.blockSize)
        return unit - offset % unit
    }

    var isPrepared: Bool { contentID.isReplaced }

    mutating func prepareChange(_ file: MetadataFile) throws(MetadataError) -> [String]? {
        try contentID.replace(file)
        return nil
    }

    mutating func damaged(_ damage: ImageDamage, at offset: UInt64) -> RangeLookup {
        if self.damage == nil {
            self.damage = FoundDamage(damage: damage, entry: entry(of: damage, at: offset), diskOffset: offset)
        }
        return .failed(EIO)
    }

    /// The entry that maps an offset, or that of the directory for its table.
    private func entry(of damage: ImageDamage, at offset: UInt64) -> TableEntry {
        let index = layout.index(ofBlock: offset >> layout.blockBits)
        switch layout.table {
        case .array(let start):
            let isVDI = if case .vdi = layout.entries { true } else { false }
            return TableEntry(
                table: isVDI ? .blockMap : .blockAllocationTable, start: start,
                offset: start + index << layout.entryBits)
        case .directory:
            let table = Int(index >> sliceBits), start = directory.place(ofTable: table)
            if case .blockTableBeyondEnd = damage { return directory.entry(ofTable: table) }
            let inTable = index & ((1 << sliceBits) - 1)
            return TableEntry(table: .grainTable, start: start, offset: start + inTable << layout.entryBits)
        }
    }

    // MARK: - Entries

    /// How a block is stored, and how many bytes from `inBlock` of it on, at most `length`, are stored alike, one after
    /// the other. `entries` is the block's slice.
    func run(_ entries: Int, _ block: UInt64, inBlock: UInt64, _ length: UInt64) -> (unit: StoredUnit, length: UInt64) {
        let slice = sliceNumber(ofBlock: block)
        let unit = self.unit(entries, block)
        var run = layout.blockSize
        var next = block + 1
        // The range ends with the disk, so blocks that it reaches have entries.
        while run - inBlock < length, sliceNumber(ofBlock: next) == slice,
            unit.continues(with: self.unit(entries, next), after: run)
        {
            run += layout.blockSize
            next += 1
        }
        return (unit, min(length, run - inBlock))
    }

    /// Reads and checks the entry of a block of a slice.
    func unit(_ entries: Int, _ block: UInt64) -> StoredUnit {
        let unit = layout.unit(entry(entries, block))
        switch unit {
        case .data(let place), .compressed(let place):
            // The last block of the file may be cut short, what is missing reads as zeroes; none starts beyond the end.
            return place < fileSize ? unit : .damaged(.blockBeyondEnd(offset: place))
        case .unallocated, .zero, .damaged:
            return unit
        }
    }

    private func entry(_ entries: Int, _ block: UInt64) -> UInt64 {
        let index = Int(layout.index(ofBlock: block) & ((1 << sliceBits) - 1))
        let block = slices.block(entries)
        return switch layout.entries {
        case .vdi, .vmdk: UInt64(block.load(littleEndian: index * 4, as: UInt32.self))
        case .vhd: UInt64(block.load(bigEndian: index * 4, as: UInt32.self))
        case .vhdx: block.load(littleEndian: index * 8)
        }
    }

    // MARK: - Compressed grains

    private mutating func compressed(_ place: UInt64, _ offset: UInt64, _ length: UInt64) -> RangeLookup {
        let inBlock = offset & (layout.blockSize - 1)
        switch grains.find(place) {
        case .ready(let slot):
            return .memory(grains.block(slot).piece(Int(inBlock), Int(min(length, layout.blockSize - inBlock))))
        case .loading: return .wait
        case .failed(let error): return .failed(error)
        case .missing:
            guard let slot = grains.reserve(place) else { return .wait }
            let size = Int(layout.blockSize)
            return .load(
                MetadataLoad(
                    kind: .compressed, slot: slot, offset: place,
                    buffer: grains.block(slot).piece(size, Int(min(UInt64(grains.blockSize - size), fileSize - place))),
                    diskOffset: offset))
        }
    }

    /// Decompresses a grain of which `bytes` have been read; a shorter one ends in zeroes.
    func decompress(_ load: MetadataLoad, _ bytes: Int) -> Bool {
        decompression.lock()
        defer { decompression.unlock() }
        guard bytes > Self.grainHeader else { return false }
        let length = Int(load.buffer.load(littleEndian: 8, as: UInt32.self))
        guard length <= bytes - Self.grainHeader else { return false }
        let output = grains.block(load.slot).prefix(Int(layout.blockSize))
        guard let got = inflater.decompress(load.buffer.piece(Self.grainHeader, length), into: output) else {
            return false
        }
        output.from(got).clear()
        return true
    }
}

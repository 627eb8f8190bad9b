// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The metadata of one open file whose table gives each of its disk's equal blocks a place: ``BlockMapLayout`` says how.
///
/// As ``QCOW2Image`` it tells how the disk is stored and does no I/O itself. The table is kept in pieces as they are needed, every entry is
/// checked when it is used, and what is damaged fails the requests that need it and nothing else.
@safe struct BlockMapImage: ~Copyable {
    let layout: BlockMapLayout
    /// What was first found wrong, and at which byte of the disk.
    private(set) var damage: (ImageDamage, diskOffset: UInt64)?
    /// Bytes that the file has, or will have when what is allocated has been written.
    var fileSize: UInt64
    /// Pieces of the table, each known by its number.
    var slices: BlockCache
    /// log2 of the entries of a slice.
    let sliceBits: UInt64
    /// Where VMDK has the pieces of its table; empty in other formats.
    var directory: GrainDirectory
    /// Decompressed grains, each known by its place in the file. A block is a grain, followed by room for its compressed bytes.
    private var grains: BlockCache
    private let inflater: Inflater
    /// Who has it uses the inflater's one state.
    private let decompression = Lock()
    /// What VHDX has to be laid over the table.
    private let log: VHDXLog

    // What follows is for an image that is written.

    var allocator: BlockAllocator?
    /// While a commit has made blocks durable and not yet what refers to them, the table does not change.
    var isLocked = false
    /// Why nothing can be written any more, an errno value: what the host said to have stored it has lost.
    var failure: Int32 = 0

    /// Bytes of the header of a compressed grain: the sector of the disk, and the length of what follows.
    private static let grainHeader = 12

    /// - Parameter layout: checked: the table, if it is an array, is inside the file.
    init(
        _ layout: BlockMapLayout, _ file: borrowing ImageFile, cacheSize: Int, directory: GrainDirectory = GrainDirectory(),
        allocator: BlockAllocator? = nil, log: VHDXLog = VHDXLog()
    ) throws(DiskImageError) {
        let sliceSize = layout.table == .directory ? GrainDirectory.tableSize : 4096
        let sliceBits = UInt64(sliceSize.trailingZeroBitCount) - layout.entryBits
        let wanted = layout.entryCount >> sliceBits + 1
        let count = max(8, min(wanted, UInt64(min(max(cacheSize, 0), 1 << 30) / sliceSize)))
        // Deflate makes nothing longer by more than this.
        let room = Int(layout.blockSize) + Int(layout.blockSize >> 8) + 1024
        var isCompressed = false
        if case .vmdk(_, true) = layout.entries { isCompressed = true }
        let slices = try cache(sliceSize, Int(count), file.path)
        let grains = try cache(isCompressed ? Int(layout.blockSize) + room : 1, 8, file.path)
        guard let inflater = Inflater(windowBits: 15) else { throw .system(path: file.path, SystemCallError("inflateInit", errno: ENOMEM)) }
        self.layout = layout
        self.sliceBits = sliceBits
        self.slices = slices
        self.grains = grains
        self.directory = directory
        self.allocator = allocator
        self.inflater = inflater
        self.log = log
        fileSize = max(file.size, log.fileSize)
    }

    /// How the range from `offset` is stored; `offset` is below the disk's size and `length` at least 1.
    /// - Parameter compressedPlace: keeps the place of a compressed grain from one call for the range to the next.
    mutating func locate(_ offset: UInt64, _ length: UInt64, _ compressedPlace: inout UInt64) -> RangeLookup {
        if compressedPlace != 0 { return compressed(compressedPlace, offset, length) }
        let block = offset >> layout.blockBits
        switch slice(ofBlock: block, offset) {
        case .absent: return .unallocated(length: min(length, restOfSlice(offset)))
        case .unresolved(let lookup): return lookup
        case .entries(let entries):
            let (unit, run) = unsafe run(entries, block, inBlock: offset & (layout.blockSize - 1), length)
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

    @safe enum Slice {
        case entries(UnsafeMutableRawPointer)
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
            return (offset + first << layout.entryBits, Int(min(1 << sliceBits, layout.entryCount - first) << layout.entryBits))
        case .directory:
            return (directory.place(ofTable: Int(slice)), GrainDirectory.tableSize)
        }
    }

    mutating func slice(ofBlock block: UInt64, _ offset: UInt64) -> Slice {
        let slice = sliceNumber(ofBlock: block)
        let (place, length) = self.place(ofSlice: slice)
        if layout.table == .directory {
            if place == 0 { return .absent }
            guard place <= fileSize, UInt64(length) <= fileSize - place else { return .unresolved(damaged(.blockTableBeyondEnd(offset: place), at: offset)) }
        }
        switch slices.find(slice) {
        case .ready(let entries): return unsafe .entries(entries)
        case .loading: return .unresolved(.wait)
        case .failed(let error): return .unresolved(.failed(error))
        case .missing:
            guard let slot = slices.reserve(slice) else { return .unresolved(slices.isDirty ? .commit : .wait) }
            return unsafe .unresolved(.load(MetadataLoad(
                kind: .l2Slice, slot: slot, offset: place, length: length, buffer: slices.block(slot), diskOffset: offset)))
        }
    }

    /// Bytes of the disk up to the end of what an offset's slice maps, in a table that is a directory's.
    func restOfSlice(_ offset: UInt64) -> UInt64 {
        let covered = layout.blockBits + sliceBits
        return (1 << covered) - offset & ((1 << covered) - 1)
    }

    /// A load has ended with `bytes` read, or with an errno value.
    @discardableResult
    mutating func complete(_ load: MetadataLoad, bytes: Int, error: Int32) -> Int32 {
        var error = error
        switch load.kind {
        case .l2Slice:
            // Its place was inside the file at open, so a short one means that somebody cut the file since.
            if error == 0, bytes < load.length { error = EIO }
            // The load's buffer has `length` bytes.
            if error == 0, !log.isEmpty { unsafe log.apply(to: UnsafeMutableRawBufferPointer(start: load.buffer, count: load.length), at: load.offset) }
            slices.complete(load.slot, error: error)
        case .compressedCluster:
            if error == 0, !(load.isIntact ?? decompress(load, bytes)) {
                _ = damaged(.compressedGrainBroken(offset: load.offset), at: load.diskOffset)
                error = EIO
            }
            grains.complete(load.slot, error: error)
        }
        return error
    }

    /// Those who waited for a load have been answered.
    mutating func unpin(_ load: MetadataLoad) {
        switch load.kind {
        case .l2Slice: slices.unpin(load.slot)
        case .compressedCluster: grains.unpin(load.slot)
        }
    }

    mutating func damaged(_ damage: ImageDamage, at offset: UInt64) -> RangeLookup {
        if self.damage == nil { self.damage = (damage, offset) }
        return .failed(EIO)
    }

    // MARK: - Entries

    /// How a block is stored, and how many bytes from `inBlock` of it on, at most `length`, are stored alike, one after the other.
    /// `entries` is the block's slice.
    func run(_ entries: UnsafeMutableRawPointer, _ block: UInt64, inBlock: UInt64, _ length: UInt64) -> (unit: QCOW2Image.Unit, length: UInt64) {
        let slice = sliceNumber(ofBlock: block)
        let unit = unsafe self.unit(entries, block)
        var run = layout.blockSize
        var next = block + 1
        // The range ends with the disk, so blocks that it reaches have entries.
        while run - inBlock < length, sliceNumber(ofBlock: next) == slice, unsafe unit.continues(with: self.unit(entries, next), after: run) {
            run += layout.blockSize
            next += 1
        }
        return (unit, min(length, run - inBlock))
    }

    /// Reads and checks the entry of a block of a slice.
    func unit(_ entries: UnsafeMutableRawPointer, _ block: UInt64) -> QCOW2Image.Unit {
        let unit = unsafe layout.unit(entry(entries, block))
        switch unit {
        case .data(let place), .compressed(let place):
            // The last block of the file may be cut short, what is missing reads as zeroes; none starts beyond the end.
            return place < fileSize ? unit : .damaged(.blockBeyondEnd(offset: place))
        case .unallocated, .zero, .damaged:
            return unit
        }
    }

    private func entry(_ entries: UnsafeMutableRawPointer, _ block: UInt64) -> UInt64 {
        let index = Int(layout.index(ofBlock: block) & ((1 << sliceBits) - 1))
        // Below the slice's number of entries.
        return switch layout.entries {
        case .vdi, .vmdk: unsafe UInt64(UInt32(littleEndian: entries.load(fromByteOffset: index * 4, as: UInt32.self)))
        case .vhd: unsafe UInt64(UInt32(bigEndian: entries.load(fromByteOffset: index * 4, as: UInt32.self)))
        case .vhdx: unsafe UInt64(littleEndian: entries.load(fromByteOffset: index * 8, as: UInt64.self))
        }
    }

    // MARK: - Compressed grains

    private mutating func compressed(_ place: UInt64, _ offset: UInt64, _ length: UInt64) -> RangeLookup {
        let inBlock = offset & (layout.blockSize - 1)
        switch grains.find(place) {
        case .ready(let bytes): return unsafe .memory(UnsafeRawPointer(bytes + Int(inBlock)), length: min(length, layout.blockSize - inBlock))
        case .loading: return .wait
        case .failed(let error): return .failed(error)
        case .missing:
            guard let slot = grains.reserve(place) else { return .wait }
            let size = Int(layout.blockSize)
            return unsafe .load(MetadataLoad(
                kind: .compressedCluster, slot: slot, offset: place, length: Int(min(UInt64(grains.blockSize - size), fileSize - place)),
                buffer: grains.block(slot) + size, diskOffset: offset))
        }
    }

    /// Decompresses a grain of which `bytes` have been read; a shorter one ends in zeroes.
    func decompress(_ load: MetadataLoad, _ bytes: Int) -> Bool {
        decompression.lock()
        defer { decompression.unlock() }
        guard bytes > Self.grainHeader else { return false }
        // Of the buffer, `bytes` have been read; the slot has a grain's room before it.
        let length = unsafe Int(UInt32(littleEndian: load.buffer.load(fromByteOffset: 8, as: UInt32.self)))
        guard length <= bytes - Self.grainHeader else { return false }
        let input = unsafe UnsafeRawBufferPointer(start: load.buffer + Self.grainHeader, count: length)
        let output = unsafe UnsafeMutableRawBufferPointer(start: grains.block(load.slot), count: Int(layout.blockSize))
        guard let got = unsafe inflater.decompress(input, into: output) else { return false }
        unsafe UnsafeMutableRawBufferPointer(rebasing: output[got...]).initializeMemory(as: UInt8.self, repeating: 0)
        return true
    }
}

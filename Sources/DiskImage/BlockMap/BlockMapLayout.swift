// SPDX-License-Identifier: Apache-2.0

/// How an image of equal blocks keeps them: one table says for each block where in the file it is. VDI, the sparse
/// extents of VMDK, VHD and VHDX are all of this kind, and differ in what an entry means.
struct BlockMapLayout: Equatable, Sendable {
    enum Entries: Equatable, Sendable {
        /// 32 bits, little-endian: the number of a block, the first of which begins at byte `data`; 2^32 - 1 for none,
        /// 2^32 - 2 for zeroes.
        case vdi(data: UInt64)
        /// 32 bits, little-endian: a grain's first sector; 0 for none and, if the header says so, 1 for zeroes.
        /// Compressed grains have a header of their own.
        case vmdk(hasZeroGrains: Bool, isCompressed: Bool)
        /// 32 bits, big-endian: a block's first sector, where `bitmap` bytes come before the data; 2^32 - 1 for none.
        case vhd(bitmap: UInt64)
        /// 64 bits, little-endian: a state and the block's place in MiB. Each `1 << chunkBits` entries are followed by
        /// another thing's.
        case vhdx(chunkBits: UInt64)
    }

    enum Table: Equatable, Sendable {
        /// All entries one after the other, from this byte of the file on.
        case array(offset: UInt64)
        /// Pieces of as many entries as `BlockMapImage.sliceSize` has room for, each of which a directory gives a
        /// place.
        case directory
    }

    /// Bytes of the disk, or of the extent, a multiple of 512.
    let size: UInt64
    /// log2 of a block's bytes.
    let blockBits: UInt64
    let entries: Entries
    let table: Table

    var blockSize: UInt64 { 1 << blockBits }
    /// Blocks that the disk needs, the last of which may be cut.
    var blockCount: UInt64 { (size >> blockBits) + (size & (blockSize - 1) == 0 ? 0 : 1) }
    /// Entries from the first to that of the last block.
    var entryCount: UInt64 { blockCount == 0 ? 0 : index(ofBlock: blockCount - 1) + 1 }
    /// log2 of an entry's bytes.
    var entryBits: UInt64 { if case .vhdx = entries { 3 } else { 2 } }

    func index(ofBlock block: UInt64) -> UInt64 {
        if case .vhdx(let chunkBits) = entries { block + block >> chunkBits } else { block }
    }

    /// How a block is stored, by its entry. The place is not yet compared with the file's size.
    func unit(_ entry: UInt64) -> StoredUnit {
        switch entries {
        case .vdi(let data):
            entry == 0xffff_ffff ? .unallocated : entry == 0xffff_fffe ? .zero : .data(data + entry << blockBits)
        case .vmdk(let hasZeroGrains, let isCompressed):
            entry == 0
                ? .unallocated
                : hasZeroGrains && entry == 1 ? .zero : isCompressed ? .compressed(entry * 512) : .data(entry * 512)
        case .vhd(let bitmap):
            entry == 0xffff_ffff ? .unallocated : .data(entry * 512 + bitmap)
        case .vhdx:
            switch entry & 7 {
            case 0: .unallocated
            // Undefined, zero, and unmapped as the specification and as an older draft of it number it: zeroes are
            // right for all.
            case 1, 2, 3, 5: .zero
            case 6: .data(entry & ~0xfffff)
            default: .damaged(.blockState(entry & 7))
            }
        }
    }
}

extension RandomAccessCollection<UInt8> where Index == Int {
    /// The bytes at an offset from the start, which the caller has checked to be there.
    private func littleEndian(_ count: Int, at offset: Int) -> UInt64 {
        self[startIndex + offset..<startIndex + offset + count].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }

    func littleEndian16(at offset: Int) -> UInt16 { UInt16(truncatingIfNeeded: littleEndian(2, at: offset)) }
    func littleEndian32(at offset: Int) -> UInt32 { UInt32(truncatingIfNeeded: littleEndian(4, at: offset)) }
    func littleEndian64(at offset: Int) -> UInt64 { littleEndian(8, at: offset) }
}

/// The bytes of a value in the order of most formats.
func littleEndian<Value: FixedWidthInteger>(_ value: Value) -> [UInt8] {
    (0..<Value.bitWidth / 8).map { UInt8(truncatingIfNeeded: value >> Value(truncatingIfNeeded: 8 * $0)) }
}

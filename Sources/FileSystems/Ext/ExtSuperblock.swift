// SPDX-License-Identifier: Apache-2.0

/// The superblock of ext2, ext3 or ext4, checked.
struct ExtSuperblock: Sendable {
    let blockSize: Int
    let blockCount: UInt64
    let firstDataBlock: UInt64
    let blocksPerGroup: UInt64
    let inodeCount: UInt32
    let inodesPerGroup: UInt32
    let inodeSize: Int
    let descriptorSize: Int
    let firstMetaGroup: UInt64
    let compatible: UInt32
    let incompatible: Incompatible
    let readOnly: UInt32
    let backupGroups: [UInt64]
    let journalInode: UInt32
    let uuid: [UInt8]
    let label: String
    /// Where the checksums of all metadata begin; nil without `metadata_csum`.
    let checksumSeed: UInt32?

    struct Incompatible: OptionSet, Sendable {
        let rawValue: UInt32
        static let compression = Incompatible(rawValue: 0x1)
        static let recover = Incompatible(rawValue: 0x4)
        static let journalDevice = Incompatible(rawValue: 0x8)
        static let metaGroups = Incompatible(rawValue: 0x10)
        static let extents = Incompatible(rawValue: 0x40)
        static let wide = Incompatible(rawValue: 0x80)
        static let checksumSeed = Incompatible(rawValue: 0x2000)
        static let inlineData = Incompatible(rawValue: 0x8000)
        /// filetype, recover, meta_bg, extent, 64bit, mmp, flex_bg, ea_inode, metadata_csum_seed, large_dir,
        /// inline_data, encrypt (its files are refused one by one), casefold (names are compared as they are).
        static let known = Incompatible(
            rawValue: 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0xe000 | 0x30000)
    }

    static let offset: UInt64 = 1024
    static let size = 1024

    static func matches(_ bytes: [UInt8]) -> Bool { bytes.little16(0x38) == 0xef53 }

    var groupCount: UInt64 { (blockCount - firstDataBlock + blocksPerGroup - 1) / blocksPerGroup }
    var hasGroupChecksums: Bool { readOnly & 0x10 != 0 }
    /// `ext2`, `ext3` or `ext4`, as the features make it.
    var kind: String {
        if !incompatible.isDisjoint(with: [.extents, .wide]) || readOnly & 0x478 != 0 { return "ext4" }
        return compatible & 4 != 0 ? "ext3" : "ext2"
    }

    init(_ bytes: [UInt8], volumeSize: UInt64) throws(FileSystemError) {
        func damaged(_ reason: String) -> FileSystemError { .damaged(what: "the superblock of ext4", reason: reason) }

        let shift = bytes.little32(0x18)
        guard shift <= 6 else { throw damaged("its block size is 2 to the power of \(UInt64(shift) + 10)") }
        blockSize = 1024 << Int(shift)
        compatible = bytes.little32(0x5c)
        incompatible = Incompatible(rawValue: bytes.little32(0x60))
        readOnly = bytes.little32(0x64)
        let isOld = bytes.little32(0x4c) == 0
        uuid = bytes.piece(0x68, 16)
        label = bytes.text(0x78, 16)
        guard !incompatible.contains(.journalDevice) else {
            throw .unsupported(what: "this ext4 file system", reason: "it is the journal of another one")
        }
        let unknown = incompatible.subtracting(.known)
        guard unknown.isEmpty else {
            throw .unsupported(
                what: "this ext4 file system",
                reason: unknown.contains(.compression)
                    ? "it is compressed"
                    : "it has the unknown incompatible features 0x\(hexadecimal(UInt64(unknown.rawValue), 1))")
        }
        if readOnly & 0x400 != 0 {
            guard bytes.little32(0x3fc) == CRC32.castagnoli.update(.max, bytes.prefix(0x3fc)) else {
                throw damaged("its checksum is wrong")
            }
            checksumSeed =
                incompatible.contains(.checksumSeed)
                ? bytes.little32(0x270) : CRC32.castagnoli.update(.max, bytes.piece(0x68, 16))
        } else {
            checksumSeed = nil
        }

        let isWide = incompatible.contains(.wide)
        let blockCount = UInt64(bytes.little32(4)) | (isWide ? UInt64(bytes.little32(0x150)) << 32 : 0)
        self.blockCount = blockCount
        firstDataBlock = UInt64(bytes.little32(0x14))
        blocksPerGroup = UInt64(bytes.little32(0x20))
        inodeCount = bytes.little32(0)
        inodesPerGroup = bytes.little32(0x28)
        inodeSize = isOld ? 128 : Int(bytes.little16(0x58))
        descriptorSize = isWide ? Int(bytes.little16(0xfe)) : 32
        firstMetaGroup = UInt64(bytes.little32(0x104))
        backupGroups = [UInt64(bytes.little32(0x24c)), UInt64(bytes.little32(0x250))]
        journalInode = compatible & 4 != 0 ? bytes.little32(0xe0) : 0

        guard blockCount <= UInt64(Int64.max) / UInt64(blockSize), blockCount * UInt64(blockSize) <= volumeSize else {
            throw damaged("it has \(blockCount) blocks of \(blockSize) bytes, and its partition \(volumeSize) bytes")
        }
        guard firstDataBlock == (blockSize == 1024 ? 1 : 0) || firstDataBlock == 0, firstDataBlock < blockCount else {
            throw damaged("its first data block is \(firstDataBlock)")
        }
        guard (1...UInt64(blockSize) * 8).contains(blocksPerGroup) || readOnly & 0x200 != 0, blocksPerGroup > 0 else {
            throw damaged("it has \(blocksPerGroup) blocks in a group")
        }
        guard inodesPerGroup > 0, inodeCount > 10 else { throw damaged("it has no inodes") }
        guard inodeSize >= 128, inodeSize <= blockSize, inodeSize.nonzeroBitCount == 1 else {
            throw damaged("its inodes have \(inodeSize) bytes")
        }
        guard descriptorSize >= (isWide ? 64 : 32), descriptorSize <= blockSize, descriptorSize.nonzeroBitCount == 1
        else {
            throw damaged("its group descriptors have \(descriptorSize) bytes")
        }
        if incompatible.contains(.recover), bytes.little32(0xe4) != 0, journalInode == 0 {
            throw .unsupported(
                what: "this ext4 file system",
                reason:
                    "it was not unmounted cleanly, and its journal is on another device: mount it once, or run e2fsck")
        }
    }

    /// The block with a group's descriptor, and the descriptor's offset in it.
    func descriptorPlace(ofGroup group: UInt64) -> (block: UInt64, offset: Int) {
        let perBlock = UInt64(blockSize / descriptorSize)
        let table = group / perBlock
        let offset = Int(group % perBlock) * descriptorSize
        guard incompatible.contains(.metaGroups), table >= firstMetaGroup else {
            // With blocks of 1 KiB block 1 has the superblock, also where bigalloc counts from block 0.
            return (max(firstDataBlock, blockSize == 1024 ? 1 : 0) + 1 + table, offset)
        }
        let first = table * perBlock
        return (firstDataBlock &+ first &* blocksPerGroup &+ (hasBackup(first) ? 1 : 0), offset)
    }

    /// Indicates whether a group begins with a copy of the superblock.
    private func hasBackup(_ group: UInt64) -> Bool {
        if group == 0 { return true }
        if compatible & 0x200 != 0 { return backupGroups.contains(group) }
        guard readOnly & 1 != 0, group > 1 else { return true }
        return ([3, 5, 7] as [UInt64]).contains { base in
            var power = base
            while power < group { power *= base }
            return power == group
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

/// ext2, ext3 or ext4, read as it will be when its journal has been replayed.
///
/// Metadata is verified where it has checksums. The journal is replayed in memory: ``ExtJournal`` says which blocks it
/// has newer copies of, and those are read instead.
public struct ExtFileSystem: FileSystem {
    let volume: Volume
    let superblock: ExtSuperblock
    private let journal: ExtJournal?

    public var kind: String { superblock.kind }
    public var uuid: String? { uuidText(superblock.uuid) }
    public var label: String { superblock.label }
    public var ignoresCase: Bool { false }

    /// The largest directory that is read.
    private static let maximumDirectory: UInt64 = 16 << 20
    /// The most blocks with the map of one file.
    private static let maximumMapBlocks = 1 << 16

    /// nil where there is no such file system.
    init?(_ volume: Volume) throws(FileSystemError) {
        guard volume.contains(ExtSuperblock.offset, UInt64(ExtSuperblock.size)) else { return nil }
        let bytes = try volume.read(at: ExtSuperblock.offset, count: ExtSuperblock.size)
        guard ExtSuperblock.matches(bytes) else { return nil }
        self.volume = volume
        let stored = try ExtSuperblock(bytes, volumeSize: volume.size)
        guard stored.incompatible.contains(.recover), stored.journalInode != 0 else {
            (superblock, journal) = (stored, nil)
            return
        }
        let bare = ExtFileSystem(volume, stored)
        let journal = try ExtJournal(
            bare.fileContents(bare.inode(stored.journalInode), "the journal"), blockSize: stored.blockSize)
        self.journal = journal
        // Of the superblock, too, the journal may have a newer one.
        let offset = Int(ExtSuperblock.offset) % stored.blockSize
        let copy = try journal.block(ExtSuperblock.offset / UInt64(stored.blockSize))
        superblock =
            try copy.map { copy throws(FileSystemError) in
                try ExtSuperblock(copy.piece(offset, ExtSuperblock.size), volumeSize: volume.size)
            } ?? stored
        guard superblock.blockSize == stored.blockSize else {
            throw .damaged(what: "the journal of the ext4 file system", reason: "it changes the size of blocks")
        }
    }

    /// The file system without its journal, which is what the journal itself is in.
    private init(_ volume: Volume, _ superblock: ExtSuperblock) {
        (self.volume, self.superblock, journal) = (volume, superblock, nil)
    }

    private func damaged(_ reason: String) -> FileSystemError {
        .damaged(what: "the \(kind) file system", reason: reason)
    }

    // MARK: Blocks

    /// A block of metadata as it is now.
    private func block(_ number: UInt64) throws(FileSystemError) -> [UInt8] {
        guard number < superblock.blockCount else {
            throw damaged("it refers to block \(number) and has \(superblock.blockCount)")
        }
        if let copy = try journal?.block(number) { return copy }
        return try volume.read(at: number * UInt64(superblock.blockSize), count: superblock.blockSize)
    }

    // MARK: Inodes

    func inode(_ number: UInt32) throws(FileSystemError) -> ExtInode {
        guard number > 0, number <= superblock.inodeCount else {
            throw damaged("it refers to inode \(number) and has \(superblock.inodeCount)")
        }
        let group = UInt64((number - 1) / superblock.inodesPerGroup)
        let index = UInt64((number - 1) % superblock.inodesPerGroup)
        let position =
            try inodeTable(ofGroup: group) * UInt64(superblock.blockSize) + index * UInt64(superblock.inodeSize)
        let block = try block(position / UInt64(superblock.blockSize))
        let bytes = block.piece(Int(position % UInt64(superblock.blockSize)), superblock.inodeSize)
        let inode = ExtInode(number: number, bytes: bytes)
        guard inode.mode != 0 else { throw damaged("it refers to the unused inode \(number)") }
        try verify(inode)
        return inode
    }

    private func inodeTable(ofGroup group: UInt64) throws(FileSystemError) -> UInt64 {
        guard group < superblock.groupCount else { throw damaged("it refers to group \(group)") }
        let place = superblock.descriptorPlace(ofGroup: group)
        let bytes = try block(place.block).piece(place.offset, superblock.descriptorSize)
        let stored = bytes.little16(0x1e)
        if let seed = superblock.checksumSeed {
            let value = CRC32.castagnoli.update(
                CRC32.castagnoli.update(seed, little: UInt32(truncatingIfNeeded: group)), bytes.clearing(0x1e..<0x20))
            guard UInt16(truncatingIfNeeded: value) == stored else {
                throw damaged("the descriptor of group \(group) has a wrong checksum")
            }
        } else if superblock.hasGroupChecksums {
            let number = (0..<4).map { UInt8(truncatingIfNeeded: group >> (8 * UInt64($0))) }
            let value = crc16(crc16(crc16(.max, superblock.uuid), number), bytes.piece(0, 0x1e) + bytes.dropFirst(0x20))
            guard value == stored else { throw damaged("the descriptor of group \(group) has a wrong checksum") }
        }
        let table =
            UInt64(bytes.little32(8)) | (superblock.descriptorSize >= 64 ? UInt64(bytes.little32(0x28)) << 32 : 0)
        guard table < superblock.blockCount else { throw damaged("the inodes of group \(group) are past its end") }
        return table
    }

    private func verify(_ inode: ExtInode) throws(FileSystemError) {
        guard let seed = checksumSeed(of: inode) else { return }
        var stored = UInt32(inode.bytes.little16(0x7c)), mask: UInt32 = 0xffff
        var bytes = inode.bytes.clearing(0x7c..<0x7e)
        if inode.bytes.count > 128, inode.bytes.little16(0x80) >= 4 {
            stored |= UInt32(inode.bytes.little16(0x82)) << 16
            mask = .max
            bytes = bytes.clearing(0x82..<0x84)
        }
        guard CRC32.castagnoli.update(seed, bytes) & mask == stored else {
            throw damaged("inode \(inode.number) has a wrong checksum")
        }
    }

    /// Where the checksums of an inode's metadata begin; nil without.
    private func checksumSeed(of inode: ExtInode) -> UInt32? {
        superblock.checksumSeed.map {
            CRC32.castagnoli.update(
                CRC32.castagnoli.update($0, little: inode.number), little: inode.generation)
        }
    }

    // MARK: Contents

    public func root() throws(FileSystemError) -> FileNode { try inode(2).node }

    public func node(of entry: DirectoryEntry) throws(FileSystemError) -> FileNode {
        switch entry.place {
        case .ext(let number): try inode(number).node
        case .node(let node): node
        }
    }

    public func contents(of file: FileNode) throws(FileSystemError) -> FileContents {
        try fileContents(inode(of: file), "the file")
    }

    public func target(of link: FileNode) throws(FileSystemError) -> [UInt8] {
        let inode = try inode(of: link)
        let target =
            try inode.isFastLink
            ? inode.map.piece(0, Int(inode.size)) : fileContents(inode, "the link").all(limit: 4096, "a symbolic link")
        guard !target.isEmpty, !target.contains(0) else {
            throw damaged("the symbolic link of inode \(inode.number) has no valid target")
        }
        return target
    }

    private func inode(of node: FileNode) throws(FileSystemError) -> ExtInode {
        guard case .ext(let inode) = node.place else { throw damaged("a file of another file system was asked for") }
        return inode
    }

    /// Where an inode's bytes are.
    private func fileContents(_ inode: ExtInode, _ what: String) throws(FileSystemError) -> FileContents {
        guard inode.flags.isDisjoint(with: .encrypted) else {
            throw .unsupported(what: "\(what) of inode \(inode.number)", reason: "it is encrypted (fscrypt)")
        }
        guard inode.size <= UInt64(Int64.max) else {
            throw damaged("inode \(inode.number) has \(inode.size) bytes")
        }
        if inode.flags.contains(.inlineData) {
            var bytes = inode.map
            if inode.size > 60 {
                guard let rest = inode.inlineRest() else {
                    throw damaged("inode \(inode.number) has inline data without its attribute")
                }
                bytes += rest
            }
            guard inode.size <= UInt64(bytes.count) else {
                throw damaged(
                    "inode \(inode.number) has \(inode.size) bytes of inline data, and room for \(bytes.count)")
            }
            return FileContents(bytes: bytes.piece(0, Int(inode.size)))
        }
        var map = BlockRuns(size: inode.size, blockSize: UInt64(superblock.blockSize))
        if inode.flags.contains(.extents) {
            try addExtents(inode.map, depth: nil, inode, &map)
        } else {
            try addBlocks(inode, &map)
        }
        return try contents(map, inode)
    }

    /// The pieces of a file: those blocks of it that the journal has newer copies of come from there.
    private func contents(_ map: BlockRuns, _ inode: ExtInode) throws(FileSystemError) -> FileContents {
        guard let journal, !journal.isEmpty else { return FileContents(size: inode.size, map.pieces, in: [volume]) }
        let blockSize = UInt64(superblock.blockSize)
        var pieces: [FileContents.Piece] = [], copies: [Volume] = [volume]
        for piece in map.pieces {
            var start: UInt64 = 0
            let first = piece.place / blockSize
            for number in journal.blocks(in: first..<first + piece.length / blockSize) {
                guard let copy = try journal.block(number) else { continue }
                let offset = (number - first) * blockSize
                if offset > start {
                    pieces.append(
                        .init(offset: piece.offset + start, length: offset - start, place: piece.place + start))
                }
                pieces.append(.init(offset: piece.offset + offset, length: blockSize, place: 0, volume: copies.count))
                copies.append(Volume(bytes: copy))
                start = offset + blockSize
            }
            if start < piece.length {
                pieces.append(
                    .init(offset: piece.offset + start, length: piece.length - start, place: piece.place + start))
            }
        }
        return FileContents(size: inode.size, pieces, in: copies)
    }

    // MARK: Maps

    /// Adds the extents of a node of the tree, and of those below it.
    /// - Parameter depth: the node's height; nil for the root, which states its own.
    private func addExtents(
        _ node: [UInt8], depth wanted: UInt16?, _ inode: ExtInode, _ map: inout BlockRuns
    ) throws(FileSystemError) {
        func broken(_ reason: String) -> FileSystemError { damaged("the extents of inode \(inode.number): \(reason)") }
        let count = Int(node.little16(2)), room = Int(node.little16(4)), depth = node.little16(6)
        guard node.little16(0) == 0xf30a else { throw broken("a node has no magic number") }
        guard count <= room, 12 + room * 12 <= node.count else {
            throw broken("a node has \(count) entries of \(room)")
        }
        guard depth <= 5, wanted == nil || depth == wanted else { throw broken("a node is at the wrong depth") }
        if wanted != nil, let seed = checksumSeed(of: inode) {
            let end = 12 + room * 12
            guard end + 4 <= node.count, CRC32.castagnoli.update(seed, node[..<end]) == node.little32(end) else {
                throw broken("a node has a wrong checksum")
            }
        }
        for index in 0..<count {
            let entry = 12 + index * 12
            let logical = UInt64(node.little32(entry))
            if depth == 0 {
                let length = node.little16(entry + 4)
                // What was allocated and never written is longer than any other extent.
                let isWritten = length <= 0x8000
                let place = UInt64(node.little16(entry + 6)) << 32 | UInt64(node.little32(entry + 8))
                let blocks = UInt64(isWritten ? length : length - 0x8000)
                guard blocks > 0, place < superblock.blockCount, blocks <= superblock.blockCount - place else {
                    throw broken("an extent is past the file system's end")
                }
                guard map.end <= logical else { throw broken("two extents overlap") }
                try map.add(logical, isWritten ? place : nil, blocks)
            } else {
                let child = UInt64(node.little16(entry + 8)) << 32 | UInt64(node.little32(entry + 4))
                map.blocksRead += 1
                guard map.blocksRead <= Self.maximumMapBlocks else { throw broken("there are too many") }
                try addExtents(block(child), depth: depth - 1, inode, &map)
            }
        }
    }

    /// Adds the blocks of ext2's map: twelve, then those of blocks with numbers of blocks, up to three deep.
    private func addBlocks(_ inode: ExtInode, _ map: inout BlockRuns) throws(FileSystemError) {
        let numbers = inode.map
        for index in 0..<12 { try addBlock(numbers.little32(index * 4), height: 0, inode, &map) }
        for height in 1...3 { try addBlock(numbers.little32((11 + height) * 4), height: height, inode, &map) }
    }

    private func addBlock(
        _ number: UInt32, height: Int, _ inode: ExtInode, _ map: inout BlockRuns
    ) throws(FileSystemError) {
        guard map.end < map.blockCount else { return }
        let perBlock = UInt64(superblock.blockSize / 4)
        let span = (0..<height).reduce(1 as UInt64) { span, _ in span * perBlock }
        guard number != 0 else { return try map.add(map.end, nil, span) }
        guard UInt64(number) < superblock.blockCount else {
            throw damaged("inode \(inode.number) refers to block \(number), past the end")
        }
        guard height > 0 else { return try map.add(map.end, UInt64(number), 1) }
        map.blocksRead += 1
        guard map.blocksRead <= Self.maximumMapBlocks else {
            throw damaged("the map of inode \(inode.number) has too many blocks")
        }
        let numbers = try block(UInt64(number))
        for index in 0..<Int(perBlock) {
            try addBlock(numbers.little32(index * 4), height: height - 1, inode, &map)
        }
    }

    // MARK: Directories

    public func entries(of directory: FileNode) throws(FileSystemError) -> [DirectoryEntry] {
        let inode = try inode(of: directory)
        guard inode.kind == .directory else { throw damaged("inode \(inode.number) is not a directory") }
        guard inode.size <= Self.maximumDirectory else {
            throw .tooLarge(what: "a directory", size: inode.size, limit: Self.maximumDirectory)
        }
        var entries: [DirectoryEntry] = []
        if inode.flags.contains(.inlineData) {
            // The parent's number, then entries up to the end of the map, then those of the attribute.
            try addEntries(inode.map.piece(4, 56), &entries, inode)
            if let rest = inode.inlineRest(), !rest.isEmpty { try addEntries(rest, &entries, inode) }
            return entries
        }
        let contents = try fileContents(inode, "the directory")
        let blockSize = UInt64(superblock.blockSize)
        guard contents.size % blockSize == 0 else { throw damaged("directory \(inode.number) ends within a block") }
        var offset: UInt64 = 0
        while offset < contents.size {
            let hole = contents.hole(at: offset) / blockSize * blockSize
            if hole > 0 {
                offset += hole
                continue
            }
            let block = try contents.read(at: offset, count: superblock.blockSize)
            let end = try verify(block, isFirst: offset == 0, inode)
            try addEntries(Array(block[..<end]), &entries, inode)
            offset += blockSize
        }
        return entries
    }

    /// Verifies a directory's block and returns where its entries end.
    private func verify(_ block: [UInt8], isFirst: Bool, _ inode: ExtInode) throws(FileSystemError) -> Int {
        guard let seed = checksumSeed(of: inode) else { return block.count }
        let tail = block.count - 12
        if block.little32(tail) == 0, block.little16(tail + 4) == 12, block.little16(tail + 6) == 0xde00 {
            guard CRC32.castagnoli.update(seed, block[..<tail]) == block.little32(tail + 8) else {
                throw damaged("a block of directory \(inode.number) has a wrong checksum")
            }
            return tail
        }
        // A node of the hash tree, which looks like a block with no entries, or like one with `.` and `..` alone.
        let counts = isFirst ? 0x20 : 8
        let room = Int(block.little16(counts)), count = Int(block.little16(counts + 2))
        let place = counts + room * 8
        guard inode.flags.contains(.indexed), count <= room, place + 8 <= block.count else {
            throw damaged("a block of directory \(inode.number) has no checksum")
        }
        var value = CRC32.castagnoli.update(seed, block[..<(counts + count * 8)])
        value = CRC32.castagnoli.update(value, block.piece(place, 4) + [0, 0, 0, 0])
        guard value == block.little32(place + 4) else {
            throw damaged("a block of the index of directory \(inode.number) has a wrong checksum")
        }
        return isFirst ? block.count : 0
    }

    private func addEntries(
        _ bytes: [UInt8], _ entries: inout [DirectoryEntry], _ inode: ExtInode
    ) throws(FileSystemError) {
        var offset = 0
        while offset + 8 <= bytes.count {
            let number = bytes.little32(offset), stored = Int(bytes.little16(offset + 4))
            // Blocks of 64 KiB need a length that does not fit.
            let length = superblock.blockSize == 65536 && (stored == 65535 || stored == 0) ? 65536 : stored
            let nameLength = Int(bytes[offset + 6])
            guard length >= 12 || offset + length == bytes.count, length >= 8, length % 4 == 0,
                nameLength + 8 <= length,
                length <= bytes.count - offset
            else { throw damaged("an entry of directory \(inode.number) has a wrong length") }
            let name = bytes.piece(offset + 8, nameLength)
            offset += length
            guard number != 0, !name.elementsEqual(".".utf8), !name.elementsEqual("..".utf8) else { continue }
            guard !name.isEmpty, !name.contains(0), !name.contains(UInt8(ascii: "/")) else {
                throw damaged("directory \(inode.number) has an entry without a valid name")
            }
            entries.append(DirectoryEntry(name: name, place: .ext(number)))
        }
    }
}

/// Where the blocks of a file are, as they are found from its start to its end.
private struct BlockRuns {
    let blockSize: UInt64
    /// Blocks up to the file's end; what is allocated beyond is left out.
    let blockCount: UInt64
    /// The block behind the last one added.
    private(set) var end: UInt64 = 0
    private(set) var pieces: [FileContents.Piece] = []
    var blocksRead = 0

    init(size: UInt64, blockSize: UInt64) {
        self.blockSize = blockSize
        blockCount = size / blockSize + (size % blockSize == 0 ? 0 : 1)
    }

    /// Adds blocks, or with nil a hole. `place` and `count` are inside the file system.
    mutating func add(_ logical: UInt64, _ place: UInt64?, _ count: UInt64) throws(FileSystemError) {
        end = logical &+ count
        guard let place, logical < blockCount else { return }
        let length = min(count, blockCount - logical) * blockSize
        if let last = pieces.last, last.offset + last.length == logical * blockSize,
            last.place + last.length == place * blockSize
        {
            pieces[pieces.count - 1].length += length
            return
        }
        guard pieces.count < FileContents.maximumPieces else {
            throw .unsupported(what: "a file", reason: "it is in more than \(FileContents.maximumPieces) pieces")
        }
        pieces.append(.init(offset: logical * blockSize, length: length, place: place * blockSize))
    }
}

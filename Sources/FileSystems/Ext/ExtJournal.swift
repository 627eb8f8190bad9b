// SPDX-License-Identifier: Apache-2.0

/// What a journal (jbd2) that was not written back has: the newest copy of each block, by the transactions that were
/// committed.
struct ExtJournal: Sendable {
    /// The copy of a block.
    private struct Copy: Sendable {
        /// The block of the journal.
        var place: UInt32
        var transaction: UInt32
        /// The copy begins with the journal's magic number, which was replaced by zeroes.
        var isEscaped: Bool
        /// nil without checksums; the upper half is not compared where they have 16 bits.
        var checksum: UInt32?
    }

    private let contents: FileContents
    private let blockSize: Int
    private let features: Features
    private let seed: UInt32
    /// Of the blocks of a whole transaction, which older journals have instead of checksums of each; nil without.
    private let transactionChecksum: BigEndianCRC32?
    private var copies: [UInt64: Copy] = [:]
    /// The blocks that have copies, sorted.
    private var numbers: [UInt64] = []

    private struct Features: OptionSet, Sendable {
        let rawValue: UInt32
        static let wide = Features(rawValue: 2)
        static let checksums2 = Features(rawValue: 8)
        static let checksums3 = Features(rawValue: 0x10)
        static let fastCommit = Features(rawValue: 0x20)
        /// These, revoke (1) and async_commit (4), which change nothing here.
        static let known = Features(rawValue: 0x3f)
    }

    private static let magic: UInt32 = 0xc03b_3998
    /// The largest journal that is searched; mke2fs makes 1 GiB at most.
    private static let maximumSize: UInt64 = 4 << 30
    /// Of which there may be copies, and which may be revoked.
    private static let maximumBlocks = 1 << 20

    var isEmpty: Bool { copies.isEmpty }

    private static func damaged(_ reason: String) -> FileSystemError {
        .damaged(what: "the journal of the ext4 file system", reason: reason)
    }

    private static func tooMuch(_ what: String) -> FileSystemError {
        .unsupported(
            what: "the journal of the ext4 file system",
            reason: "it has \(what) of more than \(maximumBlocks) blocks: mount it once, or run e2fsck")
    }

    /// Reads which blocks a journal has copies of.
    init(_ contents: FileContents, blockSize: Int) throws(FileSystemError) {
        self.contents = contents
        self.blockSize = blockSize
        guard contents.size >= 1024, contents.size <= Self.maximumSize else {
            throw Self.damaged("it has \(contents.size) bytes")
        }
        let head = try contents.read(at: 0, count: 1024)
        let version = head.big32(4)
        guard head.big32(0) == Self.magic, version == 3 || version == 4, head.big32(0xc) == UInt32(blockSize) else {
            throw Self.damaged("it has no superblock")
        }
        features = Features(rawValue: version == 4 ? head.big32(0x28) : 0)
        guard features.isSubset(of: .known) else {
            throw .unsupported(
                what: "the journal of the ext4 file system",
                reason: "it has the unknown features 0x\(hexadecimal(UInt64(features.rawValue), 1))")
        }
        let hasChecksums = !features.isDisjoint(with: [.checksums2, .checksums3])
        if hasChecksums {
            guard head.big32(0xfc) == CRC32.castagnoli.update(.max, head.clearing(0xfc..<0x100)) else {
                throw Self.damaged("its superblock has a wrong checksum")
            }
        }
        transactionChecksum = !hasChecksums && version == 4 && head.big32(0x24) & 1 != 0 ? BigEndianCRC32() : nil
        seed = CRC32.castagnoli.update(.max, head.piece(0x30, 16))
        let start = head.big32(0x1c)
        // Nothing to be replayed.
        if start == 0 { return }
        let stated = head.big32(0x54)
        let fastBlocks: UInt32 = features.contains(.fastCommit) ? (stated == 0 ? 256 : stated) : 0
        let length = head.big32(0x10)
        guard UInt64(length) * UInt64(blockSize) <= contents.size, length > fastBlocks else {
            throw Self.damaged("it has \(length) blocks in \(contents.size) bytes")
        }
        var log = Log(first: head.big32(0x14), end: length - fastBlocks, position: start, transaction: head.big32(0x18))
        guard log.first > 0, log.first < log.end, (log.first..<log.end).contains(start) else {
            throw Self.damaged("its log begins at block \(start)")
        }
        try scan(&log)
        if fastBlocks > 0 { try refuseFastCommits(at: length - fastBlocks, log.transaction) }
        numbers = copies.keys.sorted()
    }

    /// The position in the log, which goes around.
    private struct Log {
        let first: UInt32
        let end: UInt32
        var position: UInt32
        var transaction: UInt32
        /// Blocks that have been passed: no log is longer than its journal.
        var passed: UInt32 = 0

        /// The next block, or nil when all have been passed.
        mutating func next() -> UInt32? {
            guard passed < end - first else { return nil }
            passed += 1
            defer { position = position + 1 < end ? position + 1 : first }
            return position
        }
    }

    /// Follows the log up to the last commit. A transaction without one never happened.
    private mutating func scan(_ log: inout Log) throws(FileSystemError) {
        var found: [(block: UInt64, copy: Copy)] = []
        var revoked: [UInt64] = []
        var committed: [(block: UInt64, copy: Copy)] = []
        var revocations: [UInt64: UInt32] = [:]
        var sum = UInt32.max
        reading: while let position = log.next() {
            let block = try read(position)
            guard block.big32(0) == Self.magic, block.big32(8) == log.transaction else { break }
            switch block.big32(4) {
            case 1:
                guard verifyTail(block) else { break reading }
                sum = transactionChecksum?.update(sum, block) ?? sum
                for tag in tags(block) {
                    guard let place = log.next() else { break reading }
                    if let transactionChecksum { sum = transactionChecksum.update(sum, try read(place)) }
                    guard committed.count + found.count < Self.maximumBlocks else { throw Self.tooMuch("copies") }
                    found.append(
                        (
                            tag.block,
                            Copy(
                                place: place, transaction: log.transaction, isEscaped: tag.flags & 1 != 0,
                                checksum: tag.checksum)
                        ))
                }
            case 2:
                guard verifyCommit(block, sum) else { break reading }
                sum = .max
                committed += found
                for block in revoked { revocations[block] = log.transaction }
                found = []
                revoked = []
                log.transaction &+= 1
            case 5:
                guard verifyTail(block) else { break reading }
                revoked += revocationList(block)
                // A log of 4 GiB has room for a thousand million of them.
                guard revocations.count + revoked.count < Self.maximumBlocks else { throw Self.tooMuch("revocations") }
            default: break reading
            }
        }
        for (number, copy) in committed {
            // A block was freed and is used for something else: what older transactions had is not to be written.
            if let until = revocations[number], Int32(bitPattern: copy.transaction &- until) <= 0 { continue }
            copies[number] = copy
        }
    }

    private func read(_ block: UInt32) throws(FileSystemError) -> [UInt8] {
        try contents.read(at: UInt64(block) * UInt64(blockSize), count: blockSize)
    }

    private struct Tag {
        var block: UInt64
        var flags: UInt32
        var checksum: UInt32?
    }

    /// The blocks that a descriptor block announces.
    private func tags(_ block: [UInt8]) -> [Tag] {
        let isV3 = features.contains(.checksums3), isV2 = features.contains(.checksums2)
        let size = isV3 ? 16 : (features.contains(.wide) ? 12 : 8) + (isV2 ? 2 : 0)
        let end = blockSize - (isV2 || isV3 ? 4 : 0)
        var tags: [Tag] = [], offset = 12
        while offset + size <= end {
            let flags = isV3 ? block.big32(offset + 4) : UInt32(block.big16(offset + 6))
            let high = features.contains(.wide) ? UInt64(block.big32(offset + 8)) << 32 : 0
            let checksum = isV3 ? block.big32(offset + 12) : isV2 ? UInt32(block.big16(offset + 4)) : nil
            tags.append(Tag(block: high | UInt64(block.big32(offset)), flags: flags, checksum: checksum))
            // Unless it is that of the tag before, the journal's UUID follows.
            offset += size + (flags & 2 != 0 ? 0 : 16)
            if flags & 8 != 0 { break }
        }
        return tags
    }

    private func revocationList(_ block: [UInt8]) -> [UInt64] {
        let end = min(Int(block.big32(12)), blockSize), size = features.contains(.wide) ? 8 : 4
        return stride(from: 16, to: max(16, end - size + 1), by: size).map { offset in
            size == 8
                ? UInt64(block.big32(offset)) << 32 | UInt64(block.big32(offset + 4)) : UInt64(block.big32(offset))
        }
    }

    private func verifyTail(_ block: [UInt8]) -> Bool {
        guard !features.isDisjoint(with: [.checksums2, .checksums3]) else { return true }
        return block.big32(blockSize - 4)
            == CRC32.castagnoli.update(seed, block.clearing(blockSize - 4..<blockSize))
    }

    /// - Parameter sum: the checksum of the transaction's blocks.
    private func verifyCommit(_ block: [UInt8], _ sum: UInt32) -> Bool {
        if transactionChecksum != nil {
            // The kind (CRC-32), its size, the value; or none at all.
            let isNone = block.big16(12) == 0 && block.big32(16) == 0
            return isNone || (block.byte(12) == 1 && block.byte(13) == 4 && block.big32(16) == sum)
        }
        guard !features.isDisjoint(with: [.checksums2, .checksums3]) else { return true }
        return block.big32(16) == CRC32.castagnoli.update(seed, block.clearing(16..<20))
    }

    /// Fast commits record operations, not the resulting blocks; a mount repeats them.
    private func refuseFastCommits(at position: UInt32, _ transaction: UInt32) throws(FileSystemError) {
        let block = try read(position)
        // The tag that begins an area of fast commits, with the transaction that it continues from.
        if block.little16(0) == 9, block.little32(8) == transaction {
            throw .unsupported(
                what: "this ext4 file system",
                reason: "it was not unmounted cleanly and has fast commits: mount it once, or run e2fsck")
        }
    }

    /// The blocks in a range that have copies.
    func blocks(in range: Range<UInt64>) -> ArraySlice<UInt64> {
        let first = lowerBound(range.lowerBound)
        return numbers[first..<max(first, lowerBound(range.upperBound))]
    }

    private func lowerBound(_ number: UInt64) -> Int {
        var low = 0, high = numbers.count
        while low < high {
            let middle = (low + high) / 2
            if numbers[middle] < number { low = middle + 1 } else { high = middle }
        }
        return low
    }

    /// The copy of a block; nil without.
    func block(_ number: UInt64) throws(FileSystemError) -> [UInt8]? {
        guard let copy = copies[number] else { return nil }
        var block = try read(copy.place)
        if let checksum = copy.checksum {
            let value = CRC32.castagnoli.update(
                CRC32.castagnoli.update(seed, big: copy.transaction), block)
            let mask: UInt32 = features.contains(.checksums3) ? .max : 0xffff
            guard value & mask == checksum else {
                throw Self.damaged("the copy of block \(number) has a wrong checksum")
            }
        }
        if copy.isEscaped { block.replaceSubrange(0..<4, with: [0xc0, 0x3b, 0x39, 0x98]) }
        return block
    }
}

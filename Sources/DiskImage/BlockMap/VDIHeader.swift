// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The header of VirtualBox's VDI, version 1.1: a table of 32-bit block numbers, and behind it the blocks.
struct VDIHeader {
    static let signature: UInt32 = 0xbeda_107f
    static let version: UInt32 = 0x0001_0001
    /// Bytes of the file before the table, as in other programs.
    static let size = 512
    /// The offset of the number of blocks in the header.
    static let countPlace: UInt64 = 0x184

    let layout: BlockMapLayout
    let tableOffset: UInt64
    let dataOffset: UInt64
    /// Blocks of the file, by the header.
    let allocated: UInt64

    /// Reads and checks the header of a file.
    init(_ file: borrowing ImageFile) throws(DiskImageError) {
        let path = file.path
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .invalid(path: path, reason: reason()) }
        }
        guard file.size >= UInt64(Self.size) else {
            throw .notOfFormat(path: path, format: "VDI", reason: "it has \(file.size) bytes")
        }
        let header = try file.read("the header", count: Self.size, at: 0)
        guard header.littleEndian32(at: 0x40) == Self.signature else {
            throw .notOfFormat(path: path, format: "VDI", reason: "it has the wrong signature")
        }
        let version = header.littleEndian32(at: 0x44)
        guard version == Self.version else {
            throw .unsupported(path: path, feature: "VDI version \(version >> 16).\(version & 0xffff)")
        }
        switch header.littleEndian32(at: 0x4c) {
        case 1, 2: break
        case 3: throw .needsParent(path: path, kind: "an undo image")
        case 4: throw .needsParent(path: path, kind: "a differencing image")
        case let type: throw .unsupported(path: path, feature: "VDI image type \(type)")
        }
        guard header[0x1a8..<0x1c8].allSatisfy({ $0 == 0 }) else {
            throw .needsParent(path: path, kind: "an image with the UUID of another")
        }
        guard header.littleEndian32(at: 0x168) == 512 else {
            throw .unsupported(path: path, feature: "sectors of \(header.littleEndian32(at: 0x168)) bytes")
        }
        guard header.littleEndian32(at: 0x17c) == 0 else {
            throw .unsupported(path: path, feature: "blocks with \(header.littleEndian32(at: 0x17c)) further bytes")
        }

        let blockSize = header.littleEndian32(at: 0x178)
        try require(blockSize.nonzeroBitCount == 1 && blockSize >= 4096, "blocks of \(blockSize) bytes")
        guard blockSize <= 64 << 20 else { throw .unsupported(path: path, feature: "blocks of \(blockSize) bytes") }
        let diskSize = header.littleEndian64(at: 0x170)
        try require(diskSize <= DiskImage.maximumSize, "a disk of \(diskSize) bytes")
        tableOffset = UInt64(header.littleEndian32(at: 0x154))
        dataOffset = UInt64(header.littleEndian32(at: 0x158))
        layout = BlockMapLayout(
            size: (diskSize + 511) & ~511, blockBits: UInt64(blockSize.trailingZeroBitCount),
            entries: .vdi(data: dataOffset), table: .array(offset: tableOffset))
        let blocks = UInt64(header.littleEndian32(at: 0x180))
        try require(
            layout.blockCount <= blocks, "a table of \(blocks) entries for a disk that needs \(layout.blockCount)")
        try require(tableOffset >= UInt64(Self.size) && tableOffset % 4 == 0, "a table at byte \(tableOffset)")
        let tableEnd = tableOffset + blocks * 4
        try require(
            dataOffset >= tableEnd && dataOffset % 512 == 0,
            "blocks from byte \(dataOffset) on, where the table ends at byte \(tableEnd)")
        guard tableEnd <= file.size else {
            throw .truncated(path: path, what: "the block table", needed: tableEnd, size: file.size)
        }
        allocated = UInt64(header.littleEndian32(at: 0x184))
    }

    /// Looks through the table for where new blocks can be. A block that two entries name, or that is beyond the end of
    /// the file, keeps an image from being written.
    func allocator(_ file: borrowing ImageFile) throws(DiskImageError) -> BlockAllocator {
        guard layout.blockCount <= 1 << 26 else {
            throw .notWritable(
                path: file.path, reason: "its table has \(layout.blockCount) entries, which is too many to check")
        }
        var used: [UInt64] = []
        var count: UInt64 = 0, end: UInt64 = 0
        var first: UInt64 = 0
        while first < layout.blockCount {
            let entries = Int(min(layout.blockCount - first, 16384))
            let bytes = try file.read("the block table", count: entries * 4, at: tableOffset + first * 4)
            for entry in 0..<entries {
                let block = UInt64(bytes.littleEndian32(at: entry * 4))
                if block >= 0xffff_fffe { continue }
                guard block < layout.blockCount, dataOffset + block << layout.blockBits < file.size else {
                    throw .invalid(
                        path: file.path,
                        reason: "block \(first + UInt64(entry)) is number \(block) of the file, which does not exist")
                }
                let word = Int(block / 64)
                if word >= used.count { used += [UInt64](repeating: 0, count: max(word + 1 - used.count, used.count)) }
                guard used[word] >> (block % 64) & 1 == 0 else {
                    throw .invalid(path: file.path, reason: "number \(block) of the file is mapped twice")
                }
                used[word] |= 1 << (block % 64)
                count += 1
                end = max(end, block + 1)
            }
            first += UInt64(entries)
        }
        // What a crash has left between used blocks is used first, so that the header's count becomes that of the
        // entries again.
        var holes: [UInt64] = []
        if count < end { holes = (0..<end).reversed().filter { used[Int($0 / 64)] >> ($0 % 64) & 1 == 0 } }
        let written = file.size <= dataOffset ? 0 : (file.size - dataOffset - 1) >> layout.blockBits + 1
        return BlockAllocator(
            base: dataOffset, next: end, holes: holes, limit: layout.blockCount, pristine: written,
            header: (Self.countPlace, allocated), metadata: ByteRanges())
    }

    // MARK: - New images

    /// The header of a new image.
    /// - Parameters:
    ///   - layout: with its table right behind the header.
    ///   - allocated: blocks of the file.
    static func new(_ layout: BlockMapLayout, dataOffset: UInt64, allocated: UInt64, isStatic: Bool) -> [UInt8] {
        var header = [UInt8](repeating: 0, count: size)
        func put(_ bytes: [UInt8], _ place: Int) { header.replaceSubrange(place..<place + bytes.count, with: bytes) }
        func put32(_ value: UInt64, _ place: Int) { put(littleEndian(UInt32(truncatingIfNeeded: value)), place) }
        put(Array("<<< swkvm VirtualBox Disk Image >>>\n".utf8), 0)
        put(littleEndian(signature), 0x40)
        put(littleEndian(version), 0x44)
        // Bytes of what follows the version, up to a geometry that each program finds for itself but for the sectors'
        // size.
        put32(0x190, 0x48)
        put32(isStatic ? 2 : 1, 0x4c)
        put32(UInt64(size), 0x154)
        put32(dataOffset, 0x158)
        put32(512, 0x168)
        put(littleEndian(layout.size), 0x170)
        put32(layout.blockSize, 0x178)
        put32(layout.blockCount, 0x180)
        put32(allocated, Int(countPlace))
        put(newUUID(), 0x188)
        put(newUUID(), 0x198)
        put32(512, 0x1d4)
        return header
    }

    /// A random one (RFC 9562, version 4), whose first fields the file has with their lowest byte first.
    private static func newUUID() -> [UInt8] {
        var bytes = (0..<16).map { _ in UInt8.random(in: 0 ... .max) }
        bytes[7] = bytes[7] & 0x0f | 0x40
        bytes[8] = bytes[8] & 0x3f | 0x80
        return bytes
    }
}

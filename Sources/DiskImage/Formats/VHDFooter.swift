internal import Glibc
internal import Linux

/// The footer of a VHD, which is the last sector of the file, and the header of a dynamic one (Microsoft, "Virtual Hard Disk Image Format
/// Specification", 2006).
struct VHDFooter {
    static let size = 512
    private static let cookie = Array("conectix".utf8)
    private static let headerCookie = Array("cxsparse".utf8)

    /// Bytes of the disk.
    let size: UInt64
    /// Where a dynamic disk's blocks are; nil for a fixed disk, whose bytes the file begins with.
    let layout: BlockMapLayout?

    init(_ file: borrowing ImageFile) throws(DiskImageError) {
        let path = file.path
        let fileSize = file.size
        guard fileSize >= UInt64(Self.size) else { throw .notOfFormat(path: path, format: "VHD", reason: "it has \(fileSize) bytes") }
        // At the end, where no guest writes. The copy that a dynamic disk has at its start is for one whose end was lost.
        var footer = try file.read("the footer", count: Self.size, at: fileSize - UInt64(Self.size))
        if !Self.isSound(footer, Self.cookie, checksum: 64) {
            footer = try file.read("the footer", count: Self.size, at: 0)
            guard Self.isSound(footer, Self.cookie, checksum: 64), footer.bigEndian32(at: 60) == 3 else {
                throw .notOfFormat(path: path, format: "VHD", reason: "it does not end with a sound footer")
            }
        }
        let size = Self.diskSize(footer)
        // The format's tables end at about 2 TiB.
        guard size <= 1 << 42 else { throw .invalid(path: path, reason: "a disk of \(size) bytes") }
        self.size = size
        switch footer.bigEndian32(at: 60) {
        case 2:
            guard size <= fileSize - UInt64(Self.size) else {
                throw .truncated(path: path, what: "the disk", needed: size, size: fileSize - UInt64(Self.size))
            }
            layout = nil
        case 3:
            layout = try Self.layout(file, at: footer.bigEndian64(at: 16), size)
        case 4:
            throw .needsParent(path: path, kind: "a differencing disk")
        case let type:
            throw .unsupported(path: path, feature: "VHD disk type \(type)")
        }
    }

    private static func layout(_ file: borrowing ImageFile, at offset: UInt64, _ size: UInt64) throws(DiskImageError) -> BlockMapLayout {
        let path = file.path
        guard offset <= file.size, 1024 <= file.size - offset else {
            throw .truncated(path: path, what: "the dynamic disk's header", needed: offset &+ 1024, size: file.size)
        }
        let header = try file.read("the dynamic disk's header", count: 1024, at: offset)
        guard isSound(header, headerCookie, checksum: 36) else { throw .invalid(path: path, reason: "the dynamic disk's header is not sound") }
        let blockSize = header.bigEndian32(at: 32), entries = UInt64(header.bigEndian32(at: 28)), table = header.bigEndian64(at: 16)
        guard blockSize.nonzeroBitCount == 1, (4096...256 << 20).contains(blockSize) else { throw .invalid(path: path, reason: "blocks of \(blockSize) bytes") }
        // A bit for each sector, in whole sectors.
        let bitmap = (UInt64(blockSize) / 4096 + 511) & ~511
        let layout = BlockMapLayout(
            size: size, blockBits: UInt64(blockSize.trailingZeroBitCount), entries: .vhd(bitmap: bitmap), table: .array(offset: table))
        guard layout.blockCount <= entries else { throw .invalid(path: path, reason: "a table of \(entries) entries for a disk that needs \(layout.blockCount)") }
        guard table <= file.size, layout.blockCount * 4 <= file.size - table else {
            throw .truncated(path: path, what: "the block table", needed: table &+ layout.blockCount * 4, size: file.size)
        }
        return layout
    }

    /// The footer has two sizes. Virtual PC and what followed it goes by the geometry, which is never more than the other; the others, which
    /// are known by name, and everybody where the geometry is the largest there is, by the number of bytes. QEMU decides so, too.
    private static func diskSize(_ footer: [UInt8]) -> UInt64 {
        let cylinders = UInt64(footer[56]) << 8 | UInt64(footer[57])
        let sectors = cylinders * UInt64(footer[58]) * UInt64(footer[59])
        let stated = footer.bigEndian64(at: 48) & ~511
        let creator = Array(footer[28..<32])
        let byBytes = ["win ", "qem2", "d2v ", "CTXS", "tap\0", "wa\0\0"].contains { Array($0.utf8) == creator }
        return byBytes || sectors == 65535 * 16 * 255 || sectors == 0 ? stated : sectors * 512
    }

    /// Whether a structure has its signature, and its checksum: the complement of the sum of all other bytes.
    private static func isSound(_ bytes: [UInt8], _ cookie: [UInt8], checksum place: Int) -> Bool {
        guard bytes.starts(with: cookie) else { return false }
        var sum: UInt32 = 0
        for index in bytes.indices where !(place..<place + 4).contains(index) { sum &+= UInt32(bytes[index]) }
        return ~sum == bytes.bigEndian32(at: place)
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The choice between the two sizes in a VHD's footer.
public enum VHDSize: String, Sendable, CaseIterable {
    /// Cylinders times heads times sectors, as used by Virtual PC, Virtual Server and QEMU before 2.10.
    case chs
    /// The number of bytes ("current size"), as used by Hyper-V, VirtualBox, XenServer, Disk2vhd and all others.
    case current
}

/// The two sizes that a VHD's footer has, in bytes, and the one that is used.
public struct VHDSizes: Sendable, Equatable {
    /// Cylinders times heads times sectors, which is what fits whole cylinders.
    public var chs: UInt64
    /// The number of bytes.
    public var current: UInt64
    public var taken: VHDSize

    /// Bytes of the disk.
    public var size: UInt64 { taken == .chs ? chs : current }

    /// Which size was taken where there are two, in a sentence; nil where they are the same.
    /// - Parameter option: what states another one: ``DiskImageOptions/vhdSizeOption``.
    func notice(_ option: String) -> String? {
        guard chs != current else { return nil }
        let other: VHDSize = taken == .chs ? .current : .chs
        return "its VHD footer has two sizes, \(current) bytes (current) and \(chs) by its geometry (chs); "
            + "\(taken.rawValue) is used, \(option)\(other.rawValue) selects the other"
    }
}

/// The footer of a VHD, which is the last sector of the file, and the header of a dynamic one (Microsoft, "Virtual
/// Hard Disk Image Format Specification", 2006).
struct VHDFooter {
    static let size = 512
    /// As programs before Virtual PC 2004 wrote it.
    private static let oldSize = 511
    private static let cookie = Array("conectix".utf8)
    private static let headerCookie = Array("cxsparse".utf8)
    private static let fixed: UInt32 = 2, dynamic: UInt32 = 3, differencing: UInt32 = 4
    /// The geometry of all disks that are larger: 127 GiB.
    private static let largestGeometry: UInt64 = 65535 * 16 * 255 * 512

    let sizes: VHDSizes
    /// Bytes of the disk.
    var size: UInt64 { sizes.size }
    /// Where a dynamic disk's blocks are; nil for a fixed disk, whose bytes the file begins with.
    let layout: BlockMapLayout?

    /// - Parameter stated: which of the two sizes the user has selected; nil for the one that the creating program
    ///   uses.
    init(_ file: borrowing ImageFile, size stated: VHDSize? = nil) throws(DiskImageError) {
        let path = file.path
        guard file.size >= UInt64(Self.size) else {
            throw .notOfFormat(path: path, format: "VHD", reason: "it has \(file.size) bytes")
        }
        let (footer, room) = try Self.footer(file)
        let current = footer.bigEndian64(at: 48) & ~511
        let geometry = (UInt64(footer[56]) << 8 | UInt64(footer[57])) * UInt64(footer[58]) * UInt64(footer[59]) * 512
        // The format's tables end at about 2 TiB.
        guard current <= 1 << 42, geometry <= 1 << 42 else {
            throw .invalid(path: path, reason: "a disk of \(max(current, geometry)) bytes")
        }
        var sizes = VHDSizes(chs: geometry, current: current, taken: .current)
        // A geometry that cannot represent the size has no meaning, whatever the user specifies; the same in QEMU.
        let isKnown = geometry != 0 && geometry != Self.largestGeometry
        switch footer.bigEndian32(at: 60) {
        case Self.fixed:
            // The length of the file up to its footer determines the size.
            if isKnown { sizes.taken = stated ?? (current == room ? .current : Self.size(byMaker: footer)) }
            guard sizes.size <= room else {
                throw .truncated(path: path, what: "the disk", needed: sizes.size, size: room)
            }
            layout = nil
        case Self.dynamic:
            let header = try Self.header(file, at: footer.bigEndian64(at: 16))
            if isKnown { sizes.taken = stated ?? Self.size(byMaker: footer) }
            // A table that fits only the smaller one shows which one was meant.
            if stated == nil, isKnown, geometry < current, !header.canMap(current), header.canMap(geometry) {
                sizes.taken = .chs
            }
            layout = try header.layout(file, sizes.size)
        case Self.differencing:
            throw .needsParent(path: path, kind: "a differencing disk")
        case let type:
            throw .unsupported(path: path, feature: "VHD disk type \(type)")
        }
        self.sizes = sizes
    }

    /// The footer, and how many bytes of the file come before it.
    private static func footer(_ file: borrowing ImageFile) throws(DiskImageError) -> (bytes: [UInt8], room: UInt64) {
        // At the end, where no guest writes. The copy that a dynamic disk has at its start is for one whose end was
        // lost.
        let room = file.size - UInt64(size)
        let footer = try file.read("the footer", count: size, at: room)
        if isSound(footer, cookie, checksum: 64) { return (footer, room) }
        let old = Array(footer.suffix(oldSize))
        if isSound(old, cookie, checksum: 64) { return (old, room + 1) }
        let copy = try file.read("the footer", count: size, at: 0)
        guard isSound(copy, cookie, checksum: 64), copy.bigEndian32(at: 60) == dynamic else {
            throw .notOfFormat(path: file.path, format: "VHD", reason: "it does not end with a valid footer")
        }
        return (copy, room)
    }

    /// Virtual PC, its successors and QEMU use the geometry, which is never more than the other size. Other programs
    /// use the size in bytes, which covers the whole disk.
    private static func size(byMaker footer: [UInt8]) -> VHDSize {
        let creator = Array(footer[28..<32])
        return ["vpc ", "vs  ", "qemu"].contains { Array($0.utf8) == creator } ? .chs : .current
    }

    /// What the header of a dynamic disk says.
    private struct DynamicHeader {
        let blockSize: UInt64
        let entries: UInt64
        let table: UInt64

        func canMap(_ size: UInt64) -> Bool { size <= blockSize * entries }

        func layout(_ file: borrowing ImageFile, _ size: UInt64) throws(DiskImageError) -> BlockMapLayout {
            let path = file.path
            // A bit for each sector, in whole sectors.
            let bitmap = (blockSize / 4096 + 511) & ~511
            let layout = BlockMapLayout(
                size: size, blockBits: UInt64(blockSize.trailingZeroBitCount), entries: .vhd(bitmap: bitmap),
                table: .array(offset: table))
            guard layout.blockCount <= entries else {
                throw .invalid(
                    path: path, reason: "a table of \(entries) entries for a disk that needs \(layout.blockCount)")
            }
            guard table <= file.size, layout.blockCount * 4 <= file.size - table else {
                throw .truncated(
                    path: path, what: "the block table", needed: table &+ layout.blockCount * 4, size: file.size)
            }
            return layout
        }
    }

    private static func header(_ file: borrowing ImageFile, at offset: UInt64) throws(DiskImageError) -> DynamicHeader {
        let path = file.path
        guard offset <= file.size, 1024 <= file.size - offset else {
            throw .truncated(path: path, what: "the dynamic disk's header", needed: offset &+ 1024, size: file.size)
        }
        let header = try file.read("the dynamic disk's header", count: 1024, at: offset)
        guard isSound(header, headerCookie, checksum: 36) else {
            throw .invalid(path: path, reason: "the dynamic disk's header is invalid")
        }
        let blockSize = header.bigEndian32(at: 32)
        guard blockSize.nonzeroBitCount == 1, (4096...256 << 20).contains(blockSize) else {
            throw .invalid(path: path, reason: "blocks of \(blockSize) bytes")
        }
        return DynamicHeader(
            blockSize: UInt64(blockSize), entries: UInt64(header.bigEndian32(at: 28)), table: header.bigEndian64(at: 16)
        )
    }

    /// Indicates whether a structure has its signature, and its checksum: the complement of the sum of all other bytes.
    private static func isSound(_ bytes: [UInt8], _ cookie: [UInt8], checksum place: Int) -> Bool {
        guard bytes.starts(with: cookie) else { return false }
        var sum: UInt32 = 0
        for index in bytes.indices where !(place..<place + 4).contains(index) { sum &+= UInt32(bytes[index]) }
        return ~sum == bytes.bigEndian32(at: place)
    }
}

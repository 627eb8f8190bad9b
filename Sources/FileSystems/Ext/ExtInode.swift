// SPDX-License-Identifier: Apache-2.0

/// An inode as it is in its table, its checksum verified.
struct ExtInode: Sendable {
    let number: UInt32
    let bytes: [UInt8]

    struct Flags: OptionSet, Sendable {
        let rawValue: UInt32
        static let encrypted = Flags(rawValue: 0x800)
        static let indexed = Flags(rawValue: 0x1000)
        static let extents = Flags(rawValue: 0x8_0000)
        static let inlineData = Flags(rawValue: 0x1000_0000)
    }

    var mode: UInt16 { bytes.little16(0) }
    var flags: Flags { Flags(rawValue: bytes.little32(0x20)) }
    var generation: UInt32 { bytes.little32(0x64) }
    /// What is either the map of the blocks, the root of the extents, a short link's target or inline data.
    var map: [UInt8] { bytes.piece(0x28, 60) }

    var kind: FileNode.Kind {
        switch mode & 0xf000 {
        case 0x8000: .file
        case 0x4000: .directory
        case 0xa000: .symbolicLink
        default: .other
        }
    }

    /// Bytes of the file.
    var size: UInt64 { UInt64(bytes.little32(4)) | UInt64(bytes.little32(0x6c)) << 32 }

    /// Indicates whether a link's target is in ``map``.
    var isFastLink: Bool { kind == .symbolicLink && size < 60 && flags.isDisjoint(with: [.extents, .inlineData]) }

    var node: FileNode {
        FileNode(
            kind: kind, size: size, permissions: mode & 0o7777,
            modified: Int64(Int32(bitPattern: bytes.little32(0x10))),
            place: .ext(self))
    }

    /// The value of the extended attribute in which inline data continues; nil without.
    func inlineRest() -> [UInt8]? {
        let extra = Int(bytes.little16(0x80))
        let header = 128 + extra
        guard bytes.count > 128, header + 8 <= bytes.count, bytes.little32(header) == 0xea02_0000 else { return nil }
        let first = header + 4
        var entry = first
        // Four zero bytes end the entries, which go up from here as the values go down.
        while entry + 16 <= bytes.count, bytes.little32(entry) != 0 {
            let length = Int(bytes[entry])
            if bytes[entry + 1] == 7, length == 4, bytes.matches("data", at: entry + 16) {
                guard bytes.little32(entry + 4) == 0 else { return nil }
                let start = first + Int(bytes.little16(entry + 2)), count = Int(clamping: bytes.little32(entry + 8))
                guard start <= bytes.count, count <= bytes.count - start else { return nil }
                return bytes.piece(start, count)
            }
            entry += 16 + (length + 3) / 4 * 4
        }
        return nil
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The structures of a VHDX that locate its parts (MS-VHDX, section 2).
struct VHDXHeader {
    private static let signature = Array("vhdxfile".utf8)
    private static let mebibyte: UInt64 = 1 << 20
    private static let headerPlaces: [UInt64] = [64 << 10, 128 << 10]
    private static let regionPlaces: [UInt64] = [192 << 10, 256 << 10]
    private static let headerSize = 4096
    private static let tableSize = 64 << 10

    /// GUIDs as the file has them.
    private enum Region {
        static let blockTable: [UInt8] = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08,
        ]
        static let metadata: [UInt8] = [
            0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e,
        ]
    }

    private enum Item {
        static let fileParameters: [UInt8] = [
            0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b,
        ]
        static let diskSize: [UInt8] = [
            0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8,
        ]
        static let diskID: [UInt8] = [
            0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46,
        ]
        static let logicalSectorSize: [UInt8] = [
            0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f,
        ]
        static let physicalSectorSize: [UInt8] = [
            0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56,
        ]
        static let parent: [UInt8] = [
            0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c,
        ]
        static let known = [fileParameters, diskSize, diskID, logicalSectorSize, physicalSectorSize, parent]
    }

    /// What a table names: a region of the file, or an item of the metadata region.
    private struct Entry {
        let id: [UInt8]
        let offset: UInt64
        let length: UInt64
        let isRequired: Bool
    }

    let layout: BlockMapLayout
    /// What lies over the block table.
    let log: VHDXLog

    /// Reads and checks the structures of a file.
    init(_ file: borrowing ImageFile) throws(DiskImageError) {
        let path = file.path
        guard file.size >= Self.mebibyte else {
            throw .notOfFormat(path: path, format: "VHDX", reason: "it has \(file.size) bytes")
        }
        guard try file.read("the signature", count: 8, at: 0) == Self.signature else {
            throw .notOfFormat(path: path, format: "VHDX", reason: "it has the wrong signature")
        }
        log = try Self.log(file)
        let regions = try Self.regions(file, log)
        guard let table = regions.first(where: { $0.id == Region.blockTable }),
            let metadata = regions.first(where: { $0.id == Region.metadata })
        else {
            throw .invalid(path: path, reason: "it has no block table, or no metadata")
        }
        // Data never goes through the log; where it does it would have to be laid over what the guest reads.
        let tables =
            [Self.regionPlaces[0]..<Self.regionPlaces[1] + UInt64(Self.tableSize)]
            + regions.map { $0.offset..<$0.offset + $0.length }
        if let place = log.change(outside: tables) {
            throw .unsupported(path: path, feature: "a log with a change of data, at byte \(place), replayed")
        }
        let items = try Self.items(file, log, metadata)
        let log = log
        func value(_ id: [UInt8], _ name: String, _ count: Int) throws(DiskImageError) -> [UInt8] {
            guard let item = items.first(where: { $0.id == id }), item.length >= UInt64(count) else {
                throw .invalid(path: path, reason: "its metadata has no \(name)")
            }
            return try log.read(file, "the metadata", count: count, at: item.offset)
        }
        let parameters = try value(Item.fileParameters, "block size", 8)
        guard parameters.littleEndian32(at: 4) & 2 == 0 else {
            throw .needsParent(path: path, kind: "a differencing disk")
        }
        let blockSize = parameters.littleEndian32(at: 0)
        guard blockSize.nonzeroBitCount == 1, (1 << 20...256 << 20).contains(blockSize) else {
            throw .invalid(path: path, reason: "blocks of \(blockSize) bytes")
        }
        let sector = try value(Item.logicalSectorSize, "sector size", 4).littleEndian32(at: 0)
        guard sector == 512 || sector == 4096 else { throw .invalid(path: path, reason: "sectors of \(sector) bytes") }
        let size = try value(Item.diskSize, "disk size", 8).littleEndian64(at: 0)
        guard size <= 64 << 40, size % UInt64(sector) == 0 else {
            throw .invalid(path: path, reason: "a disk of \(size) bytes")
        }
        let blockBits = UInt64(blockSize.trailingZeroBitCount)
        layout = BlockMapLayout(
            size: size, blockBits: blockBits,
            entries: .vhdx(chunkBits: 23 + UInt64(sector.trailingZeroBitCount) - blockBits),
            table: .array(offset: table.offset))
        guard layout.entryCount * 8 <= table.length else {
            throw .invalid(
                path: path,
                reason: "a block table of \(table.length) bytes for a disk that needs \(layout.entryCount * 8)")
        }
    }

    /// The changes that wait in the log, if the current one of the two headers says that there are any.
    private static func log(_ file: borrowing ImageFile) throws(DiskImageError) -> VHDXLog {
        var current: [UInt8]?
        for place in headerPlaces {
            let header = try file.read("the header", count: headerSize, at: place)
            guard header.starts(with: "head".utf8), isSound(header) else { continue }
            if let other = current, other.littleEndian64(at: 8) >= header.littleEndian64(at: 8) { continue }
            current = header
        }
        guard let current else { throw .invalid(path: file.path, reason: "neither of its two headers is valid") }
        let version = current.littleEndian16(at: 66)
        guard version == 1 else { throw .unsupported(path: file.path, feature: "VHDX version \(version)") }
        return try current[48..<64].allSatisfy({ $0 == 0 }) ? VHDXLog() : VHDXLog(file, header: current)
    }

    private static func regions(_ file: borrowing ImageFile, _ log: VHDXLog) throws(DiskImageError) -> [Entry] {
        let path = file.path
        for place in regionPlaces {
            let table = try log.read(file, "the region table", count: tableSize, at: place)
            guard table.starts(with: "regi".utf8), isSound(table) else { continue }
            let count = table.littleEndian32(at: 8)
            guard count <= 2047 else { throw .invalid(path: path, reason: "a region table of \(count) entries") }
            var regions: [Entry] = []
            for index in 0..<Int(count) {
                let entry = table[(16 + 32 * index)...].prefix(32)
                let region = Entry(
                    id: Array(entry.prefix(16)), offset: entry.littleEndian64(at: 16),
                    length: UInt64(entry.littleEndian32(at: 24)),
                    isRequired: entry.littleEndian32(at: 28) & 1 != 0)
                guard region.id == Region.blockTable || region.id == Region.metadata else {
                    if region.isRequired {
                        throw .unsupported(path: path, feature: "a region of the kind \(hexadecimal(region.id))")
                    }
                    continue
                }
                guard region.offset % mebibyte == 0, region.offset >= mebibyte, region.length % mebibyte == 0 else {
                    throw .invalid(path: path, reason: "a region of \(region.length) bytes at byte \(region.offset)")
                }
                guard region.offset <= file.size, region.length <= file.size - region.offset else {
                    throw .truncated(
                        path: path, what: "a region", needed: region.offset &+ region.length, size: file.size)
                }
                guard
                    !regions.contains(where: {
                        $0.id == region.id
                            || ($0.offset < region.offset + region.length && region.offset < $0.offset + $0.length)
                    })
                else {
                    throw .invalid(path: path, reason: "a duplicate or overlapping region")
                }
                regions.append(region)
            }
            return regions
        }
        throw .invalid(path: path, reason: "neither of its two region tables is valid")
    }

    private static func items(
        _ file: borrowing ImageFile, _ log: VHDXLog, _ metadata: Entry
    ) throws(DiskImageError) -> [Entry] {
        let path = file.path
        guard metadata.length >= UInt64(tableSize) else {
            throw .invalid(path: path, reason: "a metadata region of \(metadata.length) bytes")
        }
        let table = try log.read(file, "the metadata table", count: tableSize, at: metadata.offset)
        guard table.starts(with: "metadata".utf8) else {
            throw .invalid(path: path, reason: "its metadata table has the wrong signature")
        }
        let count = table.littleEndian16(at: 10)
        guard count <= 2047 else { throw .invalid(path: path, reason: "a metadata table of \(count) entries") }
        var items: [Entry] = []
        for index in 0..<Int(count) {
            let entry = table[(32 + 32 * index)...].prefix(32)
            let id = Array(entry.prefix(16)), offset = UInt64(entry.littleEndian32(at: 16)),
                length = UInt64(entry.littleEndian32(at: 20))
            let flags = entry.littleEndian32(at: 24)
            guard Item.known.contains(id) else {
                if flags & 4 != 0 { throw .unsupported(path: path, feature: "metadata of the kind \(hexadecimal(id))") }
                continue
            }
            guard offset >= UInt64(tableSize), offset + length <= metadata.length else {
                throw .invalid(path: path, reason: "metadata of \(length) bytes at byte \(offset) of its region")
            }
            items.append(Entry(id: id, offset: metadata.offset + offset, length: length, isRequired: true))
        }
        return items
    }

    /// Indicates whether a structure's CRC-32C, at byte 4, is that of its bytes with zeroes in its own place.
    private static func isSound(_ bytes: [UInt8]) -> Bool {
        CRC32C.checksum(bytes, zeroes: 4..<8) == bytes.littleEndian32(at: 4)
    }

    private static func hexadecimal(_ id: [UInt8]) -> String {
        id.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
    }
}

// SPDX-License-Identifier: Apache-2.0

/// A partition of a disk.
public struct Partition: Sendable, Equatable {
    /// As Linux numbers it.
    public var number: Int
    /// Bytes from the start of the disk.
    public var start: UInt64
    public var size: UInt64
    /// GPT: the GUID of its type in lower case; MBR: `0x83`.
    public var type: String
    /// GPT: its name.
    public var name: String
    /// As blkid prints PARTUUID.
    public var uuid: String?

    /// Indicates whether it is an EFI system partition.
    public var isEFISystem: Bool { type == "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" || type == "0xef" }
}

/// The partitions of a disk.
public struct PartitionTable: Sendable {
    public enum Kind: String, Sendable { case gpt = "GPT", mbr = "MBR" }

    public let kind: Kind
    public let partitions: [Partition]
    /// What is wrong with it and did not matter.
    public let note: String?

    /// The most entries of a GPT that are read, and logical partitions of an MBR.
    private static let maximumEntries = 1024
    private static let maximumLogical = 64

    init(kind: Kind, partitions: [Partition]) { (self.kind, self.partitions, note) = (kind, partitions, nil) }

    /// Reads the table of a disk; nil where there is none.
    public init?(_ disk: any BlockSource) throws(FileSystemError) {
        let volume = Volume(disk)
        guard volume.size >= 1024 else { return nil }
        let sector = try volume.read(at: 0, count: 512)
        guard sector.little16(510) == 0xaa55 else { return nil }
        let entries = (0..<4).map { sector.piece(446 + 16 * $0, 16) }
        if entries.contains(where: { $0[4] == 0xee }) {
            kind = .gpt
            (partitions, note) = try Self.readGPT(volume)
            return
        }
        // What is no table is code or text of a boot sector.
        guard entries.allSatisfy({ $0[0] & 0x7f == 0 }), entries.contains(where: { $0[4] != 0 && $0.little32(12) != 0 })
        else { return nil }
        let isFile = FATFileSystem.matches(sector)
        let fit = entries.filter { $0[4] != 0 }.allSatisfy {
            $0.little32(8) > 0 && volume.contains(UInt64($0.little32(8)) * 512, 1)
        }
        guard fit else {
            if isFile { return nil }
            throw .damaged(what: "the partition table (MBR)", reason: "a partition begins past the end of the disk")
        }
        kind = .mbr
        note = nil
        partitions = try Self.readMBR(volume, entries, signature: sector.little32(440))
    }

    // MARK: GPT

    private static func readGPT(_ volume: Volume) throws(FileSystemError) -> ([Partition], String?) {
        var reasons: [String] = []
        // A disk image may have been made for sectors of 4 KiB.
        for sectorSize in [512, 4096] as [UInt64] {
            let last = volume.size / sectorSize
            guard last > 2, try volume.read(at: sectorSize, count: 8).matches("EFI PART", at: 0) else { continue }
            do throws(FileSystemError) { return (try readGPT(volume, at: 1, sectorSize), nil) } catch {
                guard case .damaged(_, let reason) = error else { throw error }
                reasons.append("its primary header: \(reason)")
            }
        }
        for sectorSize in [512, 4096] as [UInt64] {
            let last = volume.size / sectorSize
            guard last > 2, try volume.read(at: (last - 1) * sectorSize, count: 8).matches("EFI PART", at: 0) else {
                continue
            }
            do throws(FileSystemError) {
                let partitions = try readGPT(volume, at: last - 1, sectorSize)
                return (partitions, "the primary GPT is damaged, the backup at the end of the disk was used")
            } catch {
                guard case .damaged(_, let reason) = error else { throw error }
                reasons.append("its backup header: \(reason)")
            }
        }
        throw .damaged(
            what: "the partition table (GPT)",
            reason: reasons.isEmpty ? "it has neither a primary nor a backup header" : reasons.joined(separator: "; "))
    }

    private static func readGPT(
        _ volume: Volume, at block: UInt64, _ sectorSize: UInt64
    ) throws(FileSystemError) -> [Partition] {
        func damaged(_ reason: String) -> FileSystemError {
            .damaged(what: "the partition table (GPT)", reason: reason)
        }
        let header = try volume.read(at: block * sectorSize, count: 512)
        let headerSize = Int(header.little32(12))
        guard (92...512).contains(headerSize) else { throw damaged("it has \(headerSize) bytes") }
        guard CRC32.ethernet.check(header.piece(0, headerSize).clearing(16..<20)) == header.little32(16) else {
            throw damaged("a wrong checksum")
        }
        guard header.little64(24) == block else { throw damaged("it belongs to another sector") }
        let count = Int(header.little32(80)), size = Int(header.little32(84))
        guard count <= maximumEntries, size >= 128, size <= 4096, size % 8 == 0 else {
            throw damaged("it has \(count) entries of \(size) bytes")
        }
        let (place, overflow) = header.little64(72).multipliedReportingOverflow(by: sectorSize)
        guard !overflow, volume.contains(place, UInt64(count * size)) else {
            throw damaged("its entries are past the end of the disk")
        }
        let table = try volume.read(at: place, count: count * size)
        guard CRC32.ethernet.check(table) == header.little32(88) else {
            throw damaged("its entries have a wrong checksum")
        }
        var partitions: [Partition] = []
        for index in 0..<count {
            let entry = table.piece(index * size, 128)
            guard let type = guidText(entry.piece(0, 16)) else { continue }
            let first = entry.little64(32), last = entry.little64(40)
            guard first <= last, last < volume.size / sectorSize else {
                throw damaged("partition \(index + 1) is past the end of the disk")
            }
            let units = stride(from: 56, to: 128, by: 2).map { entry.little16($0) }.prefix { $0 != 0 }
            partitions.append(
                Partition(
                    number: index + 1, start: first * sectorSize, size: (last - first + 1) * sectorSize, type: type,
                    name: String(decoding: units, as: UTF16.self), uuid: guidText(entry.piece(16, 16))))
        }
        return partitions
    }

    // MARK: MBR

    private static func readMBR(
        _ volume: Volume, _ entries: [[UInt8]], signature: UInt32
    ) throws(FileSystemError) -> [Partition] {
        var partitions: [Partition] = []
        func add(_ number: Int, _ entry: [UInt8], _ start: UInt64) {
            let size = min(UInt64(entry.little32(12)) * 512, volume.size - min(volume.size, start))
            partitions.append(
                Partition(
                    number: number, start: start, size: size, type: "0x" + hexadecimal(UInt64(entry[4]), 2), name: "",
                    uuid: signature == 0
                        ? nil : "\(hexadecimal(UInt64(signature), 8))-\(hexadecimal(UInt64(number), 2))"))
        }
        func isExtended(_ entry: [UInt8]) -> Bool { [5, 0xf, 0x85].contains(entry[4]) }

        var extended: UInt64?
        for (index, entry) in entries.enumerated() where entry[4] != 0 && entry.little32(12) != 0 {
            let start = UInt64(entry.little32(8)) * 512
            if isExtended(entry) { extended = extended ?? start } else { add(index + 1, entry, start) }
        }
        // Each logical partition has a sector before it, with its own entry and that of the next such sector.
        guard let base = extended else { return partitions }
        var here = base, number = 5, seen: Set<UInt64> = []
        while number < 5 + maximumLogical {
            guard seen.insert(here).inserted else {
                throw .damaged(what: "the partition table (MBR)", reason: "its logical partitions form a loop")
            }
            guard volume.contains(here, 512) else {
                throw .damaged(what: "the partition table (MBR)", reason: "a logical partition is past the end")
            }
            let sector = try volume.read(at: here, count: 512)
            guard sector.little16(510) == 0xaa55 else { break }
            let own = sector.piece(446, 16), next = sector.piece(462, 16)
            if own[4] != 0, own.little32(12) != 0 {
                add(number, own, here + UInt64(own.little32(8)) * 512)
                number += 1
            }
            guard isExtended(next), next.little32(12) != 0 else { break }
            here = base + UInt64(next.little32(8)) * 512
        }
        return partitions
    }
}

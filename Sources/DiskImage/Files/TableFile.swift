// SPDX-License-Identifier: Apache-2.0

/// The file of an image whose tables are read and written as a whole, with errors for the caller.
struct TableFile: Sendable {
    let path: String
    let file: MetadataFile

    /// Entries that are read or written at a time: tables may be long, and there is one of them in memory at a time.
    private static let pieceSize = 8192

    /// Entries of a table in the file's byte order, as numbers. Their number is bounded by the caller.
    func readTable(_ count: Int, at offset: UInt64) throws(DiskImageError) -> [UInt64] {
        var entries: [UInt64] = []
        entries.reserveCapacity(count)
        while entries.count < count {
            let piece = min(Self.pieceSize, count - entries.count)
            let bytes = try read(piece * 8, at: offset &+ UInt64(entries.count * 8))
            bytes.withReadableIOMemory { bytes in
                for index in 0..<piece { entries.append(bytes.load(bigEndian: index * 8)) }
            }
        }
        return entries
    }

    /// An L1 table; entries beyond the end of the file, which were never needed, read as zeroes.
    func readL1(_ offset: UInt64, _ count: Int, _ fileSize: UInt64) throws(DiskImageError) -> [UInt64] {
        let there = offset < fileSize ? min(UInt64(count), (fileSize - offset) / 8) : 0
        var entries = try readTable(Int(there), at: offset)
        entries.append(contentsOf: repeatElement(0, count: count - Int(there)))
        return entries
    }

    func readL1(_ header: QCOW2Header, _ fileSize: UInt64) throws(DiskImageError) -> [UInt64] {
        try readL1(header.l1Offset, header.l1TableSize, fileSize)
    }

    func writeTable(_ entries: [UInt64], at offset: UInt64) throws(DiskImageError) {
        for start in stride(from: 0, to: entries.count, by: Self.pieceSize) {
            let piece = entries[start..<min(start + Self.pieceSize, entries.count)]
            var bytes = [UInt8](repeating: 0, count: piece.count * 8)
            bytes.withIOMemory { memory in
                for (index, entry) in piece.enumerated() { memory.store(bigEndian: entry, index * 8) }
            }
            try write(bytes, at: offset &+ UInt64(start * 8))
        }
    }

    func read(_ count: Int, at offset: UInt64) throws(DiskImageError) -> [UInt8] {
        do throws(MetadataError) { return try file.read(count, at: offset) } catch {
            throw error.asError(path, "pread")
        }
    }

    func write(_ bytes: [UInt8], at offset: UInt64) throws(DiskImageError) {
        do throws(MetadataError) { try file.write(bytes, at: offset) } catch { throw error.asError(path, "pwrite") }
    }

    func synchronize() throws(DiskImageError) {
        do throws(MetadataError) { try file.synchronize() } catch { throw error.asError(path, "fdatasync") }
    }

    func truncate(to size: UInt64) throws(DiskImageError) {
        do throws(MetadataError) { try file.truncate(to: size) } catch { throw error.asError(path, "ftruncate") }
    }
}

extension [UInt8] {
    mutating func store(_ value: UInt32, at offset: Int) {
        for index in 0..<4 { self[offset + index] = UInt8(truncatingIfNeeded: value >> UInt32(24 - 8 * index)) }
    }

    mutating func store(_ value: UInt64, at offset: Int) {
        for index in 0..<8 { self[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(56 - 8 * index)) }
    }
}

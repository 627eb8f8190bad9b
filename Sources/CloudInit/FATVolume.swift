// SPDX-License-Identifier: Apache-2.0

/// Makes the bytes of a FAT12 file system: a label, and files in its root directory.
///
/// Its layout depends on nothing but its contents: there are no times, and the volume's number is a hash.
struct FATVolume {
    /// A file for the root directory.
    struct File {
        /// ASCII, at most 255 characters. It is stored as a long name, beside an alias of the form `USER-D~1`.
        let name: String
        let contents: [UInt8]
    }

    private static let sectorSize = 512
    private static let clusterSize = 2048
    private static let rootEntries = 64
    private static let entrySize = 32
    /// A volume with more clusters is FAT16 to every reader.
    private static let maximumClusters = 4084
    /// `mtools` wants whole tracks.
    private static let sectorsPerTrack = 32
    /// What filling up the last track may add.
    private static let spareClusters = sectorsPerTrack * sectorSize / clusterSize
    /// The end of a file's chain.
    private static let lastCluster: UInt16 = 0xfff

    /// Bytes of contents that fit whatever files they are in, of up to eight.
    static let maximumContents = (maximumClusters - 8 - spareClusters) * clusterSize

    /// Returns the volume.
    /// - Parameters:
    ///   - label: up to 11 capital letters and digits.
    ///   - files: at most ``maximumContents`` bytes, in eight files with different names.
    static func image(label: String, _ files: [File]) -> [UInt8] {
        let used = files.reduce(0) { $0 + clusters(of: $1) }
        precondition(used <= maximumClusters - spareClusters && files.count <= 8, "more than a seed has")
        let layout = Layout(usedClusters: used)
        var image = [UInt8](repeating: 0, count: layout.sectors * sectorSize)
        image.replace(at: 0, with: bootSector(layout, label: label, number: hash(files)))

        var table = [UInt16](repeating: 0, count: layout.clusters + 2)
        table[0] = 0xff8
        table[1] = lastCluster
        var directory = volumeEntry(label)
        var next = 2
        for (index, file) in files.enumerated() {
            let count = clusters(of: file)
            directory += entries(for: file, alias: alias(of: file.name, number: index + 1), cluster: next)
            for cluster in next..<next + count {
                table[cluster] = cluster == next + count - 1 ? lastCluster : UInt16(cluster + 1)
            }
            image.replace(at: layout.dataStart * sectorSize + (next - 2) * clusterSize, with: file.contents)
            next += count
        }
        for copy in 0..<2 {
            image.replace(at: (1 + copy * layout.tableSectors) * sectorSize, with: packed(table))
        }
        image.replace(at: layout.rootStart * sectorSize, with: directory)
        return image
    }

    private static func clusters(of file: File) -> Int { (file.contents.count + clusterSize - 1) / clusterSize }

    /// Where things are, in sectors.
    private struct Layout {
        let clusters: Int
        let tableSectors: Int
        let sectors: Int
        var rootStart: Int { 1 + 2 * tableSectors }
        var dataStart: Int { rootStart + rootEntries * entrySize / sectorSize }

        init(usedClusters: Int) {
            let perCluster = clusterSize / sectorSize
            func tableSectors(_ clusters: Int) -> Int { ((clusters + 2) * 3 / 2 + sectorSize) / sectorSize }
            func dataStart(_ tables: Int) -> Int { 1 + 2 * tables + rootEntries * entrySize / sectorSize }
            let track = sectorsPerTrack
            let tables = tableSectors(usedClusters + spareClusters)
            let wanted = dataStart(tables) + max(usedClusters, 1) * perCluster
            sectors = (wanted + track - 1) / track * track
            clusters = (sectors - dataStart(tables)) / perCluster
            self.tableSectors = tables
        }
    }

    private static func bootSector(_ layout: Layout, label: String, number: UInt32) -> [UInt8] {
        var sector = [UInt8](repeating: 0, count: sectorSize)
        // A jump over the parameters, to a loop: nothing boots from it.
        sector.replace(at: 0, with: [0xeb, 0x3c, 0x90])
        sector.replace(at: 62, with: [0xeb, 0xfe])
        sector.replace(at: 3, with: padded("swkvm", 8))
        sector.store(UInt16(sectorSize), at: 11)
        sector[13] = UInt8(clusterSize / sectorSize)
        sector.store(UInt16(1), at: 14)
        sector[16] = 2
        sector.store(UInt16(rootEntries), at: 17)
        sector.store(UInt16(layout.sectors), at: 19)
        // A fixed disk.
        sector[21] = 0xf8
        sector.store(UInt16(layout.tableSectors), at: 22)
        sector.store(UInt16(sectorsPerTrack), at: 24)
        sector.store(UInt16(2), at: 26)
        sector[36] = 0x80
        // The number and the label follow.
        sector[38] = 0x29
        sector.store(number, at: 39)
        sector.replace(at: 43, with: padded(label, 11))
        sector.replace(at: 54, with: padded("FAT12", 8))
        sector.store(UInt16(0xaa55), at: 510)
        return sector
    }

    /// Two entries of 12 bits in each three bytes.
    private static func packed(_ table: [UInt16]) -> [UInt8] {
        var bytes: [UInt8] = []
        for index in stride(from: 0, to: table.count, by: 2) {
            let first = table[index], second = index + 1 < table.count ? table[index + 1] : 0
            bytes.append(UInt8(first & 0xff))
            bytes.append(UInt8(first >> 8 | (second & 0xf) << 4))
            bytes.append(UInt8(second >> 4))
        }
        return bytes
    }

    // MARK: The directory

    private static func volumeEntry(_ label: String) -> [UInt8] {
        entry(padded(label, 11), attributes: 0x08, cluster: 0, size: 0)
    }

    /// The long name's entries, the last part first, then the alias.
    private static func entries(for file: File, alias: [UInt8], cluster: Int) -> [UInt8] {
        let checksum = alias.reduce(UInt8(0)) { sum, byte in (sum >> 1 | sum << 7) &+ byte }
        let units = Array(file.name.utf16)
        let parts = (units.count + 12) / 13
        var entries: [UInt8] = []
        for part in (0..<parts).reversed() {
            var room = Array(units[(part * 13)..<min(units.count, part * 13 + 13)])
            // A name that does not fill its last entry ends in a zero, and then in ones.
            if room.count < 13 { room.append(0) }
            room += [UInt16](repeating: 0xffff, count: 13 - room.count)
            var entry = [UInt8](repeating: 0, count: entrySize)
            entry[0] = UInt8(part + 1) | (part == parts - 1 ? 0x40 : 0)
            entry[11] = 0x0f
            entry[13] = checksum
            for (index, unit) in room.enumerated() {
                entry.store(unit, at: index < 5 ? 1 + 2 * index : index < 11 ? 4 + 2 * index : 6 + 2 * index)
            }
            entries += entry
        }
        let isEmpty = file.contents.isEmpty
        return entries
            + entry(alias, attributes: 0x01, cluster: isEmpty ? 0 : cluster, size: UInt32(file.contents.count))
    }

    private static func entry(_ name: [UInt8], attributes: UInt8, cluster: Int, size: UInt32) -> [UInt8] {
        var entry = [UInt8](repeating: 0, count: entrySize)
        entry.replace(at: 0, with: name)
        entry[11] = attributes
        // The first of January 1980, the earliest date there is: zero is none.
        for offset in [16, 18, 24] { entry.store(UInt16(0x0021), at: offset) }
        entry.store(UInt16(cluster), at: 26)
        entry.store(size, at: 28)
        return entry
    }

    /// `USER-D~1`, with a number of its own for each file.
    private static func alias(of name: String, number: Int) -> [UInt8] {
        let letters = name.uppercased().filter { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-") }
        return padded("\(letters.prefix(6))~\(number)", 11)
    }

    private static func padded(_ text: String, _ count: Int) -> [UInt8] {
        Array((Array(text.utf8) + [UInt8](repeating: 0x20, count: count)).prefix(count))
    }

    /// FNV-1a.
    private static func hash(_ files: [File]) -> UInt32 {
        var hash: UInt32 = 0x811c_9dc5
        for file in files {
            for byte in Array(file.name.utf8) + [0] + file.contents { hash = (hash ^ UInt32(byte)) &* 0x0100_0193 }
        }
        return hash
    }
}

extension [UInt8] {
    /// Overwrites as many bytes as there are in `bytes`.
    fileprivate mutating func replace(at offset: Int, with bytes: [UInt8]) {
        replaceSubrange(offset..<offset + bytes.count, with: bytes)
    }

    /// Stores a number, the lowest byte first.
    fileprivate mutating func store(_ value: some FixedWidthInteger, at offset: Int) {
        for index in 0..<value.bitWidth / 8 { self[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index)) }
    }
}

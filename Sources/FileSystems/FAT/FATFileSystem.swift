// SPDX-License-Identifier: Apache-2.0

/// FAT12, FAT16 or FAT32 with long names.
public struct FATFileSystem: FileSystem {
    private let volume: Volume
    private let width: Width
    private let sectorSize: UInt64
    private let clusterSize: UInt64
    /// Offset of the first table.
    private let table: UInt64
    private let tableSize: UInt64
    /// Offset of the root directory of FAT12 and FAT16, and its bytes.
    private let rootDirectory: Range<UInt64>
    private let rootCluster: UInt32
    /// Offset of cluster 2.
    private let data: UInt64
    private let clusterCount: UInt32
    private let serial: UInt32
    public let label: String

    private enum Width: Int { case bits12 = 12, bits16 = 16, bits32 = 32 }

    public var kind: String { "FAT\(width.rawValue)" }
    public var uuid: String? {
        let digits = hexadecimal(UInt64(serial), 8).uppercased()
        return serial == 0 ? nil : "\(digits.prefix(4))-\(digits.suffix(4))"
    }
    public var ignoresCase: Bool { true }

    /// The largest directory: 65536 entries.
    private static let maximumDirectory: UInt64 = 2 << 20

    /// nil where there is no such file system.
    init?(_ volume: Volume) throws(FileSystemError) {
        guard volume.size >= 512 else { return nil }
        let boot = try volume.read(at: 0, count: 512)
        guard Self.matches(boot) else { return nil }
        func damaged(_ reason: String) -> FileSystemError { .damaged(what: "the FAT file system", reason: reason) }

        sectorSize = UInt64(boot.little16(0xb))
        let clusterSectors = UInt64(boot[0xd])
        clusterSize = sectorSize * clusterSectors
        let reserved = UInt64(boot.little16(0xe)), tables = UInt64(boot[0x10])
        let rootEntries = UInt64(boot.little16(0x11))
        let short = boot.little16(0x16)
        tableSize = UInt64(short != 0 ? UInt32(short) : boot.little32(0x24)) * sectorSize
        let sectors = UInt64(boot.little16(0x13) != 0 ? UInt32(boot.little16(0x13)) : boot.little32(0x20))
        table = reserved * sectorSize
        let rootStart = table + tables * tableSize
        let rootSize = (rootEntries * 32 + sectorSize - 1) / sectorSize * sectorSize
        rootDirectory = rootStart..<rootStart + rootSize
        data = rootDirectory.upperBound
        let end = sectors * sectorSize
        guard data < end else { throw damaged("its tables are larger than the file system") }
        guard end <= volume.size else {
            throw damaged("it has \(end) bytes, and its partition \(volume.size)")
        }
        let clusters = (end - data) / clusterSize
        // Microsoft's rule: only the count determines which it is.
        width = clusters < 4085 ? .bits12 : clusters < 65525 ? .bits16 : .bits32
        guard clusters < 0x0fff_fff5, width == .bits32 || rootEntries > 0 else {
            throw damaged("it has \(clusters) clusters and \(rootEntries) entries in its root directory")
        }
        guard (clusters + 2) * UInt64(width.rawValue) <= tableSize * 8 else {
            throw damaged("its table is too small for \(clusters) clusters")
        }
        clusterCount = UInt32(clusters)
        rootCluster = width == .bits32 ? boot.little32(0x2c) : 0
        let extended = width == .bits32 ? 0x42 : 0x26
        let hasLabel = boot.byte(extended) == 0x29
        serial = hasLabel || boot.byte(extended) == 0x28 ? boot.little32(extended + 1) : 0
        let name = hasLabel ? Self.trimmed(boot.piece(extended + 5, 11)) : ""
        label = name == "NO NAME" ? "" : name
        self.volume = volume
    }

    /// Indicates whether a first sector is that of a FAT file system.
    static func matches(_ boot: [UInt8]) -> Bool {
        let sector = boot.little16(0xb), cluster = boot.byte(0xd), tables = boot.byte(0x10), media = boot.byte(0x15)
        let jumps = boot.byte(0) == 0xe9 || (boot.byte(0) == 0xeb && boot.byte(2) == 0x90)
        return boot.little16(510) == 0xaa55 && jumps && [512, 1024, 2048, 4096].contains(sector)
            && cluster.nonzeroBitCount == 1 && boot.little16(0xe) > 0 && (1...2).contains(tables)
            && (media == 0xf0 || media >= 0xf8)
    }

    private func damaged(_ reason: String) -> FileSystemError {
        .damaged(what: "the \(kind) file system", reason: reason)
    }

    public func root() throws(FileSystemError) -> FileNode {
        FileNode(kind: .directory, size: 0, permissions: 0o755, modified: 0, place: .fat(rootCluster))
    }

    public func node(of entry: DirectoryEntry) throws(FileSystemError) -> FileNode {
        guard case .node(let node) = entry.place else { throw damaged("a file of another file system was asked for") }
        return node
    }

    public func target(of link: FileNode) throws(FileSystemError) -> [UInt8] {
        throw damaged("it has no symbolic links")
    }

    public func contents(of file: FileNode) throws(FileSystemError) -> FileContents {
        guard case .fat(let cluster) = file.place else { throw damaged("a file of another file system was asked for") }
        if file.size == 0 { return FileContents(bytes: []) }
        let pieces = try chain(from: cluster, size: file.size)
        return FileContents(size: file.size, pieces, in: [volume])
    }

    // MARK: Clusters

    /// The pieces of a chain of clusters.
    /// - Parameter size: bytes that it has to have at least; nil for as many as there are.
    private func chain(from first: UInt32, size: UInt64?) throws(FileSystemError) -> [FileContents.Piece] {
        var pieces: [FileContents.Piece] = []
        var window = TableWindow()
        var cluster = first, length: UInt64 = 0, count: UInt32 = 0
        while true {
            if let size, length >= size { return pieces }
            if cluster >= endOfChain {
                guard size == nil else { throw damaged("a file's chain of clusters ends before the file") }
                return pieces
            }
            guard cluster >= 2, cluster - 2 < clusterCount else { throw damaged("a chain leads to cluster \(cluster)") }
            // No chain has more clusters than there are, unless it is a loop.
            count += 1
            guard count <= clusterCount else { throw damaged("a chain of clusters forms a loop") }
            let place = data + UInt64(cluster - 2) * clusterSize
            if let last = pieces.last, last.place + last.length == place {
                pieces[pieces.count - 1].length += clusterSize
            } else {
                guard pieces.count < FileContents.maximumPieces else {
                    throw .unsupported(
                        what: "a file", reason: "it is in more than \(FileContents.maximumPieces) pieces")
                }
                pieces.append(.init(offset: length, length: clusterSize, place: place))
            }
            length += clusterSize
            if size == nil, length > Self.maximumDirectory {
                throw .tooLarge(what: "a directory", size: length, limit: Self.maximumDirectory)
            }
            cluster = try next(cluster, &window)
        }
    }

    /// A part of the table that was read last.
    private struct TableWindow {
        var start: UInt64 = 0
        var bytes: [UInt8] = []
    }

    private var endOfChain: UInt32 {
        switch width {
        case .bits12: 0xff8
        case .bits16: 0xfff8
        case .bits32: 0x0fff_fff8
        }
    }

    private func next(_ cluster: UInt32, _ window: inout TableWindow) throws(FileSystemError) -> UInt32 {
        let offset = UInt64(cluster) * UInt64(width.rawValue) / 8
        let size: UInt64 = width == .bits32 ? 4 : 2
        if offset < window.start || offset + size > window.start + UInt64(window.bytes.count) {
            window.start = offset / 512 * 512
            // One sector more than the window needs: an entry of 12 bits may lie in two.
            window.bytes = try volume.read(
                at: table + window.start, count: Int(min(8192, tableSize - min(tableSize, window.start))))
        }
        let inside = Int(offset - window.start)
        switch width {
        case .bits12:
            let pair = window.bytes.little16(inside)
            return UInt32(cluster & 1 == 0 ? pair & 0xfff : pair >> 4)
        case .bits16: return UInt32(window.bytes.little16(inside))
        case .bits32: return window.bytes.little32(inside) & 0x0fff_ffff
        }
    }

    // MARK: Directories

    public func entries(of directory: FileNode) throws(FileSystemError) -> [DirectoryEntry] {
        guard case .fat(let cluster) = directory.place else {
            throw damaged("a directory of another file system was asked for")
        }
        let bytes: [UInt8]
        if cluster == 0, width != .bits32 {
            bytes = try volume.read(
                at: rootDirectory.lowerBound, count: Int(rootDirectory.upperBound - rootDirectory.lowerBound))
        } else {
            // A directory's `..` says 0 where it means the root.
            let pieces = try chain(from: cluster == 0 ? rootCluster : cluster, size: nil)
            let size = pieces.last.map { $0.offset + $0.length } ?? 0
            bytes = try FileContents(size: size, pieces, in: [volume]).read(at: 0, count: Int(size))
        }
        var entries: [DirectoryEntry] = []
        var long = LongName()
        for offset in stride(from: 0, to: bytes.count - 31, by: 32) {
            let entry = bytes.piece(offset, 32)
            // Nothing follows.
            if entry[0] == 0 { break }
            if entry[0] == 0xe5 {
                long = LongName()
                continue
            }
            if entry[11] & 0x3f == 0x0f {
                long.add(entry)
                continue
            }
            let name = long.name(ofShort: entry) ?? Self.shortName(entry)
            long = LongName()
            // A volume's label.
            if entry[11] & 8 != 0 { continue }
            guard name != ".", name != ".." else { continue }
            guard !name.isEmpty, !name.utf8.contains(0), !name.contains("/") else {
                throw damaged("a directory has an entry without a valid name")
            }
            entries.append(DirectoryEntry(name: Array(name.utf8), place: .node(Self.node(entry, width))))
        }
        return entries
    }

    private static func node(_ entry: [UInt8], _ width: Width) -> FileNode {
        let isDirectory = entry[11] & 0x10 != 0
        let high = width == .bits32 ? UInt32(entry.little16(0x14)) << 16 : 0
        return FileNode(
            kind: isDirectory ? .directory : .file, size: isDirectory ? 0 : UInt64(entry.little32(0x1c)),
            permissions: (isDirectory ? 0o755 : 0o644) & (entry[11] & 1 != 0 ? 0o555 : 0o777),
            modified: seconds(date: entry.little16(0x18), time: entry.little16(0x16)),
            place: .fat(high | UInt32(entry.little16(0x1a))))
    }

    /// Seconds since 1970 of a local time, which is taken as UTC.
    private static func seconds(date: UInt16, time: UInt16) -> Int64 {
        let month = Int64(date >> 5 & 15), day = Int64(date & 31)
        guard (1...12).contains(month), day > 0 else { return 0 }
        // Years that begin in March have the leap day at their end.
        let year = Int64(date >> 9) + 1980 - (month < 3 ? 1 : 0)
        let days =
            365 * year + year / 4 - year / 100 + year / 400 + (153 * (month + (month < 3 ? 9 : -3)) + 2) / 5 + day - 1
            - 719468
        return days * 86400 + Int64(time >> 11) * 3600 + Int64(time >> 5 & 63) * 60 + Int64(time & 31) * 2
    }

    private static func trimmed(_ bytes: [UInt8]) -> String {
        var bytes = bytes
        while bytes.last == UInt8(ascii: " ") { bytes.removeLast() }
        // Code pages differ beyond ASCII.
        return String(String.UnicodeScalarView(bytes.map { $0 < 0x80 ? Unicode.Scalar($0) : "_" }))
    }

    private static func shortName(_ entry: [UInt8]) -> String {
        // 0xe5 means a deleted entry, and is written as 5.
        let stem = trimmed(entry.piece(0, 8)), suffix = trimmed(entry.piece(8, 3))
        // Bits of Windows NT for a name in lower case.
        let lower = entry[12]
        let name = lower & 8 != 0 ? stem.lowercased() : stem
        return suffix.isEmpty ? name : name + "." + (lower & 0x10 != 0 ? suffix.lowercased() : suffix)
    }
}

/// A long name, whose parts come before the short one, the last part first.
private struct LongName {
    private var parts: [[UInt8]] = []
    private var next: UInt8 = 0
    private var checksum: UInt8 = 0

    mutating func add(_ entry: [UInt8]) {
        let order = entry[0] & 0x3f
        if entry[0] & 0x40 != 0 {
            self = LongName()
            checksum = entry[13]
        } else if order != next || entry[13] != checksum {
            self = LongName()
            return
        }
        guard (1...20).contains(order) else {
            self = LongName()
            return
        }
        next = order - 1
        parts.append(entry.piece(1, 10) + entry.piece(14, 12) + entry.piece(28, 4))
    }

    /// The name, if it is complete and belongs to a short one.
    func name(ofShort entry: [UInt8]) -> String? {
        guard !parts.isEmpty, next == 0 else { return nil }
        let sum = entry.prefix(11).reduce(0 as UInt8) { ($0 >> 1 | $0 << 7) &+ $1 }
        guard sum == checksum else { return nil }
        let bytes = Array(parts.reversed().joined())
        let units = stride(from: 0, to: bytes.count, by: 2).map { bytes.little16($0) }.prefix { $0 != 0 }
        return String(decoding: units, as: UTF16.self)
    }
}

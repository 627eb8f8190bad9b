// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// A persistent bitmap of an image: which parts of the disk a backup has to take (QEMU, docs/interop/qcow2.txt,
/// "Bitmaps extension").
public struct DiskBitmap: Equatable, Sendable {
    public let name: String
    /// Bytes of the disk that a bit stands for.
    public let granularity: UInt64
    /// Indicates that the last writer did not save it, so its contents are not valid.
    public let isInUse: Bool
    /// Indicates that writers with bitmap support keep it up to date.
    public let isAutomatic: Bool
}

/// The directory of an image's bitmaps.
struct QCOW2BitmapDirectory: Sendable {
    struct Entry: Sendable {
        let bitmap: DiskBitmap
        /// The place of its table, and the entries of that, each of which stands for a cluster of bits.
        let table: UInt64
        let count: UInt64
    }

    private(set) var entries: [Entry] = []
    /// What of the directory cannot be right, from which on nothing of it was read.
    private(set) var problem: String?

    /// The most bitmaps, entries of a bitmap's table and bytes of a directory, as in QEMU.
    private static let maximumCount = 65535
    static let maximumTable: UInt64 = 1 << 27
    private static let maximumSize: UInt64 = 64 << 20
    /// Clusters that are looked up when an image is opened for writing. An image with more frees them by a repair.
    private static let maximumClusters = 1 << 20

    private enum Flags {
        static let inUse: UInt32 = 1 << 0
        static let automatic: UInt32 = 1 << 1
    }

    /// Reads and checks the directory that a header names.
    init(
        _ directory: QCOW2Header.BitmapDirectory, _ header: QCOW2Header, _ file: TableFile, fileSize: UInt64
    ) throws(DiskImageError) {
        guard directory.offset & (header.clusterSize - 1) == 0, directory.size <= Self.maximumSize,
            directory.count <= Self.maximumCount,
            directory.offset <= fileSize, directory.size <= fileSize - directory.offset
        else {
            problem =
                "a directory of \(directory.count) bitmaps, of \(directory.size) bytes at byte \(directory.offset)"
            return
        }
        var rest = try file.read(Int(directory.size), at: directory.offset)[...]
        for _ in 0..<directory.count {
            let fixed = 24
            guard rest.count >= fixed else {
                problem = "the directory of bitmaps ends before the last of them"
                return
            }
            let nameLength = Int(rest.bigEndian16(at: 18))
            let extraLength = Int(rest.bigEndian32(at: 20))
            let (flags, granularity) = (rest.bigEndian32(at: 12), rest[rest.startIndex + 17])
            guard nameLength + extraLength <= rest.count - fixed, granularity < 64 else {
                problem =
                    "a bitmap of 2^\(granularity) bytes a bit, with a name of \(nameLength) bytes and \(extraLength) of extra data"
                return
            }
            let name = rest.dropFirst(fixed + extraLength).prefix(nameLength)
            entries.append(
                Entry(
                    bitmap: DiskBitmap(
                        name: String(raw: name), granularity: 1 << UInt64(granularity),
                        isInUse: flags & Flags.inUse != 0, isAutomatic: flags & Flags.automatic != 0),
                    table: rest.bigEndian64(at: 0), count: UInt64(rest.bigEndian32(at: 8))))
            rest = rest.dropFirst((fixed + nameLength + extraLength + 7) & ~7)
        }
    }

    /// Calls with each piece of a bitmap's table that is in the file.
    static func forEachPlace(
        _ entry: Entry, _ file: TableFile, _ body: (UInt64) throws(DiskImageError) -> Void
    ) throws(DiskImageError) {
        for start in stride(from: 0, to: entry.count, by: 8192) {
            for word in try file.readTable(Int(min(8192, entry.count - start)), at: entry.table + start * 8) {
                let place = word & QCOW2Image.L2Entry.offset
                if place != 0 { try body(place) }
            }
        }
    }

    /// Indicates whether a bitmap's table is a possible one, and in the file.
    static func hasTable(_ entry: Entry, _ header: QCOW2Header, fileSize: UInt64) -> Bool {
        entry.table & (header.clusterSize - 1) == 0 && entry.count <= maximumTable && entry.table <= fileSize
            && entry.count * 8 <= fileSize - entry.table
    }

    /// The clusters of the directory, the tables and the bits, to be freed; none where something cannot be right.
    func clusters(
        _ directory: QCOW2Header.BitmapDirectory, _ header: QCOW2Header, _ file: TableFile, fileSize: UInt64
    ) throws(DiskImageError) -> [ClusterRun] {
        guard problem == nil, entries.allSatisfy({ Self.hasTable($0, header, fileSize: fileSize) }) else { return [] }
        var runs: [ClusterRun] = []
        var total: UInt64 = 0
        var isSound = true
        func add(_ place: UInt64, _ length: UInt64) {
            guard length > 0 else { return }
            let (first, count) = (place >> UInt64(header.clusterBits), header.clusters(for: length))
            total += count
            // More than there are means that some overlap.
            guard isSound, place & (header.clusterSize - 1) == 0, place < fileSize,
                total <= min(UInt64(Self.maximumClusters), header.clusters(for: fileSize))
            else {
                isSound = false
                return
            }
            if let last = runs.last, last.first + last.count == first {
                runs[runs.count - 1].count += count
            } else {
                runs.append(ClusterRun(first: first, count: count))
            }
        }
        add(directory.offset, directory.size)
        for entry in entries where isSound {
            add(entry.table, entry.count * 8)
            if isSound { try Self.forEachPlace(entry, file) { place in add(place, header.clusterSize) } }
        }
        return isSound ? runs : []
    }
}

/// The bitmaps of an image that is open for writing, until the first change makes them untrue.
struct LiveBitmaps: Sendable {
    let names: [String]
    /// Clusters that they take.
    let clusters: [ClusterRun]

    /// nil for an image that has none, or none that are true.
    init?(_ header: QCOW2Header, _ file: TableFile, fileSize: UInt64) throws(DiskImageError) {
        guard let place = header.bitmaps else { return nil }
        let directory = try QCOW2BitmapDirectory(place, header, file, fileSize: fileSize)
        names = directory.entries.map(\.bitmap.name)
        clusters = try directory.clusters(place, header, file, fileSize: fileSize)
    }
}

extension DiskImage {
    /// Says that the image's bitmaps do not describe its disk any more, and are gone.
    func reportLostBitmaps(_ names: [String]) {
        guard !names.isEmpty else { return }
        let shown = names.prefix(8).map { quoted($0) }.joined(separator: ", ") + (names.count > 8 ? ", …" : "")
        let sentence =
            names.count == 1
            ? "bitmap \(shown) no longer describes the disk and was removed"
            : "bitmaps \(shown) no longer describe the disk and were removed"
        report?("disk \(quoted(path)): its persistent \(sentence); the next backup must be a full one")
    }
}

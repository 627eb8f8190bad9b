// SPDX-License-Identifier: Apache-2.0

/// The partitions of a disk and the file systems in them.
public struct DiskContents: Sendable {
    /// A partition, or the whole disk, and what is in it.
    public struct Place: Sendable {
        /// nil for a disk without a partition table.
        public let partition: Partition?
        /// nil where nothing that is read was found.
        public let fileSystem: (any FileSystem)?
        /// What it is: `ext4`, `XFS`; nil where that is unknown.
        public let kind: String?
        /// Why it cannot be read, although it is known.
        public let problem: FileSystemError?

        /// `partition 1`, or `the disk`.
        public var description: String { partition.map { "partition \($0.number)" } ?? "the disk" }
    }

    public let table: PartitionTable?
    /// In the order of partition numbers.
    public let places: [Place]

    /// Reads what there is.
    /// - Throws: for a partition table that is damaged, and a disk that cannot be read. A damaged file system is noted
    ///   in its place: another one may be what is wanted.
    public init(_ disk: any BlockSource) throws(FileSystemError) {
        table = try PartitionTable(disk)
        guard let table else {
            places = [try Self.place(nil, Volume(disk))]
            return
        }
        var places: [Place] = []
        for partition in table.partitions {
            places.append(try Self.place(partition, Volume(disk, start: partition.start, size: partition.size)))
        }
        self.places = places
    }

    init(table: PartitionTable?, places: [Place]) { (self.table, self.places) = (table, places) }

    private static func place(_ partition: Partition?, _ volume: Volume) throws(FileSystemError) -> Place {
        do throws(FileSystemError) {
            if let found = try fileSystem(volume) {
                return Place(partition: partition, fileSystem: found, kind: found.kind, problem: nil)
            }
        } catch {
            if case .unreadable = error { throw error }
            return Place(partition: partition, fileSystem: nil, kind: nil, problem: error)
        }
        return Place(partition: partition, fileSystem: nil, kind: try Self.kind(volume), problem: nil)
    }

    private static func fileSystem(_ volume: Volume) throws(FileSystemError) -> (any FileSystem)? {
        if let ext = try ExtFileSystem(volume) { return ext }
        return try FATFileSystem(volume)
    }

    /// What something is that is known by name alone.
    private static func kind(_ volume: Volume) throws(FileSystemError) -> String? {
        let known: [(UInt64, StaticString, String)] = [
            (0, "XFSB", "XFS"), (0x10040, "_BHRfS_M", "btrfs"), (0, "LUKS", "LUKS"), (3, "NTFS    ", "NTFS"),
            (3, "EXFAT   ", "exFAT"), (0, "hsqs", "squashfs"), (0x218, "LVM2 001", "LVM"), (0x18, "LVM2 001", "LVM"),
            (0xff6, "SWAPSPACE2", "swap"), (0x8001, "CD001", "ISO 9660"), (0x1000, "bcachefs", "bcachefs"),
            (0x400, "\u{10}\u{20}\u{F5}", "F2FS"), (0x400, "\u{E2}\u{E1}\u{F5}\u{E0}", "EROFS"),
        ]
        for (offset, magic, name) in known {
            let count = "\(magic)".utf8.count
            guard volume.contains(offset, UInt64(count)) else { continue }
            if try volume.read(at: offset, count: count).matches(magic, at: 0) { return name }
        }
        return nil
    }

    /// The file system of a partition; nil for the only one, or the one with the most of a system.
    public func fileSystem(partition number: Int?) throws(FileSystemError) -> any FileSystem {
        if let number {
            guard let place = places.first(where: { $0.partition?.number == number }) else {
                throw .noPartition(number: number, found: places.compactMap { $0.partition?.number })
            }
            return try Self.open(place)
        }
        let readable = places.compactMap(\.fileSystem)
        guard !readable.isEmpty else {
            if places.count == 1 { return try Self.open(places[0]) }
            if let problem = places.lazy.compactMap(\.problem).first { throw problem }
            throw .noFileSystem(found: found)
        }
        if readable.count == 1 { return readable[0] }
        // What has the directories of a system, not what is mounted below them.
        for fileSystem in readable {
            if try fileSystem.names(in: "/").contains("etc") { return fileSystem }
        }
        return readable[0]
    }

    private static func open(_ place: Place) throws(FileSystemError) -> any FileSystem {
        if let fileSystem = place.fileSystem { return fileSystem }
        if let problem = place.problem { throw problem }
        throw .noFileSystem(found: place.kind.map { [$0] } ?? [])
    }

    /// What is there, in words: `ext4 in partition 1`.
    var found: [String] {
        places.compactMap { place in
            let what = place.kind ?? place.problem.map { "a file system that cannot be read (\($0))" }
            return table == nil ? what : "\(what ?? "unknown contents") in \(place.description)"
        }
    }
}

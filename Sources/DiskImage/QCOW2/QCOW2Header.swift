// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The header of a qcow2 image, checked: every field is within the bounds that the format sets
/// (QEMU, docs/interop/qcow2.txt), and every table it names lies inside the file.
struct QCOW2Header: Equatable, Sendable {
    static let magic: [UInt8] = [0x51, 0x46, 0x49, 0xfb]

    let version: UInt32
    /// 9 … 21: clusters of 512 bytes to 2 MiB.
    let clusterBits: Int
    /// Bytes of the disk.
    private(set) var size: UInt64
    /// L1 entries that the disk needs; the table may be longer.
    private(set) var l1Count: Int
    private(set) var l1Offset: UInt64
    /// Indicates whether L2 entries have 16 bytes, with a bitmap of 32 subclusters.
    let hasExtendedL2: Bool
    /// The dirty bit: a program with lazy refcounts did not close the image, so refcounts may be wrong. A reader does
    /// not use them.
    let isDirty: Bool
    /// The corrupt bit: a program found the image damaged. It can still be read, to recover data; damage that is found
    /// is an I/O error.
    let isCorrupt: Bool
    /// log2 of a reference count's bits: 0 … 6.
    let refcountOrder: Int
    private(set) var refcountTableOffset: UInt64
    private(set) var refcountTableClusters: Int
    /// Features that a writer which does not know them switches off; no bit is known here.
    private(set) var autoclearFeatures: UInt64
    private(set) var snapshotTableOffset: UInt64
    private(set) var snapshotCount: Int
    /// L1 entries that the table has.
    private(set) var l1TableSize: Int
    /// The directory of bitmaps, if the image has some and they are valid (bit 0 of the autoclear features).
    private(set) var bitmaps: BitmapDirectory?
    /// The guest's data is in a file of its own, each cluster at the place that it has on the disk.
    let hasDataFile: Bool
    /// Its name as written, without a meaning yet.
    let dataFileName: String?
    /// The encryption of the data, if any.
    let encryption: Encryption?
    /// How compressed clusters are compressed.
    let compression: Compression
    /// The backing file's name as written, without a meaning yet.
    let backingName: String?
    /// The format of the backing file, if the image states it.
    let backingFormat: String?

    /// Autoclear features that stay true whatever we do to the image.
    var keptAutoclearFeatures: UInt64 { hasDataFile ? Autoclear.rawData : 0 }

    /// A table of the file, in bytes.
    struct BitmapDirectory: Equatable, Sendable {
        let offset: UInt64
        let size: UInt64
        let count: Int
        /// Where the corresponding extension of the header begins, if it is the last one: zeroes there remove it.
        /// Otherwise nil.
        let lastExtension: UInt64?
    }

    var clusterSize: UInt64 { 1 << UInt64(clusterBits) }
    /// log2 of the entries of an L2 table, which fills a cluster.
    var l2Bits: Int { clusterBits - (hasExtendedL2 ? 4 : 3) }

    enum Compression: Equatable, Sendable { case zlib, zstd }

    enum Encryption: Equatable, Sendable {
        /// AES in CBC mode, which is only read.
        case aes
        /// The place of a LUKS header with its key material, in bytes of the file.
        case luks(offset: UInt64, length: UInt64)
    }

    /// The bytes of the fields that both versions have, or that version 3 adds: all that changes in a header is in one
    /// sector.
    var fixedLength: Int { version == 2 ? 72 : 104 }

    enum Incompatible {
        static let dirty: UInt64 = 1 << 0
        static let corrupt: UInt64 = 1 << 1
        static let externalData: UInt64 = 1 << 2
        static let compression: UInt64 = 1 << 3
        static let extendedL2: UInt64 = 1 << 4
        static let known = dirty | corrupt | externalData | compression | extendedL2
    }

    enum Autoclear {
        static let bitmaps: UInt64 = 1 << 0
        static let rawData: UInt64 = 1 << 1
    }

    private enum ExtensionType {
        static let bitmaps: UInt32 = 0x2385_2875
        static let dataFile: UInt32 = 0x4441_5441
        static let encryption: UInt32 = 0x0537_be77
        static let end: UInt32 = 0
        static let backingFormat: UInt32 = 0xe279_2aca
        static let featureNames: UInt32 = 0x6803_f857
    }

    /// The most bytes of an L1 table, as in QEMU.
    static let maximumL1Size = 32 << 20
    /// The most bytes of a backing file's name.
    static let maximumBackingName = 1023

    /// Reads and checks the header of a file.
    /// - Parameter allowingCut: whether the file may end before the tables do, to recover what is left of it. Of the L1
    ///   table, without which there is nothing, the beginning has to be there.
    init(_ file: borrowing ImageFile, allowingCut: Bool = false) throws(DiskImageError) {
        let path = file.path
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .invalid(path: path, reason: reason()) }
        }
        let start = try file.read("the header", count: Int(min(4, file.size)), at: 0)
        guard start == Self.magic else { throw .notQCOW2(path: path, found: start) }

        let fixed = try file.read("the header", count: 72, at: 0)
        version = fixed.bigEndian32(at: 4)
        guard version == 2 || version == 3 else { throw .unsupported(path: path, feature: "qcow2 version \(version)") }
        let bits = fixed.bigEndian32(at: 20)
        try require((9...21).contains(bits), "clusters of 2^\(bits) bytes; 2^9 to 2^21 are possible")
        clusterBits = Int(bits)
        let clusterSize = UInt64(1) << UInt64(bits)

        // What follows is within the first cluster. A file may end within it only if it holds no data at all, which
        // the check of the L1 table below finds out.
        let cluster = try file.read("the header", count: Int(min(clusterSize, file.size)), at: 0)
        var incompatible: UInt64 = 0
        var headerLength = 72
        var refcountOrder = 4, autoclear: UInt64 = 0
        if version == 3 {
            guard cluster.count >= 104 else {
                throw .truncated(path: path, what: "the header", needed: 104, size: file.size)
            }
            let length = cluster.bigEndian32(at: 100)
            try require(length >= 104 && UInt64(length) <= clusterSize, "a header of \(length) bytes")
            guard length <= cluster.count else {
                throw .truncated(path: path, what: "the header", needed: UInt64(length), size: file.size)
            }
            headerLength = Int(length)
            incompatible = cluster.bigEndian64(at: 72)
            let order = cluster.bigEndian32(at: 96)
            try require(order <= 6, "reference counts of 2^\(order) bits; at most 2^6 are possible")
            refcountOrder = Int(order)
            autoclear = cluster.bigEndian64(at: 88)
        }
        self.refcountOrder = refcountOrder
        autoclearFeatures = autoclear
        snapshotCount = Int(fixed.bigEndian32(at: 60))
        snapshotTableOffset = fixed.bigEndian64(at: 64)

        // The extensions have the names of features, so they come before the features themselves.
        var extensions = Extensions()
        let backingOffset = fixed.bigEndian64(at: 8)
        let backingLength = fixed.bigEndian32(at: 16)
        if backingOffset != 0 {
            try require(
                backingLength <= Self.maximumBackingName,
                "a backing file name of \(backingLength) bytes; \(Self.maximumBackingName) are possible")
            try require(
                backingOffset >= UInt64(headerLength) && backingOffset <= UInt64(cluster.count)
                    && UInt64(backingLength) <= UInt64(cluster.count) - backingOffset,
                "a backing file name at byte \(backingOffset), outside of the header's cluster")
        }
        let extensionsEnd = backingOffset != 0 ? Int(backingOffset) : cluster.count
        try extensions.read(cluster[headerLength..<extensionsEnd], path: path)

        switch fixed.bigEndian32(at: 32) {
        case 0: encryption = nil
        case 1: encryption = .aes
        case 2:
            guard let (offset, length) = extensions.encryption else {
                throw .invalid(path: path, reason: "LUKS encryption without a pointer to its header")
            }
            try require(
                offset & (clusterSize - 1) == 0 && offset >= clusterSize && length >= UInt64(LUKSHeader.size)
                    && length <= LUKSHeader.maximumRegion,
                "a LUKS header of \(length) bytes at byte \(offset)")
            try Self.requireTable("the LUKS header", at: offset, size: length, file)
            encryption = .luks(offset: offset, length: length)
        case let method: throw .unsupported(path: path, feature: "encryption method \(method)")
        }
        if extensions.encryption != nil, encryption == nil || encryption == .aes {
            throw .invalid(path: path, reason: "a pointer to a LUKS header without LUKS encryption")
        }
        let unknown = incompatible & ~Incompatible.known
        guard unknown == 0 else {
            let names = (0..<64).filter { unknown >> UInt64($0) & 1 == 1 }.map { bit in
                extensions.featureNames[bit].map { "the feature \"\($0)\" (incompatible bit \(bit))" }
                    ?? "the unnamed incompatible feature \(bit)"
            }
            throw .unsupported(path: path, feature: names.joined(separator: " and "))
        }
        hasDataFile = incompatible & Incompatible.externalData != 0
        dataFileName = extensions.dataFile
        if incompatible & Incompatible.compression != 0 {
            try require(headerLength > 104, "the compression type feature is set, but the type is missing")
            switch cluster[104] {
            case 0: throw .invalid(path: path, reason: "the compression type feature is set, but the type is zlib")
            case 1: compression = .zstd
            case let type: throw .unsupported(path: path, feature: "compression type \(type)")
            }
        } else {
            compression = .zlib
        }
        isDirty = incompatible & Incompatible.dirty != 0
        isCorrupt = incompatible & Incompatible.corrupt != 0
        hasExtendedL2 = incompatible & Incompatible.extendedL2 != 0
        try require(
            !hasExtendedL2 || bits >= 14, "subclusters in clusters of \(clusterSize) bytes; 16384 or more are needed")

        // The disk, and the table that maps it.
        (size, l1Count, l1Offset, l1TableSize) = (0, 0, 0, 0)
        bitmaps = autoclear & Autoclear.bitmaps != 0 ? extensions.bitmaps : nil

        // Readers need no reference counts, but an image whose refcount table is missing was truncated.
        let refcountOffset = fixed.bigEndian64(at: 48)
        let refcountClusters = UInt64(fixed.bigEndian32(at: 56))
        try require(
            refcountOffset & (clusterSize - 1) == 0,
            "a refcount table at byte \(refcountOffset), which is not cluster-aligned")
        try require(refcountClusters * clusterSize <= 8 << 20, "a refcount table of \(refcountClusters) clusters")
        if !allowingCut {
            try Self.requireTable("the refcount table", at: refcountOffset, size: refcountClusters * clusterSize, file)
        }
        refcountTableOffset = refcountOffset
        refcountTableClusters = Int(refcountClusters)

        if backingOffset != 0, backingLength > 0 {
            let bytes = cluster[Int(backingOffset)..<Int(backingOffset) + Int(backingLength)]
            guard !bytes.contains(0) else { throw .invalid(path: path, reason: "a backing file name with a zero byte") }
            backingName = String(raw: bytes)
        } else {
            backingName = nil
        }
        backingFormat = extensions.backingFormat
        try map(
            fixed.bigEndian64(at: 24), fixed.bigEndian64(at: 40), entries: UInt64(fixed.bigEndian32(at: 36)),
            "the L1 table", file, allowingCut: allowingCut)
        if case .luks(let offset, let length) = encryption {
            for (what, start, size) in [
                ("L1", l1Offset, UInt64(l1TableSize) * 8), ("refcount", refcountOffset, refcountClusters * clusterSize),
            ] {
                try require(
                    start >= offset + length || start + size <= offset,
                    "its LUKS header and its \(what) table in the same place")
            }
        }
    }

    /// Has the disk be what a table says, whose place and length come from the image: that of the header, or of a
    /// snapshot.
    mutating func map(
        _ size: UInt64, _ l1Offset: UInt64, entries: UInt64, _ what: String, _ file: borrowing ImageFile,
        allowingCut: Bool = false
    ) throws(DiskImageError) {
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .invalid(path: file.path, reason: reason()) }
        }
        try require(size <= DiskImage.maximumSize, "a disk of \(size) bytes")
        try require(
            encryption == nil || size % 512 == 0,
            "an encrypted disk of \(size) bytes, which is not a multiple of the sector size")
        let needed = l1Entries(for: size)
        try require(needed <= entries, "an L1 table of \(entries) entries for a disk that needs \(needed)")
        try require(entries * 8 <= UInt64(Self.maximumL1Size), "an L1 table of \(entries) entries")
        try require(l1Offset & (clusterSize - 1) == 0, "an L1 table at byte \(l1Offset), which is not cluster-aligned")
        if allowingCut {
            try Self.requireTable("the beginning of \(what)", at: l1Offset, size: min(needed, 1) * 8, file)
        } else {
            try Self.requireTable(what, at: l1Offset, size: needed * 8, file)
        }
        self.size = size
        self.l1Offset = l1Offset
        l1Count = Int(needed)
        l1TableSize = Int(entries)
    }

    /// The header after reference counts have moved and features have been switched off.
    func with(refcountTable offset: UInt64, _ clusters: Int, autoclear: UInt64) -> QCOW2Header {
        var header = self
        (header.refcountTableOffset, header.refcountTableClusters, header.autoclearFeatures) = (
            offset, clusters, autoclear
        )
        if autoclear & Autoclear.bitmaps == 0 { header.bitmaps = nil }
        return header
    }

    /// Takes over what a ``MetadataReplacement`` has written.
    mutating func replaced(by fields: [UInt8]) {
        size = fields.bigEndian64(at: 24)
        l1TableSize = Int(fields.bigEndian32(at: 36))
        l1Count = Int(l1Entries(for: size))
        l1Offset = fields.bigEndian64(at: 40)
        refcountTableOffset = fields.bigEndian64(at: 48)
        refcountTableClusters = Int(fields.bigEndian32(at: 56))
        snapshotCount = Int(fields.bigEndian32(at: 60))
        snapshotTableOffset = fields.bigEndian64(at: 64)
        guard version >= 3 else { return }
        autoclearFeatures = fields.bigEndian64(at: 88)
        if autoclearFeatures & Autoclear.bitmaps == 0 { bitmaps = nil }
    }

    /// L1 entries that a disk of `size` bytes needs.
    func l1Entries(for size: UInt64) -> UInt64 {
        let covered = UInt64(clusterBits + l2Bits)
        return (size >> covered) + (size & ((1 << covered) - 1) == 0 ? 0 : 1)
    }

    /// Clusters that so many bytes take.
    func clusters(for bytes: UInt64) -> UInt64 {
        (bytes >> UInt64(clusterBits)) + (bytes & (clusterSize - 1) == 0 ? 0 : 1)
    }

    /// The place of a compressed cluster and the bytes to the end of the last of its sectors.
    func compressedRange(_ entry: UInt64) -> (place: UInt64, length: UInt64) {
        // The entry's lower bits are the place, the upper ones the number of further 512-byte sectors.
        let lengthBits = UInt64(clusterBits - 8)
        let placeBits = 62 - lengthBits
        let place = entry & ((1 << placeBits) - 1)
        let sectors = (entry >> placeBits & ((1 << lengthBits) - 1)) + 1
        return (place, sectors * 512 - place % 512)
    }

    private static func requireTable(
        _ what: String, at offset: UInt64, size: UInt64, _ file: borrowing ImageFile
    ) throws(DiskImageError) {
        let (end, overflow) = offset.addingReportingOverflow(size)
        guard !overflow, end <= file.size else {
            throw .truncated(path: file.path, what: what, needed: overflow ? .max : end, size: file.size)
        }
    }

    /// The header extensions that matter to a reader; others are ignored.
    private struct Extensions {
        var backingFormat: String?
        var bitmaps: BitmapDirectory?
        var dataFile: String?
        /// Place and length of the LUKS header.
        var encryption: (offset: UInt64, length: UInt64)?
        /// Names of incompatible features by bit.
        var featureNames: [Int: String] = [:]

        mutating func read(_ bytes: ArraySlice<UInt8>, path: String) throws(DiskImageError) {
            var rest = bytes
            // Images of version 2 may end their header without an end marker.
            while rest.count >= 8 {
                let place = rest.startIndex
                let type = rest.bigEndian32(at: 0)
                let length = Int(rest.bigEndian32(at: 4))
                if type == ExtensionType.end { return }
                rest = rest.dropFirst(8)
                guard length <= rest.count else {
                    throw .invalid(
                        path: path, reason: "a header extension of \(length) bytes where \(rest.count) are left")
                }
                let contents = rest.prefix(length)
                switch type {
                case ExtensionType.backingFormat:
                    guard let text = String(validating: contents, as: UTF8.self), length <= 64 else {
                        throw .invalid(path: path, reason: "a backing format that is not text")
                    }
                    backingFormat = text
                case ExtensionType.dataFile:
                    guard !contents.isEmpty, !contents.contains(0), length <= 1023 else {
                        throw .invalid(path: path, reason: "a data file's name of \(length) bytes, or with a zero byte")
                    }
                    dataFile = String(raw: contents)
                case ExtensionType.featureNames:
                    readFeatureNames(contents)
                case ExtensionType.encryption:
                    guard length == 16 else {
                        throw .invalid(path: path, reason: "a pointer to a LUKS header of \(length) bytes")
                    }
                    encryption = (contents.bigEndian64(at: 0), contents.bigEndian64(at: 8))
                case ExtensionType.bitmaps:
                    guard length >= 24 else {
                        throw .invalid(path: path, reason: "an extension for bitmaps of \(length) bytes")
                    }
                    let next = rest.dropFirst(length + (8 - length % 8) % 8)
                    let isLast = next.count < 8 || next.bigEndian32(at: 0) == ExtensionType.end
                    bitmaps = BitmapDirectory(
                        offset: contents.bigEndian64(at: 16), size: contents.bigEndian64(at: 8),
                        count: Int(contents.bigEndian32(at: 0)),
                        lastExtension: isLast && place % 8 == 0 ? UInt64(place) : nil)
                default:
                    break
                }
                // Padded to a multiple of 8.
                rest = rest.dropFirst(length + (8 - length % 8) % 8)
            }
        }

        /// 48 bytes each: kind (0 is incompatible), bit, and a name padded with NULs.
        private mutating func readFeatureNames(_ bytes: ArraySlice<UInt8>) {
            var rest = bytes
            while rest.count >= 48 {
                let entry = rest.prefix(48)
                rest = rest.dropFirst(48)
                let bit = Int(entry[entry.startIndex + 1])
                guard entry[entry.startIndex] == 0, bit < 64 else { continue }
                let name = entry.dropFirst(2).prefix { $0 != 0 }
                // It is for a message only, so whatever is no plain text is not shown.
                let plain = name.map { (0x20..<0x7f).contains($0) ? $0 : UInt8(ascii: "?") }
                featureNames[bit] = String(decoding: plain, as: UTF8.self)
            }
        }
    }
}

extension RandomAccessCollection<UInt8> where Index == Int {
    /// The four bytes at an offset from the start, which the caller has checked to be there.
    func bigEndian32(at offset: Int) -> UInt32 {
        self[startIndex + offset..<startIndex + offset + 4].reduce(0) { $0 << 8 | UInt32($1) }
    }

    func bigEndian16(at offset: Int) -> UInt16 {
        UInt16(self[startIndex + offset]) << 8 | UInt16(self[startIndex + offset + 1])
    }

    func bigEndian64(at offset: Int) -> UInt64 {
        UInt64(bigEndian32(at: offset)) << 32 | UInt64(bigEndian32(at: offset + 4))
    }
}

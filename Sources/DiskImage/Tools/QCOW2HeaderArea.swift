// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The beginning of a qcow2 image as bytes to be written: the fixed fields, the header extensions, and the backing
/// file's name.
///
/// One that was read is written again with everything that is not known to us as it was (QEMU, docs/interop/qcow2.txt).
struct QCOW2HeaderArea {
    /// The fields up to the header's length, in the file's byte order.
    private(set) var fields: [UInt8]
    private(set) var extensions: [(type: UInt32, contents: [UInt8])] = []
    var backingName: String?

    enum Field {
        static let backingOffset = 8
        static let backingLength = 16
        static let size = 24
        static let encryptionMethod = 32
        static let l1Count = 36
        static let l1Offset = 40
        static let refcountTableOffset = 48
        static let refcountTableClusters = 56
        static let incompatibleFeatures = 72
        static let compatibleFeatures = 80
        static let autoclearFeatures = 88
    }

    enum Extension {
        static let backingFormat: UInt32 = 0xe279_2aca
        static let featureNames: UInt32 = 0x6803_f857
        static let dataFile: UInt32 = 0x4441_5441
        static let encryption: UInt32 = 0x0537_be77
    }

    /// The area of a new image.
    init(_ options: QCOW2Options, size: UInt64, backing: BackingReference?) {
        let isVersion3 = options.compatibility == .version3
        fields = [UInt8](repeating: 0, count: isVersion3 ? 112 : 72)
        fields.replaceSubrange(0..<4, with: QCOW2Header.magic)
        set32(4, isVersion3 ? 3 : 2)
        set32(20, UInt32(options.clusterSize.trailingZeroBitCount))
        set64(Field.size, size)
        if let backing {
            backingName = backing.name
            setExtension(Extension.backingFormat, Array(backing.format.rawValue.utf8))
        }
        guard isVersion3 else { return }
        var incompatible: UInt64 = 0
        if options.dataFile != nil { incompatible |= 1 << 2 }
        if options.compression != .zlib { incompatible |= 1 << 3 }
        if options.extendedL2 { incompatible |= 1 << 4 }
        set64(Field.incompatibleFeatures, incompatible)
        set64(Field.compatibleFeatures, options.lazyRefcounts ? 1 : 0)
        set64(Field.autoclearFeatures, options.dataFileIsRaw ? 1 << 1 : 0)
        set32(96, UInt32(options.refcountBits.trailingZeroBitCount))
        set32(100, 112)
        fields[104] = options.compression == .zstd ? 1 : 0
        setExtension(Extension.featureNames, Self.featureNames)
        if let dataFile = options.dataFile { setExtension(Extension.dataFile, dataFile.rawBytes) }
    }

    /// The area of an image whose header has been checked; `bytes` are its first cluster, or as much of it as the file
    /// has.
    init(parsing bytes: [UInt8]) {
        let isVersion3 = bytes.bigEndian32(at: 4) == 3
        let length = isVersion3 ? Int(bytes.bigEndian32(at: 100)) : 72
        fields = Array(bytes[..<length])
        let nameOffset = Int(bytes.bigEndian64(at: Field.backingOffset)),
            nameLength = Int(bytes.bigEndian32(at: Field.backingLength))
        var rest = bytes[length..<(nameOffset != 0 ? nameOffset : bytes.count)]
        while rest.count >= 8, rest.bigEndian32(at: 0) != 0 {
            let count = Int(rest.bigEndian32(at: 4))
            guard count <= rest.count - 8 else { break }
            extensions.append((rest.bigEndian32(at: 0), Array(rest.dropFirst(8).prefix(count))))
            rest = rest.dropFirst(8 + (count + 7) & ~7)
        }
        if nameOffset != 0 { backingName = String(raw: bytes[nameOffset..<nameOffset + nameLength]) }
    }

    mutating func set32(_ offset: Int, _ value: UInt32) {
        for index in 0..<4 { fields[offset + index] = UInt8(truncatingIfNeeded: value >> UInt32(24 - 8 * index)) }
    }

    mutating func set64(_ offset: Int, _ value: UInt64) {
        for index in 0..<8 { fields[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(56 - 8 * index)) }
    }

    /// Replaces an extension, or adds it; nil removes it.
    mutating func setExtension(_ type: UInt32, _ contents: [UInt8]?) {
        let index = extensions.firstIndex { $0.type == type }
        switch (index, contents) {
        case (let index?, let contents?): extensions[index].contents = contents
        case (let index?, nil): extensions.remove(at: index)
        case (nil, let contents?): extensions.append((type, contents))
        case (nil, nil): break
        }
    }

    /// Adds an extension in front of the others, for one that must not be dropped or cut.
    mutating func insertExtension(_ type: UInt32, _ contents: [UInt8]) { extensions.insert((type, contents), at: 0) }

    /// The area's bytes, or nil when they do not fit into a cluster. The names of features, which serve messages only,
    /// go before that.
    func bytes(clusterSize: Int) -> [UInt8]? {
        if let bytes = assembled(clusterSize) { return bytes }
        var shorter = self
        shorter.setExtension(Extension.featureNames, nil)
        return shorter.assembled(clusterSize)
    }

    private func assembled(_ clusterSize: Int) -> [UInt8]? {
        var area = self
        var tail: [UInt8] = []
        for (type, contents) in extensions {
            tail += Self.bigEndian(type) + Self.bigEndian(UInt32(contents.count)) + contents
            tail += [UInt8](repeating: 0, count: (8 - contents.count % 8) % 8)
        }
        tail += [UInt8](repeating: 0, count: 8)
        let name = (backingName ?? "").rawBytes
        area.set64(Field.backingOffset, name.isEmpty ? 0 : UInt64(fields.count + tail.count))
        area.set32(Field.backingLength, UInt32(name.count))
        let bytes = area.fields + tail + name
        return bytes.count <= clusterSize ? bytes : nil
    }

    /// The names of the features of this format, for programs that do not know them: kind, bit, name.
    private static let featureNames: [UInt8] = {
        let names: [(kind: UInt8, bit: UInt8, name: String)] = [
            (0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"), (0, 3, "compression type"),
            (0, 4, "extended L2 entries"),
            (1, 0, "lazy refcounts"), (2, 0, "bitmaps"), (2, 1, "raw external data"),
        ]
        return names.flatMap { kind, bit, name in
            [kind, bit] + Array(name.utf8) + [UInt8](repeating: 0, count: 46 - name.utf8.count)
        }
    }()

    private static func bigEndian(_ value: UInt32) -> [UInt8] {
        (0..<4).map { UInt8(truncatingIfNeeded: value >> UInt32(24 - 8 * $0)) }
    }
}

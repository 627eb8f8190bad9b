// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The metadata of a disk image, without its backing files.
public struct ImageInformation: Sendable, Equatable {
    public var path: String
    public var format: ImageFormat
    /// Bytes of the disk.
    public var size: UInt64
    /// Bytes that the file takes on the host's disk; nil of a remote one.
    public var allocated: UInt64?
    public var isDirty = false
    /// The encryption of the data, if any.
    public var encryption: Encryption?
    public var backing: Backing?
    public var qcow2: QCOW2?
    /// Bytes of a cluster; nil in a format without them.
    public var clusterSize: UInt64?
    public var snapshots: [Snapshot] = []
    /// The two sizes of a VHD.
    public var vhd: VHDSizes?
    /// The properties of a remote disk.
    public var remote: Remote?

    /// Which file it is, and what it is to those that it names; nil of a remote disk.
    private var identity: ImageFile.Identity?
    private(set) var namer: NamingImage?

    /// The properties of an export; sizes are in bytes.
    public struct Remote: Sendable, Equatable {
        /// Bytes, which need not be whole sectors.
        public var size: UInt64
        public var isReadOnly: Bool
        /// Indicates the supported commands.
        public var flush: Bool
        public var trim: Bool
        public var writeZeroes: Bool
        public var blockStatus: Bool
        /// Bytes of a request: the minimum, the best (0: unknown), the maximum.
        public var minimumBlock: UInt64
        public var preferredBlock: UInt64
        public var maximumPayload: UInt64
    }

    /// A backing file as the image names it.
    public struct Backing: Sendable, Equatable {
        /// The name recorded in the image.
        public var name: String
        /// The resolved path; nil for a name that is not followed.
        public var path: String?
        /// The format recorded in the image.
        public var format: String?
    }

    /// The properties of a qcow2 image.
    public struct QCOW2: Sendable, Equatable {
        public var clusterSize: UInt64
        public var compatibility: QCOW2Compatibility
        public var compression: String
        public var lazyRefcounts: Bool
        public var refcountBits: Int
        public var isCorrupt: Bool
        public var extendedL2: Bool
        /// The file with the data as the image has it; the one that the user has named, and bytes that it takes on the
        /// host's disk.
        public var dataFile: String?
        public var dataFilePath: String?
        public var dataFileAllocated: UInt64?
        public var dataFileIsRaw: Bool
        /// The valid persistent bitmaps.
        public var bitmaps: [DiskBitmap] = []
    }

    /// The encryption of an image, with the names of dm-crypt and QEMU.
    public struct Encryption: Sendable, Equatable {
        /// `luks` or `aes`.
        public var format: String
        /// nil for `aes`, which has no header.
        public var luks: LUKS?

        /// A LUKS header, in the words of qemu-img.
        public struct LUKS: Sendable, Equatable {
            /// `aes-256` and so on.
            public var cipher: String
            public var mode: String
            public var vectors: String
            /// The hash function of the vectors, of ESSIV.
            public var vectorHash: String?
            public var hash: String
            public var uuid: String
            public var payloadOffset: UInt64
            public var keyIterations: UInt32
            public var slots: [Slot]
        }

        /// A key slot; unused ones have a place, too.
        public struct Slot: Sendable, Equatable {
            public var isActive: Bool
            public var iterations: UInt32
            /// Bytes from the start of the LUKS header.
            public var keyOffset: UInt64
            public var stripes: UInt32
        }
    }

    /// An internal snapshot.
    public struct Snapshot: Sendable, Equatable {
        public var identifier: String
        public var name: String
        /// Bytes of a machine's state.
        public var stateSize: UInt64
        /// Seconds since 1970, and nanoseconds.
        public var seconds: UInt32
        public var nanoseconds: UInt32
        /// Nanoseconds that the machine had run.
        public var clock: UInt64
        /// Instructions that it had executed, if they were counted.
        public var instructions: UInt64?
    }

    /// Reads the metadata of an image. Nothing is locked if `locking` is off, so that an image in use can be read.
    /// - Parameters:
    ///   - dataFile: the file with the data of a qcow2 image that keeps it outside.
    ///   - vhdSize: which of the two sizes of a VHD counts.
    public init(
        path: String, format: ImageFormat? = nil, locking: Bool = true, dataFile: String? = nil, vhdSize: VHDSize? = nil
    ) throws(DiskImageError) {
        var options = DiskImageOptions(locking: locking, dataFile: dataFile)
        options.vhdSize = vhdSize
        try self.init(path: path, FormatChoice(format, of: path), options)
        if let vhdSize, vhd == nil { throw .vhdSizeUnused(path: path, vhdSize) }
    }

    /// - Parameters:
    ///   - image: which names the path; nil where the user does.
    ///   - options: how it is locked, the data file, and what images may name.
    private init(
        path: String, _ choice: FormatChoice, of image: NamingImage? = nil, _ options: DiskImageOptions
    ) throws(DiskImageError) {
        var options = options
        options.readOnly = true
        options.usesAll = false
        let format = choice.format
        if NBDLocation.isAddress(path) {
            let image = try DiskImage(path: path, choice, of: image, options: options)
            self.path = path
            self.format = format
            size = image.size
            remote = image.remote.map { Remote($0.export) }
            return
        }
        let file = try ImageFile(path: path, of: image, writable: false, options)
        try choice.check(file)
        identity = file.identity
        namer = NamingImage(file)
        self.path = path
        self.format = format
        allocated = try file.allocated()
        guard format == .qcow2 else {
            // Whatever these say, opening them finds out; a raw image says nothing.
            let image = try DiskImage(path: path, choice, of: image, options: options)
            size = image.size
            clusterSize = image.clusterSize
            vhd = image.vhdSizes
            allocated = try image.allocated()
            return
        }
        let header = try QCOW2Header(file)
        // The header's check has found what follows within the first cluster.
        let area = QCOW2HeaderArea(
            parsing: try file.read("the header", count: Int(min(header.clusterSize, file.size)), at: 0))
        size = header.size
        clusterSize = header.clusterSize
        isDirty = header.isDirty
        qcow2 = QCOW2(header, area)
        if let data = try file.openStatedDataFile(header, options) {
            qcow2?.dataFilePath = data.path
            qcow2?.dataFileAllocated = try data.allocated()
        }
        encryption = try Encryption(header, file)
        if let name = header.backingName {
            backing = Backing(name: name, path: try? backingPath(name, of: path), format: header.backingFormat)
        }
        let table = TableFile(path: path, file: MetadataFile(calls: .host, number: file.descriptor.rawValue))
        snapshots = try QCOW2SnapshotTable(header, table, fileSize: file.size).entries.map(Snapshot.init)
        if let place = header.bitmaps {
            let directory = try QCOW2BitmapDirectory(place, header, table, fileSize: file.size)
            if let problem = directory.problem { throw .invalid(path: path, reason: problem) }
            qcow2?.bitmaps = directory.entries.map(\.bitmap)
        }
    }

    /// The image and, by the names that they have, all those below it.
    /// - Parameter namedFiles: where these may be.
    public static func chain(
        path: String, format: ImageFormat? = nil, locking: Bool = true, dataFile: String? = nil,
        vhdSize: VHDSize? = nil,
        namedFiles: NamedFiles = NamedFiles()
    ) throws(DiskImageError) -> [ImageInformation] {
        var options = DiskImageOptions(locking: locking, dataFile: dataFile)
        options.vhdSize = vhdSize
        var chain = [try ImageInformation(path: path, FormatChoice(format, of: path), options)]
        while let backing = chain[chain.count - 1].backing {
            let image = chain[chain.count - 1].path
            guard chain.count < DiskImage.maximumChainLength else { throw .backingTooDeep(path: image) }
            do throws(DiskImageError) {
                let path = try backingPath(backing.name, of: image)
                var options = DiskImageOptions(locking: locking, namedFiles: namedFiles)
                options.vhdSize = vhdSize
                let next = try ImageInformation(
                    path: path, FormatChoice(backing: backing.format, path), of: chain[chain.count - 1].namer, options)
                if let identity = next.identity, chain.contains(where: { $0.identity == identity }) {
                    throw .backingLoop(path: path)
                }
                chain.append(next)
            } catch {
                throw .backing(of: image, error)
            }
        }
        if let vhdSize, chain.allSatisfy({ $0.vhd == nil }) { throw .vhdSizeUnused(path: path, vhdSize) }
        return chain
    }
}

extension ImageInformation.Remote {
    fileprivate init(_ export: NBDExport) {
        size = export.size
        isReadOnly = export.isReadOnly
        flush = export.canFlush
        trim = export.canTrim
        writeZeroes = export.canZero
        blockStatus = export.hasStatus
        minimumBlock = export.minimumBlock
        preferredBlock = export.preferredBlock
        maximumPayload = export.maximumPayload
    }
}

extension ImageInformation.Encryption {
    fileprivate init?(_ header: QCOW2Header, _ file: borrowing ImageFile) throws(DiskImageError) {
        switch header.encryption {
        case nil: return nil
        case .aes: self.init(format: "aes")
        case .luks(let offset, let length):
            let header = try LUKSHeader(
                file.read("the LUKS header", count: LUKSHeader.size, at: offset), region: length, path: file.path)
            // Read above as `mode-vectors:hash`.
            let words = header.cipherMode.split(separator: "-", maxSplits: 1).map(String.init)
            let vectors = words.last?.split(separator: ":").map(String.init) ?? []
            self.init(
                format: "luks",
                luks: LUKS(
                    cipher: "aes-\(header.specification.keyBits)", mode: words.first ?? "",
                    vectors: vectors.first ?? "",
                    vectorHash: vectors.count > 1 ? vectors[1] : nil, hash: header.hash.rawValue, uuid: header.uuid,
                    payloadOffset: header.payloadOffset, keyIterations: header.digestIterations,
                    slots: header.slots.map {
                        Slot(isActive: $0.isActive, iterations: $0.iterations, keyOffset: $0.place, stripes: $0.stripes)
                    }))
        }
    }
}

extension ImageInformation.Snapshot {
    fileprivate init(_ entry: QCOW2SnapshotTable.Entry) {
        let snapshot = entry.snapshot
        let count = entry.extra.count >= 24 ? entry.extra.bigEndian64(at: 16) : .max
        self.init(
            identifier: snapshot.id, name: snapshot.name, stateSize: snapshot.stateSize, seconds: snapshot.seconds,
            nanoseconds: snapshot.nanoseconds,
            clock: snapshot.guestNanoseconds, instructions: count == .max ? nil : count)
    }
}

extension ImageInformation.QCOW2 {
    fileprivate init(_ header: QCOW2Header, _ area: QCOW2HeaderArea) {
        let isVersion3 = header.version >= 3
        clusterSize = header.clusterSize
        compatibility = isVersion3 ? .version3 : .version2
        compression = "\(header.compression)"
        lazyRefcounts = isVersion3 && area.fields.bigEndian64(at: QCOW2HeaderArea.Field.compatibleFeatures) & 1 != 0
        refcountBits = 1 << header.refcountOrder
        isCorrupt = header.isCorrupt
        extendedL2 = header.hasExtendedL2
        let name = area.extensions.first { $0.type == QCOW2HeaderArea.Extension.dataFile }?.contents
        dataFile = name.map { String(raw: $0) }
        dataFileIsRaw = dataFile != nil && header.autoclearFeatures & 2 != 0
    }
}

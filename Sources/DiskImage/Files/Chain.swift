// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A chain while it is opened: what is open already is closed again if the rest cannot be.
struct Chain: ~Copyable {
    private(set) var layers: SlabBuilder<DiskImage.Layer>
    private(set) var repair: CheckReport?
    private(set) var remote: NBDDisk?
    /// A remote disk that is connected to already, whether or not it will be one of them.
    private let connected: NBDDisk?
    var count: Int { layers.count }
    /// How many of the files stand on top of each other; others are extents of the last of them.
    private(set) var chainLength = 0
    /// The two sizes of the topmost one, if it is a VHD.
    var vhdSizes: VHDSizes?
    /// How many of them are encrypted.
    var encryptedCount = 0

    init(connected: NBDDisk? = nil) {
        self.connected = connected
        layers = SlabBuilder(capacity: DiskImage.maximumChainLength + VMDKDescriptor.maximumExtents)
    }

    /// The layers of the complete chain; this one is empty then.
    mutating func take() -> Slab<DiskImage.Layer> { layers.takeSlab() }

    /// Opens a file, and what is below it.
    /// - Parameter image: which names it; nil where the user does.
    mutating func open(_ path: String, _ choice: FormatChoice, of image: NamingImage?, _ options: DiskImageOptions) throws(DiskImageError) {
        guard count < DiskImage.maximumChainLength else { throw .backingTooDeep(path: path) }
        if NBDLocation.isAddress(path) {
            guard image == nil || options.namedFiles.allow(address: path) else { throw .addressNotStated(path: path) }
            return try connect(path, choice, options)
        }
        let format = choice.format
        if count == 0, let snapshot = options.snapshot {
            guard format == .qcow2 else { throw .snapshot(path: path, name: snapshot, reason: "\(format.name) images have no snapshots; only qcow2 images do") }
            guard options.readOnly else { throw .snapshot(path: path, name: snapshot, reason: "a snapshot is read-only: add ,ro") }
        }
        if count == 0, format != .qcow2, let name = options.dataFile { throw .dataFileUnused(path: path, name: name) }
        let writable = count == 0 && !options.readOnly
        if writable, !format.isWritable {
            throw .notWritable(path: path, reason: "\(format.name) images are read-only; convert it to qcow2 with swkvm image convert")
        }
        var file = try ImageFile(path: path, of: image, writable: writable, options)
        try choice.check(file)
        guard !isOpen(file.identity) else { throw .backingLoop(path: path) }
        chainLength += 1

        if format == .raw {
            let size = file.size
            guard size <= DiskImage.maximumSize else { throw .invalid(path: path, reason: "\(size) bytes long") }
            // An unfinished sector at the end counts, so that nothing of the file is out of reach.
            append(DiskImage.Layer(file: file, size: (size &+ 511) & ~511))
            return
        }
        guard format == .qcow2 else { return try openBlocks(file, format, options, writable: writable) }
        if writable { repair = try DiskImage.repairIfDirty(&file) }
        let qcow2 = try QCOW2Image(
            file, metadataCacheSize: options.metadataCacheSize, writable: writable, snapshot: count == 0 ? options.snapshot : nil,
            salvaging: options.salvages && !writable)
        let header = qcow2.header
        let dataFile = try openDataFile(header, file, options, writable: writable)
        let cipher = try openCipher(header, file, options, writable: writable)
        let isSealed = header.encryption != nil && !options.opensData
        let namer = NamingImage(file)
        append(DiskImage.Layer(file: file, qcow2: qcow2, size: header.size, dataFile: dataFile, cipher: cipher, isSealed: isSealed))
        guard options.followsBacking, let name = header.backingName else { return }
        guard options.allowsBacking else { throw .backingNotAllowed(path: path, name: name) }
        do throws(DiskImageError) {
            let backing = try backingPath(name, of: path)
            try open(backing, FormatChoice(backing: header.backingFormat, backing), of: namer, options)
        } catch {
            throw .backing(of: path, error)
        }
    }

    /// Indicates whether a file is one of those that are open already.
    private func isOpen(_ identity: ImageFile.Identity) -> Bool {
        for index in 0..<count {
            if layers[index].file.identity == identity { return true }
            switch layers[index].dataFile {
            case .some(let dataFile): if dataFile.identity == identity { return true }
            case nil: break
            }
        }
        return false
    }

    /// The file that an image keeps its data in, if it does: the one that the user names for the topmost, or the one it names, if that is allowed. That of
    /// a backing file is only read, so its name is followed as its own was.
    private func openDataFile(_ header: QCOW2Header, _ image: borrowing ImageFile, _ options: DiskImageOptions, writable: Bool) throws(DiskImageError) -> ImageFile? {
        let path = image.path
        let stated = count == 0 ? options.dataFile : nil
        guard header.hasDataFile else {
            if let stated { throw .dataFileUnused(path: path, name: stated) }
            return nil
        }
        guard stated != nil || options.allowsDataFile || count > 0 else { throw .dataFileNotAllowed(path: path, name: header.dataFileName ?? "") }
        do throws(DiskImageError) {
            let place: String
            if let stated { place = stated } else if let name = header.dataFileName { place = try backingPath(name, of: path) } else {
                throw .invalid(path: path, reason: "it has an external data file but does not name it")
            }
            let file = try image.openDataFile(place, isStated: stated != nil, writable: writable, options)
            guard !isOpen(file.identity) else { throw .backingLoop(path: place) }
            return file
        } catch {
            throw .dataFile(of: path, error)
        }
    }

    /// Connects to a remote disk, whose contents are the disk's.
    private mutating func connect(_ path: String, _ choice: FormatChoice, _ options: DiskImageOptions) throws(DiskImageError) {
        if count == 0, let name = options.dataFile { throw .dataFileUnused(path: path, name: name) }
        let writable = count == 0 && !options.readOnly
        guard choice.format == .raw, count > 0 || options.snapshot == nil else { throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw) }
        let disk: NBDDisk
        if let connected, connected.path.utf8.elementsEqual(path.utf8) { disk = connected } else {
            disk = try NBDDisk(path: path, reconnect: options.reconnect, report: options.report, isInterrupted: options.isInterrupted)
            try choice.check(disk)
        }
        if disk.export.isReadOnly, writable { throw .notWritable(path: path, reason: "the server exports it read-only") }
        if !disk.export.canFlush, writable {
            options.report?("disk \(path): the server does not support flush: swkvm cannot make written data durable")
        }
        append(DiskImage.Layer(file: try ImageFile(disk), size: (disk.export.size &+ 511) & ~511))
        chainLength += 1
        remote = disk
    }

    mutating func setPieces(_ pieces: [DiskPiece], of layer: Int) { layers[layer].pieces = pieces }

    mutating func append(_ layer: consuming DiskImage.Layer) {
        // Who opens a file has checked that there is room.
        layers.append(layer)
    }
}

extension ImageFile {
    /// Opens the file with the data of this image.
    /// - Parameter isStated: whether the user names it, and not the image.
    borrowing func openDataFile(_ place: String, isStated: Bool, writable: Bool, _ options: DiskImageOptions) throws(DiskImageError) -> ImageFile {
        let file = try ImageFile(path: place, of: isStated ? nil : NamingImage(self), writable: writable, options)
        // Data in an image's own tables would be the end of it.
        guard file.identity != identity else { throw .backingLoop(path: place) }
        return file
    }

    /// The same for who looks at this image alone: the file that the user names for it, or nil.
    borrowing func openStatedDataFile(_ header: QCOW2Header, _ options: DiskImageOptions) throws(DiskImageError) -> ImageFile? {
        guard let place = options.dataFile else { return nil }
        guard header.hasDataFile else { throw .dataFileUnused(path: path, name: place) }
        do throws(DiskImageError) { return try openDataFile(place, isStated: true, writable: false, options) } catch { throw .dataFile(of: path, error) }
    }
}

/// The path for the name of a backing file: the address of a remote disk, or relative to the image's directory; of QEMU's pseudo-protocols `file:` alone.
func backingPath(_ name: String, of image: String) throws(DiskImageError) -> String {
    if NBDLocation.isAddress(name) { return name }
    var name = name[...]
    let first = name.utf8.prefix { $0 != UInt8(ascii: "/") }
    if let colon = first.firstIndex(of: UInt8(ascii: ":")) {
        let rest = name[name.utf8.index(after: colon)...]
        // QEMU takes what follows `file:` relative to wherever it was started, which means nothing to us.
        guard first[..<colon].elementsEqual("file".utf8), rest.utf8.first == UInt8(ascii: "/") else { throw .backingName(path: image, name: String(name)) }
        name = rest
    }
    return name.utf8.first == UInt8(ascii: "/") ? String(name) : String(name).beside(image)
}

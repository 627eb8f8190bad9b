// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A chain while it is opened: what is open already is closed again if the rest cannot be.
struct Chain: ~Copyable {
    private(set) var layers: SlabBuilder<DiskImage.Layer>
    /// The repairs of the topmost one.
    var repair: CheckReport?
    var remote: NBDDisk?
    /// A remote disk that is connected to already, whether or not it will be one of them.
    let connected: NBDDisk?
    var count: Int { layers.count }
    /// How many of the files stand on top of each other; others are extents of the last of them.
    var chainLength = 0
    /// The two sizes of the topmost one, if it is a VHD.
    var vhdSizes: VHDSizes?
    /// Indicates whether one of them is a VHD.
    var hasVHD = false
    /// How many of them are encrypted.
    var encryptedCount = 0

    /// Bytes of a cluster or block of the topmost image, if it has any.
    var clusterSize: UInt64? {
        for index in 0..<count { if let size = layers[index].layout.clusterSize { return size } }
        return nil
    }

    init(connected: NBDDisk? = nil) {
        self.connected = connected
        layers = SlabBuilder(capacity: DiskImage.maximumChainLength + VMDKDescriptor.maximumExtents)
    }

    /// The layers of the complete chain; this one is empty then.
    mutating func take() -> Slab<DiskImage.Layer> { layers.takeSlab() }

    /// Opens a file, and what is below it.
    /// - Parameter image: which names it; nil where the user does.
    mutating func open(
        _ path: String, _ choice: FormatChoice, of image: NamingImage?, _ options: DiskImageOptions
    ) throws(DiskImageError) {
        guard count < DiskImage.maximumChainLength else { throw .backingTooDeep(path: path) }
        if NBDLocation.isAddress(path) {
            guard image == nil || options.namedFiles.allow(address: path) else { throw .addressNotStated(path: path) }
            return try connect(path, choice, options)
        }
        let format = choice.format
        if count == 0, let snapshot = options.snapshot {
            guard format == .qcow2 else {
                throw .snapshot(
                    path: path, name: snapshot, reason: "\(format.name) images have no snapshots; only qcow2 images do")
            }
            guard options.readOnly else {
                throw .snapshot(path: path, name: snapshot, reason: "a snapshot is read-only: add ,ro")
            }
        }
        if count == 0, format != .qcow2, let name = options.dataFile { throw .dataFileUnused(path: path, name: name) }
        let writable = count == 0 && !options.readOnly
        if writable, !format.isWritable {
            throw .notWritable(
                path: path, reason: "\(format.name) images are read-only; convert it to qcow2 with swkvm image convert")
        }
        let file = try ImageFile(path: path, of: image, writable: writable, options)
        try choice.check(file)
        guard !isOpen(file.identity) else { throw .backingLoop(path: path) }
        chainLength += 1
        switch format {
        case .raw: try openRaw(file)
        case .qcow2: try openQCOW2(file, options, writable: writable)
        case .vdi, .vhd, .vhdx, .vmdk: try openBlocks(file, format, options, writable: writable)
        }
    }

    /// Makes a file that is open already the only layer.
    mutating func append(contents: consuming ImageFile) throws(DiskImageError) {
        chainLength += 1
        try openRaw(contents)
    }

    private mutating func openRaw(_ file: consuming ImageFile) throws(DiskImageError) {
        let size = file.size
        guard size <= DiskImage.maximumSize else { throw .invalid(path: file.path, reason: "\(size) bytes long") }
        // An unfinished sector at the end counts, so that nothing of the file is out of reach.
        append(DiskImage.Layer(file: file, size: (size &+ 511) & ~511))
    }

    /// Indicates whether a file is one of those that are open already.
    func isOpen(_ identity: ImageFile.Identity) -> Bool {
        for index in 0..<count {
            if layers[index].file.identity == identity { return true }
            switch layers[index].dataFile {
            case .some(let dataFile): if dataFile.identity == identity { return true }
            case nil: break
            }
        }
        return false
    }

    mutating func setLayout(_ layout: consuming Layout, of layer: Int) { layers[layer].layout = layout }

    mutating func append(_ layer: consuming DiskImage.Layer) {
        // The code that opens a file has checked that there is room.
        layers.append(layer)
    }
}

/// The path for the name of a backing file: the address of a remote disk, or relative to the image's directory; of
/// QEMU's pseudo-protocols `file:` alone.
func backingPath(_ name: String, of image: String) throws(DiskImageError) -> String {
    if NBDLocation.isAddress(name) { return name }
    var name = name[...]
    let first = name.utf8.prefix { $0 != UInt8(ascii: "/") }
    if let colon = first.firstIndex(of: UInt8(ascii: ":")) {
        let rest = name[name.utf8.index(after: colon)...]
        // QEMU takes what follows `file:` relative to wherever it was started, which means nothing to us.
        guard first[..<colon].elementsEqual("file".utf8), rest.utf8.first == UInt8(ascii: "/") else {
            throw .backingName(path: image, name: String(name))
        }
        name = rest
    }
    return name.utf8.first == UInt8(ascii: "/") ? String(name) : String(name).beside(image)
}

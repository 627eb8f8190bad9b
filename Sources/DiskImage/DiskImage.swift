// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
package import Linux

/// An open disk image: a file, or a chain of files each of which holds what differs from the next.
///
/// The image knows how its contents are stored and does no I/O itself once it is open; a ``DiskEngine`` does.
///
/// It has one owner, which passes it on as a whole and uses it in one thread at a time: hence `Sendable`. Several
/// engines have it by the lock of a ``SharedImage``. Its files are closed, and their locks released, with the last
/// reference.
public final class DiskImage: @unchecked Sendable {
    /// The most images on top of each other.
    public static let maximumChainLength = 64
    /// The most bytes of a disk.
    public static let maximumSize: UInt64 = 1 << 62

    /// The one layer of each file, never none: those of the chain, topmost first, then the extents of a VMDK image.
    let layers: Slab<Layer>

    /// The path that the user gave.
    public let path: String
    /// The format of the topmost file.
    public let format: ImageFormat
    /// Bytes of the disk, a multiple of 512. A size that is none is rounded up: the rest of the last sector reads as
    /// zeroes and, in a raw file, can be written.
    public var size: UInt64 { (layers[0].size &+ 511) & ~511 }
    public let isReadOnly: Bool
    /// The unit of the format's own making, or nil: a cluster of qcow2, a block of VDI, a grain of VMDK, ….
    public let clusterSize: UInt64?
    /// The repairs made when the image was opened for writing after an unclean shutdown.
    public let repair: CheckReport?

    /// The two sizes that the footer of a VHD has, and which was taken; nil of another format.
    public let vhdSizes: VHDSizes?
    /// Indicates whether one of the chain is a VHD.
    let hasVHD: Bool
    /// Hears in a sentence what has become of the image; on any thread.
    let report: (@Sendable (String) -> Void)?

    /// Where the host refused an access to the metadata.
    let failures = MetadataFailures()

    /// As it was opened, for what is read again when the metadata was replaced.
    let metadataCacheSize: Int

    /// How many of them stand on top of each other.
    let chainLength: Int
    /// The remote disk that is the last of the chain, or all of it. It does what is otherwise done with the descriptor
    /// of its file.
    let remote: NBDDisk?
    /// Indicates whether there is nothing on top of it.
    var isRemote: Bool { remote != nil && chainLength == 1 }

    /// The remote disk that a file, by its number, stands for.
    func remote(ofFile file: Int) -> NBDDisk? { file == chainLength - 1 ? remote : nil }

    /// A file of the chain with its format's metadata.
    struct Layer: ~Copyable {
        var file: ImageFile
        var layout = Layout.raw
        /// Bytes of the disk, or of the part, that it holds.
        var size: UInt64
        /// The file with the data, where that is not the one with the metadata.
        var dataFile: ImageFile?
        /// What encrypts the data, when it is encrypted and there is a key.
        var cipher: SectorCipher?
        /// The data is encrypted and no key was given.
        var isSealed = false
    }

    /// Indicates whether a name of a disk is the address of a remote one (`nbd://…`), and no path.
    public static func isRemote(_ name: String) -> Bool { NBDLocation.isAddress(name) }

    /// Indicates whether such an address is one of a connection over TLS.
    public static func isEncryptedRemote(_ name: String) -> Bool { isRemote(name) && name.hasPrefix("nbds") }

    /// What is needed to connect with such an address again: a TCP port, and files.
    public static func server(ofRemote name: String) -> (port: UInt16?, files: [String]) {
        guard isRemote(name), let location = try? NBDLocation(name) else { return (nil, []) }
        let files = [location.security?.certificates, location.security?.keyFile].compactMap { $0 }
        guard case .tcp(_, let port) = location.server else { return (nil, files) }
        return (port, files)
    }

    /// Files and directories that a connection over TLS may read: certificates, and how names of hosts are resolved.
    public static var filesOfTLS: [String] {
        let home = environmentVariable("HOME")
        return ["/etc", "/run/systemd/resolve", "/run/resolvconf", "/usr/share", "/usr/local/share", "/usr/lib/ssl"]
            + (home.map { ["\($0)/.pki", "\($0)/.config/pki"] } ?? [])
    }

    /// Opens an image with its backing files and locks them all.
    ///
    /// The format is the stated one or the one of the file's extension; where it is not stated, contents that begin as
    /// another format does are refused. Backing files are opened read-only, with the format that the image above states
    /// or else, again, that of their extension, or raw. Their names are relative to the directory of the image above,
    /// and lead to where ``DiskImageOptions/namedFiles`` allows.
    ///
    /// A name that is the address of a remote disk (`nbd://…`) is connected to: the path, or that of a backing file.
    public convenience init(path: String, options: DiskImageOptions = DiskImageOptions()) throws(DiskImageError) {
        try self.init(path: path, options: options, remote: nil)
    }

    /// A remote disk over a socket that is connected to its server: there is no other when that one is lost.
    package convenience init(
        path: String, options: DiskImageOptions, socket: consuming FileDescriptor
    ) throws(DiskImageError) {
        try self.init(path: path, options: options, remote: NBDDisk(path: path, socket: socket))
    }

    convenience init(path: String, options: DiskImageOptions, remote: NBDDisk?) throws(DiskImageError) {
        try self.init(
            path: path, FormatChoice(options.format, of: path, option: options.formatOption), options: options,
            remote: remote)
    }

    /// - Parameters:
    ///   - choice: the format; that of the options does not matter.
    ///   - image: which names the path; nil where the user does.
    ///   - remote: a remote disk that is connected to already, for what has its name.
    convenience init(
        path: String, _ choice: FormatChoice, of image: NamingImage? = nil, options: DiskImageOptions,
        remote: NBDDisk? = nil
    ) throws(DiskImageError) {
        var chain = Chain(connected: remote)
        try chain.open(path, choice, of: image, options)
        try self.init(path: path, choice.format, options, &chain)
    }

    /// A read-only disk with the contents of a file that has no path, such as a memfd: a raw image.
    /// - Parameter name: what messages call it.
    package convenience init(name: String, contents: consuming FileDescriptor) throws(DiskImageError) {
        var chain = Chain()
        try chain.append(contents: ImageFile(name: name, contents))
        try self.init(path: name, .raw, DiskImageOptions(readOnly: true), &chain)
    }

    private init(
        path: String, _ format: ImageFormat, _ options: DiskImageOptions, _ chain: inout Chain
    ) throws(DiskImageError) {
        if options.followsBacking, options.usesAll, options.opensData, chain.encryptedCount < options.keys.count {
            throw .keyUnused(path: path, encrypted: chain.encryptedCount, keys: options.keys.count)
        }

        if options.followsBacking, options.usesAll, let size = options.vhdSize, !chain.hasVHD {
            throw .vhdSizeUnused(path: path, size)
        }

        self.path = path
        self.format = format
        isReadOnly = options.readOnly
        metadataCacheSize = options.metadataCacheSize
        report = options.report
        repair = chain.repair
        vhdSizes = chain.vhdSizes
        hasVHD = chain.hasVHD
        clusterSize = chain.clusterSize
        chainLength = chain.chainLength
        self.remote = chain.remote
        self.remote?.isInterrupted = nil
        layers = chain.take()
    }

    /// The most engines at a time: a remote disk, whatever stands on it, has one connection, which one engine serves.
    public var maximumEngines: Int { remote == nil ? SharedImage.maximumEngines : 1 }

    /// The files that make up the image, topmost first.
    public var files: [String] {
        layers.indices.flatMap { index in
            switch layers[index].dataFile {
            case .some(let dataFile): [layers[index].file.path, dataFile.path]
            case nil: [layers[index].file.path]
            }
        }
    }

    /// How many files have a number: those of the chain, and extents.
    var fileCount: Int { layers.count }

    /// The files with the disk's data, by their number.
    var dataFiles: [String] {
        layers.indices.map { index in
            switch layers[index].dataFile {
            case .some(let dataFile): dataFile.path
            case nil: layers[index].file.path
            }
        }
    }

    /// Bytes that the files take on the host's disk.
    func allocated() throws(DiskImageError) -> UInt64 {
        var sum: UInt64 = 0
        for index in layers.indices { sum &+= try layers[index].file.allocated() }
        return sum
    }

    /// Which files those are, whatever their names, in the order of ``files``.
    var identities: [ImageFile.Identity] {
        layers.indices.flatMap { index in
            switch layers[index].dataFile {
            case .some(let dataFile): [layers[index].file.identity, dataFile.identity]
            case nil: [layers[index].file.identity]
            }
        }
    }

    /// Those of ``identities`` that the disk writes to: the topmost file with its data file, or with its extents.
    var writtenIdentities: [ImageFile.Identity] {
        if isReadOnly { return [] }
        return chainLength == 1 ? identities : Array(identities.prefix(layers[0].dataFile == nil ? 1 : 2))
    }

    /// The path of a file by its number, of that with the data where an image keeps them outside.
    func path(ofFile index: Int) -> String {
        guard layers.indices.contains(index) else { return path }
        switch layers[index].dataFile {
        case .some(let dataFile): return dataFile.path
        case nil: return layers[index].file.path
        }
    }

    /// The path of a file with metadata by its number.
    private func path(ofMetadata index: Int) -> String {
        guard layers.indices.contains(index) else { return path }
        return layers[index].file.path
    }

    func path(of access: FailedAccess) -> String {
        access.isMetadata ? path(ofMetadata: access.file) : path(ofFile: access.file)
    }

    /// The refused access for which metadata could not be read or changed, and gave this errno value; nil when it is
    /// damaged.
    func refusedAccess(of error: Int32) -> FailedAccess? {
        error == EIO && damage != nil ? nil : failures.access(of: error)
    }

    /// The counters of the caches of each file that has metadata, by the file's number.
    var cacheStatistics: [(file: Int, statistics: FileStatistics)] {
        layers.indices.compactMap { index in layers[index].layout.statistics.map { (index, $0) } }
    }

    /// The topmost file, for what it names.
    var namer: NamingImage { NamingImage(layers[0].file) }

    /// The first damage found while the image was used.
    public var damage: DiskImageError? {
        for index in layers.indices {
            if let damage = layers[index].layout.damage {
                let whose = index < chainLength ? "disk" : "extent"
                let place = damage.diskOffset.map { " (at byte \($0) of the \(whose))" } ?? ""
                return .invalid(path: layers[index].file.path, reason: "\(damage)\(place)")
            }
        }
        return nil
    }

    // MARK: - Reading

    /// How far the answer for a range has been sought. The search continues where it was when something had to be read
    /// first: each read brings it a step further, so it ends however small the caches are and however many requests use
    /// them.
    struct Search {
        var layer = 0
        /// The file that the answer is about: that of the layer, or one of its extents.
        var file = 0
        /// The L2 entry of a compressed cluster, or the place of a compressed grain, when it is known to begin with
        /// one; else 0.
        var compressedEntry: UInt64 = 0
        /// Bytes from the start that every layer above leaves open.
        var limit: UInt64
    }

    /// How the range of `search.limit` bytes from `offset` begins. ``RangeLookup/data(offset:length:)`` and loads are
    /// about the file `search.file`. The range is inside the disk and not empty.
    func locate(_ offset: UInt64, _ search: inout Search) -> RangeLookup {
        while search.layer < chainLength {
            let size = layers[search.layer].size
            // A backing file may be shorter than what stands on it; the end of a last sector belongs to the disk.
            let end = search.layer == 0 ? self.size : size
            guard offset < end else { return .zero(length: search.limit) }
            search.limit = min(search.limit, end - offset)
            search.file = search.layer
            switch offset >= size ? .zero(length: search.limit) : locateHere(offset, &search) {
            case .unallocated(let length):
                search.limit = length
                search.layer += 1
            case .load(var load):
                load.layer = search.file
                return .load(load)
            case let extent:
                return extent
            }
        }
        return .zero(length: search.limit)
    }

    /// The lookup of a range in the layer of a search, or in the file that has the piece.
    @inline(__always) private func locateHere(_ offset: UInt64, _ search: inout Search) -> RangeLookup {
        guard layers[search.layer].layout.hasExtents else {
            return layers[search.layer].layout.locate(offset, search.limit, &search.compressedEntry)
        }
        guard let piece = layers[search.layer].layout.piece(at: offset) else { return .zero(length: search.limit) }
        search.limit = min(search.limit, piece.end - offset)
        guard let file = piece.file else { return .zero(length: search.limit) }
        search.file = file
        return layers[file].layout.locate(piece.place(of: offset), search.limit, &search.compressedEntry)
    }

    /// Decompresses what was read, before it is finished. It needs no lock of the image, only one with other clusters
    /// that are decompressed: until the load is finished no other operation touches its slot.
    func decompress(_ load: inout MetadataLoad, bytes: Int) {
        guard load.kind == .compressed else { return }
        load.isIntact = layers[load.layer].layout.decompress(load, bytes)
    }

    /// A load has ended; the answer is what became of it, an errno value: what was read may be too short or broken.
    @discardableResult
    func complete(_ load: MetadataLoad, bytes: Int, error: Int32) -> Int32 {
        layers[load.layer].layout.complete(load, bytes: bytes, error: error)
    }

    func unpin(_ load: MetadataLoad) { layers[load.layer].layout.unpin(load) }

    // MARK: - Files and sizes

    /// Bytes that the disk has by its format, which need not be whole sectors.
    var exactSize: UInt64 { format == .raw ? layers[0].file.size : layers[0].size }

    /// Bytes of the disk of the topmost backing file; 0 without one.
    var backingSize: UInt64 { chainLength > 1 ? layers[1].size : 0 }

    var isRegularFile: Bool { layers[0].file.isRegular }

    /// Takes the size that the file of a raw image has now.
    func measure() throws(DiskImageError) {
        try layers[0].file.measure()
        layers[0].size = (layers[0].file.size &+ 511) & ~511
    }

    /// The descriptor for a transfer of the guest's data with a layer.
    func dataDescriptor(_ layer: Int, for segments: IOSegments, offset: UInt64) -> Int32 {
        switch layers[layer].dataFile {
        case .some(let file): file.number(for: segments, offset: offset)
        case nil: layers[layer].file.number(for: segments, offset: offset)
        }
    }

    /// The same for one piece of memory.
    func dataDescriptor(_ layer: Int, for memory: IOMemory, offset: UInt64) -> Int32 {
        switch layers[layer].dataFile {
        case .some(let file): file.number(for: memory, offset: offset)
        case nil: layers[layer].file.number(for: memory, offset: offset)
        }
    }

    /// The descriptor for a transfer with the file of a layer.
    func descriptor(_ layer: Int, for segments: IOSegments, offset: UInt64) -> Int32 {
        layers[layer].file.number(for: segments, offset: offset)
    }

    /// Indicates whether to try the page cache for a layer's data before a read bypasses it.
    func asksCacheFirst(_ layer: Int) -> Bool {
        switch layers[layer].dataFile {
        case .some(let file): file.asksCacheFirst
        case nil: layers[layer].file.asksCacheFirst
        }
    }

    /// The descriptor for what is done to the guest's data and is no transfer.
    func dataDescriptor(_ layer: Int) -> Int32 {
        switch layers[layer].dataFile {
        case .some(let file): file.descriptor.rawValue
        case nil: layers[layer].file.descriptor.rawValue
        }
    }

    /// Indicates whether the topmost image's data is in a file of its own.
    var hasDataFile: Bool {
        switch layers[0].dataFile {
        case .some: true
        case nil: false
        }
    }

    /// The descriptor for what is no transfer.
    func descriptor(_ layer: Int) -> Int32 {
        layers[layer].file.descriptor.rawValue
    }

    /// Bytes of a cluster of a file; 1 in one without clusters.
    func clusterSize(ofLayer layer: Int) -> UInt64 {
        layers[layer].layout.clusterSize ?? 1
    }

    /// Bytes of the disk that a layer holds.
    func size(ofLayer layer: Int) -> UInt64 { layers[layer].size }

    /// Indicates whether a read that met the end of the file at `offset` met it where it was when the file was opened.
    func isEnd(_ offset: UInt64, _ layer: Int) -> Bool {
        switch layers[layer].dataFile {
        case .some(let file): offset >= file.size
        case nil: offset >= layers[layer].file.size
        }
    }
}

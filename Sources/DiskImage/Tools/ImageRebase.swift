internal import CLinux
internal import Glibc
internal import Linux

/// Gives an image another backing file, or none.
public struct ImageRebase: Sendable {
    public var path: String
    public var options = DiskImageOptions()
    /// The new backing file; nil for none.
    public var backing: BackingReference?
    /// The keys of the new backing file and those below it, as ``DiskImageOptions/keys``; those of the old one are in ``options``.
    public var backingKeys: [DiskKey] = []
    /// Whether only the name is changed: the caller says that the new one shows what the old one did.
    public var isUnsafe = false

    private static let bufferSize = 1 << 20

    public init(path: String) { self.path = path }

    /// Writes what the new backing file shows otherwise into the image, makes that durable, and then changes the name, so that the disk is the same
    /// at any time, whenever it stops.
    /// - Parameter progress: called now and then; false gives up, with the old backing file.
    public func run(_ progress: (ImageProgress) -> Bool = { _ in true }) throws(DiskImageError) {
        var options = options
        options.readOnly = false
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw) }
        guard try ImageFormat(options.format, orExtensionOf: path) == .qcow2 else {
            throw .notApplicable(path: path, reason: "only qcow2 images have backing files")
        }
        // By itself: what is below is read beside it, and may be gone if only the name is changed.
        options.followsBacking = false
        options.opensData = !isUnsafe
        var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 1, segments: 1)
        // From now on nobody else changes it.
        let old = try ImageInformation(path: path, format: .qcow2, locking: false).backing
        guard isUnsafe || engine.image.header?.snapshotCount == 0 else {
            throw .notWritable(path: path, reason: "its snapshots stand on the backing file, too, and would show something else afterwards; --unsafe changes the name only")
        }
        // What cannot be is known before anything is written.
        _ = try newHeader(engine)
        if !isUnsafe { try copyDifferences(&engine, old, progress) }
        try changeName(&engine)
    }

    private func copyDifferences(_ engine: inout DiskEngine, _ old: ImageInformation.Backing?, _ progress: (ImageProgress) -> Bool) throws(DiskImageError) {
        let size = engine.image.size
        var before = try old.map { backing throws(DiskImageError) in
            try chain(backingPath(backing.name, of: path), backing.format.flatMap(ImageFormat.init(rawValue:)), options.keys(below: engine.image))
        }
        // Of one remote disk below both there is one connection, as many a server has one client at a time.
        let remote = before?.image.remote
        var after = try backing.map { backing throws(DiskImageError) in try chain(backingPath(backing.name, of: path), backing.format, backingKeys, remote) }
        if let other = after?.image.identities.firstIndex(where: { $0 == engine.image.identities[0] }) {
            throw .backing(of: path, .backingLoop(path: after?.image.files[other] ?? path))
        }
        let buffers = try memory(2 * Self.bufferSize, path)
        // The halves of the mapping.
        let left = unsafe UnsafeMutableRawBufferPointer(start: buffers.start, count: Self.bufferSize)
        let right = unsafe UnsafeMutableRawBufferPointer(start: buffers.start + Self.bufferSize, count: Self.bufferSize)
        let unit = engine.image.withMetadata { $0.header.clusterSize >> ($0.header.hasExtendedL2 ? 5 : 0) } ?? 65536
        // What the image shows as zeroes because it has nothing there would show the new one.
        if backing != nil { engine.image.withMetadata { $0.hasBacking = true } }
        var position: UInt64 = 0
        while position < size {
            if !progress(ImageProgress(done: position, total: size)) { throw .interruptedUnchanged(path: path) }
            let (isOwn, length) = try engine.ownership(at: position, limit: min(UInt64(Self.bufferSize), size - position))
            if !isOwn {
                let a = unsafe UnsafeMutableRawBufferPointer(rebasing: left[..<Int(length)])
                let b = unsafe UnsafeMutableRawBufferPointer(rebasing: right[..<Int(length)])
                try unsafe show(&before, a, position)
                try unsafe show(&after, b, position)
                try unsafe copy(a, b, position, unit, &engine)
            }
            position += length
        }
        try engine.perform(.flush)
        _ = progress(ImageProgress(done: size, total: size))
    }

    /// Writes those clusters of `old` that `new` has otherwise.
    private func copy(
        _ old: UnsafeMutableRawBufferPointer, _ new: UnsafeMutableRawBufferPointer, _ position: UInt64, _ unit: UInt64, _ engine: inout DiskEngine
    ) throws(DiskImageError) {
        guard let a = old.baseAddress, let b = new.baseAddress else { return }
        var start = 0
        while start < old.count {
            // Up to the end of a cluster of the disk.
            let end = min(old.count, start + Int(unit - (position + UInt64(start)) % unit))
            // Both buffers have `old.count` bytes.
            if unsafe memcmp(a + start, b + start, end - start) != 0 {
                if unsafe clinux_zero_prefix(a + start, end - start) == end - start {
                    try engine.perform(.writeZeroesUnmapping, at: position + UInt64(start), length: UInt64(end - start))
                } else {
                    try unsafe engine.perform(.write, at: position + UInt64(start), memory: UnsafeMutableRawBufferPointer(start: a + start, count: end - start))
                }
            }
            start = end
        }
    }

    /// What an image shows at a place; zeroes beyond its end, and without one.
    private func show(_ reader: inout ImageReader?, _ buffer: UnsafeMutableRawBufferPointer, _ position: UInt64) throws(DiskImageError) {
        let size = reader?.image.size ?? 0
        let count = Int(min(UInt64(buffer.count), size > position ? size - position : 0))
        // Parts of the caller's buffer.
        try unsafe reader?.read(UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]), at: position)
        unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[count...]).initializeMemory(as: UInt8.self, repeating: 0)
    }

    private func chain(_ path: String, _ format: ImageFormat?, _ keys: [DiskKey], _ remote: NBDDisk? = nil) throws(DiskImageError) -> ImageReader {
        var options = options
        options.readOnly = true
        options.format = format
        options.keys = keys
        options.usesAllKeys = false
        options.dataFile = nil
        options.allowsDataFile = true
        do throws(DiskImageError) { return ImageReader(try DiskImage(path: path, options: options, remote: remote)) } catch {
            // Who has it open is this very rebase.
            if case .locked(let file, _) = error.cause, let own = ImageFile.Identity(ofPath: self.path), ImageFile.Identity(ofPath: file) == own {
                throw .backing(of: self.path, .backingLoop(path: file))
            }
            throw .backing(of: self.path, error)
        }
    }

    /// The header with the new name.
    private func newHeader(_ engine: borrowing DiskEngine) throws(DiskImageError) -> [UInt8] {
        guard let header = engine.image.header else { throw .notApplicable(path: path, reason: "only qcow2 images have backing files") }
        if let backing {
            guard (1...QCOW2Header.maximumBackingName).contains(backing.name.utf8.count) else {
                throw .notApplicable(path: path, reason: "a backing file's name has 1 to \(QCOW2Header.maximumBackingName) bytes, this one \(backing.name.utf8.count)")
            }
            guard header.autoclearFeatures & header.keptAutoclearFeatures == 0 else {
                throw .notApplicable(path: path, reason: "its raw data file holds the whole disk, so there is nothing for a backing file to show")
            }
        }
        var area = QCOW2HeaderArea(parsing: try engine.tableFile.read(Int(header.clusterSize), at: 0))
        area.backingName = backing?.name
        area.setExtension(QCOW2HeaderArea.Extension.backingFormat, backing.map { Array($0.format.rawValue.utf8) })
        // What others keep true of the file they do not of this one. The disk, which bitmaps are about, is the same.
        if header.version >= 3 {
            area.set64(QCOW2HeaderArea.Field.autoclearFeatures, header.autoclearFeatures & (QCOW2Header.Autoclear.bitmaps | header.keptAutoclearFeatures))
        }
        guard let bytes = area.bytes(clusterSize: Int(header.clusterSize)) else {
            throw .notApplicable(path: path, reason: "the backing file's name does not fit into its header, which has \(header.clusterSize) bytes")
        }
        return bytes
    }

    private func changeName(_ engine: inout DiskEngine) throws(DiskImageError) {
        let file = engine.tableFile
        try file.write(newHeader(engine), at: 0)
        try file.synchronize()
    }
}

extension DiskEngine {
    /// Whether the topmost image has the beginning of a range of its own, and how far that goes. Nothing is in flight.
    mutating func ownership(at offset: UInt64, limit: UInt64) throws(DiskImageError) -> (isOwn: Bool, length: UInt64) {
        var search = DiskImage.Search(limit: limit)
        while true {
            switch image.locate(offset, &search) {
            case .data(_, let length), .zero(let length), .memory(_, let length):
                return (search.layer == 0, length)
            case .load(let load) where load.kind == .compressedCluster:
                // It is known to be there, which is enough: nothing is read.
                image.finish(load, bytes: 0, error: ECANCELED)
                image.settle(load)
                let cluster = image.clusterSize(ofLayer: load.layer)
                return (load.layer == 0, min(search.limit, cluster - offset % cluster))
            case .load(let load):
                var code: Int32 = 0
                // The load's buffer has `length` bytes.
                do throws(MetadataError) { try unsafe metadataFile.read(load.buffer, load.length, at: load.offset) } catch {
                    if case .failed(let error) = error { code = error }
                }
                image.finish(load, bytes: code == 0 ? load.length : 0, error: code)
                image.settle(load)
            case .commit:
                try perform(.flush)
            case .unallocated, .wait:
                throw .request(path: image.path, SystemCallError("read", errno: EIO))
            case .failed(let error):
                throw image.damage ?? .request(path: image.path, SystemCallError("read", errno: error))
            }
        }
    }
}

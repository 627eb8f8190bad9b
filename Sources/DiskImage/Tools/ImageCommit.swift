internal import Glibc
internal import Linux

/// Puts what an image has of its own into its backing file.
public struct ImageCommit: Sendable {
    public var path: String
    public var options = DiskImageOptions()
    /// Whether the image keeps what is now in its backing file too.
    public var keepsContents = false

    private static let bufferSize = 1 << 20

    public init(path: String) { self.path = path }

    /// Writes into the backing file, makes that durable, and then empties the image, so that the disk is the same at any time.
    /// - Parameter progress: called now and then; false gives up, with the image as it was.
    /// - Returns: the backing file's path.
    @discardableResult
    public func run(_ progress: (ImageProgress) -> Bool = { _ in true }) throws(DiskImageError) -> String {
        var options = options
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw) }
        guard try ImageFormat(options.format, orExtensionOf: path) == .qcow2 else {
            throw .impossible(path: path, reason: "only qcow2 images have backing files")
        }
        let information = try ImageInformation(path: path, format: .qcow2)
        guard let backing = information.backing, let layout = information.qcow2 else { throw .impossible(path: path, reason: "it has no backing file") }
        guard information.snapshots.isEmpty || keepsContents else {
            throw .notWritable(path: path, reason: "its snapshots need what would be removed; --keep leaves the image as it is")
        }
        let target = try backingPath(backing.name, of: path)
        let format = try backingFormat(backing.format, target)
        // The image by itself, and for writing: nobody else is to have it open.
        options.readOnly = false
        options.followsBacking = false
        try copy(options, target, format, progress)
        if !keepsContents { try empty(layout, BackingReference(name: backing.name, format: format), size: information.size) }
        return target
    }

    private func copy(_ options: DiskImageOptions, _ target: String, _ format: ImageFormat, _ progress: (ImageProgress) -> Bool) throws(DiskImageError) {
        var reader = ImageReader(try DiskImage(path: path, options: options))
        let size = reader.image.size
        var targetOptions = DiskImageOptions(format: format, cache: options.cache, locking: options.locking)
        targetOptions.readOnly = false
        targetOptions.keys = options.keys(below: reader.image)
        targetOptions.usesAllKeys = false
        var engine: DiskEngine
        do throws(DiskImageError) {
            engine = try DiskEngine(DiskImage(path: target, options: targetOptions), depth: 1, segments: 1)
        } catch {
            throw .backing(of: path, error)
        }
        if let remote = engine.image.remote, engine.image.isRemote, !remote.export.canFlush, !keepsContents {
            throw .remoteNotPossible(path: target, reason: "its server has no flush, so that nobody knows when all is stored; --keep leaves the image as it is")
        }
        if engine.image.size < size { try engine.resize(to: size) }
        let buffer = try memory(Self.bufferSize, path)
        var position: UInt64 = 0
        while position < size {
            if !progress(ImageProgress(done: position, total: size)) { throw .interrupted(path: path) }
            let extent = try reader.extent(at: position, limit: size - position)
            var length = extent.length
            switch extent.kind {
            case .unallocated:
                break
            case .zero:
                try engine.perform(.writeZeroesUnmapping, at: position, length: length)
            case .data, .compressed:
                length = min(length, UInt64(Self.bufferSize))
                let piece = unsafe UnsafeMutableRawBufferPointer(start: buffer.start, count: Int(length))
                try unsafe reader.read(piece, at: position)
                try unsafe engine.perform(.write, at: position, memory: piece)
            }
            position += length
        }
        try engine.perform(.flush)
        _ = progress(ImageProgress(done: size, total: size))
    }

    /// An empty image of the same layout takes the place of the old one.
    private func empty(_ layout: ImageInformation.QCOW2, _ backing: BackingReference, size: UInt64) throws(DiskImageError) {
        var creation = ImageCreation(path: path, format: .qcow2, size: size)
        creation.options.clusterSize = layout.clusterSize
        creation.options.compatibility = layout.compatibility
        creation.options.compression = CompressionType(rawValue: layout.compression) ?? .zlib
        creation.options.lazyRefcounts = layout.lazyRefcounts
        creation.options.refcountBits = layout.refcountBits
        creation.options.extendedL2 = layout.extendedL2
        // All its passwords stay.
        creation.volume = try LUKSVolume(of: ImageFile(path: path, writable: false, cache: .writeback, locking: false))
        creation.backing = backing
        creation.opensBacking = false
        creation.replacing = true
        creation.durably = true
        try creation.create()
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The progress of a long operation on an image.
public struct ImageProgress: Sendable {
    /// Bytes of the disk that are dealt with, and all of them.
    public var done: UInt64
    public var total: UInt64
}

/// The use of the host's page cache by a tool that processes a whole disk.
public enum ToolCache: String, Sendable, CaseIterable {
    /// Cached data is read from the cache. All other large transfers bypass it, which is faster and evicts nothing.
    /// Where the file system has no `O_DIRECT` this is ``writeback``.
    case automatic = "auto"
    /// All transfers go through the cache.
    case writeback
    /// All aligned transfers bypass the cache; an error if the file system does not support `O_DIRECT`.
    case none
}

/// A conversion of a disk image to another format or layout.
public struct ImageConversion: Sendable {
    public var source: String
    public var sourceOptions = DiskImageOptions(readOnly: true)
    public var target: String
    public var format: ImageFormat
    /// The kind of VMDK or VDI image; nil for the default.
    public var subformat: ImageSubformat?
    public var options = QCOW2Options()
    public var preallocation = Preallocation.off
    /// The backing file of the new image, which stores only the differences.
    public var backing: BackingReference?
    /// Indicates whether clusters are compressed where that makes them smaller.
    public var compresses = false
    /// The compression level: 1 to 9 for zlib, 1 to 19 for zstd; nil for the default.
    public var compressionLevel: Int?
    /// Indicates whether an existing file is replaced, or a block device or a remote disk overwritten.
    public var replacing = false
    /// The use of the page cache on both sides.
    public var cache = ToolCache.automatic
    /// Indicates whether unreadable ranges of the source become zeroes, and a truncated source is read as
    /// far as it goes.
    public var salvages = false
    /// A test's system calls for reading the source.
    var calls = FileCalls.host
    /// Indicates whether the image is on the disk when ``run(_:)`` returns.
    public var durably = false
    /// Threads that read, compress and write; more than the processors only wait for each other at the file.
    public var threads = min(max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN))), possibleThreads.upperBound)

    public static let possibleThreads = 1...64
    /// Indicates whether the target has to be something that is written in place, a block device or a remote disk.
    public var isTargetThere = false

    public init(source: String, target: String, format: ImageFormat) {
        self.source = source
        self.target = target
        self.format = format
    }

    /// Creates the image. It gets its name when it is complete; after an error there is no file (a block device or a
    /// remote disk is then written in part).
    /// - Parameter progress: called a few times a second; false cancels.
    /// - Returns: what of the source could not be read, in the disk's order.
    @discardableResult
    public func run(_ progress: (ImageProgress) -> Bool = { _ in true }) throws(DiskImageError) -> [LostRange] {
        try format.requireMakeable(target)
        try DiskKey.check(target, isNoFileOf: sourceOptions.keys + (options.encryption.map { [$0.key] } ?? []))
        let isRemote = NBDLocation.isAddress(target)
        if isRemote, format != .raw { throw .remoteNotPossible(path: target, reason: NBDLocation.isRaw) }
        var sourceOptions = sourceOptions
        sourceOptions.readOnly = true
        sourceOptions.cache = cache == .none ? .none : .writeback
        sourceOptions.sparesCache = cache == .automatic
        // What is read is read once, in order: a small part of the tables at a time.
        sourceOptions.metadataCacheSize = min(sourceOptions.metadataCacheSize, 1 << 20)
        sourceOptions.salvages = salvages
        let salvage = salvages ? SalvageLog() : nil
        let image = try DiskImage(path: source, options: sourceOptions)
        // Threads open both again.
        let notice = sourceOptions.notice
        sourceOptions.notice = nil
        let size = image.size
        let kind = try ImageSubformat.resolve(subformat, format: format, compresses: compresses, target)
        try check(size, kind)
        // Before our own lock of the source makes it appear in use.
        let old = replacing ? ImageFile.Identity(ofPath: target) : nil
        if let index = image.identities.firstIndex(where: { $0 == old }) {
            throw .sameFile(path: target, other: image.files[index])
        }
        if isRemote, image.files.contains(target) { throw .sameFile(path: target, other: target) }
        // Its own file must not be the one that is replaced.
        let remoteBase = try openBacking(image.remote, notice) { base throws(DiskImageError) in
            guard let index = base.identities.firstIndex(where: { $0 == old }) else { return base.remote }
            throw .sameFile(path: target, other: base.files[index])
        }
        let file =
            try isRemote
            ? NewFile(remote: target, replacing: replacing) : NewFile(path: target, replacing: replacing, cache: cache)
        guard file.deviceSize != nil || !isTargetThere else {
            throw .notApplicable(
                path: target,
                reason:
                    "it is neither a block device nor a remote disk, and files are always created anew (--force replaces one)"
            )
        }
        if let deviceSize = file.deviceSize {
            guard format == .raw else {
                throw .impossible(path: target, reason: "a block device holds raw images only")
            }
            guard deviceSize >= size else { throw .tooSmall(path: target, needed: size, size: deviceSize) }
        }
        let volume = try options.encryption?.makeVolume(target)
        let plan = try ImagePlan(
            format, kind, options, size: size, backing: backing, path: target, replacing: replacing, cache: cache,
            sources: image.identities,
            volume: volume)
        if file.deviceSize == nil { try plan.prepare(file, size: size, preallocation) }
        let isInPlace = file.deviceSize != nil
        do throws(DiskImageError) {
            let reader = ImageReader(image, calls: calls, salvage: salvage)
            try ConversionWork(
                self, sourceOptions, reader, remoteBase ?? nil, file, plan, volume?.cipher(path: target), salvage
            ).run(progress)
        } catch {
            if case .interruptedInPlace = error { throw error }
            throw isInPlace ? .failedInPlace(path: target, error) : error
        }
        return salvage?.all ?? []
    }

    private func check(_ size: UInt64, _ kind: ImageSubformat?) throws(DiskImageError) {
        guard Self.possibleThreads.contains(threads) else {
            throw .impossible(
                path: target,
                reason:
                    "\(threads) threads; \(Self.possibleThreads.lowerBound) to \(Self.possibleThreads.upperBound) are possible"
            )
        }
        if format == .qcow2 {
            try options.check(target, size: size, preallocation: preallocation, backing: backing)
            guard backing == nil || preallocation == .off else {
                throw .impossible(path: target, reason: "preallocated clusters would hide the backing file")
            }
            guard options.dataFile == nil else {
                throw .impossible(path: target, reason: "an external data file is not supported for conversion")
            }
            guard !compresses || options.encryption == nil else {
                throw .impossible(path: target, reason: "compression and encryption cannot be combined")
            }
            guard !compresses || preallocation == .off else {
                throw .impossible(path: target, reason: "compression and preallocation cannot be combined")
            }
            return try checkLevel(options.compression)
        }
        if let kind {
            try kind.check(target, size: size, preallocation: preallocation, options: options, backing: backing)
            return try checkLevel(.zlib)
        }
        guard backing == nil else {
            throw .impossible(path: target, reason: "a raw image has no backing file; qcow2 does")
        }
        guard !compresses else {
            throw .impossible(path: target, reason: "raw images are not compressed; qcow2 can be")
        }
        guard options == QCOW2Options() else {
            throw .impossible(path: target, reason: "qcow2 options do not apply to a raw image")
        }
        guard preallocation != .metadata else {
            throw .impossible(path: target, reason: "a raw image has no metadata; use falloc or full")
        }
        guard preallocation == .off || !NBDLocation.isAddress(target) else {
            throw .remoteNotPossible(path: target, reason: "the server allocates the space of a remote disk")
        }
    }

    /// The backing image, if there is to be one, opened for reading.
    /// - Parameter remote: a remote disk that is connected to already, for one of that name.
    func openBacking<Answer: ~Copyable>(
        _ remote: NBDDisk?, _ notice: (@Sendable (String) -> Void)? = nil,
        _ body: (DiskImage) throws(DiskImageError) -> Answer
    ) throws(DiskImageError) -> Answer? {
        guard let backing else { return nil }
        do throws(DiskImageError) {
            var options = DiskImageOptions(
                readOnly: true, metadataCacheSize: 1 << 20, allowsDataFile: true, namedFiles: sourceOptions.namedFiles)
            options.vhdSize = sourceOptions.vhdSize
            options.usesAll = false
            options.notice = notice
            return try body(
                DiskImage(
                    path: backingPath(backing.name, of: target), FormatChoice(backing), options: options, remote: remote
                ))
        } catch {
            if case .sameFile = error { throw error }
            throw .backing(of: target, error)
        }
    }

    private func checkLevel(_ compression: CompressionType) throws(DiskImageError) {
        let levels = compression == .zlib ? 1...9 : 1...19
        guard let level = compressionLevel, !levels.contains(level) else { return }
        throw .impossible(
            path: target,
            reason: "compression level \(level); \(compression) has \(levels.lowerBound) to \(levels.upperBound)")
    }
}

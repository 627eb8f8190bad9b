// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// Commits the contents of an overlay to its backing file.
public struct ImageCommit: Sendable {
    public var path: String
    public var options = DiskImageOptions()
    /// The file with the backing file's data, if that keeps it outside.
    public var backingDataFile: String?
    /// Indicates whether the image keeps what is now in its backing file too.
    public var keepsContents = false

    /// A test's system calls.
    var calls: FileCalls?

    public init(path: String) { self.path = path }

    /// Writes into the backing file, makes that durable, and then empties the image, so that the disk is the same at
    /// any time.
    /// - Parameter progress: called regularly; false cancels, with the image unchanged.
    /// - Returns: the backing file's path.
    @discardableResult
    public func run(_ progress: (ImageProgress) -> Bool = { _ in true }) throws(DiskImageError) -> String {
        var options = options
        guard !NBDLocation.isAddress(path) else { throw .remoteNotPossible(path: path, reason: NBDLocation.isRaw) }
        try DiskImage.requireQCOW2(path, format: options.format) { _ in "only qcow2 images have backing files" }
        // The image by itself, and for writing, which excludes other users until this has ended.
        options.readOnly = false
        options.followsBacking = false
        options.sparesCache = true
        let image = try DiskImage(path: path, options: options)
        guard let header = image.header, let name = header.backingName else {
            throw .notApplicable(path: path, reason: "it has no backing file")
        }
        guard header.snapshotCount == 0 else {
            throw .notWritable(
                path: path, reason: "its snapshots also depend on the backing file, and their contents would change")
        }
        let target = try backingPath(name, of: path)
        let choice = try FormatChoice(backing: header.backingFormat, target)
        var targetOptions = DiskImageOptions(
            cache: options.cache, locking: options.locking, dataFile: backingDataFile, namedFiles: options.namedFiles)
        targetOptions.readOnly = false
        targetOptions.sparesCache = true
        targetOptions.report = options.report
        targetOptions.keys = options.keys(below: image)
        targetOptions.usesAll = false
        let namer = image.namer
        let reader = try WindowReader(image, path, calls: calls)
        try copy(reader, target, choice, of: namer, targetOptions, progress)
        if !keepsContents, let image = reader.takeImage() {
            var engine = try WindowWriter.engine(image, calls: calls)
            try engine.removeContents()
        }
        return target
    }

    private func copy(
        _ reader: WindowReader, _ target: String, _ choice: FormatChoice, of namer: NamingImage,
        _ options: DiskImageOptions,
        _ progress: (ImageProgress) -> Bool
    ) throws(DiskImageError) {
        let size = reader.size
        var engine: DiskEngine
        do throws(DiskImageError) {
            engine = try WindowWriter.engine(DiskImage(path: target, choice, of: namer, options: options), calls: calls)
        } catch {
            throw .backing(of: path, error.orLoop(to: path))
        }
        if let remote = engine.image.remote, engine.image.isRemote, !remote.export.canFlush, !keepsContents {
            throw .remoteNotPossible(
                path: target,
                reason:
                    "the server does not support flush, so the commit cannot be made durable; --keep keeps the overlay's contents"
            )
        }
        if engine.image.size < size { try engine.resize(to: size) }
        let writer = try WindowWriter(engine, sources: [reader])
        try writer.run(size: size, interruption: .interruptedInPlace(path: target), progress) {
            window throws(DiskImageError) in
            var position = window.start
            while position < window.end {
                let extent = try reader.extent(at: position, limit: size - position)
                // What is not read may be longer than a window.
                var end = position + extent.length
                switch extent.kind {
                case .unallocated: break
                case .zero: try writer.clear(position..<end)
                case .data, .compressed:
                    end = min(end, window.end)
                    window.add(position..<end)
                }
                position = end
            }
            window.skip(to: position)
        } write: { window throws(DiskImageError) in
            for part in window.parts { try writer.write(part, of: window) }
        }
    }
}

extension DiskEngine {
    /// The image has nothing of its own any more, and shows its backing file. That has happened in full or not at all.
    fileprivate mutating func removeContents() throws(DiskImageError) {
        // New tables are placed behind what they replace. The second time there is room at the front, and the file gets
        // short.
        for _ in 0..<2 {
            try replaceMetadata { (new, scan) throws(DiskImageError) in
                let l1 = try scan.file.readL1(scan.header, scan.fileSize)
                try new.refer(l1, -1)
                try new.setL1([UInt64](repeating: 0, count: l1.count))
            } inPlace: { (reduction, _) throws(DiskImageError) in
                try reduction.removeContents()
            }
        }
    }
}

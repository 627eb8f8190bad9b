// SPDX-License-Identifier: Apache-2.0

/// The allocation map of a disk, from its start to its end.
public struct ImageMap: ~Copyable {
    private var reader: ImageReader
    private var position: UInt64 = 0
    /// Asked for and not given yet, since it may continue.
    private var pending: ImageExtent?

    /// Bytes of the disk.
    public var size: UInt64 { reader.image.size }
    /// The files that have data, by their number: those of the chain, topmost first, then the extents of an image in
    /// several files.
    public let files: [String]

    public init(_ image: DiskImage) {
        files = image.dataFiles
        reader = ImageReader(image)
    }

    /// The next extent, as long as it is stored alike; nil at the end of the disk.
    public mutating func next() throws(DiskImageError) -> ImageExtent? {
        while position < size {
            let extent = try reader.extent(at: position, limit: size - position)
            position += extent.length
            guard var run = pending else {
                pending = extent
                continue
            }
            if run.continues(with: extent) {
                run.length += extent.length
                pending = run
                continue
            }
            pending = extent
            return run
        }
        defer { pending = nil }
        return pending
    }
}

extension ImageExtent {
    /// Indicates whether the extent that follows this one is stored as this one is.
    fileprivate func continues(with next: ImageExtent) -> Bool {
        guard kind == next.kind, depth == next.depth else { return false }
        // The offsets of compressed clusters need not be contiguous.
        if kind == .compressed { return true }
        switch (fileOffset, next.fileOffset) {
        case (nil, nil): return true
        case (let place?, let other?): return file == next.file && place &+ length == other
        default: return false
        }
    }
}

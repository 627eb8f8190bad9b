// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The bytes of an image's disk, read in the calling thread.
///
/// Of an image that engines work on, it is for the times when none of them has anything in flight: before a machine
/// starts, and between two boots. It sees all that they have written then.
public final class ImageContents: @unchecked Sendable {
    private let image: DiskImage
    private let lock = Lock()
    // Used with the lock alone: hence `Sendable`.
    private var reader: ImageReader
    /// A sector of which not all is wanted; likewise.
    private var sector: [UInt8]

    /// The unit of reading: that of encryption, and of what a disk's size is a multiple of.
    private static let unit = 512

    public init(_ image: DiskImage) {
        self.image = image
        reader = ImageReader(image)
        sector = [UInt8](repeating: 0, count: Self.unit)
    }

    /// Bytes of the disk.
    public var size: UInt64 { image.size }
    /// The path that the user gave.
    public var path: String { image.path }
    /// Indicates whether it is a remote disk or has one among its backing files.
    public var isRemote: Bool { image.remote != nil }

    /// Fills a buffer with the bytes from an offset on.
    /// - Throws: also for a range that passes the end of the disk.
    public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(DiskImageError) {
        lock.lock()
        defer { lock.unlock() }
        guard offset <= size, UInt64(buffer.count) <= size - offset else {
            throw .request(path: path, SystemCallError("read", errno: 22))
        }
        // Its owner keeps the buffer until this returns.
        let memory = unsafe IOMemory(buffer)
        var done = 0
        while done < memory.count {
            let position = offset + UInt64(done), left = memory.count - done
            let start = Int(position % UInt64(Self.unit))
            if start == 0, left >= Self.unit {
                let count = left / Self.unit * Self.unit
                try reader.read(memory.piece(done, count), at: position)
                done += count
            } else {
                let count = min(left, Self.unit - start)
                try sector.withIOMemory { (sector) throws(DiskImageError) in
                    try reader.read(sector, at: position - UInt64(start))
                    memory.piece(done, count).copy(from: sector.piece(start, count))
                }
                done += count
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

/// A disk whose bytes can be read at any offset.
public protocol BlockSource: Sendable {
    /// Bytes.
    var size: UInt64 { get }

    /// Fills a buffer with the bytes from an offset on. The range is inside the disk.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(FileSystemError)
}

/// Bytes in memory.
struct MemorySource: BlockSource {
    let bytes: [UInt8]

    var size: UInt64 { UInt64(bytes.count) }

    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(FileSystemError) {
        let start = Int(clamping: offset)
        guard start <= bytes.count, buffer.count <= bytes.count - start else {
            throw .unreadable(reason: "bytes past the end of a structure were read")
        }
        // As many bytes as the buffer has, as was just checked.
        unsafe bytes[start..<start + buffer.count].withUnsafeBytes { unsafe buffer.copyMemory(from: $0) }
    }
}

/// A range of a disk: a partition, or all of it.
public struct Volume: Sendable {
    let source: any BlockSource
    let start: UInt64
    /// Bytes.
    public let size: UInt64

    /// All of a disk.
    public init(_ source: any BlockSource) {
        self.source = source
        start = 0
        size = source.size
    }

    /// What of a range of a disk there is.
    init(_ source: any BlockSource, start: UInt64, size: UInt64) {
        self.source = source
        self.start = min(start, source.size)
        self.size = min(size, source.size - self.start)
    }

    init(bytes: [UInt8]) { self.init(MemorySource(bytes: bytes)) }

    /// Indicates whether a range is inside.
    func contains(_ offset: UInt64, _ count: UInt64) -> Bool { offset <= size && count <= size - offset }

    /// Fills a buffer.
    /// - Throws: `damaged` for a range that passes the end.
    func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(FileSystemError) {
        guard contains(offset, UInt64(buffer.count)) else { throw Self.pastEnd(offset, size) }
        unsafe try source.read(at: start + offset, into: buffer)
    }

    /// A copy of some bytes.
    /// - Throws: `damaged` for a range that passes the end; before memory is taken for it.
    func read(at offset: UInt64, count: Int) throws(FileSystemError) -> [UInt8] {
        guard count >= 0, contains(offset, UInt64(count)) else { throw Self.pastEnd(offset, size) }
        var result = [UInt8](repeating: 0, count: count)
        var span = result.mutableSpan
        // The buffer is used during the call alone.
        try unsafe span.withUnsafeMutableBytes { (buffer) throws(FileSystemError) in
            unsafe try source.read(at: start + offset, into: buffer)
        }
        return result
    }

    private static func pastEnd(_ offset: UInt64, _ size: UInt64) -> FileSystemError {
        .damaged(what: "the file system", reason: "it refers to byte \(offset) and ends at byte \(size)")
    }
}

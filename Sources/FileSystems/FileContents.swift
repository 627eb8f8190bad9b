// SPDX-License-Identifier: Apache-2.0

/// The bytes of a file, read on demand: where each of its pieces is. What is in no piece reads as zeroes.
public struct FileContents: Sendable {
    /// Bytes.
    public let size: UInt64
    /// Sorted by offset; none overlaps another.
    private let pieces: [Piece]
    /// What the pieces are in.
    private let volumes: [Volume]

    /// The most pieces of a file; a file that is more fragmented is refused.
    static let maximumPieces = 1 << 20

    struct Piece: Sendable {
        var offset: UInt64
        var length: UInt64
        /// Where it is in its volume.
        var place: UInt64
        /// The number of the volume.
        var volume = 0
    }

    /// - Parameter pieces: in the order of offsets; what passes the end of the file is left out.
    init(size: UInt64, _ pieces: [Piece], in volumes: [Volume]) {
        self.size = size
        self.pieces = pieces.compactMap { piece in
            guard piece.offset < size else { return nil }
            var piece = piece
            piece.length = min(piece.length, size - piece.offset)
            return piece
        }
        self.volumes = volumes
    }

    init(bytes: [UInt8]) {
        self.init(
            size: UInt64(bytes.count), [Piece(offset: 0, length: UInt64(bytes.count), place: 0)],
            in: [Volume(bytes: bytes)])
    }

    /// A part of it, less where it ends before.
    func slice(_ offset: UInt64, _ length: UInt64) -> FileContents {
        let start = min(offset, size), count = min(length, size - start)
        let inside = pieces.compactMap { piece -> Piece? in
            let first = max(piece.offset, start), last = min(piece.offset + piece.length, start + count)
            guard first < last else { return nil }
            return Piece(
                offset: first - start, length: last - first, place: piece.place + (first - piece.offset),
                volume: piece.volume)
        }
        return FileContents(size: count, inside, in: volumes)
    }

    /// Several files one behind the other, each from a multiple of four bytes on, as Linux takes several initrds.
    init(joining files: [FileContents]) {
        var pieces: [Piece] = [], volumes: [Volume] = [], end: UInt64 = 0
        for file in files {
            let start = (end &+ 3) & ~3
            for piece in file.pieces {
                var piece = piece
                piece.offset &+= start
                piece.volume += volumes.count
                pieces.append(piece)
            }
            volumes += file.volumes
            end = start.addingReportingOverflow(file.size).partialValue
        }
        self.init(size: end, pieces, in: volumes)
    }

    /// Fills a buffer with the bytes from an offset on.
    /// - Throws: also for a range that passes the end.
    public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(FileSystemError) {
        guard offset <= size, UInt64(buffer.count) <= size - offset else {
            throw .unreadable(reason: "bytes past the end of a file were read")
        }
        var done = 0
        var index = firstPiece(endingAfter: offset)
        while done < buffer.count {
            let position = offset + UInt64(done), left = UInt64(buffer.count - done)
            let next = index < pieces.count ? pieces[index] : nil
            if let piece = next, piece.offset <= position {
                let count = Int(min(left, piece.offset + piece.length - position))
                // Within the buffer, as `left` says.
                try unsafe volumes[piece.volume].read(
                    at: piece.place + (position - piece.offset),
                    into: UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count]))
                done += count
                index += 1
            } else {
                let count = Int(min(left, next.map { $0.offset - position } ?? left))
                // Likewise.
                unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + count])
                    .initializeMemory(as: UInt8.self, repeating: 0)
                done += count
            }
        }
    }

    /// A copy of some bytes.
    public func read(at offset: UInt64, count: Int) throws(FileSystemError) -> [UInt8] {
        guard count >= 0, offset <= size, UInt64(count) <= size - offset else {
            throw .unreadable(reason: "bytes past the end of a file were read")
        }
        var result = [UInt8](repeating: 0, count: count)
        var span = result.mutableSpan
        // The buffer is used during the call alone.
        try unsafe span.withUnsafeMutableBytes { (buffer) throws(FileSystemError) in
            try unsafe read(at: offset, into: buffer)
        }
        return result
    }

    /// All of a file that has to be small.
    /// - Parameter what: the file, for the message.
    public func all(limit: UInt64, _ what: String) throws(FileSystemError) -> [UInt8] {
        guard size <= limit else { throw .tooLarge(what: what, size: size, limit: limit) }
        return try read(at: 0, count: Int(size))
    }

    /// How many bytes from an offset on are in no piece, and so are zero.
    public func hole(at offset: UInt64) -> UInt64 {
        let index = firstPiece(endingAfter: offset)
        guard index < pieces.count else { return offset < size ? size - offset : 0 }
        return pieces[index].offset > offset ? pieces[index].offset - offset : 0
    }

    private func firstPiece(endingAfter offset: UInt64) -> Int {
        var low = 0, high = pieces.count
        while low < high {
            let middle = (low + high) / 2
            if pieces[middle].offset + pieces[middle].length > offset { high = middle } else { low = middle + 1 }
        }
        return low
    }
}

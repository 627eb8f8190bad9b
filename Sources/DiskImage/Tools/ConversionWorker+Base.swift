// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

extension ConversionWorker {
    /// The backing file of the new image, with a view of its own for each thread, and a piece of its disk.
    @safe struct Base: ~Copyable {
        private var reader: ImageReader
        private let buffer: TransferBuffer

        /// - Parameter size: bytes of a piece, at most.
        init(_ image: consuming DiskImage, _ size: Int, _ path: String) throws(DiskImageError) {
            reader = ImageReader(image)
            buffer = try TransferBuffer(size, path)
        }

        /// Reads what the backing file has where a piece is; past its end it has zeroes.
        mutating func read(_ piece: ConversionWork.Piece) throws(DiskImageError) {
            let size = reader.image.size, length = Int(piece.length)
            let there = piece.offset < size ? Int(min(piece.length, size - piece.offset)) : 0
            // A piece is no longer than the buffer.
            try unsafe reader.read(UnsafeMutableRawBufferPointer(start: buffer.start, count: there), at: piece.offset)
            unsafe (buffer.start + there).initializeMemory(as: UInt8.self, repeating: 0, count: length - there)
        }

        /// Indicates whether a range of the piece is zeroes.
        func isZero(_ range: Range<Int>) -> Bool {
            // Within what has been read.
            unsafe clinux_zero_prefix(buffer.start + range.lowerBound, range.count) == range.count
        }

        /// Indicates whether a range of the piece is what a buffer begins with.
        func isEqual(_ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) -> Bool {
            guard let start = bytes.baseAddress, bytes.count >= range.count else { return false }
            // As many bytes as both have.
            return unsafe memcmp(start, buffer.start + range.lowerBound, range.count) == 0
        }
    }
}

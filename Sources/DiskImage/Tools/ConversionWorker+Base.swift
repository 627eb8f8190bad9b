// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

extension ConversionWorker {
    /// The backing file of the new image, with a view of its own for each thread, and a piece of its disk.
    struct Base: ~Copyable {
        private var reader: ImageReader
        private let buffer: TransferBuffer

        /// - Parameter size: bytes of a piece, at most.
        init(_ image: DiskImage, _ size: Int, _ path: String) throws(DiskImageError) {
            reader = ImageReader(image)
            buffer = try TransferBuffer(size, path)
        }

        /// Reads what the backing file has where a piece is; past its end it has zeroes.
        mutating func read(_ piece: ConversionWork.Piece) throws(DiskImageError) {
            let size = reader.image.size, length = Int(piece.length)
            let there = piece.offset < size ? Int(min(piece.length, size - piece.offset)) : 0
            try reader.read(buffer.memory.prefix(there), at: piece.offset)
            buffer.memory.piece(there, length - there).clear()
        }

        /// Indicates whether a range of the piece is zeroes.
        func isZero(_ range: Range<Int>) -> Bool {
            buffer.memory.piece(range.lowerBound, range.count).isZero
        }

        /// Indicates whether a range of the piece is what a buffer begins with.
        func isEqual(_ bytes: IOMemory, _ range: Range<Int>) -> Bool {
            bytes.count >= range.count
                && bytes.prefix(range.count).isEqual(to: buffer.memory.piece(range.lowerBound, range.count))
        }
    }
}

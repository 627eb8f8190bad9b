// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Indicates whether two images show the same disk.
public struct ImageComparison: Sendable {
    /// The result.
    public enum Outcome: Sendable, Equatable {
        case identical
        /// The shorter one ends, and the longer one has nothing but zeroes there.
        case identicalUpToZeroes
        /// The first byte that differs.
        case contents(offset: UInt64)
        /// A strict comparison found bytes from this offset on that are allocated in one image only.
        case allocation(offset: UInt64)
        /// A strict comparison found different sizes.
        case size(UInt64, UInt64)
    }

    public var first: String
    public var firstOptions = DiskImageOptions(readOnly: true)
    public var second: String
    public var secondOptions = DiskImageOptions(readOnly: true)
    /// Indicates whether sizes and what is allocated have to be the same too.
    public var isStrict = false

    private static let bufferSize = 1 << 20

    public init(_ first: String, with second: String) {
        self.first = first
        self.second = second
    }

    /// Compares the disks up to the first difference.
    /// - Parameter progress: called regularly; false cancels.
    public func run(_ progress: (ImageProgress) -> Bool = { _ in true }) throws(DiskImageError) -> Outcome {
        var one = ImageReader(try DiskImage(path: first, options: firstOptions))
        var other = ImageReader(try DiskImage(path: second, options: secondOptions))
        let (size, otherSize) = (one.image.size, other.image.size)
        if isStrict, size != otherSize { return .size(size, otherSize) }
        let common = min(size, otherSize), total = max(size, otherSize)
        let buffers = try IOBuffer(count: 2 * Self.bufferSize, first)
        let left = buffers.piece(0, Self.bufferSize), right = buffers.piece(Self.bufferSize, Self.bufferSize)

        var position: UInt64 = 0, steps = 0
        func goesOn() throws(DiskImageError) {
            steps += 1
            if steps % 64 == 0, !progress(ImageProgress(done: position, total: total)) {
                throw .interrupted(path: first)
            }
        }
        while position < common {
            try goesOn()
            let extent = try one.extent(at: position, limit: common - position),
                match = try other.extent(at: position, limit: extent.length)
            let length = match.length
            if isStrict, extent.isAllocated != match.isAllocated { return .allocation(offset: position) }
            if extent.readsAsZeroes, match.readsAsZeroes {
                position += length
                continue
            }
            let count = Int(min(length, UInt64(Self.bufferSize)))
            let a = left.prefix(count), b = right.prefix(count)
            if !extent.readsAsZeroes { try one.read(a, at: position) }
            if !match.readsAsZeroes { try other.read(b, at: position) }
            let same =
                extent.readsAsZeroes ? b.zeroPrefix : match.readsAsZeroes ? a.zeroPrefix : commonPrefix(a, with: b)
            if same < count { return .contents(offset: position + UInt64(same)) }
            position += UInt64(count)
        }
        // What one has beyond the other's end.
        while position < total {
            try goesOn()
            let isFirst = size > otherSize
            let extent =
                try isFirst
                ? one.extent(at: position, limit: total - position)
                : other.extent(at: position, limit: total - position)
            if !extent.readsAsZeroes {
                let count = Int(min(extent.length, UInt64(Self.bufferSize)))
                let piece = left.prefix(count)
                if isFirst { try one.read(piece, at: position) } else { try other.read(piece, at: position) }
                let zeroes = piece.zeroPrefix
                if zeroes < count { return .contents(offset: position + UInt64(zeroes)) }
                position += UInt64(count)
            } else {
                position += extent.length
            }
        }
        _ = progress(ImageProgress(done: total, total: total))
        return size == otherSize ? .identical : .identicalUpToZeroes
    }

    /// - Parameter b: as long a piece as `a`.
    private func commonPrefix(_ a: IOMemory, with b: IOMemory) -> Int {
        if a.isEqual(to: b) { return a.count }
        return (0..<a.count).first { a.load($0, as: UInt8.self) != b.load($0, as: UInt8.self) } ?? a.count
    }
}

extension ImageExtent {
    /// Indicates whether an image of the chain has something of its own there.
    fileprivate var isAllocated: Bool { kind != .unallocated }
}

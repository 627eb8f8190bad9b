// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The memory of a transfer, in segments as readv(2) takes them: a view, which owns neither the list nor the
/// memory.
///
/// Its creator guarantees that both stay valid until the transfer has ended. Every access is within a segment.
@safe struct IOSegments: @unchecked Sendable {
    // Both belong to the transfer's owner: hence `Sendable`.
    let vectors: UnsafePointer<iovec>
    let count: Int

    /// - Precondition: there are `count` vectors, and both they and the memory that they are about stay until
    /// the transfer has ended.
    @unsafe init(_ vectors: UnsafePointer<iovec>, count: Int) {
        unsafe self.vectors = vectors
        self.count = count
    }

    /// Bytes of all segments.
    var length: UInt64 {
        var sum: UInt64 = 0
        // As many as there are, by the promise of who made this; so in every method here.
        for index in 0..<count { sum &+= unsafe UInt64(vectors[index].iov_len) }
        return sum
    }

    /// The bits that are set in any address or length: by them one sees what all of them are multiples of.
    var bits: UInt {
        var bits: UInt = 0
        for index in 0..<count {
            unsafe bits |= UInt(bitPattern: vectors[index].iov_base) | UInt(bitPattern: vectors[index].iov_len)
        }
        return bits
    }

    /// All of it, if its segments lie one after the other in memory; else nil.
    var contiguous: IOMemory? {
        guard count > 0, let start = unsafe vectors[0].iov_base else { return nil }
        var total = 0
        for index in 0..<count {
            let (base, length) = unsafe (vectors[index].iov_base, vectors[index].iov_len)
            if let base = unsafe base, length > 0, unsafe base != start + total { return nil }
            total += length
        }
        // The segments' owner guarantees each of them, and they are contiguous.
        return unsafe IOMemory(start, count: total)
    }

    /// Passes the pieces of memory with the bytes `start ..< start + length` to `body`, in their order.
    @inline(__always) func forEachPiece(from start: UInt64, length: UInt64, _ body: (IOMemory) -> Void) {
        var skip = start
        var rest = length
        for index in 0..<count where rest > 0 {
            let size = unsafe UInt64(vectors[index].iov_len)
            if skip >= size {
                skip -= size
                continue
            }
            let count = min(size - skip, rest)
            // Inside the segment, which the transfer's owner guarantees.
            if let base = unsafe vectors[index].iov_base { body(unsafe IOMemory(base + Int(skip), count: Int(count))) }
            rest -= count
            skip = 0
        }
    }

    /// Makes a range of the bytes zero.
    func clear(from start: UInt64, length: UInt64) { forEachPiece(from: start, length: length) { $0.clear() } }

    /// Fills a range of the bytes, as many as `memory` has.
    func copyIn(_ memory: IOMemory, at start: UInt64) {
        var done = 0
        forEachPiece(from: start, length: UInt64(memory.count)) { piece in
            piece.copy(from: memory.from(done))
            done += piece.count
        }
    }

    /// Copies a range of the bytes, as many as `memory` has, into it.
    func copyOut(from start: UInt64, to memory: IOMemory) {
        var done = 0
        forEachPiece(from: start, length: UInt64(memory.count)) { piece in
            memory.piece(done, piece.count).copy(from: piece)
            done += piece.count
        }
    }
}

/// Room for lists of segments, one for each operation. The kernel gives memory as it is touched.
struct IOSegmentLists: ~Copyable {
    private let vectors: Slab<Vector>
    /// Segments of a list at most.
    let capacity: Int

    /// Segments for which no mapping of their own is made.
    private static let few = 256

    /// A segment; zeroes are a valid one.
    @safe fileprivate struct Vector: BitwiseCopyable { var value: iovec }

    /// - Parameter path: the image's, for the error that there is no memory.
    init(count: Int, capacity: Int, _ path: String) throws(DiskImageError) {
        let vectors: Slab<Vector>
        if count * capacity <= Self.few {
            vectors = Slab(count: count * capacity) { _ in unsafe Vector(value: iovec()) }
        } else {
            // An empty segment is all zero.
            do throws(SystemCallError) { vectors = try unsafe Slab(zeroed: count * capacity) } catch {
                throw .system(path: path, error)
            }
        }
        self.vectors = vectors
        self.capacity = capacity
    }

    /// A list of one segment, until it is next made.
    @inline(__always) mutating func list(_ index: Int, _ memory: IOMemory) -> IOSegments {
        unsafe vectors[index * capacity].value = memory.vector
        return segments(index, 1)
    }

    /// As many segments of the same bytes as make up the length, or as there is room for.
    mutating func list(_ index: Int, repeating memory: IOMemory, length: UInt64) -> IOSegments {
        var count = 0, rest = length
        while rest > 0, count < capacity {
            let size = min(rest, UInt64(memory.count))
            unsafe vectors[index * capacity + count].value = memory.prefix(Int(size)).vector
            rest -= size
            count += 1
        }
        return segments(index, count)
    }

    /// The segments of a range of a transfer's bytes.
    mutating func list(_ index: Int, of transfer: IOSegments, from start: UInt64, length: UInt64) -> IOSegments {
        var count = 0
        let (vectors, capacity) = (vectors, capacity)
        transfer.forEachPiece(from: start, length: length) { piece in
            guard count < capacity else { return }
            unsafe vectors[index * capacity + count].value = piece.vector
            count += 1
        }
        return segments(index, count)
    }

    private func segments(_ index: Int, _ count: Int) -> IOSegments {
        // The slab's elements stay where they are, and each is a vector and nothing else; this value lives as
        // long as its user's requests.
        unsafe IOSegments(
            UnsafeRawPointer(vectors.address(of: index * capacity)).assumingMemoryBound(to: iovec.self), count: count)
    }
}

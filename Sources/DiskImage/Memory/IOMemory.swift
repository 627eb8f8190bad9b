// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A piece of memory between which and a file bytes are moved: a checked view, which owns nothing.
///
/// Its creator guarantees that the memory outlives every use of the view, which nothing checks: this is the unsafe
/// part. That of an ``IOBuffer`` lives as long as the buffer. Every access is checked against the bounds. It may be a
/// guest's memory, which changes at any time: it is copied through helpers that the compiler cannot see through.
@safe struct IOMemory: @unchecked Sendable {
    // Where the memory is. It does not change, and who may use it is the owner's business: hence `Sendable`.
    let start: UnsafeMutableRawPointer
    let count: Int

    /// - Precondition: `count` bytes from `start` on stay as long as the view is used.
    @unsafe init(_ start: UnsafeMutableRawPointer, count: Int) {
        unsafe self.start = start
        self.count = count
    }

    /// The same of a buffer; of an empty one, an empty piece.
    @unsafe init(_ buffer: UnsafeMutableRawBufferPointer) {
        // An empty piece is never dereferenced.
        unsafe self.init(buffer.baseAddress ?? UnsafeMutableRawPointer(bitPattern: 16)!, count: buffer.count)
    }

    /// The same of memory that is only read.
    @unsafe init(reading buffer: UnsafeRawBufferPointer) {
        // By contract it is not written.
        unsafe self.init(UnsafeMutableRawBufferPointer(mutating: buffer))
    }

    /// A part of it.
    @inline(__always) func piece(_ offset: Int, _ count: Int) -> IOMemory {
        precondition(
            offset >= 0 && count >= 0 && offset <= self.count && count <= self.count - offset, "beyond the memory's end"
        )
        // Inside, as was just checked.
        return unsafe IOMemory(start + offset, count: count)
    }

    func prefix(_ count: Int) -> IOMemory { piece(0, count) }
    func from(_ offset: Int) -> IOMemory { piece(offset, count - offset) }

    /// As system calls take it.
    var vector: iovec { unsafe iovec(iov_base: start, iov_len: count) }

    /// All of its bytes, for a call that reads or writes them.
    var bytes: UnsafeMutableRawBufferPointer { unsafe UnsafeMutableRawBufferPointer(start: start, count: count) }

    /// The bits that are set in its address or its length: by them one sees what both are multiples of.
    var bits: UInt { unsafe UInt(bitPattern: start) | UInt(bitPattern: count) }

    /// Bytes from the start of another piece, of which this one is a part, to its own.
    func distance(from whole: IOMemory) -> Int { unsafe Int(bitPattern: start) - Int(bitPattern: whole.start) }

    /// Bytes until the next address that is a multiple of a power of two.
    func gap(to alignment: Int) -> Int { unsafe (0 &- Int(bitPattern: start)) & (alignment - 1) }

    /// madvise(2), best effort.
    func advise(_ advice: Int32) { _ = unsafe madvise(start, count, advice) }

    /// mlock(2), best effort.
    func lock() { _ = unsafe mlock(start, count) }

    func fill(_ byte: UInt8) {
        // As many bytes as there are.
        unsafe clinux_fill(start, byte, count)
    }

    /// Bytes of zero at its start.
    var zeroPrefix: Int {
        // As many as there are.
        unsafe clinux_zero_prefix(start, count)
    }
    var isZero: Bool { zeroPrefix == count }

    /// Indicates whether another piece has the same bytes, and no more.
    func isEqual(to other: IOMemory) -> Bool {
        // Both have that many.
        unsafe count == other.count && memcmp(start, other.start, count) == 0
    }

    /// Combines it, byte by byte, with another piece of at least as many.
    func combine(with other: IOMemory) {
        precondition(count <= other.count, "beyond the memory's end")
        // Both have that many.
        for index in 0..<count { unsafe bytes[index] ^= other.bytes[index] }
    }

    /// Its first byte, for a call that reads or writes as many as there are.
    var octets: UnsafeMutablePointer<UInt8> { unsafe start.assumingMemoryBound(to: UInt8.self) }

    /// Its bytes, copied.
    var array: [UInt8] {
        // All of the piece's.
        unsafe Array(bytes)
    }

    func clear() { fill(0) }

    /// Overwrites secrets, which no compiler leaves out.
    func erase() { unsafe explicit_bzero(start, count) }

    /// Fills it with the bytes of another piece, which has at least as many.
    func copy(from other: IOMemory) {
        precondition(count <= other.count, "beyond the memory's end")
        // Both have that many.
        unsafe clinux_copy(start, other.start, count)
    }

    /// An integer at an offset, in this host's byte order.
    @inline(__always) func load<Value: FixedWidthInteger & BitwiseCopyable>(
        _ offset: Int, as type: Value.Type = Value.self
    ) -> Value {
        precondition(offset >= 0 && offset <= count - MemoryLayout<Value>.size, "beyond the memory's end")
        // Inside, as was just checked.
        return unsafe start.loadUnaligned(fromByteOffset: offset, as: type)
    }

    @inline(__always) func store<Value: FixedWidthInteger & BitwiseCopyable>(_ value: Value, _ offset: Int) {
        precondition(offset >= 0 && offset <= count - MemoryLayout<Value>.size, "beyond the memory's end")
        // As above.
        unsafe start.storeBytes(of: value, toByteOffset: offset, as: Value.self)
    }

    @inline(__always) func load<Value: FixedWidthInteger & BitwiseCopyable>(
        bigEndian offset: Int, as type: Value.Type = Value.self
    ) -> Value {
        Value(bigEndian: load(offset))
    }

    @inline(__always) func load<Value: FixedWidthInteger & BitwiseCopyable>(
        littleEndian offset: Int, as type: Value.Type = Value.self
    ) -> Value {
        Value(littleEndian: load(offset))
    }

    @inline(__always) func store<Value: FixedWidthInteger & BitwiseCopyable>(bigEndian value: Value, _ offset: Int) {
        store(value.bigEndian, offset)
    }
    @inline(__always) func store<Value: FixedWidthInteger & BitwiseCopyable>(littleEndian value: Value, _ offset: Int) {
        store(value.littleEndian, offset)
    }
}

extension Array where Element == UInt8 {
    /// Has `body` use the array's bytes, which stay where they are meanwhile, as memory to be written.
    mutating func withIOMemory<Answer, Failure: Error>(
        _ body: (IOMemory) throws(Failure) -> Answer
    ) throws(Failure) -> Answer {
        // `body` does not keep the view.
        var span = mutableSpan
        return try unsafe span.withUnsafeMutableBytes { (bytes) throws(Failure) in try body(unsafe IOMemory(bytes)) }
    }

    /// Likewise, as memory that is only read.
    func withReadableIOMemory<Answer, Failure: Error>(
        _ body: (IOMemory) throws(Failure) -> Answer
    ) throws(Failure) -> Answer {
        // As above, and it is not written.
        try unsafe span.withUnsafeBytes { (bytes) throws(Failure) in try body(unsafe IOMemory(reading: bytes)) }
    }
}

/// Page-aligned memory of its own, zero at first. The kernel gives it as it is touched.
struct IOBuffer: ~Copyable, Sendable {
    private let mapping: Mapping
    /// Bytes that can be used.
    let count: Int

    init(count: Int) throws(SystemCallError) {
        mapping = try Mapping(size: max(1, count), flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
        self.count = count
    }

    /// - Parameter path: the image's, for the error that there is no memory.
    init(count: Int, _ path: String) throws(DiskImageError) {
        do throws(SystemCallError) { try self.init(count: count) } catch { throw .system(path: path, error) }
    }

    /// All of it. Its user must keep the buffer alive.
    var memory: IOMemory {
        // The mapping has that many.
        unsafe IOMemory(mapping.start, count: count)
    }

    /// A part of it, likewise.
    @inline(__always) func piece(_ offset: Int, _ count: Int) -> IOMemory { memory.piece(offset, count) }
}

/// A table of 64-bit entries in a file's byte order, most significant byte first.
struct BigEndianTable: ~Copyable {
    private let buffer: IOBuffer
    let count: Int

    init(count: Int, _ path: String) throws(DiskImageError) {
        buffer = try IOBuffer(count: count * 8, path)
        self.count = count
    }

    subscript(index: Int) -> UInt64 {
        @inline(__always) get { buffer.memory.load(bigEndian: index &* 8) }
        @inline(__always) mutating set { buffer.memory.store(bigEndian: newValue, index &* 8) }
    }

    /// Some of the entries as the file has them.
    func bytes(_ range: Range<Int>) -> IOMemory { buffer.piece(range.lowerBound * 8, range.count * 8) }
}

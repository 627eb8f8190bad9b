// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc

/// Room for the buffers of many requests, allocated once: `slots` lists of `capacity` iovecs.
///
/// Each request in flight has a slot of its own for as long as it lasts. Pages of slots that are never used are
/// never touched.
@safe public struct IOVectorPool: ~Copyable, @unchecked Sendable {
    // The one owner of the memory; a list never outlives the device engine that holds the pool.
    private let storage: UnsafeMutablePointer<iovec>
    public let slots: Int
    public let capacity: Int

    /// - Parameter capacity: buffers in a list; a queue's size takes every chain that the specification allows.
    public init(slots: Int, capacity: Int) {
        unsafe storage = .allocate(capacity: slots * capacity)
        self.slots = slots
        self.capacity = capacity
    }

    deinit { unsafe storage.deallocate() }

    /// The list of a slot. Slots are the device's own numbers, not the guest's.
    public subscript(slot: Int) -> IOVectorList {
        precondition(slot >= 0 && slot < slots, "no such slot of iovecs")
        return unsafe IOVectorList(base: storage + slot * capacity, capacity: capacity)
    }
}

/// A list of iovecs in an ``IOVectorPool``, to be filled by ``Virtqueue/pop(into:from:)``.
@safe public struct IOVectorList: BitwiseCopyable, @unchecked Sendable {
    // Points into a pool that lives as long as its device's engine.
    let base: UnsafeMutablePointer<iovec>
    public let capacity: Int

    init(base: UnsafeMutablePointer<iovec>, capacity: Int) {
        unsafe self.base = base
        self.capacity = capacity
    }

    /// The first `count` entries as one run of buffers, also across chains that were popped one after the other.
    public func prefix(_ count: Int) -> IOVectors {
        unsafe IOVectors(base: base, count: max(0, min(count, capacity)))
    }
}

/// A run of buffers in guest RAM, each checked: what a request may read, or what it may write.
///
/// Where one buffer ends and the next begins means nothing (virtio 1.2 §2.6.4): bytes are found by their offset in the
/// whole run. A value of this type is a view of private iovecs; the removing methods change them in place, so that the
/// rest can go to the kernel as it is.
@safe public struct IOVectors: BitwiseCopyable, @unchecked Sendable {
    // Entries come from GuestRAM's check and can only shrink afterwards.
    /// The first iovec, for `readv`, `writev` and io_uring; valid as long as the pool.
    public private(set) var base: UnsafeMutablePointer<iovec>
    /// The number of iovecs.
    public private(set) var count: Int
    /// Bytes in all.
    public private(set) var byteCount: UInt64

    init(base: UnsafeMutablePointer<iovec>, count: Int, byteCount: UInt64) {
        unsafe self.base = base
        self.count = count
        self.byteCount = byteCount
    }

    init(base: UnsafeMutablePointer<iovec>, count: Int) {
        var bytes: UInt64 = 0
        for index in 0..<count { unsafe bytes &+= UInt64(base[index].iov_len) }
        unsafe self.init(base: base, count: count, byteCount: bytes)
    }

    public var isEmpty: Bool { byteCount == 0 }

    /// The first iovec; nil when there is none.
    public var first: iovec? { unsafe count > 0 ? base[0] : nil }

    // MARK: Values in the run, little-endian

    /// The value at `offset`, wherever the buffers are cut; nil when the run is too short.
    public func load<Value: FixedWidthInteger & BitwiseCopyable>(
        _ type: Value.Type = Value.self, at offset: UInt64 = 0
    ) -> Value? {
        var value: Value = 0
        // A copy of a whole integer, any of whose bit patterns is a value.
        let count = unsafe withUnsafeMutableBytes(of: &value) { unsafe copy(at: offset, to: $0) }
        return count == MemoryLayout<Value>.size ? Value(littleEndian: value) : nil
    }

    /// Stores a value at `offset`; false, with what fits stored, when the run is too short.
    @discardableResult
    public func store<Value: FixedWidthInteger & BitwiseCopyable>(_ value: Value, at offset: UInt64 = 0) -> Bool {
        let count = unsafe withUnsafeBytes(of: value.littleEndian) { unsafe copy(at: offset, from: $0) }
        return count == MemoryLayout<Value>.size
    }

    // MARK: Bytes

    /// Copies from the run, beginning at `offset`; returns how many bytes there were, at most the buffer's size.
    @discardableResult
    public func copy(at offset: UInt64 = 0, to buffer: UnsafeMutableRawBufferPointer) -> Int {
        unsafe forEachPiece(at: offset, count: buffer.count) { piece, done in
            // Each piece lies in a checked buffer; `done` bytes and its length together are at most the buffer's size.
            if let target = buffer.baseAddress { unsafe clinux_copy(target + done, piece.iov_base, piece.iov_len) }
        }
    }

    /// Copies to the run, beginning at `offset`; returns how many bytes it took.
    @discardableResult
    public func copy(at offset: UInt64 = 0, from buffer: UnsafeRawBufferPointer) -> Int {
        unsafe forEachPiece(at: offset, count: buffer.count) { piece, done in
            if let source = buffer.baseAddress { unsafe clinux_copy(piece.iov_base, source + done, piece.iov_len) }
        }
    }

    /// Copies bytes to the run, beginning at `offset`; returns how many it took.
    @discardableResult
    public func copy(at offset: UInt64 = 0, from bytes: RawSpan) -> Int {
        unsafe bytes.withUnsafeBytes { unsafe copy(at: offset, from: $0) }
    }

    /// Sets bytes from `offset` on; returns how many there were, at most `count`.
    @discardableResult
    public func fill(at offset: UInt64 = 0, count: Int, with value: UInt8 = 0) -> Int {
        unsafe forEachPiece(at: offset, count: count) { piece, _ in
            unsafe clinux_fill(piece.iov_base, value, piece.iov_len)
        }
    }

    // MARK: Parts of the run

    /// Drops bytes at the front: a header, or what a short transfer has done. False, and nothing dropped, when there
    /// are fewer.
    @discardableResult
    public mutating func removeFirst(_ bytes: UInt64) -> Bool {
        guard bytes <= byteCount else { return false }
        var rest = Int(bytes)
        while rest > 0 {
            let length = unsafe base[0].iov_len
            if length > rest {
                unsafe base[0].iov_base += rest
                unsafe base[0].iov_len = length - rest
                break
            }
            rest -= length
            unsafe base += 1
            count -= 1
        }
        byteCount -= bytes
        return true
    }

    /// Drops bytes at the end. False, and nothing dropped, when there are fewer.
    @discardableResult
    public mutating func removeLast(_ bytes: UInt64) -> Bool {
        guard bytes <= byteCount else { return false }
        var rest = Int(bytes)
        while rest > 0 {
            let length = unsafe base[count - 1].iov_len
            if length > rest {
                unsafe base[count - 1].iov_len = length - rest
                break
            }
            rest -= length
            count -= 1
        }
        byteCount -= bytes
        return true
    }

    /// Takes the last byte off, to be written later: the status of a block request. Nil when there is none.
    public mutating func removeLastByte() -> GuestByte? {
        guard byteCount > 0 else { return nil }
        let last = unsafe base[count - 1]
        let byte = unsafe GuestByte(location: last.iov_base + (last.iov_len - 1))
        removeLast(1)
        return byte
    }

    /// Hands `body` each contiguous piece of at most `count` bytes from `offset` on, and the bytes before it in the
    /// range.
    private func forEachPiece(at offset: UInt64, count wanted: Int, _ body: (iovec, _ done: Int) -> Void) -> Int {
        guard offset <= byteCount else { return 0 }
        var skip = Int(offset), done = 0, index = 0
        while done < wanted, index < count {
            let entry = unsafe base[index]
            index += 1
            let length = unsafe entry.iov_len
            if skip >= length {
                skip -= length
                continue
            }
            let piece = unsafe iovec(iov_base: entry.iov_base + skip, iov_len: min(length - skip, wanted - done))
            unsafe body(piece, done)
            unsafe done += piece.iov_len
            skip = 0
        }
        return done
    }
}

/// One checked, writable byte of guest RAM.
@safe public struct GuestByte: BitwiseCopyable, @unchecked Sendable {
    // Within a buffer that was checked; guest RAM outlives the device.
    private let location: UnsafeMutableRawPointer

    init(location: UnsafeMutableRawPointer) { unsafe self.location = location }

    public func store(_ value: UInt8) { unsafe clinux_store8(location, value) }
}

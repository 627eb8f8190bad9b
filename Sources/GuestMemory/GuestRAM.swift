// SPDX-License-Identifier: Apache-2.0

public import CLinux

/// One stretch of guest RAM and where this process sees it.
@safe public struct MemoryRegion: BitwiseCopyable, @unchecked Sendable {
    // Sendable: the pointer is only a number here; ``GuestMemory`` keeps what it points to.

    /// The first guest-physical address.
    public let start: GuestAddress
    /// Bytes, a multiple of the page size.
    public let size: UInt64
    /// The address of the mapping in this process, valid as long as the ``GuestMemory`` lives; what KVM wants as
    /// `userspace_addr`.
    public let host: UnsafeMutableRawPointer
    /// The offset in the memfd of shared memory (``GuestMemory/descriptor``), in bytes.
    public let offset: UInt64

    /// The address after its last byte.
    public var end: GuestAddress { start &+ size }
}

/// A view of guest RAM for the threads that work on it: checked, copying, volatile.
///
/// It is two words without reference counting, cheap to copy to each thread. A range must lie in one region; a range
/// of length zero is valid where its address is. Every method may be called by any thread at any time: the guest's
/// CPUs and the kernel write the same memory, so a value is read once, copied, and then checked by its user.
@safe public struct GuestRAM: BitwiseCopyable, @unchecked Sendable {
    // The table is immutable, and ``GuestMemory``, which allocated it, outlives every thread that holds a view
    // (docs/architecture.md). No pointer leaves the view except in an `iovec` for the kernel.
    private let table: UnsafePointer<MemoryRegion>
    private let count: Int

    init(table: UnsafePointer<MemoryRegion>, count: Int) {
        unsafe self.table = table
        self.count = count
    }

    // MARK: Ranges

    /// The range, to be read and written by offset without a further look-up; nil when it is not RAM.
    public func slice(at address: GuestAddress, count: UInt64) -> GuestSlice? {
        guard let start = unsafe host(address, count) else { return nil }
        return unsafe GuestSlice(start: start, count: Int(count))
    }

    /// The range as the kernel wants it in `readv`, `writev` and io_uring; nil when it is not RAM.
    public func iovec(for address: GuestAddress, count: UInt64) -> iovec? {
        guard let start = unsafe host(address, count) else { return nil }
        return unsafe CLinux.iovec(iov_base: start, iov_len: Int(count))
    }

    /// Indicates whether the range is RAM.
    public func contains(_ address: GuestAddress, count: UInt64) -> Bool { unsafe host(address, count) != nil }

    private func range(_ address: GuestAddress, _ count: UInt64) throws(GuestMemoryError) -> GuestSlice {
        guard let slice = slice(at: address, count: count) else { throw .outOfRange(address, count: count) }
        return slice
    }

    /// Where a range is mapped. The one place where a guest-physical address becomes a pointer.
    private func host(_ address: GuestAddress, _ count: UInt64) -> UnsafeMutableRawPointer? {
        for index in 0..<self.count {
            let region = unsafe table[index]
            // Below the region the difference wraps and is larger than any size.
            let offset = address.rawValue &- region.start.rawValue
            if offset < region.size {
                // offset + count may wrap, size − offset cannot.
                guard count <= region.size &- offset else { return nil }
                return unsafe region.host + Int(offset)
            }
        }
        return nil
    }

    // MARK: Values, little-endian as the guest is; any alignment

    public func readUInt8(at address: GuestAddress) throws(GuestMemoryError) -> UInt8 { try range(address, 1).load8(0) }

    public func write(_ value: UInt8, at address: GuestAddress) throws(GuestMemoryError) {
        try range(address, 1).store8(value, 0)
    }
    public func write(_ value: UInt16, at address: GuestAddress) throws(GuestMemoryError) {
        try range(address, 2).store16(value, 0)
    }
    public func write(_ value: UInt32, at address: GuestAddress) throws(GuestMemoryError) {
        try range(address, 4).store32(value, 0)
    }
    public func write(_ value: UInt64, at address: GuestAddress) throws(GuestMemoryError) {
        try range(address, 8).store64(value, 0)
    }

    // MARK: Bytes

    /// Copies a range of guest RAM to a buffer, all or nothing.
    public func read(at address: GuestAddress, into buffer: UnsafeMutableRawBufferPointer) throws(GuestMemoryError) {
        let slice = try range(address, UInt64(buffer.count))
        unsafe slice.copy(to: buffer)
    }

    /// A copy of a range of guest RAM.
    public func readBytes(at address: GuestAddress, count: Int) throws(GuestMemoryError) -> [UInt8] {
        let slice = try range(address, UInt64(max(0, count)))
        // The buffer is as long as the range, and all of it is written.
        return unsafe [UInt8](unsafeUninitializedCapacity: slice.count) { buffer, initialized in
            unsafe slice.copy(to: UnsafeMutableRawBufferPointer(buffer))
            initialized = slice.count
        }
    }

    /// Copies bytes to guest RAM, all or nothing.
    public func write(_ bytes: RawSpan, at address: GuestAddress) throws(GuestMemoryError) {
        let slice = try range(address, UInt64(bytes.byteCount))
        unsafe bytes.withUnsafeBytes { unsafe slice.copy(from: $0) }
    }

    /// Copies bytes to guest RAM, all or nothing.
    public func write(_ bytes: [UInt8], at address: GuestAddress) throws(GuestMemoryError) {
        unsafe try write(bytes.span.bytes, at: address)  // bytes have no padding
    }

    /// Sets every byte of a range.
    public func fill(at address: GuestAddress, count: UInt64, with value: UInt8 = 0) throws(GuestMemoryError) {
        try range(address, count).fill(value)
    }
}

/// A checked range in one region of guest RAM: a ring, a descriptor table.
///
/// Offsets come from its user's own arithmetic, masked or compared before, never straight from the guest. They are
/// verified nevertheless: a mistake there ends the process before it can touch memory that is not the guest's.
@safe public struct GuestSlice: BitwiseCopyable, @unchecked Sendable {
    // Valid as long as the ``GuestRAM`` it comes from, for the same reason; `start + count` was checked there.
    private let start: UnsafeMutableRawPointer
    /// The length in bytes.
    public let count: Int

    init(start: UnsafeMutableRawPointer, count: Int) {
        unsafe self.start = start
        self.count = count
    }

    private func at(_ offset: Int, _ width: Int) -> UnsafeMutableRawPointer {
        precondition(offset >= 0 && width <= count && offset <= count &- width, "offset beyond a slice of guest RAM")
        return unsafe start + offset
    }

    // One volatile access each; any alignment.
    public func load8(_ offset: Int) -> UInt8 { unsafe clinux_load8(at(offset, 1)) }
    public func load16(_ offset: Int) -> UInt16 { unsafe clinux_load16(at(offset, 2)) }
    public func load32(_ offset: Int) -> UInt32 { unsafe clinux_load32(at(offset, 4)) }
    public func load64(_ offset: Int) -> UInt64 { unsafe clinux_load64(at(offset, 8)) }
    public func store8(_ value: UInt8, _ offset: Int) { unsafe clinux_store8(at(offset, 1), value) }
    public func store16(_ value: UInt16, _ offset: Int) { unsafe clinux_store16(at(offset, 2), value) }
    public func store32(_ value: UInt32, _ offset: Int) { unsafe clinux_store32(at(offset, 4), value) }
    public func store64(_ value: UInt64, _ offset: Int) { unsafe clinux_store64(at(offset, 8), value) }

    /// Loads before every later access of this thread; the offset is even in guest-physical memory.
    public func loadAcquire16(_ offset: Int) -> UInt16 { unsafe clinux_load_acquire16(at(offset, 2)) }
    /// Stores after every earlier access of this thread; aligned to 2.
    public func storeRelease16(_ value: UInt16, _ offset: Int) { unsafe clinux_store_release16(at(offset, 2), value) }

    /// Copies the slice to the start of `buffer`, which is at least as long.
    func copy(to buffer: UnsafeMutableRawBufferPointer) {
        guard let target = buffer.baseAddress, buffer.count >= count else { return }
        unsafe clinux_copy(target, start, count)
    }

    /// Copies `buffer`, which is at most as long, to the start of the slice.
    func copy(from buffer: UnsafeRawBufferPointer) {
        guard let source = buffer.baseAddress, buffer.count <= count else { return }
        unsafe clinux_copy(start, source, buffer.count)
    }

    func fill(_ value: UInt8) { unsafe clinux_fill(start, value, count) }
}

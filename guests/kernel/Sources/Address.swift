// SPDX-License-Identifier: Apache-2.0

import _Volatile

/// A physical address, which is also a virtual one (the page tables map each address to itself). Memory that others may
/// change, such as device registers and rings, is accessed through this type: each access happens exactly once, in
/// program order and in its full width.
struct Address: Equatable {
    var value: UInt64

    init(_ value: UInt64) { self.value = value }

    static func + (address: Address, offset: UInt64) -> Address { Address(address.value &+ offset) }
    static func + (address: Address, offset: Int) -> Address {
        Address(address.value &+ UInt64(truncatingIfNeeded: offset))
    }
    static func - (end: Address, start: Address) -> UInt64 { end.value &- start.value }

    // The four accesses: the address may be used because the allocator, a table of the platform or a device's
    // description gave it; an invalid one faults and is reported.
    func load(_ offset: UInt64 = 0) -> UInt8 {
        unsafe VolatileMappedRegister<UInt8>(unsafeBitPattern: UInt(value &+ offset)).load()
    }
    func load(_ offset: UInt64 = 0) -> UInt16 {
        unsafe VolatileMappedRegister<UInt16>(unsafeBitPattern: UInt(value &+ offset)).load()
    }
    func load(_ offset: UInt64 = 0) -> UInt32 {
        unsafe VolatileMappedRegister<UInt32>(unsafeBitPattern: UInt(value &+ offset)).load()
    }
    func load(_ offset: UInt64 = 0) -> UInt64 {
        unsafe VolatileMappedRegister<UInt64>(unsafeBitPattern: UInt(value &+ offset)).load()
    }
    func store(_ new: UInt8, _ offset: UInt64 = 0) {
        unsafe VolatileMappedRegister<UInt8>(unsafeBitPattern: UInt(value &+ offset)).store(new)
    }
    func store(_ new: UInt16, _ offset: UInt64 = 0) {
        unsafe VolatileMappedRegister<UInt16>(unsafeBitPattern: UInt(value &+ offset)).store(new)
    }
    func store(_ new: UInt32, _ offset: UInt64 = 0) {
        unsafe VolatileMappedRegister<UInt32>(unsafeBitPattern: UInt(value &+ offset)).store(new)
    }
    func store(_ new: UInt64, _ offset: UInt64 = 0) {
        unsafe VolatileMappedRegister<UInt64>(unsafeBitPattern: UInt(value &+ offset)).store(new)
    }

    /// Sets `count` bytes to `byte`.
    func fill(count: UInt64, with byte: UInt8 = 0) {
        // Memory that the caller owns, as above.
        unsafe UnsafeMutableRawPointer(bitPattern: UInt(value))?.initializeMemory(
            as: UInt8.self, repeating: byte, count: Int(count))
    }

    /// Copies `count` bytes from `source`; the two may overlap.
    func copy(from source: Address, count: UInt64) {
        guard count > 0, let to = unsafe UnsafeMutableRawPointer(bitPattern: UInt(value)),
            let from = unsafe UnsafeRawPointer(bitPattern: UInt(source.value))
        else { return }
        unsafe to.copyMemory(from: from, byteCount: Int(count))  // both ranges are the caller's, as above
    }

    /// The `count` bytes from here.
    func bytes(_ count: Int) -> [UInt8] {
        unsafe [UInt8](unsafeUninitializedCapacity: count) { buffer, initialized in
            // The array's own storage is written in full, from a range that is the caller's.
            if let base = buffer.baseAddress {
                Address(UInt64(UInt(bitPattern: base))).copy(from: self, count: UInt64(count))
            }
            initialized = count
        }
    }

    /// Writes `bytes` from here on.
    func write(_ bytes: [UInt8]) {
        unsafe bytes.withUnsafeBytes { buffer in
            // Read within the array's closure.
            if let base = buffer.baseAddress {
                copy(from: Address(UInt64(UInt(bitPattern: base))), count: UInt64(buffer.count))
            }
        }
    }
}

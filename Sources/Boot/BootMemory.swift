// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory
internal import Linux

/// Guest RAM as Boot writes it: addresses as numbers, errors as ``BootError``.
struct BootMemory {
    private let ram: GuestRAM
    /// Bytes of RAM in all.
    let size: UInt64

    init(_ memory: GuestMemory) {
        ram = memory.ram
        size = memory.size
    }

    func write(_ bytes: [UInt8], at address: UInt64) throws(BootError) {
        try wrapping { () throws(GuestMemoryError) in try ram.write(bytes, at: GuestAddress(address)) }
    }

    /// Writes 64-bit words, least significant byte first as this processor has them.
    func write(_ words: [UInt64], at address: UInt64) throws(BootError) {
        // Integers have no padding.
        try wrapping { () throws(GuestMemoryError) in unsafe try ram.write(words.span.bytes, at: GuestAddress(address))
        }
    }

    func clear(_ address: UInt64, count: UInt64) throws(BootError) {
        try wrapping { () throws(GuestMemoryError) in try ram.fill(at: GuestAddress(address), count: count) }
    }

    /// Puts a part of a file into RAM: by pread(2) straight to its place, or by one copy.
    func load(_ file: BootFile, at offset: UInt64, count: UInt64, to address: UInt64) throws(BootError) {
        guard count > 0 else { return }
        guard let target = unsafe ram.iovec(for: GuestAddress(address), count: count) else {
            throw .memory(.outOfRange(GuestAddress(address), count: count))
        }
        // The range was checked just now; the mapping lives as long as the `GuestMemory` that the caller holds.
        unsafe try file.read(
            at: offset, into: UnsafeMutableRawBufferPointer(start: target.iov_base, count: target.iov_len))
    }

    private func wrapping(_ body: () throws(GuestMemoryError) -> Void) throws(BootError) {
        do { try body() } catch { throw .memory(error) }
    }
}

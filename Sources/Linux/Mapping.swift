// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc

/// A range of this process's address space from `mmap`; unmapped when the value ends.
@safe public struct Mapping: ~Copyable, @unchecked Sendable {
    /// The first byte. A user of it keeps the mapping alive and stays within `size`.
    public let start: UnsafeMutableRawPointer
    /// Length in bytes, a multiple of the page size.
    public let size: Int

    /// Maps memory; the arguments are those of mmap(2).
    /// - Parameters:
    ///   - size: bytes, greater than 0.
    ///   - descriptor: what to map, or -1 with `MAP_ANONYMOUS` in `flags`.
    public init(
        size: Int, protection: Int32 = PROT_READ | PROT_WRITE, flags: Int32, descriptor: Int32 = -1, offset: UInt64 = 0
    )
        throws(SystemCallError)
    {
        let address = unsafe mmap(nil, size, protection, flags, descriptor, off_t(truncatingIfNeeded: offset))
        guard let address = unsafe address, unsafe address != clinux_map_failed() else { throw .last("mmap") }
        unsafe start = address
        self.size = size
    }

    deinit {
        unsafe munmap(start, size)
    }
}

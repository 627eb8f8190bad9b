// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc
public import Linux

/// Memory that a running guest gives up, and takes again.
///
/// A range is bytes from the first one of the memory, lower memory before higher, as ``MemoryRegion/offset`` counts
/// them.
extension GuestMemory {
    /// Where a range of guest-physical addresses is in the memory; nil when it is not in one region of RAM.
    public func offset(of address: GuestAddress, count: UInt64) -> UInt64? {
        for region in regions {
            // Below the region the difference wraps and is larger than any size.
            let distance = address.rawValue &- region.start.rawValue
            guard distance < region.size else { continue }
            return count <= region.size &- distance ? region.offset &+ distance : nil
        }
        return nil
    }

    /// Where a buffer that ``GuestRAM`` has checked is in the memory; nil when it is not a part of this one.
    public func offset(of buffer: iovec) -> UInt64? {
        // Only its number.
        let start = unsafe UInt64(UInt(bitPattern: buffer.iov_base))
        let distance = unsafe start &- UInt64(UInt(bitPattern: regions[0].host))
        guard distance < size, unsafe UInt64(buffer.iov_len) <= size &- distance else { return nil }
        return distance
    }

    /// Returns whole pages to the host; they read as zero from now on, and are allocated again when they are accessed.
    ///
    /// Any thread may call it while the guest runs. What the kernel has pinned, for an operation on the way, it keeps
    /// until that ends: the operation then works on a page that is not the guest's any more.
    /// - Parameters:
    ///   - offset: bytes, a multiple of the backing's page size.
    ///   - count: bytes, the same; the range lies in the memory.
    public func release(offset: UInt64, count: UInt64) throws(SystemCallError) {
        try advise(offset: offset, count: count, descriptor == nil ? MADV_DONTNEED : MADV_REMOVE)
    }

    /// Has the kernel allocate whole pages that are not there, as an access to them would: the same parameters.
    /// - Throws: when there are none, instead of the SIGBUS that an access would be.
    public func allocate(offset: UInt64, count: UInt64) throws(SystemCallError) {
        try advise(offset: offset, count: count, MADV_POPULATE_WRITE)
    }

    private func advise(offset: UInt64, count: UInt64, _ advice: Int32) throws(SystemCallError) {
        precondition(offset <= size && count <= size - offset, "a run beyond the memory's end")
        // The range lies within the mapping, which begins with the first region and has `size` bytes.
        while unsafe madvise(regions[0].host + Int(offset), Int(count), advice) < 0 {
            switch errno {
            case EINTR, EAGAIN: continue
            default: throw .last("madvise")
            }
        }
    }
}

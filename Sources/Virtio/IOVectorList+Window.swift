// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// For a device that holds several chains at a time in one list, popped behind each other, and takes them off its
/// front.
extension IOVectorList {
    /// Entries `first` … `first + count − 1` as one run; fewer where the list ends.
    public func run(from first: Int, count: Int) -> IOVectors {
        let first = max(0, min(first, capacity))
        // Within the list, by the line above and the minimum.
        return unsafe IOVectors(base: base + first, count: max(0, min(count, capacity - first)))
    }

    /// Moves `count` entries, from `first` on, to the list's front.
    public func moveToFront(from first: Int, count: Int) {
        precondition(first >= 0 && count >= 0 && first <= capacity - count, "no such entries in the list")
        unsafe memmove(base, base + first, count * MemoryLayout<iovec>.stride)
    }

    /// Makes entry `index` a buffer of this process's own, which lives as long as the list is used.
    public func set(_ index: Int, to buffer: UnsafeMutableRawBufferPointer) {
        precondition(index >= 0 && index < capacity, "no such entry in the list")
        unsafe base[index] = iovec(iov_base: buffer.baseAddress, iov_len: buffer.count)
    }

    /// Copies the entries of a run, behind its first `skip` bytes and at most `limit` bytes of them, to this list.
    /// - Parameter first: the entry to begin with; what the list has no room for is left out.
    /// - Returns: entries and bytes that were added.
    public func append(
        _ run: IOVectors, skipping skip: UInt64, limit: UInt64, at first: Int
    ) -> (entries: Int, bytes: UInt64) {
        precondition(first >= 0, "no such entry in the list")
        var skip = skip, bytes: UInt64 = 0, entries = 0
        for index in 0..<run.count where bytes < limit && first + entries < capacity {
            // Within the run, by its count.
            let entry = unsafe run.base[index]
            let length = unsafe UInt64(entry.iov_len)
            if skip >= length {
                skip -= length
                continue
            }
            let count = min(length - skip, limit - bytes)
            // Within this list, by the loop's condition; a part of a checked buffer.
            unsafe base[first + entries] = iovec(iov_base: entry.iov_base + Int(skip), iov_len: Int(count))
            skip = 0
            bytes += count
            entries += 1
        }
        return (entries, bytes)
    }
}

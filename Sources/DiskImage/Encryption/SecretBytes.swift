// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Bytes that nobody else is to see: kept out of swap and core dumps as far as the host lets us, and overwritten when they go.
@safe final class SecretBytes: @unchecked Sendable {
    // They do not change once they are made: hence `Sendable`.
    private let mapping: Mapping
    let count: Int

    /// Memory for `count` bytes, zeroes at first, which `fill` writes.
    /// - Parameter path: whose secret it is, for the error that there is no memory.
    init(_ count: Int, of path: String, _ fill: (UnsafeMutableRawBufferPointer) throws(DiskImageError) -> Void) throws(DiskImageError) {
        let mapping: Mapping
        do { mapping = try Mapping(size: max(1, count), flags: MAP_PRIVATE | MAP_ANONYMOUS) } catch { throw .system(path: path, error) }
        // A limit of locked memory is no reason to do without the disk.
        _ = unsafe mlock(mapping.start, mapping.size)
        _ = unsafe madvise(mapping.start, mapping.size, MADV_DONTDUMP)
        self.count = count
        self.mapping = mapping
        // The mapping holds `count` bytes.
        try unsafe fill(UnsafeMutableRawBufferPointer(start: self.mapping.start, count: count))
    }

    deinit {
        // Not to be left out by a compiler, as memset could be.
        unsafe explicit_bzero(mapping.start, mapping.size)
    }

    /// The bytes, which are there for as long as `body` runs.
    func withBytes<Answer>(_ body: (UnsafeRawBufferPointer) -> Answer) -> Answer {
        // Whoever has the last reference may let go of it while the bytes are used.
        withExtendedLifetime(self) { unsafe body(UnsafeRawBufferPointer(start: mapping.start, count: count)) }
    }

    /// Indicates whether two secrets are the same, in a time that tells nothing about where they are not.
    func isEqual(to other: [UInt8]) -> Bool {
        guard other.count == count else { return false }
        var difference: UInt8 = 0
        // Both have `count` bytes.
        unsafe withBytes { bytes in for index in 0..<count { unsafe difference |= bytes[index] ^ other[index] } }
        return difference == 0
    }
}

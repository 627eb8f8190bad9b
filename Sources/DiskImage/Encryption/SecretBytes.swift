// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Secret bytes: kept out of swap, core dumps and child processes as far as the host allows it, and overwritten before
/// they are freed.
final class SecretBytes: @unchecked Sendable {
    // They do not change once they are made: hence `Sendable`.
    private let buffer: IOBuffer
    var count: Int { buffer.count }

    /// Memory for `count` bytes, zeroes at first, which `fill` writes.
    /// - Parameter path: whose secret it is, for the error that there is no memory.
    init(_ count: Int, of path: String, _ fill: (IOMemory) throws(DiskImageError) -> Void) throws(DiskImageError) {
        buffer = try IOBuffer(count: count, path)
        // A limit of locked memory is no reason to do without the disk.
        buffer.memory.lock()
        buffer.memory.advise(MADV_DONTDUMP)
        buffer.memory.advise(MADV_DONTFORK)
        try fill(buffer.memory)
    }

    /// A copy of some bytes.
    convenience init(_ bytes: [UInt8], of path: String) throws(DiskImageError) {
        try self.init(bytes.count, of: path) { memory in bytes.withReadableIOMemory { memory.copy(from: $0) } }
    }

    // Not to be left out by a compiler, as memset could be.
    deinit { buffer.memory.erase() }

    /// The bytes, which are there for as long as `body` runs, and are only read.
    func withBytes<Answer>(_ body: (IOMemory) -> Answer) -> Answer {
        // The last reference may be released while the bytes are used.
        withExtendedLifetime(self) { body(buffer.memory) }
    }

    /// Indicates whether two secrets are the same, in a time that does not depend on where they differ.
    func isEqual(to other: [UInt8]) -> Bool {
        guard other.count == count else { return false }
        var difference: UInt8 = 0
        withBytes { bytes in for index in 0..<count { difference |= bytes.load(index) ^ other[index] } }
        return difference == 0
    }
}

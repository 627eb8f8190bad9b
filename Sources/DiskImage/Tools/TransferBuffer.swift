// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Memory for large transfers, in huge pages where the host gives them: then a transfer around the page cache consists
/// of a few long pieces of physical memory rather than of many pages, which disks carry out twice as fast. It takes no
/// memory before it is touched.
struct TransferBuffer: ~Copyable {
    /// All of it, from a multiple of ``alignment`` on. A user of it keeps the buffer.
    let memory: IOMemory
    private let buffer: IOBuffer

    static let alignment = 2 << 20

    /// - Parameter path: for the error that there is no memory.
    init(_ size: Int, _ path: String) throws(DiskImageError) {
        buffer = try IOBuffer(count: size + Self.alignment, path)
        memory = buffer.piece(buffer.memory.gap(to: Self.alignment), size)
        // Small pages do as well where it is refused.
        memory.advise(MADV_HUGEPAGE)
    }
}

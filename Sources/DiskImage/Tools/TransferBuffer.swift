// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Memory for large transfers, in huge pages where the host gives them: then a transfer around the page cache consists of a few long
/// pieces of physical memory rather than of many pages, which disks carry out twice as fast. It takes no memory before it is touched.
@safe struct TransferBuffer: ~Copyable {
    /// The first byte, at a multiple of ``alignment``. Whoever uses it keeps the buffer alive and stays within ``size``.
    let start: UnsafeMutableRawPointer
    /// Bytes.
    let size: Int
    private let mapping: Mapping

    static let alignment = 2 << 20

    /// - Parameter path: for the error that there is no memory.
    init(_ size: Int, _ path: String) throws(DiskImageError) {
        mapping = try memory(size + Self.alignment, path)
        let gap = unsafe (0 &- Int(bitPattern: mapping.start)) & (Self.alignment - 1)
        // Less than what the mapping is larger by.
        unsafe start = mapping.start + gap
        self.size = size
        // Small pages do as well where it is refused.
        unsafe madvise(start, size, MADV_HUGEPAGE)
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

extension GuestMemory {
    /// Clears all memory to zero for the reset of a stopped guest.
    ///
    /// Ordinary pages go back to the host, so the time it takes depends on how many there are. Huge pages stay and are
    /// filled with zeros: the kernel need not keep the reservation of a page that is freed.
    /// - Parameter isInterrupted: polled by each of the threads that do it: whether to cancel.
    /// - Throws: ``GuestMemoryError/interrupted``; ``GuestMemoryError/refused(size:_:)`` when the kernel does not take
    ///   pages back.
    public func clear(isInterrupted: @escaping @Sendable () -> Bool = { false }) throws(GuestMemoryError) {
        guard case .hugePages(let page) = backing else { return try discard(isInterrupted: isInterrupted) }
        let pages = Int(size / page.bytes)
        let workers = max(1, min(usableProcessors, 64, pages))
        withParallelWorkers(workers, named: "clear") { [self] worker in
            for index in stride(from: worker, to: pages, by: workers) where !isInterrupted() {
                zero(page: index, size: Int(page.bytes))
            }
        }
        if isInterrupted() { throw .interrupted }
    }

    /// Returns the pages to the host; those of a memfd are removed from the file too.
    private func discard(isInterrupted: () -> Bool) throws(GuestMemoryError) {
        // In steps of a few milliseconds.
        let step = 1 << 30
        for offset in stride(from: 0, to: Int(size), by: step) {
            if isInterrupted() { throw .interrupted }
            let count = min(step, Int(size) - offset)
            // The range lies within the mapping, which begins with the first region and has `size` bytes.
            let status = unsafe madvise(
                regions[0].host + offset, count, descriptor == nil ? MADV_DONTNEED : MADV_REMOVE)
            if status < 0 { throw .refused(size: UInt64(count), .last("madvise")) }
        }
    }

    /// Fills a huge page with zeros in pieces that fit in the processor's cache, leaving out what was never touched.
    private func zero(page index: Int, size pageSize: Int) {
        let piece = 2 << 20
        for offset in stride(from: index * pageSize, to: (index + 1) * pageSize, by: piece) {
            // One page of the mapping, whose number of them is `size / pageSize`.
            let start = unsafe regions[0].host + offset
            guard unsafe clinux_is_resident(start) != 0 else { return }
            unsafe clinux_fill(start, 0, piece)
        }
    }
}

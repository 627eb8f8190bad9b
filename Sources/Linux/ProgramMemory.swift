// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// The memory of the program itself: its code, its constants and its heap.
public enum ProgramMemory {
    /// Has threads that start from now on allocate in the heap of the first thread.
    ///
    /// The C library gives threads heaps of their own: some system calls and at least a page each, for threads that
    /// allocate nearly nothing once they run.
    public static func useOneHeap() { clinux_use_one_heap() }

    /// Frees what only the start needed: pages of code and constants, and free pages of the heap.
    ///
    /// The kernel maps sixteen pages around each one that is touched, or a whole huge page where the page cache has
    /// one. After the start most of them are never needed again, and what is comes back from the page cache, in few
    /// faults, since the linker puts the functions of a running machine next to each other (Sources/order.txt). For
    /// use once or twice, when a process that lives long has started.
    public static func release() {
        _ = clinux_release_program_text()
        clinux_trim_heap()
    }
}

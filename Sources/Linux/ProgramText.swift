// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// The program's own code in memory.
public enum ProgramText {
    /// Frees the pages of code that only the start needed.
    ///
    /// The kernel maps sixteen pages around each one that is touched, or a whole huge page where the page cache has
    /// one. After the start most of them are never needed again, and what is comes back from the page cache. For use
    /// once, when a process that lives long has started.
    public static func release() { _ = clinux_release_program_text() }
}

// SPDX-License-Identifier: Apache-2.0
// The program's own image, by the names that the linker gives to its parts.
#ifndef CLINUX_PROGRAM_H
#define CLINUX_PROGRAM_H

#include <stdint.h>
#include <sys/mman.h>

extern const char __executable_start[], etext[];

/// Drops the pages between the program's start and the end of its code from this process. They are read-only pages of the
/// program's file: those that are needed again come back from the page cache, and in small pieces, not as huge pages.
static inline int clinux_release_program_text(void) {
    uintptr_t page = 4096;
    uintptr_t start = ((uintptr_t)__executable_start + page - 1) & ~(page - 1), end = (uintptr_t)etext & ~(page - 1);
    madvise((void *)start, end - start, MADV_NOHUGEPAGE);
    return madvise((void *)start, end - start, MADV_DONTNEED);
}

#endif

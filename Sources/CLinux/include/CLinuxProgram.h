// SPDX-License-Identifier: Apache-2.0
// The program's own image, by the names that the linker gives to its parts, and its heap.
#ifndef CLINUX_PROGRAM_H
#define CLINUX_PROGRAM_H

#include <malloc.h>
#include <stdint.h>
#include <sys/mman.h>

extern const char __executable_start[], etext[];

/// Drops the pages between the program's start and the end of its code, constants among them, from this process. They are
/// read-only pages of the program's file: those that are needed again come back from the page cache, and in small pieces,
/// not as huge pages.
static inline int clinux_release_program_text(void) {
    uintptr_t page = 4096;
    uintptr_t start = ((uintptr_t)__executable_start + page - 1) & ~(page - 1), end = (uintptr_t)etext & ~(page - 1);
    madvise((void *)start, end - start, MADV_NOHUGEPAGE);
    return madvise((void *)start, end - start, MADV_DONTNEED);
}

/// Gives threads that start from now on no heaps of their own.
static inline void clinux_use_one_heap(void) { mallopt(M_ARENA_MAX, 1); }

/// Returns the free pages of the heap to the kernel.
static inline void clinux_trim_heap(void) { malloc_trim(0); }

#endif

// SPDX-License-Identifier: Apache-2.0
// Memory that others change while it is read: guest RAM and rings shared with the kernel.
// Each access is one volatile or atomic instruction of the width its name gives, so the compiler can neither
// split, repeat nor drop it. Addresses need not be aligned for the plain forms (x86 allows it); the acquire and
// release forms want natural alignment, which the virtqueue layout guarantees (virtio 1.2 §2.7).
#ifndef CLINUX_ATOMICS_H
#define CLINUX_ATOMICS_H

#include <stdint.h>
#include <string.h>

#define CLINUX_VOLATILE(bits)                                                                     \
    typedef uint##bits##_t __attribute__((aligned(1), may_alias)) clinux_u##bits;                 \
    static inline uint##bits##_t clinux_load##bits(const void *p) {                               \
        return *(const volatile clinux_u##bits *)p;                                               \
    }                                                                                             \
    static inline void clinux_store##bits(void *p, uint##bits##_t v) {                            \
        *(volatile clinux_u##bits *)p = v;                                                        \
    }                                                                                             \
    static inline uint##bits##_t clinux_load_acquire##bits(const void *p) {                       \
        return __atomic_load_n((const uint##bits##_t *)p, __ATOMIC_ACQUIRE);                      \
    }                                                                                             \
    static inline void clinux_store_release##bits(void *p, uint##bits##_t v) {                    \
        __atomic_store_n((uint##bits##_t *)p, v, __ATOMIC_RELEASE);                               \
    }

CLINUX_VOLATILE(8)
CLINUX_VOLATILE(16)
CLINUX_VOLATILE(32)
CLINUX_VOLATILE(64)
#undef CLINUX_VOLATILE

/// Orders every earlier load and store before every later one, as the other processor sees them.
static inline void clinux_full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/// Copies between guest RAM and private memory. The compiler may not look through it, so what was copied
/// is what gets checked: the source is read once.
static inline void clinux_copy(void *to, const void *from, size_t count) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

/// Fills guest RAM with one byte value.
static inline void clinux_fill(void *to, uint8_t value, size_t count) {
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
}

#endif

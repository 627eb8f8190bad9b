// SPDX-License-Identifier: Apache-2.0
// C functions of the benchmark: plain reads and writes of a TAP, packets from the host's side, the time-stamp counter.
#ifndef CBENCH_H
#define CBENCH_H

#include <stddef.h>
#include <stdint.h>

/// Creates the TAP `name` with 12-byte packet headers and brings it up; a blocking descriptor, or a negative errno value.
int bench_tap_open(const char *name);

/// A packet socket on the interface `name`; a descriptor, or a negative errno value.
int bench_packet_socket(const char *name);

/// Sends `count` frames of `size` bytes from the host's side of an interface. 0, or a negative errno value.
int bench_inject(int socket, unsigned count, size_t size);

/// Writes `count` frames of `size` bytes to a TAP, one system call each. 0, or a negative errno value.
int bench_tap_write(int tap, unsigned count, size_t size);

/// Reads `count` frames of `size` bytes from a TAP, one system call each; others are not counted. 0, or a negative errno value.
int bench_tap_read(int tap, unsigned count, size_t size);

/// A frame that nobody receives: a multicast address, a local experimental type.
void bench_frame(uint8_t *frame, size_t size);

/// The time-stamp counter.
static inline uint64_t bench_ticks(void) { return __builtin_ia32_rdtsc(); }

#endif

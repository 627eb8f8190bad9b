// SPDX-License-Identifier: Apache-2.0
// Linked into the tests only: takes libc's place for malloc and counts.
#ifndef CALLOCATIONCOUNTER_H
#define CALLOCATIONCOUNTER_H

/// How often the calling thread has allocated memory since it started.
unsigned long allocation_count(void);

#endif

// SPDX-License-Identifier: Apache-2.0
// Functions for the programs of the comparison.
#pragma once
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static inline double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/// Ends the program, and with it the guest, when a call has failed. The line is what the console shows.
static inline long check(long result, const char *what) {
    if (result < 0) {
        printf("lab: FAILED %s: %s\n", what, strerror(errno));
        fflush(stdout);
        exit(1);
    }
    return result;
}

/// A figure: bytes or operations per second.
static inline void report(const char *name, double perSecond) { printf("lab: figure %s %.3f\n", name, perSecond); }

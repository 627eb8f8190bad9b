// SPDX-License-Identifier: Apache-2.0
// What a signal handler prints.

#ifndef LINE_H
#define LINE_H

#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

/// A line that is put together without the C library's formatting, which a signal handler may not use.
struct line {
    char text[400];
    size_t count;
};

static inline void add(struct line *line, const char *text) {
    while (*text && line->count < sizeof line->text - 1) line->text[line->count++] = *text++;
}

static inline void add_number(struct line *line, uint64_t number, unsigned base) {
    char digits[24], *start = digits + sizeof digits;
    *--start = 0;
    do *--start = "0123456789abcdef"[number % base];
    while ((number /= base) != 0);
    add(line, start);
}

/// Writes the line to standard error, whose reader is waited for so many milliseconds.
static inline void say(const struct line *line, int patience) {
    struct pollfd output = {.fd = STDERR_FILENO, .events = POLLOUT};
    // One write of less than a pipe's buffer. Its failure cannot be reported anywhere.
    if (poll(&output, 1, patience) == 1 && write(STDERR_FILENO, line->text, line->count) < 0) return;
}

#endif

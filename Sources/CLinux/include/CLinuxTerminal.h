// SPDX-License-Identifier: Apache-2.0
// The guardian of the terminal's mode: forked code, which must stay within what fork allows.
#ifndef CLINUX_TERMINAL_H
#define CLINUX_TERMINAL_H

#include <sys/types.h>
#include <termios.h>

int clinux_pipe_cloexec(int ends[2]);
int clinux_accept_nonblocking(int listener);

/// Forks a child, in a session of its own, that waits until `read_end` is at its end, that is, until every holder of the pipe's other end is
/// gone, then sets the terminal's mode, if the terminal is still in the raw mode that cfmakeraw makes of it, and exits. The child closes all
/// descriptors but those two, so it keeps nothing of the parent's alive.
/// Returns the child's process ID, or -1.
pid_t clinux_guard_terminal(int terminal, const struct termios *mode, int read_end);

#endif

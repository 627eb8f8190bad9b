// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CLinux.h"

#include <limits.h>

int clinux_pipe_cloexec(int ends[2]) { return pipe2(ends, O_CLOEXEC); }

int clinux_accept_nonblocking(int listener) { return accept4(listener, 0, 0, SOCK_CLOEXEC | SOCK_NONBLOCK); }

/// Closes the open ones of these descriptors, however many their numbers are.
static void close_range_of(int first, int last) {
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0) return;
    // Before Linux 5.9: as many as the process may have now.
    int end = getdtablesize();
    for (int fd = first; fd <= last && fd < end; fd++) close(fd);
}

pid_t clinux_guard_terminal(int terminal, const struct termios *mode, int read_end) {
    pid_t child = fork();
    if (child != 0) return child;

    // The keys and signals of the terminal are for the parent. What kills the parent's whole group or session leaves this process to do its work.
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, 0);
    setsid();
    // Not what `pkill swkvm` kills, too: the terminal would stay raw.
    prctl(PR_SET_NAME, "vm-terminal");
    int low = terminal < read_end ? terminal : read_end, high = terminal < read_end ? read_end : terminal;
    close_range_of(0, low - 1);
    close_range_of(low + 1, high - 1);
    close_range_of(high + 1, INT_MAX);
    char byte;
    ssize_t count;
    while ((count = read(read_end, &byte, 1)) < 0 && errno == EINTR) {}
    // The parent has restored it.
    if (count > 0) _exit(0);
    // A mode that is not the parent's is a shell's, which has the terminal already. SIGTTOU is blocked, so no job control stops this.
    struct termios now, raw = *mode;
    cfmakeraw(&raw);
    if (tcgetattr(terminal, &now) == 0 && now.c_iflag == raw.c_iflag && now.c_oflag == raw.c_oflag && now.c_lflag == raw.c_lflag)
        tcsetattr(terminal, TCSADRAIN, mode);
    _exit(0);
}

#define _GNU_SOURCE
#include "CLinux.h"

int clinux_pipe_cloexec(int ends[2]) { return pipe2(ends, O_CLOEXEC); }

int clinux_accept_nonblocking(int listener) { return accept4(listener, 0, 0, SOCK_CLOEXEC | SOCK_NONBLOCK); }

pid_t clinux_guard_terminal(int terminal, const struct termios *mode, int read_end, int write_end) {
    pid_t child = fork();
    if (child != 0) return child;

    // The keys and signals of the terminal are for the parent; so is its process group's fate.
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, 0);
    prctl(PR_SET_NAME, "swkvm-terminal");
    close(write_end);
    for (int fd = 0; fd < 1024; fd++)
        if (fd != terminal && fd != read_end) close(fd);
    char byte;
    while (read(read_end, &byte, 1) < 0 && errno == EINTR) {}
    // SIGTTOU is blocked, so this works from the background too.
    tcsetattr(terminal, TCSADRAIN, mode);
    _exit(0);
}

// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CLinux.h"

#include <stdio.h>

int clinux_lock_process_file(int fd) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &lock);
}

pid_t clinux_process_file_owner(int fd) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(fd, F_GETLK, &lock) < 0) return -1;
    if (lock.l_type == F_UNLCK) return 0;
    if (lock.l_pid > 0) return lock.l_pid;
    // Of another PID namespace.
    errno = ESRCH;
    return -1;
}

int clinux_pidfd_open(pid_t process) { return (int)syscall(SYS_pidfd_open, process, 0); }

int clinux_pidfd_send_signal(int process, int number) { return (int)syscall(SYS_pidfd_send_signal, process, number, NULL, 0); }

/// Copies what a file has from an offset on to standard error.
static void show(int file, off_t offset) {
    char bytes[4096];
    ssize_t count;
    while ((count = pread(file, bytes, sizeof bytes, offset)) > 0) {
        if (write(STDERR_FILENO, bytes, (size_t)count) < 0) return;
        offset += count;
    }
}

int clinux_detach(int messages) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) return -1;
    off_t before = lseek(messages, 0, SEEK_END);
    pid_t child = fork();
    if (child < 0) {
        int error = errno;
        close(ends[0]);
        close(ends[1]);
        errno = error;
        return -1;
    }
    if (child == 0) {
        close(ends[0]);
        setsid();
        int null = open("/dev/null", O_RDWR | O_CLOEXEC);
        // Without /dev/null there is nothing to read, and reading says so.
        if (null >= 0) dup2(null, STDIN_FILENO);
        if (null > STDERR_FILENO) close(null);
        dup2(messages, STDOUT_FILENO);
        dup2(messages, STDERR_FILENO);
        return ends[1];
    }
    close(ends[1]);
    char byte;
    ssize_t count;
    while ((count = read(ends[0], &byte, 1)) < 0 && errno == EINTR) {}
    int status = 0;
    if (count != 1) {
        while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    }
    // Where it has started before it could tell, it has also ended.
    if (before >= 0) show(messages, before);
    _exit(count == 1 ? 0 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

int clinux_flush_output(void) {
    if (fflush(stdout) != 0) return errno;
    return ferror(stdout) ? EIO : 0;
}

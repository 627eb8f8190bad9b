// SPDX-License-Identifier: Apache-2.0
// Namespaces of a machine's own (namespaces(7)), and the process beside it.

#define _GNU_SOURCE
#include "CSandbox.h"

#include <limits.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

static int write_file(const char *path, const char *text) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return errno;
    int error = write(file, text, strlen(text)) < 0 ? errno : 0;
    close(file);
    return error;
}

/// The line of a map of users or groups with this one alone.
static int write_map(const char *path, unsigned number) {
    char digits[16], line[48] = "", *start = digits + sizeof digits;
    *--start = 0;
    do *--start = (char)('0' + number % 10);
    while ((number /= 10) != 0);
    strcat(strcat(strcat(line, start), " "), start);
    return write_file(path, strcat(line, " 1"));
}

/// Puts an empty directory in the place of all files. What is open stays so.
static int leave_files(void) {
    static const char *const places[] = {"/tmp", "/proc", "/dev", "/run"};
    if (mount(0, "/", 0, MS_REC | MS_PRIVATE, 0) < 0) return errno;
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    size_t place = 0;
    while (mount("swkvm", places[place], "tmpfs", flags, "size=4k,nr_inodes=2,mode=0755") < 0)
        if (++place == sizeof places / sizeof *places) return errno;
    // The old root is mounted over the new one, and taken from there.
    if (chdir(places[place]) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0) return errno;
    return mount(0, "/", 0, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, 0) < 0 ? errno : 0;
}

int csandbox_separate(int hides_files, int hides_network) {
    // Another thread would stay where it is; a link of the directory is one.
    struct stat threads;
    if (stat("/proc/self/task", &threads) == 0 && threads.st_nlink > 3) return EINVAL;
    int flags = CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | (hides_files ? CLONE_NEWNS : 0) | (hides_network ? CLONE_NEWNET : 0);
    uid_t user = geteuid();
    gid_t group = getegid();
    int has_rights = (csandbox_capabilities() >> CAP_SYS_ADMIN) & 1;
    if (unshare(has_rights ? flags : flags | CLONE_NEWUSER) < 0) return errno;
    int error = 0;
    if (!has_rights) {
        error = write_file("/proc/self/setgroups", "deny");
        if (!error || error == ENOENT) error = write_map("/proc/self/uid_map", user);
        if (!error) error = write_map("/proc/self/gid_map", group);
    }
    return error || !hides_files ? error : leave_files();
}

int csandbox_can_separate(void) {
    pid_t child = fork();
    if (child < 0) return errno;
    if (child == 0) _exit(csandbox_separate(1, 1));
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : EINVAL;
}

int csandbox_pipe(int *ends) { return pipe2(ends, O_CLOEXEC) < 0 ? errno : 0; }

void csandbox_await_close(int end) {
    char byte;
    ssize_t count;
    while ((count = read(end, &byte, 1)) > 0 || (count < 0 && errno == EINTR)) {}
}

void csandbox_await(pid_t process) {
    while (waitpid(process, 0, 0) < 0 && errno == EINTR) {}
}

/// Closes the open ones of these descriptors.
static void close_all(int first, int last) {
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0) return;
    // Before Linux 5.9: as many as the process may have now.
    int end = getdtablesize();
    for (int number = first; number <= last && number < end; number++) close(number);
}

int csandbox_fork(const char *name, const int *descriptors, size_t count) {
    pid_t child = fork();
    if (child != 0) return child < 0 ? -errno : child;
    // What ends the machine by its terminal, its group or its session leaves this process to do its work.
    static const int own[] = {SIGSYS, SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGABRT};
    sigset_t most;
    sigfillset(&most);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) sigdelset(&most, own[i]);
    sigprocmask(SIG_SETMASK, &most, 0);
    setsid();
    prctl(PR_SET_NAME, name, 0, 0, 0);
    close_all(0, STDERR_FILENO - 1);
    int next = STDERR_FILENO + 1;
    for (size_t i = 0; i < count; i++) {
        close_all(next, descriptors[i] - 1);
        if (descriptors[i] >= next) next = descriptors[i] + 1;
    }
    close_all(next, INT_MAX);
    return 0;
}

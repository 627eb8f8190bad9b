// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CSystemCallFilter.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int refuse_system_call(long number) { return fail_system_call(number, EPERM); }

int fail_system_call(long number, int error) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return -1;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static int refuse_all(const long *numbers, size_t count) {
    for (size_t index = 0; index < count; index++) {
        if (refuse_system_call(numbers[index]) < 0) return -1;
    }
    return 0;
}

int refuse_new_descriptors(void) {
    static const long numbers[] = {
        SYS_open, SYS_openat, SYS_openat2, SYS_creat, SYS_socket, SYS_socketpair, SYS_accept, SYS_accept4, SYS_pipe, SYS_pipe2, SYS_eventfd,
        SYS_eventfd2, SYS_epoll_create, SYS_epoll_create1, SYS_timerfd_create, SYS_signalfd, SYS_signalfd4, SYS_memfd_create,
        SYS_io_uring_setup, SYS_dup, SYS_dup2, SYS_dup3, SYS_pidfd_open, SYS_inotify_init1,
    };
    return refuse_all(numbers, sizeof numbers / sizeof *numbers);
}

int refuse_new_threads(void) {
    static const long numbers[] = {SYS_clone, SYS_clone3, SYS_fork, SYS_vfork};
    return refuse_all(numbers, sizeof numbers / sizeof *numbers);
}

int register_ring_event(int ring, int event) {
    // IORING_REGISTER_EVENTFD
    return syscall(SYS_io_uring_register, ring, 4, &event, 1) < 0 ? errno : 0;
}

long io_uring_enter_number(void) { return SYS_io_uring_enter; }
long writev_number(void) { return SYS_writev; }
long epoll_ctl_number(void) { return SYS_epoll_ctl; }

int mount_small_file_system(const char *path, const char *options) {
    if (unshare(CLONE_FS | CLONE_NEWNS) < 0) return -1;
    if (mount("none", "/", 0, MS_REC | MS_PRIVATE, 0) < 0) return -1;
    return mount("none", path, "tmpfs", 0, options);
}

// SPDX-License-Identifier: Apache-2.0
// Linked into the tests only: a host that refuses a system call, as a sandbox does.
#ifndef CSYSTEMCALLFILTER_H
#define CSYSTEMCALLFILTER_H

/// From now on a system call fails with EPERM in the calling thread and in those that it starts (seccomp(2)). It cannot be taken back.
/// Returns 0, or -1 where the host has no filters.
int refuse_system_call(long number);

/// The same with another errno value.
int fail_system_call(long number, int error);
/// The same for all calls that open a file, make a socket, an eventfd and the like. Returns 0, or -1 where the host has no filters.
int refuse_new_descriptors(void);

/// The same for all calls that start a thread or a process.
int refuse_new_threads(void);

/// The number of io_uring_enter(2).
long io_uring_enter_number(void);
/// The number of writev(2).
long writev_number(void);
/// The number of epoll_ctl(2).
long epoll_ctl_number(void);

/// Mounts a tmpfs that the calling thread, and those that it starts, see alone from now on.
/// Returns 0, or -1 with errno.
int mount_small_file_system(const char *path, const char *options);

/// Registers an eventfd with an io_uring (io_uring_register(2)); returns 0 or an errno value.
int register_ring_event(int ring, int event);

#endif

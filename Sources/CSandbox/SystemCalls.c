// SPDX-License-Identifier: Apache-2.0
// The system calls of a running machine, each with its reason: the only list that filters are made from (docs/sandbox.md).
//
// A call is decided by the first rule for it whose condition holds. One without such a rule ends the process.

#define _GNU_SOURCE
#include "CSandbox.h"

#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

// The threads that may make a call.
#define ANY (CSANDBOX_VCPU | CSANDBOX_DEVICE | CSANDBOX_OTHER | CSANDBOX_API)
#define VCPU CSANDBOX_VCPU
#define DEVICE CSANDBOX_DEVICE
#define OTHER CSANDBOX_OTHER
#define API CSANDBOX_API
#define BROKER CSANDBOX_BROKER
#define SOCKETS CSANDBOX_SOCKETS
/// Also the process that reverts the changes on the host.
#define ALL (ANY | BROKER)

#define RULE(who, need_, call_, test_, argument_, value_, text_, error_, reason_)                                         \
    {                                                                                                                     \
        .name = #call_, .condition = text_, .reason = reason_, .value = (uint32_t)(value_), .call = SYS_##call_,         \
        .threads = (who), .need = CSANDBOX_##need_, .test = CSANDBOX_##test_, .argument = argument_, .error = error_      \
    }
/// Allowed with any arguments.
#define ALLOW(who, call, reason) RULE(who, ALWAYS, call, ANYTHING, 0, 0, "", 0, reason)
/// Allowed where an argument is a constant, by its name.
#define ALLOW_IF(who, call, argument, value, reason) RULE(who, ALWAYS, call, EQUAL, argument, value, #value, 0, reason)
/// Allowed where a machine has something.
#define WITH(need, who, call, reason) RULE(who, need, call, ANYTHING, 0, 0, "", 0, reason)
#define WITH_IF(need, who, call, argument, value, reason) RULE(who, need, call, EQUAL, argument, value, #value, 0, reason)
/// Fails with an error, which the C library or a caller copes with.
#define FAIL(call, error, reason) RULE(ANY, ALWAYS, call, ANYTHING, 0, 0, "", error, reason)

#define IOCTL(who, request, reason) RULE(who, ALWAYS, ioctl, EQUAL, 1, request, #request, 0, reason)

/// What the C library's pthread_create and fork give to clone(2).
#define THREAD_FLAGS                                                                                                      \
    (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |                    \
     CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
#define FORK_FLAGS (CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD)

static const struct csandbox_rule rules[] = {
    // The guest.
    IOCTL(VCPU, KVM_RUN, "runs the guest"),
    IOCTL(VCPU, KVM_IRQ_LINE, "interrupts of the serial port and of the clock"),
    IOCTL(VCPU, KVM_IOEVENTFD, "doorbells of a device that a guest moves or enables"),
    IOCTL(VCPU, KVM_IRQFD, "interrupts of a device that a guest enables"),
    IOCTL(VCPU, KVM_SET_GSI_ROUTING, "messages that a guest programs (MSI-X)"),
    IOCTL(VCPU, KVM_GET_REGS, "a report of a guest's crash, and the debugger"),
    IOCTL(VCPU, KVM_GET_SREGS, "as KVM_GET_REGS"),
    IOCTL(VCPU, KVM_TRANSLATE, "as KVM_GET_REGS"),
    IOCTL(OTHER, KVM_CREATE_VM, "a guest that resets itself gets new hardware"),
    IOCTL(OTHER, KVM_CREATE_IRQCHIP, "as KVM_CREATE_VM"),
    IOCTL(VCPU | OTHER, KVM_CREATE_PIT2, "the interval timer, made at a guest's first access to its ports"),
    IOCTL(OTHER, KVM_CREATE_VCPU, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_GET_VCPU_MMAP_SIZE, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_TSS_ADDR, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_IDENTITY_MAP_ADDR, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_USER_MEMORY_REGION, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_PMU_EVENT_FILTER, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_GET_SUPPORTED_CPUID, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_CPUID2, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_GET_TSC_KHZ, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_GET_MSRS, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_MSRS, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_GET_LAPIC, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_LAPIC, "as KVM_CREATE_VM"),
    IOCTL(VCPU | OTHER, KVM_GET_PIT2, "as KVM_CREATE_PIT2, and a pause of the machine"),
    IOCTL(VCPU | OTHER, KVM_SET_PIT2, "as KVM_GET_PIT2"),
    IOCTL(OTHER, KVM_CHECK_EXTENSION, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_GET_API_VERSION, "as KVM_CREATE_VM"),
    IOCTL(OTHER, KVM_SET_REGS, "as KVM_CREATE_VM, and the debugger"),
    IOCTL(OTHER, KVM_SET_SREGS, "as KVM_CREATE_VM, and the debugger"),
    IOCTL(OTHER, KVM_GET_XSAVE, "the debugger"),
    IOCTL(OTHER, KVM_SET_XSAVE, "the debugger"),
    IOCTL(OTHER, KVM_GET_MP_STATE, "the debugger"),
    IOCTL(OTHER, KVM_SET_GUEST_DEBUG, "the debugger"),
    IOCTL(OTHER, KVM_KVMCLOCK_CTRL, "a machine that goes on after a pause"),
    IOCTL(OTHER, KVM_GET_STATS_FD, "metrics"),

    // Files and sockets that are open.
    ALLOW(ALL, write, "interrupts, doorbells, frames, the console, messages"),
    ALLOW(ALL, read, "doorbells, frames, input, signals"),
    ALLOW(ANY, readv, "frames, disks"),
    ALLOW(ANY, writev, "frames, disks, the console"),
    ALLOW(ALL, close, "what was open: a back-end, a client, hardware of before a reset"),
    ALLOW(ALL, poll, "whether a descriptor is ready"),
    ALLOW(ANY, ppoll, "as poll"),
    ALLOW(DEVICE, io_uring_enter, "disks; their rings are made before the machine starts, and restricted"),
    ALLOW(DEVICE, pread64, "images' metadata, and disks without io_uring"),
    ALLOW(DEVICE, pwrite64, "as pread64"),
    ALLOW(DEVICE, preadv, "as pread64"),
    ALLOW(DEVICE, pwritev, "as pread64, and a disk's write that is alone"),
    ALLOW(DEVICE, preadv2, "a disk's read that is alone, from the page cache"),
    ALLOW(DEVICE, fsync, "a disk's flush"),
    ALLOW(DEVICE, fdatasync, "a disk's flush"),
    ALLOW(DEVICE, fallocate, "discarded blocks, and images that grow"),
    ALLOW(DEVICE, ftruncate, "images that grow"),
    ALLOW(DEVICE, lseek, "holes in images"),
    ALLOW(ANY, fstat, "the size of a disk that is a file; what kind of file messages go to"),
    RULE(ANY, ALWAYS, newfstatat, EQUAL, 3, AT_EMPTY_PATH, "AT_EMPTY_PATH", 0, "how the C library makes fstat"),
    IOCTL(DEVICE, BLKGETSIZE64, "the size of a disk that is a block device"),
    IOCTL(DEVICE, BLKSSZGET, "as BLKGETSIZE64"),
    IOCTL(DEVICE, TUNSETOFFLOAD, "offloads that a driver negotiates"),
    IOCTL(DEVICE, TUNSETVNETHDRSZ, "the header that a driver negotiates"),
    IOCTL(DEVICE, TUNGETVNETHDRSZ, "as TUNSETVNETHDRSZ"),
    IOCTL(DEVICE, TUNSETQUEUE, "queues of an interface that a driver switches"),
    IOCTL(DEVICE, TUNGETIFF, "as TUNSETQUEUE"),
    IOCTL(DEVICE, TUNSETPERSIST, "an interface that does not outlive the machine"),
    IOCTL(ANY, TCGETS, "the terminal's mode; whether messages go to one"),
    IOCTL(OTHER, TCSETS, "the terminal's mode"),
    IOCTL(OTHER, TCSETSW, "the terminal's mode"),
    IOCTL(ANY, TIOCGPGRP, "whether the terminal is the process's"),
    IOCTL(OTHER, TIOCOUTQ, "whether a terminal has printed everything"),
    IOCTL(OTHER, TIOCGWINSZ, "the terminal's size, for a virtio console"),
    ALLOW_IF(ANY, fcntl, 1, F_GETFL, "the flags of a descriptor"),
    ALLOW_IF(ANY, fcntl, 1, F_SETFL, "the flags of a descriptor"),
    ALLOW_IF(ANY, fcntl, 1, F_GETFD, "the flags of a descriptor"),
    ALLOW_IF(ANY, fcntl, 1, F_SETFD, "the flags of a descriptor"),
    ALLOW_IF(ANY, fcntl, 1, F_DUPFD_CLOEXEC, "a client's descriptor, for each direction; the stream of messages, with the first one"),
    ALLOW_IF(DEVICE, fcntl, 1, F_OFD_SETLK, "locks of images"),
    ALLOW_IF(DEVICE, fcntl, 1, F_OFD_GETLK, "locks of images"),
    ALLOW(BROKER, flock, "bridges are changed by one process at a time, at the end too"),

    // Waiting.
    ALLOW(ANY, epoll_wait, "the loop of a thread over its descriptors"),
    ALLOW(ANY, epoll_pwait, "as epoll_wait"),
    ALLOW(ANY, epoll_ctl, "as epoll_wait"),
    ALLOW(OTHER, epoll_create1, "as KVM_CREATE_VM, and a debugger's session"),
    ALLOW(ALL, futex, "locks; the end of a thread"),
    ALLOW(ANY, eventfd2, "doorbells and interrupts of a device that a guest enables"),
    ALLOW(ANY, timerfd_create, "timers"),
    ALLOW(ANY, timerfd_settime, "timers"),
    ALLOW(ANY, timerfd_gettime, "timers"),
    ALLOW(ALL, nanosleep, "waiting for a moment"),
    ALLOW(ALL, clock_nanosleep, "waiting for a moment"),
    ALLOW(ANY, sched_yield, "waiting for a moment"),
    ALLOW(ALL, restart_syscall, "the kernel's, after a stop in the middle of a call"),
    ALLOW(ALL, clock_gettime, "the time, where the kernel has no other way to it"),
    ALLOW(ANY, gettimeofday, "as clock_gettime"),
    ALLOW(ALL, getrandom, "the entropy device; hash tables"),

    // Memory.
    RULE(ALL, ALWAYS, mmap, NO_BITS, 2, PROT_EXEC, "without PROT_EXEC", 0, "allocation, stacks of threads, a vCPU's page"),
    RULE(ALL, ALWAYS, mprotect, NO_BITS, 2, PROT_EXEC, "without PROT_EXEC", 0, "allocation, stacks of threads"),
    ALLOW(ALL, munmap, "allocation"),
    ALLOW(ALL, mremap, "allocation"),
    ALLOW(ALL, brk, "allocation"),
    ALLOW(ALL, madvise, "pages that go back to the host"),
    ALLOW(OTHER, mincore, "pages that a reset need not clear"),
    ALLOW(ANY, mlock, "keys stay out of swap"),
    ALLOW(ANY, munlock, "as mlock"),

    // Threads.
    RULE(ANY, ALWAYS, clone, EQUAL, 0, THREAD_FLAGS, "the flags of pthread_create", 0,
         "a thread: for messages, with the first one; for the next boot"),
    RULE(OTHER, LATER_TERMINAL, clone, EQUAL, 0, FORK_FLAGS, "the flags of fork", 0,
         "the process that restores the terminal, made when swkvm comes to the foreground"),
    FAIL(clone3, ENOSYS, "its flags are in memory, where a filter does not see them: the C library uses clone then"),
    RULE(OTHER, ALWAYS, seccomp, EQUAL, 1, 0, "without flags", 0, "a thread's own filter"),
    ALLOW(ANY, set_robust_list, "a thread's start"),
    ALLOW(ANY, rseq, "a thread's start"),
    ALLOW(ANY, gettid, "a thread's start"),
    ALLOW(ANY, sched_getaffinity, "for how many CPUs memory is allocated"),
    ALLOW_IF(ANY, prctl, 0, PR_SET_NAME, "a thread's name"),
    ALLOW_IF(ALL, prctl, 0, PR_GET_NAME, "a thread's name, for a report"),
    ALLOW(ANY, exit, "a thread's end"),
    ALLOW(ALL, exit_group, "the process's end"),

    // Signals and processes.
    RULE(ANY, ALWAYS, tgkill, OWN_PROCESS, 0, 0, "to the process itself", 0, "makes a vCPU leave KVM_RUN; abort"),
    ALLOW(ALL, getpid, "as tgkill"),
    RULE(ANY, ALWAYS, rt_sigaction, UNEQUAL, 0, SIGSYS, "not SIGSYS", 0, "handlers, those of abort too"),
    ALLOW(ALL, rt_sigprocmask, "what a thread takes"),
    ALLOW(ALL, rt_sigreturn, "the end of a handler"),
    ALLOW(OTHER, rt_sigtimedwait, "discards pending signals"),
    ALLOW(OTHER, rt_sigpending, "whether a signal has come"),
    WITH(TERMINAL, OTHER, wait4, "the end of the process that restores the terminal"),
    WITH(LATER_TERMINAL, OTHER, wait4, "as clone"),
    WITH(RESTORED, OTHER, wait4, "the end of the process that reverts the changes on the host"),
    WITH(LATER_TERMINAL, OTHER, pipe2, "as clone"),
    WITH(LATER_TERMINAL, OTHER, setsid, "as clone, in that process"),
    WITH(LATER_TERMINAL, OTHER, close_range, "as clone, in that process"),
    ALLOW(OTHER, getpgrp, "whether the terminal is the process's"),
    ALLOW(OTHER, getrusage, "metrics"),

    // Clients and peers.
    ALLOW(ALL, sendto, "what a client or a peer gets; questions to the kernel about interfaces"),
    ALLOW(ALL, sendmsg, "as sendto"),
    ALLOW(ALL, recvfrom, "what a client or a peer sends"),
    ALLOW(ALL, recvmsg, "as recvfrom"),
    ALLOW(ANY, shutdown, "the end of a connection"),
    ALLOW(OTHER | API, accept4, "clients of the console, of the debugger's port and of the management API"),
    ALLOW(OTHER | API, getsockname, "the debugger's port; the addresses of a client's connection"),
    ALLOW(API, getpeername, "as getsockname"),
    ALLOW(ANY, setsockopt, "options of a connection"),
    ALLOW(ANY, getsockopt, "errors of a connection"),
    WITH(VSOCK, SOCKETS, accept4, "clients of a vsock device's socket"),
    WITH_IF(VSOCK, SOCKETS, socket, 0, AF_UNIX, "a connection of the guest to the socket of a port"),
    WITH(VSOCK, SOCKETS, connect, "as socket"),
    WITH_IF(REMOTE_DISK, DEVICE, socket, 0, AF_INET, "a connection that was lost is made again"),
    WITH_IF(REMOTE_DISK, DEVICE, socket, 0, AF_INET6, "as AF_INET"),
    WITH_IF(REMOTE_DISK, DEVICE, socket, 0, AF_UNIX, "as AF_INET"),
    WITH(REMOTE_DISK, DEVICE, connect, "as socket"),
    WITH(REMOTE_DISK, DEVICE, getpeername, "as socket"),
    WITH(REMOTE_DISK, DEVICE, socketpair, "as socket"),
    WITH(REMOTE_TLS, DEVICE, bind, "the name of a server is resolved again"),
    WITH(REMOTE_TLS, DEVICE, sendmmsg, "as bind"),
    WITH(REMOTE_TLS, DEVICE, uname, "as bind"),
    IOCTL(DEVICE, FIONREAD, "as bind"),
    WITH_IF(REMOTE_TLS, DEVICE, socket, 0, AF_NETLINK, "as bind"),
    WITH(REMOTE_TLS, DEVICE, getsockname, "as bind"),
    // O_WRONLY, O_RDWR and O_CREAT.
    RULE(DEVICE, REMOTE_TLS, openat, NO_BITS, 2, 0103, "for reading only", 0, "certificates; files with names of hosts"),
    WITH(REMOTE_TLS, DEVICE, newfstatat, "as openat"),

    // A console's file that is rotated.
    WITH(ROTATED_FILE, OTHER, pread64, "output that moves to an older file, which is open"),
    WITH(ROTATED_FILE, OTHER, pwrite64, "as pread64"),
    WITH(ROTATED_FILE, OTHER, ftruncate, "as pread64"),

    // Files by name.
    WITH(METRICS_FILE, OTHER, openat, "a new file of metrics replaces the one before"),
    WITH(METRICS_FILE, OTHER, renameat, "as openat"),
    WITH(METRICS_FILE, OTHER, unlinkat, "as openat"),
    WITH_IF(CONTROL_GROUP, OTHER, unlinkat, 2, AT_REMOVEDIR, "the machine's control group is removed at the end"),
    ALLOW(BROKER, newfstatat, "a socket's file is removed at the end if it is still the same"),
    ALLOW(BROKER, unlinkat, "as newfstatat"),
    FAIL(openat, EACCES, "everything is open: what is looked for by name is not there"),
    FAIL(open, EACCES, "as openat"),
    FAIL(newfstatat, EACCES, "as openat"),
    FAIL(stat, EACCES, "as openat"),
    FAIL(access, EACCES, "as openat"),
    FAIL(readlink, EACCES, "as openat"),
    FAIL(readlinkat, EACCES, "as openat"),
    FAIL(unlink, EACCES, "what was made for a machine that does not start stays"),
};

const struct csandbox_rule *csandbox_rules(size_t *count) {
    *count = sizeof rules / sizeof *rules;
    return rules;
}

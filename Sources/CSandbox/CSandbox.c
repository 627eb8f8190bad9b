// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CSandbox.h"
#include "Line.h"

#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <ucontext.h>

#define CALL(name) [__NR_##name] = #name,
static const char *const names[] = {
    CALL(read) CALL(write) CALL(open) CALL(close) CALL(stat) CALL(fstat) CALL(lstat) CALL(poll) CALL(lseek) CALL(mmap)
    CALL(mprotect) CALL(munmap) CALL(brk) CALL(rt_sigaction) CALL(rt_sigprocmask) CALL(rt_sigreturn) CALL(ioctl)
    CALL(pread64) CALL(pwrite64) CALL(readv) CALL(writev) CALL(access) CALL(pipe) CALL(select) CALL(sched_yield)
    CALL(mremap) CALL(msync) CALL(mincore) CALL(madvise) CALL(shmget) CALL(shmat) CALL(shmctl) CALL(dup) CALL(dup2)
    CALL(pause) CALL(nanosleep) CALL(getitimer) CALL(alarm) CALL(setitimer) CALL(getpid) CALL(sendfile) CALL(socket)
    CALL(connect) CALL(accept) CALL(sendto) CALL(recvfrom) CALL(sendmsg) CALL(recvmsg) CALL(shutdown) CALL(bind)
    CALL(listen) CALL(getsockname) CALL(getpeername) CALL(socketpair) CALL(setsockopt) CALL(getsockopt) CALL(clone)
    CALL(fork) CALL(vfork) CALL(execve) CALL(exit) CALL(wait4) CALL(kill) CALL(uname) CALL(semget) CALL(semop)
    CALL(semctl) CALL(shmdt) CALL(msgget) CALL(msgsnd) CALL(msgrcv) CALL(msgctl) CALL(fcntl) CALL(flock) CALL(fsync)
    CALL(fdatasync) CALL(truncate) CALL(ftruncate) CALL(getdents) CALL(getcwd) CALL(chdir) CALL(fchdir) CALL(rename)
    CALL(mkdir) CALL(rmdir) CALL(creat) CALL(link) CALL(unlink) CALL(symlink) CALL(readlink) CALL(chmod) CALL(fchmod)
    CALL(chown) CALL(fchown) CALL(lchown) CALL(umask) CALL(gettimeofday) CALL(getrlimit) CALL(getrusage) CALL(sysinfo)
    CALL(times) CALL(ptrace) CALL(getuid) CALL(syslog) CALL(getgid) CALL(setuid) CALL(setgid) CALL(geteuid)
    CALL(getegid) CALL(setpgid) CALL(getppid) CALL(getpgrp) CALL(setsid) CALL(setreuid) CALL(setregid) CALL(getgroups)
    CALL(setgroups) CALL(setresuid) CALL(getresuid) CALL(setresgid) CALL(getresgid) CALL(getpgid) CALL(setfsuid)
    CALL(setfsgid) CALL(getsid) CALL(capget) CALL(capset) CALL(rt_sigpending) CALL(rt_sigtimedwait)
    CALL(rt_sigqueueinfo) CALL(rt_sigsuspend) CALL(sigaltstack) CALL(utime) CALL(mknod) CALL(uselib) CALL(personality)
    CALL(ustat) CALL(statfs) CALL(fstatfs) CALL(sysfs) CALL(getpriority) CALL(setpriority) CALL(sched_setparam)
    CALL(sched_getparam) CALL(sched_setscheduler) CALL(sched_getscheduler) CALL(sched_get_priority_max)
    CALL(sched_get_priority_min) CALL(sched_rr_get_interval) CALL(mlock) CALL(munlock) CALL(mlockall) CALL(munlockall)
    CALL(vhangup) CALL(modify_ldt) CALL(pivot_root) CALL(_sysctl) CALL(prctl) CALL(arch_prctl) CALL(adjtimex)
    CALL(setrlimit) CALL(chroot) CALL(sync) CALL(acct) CALL(settimeofday) CALL(mount) CALL(umount2) CALL(swapon)
    CALL(swapoff) CALL(reboot) CALL(sethostname) CALL(setdomainname) CALL(iopl) CALL(ioperm) CALL(create_module)
    CALL(init_module) CALL(delete_module) CALL(get_kernel_syms) CALL(query_module) CALL(quotactl) CALL(nfsservctl)
    CALL(getpmsg) CALL(putpmsg) CALL(afs_syscall) CALL(tuxcall) CALL(security) CALL(gettid) CALL(readahead)
    CALL(setxattr) CALL(lsetxattr) CALL(fsetxattr) CALL(getxattr) CALL(lgetxattr) CALL(fgetxattr) CALL(listxattr)
    CALL(llistxattr) CALL(flistxattr) CALL(removexattr) CALL(lremovexattr) CALL(fremovexattr) CALL(tkill) CALL(time)
    CALL(futex) CALL(sched_setaffinity) CALL(sched_getaffinity) CALL(set_thread_area) CALL(io_setup) CALL(io_destroy)
    CALL(io_getevents) CALL(io_submit) CALL(io_cancel) CALL(get_thread_area) CALL(lookup_dcookie) CALL(epoll_create)
    CALL(epoll_ctl_old) CALL(epoll_wait_old) CALL(remap_file_pages) CALL(getdents64) CALL(set_tid_address)
    CALL(restart_syscall) CALL(semtimedop) CALL(fadvise64) CALL(timer_create) CALL(timer_settime) CALL(timer_gettime)
    CALL(timer_getoverrun) CALL(timer_delete) CALL(clock_settime) CALL(clock_gettime) CALL(clock_getres)
    CALL(clock_nanosleep) CALL(exit_group) CALL(epoll_wait) CALL(epoll_ctl) CALL(tgkill) CALL(utimes) CALL(vserver)
    CALL(mbind) CALL(set_mempolicy) CALL(get_mempolicy) CALL(mq_open) CALL(mq_unlink) CALL(mq_timedsend)
    CALL(mq_timedreceive) CALL(mq_notify) CALL(mq_getsetattr) CALL(kexec_load) CALL(waitid) CALL(add_key)
    CALL(request_key) CALL(keyctl) CALL(ioprio_set) CALL(ioprio_get) CALL(inotify_init) CALL(inotify_add_watch)
    CALL(inotify_rm_watch) CALL(migrate_pages) CALL(openat) CALL(mkdirat) CALL(mknodat) CALL(fchownat) CALL(futimesat)
    CALL(newfstatat) CALL(unlinkat) CALL(renameat) CALL(linkat) CALL(symlinkat) CALL(readlinkat) CALL(fchmodat)
    CALL(faccessat) CALL(pselect6) CALL(ppoll) CALL(unshare) CALL(set_robust_list) CALL(get_robust_list) CALL(splice)
    CALL(tee) CALL(sync_file_range) CALL(vmsplice) CALL(move_pages) CALL(utimensat) CALL(epoll_pwait) CALL(signalfd)
    CALL(timerfd_create) CALL(eventfd) CALL(fallocate) CALL(timerfd_settime) CALL(timerfd_gettime) CALL(accept4)
    CALL(signalfd4) CALL(eventfd2) CALL(epoll_create1) CALL(dup3) CALL(pipe2) CALL(inotify_init1) CALL(preadv)
    CALL(pwritev) CALL(rt_tgsigqueueinfo) CALL(perf_event_open) CALL(recvmmsg) CALL(fanotify_init) CALL(fanotify_mark)
    CALL(prlimit64) CALL(name_to_handle_at) CALL(open_by_handle_at) CALL(clock_adjtime) CALL(syncfs) CALL(sendmmsg)
    CALL(setns) CALL(getcpu) CALL(process_vm_readv) CALL(process_vm_writev) CALL(kcmp) CALL(finit_module)
    CALL(sched_setattr) CALL(sched_getattr) CALL(renameat2) CALL(seccomp) CALL(getrandom) CALL(memfd_create)
    CALL(kexec_file_load) CALL(bpf) CALL(execveat) CALL(userfaultfd) CALL(membarrier) CALL(mlock2)
    CALL(copy_file_range) CALL(preadv2) CALL(pwritev2) CALL(pkey_mprotect) CALL(pkey_alloc) CALL(pkey_free)
    CALL(statx) CALL(io_pgetevents) CALL(rseq) CALL(pidfd_send_signal) CALL(io_uring_setup) CALL(io_uring_enter)
    CALL(io_uring_register) CALL(open_tree) CALL(move_mount) CALL(fsopen) CALL(fsconfig) CALL(fsmount) CALL(fspick)
    CALL(pidfd_open) CALL(clone3) CALL(close_range) CALL(openat2) CALL(pidfd_getfd) CALL(faccessat2)
    CALL(process_madvise) CALL(epoll_pwait2) CALL(mount_setattr) CALL(quotactl_fd) CALL(landlock_create_ruleset)
    CALL(landlock_add_rule) CALL(landlock_restrict_self) CALL(memfd_secret) CALL(process_mrelease) CALL(futex_waitv)
    CALL(set_mempolicy_home_node)
};
#undef CALL

const char *csandbox_call_name(long number) {
    return number >= 0 && number < (long)(sizeof names / sizeof *names) ? names[number] : 0;
}

static int install(const struct csandbox_machine *machine, unsigned threads, unsigned flags) {
    struct sock_filter buffer[CSANDBOX_LIMIT];
    struct sock_fprog program;
    program.filter = (struct sock_filter *)csandbox_compile(machine, threads, SECCOMP_RET_TRAP, buffer, &program.len);
    long status = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    // With TSYNC a positive value is the ID of the thread that could not take the filter.
    return status < 0 ? errno : status > 0 ? ESRCH : 0;
}

int csandbox_confine_process(const struct csandbox_machine *machine) {
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return errno;
    unsigned threads = CSANDBOX_VCPU | CSANDBOX_DEVICE | CSANDBOX_OTHER | CSANDBOX_SOCKETS | CSANDBOX_API;
    return install(machine, threads, SECCOMP_FILTER_FLAG_TSYNC);
}

int csandbox_confine_thread(const struct csandbox_machine *machine, unsigned kind) { return install(machine, kind, 0); }

int csandbox_each_number(const char *directory, void (*visit)(int number, void *context), void *context) {
    struct entry {
        uint64_t inode;
        int64_t offset;
        uint16_t size;
        uint8_t kind;
        char name[];
    };
    _Alignas(struct entry) char entries[2048];
    int descriptor = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return -1;
    long count;
    while ((count = syscall(SYS_getdents64, descriptor, entries, sizeof entries)) > 0) {
        for (long at = 0; at < count;) {
            const struct entry *entry = (const struct entry *)(entries + at);
            at += entry->size;
            // Not "." and "..", which are there too.
            if (*entry->name == '.') continue;
            int number = 0;
            for (const char *digit = entry->name; *digit; digit++) number = 10 * number + *digit - '0';
            visit(number, context);
        }
    }
    close(descriptor);
    return 0;
}

/// Closes what was open when the program was executed, but for the standard streams: everything opened since then is
/// close-on-exec.
static void close_inherited(int number, void *context) {
    (void)context;
    if (number <= STDERR_FILENO) return;
    int flags = fcntl(number, F_GETFD);
    if (flags >= 0 && !(flags & FD_CLOEXEC)) close(number);
}

void csandbox_reduce(int files_are_private) {
    csandbox_each_number("/proc/self/fd", close_inherited, 0);
    struct rlimit limit = {0, 0};
    setrlimit(RLIMIT_CORE, &limit);
    // It cannot be raised any more.
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_max = limit.rlim_cur;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (files_are_private) umask(077);
    csandbox_hide();
}

void csandbox_hide(void) { prctl(PR_SET_DUMPABLE, 0, 0, 0, 0); }

int csandbox_has_action(const uint32_t *action) { return syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, action) == 0; }

// One system call whose instruction has a name. The kernel shows a filter the address behind it.
long csandbox_pass(long number, const long *arguments);
extern const char csandbox_pass_end[];
__asm__(".text\n"
        ".type csandbox_pass, @function\n"
        "csandbox_pass:\n"
        "    movq %rdi, %rax\n"
        "    movq %rsi, %r11\n"
        "    movq 0(%r11), %rdi\n"
        "    movq 8(%r11), %rsi\n"
        "    movq 16(%r11), %rdx\n"
        "    movq 24(%r11), %r10\n"
        "    movq 32(%r11), %r8\n"
        "    movq 40(%r11), %r9\n"
        "    syscall\n"
        "csandbox_pass_end:\n"
        "    ret\n"
        ".size csandbox_pass, .-csandbox_pass\n"
        ".section .note.GNU-stack,\"\",@progbits\n"
        ".text\n");

uint64_t csandbox_passage(void) { return (uint64_t)(uintptr_t)csandbox_pass_end; }

static char report_prefix[64];
static int report_status;

static void refused(int signal, siginfo_t *information, void *context) {
    (void)signal;
    int error = errno;
    if (csandbox_visited(information)) {
        errno = error;
        return;
    }
    ucontext_t *state = context;
    greg_t *registers = state->uc_mcontext.gregs;
    const long arguments[6] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX], registers[REG_R10], registers[REG_R8], registers[REG_R9]};
    long number = information->si_syscall;
    char thread[16] = "";
    prctl(PR_GET_NAME, thread, 0, 0, 0);

    struct line line = {.count = 0};
    const char *name = csandbox_call_name(number);
    add(&line, report_prefix);
    add(&line, "the thread '");
    add(&line, thread);
    add(&line, "' made the system call ");
    add(&line, name ? name : "with the number ");
    if (!name) add_number(&line, (uint64_t)number, 10);
    add(&line, "(");
    for (int i = 0; i < 6; i++) {
        add(&line, i ? ", 0x" : "0x");
        add_number(&line, (uint64_t)arguments[i], 16);
    }
    add(&line, report_status < 0 ? "), which the sandbox does not allow\n" : "), which the sandbox does not allow: the process ends\n");
    say(&line, report_status < 0 ? 1000 : 0);
    if (report_status >= 0) _exit(report_status);
    registers[REG_RAX] = csandbox_pass(number, arguments);
    errno = error;
}

int csandbox_report(const char *prefix, int exit_status) {
    strncpy(report_prefix, prefix, sizeof report_prefix - 1);
    report_status = exit_status;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = refused;
    // A refused call was not begun, so nothing is restarted; csandbox_drop_privileges may interrupt one.
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    return sigaction(SIGSYS, &action, 0) < 0 ? errno : 0;
}

void csandbox_end(int error, int exit_status) {
    struct line line = {.count = 0};
    add(&line, report_prefix);
    add(&line, "a thread could not be confined (error ");
    add_number(&line, (uint64_t)error, 10);
    add(&line, "): the process ends\n");
    say(&line, 0);
    _exit(exit_status);
}

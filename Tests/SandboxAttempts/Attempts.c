// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "CSandboxTest.h"
#include "CSandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// Each gives -1 and errno on failure, as system calls do. A: made with and without a filter, and about nothing but this process. C: made only with a
// filter, which does not let the call begin; its values are such that the kernel would refuse it otherwise.

static long closed(long descriptor) {
    if (descriptor >= 0) close((int)descriptor);
    return descriptor;
}

static long waited(long process) {
    if (process == 0) _exit(0);
    if (process > 0) waitpid((pid_t)process, 0, 0);
    return process;
}

#define ATTEMPTS                                                                                                          \
    A("open a file", closed(syscall(SYS_openat, AT_FDCWD, "/proc/self", O_RDONLY | O_CLOEXEC, 0)))                        \
    A("open by the old call", closed(syscall(SYS_open, "/proc/self", O_RDONLY | O_CLOEXEC, 0)))                           \
    A("openat2", closed(syscall(SYS_openat2, AT_FDCWD, "/proc/self", (unsigned long[3]){O_RDONLY | O_CLOEXEC, 0, 0}, 24))) \
    A("create a file", closed(syscall(SYS_openat, AT_FDCWD, "/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)))               \
    A("open the process's memory", closed(syscall(SYS_openat, AT_FDCWD, "/proc/self/mem", O_RDWR | O_CLOEXEC, 0)))        \
    C("open KVM again", closed(syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR | O_CLOEXEC, 0)))                         \
    A("stat", syscall(SYS_stat, "/proc/self", (char[256]){0}))                                                            \
    A("statx", syscall(SYS_statx, AT_FDCWD, "/proc/self", 0, 0x7ff, (char[256]){0}))                                      \
    A("stat below a directory", syscall(SYS_newfstatat, AT_FDCWD, "/proc/self", (char[256]){0}, 0))                       \
    A("access", syscall(SYS_access, "/proc/self", 0))                                                                     \
    A("faccessat2", syscall(SYS_faccessat2, AT_FDCWD, "/proc/self", 0, 0))                                                \
    A("readlink", syscall(SYS_readlink, "/proc/self/exe", (char[256]){0}, 255))                                           \
    A("getcwd", syscall(SYS_getcwd, (char[4096]){0}, 4096))                                                               \
    A("chdir", syscall(SYS_chdir, "."))                                                                                   \
    C("chroot", syscall(SYS_chroot, ""))                                                                                  \
    C("unlink", syscall(SYS_unlink, ""))                                                                                  \
    C("rename", syscall(SYS_rename, "", ""))                                                                              \
    C("link", syscall(SYS_link, "", ""))                                                                                  \
    C("symlink", syscall(SYS_symlink, "", ""))                                                                            \
    C("mkdir", syscall(SYS_mkdir, "", 0700))                                                                              \
    C("mknod", syscall(SYS_mknod, "", 0, 0))                                                                              \
    C("chmod", syscall(SYS_chmod, "", 0700))                                                                              \
    C("chown", syscall(SYS_chown, "", -1, -1))                                                                            \
    A("umask", (syscall(SYS_umask, umask_now())))                                                                         \
    A("getdents64", syscall(SYS_getdents64, -1, 0, 0))                                                                    \
    C("execve", syscall(SYS_execve, "", 0, 0))                                                                            \
    C("execveat", syscall(SYS_execveat, -1, "", 0, 0, 0))                                                                 \
    A("fork", waited(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)))                                                            \
    A("fork by clone3", waited(syscall(SYS_clone3, (unsigned long[11]){0, 0, 0, 0, SIGCHLD}, 88)))                        \
    A("fork by the old call", waited(syscall(SYS_fork)))                                                                  \
    C("a new user namespace", syscall(SYS_clone, CLONE_NEWUSER | CLONE_THREAD, 0, 0, 0, 0))                               \
    A("unshare", syscall(SYS_unshare, 0))                                                                                 \
    C("setns", syscall(SYS_setns, -1, 0))                                                                                 \
    C("mount", syscall(SYS_mount, "", "", "", -1L, 0))                                                                    \
    C("umount2", syscall(SYS_umount2, "", -1))                                                                            \
    C("pivot_root", syscall(SYS_pivot_root, "", ""))                                                                      \
    C("fsopen", closed(syscall(SYS_fsopen, "", 0)))                                                                       \
    C("open_tree", closed(syscall(SYS_open_tree, -1, "", 0)))                                                             \
    A("socket", closed(syscall(SYS_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)))                                      \
    A("netlink socket", closed(syscall(SYS_socket, AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0)))                              \
    A("connect", syscall(SYS_connect, -1, 0, 0))                                                                          \
    A("bind", syscall(SYS_bind, -1, 0, 0))                                                                                \
    A("listen", syscall(SYS_listen, -1, 0))                                                                               \
    A("kill", syscall(SYS_kill, getpid(), 0))                                                                             \
    A("tkill", syscall(SYS_tkill, syscall(SYS_gettid), 0))                                                                \
    C("tgkill to another process", syscall(SYS_tgkill, getpid() + 1000000, 1, 0))                                         \
    A("pidfd_open", closed(syscall(SYS_pidfd_open, getpid(), 0)))                                                         \
    C("pidfd_getfd", closed(syscall(SYS_pidfd_getfd, -1, 0, 0)))                                                          \
    C("ptrace", syscall(SYS_ptrace, -1, 0, 0, 0))                                                                         \
    A("process_vm_readv", syscall(SYS_process_vm_readv, getpid(), 0, 0, 0, 0, 0))                                         \
    A("process_vm_writev", syscall(SYS_process_vm_writev, getpid(), 0, 0, 0, 0, 0))                                       \
    A("memory that can be executed", mapped(PROT_READ | PROT_EXEC))                                                       \
    A("a mapping made executable", made_executable())                                                                     \
    A("pkey_mprotect", syscall(SYS_pkey_mprotect, 0, 0, PROT_EXEC, -1))                                                   \
    A("memfd_create", closed(syscall(SYS_memfd_create, "", MFD_CLOEXEC)))                                                 \
    C("userfaultfd", closed(syscall(SYS_userfaultfd, O_CLOEXEC)))                                                         \
    A("setuid", syscall(SYS_setuid, getuid()))                                                                            \
    A("setresgid", syscall(SYS_setresgid, -1, -1, -1))                                                                    \
    C("capset", syscall(SYS_capset, 0, 0))                                                                                \
    C("setrlimit", syscall(SYS_prlimit64, 0, -1, (unsigned long[2]){0, 0}, 0))                                            \
    A("setpriority", syscall(SYS_setpriority, 0, 0, 0))                                                                   \
    A("sched_setaffinity", syscall(SYS_sched_setaffinity, 0, 0, 0))                                                       \
    A("prctl: dumpable", syscall(SYS_prctl, PR_SET_DUMPABLE, prctl(PR_GET_DUMPABLE), 0, 0, 0))                            \
    C("a filter that asks a process", syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, 0))  \
    A("a handler for SIGSYS", syscall(SYS_rt_sigaction, SIGSYS, 0, 0, 8))                                                 \
    C("bpf", syscall(SYS_bpf, -1, 0, 0))                                                                                  \
    C("perf_event_open", syscall(SYS_perf_event_open, 0, 0, 0, 0, 0))                                                     \
    A("a ring of its own", closed(syscall(SYS_io_uring_setup, 4, (unsigned long[15]){0})))                                \
    A("io_uring_register", syscall(SYS_io_uring_register, -1, 0, 0, 0))                                                   \
    C("an unknown ioctl", syscall(SYS_ioctl, -1, 0x5412 /* TIOCSTI */, 0))                                                \
    A("fcntl: owner of signals", syscall(SYS_fcntl, -1, F_SETOWN, getpid()))                                              \
    C("keyctl", syscall(SYS_keyctl, 0, -3, 0))                                                                            \
    C("add_key", syscall(SYS_add_key, "", "", 0, 0, 0))                                                                   \
    C("init_module", syscall(SYS_init_module, 0, 0, ""))                                                                  \
    C("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, -1L))                                                                \
    C("swapon", syscall(SYS_swapon, "", 0))                                                                               \
    C("acct", syscall(SYS_acct, "."))                                                                                     \
    C("sethostname", syscall(SYS_sethostname, 0, -1))                                                                     \
    C("quotactl", syscall(SYS_quotactl, -1, "", 0, 0))                                                                    \
    A("dup", closed(syscall(SYS_dup, STDERR_FILENO)))                                                                     \
    A("pipe2", pipe_closed())                                                                                             \
    A("inotify_init1", closed(syscall(SYS_inotify_init1, O_CLOEXEC)))                                                     \
    A("personality", syscall(SYS_personality, 0xffffffff))                                                                \
    A("vmsplice", syscall(SYS_vmsplice, -1, 0, 0, 0))                                                                     \
    A("sendfile", syscall(SYS_sendfile, -1, -1, 0, 0))                                                                    \
    A("a call of x32", syscall(0x40000000 | SYS_getpid))                                                                  \
    C("a call without a number", syscall(-1L))

static long umask_now(void) {
    // Read from the call itself, and put back by it: nobody else makes files in this test.
    return 022;
}

static long mapped(int protection) {
    void *memory = mmap(0, 4096, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return -1;
    munmap(memory, 4096);
    return 0;
}

static long made_executable(void) {
    void *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return -1;
    long status = mprotect(memory, 4096, PROT_READ | PROT_EXEC);
    int error = errno;
    munmap(memory, 4096);
    errno = error;
    return status;
}

static long pipe_closed(void) {
    int ends[2];
    if (syscall(SYS_pipe2, ends, O_CLOEXEC) < 0) return -1;
    close(ends[0]);
    close(ends[1]);
    return 0;
}

static const char *const names[] = {
#define A(name, call) name,
#define C(name, call) name,
    ATTEMPTS
#undef C
#undef A
};
const int csandbox_attempt_count = sizeof names / sizeof *names;
const char *csandbox_attempt_name(int index) { return names[index]; }

static int install(const struct sock_fprog *program) {
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return errno;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, program) < 0 ? errno : 0;
}

struct work {
    struct sock_fprog program;
    int status;
    int *results;
};

static void *attempt(void *argument) {
    struct work *work = argument;
    int *result = work->results;
    // Its own file system attributes, so that the working directory and the umask are not the other threads'.
    if (unshare(CLONE_FS) < 0) work->status = errno;
    if (work->status == 0 && work->program.filter) {
        work->status = install(&work->program);
    }
    if (work->status) return 0;
#define A(name, call) *result++ = (call) < 0 ? errno : 0;
#define C(name, call) *result++ = !work->program.filter ? -1 : (call) < 0 ? errno : 0;
    ATTEMPTS
#undef C
#undef A
    return 0;
}

int csandbox_attempt_all(const struct sock_filter *code, unsigned short count, int *results) {
    struct work work = {{count, (struct sock_filter *)code}, 0, results};
    pthread_t thread;
    int status = pthread_create(&thread, 0, attempt, &work);
    if (status) return status;
    pthread_join(thread, 0);
    return work.status;
}

/// What a child has written to its end of a pipe, in `output`, and its wait status.
static int story(pid_t child, const int *ends, char *output, int size) {
    close(ends[1]);
    int status = -1;
    long taken = 0, got;
    while ((got = read(ends[0], output + taken, (size_t)(size - 1 - taken))) > 0) taken += got;
    output[taken] = 0;
    close(ends[0]);
    if (child > 0) waitpid(child, &status, 0);
    return status;
}

int csandbox_refused_in_child(const struct sock_filter *code, unsigned short count, int exit_status, char *output, int size) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) return -1;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        prctl(PR_SET_NAME, "attacker");
        if (csandbox_report("test: ", exit_status) || install(&(struct sock_fprog){count, (struct sock_filter *)code})) _exit(1);
        _exit(syscall(SYS_getppid) > 0 ? 7 : 8);
    }
    return story(child, ends, output, size);
}

int csandbox_fault_in_child(int kind, char *output, int size) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0) return -1;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        prctl(PR_SET_NAME, "faulty");
        if (csandbox_report_faults("test: ", 70)) _exit(1);
        switch (kind) {
            case 0: __asm__ volatile("ud2"); break;
            case 1: __asm__ volatile("int3"); break;
            case 2: *(volatile char *)8 = 0; break;
            case 3: abort();
            // The stack is used up.
            case 4: __asm__ volatile("0: push %%rax; jmp 0b" ::: "memory"); break;
            // The chain of frames leads nowhere.
            case 5: __asm__ volatile("lea 8(%%rsp), %%rbp; movq $16, (%%rbp); movq $16, 8(%%rbp); ud2" ::: "memory");
        }
        _exit(2);
    }
    return story(child, ends, output, size);
}

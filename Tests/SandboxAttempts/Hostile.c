// SPDX-License-Identifier: Apache-2.0
// Has a thread of a running process make system calls that are not in its program, as code of an attacker would, by ptrace(2).

#define _GNU_SOURCE
#include "CSandboxTest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

/// What an argument stands for that is known only when the call is made: its upper half says which.
enum { KIND_MASK = 0x7fff0000, TEXT = 0x51230000, VICTIM = 0x51240000 };
#define SPECIAL(kind, value) ((long)((uint64_t)(kind) << 32 | (uint32_t)(value)))
/// The address of a text, of which there are these.
#define AT(text) SPECIAL(TEXT, (text) * SLOT)
#define PROCESS SPECIAL(VICTIM, 0)
enum { SECRET, CREATED, IMAGE, REMOVED, RENAMED, OTHER_NAME, DIRECTORY, KVM, MEMORY, ROOT, NOWHERE, ZERO, HOW, CHILD, TEXTS };
enum { SLOT = 256 };

/// What is done after a call that succeeded, so that the process goes on as before.
enum after { NOTHING, CLOSE, UNMAP, PROTECT };

struct attempt {
    const char *name;
    long number;
    /// The call needs only to be looked at by the kernel, which has another reason to refuse it: without a sandbox it would do harm.
    int is_only_begun;
    enum after after;
    long arguments[6];
};

#define A(name, call, after, ...) {name, SYS_##call, 0, after, {__VA_ARGS__}},
#define B(name, call, ...) {name, SYS_##call, 1, NOTHING, {__VA_ARGS__}},
static const struct attempt attempts[] = {
    A("open a file of root's", openat, CLOSE, AT_FDCWD, AT(SECRET), O_RDONLY | O_CLOEXEC)
    A("the same by open", open, CLOSE, AT(SECRET), O_RDONLY | O_CLOEXEC)
    A("the same by openat2", openat2, CLOSE, AT_FDCWD, AT(SECRET), AT(HOW), 24)
    A("open another machine's image", openat, CLOSE, AT_FDCWD, AT(IMAGE), O_RDWR | O_CLOEXEC)
    A("create a file", openat, CLOSE, AT_FDCWD, AT(CREATED), O_RDWR | O_CREAT | O_CLOEXEC, 0600)
    A("open /dev/kvm again", openat, CLOSE, AT_FDCWD, AT(KVM), O_RDWR | O_CLOEXEC)
    A("open its own memory", openat, CLOSE, AT_FDCWD, AT(MEMORY), O_RDWR | O_CLOEXEC)
    A("look for a file", newfstatat, NOTHING, AT_FDCWD, AT(SECRET), AT(ZERO), 0)
    A("look for a file by statx", statx, NOTHING, AT_FDCWD, AT(SECRET), 0, 0x7ff, AT(ZERO))
    A("make a file everybody's", chmod, NOTHING, AT(SECRET), 0644)
    A("give a file away", chown, NOTHING, AT(SECRET), 0, 0)
    A("cut a file", truncate, NOTHING, AT(IMAGE), 4096)
    A("remove a file", unlink, NOTHING, AT(REMOVED))
    A("rename a file", rename, NOTHING, AT(RENAMED), AT(OTHER_NAME))
    A("make a directory", mkdir, NOTHING, AT(DIRECTORY), 0700)
    A("link to a file", symlink, NOTHING, AT(SECRET), AT(NOWHERE))
    A("change the directory", chdir, NOTHING, AT(ROOT))
    A("change the root", chroot, NOTHING, AT(ROOT))
    B("mount a file system", mount, AT(ROOT), AT(DIRECTORY), AT(ROOT), 0, 0)
    B("take a file system away", umount2, AT(ZERO), -1)
    B("run a program", execve, AT(ZERO), 0, 0)
    B("run a program by a descriptor", execveat, -1, AT(ZERO), 0, 0, 0x1000)
    A("start a process", clone, NOTHING, SIGCHLD)
    A("start a process by fork", fork, NOTHING)
    A("start a process by clone3", clone3, NOTHING, AT(CHILD), 88)
    A("enter a new namespace", unshare, NOTHING, CLONE_NEWUTS)
    B("enter another namespace", setns, -1, 0)
    A("signal another process", kill, NOTHING, PROCESS, SIGURG)
    A("signal a thread of another process", tgkill, NOTHING, PROCESS, PROCESS, SIGURG)
    // With options that there are not: a process that it traced would be its own to wait for.
    B("trace another process", ptrace, PTRACE_SEIZE, PROCESS, 0, -1)
    A("read another process's memory", process_vm_readv, NOTHING, PROCESS, 0, 0, 0, 0, 0)
    A("write another process's memory", process_vm_writev, NOTHING, PROCESS, 0, 0, 0, 0, 0)
    A("take hold of another process", pidfd_open, CLOSE, PROCESS, 0)
    A("another process's limits", prlimit64, NOTHING, PROCESS, 4, 0, AT(ZERO))
    A("an internet socket", socket, CLOSE, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)
    A("a UNIX socket", socket, CLOSE, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)
    A("a netlink socket", socket, CLOSE, AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0)
    A("a packet socket", socket, CLOSE, AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0)
    B("connect", connect, -1, 0, 0)
    B("bind", bind, -1, 0, 0)
    B("listen", listen, -1, 0)
    A("memory that is written and executed", mmap, UNMAP, 0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    A("execute what was written", mprotect, PROTECT, SPECIAL(TEXT, -1), 4096, PROT_READ | PROT_WRITE | PROT_EXEC)
    A("a file in memory", memfd_create, CLOSE, AT(ROOT), 1)
    A("a ring of io_uring without limits", io_uring_setup, CLOSE, 4, AT(ZERO))
    B("other limits of a ring", io_uring_register, -1, 11, 0, 0)
    B("a program in the kernel", bpf, -1, 0, 0)
    B("page faults in its own hands", userfaultfd, -1)
    B("events of the processor", perf_event_open, 0, 0, 0, 0, 0)
    A("another user", setresuid, NOTHING, -1, -1, -1)
    A("another group", setresgid, NOTHING, -1, -1, -1)
    B("capabilities", capset, 0, 0)
    A("core files", prctl, NOTHING, PR_SET_DUMPABLE, 1)
    B("a filter that asks it", seccomp, 1, 8, 0)
    A("another handler for SIGSYS", rt_sigaction, NOTHING, SIGSYS, 0, 0, 8)
    A("a copy of a descriptor", dup, CLOSE, 0)
    A("changes of files", inotify_init1, CLOSE, O_CLOEXEC)
    B("keys of a terminal", ioctl, -1, TIOCSTI, AT(ZERO))
    A("an owner of signals", fcntl, NOTHING, 0, F_SETOWN, 0)
    B("keys of the kernel", keyctl, -1, 0, 0, 0, 0)
    B("a module of the kernel", init_module, 0, 0, AT(ZERO))
    B("another kernel", kexec_load, 0, 0, 0, -1)
    B("a name of the host", sethostname, 0, -1)
    B("swap", swapon, AT(ZERO), 0)
    B("list a directory", getdents64, -1, 0, 0)
    A("the number of a 32-bit program", getppid, NOTHING, 0)
};
#undef A
#undef B
enum { COUNT = sizeof attempts / sizeof *attempts };

const int hostile_attempt_count = COUNT;
const char *hostile_attempt_name(int index) { return attempts[index].name; }
int hostile_attempt_is_only_begun(int index) { return attempts[index].is_only_begun; }

/// A thread that is stopped, and what it is to go on with.
struct victim {
    pid_t thread;
    struct user_regs_struct registers;
    /// The address of an instruction `syscall`.
    uint64_t instruction;
    /// Memory of the thread, below its stack.
    uint64_t texts;
};

static int stop(struct victim *victim) {
    if (ptrace(PTRACE_SEIZE, victim->thread, 0, PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE) < 0) return errno;
    for (int turn = 0; turn < 200; turn++) {
        int status;
        if (ptrace(PTRACE_INTERRUPT, victim->thread, 0, 0) < 0 || waitpid(victim->thread, &status, __WALL) < 0) return errno;
        if (!WIFSTOPPED(status)) return ESRCH;
        if (ptrace(PTRACE_GETREGS, victim->thread, 0, &victim->registers) < 0) return errno;
        victim->instruction = victim->registers.rip - 2;
        errno = 0;
        long code = ptrace(PTRACE_PEEKTEXT, victim->thread, victim->instruction, 0);
        // It was waiting in a system call.
        if (errno == 0 && (code & 0xffff) == 0x050f && (long)victim->registers.orig_rax >= 0) return 0;
        ptrace(PTRACE_CONT, victim->thread, 0, 0);
        usleep(1000);
    }
    return EBUSY;
}

/// Has the thread make a call. Returns what the kernel answered, or HOSTILE_REFUSED.
static long call(struct victim *victim, long number, const long arguments[6]) {
    struct user_regs_struct registers = victim->registers;
    registers.rip = victim->instruction;
    registers.orig_rax = (unsigned long long)-1;
    registers.rax = (unsigned long long)number;
    registers.rdi = (unsigned long long)arguments[0];
    registers.rsi = (unsigned long long)arguments[1];
    registers.rdx = (unsigned long long)arguments[2];
    registers.r10 = (unsigned long long)arguments[3];
    registers.r8 = (unsigned long long)arguments[4];
    registers.r9 = (unsigned long long)arguments[5];
    if (ptrace(PTRACE_SETREGS, victim->thread, 0, &registers) < 0) return HOSTILE_LOST;
    int is_refused = 0;
    while (1) {
        int status;
        if (ptrace(PTRACE_SINGLESTEP, victim->thread, 0, 0) < 0 || waitpid(victim->thread, &status, __WALL) < 0) return HOSTILE_LOST;
        if (!WIFSTOPPED(status)) return HOSTILE_LOST;
        if (status >> 16) {
            // A child, which is stopped before its first instruction.
            unsigned long child = 0;
            if (ptrace(PTRACE_GETEVENTMSG, victim->thread, 0, &child) == 0 && (status >> 16) <= PTRACE_EVENT_CLONE && child) {
                kill((pid_t)child, SIGKILL);
                waitpid((pid_t)child, 0, __WALL);
            }
            continue;
        }
        // The signal is not delivered: its handler would end the process.
        if (WSTOPSIG(status) == SIGSYS) is_refused = 1;
        // After it too: the step's own signal is behind it.
        if (WSTOPSIG(status) == SIGTRAP) break;
    }
    if (is_refused) return HOSTILE_REFUSED;
    return ptrace(PTRACE_GETREGS, victim->thread, 0, &registers) < 0 ? HOSTILE_LOST : (long)registers.rax;
}

static void undo(struct victim *victim, const struct attempt *attempt, const long arguments[6], long answer) {
    if (answer < 0) return;
    if (attempt->after == CLOSE) call(victim, SYS_close, (long[6]){answer});
    if (attempt->after == UNMAP) call(victim, SYS_munmap, (long[6]){answer, arguments[1]});
    if (attempt->after == PROTECT) call(victim, SYS_mprotect, (long[6]){arguments[0], arguments[1], PROT_READ | PROT_WRITE});
}

static int write_texts(const struct victim *victim, const char *directory) {
    static const char *const names[] = {"secret", "created", "image", "removed", "renamed", "other", "directory"};
    char texts[TEXTS * SLOT];
    memset(texts, 0, sizeof texts);
    for (int i = 0; i < (int)(sizeof names / sizeof *names); i++) snprintf(texts + i * SLOT, SLOT, "%s/%s", directory, names[i]);
    strcpy(texts + KVM * SLOT, "/dev/kvm");
    strcpy(texts + MEMORY * SLOT, "/proc/self/mem");
    strcpy(texts + ROOT * SLOT, "/");
    snprintf(texts + NOWHERE * SLOT, SLOT, "%s/link", directory);
    const uint64_t how[3] = {O_RDONLY | O_CLOEXEC, 0, 0}, child[11] = {0, 0, 0, 0, SIGCHLD};
    memcpy(texts + HOW * SLOT, how, sizeof how);
    memcpy(texts + CHILD * SLOT, child, sizeof child);
    struct iovec from = {texts, sizeof texts}, to = {(void *)victim->texts, sizeof texts};
    return process_vm_writev(victim->thread, &from, 1, &to, 1, 0) == sizeof texts ? 0 : errno;
}

int hostile_attempt_all(int thread, int other, const char *directory, long *results) {
    struct victim victim = {.thread = thread};
    int status = stop(&victim);
    if (status) return status;
    // Below the red zone, on pages of the stack that nothing uses now.
    victim.texts = (victim.registers.rsp - 4096 - TEXTS * SLOT) & ~(uint64_t)4095;
    status = write_texts(&victim, directory);
    for (int i = 0; i < COUNT && !status; i++) {
        long arguments[6];
        for (int j = 0; j < 6; j++) {
            long value = attempts[i].arguments[j];
            uint32_t kind = (uint32_t)((uint64_t)value >> 32);
            arguments[j] = value;
            if (kind == TEXT) arguments[j] = (int32_t)value < 0 ? (long)victim.texts : (long)(victim.texts + (uint32_t)value);
            if (kind == VICTIM) arguments[j] = other;
        }
        // Which an earlier one has written into.
        if (write_texts(&victim, directory)) status = ESRCH;
        long number = attempts[i].number == SYS_getppid ? 0x40000000 | SYS_getpid : attempts[i].number;
        results[i] = call(&victim, number, arguments);
        if (results[i] == HOSTILE_LOST) status = ESRCH;
        undo(&victim, &attempts[i], arguments, results[i]);
    }
    // It goes on with the call that it waited in.
    if (ptrace(PTRACE_SETREGS, victim.thread, 0, &victim.registers) < 0 && !status) status = errno;
    if (ptrace(PTRACE_DETACH, victim.thread, 0, 0) < 0 && !status) status = errno;
    return status;
}

int hostile_jump(int thread, unsigned long address) {
    int status;
    if (ptrace(PTRACE_SEIZE, thread, 0, 0) < 0) return errno;
    int error = ptrace(PTRACE_INTERRUPT, thread, 0, 0) < 0 || waitpid(thread, &status, __WALL) < 0 ? errno : 0;
    struct user_regs_struct registers;
    if (error == 0 && ptrace(PTRACE_GETREGS, thread, 0, &registers) < 0) error = errno;
    registers.rip = address;
    // A call that was interrupted is not begun again.
    registers.orig_rax = (unsigned long)-1;
    if (error == 0 && ptrace(PTRACE_SETREGS, thread, 0, &registers) < 0) error = errno;
    if (ptrace(PTRACE_DETACH, thread, 0, 0) < 0 && error == 0) error = errno;
    return error;
}

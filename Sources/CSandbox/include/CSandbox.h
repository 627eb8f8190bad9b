// SPDX-License-Identifier: Apache-2.0
// Seccomp (seccomp(2)): the system calls of a running machine, installing a filter, and the handler of the signal that a filter sends.
#ifndef CSANDBOX_H
#define CSANDBOX_H

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/// Kinds of threads.
enum csandbox_threads {
    CSANDBOX_VCPU = 1,
    CSANDBOX_DEVICE = 2,
    /// main, and those of the control, the debugger, metrics, the console and messages.
    CSANDBOX_OTHER = 4,
    /// No thread of the process: another process, which reverts the changes on the host at the machine's end.
    CSANDBOX_BROKER = 8,
    /// A device's, in addition, that accepts and makes connections.
    CSANDBOX_SOCKETS = 16,
    /// The server of the management API.
    CSANDBOX_API = 32,
};

/// What a machine has that needs system calls of its own while it runs.
enum csandbox_need {
    CSANDBOX_ALWAYS,
    /// A terminal, which a child process restores.
    CSANDBOX_TERMINAL,
    /// A terminal that is not the process's yet: the child process is made when it is.
    CSANDBOX_LATER_TERMINAL,
    /// A disk on a server.
    CSANDBOX_REMOTE_DISK,
    /// The same, over TLS.
    CSANDBOX_REMOTE_TLS,
    /// A file of metrics that is replaced as a whole.
    CSANDBOX_METRICS_FILE,
    /// A console's file with a bound.
    CSANDBOX_ROTATED_FILE,
    /// A control group of its own.
    CSANDBOX_CONTROL_GROUP,
    /// A process that reverts the changes on the host.
    CSANDBOX_RESTORED,
    /// A vsock device, whose ports are sockets of the host.
    CSANDBOX_VSOCK,
};

/// A machine, as the list needs to know it.
struct csandbox_machine {
    /// A set of bits `1 << csandbox_need`.
    uint32_t needs;
    /// The process's own ID.
    int32_t process;
    /// Refused calls are reported and made; also those that fail otherwise.
    int32_t reports;
};

/// What an argument is compared with; its low 32 bits, which is all that these calls heed.
enum csandbox_test {
    CSANDBOX_ANYTHING,
    CSANDBOX_EQUAL,
    CSANDBOX_UNEQUAL,
    /// None of the bits of the value is set.
    CSANDBOX_NO_BITS,
    /// It is the process's ID.
    CSANDBOX_OWN_PROCESS,
};

/// A call, a condition on one of its arguments, what is done with it, and why.
struct csandbox_rule {
    const char *name;
    /// The condition in words; empty without one.
    const char *condition;
    const char *reason;
    uint32_t value;
    uint16_t call;
    /// An errno value; 0 lets the call through.
    uint16_t error;
    /// A set of `csandbox_threads`.
    uint8_t threads;
    /// One of `csandbox_need`.
    uint8_t need;
    /// One of `csandbox_test`.
    uint8_t test;
    uint8_t argument;
};

/// The list, in order of precedence.
const struct csandbox_rule *csandbox_rules(size_t *count);

/// Whether a rule is one for this machine, and for one of these kinds of threads.
int csandbox_applies(const struct csandbox_rule *rule, const struct csandbox_machine *machine, unsigned threads);

/// The name of a system call of this architecture, or null.
const char *csandbox_call_name(long number);

/// What every filter checks first: AUDIT_ARCH_X86_64.
static const uint32_t CSANDBOX_ARCHITECTURE = AUDIT_ARCH_X86_64;
/// Instructions that a filter may have; the kernel takes 4096.
enum { CSANDBOX_LIMIT = 1024 };

/// Compiles the filter of some kinds of threads of a machine into a buffer of CSANDBOX_LIMIT instructions.
/// A call without a rule gets `fallback`. Returns where in the buffer the filter begins.
const struct sock_filter *csandbox_compile(
    const struct csandbox_machine *machine, unsigned threads, uint32_t fallback, struct sock_filter *buffer, unsigned short *count
);

/// Confines all threads of the process to the list, and sets no_new_privs. A call without a rule sends SIGSYS.
/// Returns 0, or an errno value; ESRCH if another thread has a filter that the calling one has not.
int csandbox_confine_process(const struct csandbox_machine *machine);

/// Confines the calling thread of such a process to the calls of its kind. Returns 0 or an errno value.
int csandbox_confine_thread(const struct csandbox_machine *machine, unsigned kind);

// Rights

/// The version of Landlock's interface; a negative errno value of a kernel without it.
int csandbox_landlock_version(void);

/// Accesses of Landlock.
enum csandbox_access {
    CSANDBOX_WRITE_FILE = 1 << 1,
    CSANDBOX_READ_FILE = 1 << 2,
    CSANDBOX_READ_DIRECTORY = 1 << 3,
    CSANDBOX_REMOVE_DIRECTORY = 1 << 4,
    CSANDBOX_REMOVE_FILE = 1 << 5,
    CSANDBOX_MAKE_FILE = 1 << 8,
};

/// A directory, or a file, and what may still be done below it.
struct csandbox_place {
    int descriptor;
    uint64_t access;
};

/// Makes a set of rules that refuses everything but these accesses and connections to these ports. Returns its descriptor, or a negative errno value.
int csandbox_landlock_ruleset(
    int version, const struct csandbox_place *places, size_t place_count, const uint16_t *ports, size_t port_count, int connects_anywhere
);

/// The capabilities that the calling thread may use.
uint64_t csandbox_capabilities(void);

/// Whether files of a directory can be created and replaced with CAP_DAC_OVERRIDE only.
int csandbox_needs_override(int directory);

/// What the process drops.
struct csandbox_rights {
    /// A set of rules of Landlock; -1 for none.
    int ruleset;
    int drops_capabilities;
    /// Capabilities that stay.
    uint64_t kept;
    /// Who it becomes, without supplementary groups; 0 to stay.
    uint32_t user, group;
};

/// Makes all threads of the process drop privileges, with no_new_privs; `csandbox_report` must be called before.
/// Returns 0 or an errno value; `user_error` gets the reason why the user has not changed, or 0.
int csandbox_drop_privileges(const struct csandbox_rights *wanted, int *user_error);

/// For the handler of SIGSYS: whether the signal was one of csandbox_drop_privileges, which is done then.
int csandbox_visited(const siginfo_t *information);

/// Moves the process, which has one thread, into namespaces of its own: of users where it has no CAP_SYS_ADMIN, of hosts' names and of System V's
/// IPC; if `hides_files`, of mounts, with an empty root; if `hides_network`, of networks, without an interface. Returns 0 or an errno value.
int csandbox_separate(int hides_files, int hides_network);

/// What csandbox_separate would return, found out by a child process.
int csandbox_can_separate(void);

/// A descriptor that only names a file, for a csandbox_place; negative when it is not there.
int csandbox_name(const char *path);

/// A pipe: the end to read from, and the one to write to. Returns 0 or an errno value.
int csandbox_pipe(int *ends);

/// Waits until the other end of a pipe is closed.
void csandbox_await_close(int end);

/// Waits for the end of a child process.
void csandbox_await(pid_t process);

/// Starts a process that keeps these descriptors only, in ascending order, and standard error, and gets no signals but SIGSYS. Returns 0 in that
/// process, its ID in the calling one, or a negative errno value.
int csandbox_fork(const char *name, const int *descriptors, size_t count);

/// Calls `visit` with each number that is a name in a directory of /proc: descriptors, threads. Returns -1 where the directory cannot be opened.
int csandbox_each_number(const char *directory, void (*visit)(int number, void *context), void *context);

/// Takes from the process what a machine does not need while it runs, as far as the kernel lets it: descriptors that it inherited and has not
/// taken over, core files, a higher limit of descriptors, the access of other processes of the user to its memory (PR_SET_DUMPABLE).
/// With `files_are_private` other users may not read the files that it creates.
void csandbox_reduce(int files_are_private);

/// Withholds the process's memory from other processes of its user's (PR_SET_DUMPABLE).
void csandbox_hide(void);

/// Whether the kernel knows an action of filters (SECCOMP_GET_ACTION_AVAIL).
int csandbox_has_action(const uint32_t *action);

/// Has SIGSYS report the system call that a filter has refused, in one line on standard error, beginning with `prefix`.
/// With `exit_status` 0 or more the process then ends with it. With -1 the call is made after all, by the only instruction that a filter for
/// reports lets through (`csandbox_passage`).
/// Returns 0, or an errno value.
int csandbox_report(const char *prefix, int exit_status);

/// Has the signals of a fault (SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGABRT) report it on standard error, in lines that begin with `prefix`: the
/// signal, the program counter, the thread, the binary's build ID, and the callers; then the process ends with `exit_status`. Addresses are those of
/// the ELF file. Such a signal from another process does what it does by default. A handler has a stack of its own in the calling thread only.
/// Returns 0, or an errno value.
int csandbox_report_faults(const char *prefix, int exit_status);

/// Ends the process, with a line about a thread that could not be confined for `error`.
void csandbox_end(int error, int exit_status) __attribute__((noreturn));

/// The address behind the instruction that makes the call in a report, as a filter sees it in `instruction_pointer`.
uint64_t csandbox_passage(void);

#endif

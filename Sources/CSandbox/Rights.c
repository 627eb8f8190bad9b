// SPDX-License-Identifier: Apache-2.0
// Privileges that a process drops permanently: capabilities (capabilities(7)), its user (credentials(7)), and by Landlock
// (landlock(7)) whatever has a name: files, ports, other processes. The kernel keeps them for each thread; existing threads
// drop them in a handler of SIGSYS.

#define _GNU_SOURCE
#include "CSandbox.h"

#include <linux/capability.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

// Landlock, whose header older systems do not have; numbers of system calls are the same for all architectures.
enum { CREATE_RULESET = 444, ADD_RULE = 445, RESTRICT_SELF = 446 };
enum { RULE_PATH_BENEATH = 1, RULE_NET_PORT = 2 };
enum { BIND_TCP = 1, CONNECT_TCP = 2, SCOPES = 3 };

/// struct landlock_ruleset_attr as of ABI 6; an older kernel takes it if what it does not know is 0.
struct ruleset {
    uint64_t files, network, scopes;
};

struct __attribute__((packed)) path_rule {
    uint64_t access;
    int32_t parent;
};

struct port_rule {
    uint64_t access, port;
};

int csandbox_landlock_version(void) {
    long version = syscall(CREATE_RULESET, 0, 0, 1);
    return version < 0 ? -errno : (int)version;
}

int csandbox_name(const char *path) { return open(path, O_PATH | O_CLOEXEC); }

int csandbox_landlock_ruleset(
    int version, const struct csandbox_place *places, size_t place_count, const uint16_t *ports, size_t port_count, int connects_anywhere
) {
    // All accesses that the version knows, so that those without a rule are refused.
    static const uint64_t files[] = {0, 0x1fff, 0x3fff, 0x7fff, 0x7fff, 0xffff};
    struct ruleset attributes = {.files = files[version < 5 ? version : 5]};
    if (version >= 4) attributes.network = connects_anywhere ? BIND_TCP : BIND_TCP | CONNECT_TCP;
    if (version >= 6) attributes.scopes = SCOPES;
    int ruleset = (int)syscall(CREATE_RULESET, &attributes, sizeof attributes, 0);
    if (ruleset < 0) return -errno;
    for (size_t i = 0; i < place_count; i++) {
        struct path_rule rule = {places[i].access & attributes.files, places[i].descriptor};
        struct stat status;
        if (fstat(rule.parent, &status) == 0 && !S_ISDIR(status.st_mode)) rule.access &= CSANDBOX_READ_FILE | CSANDBOX_WRITE_FILE;
        if (syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, &rule, 0) < 0) goto failed;
    }
    for (size_t i = 0; i < port_count && attributes.network & CONNECT_TCP; i++) {
        struct port_rule rule = {CONNECT_TCP, ports[i]};
        if (syscall(ADD_RULE, ruleset, RULE_NET_PORT, &rule, 0) < 0) goto failed;
    }
    return ruleset;
failed:;
    int error = errno;
    close(ruleset);
    return -error;
}

static int capabilities(struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3], long call) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    return syscall(call, &header, sets) < 0 ? errno : 0;
}

uint64_t csandbox_capabilities(void) {
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
    if (capabilities(sets, SYS_capget)) return 0;
    return (uint64_t)sets[1].permitted << 32 | sets[0].permitted;
}

/// Empties a thread's bounding set, as far as it may.
static void bound_capabilities(void) {
    for (int capability = 0; capability < 64; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0) break;
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

/// Leaves a thread no more of its capabilities than these.
static int keep_capabilities(uint64_t kept) {
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3];
    int error = capabilities(sets, SYS_capget);
    if (error) return error;
    for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
        sets[i].permitted &= (uint32_t)(kept >> 32 * i);
        sets[i].effective = sets[i].permitted;
        sets[i].inheritable = 0;
    }
    return capabilities(sets, SYS_capset);
}

int csandbox_needs_override(int directory) {
    struct __user_cap_data_struct before[_LINUX_CAPABILITY_U32S_3], none[_LINUX_CAPABILITY_U32S_3];
    if (capabilities(before, SYS_capget)) return 0;
    memcpy(none, before, sizeof none);
    none[0].effective = none[1].effective = 0;
    if (capabilities(none, SYS_capset)) return 0;
    int is_refused = faccessat(directory, ".", W_OK | X_OK, AT_EACCESS) < 0;
    capabilities(before, SYS_capset);
    return is_refused;
}

/// Makes a thread another user's: the kernel's own calls are about one thread.
static int become(uint32_t user, uint32_t group) {
    if (syscall(SYS_setgroups, 0, 0) < 0 || syscall(SYS_setresgid, group, group, group) < 0) return errno;
    return syscall(SYS_setresuid, user, user, user) < 0 ? errno : 0;
}

/// What each thread must drop.
static struct csandbox_rights rights;
static atomic_int visited, failure;
static enum { BEFORE, VISITING, AFTER } _Atomic stage;

/// The first half, which needs capabilities.
static int change_user(void) {
    // For Landlock, and for the filters.
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return errno;
    if (rights.drops_capabilities) bound_capabilities();
    return rights.user ? become(rights.user, rights.group) : 0;
}

static int drop_own(void) {
    int error = rights.drops_capabilities ? keep_capabilities(rights.kept) : 0;
    if (!error && rights.ruleset >= 0 && syscall(RESTRICT_SELF, rights.ruleset, 0) < 0) error = errno;
    return error;
}

int csandbox_visited(const siginfo_t *information) {
    if (information->si_code != SI_TKILL || atomic_load(&stage) == BEFORE) return 0;
    if (atomic_load(&stage) == AFTER) return 1;
    int error = change_user();
    if (!error) error = drop_own();
    if (error) atomic_store(&failure, error);
    atomic_fetch_add(&visited, 1);
    return 1;
}

/// Sends SIGSYS to a thread unless it is the caller. One that has just ended is not there any more.
static void visit_other(int thread, void *others) {
    if (thread != (int)syscall(SYS_gettid) && syscall(SYS_tgkill, getpid(), thread, SIGSYS) == 0) ++*(int *)others;
}

/// Sends SIGSYS to all other threads. Returns how many there are, or -1 where the kernel does not say.
static int visit_others(void) {
    int others = 0;
    return csandbox_each_number("/proc/self/task", visit_other, &others) < 0 ? -1 : others;
}

int csandbox_drop_privileges(const struct csandbox_rights *wanted, int *user_error) {
    rights = *wanted;
    *user_error = change_user();
    // The others stay what this one is.
    if (*user_error) rights.user = 0;
    atomic_store(&visited, 0);
    atomic_store(&failure, 0);
    atomic_store(&stage, VISITING);
    // Before this thread is in a domain of Landlock's, from which some versions let no signal out.
    int others = visit_others();
    // A signal comes before the thread's next instruction: one that does not answer waits in the kernel, as for a file system whose server is gone.
    const struct timespec nap = {0, 50000};
    for (int turn = 0; turn < 10000 && atomic_load(&visited) < others; turn++) nanosleep(&nap, 0);
    atomic_store(&stage, AFTER);
    int error = drop_own();
    if (!error) error = atomic_load(&failure);
    return error ? error : atomic_load(&visited) < others ? EBUSY : 0;
}

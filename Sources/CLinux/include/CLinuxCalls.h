// SPDX-License-Identifier: Apache-2.0
// Calls that C declares variadic, or libc does not wrap.
#ifndef CLINUX_CALLS_H
#define CLINUX_CALLS_H

static inline int clinux_ioctl(int fd, unsigned long request, void *argument) { return ioctl(fd, request, argument); }
static inline int clinux_ioctl_value(int fd, unsigned long request, unsigned long value) { return ioctl(fd, request, value); }
static inline int clinux_open(const char *path, int flags, mode_t mode) { return open(path, flags, mode); }
static inline int clinux_fcntl_value(int fd, int command, long value) { return fcntl(fd, command, value); }
static inline void *clinux_map_failed(void) { return MAP_FAILED; }

/// openat2(2) below a directory, with O_CLOEXEC: neither `..` nor symbolic links lead out of it.
int clinux_open_below(int directory, const char *path, int flags);

// GNU extensions; see the manual page of the name behind the prefix.
int clinux_memfd_create(const char *name, unsigned flags);
/// Seals a memfd's size, and its seals (F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL).
int clinux_seal_size(int fd);
/// Keeps a memfd as it is from now on (F_ADD_SEALS).
int clinux_seal(int fd);
/// preadv2(2) with RWF_NOWAIT: EAGAIN, or fewer bytes, where it would have to wait for a disk.
ssize_t clinux_read_cached(int fd, const struct iovec *vectors, int count, off_t offset);
int clinux_fallocate(int fd, int mode, off_t offset, off_t length);
/// Whether the page cache has at least half of a range of a file, of at most 2 MiB with its pages (mincore(2)); also when it may not be asked.
int clinux_is_cached(int fd, off_t offset, size_t length);
/// Whether the page of this process at an address, a multiple of 4096, has memory behind it (mincore(2)); also when that cannot be asked.
int clinux_is_resident(void *page);
/// mbind(2); `nodes` has a bit for each of the host's nodes, `count` of them.
int clinux_mbind(void *start, size_t length, int mode, const unsigned long *nodes, unsigned long count);
int clinux_set_thread_name(const char *name);
/// Restricts a thread to one host CPU; returns an errno value.
int clinux_set_thread_cpu(pthread_t thread, int cpu);
/// Open-file-description locks (fcntl(2)): tied to the open file, so they end with its last descriptor, however that ends.
int clinux_ofd_lock(int fd, short type, off_t start, off_t length);
/// The first conflicting lock's type, or F_UNLCK if `type` is available; -1 on error.
int clinux_ofd_lock_test(int fd, short type, off_t start, off_t length);
extern const int CLINUX_O_DIRECT;
extern const int CLINUX_O_PATH;
/// A file without a name in a directory (open(2)).
extern const int CLINUX_O_TMPFILE;
/// lseek's: where data, or a hole, begins at or after an offset.
extern const int CLINUX_SEEK_DATA;
extern const int CLINUX_SEEK_HOLE;
/// Renames a file and fails with EEXIST when the new name is taken (renameat2 with RENAME_NOREPLACE).
int clinux_rename_new(const char *from, const char *to);

/// How many bytes from the start are zero.
size_t clinux_zero_prefix(const void *bytes, size_t count);

/// Installs a handler that does nothing, without SA_RESTART: its only effect is that a blocking call returns EINTR.
static inline void clinux_signal_ignored(int number) { (void)number; }
static inline int clinux_install_interrupting_signal(int number) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = clinux_signal_ignored;
    return sigaction(number, &action, 0);
}
static inline int clinux_is_ignored(int number) {
    struct sigaction action;
    return sigaction(number, 0, &action) == 0 && action.sa_handler == SIG_IGN;
}
/// CPUs that the calling thread may run on. Unlike sysconf(3) it opens no file.
int clinux_usable_processors(void);

/// The first real-time signal that libc leaves to programs.
static inline int clinux_sigrtmin(void) { return SIGRTMIN; }

static inline int clinux_wait_exited(int status) { return WIFEXITED(status); }
static inline int clinux_wait_status(int status) { return WEXITSTATUS(status); }
static inline int clinux_wait_signal(int status) { return WIFSIGNALED(status) ? WTERMSIG(status) : 0; }

/// ioctl numbers of block devices and TUN/TAP, which are macros with casts.
static const unsigned long CLINUX_BLKGETSIZE64 = BLKGETSIZE64;
static const unsigned long CLINUX_BLKSSZGET = BLKSSZGET;
/// A file's range becomes another name for a range of another's blocks (ioctl_ficlonerange(2)).
static const unsigned long CLINUX_FICLONERANGE = FICLONERANGE;
static const unsigned long CLINUX_TUNSETPERSIST = TUNSETPERSIST;
static const unsigned long CLINUX_TUNSETOFFLOAD = TUNSETOFFLOAD;
static const unsigned long CLINUX_TUNSETVNETHDRSZ = TUNSETVNETHDRSZ;
static const unsigned long CLINUX_TIOCGPTN = TIOCGPTN;
static const unsigned long CLINUX_TIOCSPTLCK = TIOCSPTLCK;

/// 1 or 2 for a directory in a file system of control groups of that version, 0 for any other.
int clinux_cgroup_version(int directory);

#endif

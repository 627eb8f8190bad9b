#define _GNU_SOURCE
#include "CLinux.h"

int clinux_memfd_create(const char *name, unsigned flags) { return memfd_create(name, flags); }

int clinux_fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate(fd, mode, offset, length); }

int clinux_mbind(void *start, size_t length, int mode, const unsigned long *nodes, unsigned long count) {
    // The kernel takes one bit less than it is told.
    return (int)syscall(SYS_mbind, start, length, mode, nodes, count + 1, 0);
}

int clinux_set_thread_name(const char *name) { return pthread_setname_np(pthread_self(), name); }

int clinux_set_thread_cpu(pthread_t thread, int cpu) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) return EINVAL;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return pthread_setaffinity_np(thread, sizeof set, &set);
}

static struct flock whole_lock(short type, off_t start, off_t length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return lock;
}

int clinux_ofd_lock(int fd, short type, off_t start, off_t length) {
    struct flock lock = whole_lock(type, start, length);
    return fcntl(fd, F_OFD_SETLK, &lock);
}

int clinux_ofd_lock_test(int fd, short type, off_t start, off_t length) {
    struct flock lock = whole_lock(type, start, length);
    return fcntl(fd, F_OFD_GETLK, &lock) < 0 ? -1 : lock.l_type;
}

const int CLINUX_O_DIRECT = O_DIRECT;

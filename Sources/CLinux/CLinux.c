// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include <linux/openat2.h>
#include <stdio.h>
#include "CLinux.h"

int clinux_memfd_create(const char *name, unsigned flags) { return memfd_create(name, flags); }

int clinux_usable_processors(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

int clinux_seal_size(int fd) { return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL); }
int clinux_seal(int fd) { return fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE); }

int clinux_open_below(int directory, const char *path, int flags) {
    struct open_how how = {.flags = (unsigned)(flags | O_CLOEXEC), .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
}

ssize_t clinux_read_cached(int fd, const struct iovec *vectors, int count, off_t offset) {
    return preadv2(fd, vectors, count, offset, RWF_NOWAIT);
}

int clinux_fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate(fd, mode, offset, length); }

int clinux_is_cached(int fd, off_t offset, size_t length) {
    const off_t page = 4096;
    off_t start = offset & ~(page - 1);
    length += (size_t)(offset - start);
    unsigned char present[512];
    if (length == 0 || length > sizeof present * (size_t)page) return 0;
    // Nothing of the mapping is touched: it is only asked.
    void *mapping = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, start);
    if (mapping == MAP_FAILED) return 0;
    size_t pages = (length + (size_t)page - 1) / (size_t)page, count = 0;
    if (mincore(mapping, length, present) == 0)
        for (size_t i = 0; i < pages; i++) count += present[i] & 1;
    munmap(mapping, length);
    return 2 * count >= pages;
}

int clinux_is_resident(void *page) {
    unsigned char present = 1;
    mincore(page, 4096, &present);
    return present & 1;
}

int clinux_mbind(void *start, size_t length, int mode, const unsigned long *nodes, unsigned long count) {
    // The kernel uses one bit less than given.
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
const int CLINUX_O_PATH = O_PATH;
const int CLINUX_O_TMPFILE = O_TMPFILE;
const int CLINUX_SEEK_DATA = SEEK_DATA;
const int CLINUX_SEEK_HOLE = SEEK_HOLE;

int clinux_rename_new(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE); }

size_t clinux_zero_prefix(const void *bytes, size_t count) {
    const unsigned char *start = bytes, *p = start, *end = start + count;
    // 128 bytes at a time, in registers as wide as the processor surely has; memcpy is how C loads without alignment.
    while (end - p >= 128) {
        uint64_t words[16], any = 0;
        memcpy(words, p, sizeof words);
        for (int i = 0; i < 16; i++) any |= words[i];
        if (any) break;
        p += 128;
    }
    while (p < end && *p == 0) p++;
    return (size_t)(p - start);
}

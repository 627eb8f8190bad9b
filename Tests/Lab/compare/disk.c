// SPDX-License-Identifier: Apache-2.0

#define _GNU_SOURCE
#include "disk.h"
#include "common.h"
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DEPTH = 32, LARGE = 1 << 20, SMALL = 4096 };

static int disk;
static uint64_t size;
static uint8_t *memory;

/// The same sequence in every run (Knuth's MMIX generator).
static uint64_t number = 1;
static uint64_t random_page(void) {
    number = number * 6364136223846793005ull + 1442695040888963407ull;
    return (number >> 33) % (size / SMALL) * SMALL;
}

/// One request after the other.
static void one_by_one(const char *name, int writes, size_t length, int isRandom, double seconds) {
    double began = now(), time;
    uint64_t done = 0, offset = 0;
    do {
        uint64_t place = isRandom ? random_page() : offset;
        ssize_t moved = writes ? pwrite(disk, memory, length, place) : pread(disk, memory, length, place);
        check(moved == (ssize_t)length ? 0 : -1, name);
        offset = (offset + length) % (size - size % length);
        done++;
        time = now() - began;
    } while (time < seconds);
    report(name, done / time);
}

/// DEPTH requests in flight, each replaced when it completes.
static void many(const char *name, int writes, double seconds) {
    aio_context_t context = 0;
    static struct iocb blocks[DEPTH];
    struct iocb *list[DEPTH];
    struct io_event events[DEPTH];
    check(syscall(SYS_io_setup, DEPTH, &context), "io_setup");
    for (int i = 0; i < DEPTH; i++) {
        blocks[i] = (struct iocb){.aio_data = i, .aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD, .aio_fildes = disk,
                                  .aio_buf = (uintptr_t)(memory + i * SMALL), .aio_nbytes = SMALL, .aio_offset = random_page()};
        list[i] = &blocks[i];
    }
    double began = now(), time = 0;
    uint64_t done = 0;
    long inFlight = 0, ready = DEPTH;
    do {
        if (ready > 0) check(syscall(SYS_io_submit, context, ready, list) == ready ? 0 : -1, "io_submit");
        inFlight += ready;
        ready = 0;
        long ended = check(syscall(SYS_io_getevents, context, 1, DEPTH, events, NULL), "io_getevents");
        inFlight -= ended;
        done += ended;
        time = now() - began;
        for (long i = 0; i < ended; i++) {
            check(events[i].res == SMALL ? 0 : -1, name);
            struct iocb *block = &blocks[events[i].data];
            block->aio_offset = random_page();
            if (time < seconds) list[ready++] = block;
        }
    } while (inFlight + ready > 0);
    syscall(SYS_io_destroy, context);
    report(name, done / time);
}

void measure_disk(double seconds) {
    disk = check(open("/dev/vda", O_RDWR | O_DIRECT), "/dev/vda");
    check(ioctl(disk, BLKGETSIZE64, &size), "the disk's size");
    memory = aligned_alloc(LARGE, LARGE);
    memset(memory, 0x5a, LARGE);
    one_by_one("read-1m", 0, LARGE, 0, seconds);
    one_by_one("write-1m", 1, LARGE, 0, seconds);
    one_by_one("read-4k", 0, SMALL, 1, seconds);
    one_by_one("write-4k", 1, SMALL, 1, seconds);
    many("read-4k-32", 0, seconds);
    many("write-4k-32", 1, seconds);
}

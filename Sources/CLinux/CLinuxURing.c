// SPDX-License-Identifier: Apache-2.0

#include <liburing.h>

#include "CLinux.h"

struct clinux_ring {
    struct io_uring uring;
    /// The kernel took nothing for PATIENCE, and has taken nothing since.
    int refuses;
};

/// Milliseconds for which a submission that fails for lack of memory or of room for completions is tried again.
enum { PATIENCE = 1000 };

static int64_t milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/// Failures that may pass: no memory, or no room for completions.
static int may_pass(int status) { return status == -EAGAIN || status == -EBUSY || status == -ENOMEM; }

/// Starts a ring that was made with IORING_SETUP_R_DISABLED, for the operations below and no others: seccomp does not see what a ring does.
static int start_restricted(struct io_uring *uring) {
    static const unsigned char operations[] = {
        IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL,
    };
    enum { count = sizeof operations };
    struct io_uring_restriction restrictions[count + 1];
    memset(restrictions, 0, sizeof restrictions);
    for (int i = 0; i < count; i++) {
        restrictions[i].opcode = IORING_RESTRICTION_SQE_OP;
        restrictions[i].sqe_op = operations[i];
    }
    restrictions[count].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
    restrictions[count].sqe_flags = IOSQE_ASYNC;
    if (syscall(SYS_io_uring_register, uring->ring_fd, IORING_REGISTER_RESTRICTIONS, restrictions, count + 1) < 0) return -errno;
    return syscall(SYS_io_uring_register, uring->ring_fd, IORING_REGISTER_ENABLE_RINGS, 0, 0) < 0 ? -errno : 0;
}

clinux_ring *clinux_ring_create(unsigned entries, int *error) {
    clinux_ring *ring = calloc(1, sizeof *ring);
    if (!ring) {
        *error = ENOMEM;
        return 0;
    }
    // COOP_TASKRUN (Linux 5.19) spares the inter-processor interrupt for each completion.
    int status = io_uring_queue_init(entries, &ring->uring, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_R_DISABLED);
    if (status == -EINVAL) status = io_uring_queue_init(entries, &ring->uring, IORING_SETUP_R_DISABLED);
    if (status == 0 && start_restricted(&ring->uring) < 0) {
        io_uring_queue_exit(&ring->uring);
        status = -EINVAL;
    }
    // Before Linux 5.10, and where the host does not allow io_uring_register, there are no restrictions.
    if (status == -EINVAL) status = io_uring_queue_init(entries, &ring->uring, 0);
    if (status < 0) {
        free(ring);
        *error = -status;
        return 0;
    }
    return ring;
}

void clinux_ring_destroy(clinux_ring *ring) {
    io_uring_queue_exit(&ring->uring);
    free(ring);
}

int clinux_ring_descriptor(const clinux_ring *ring) { return ring->uring.ring_fd; }

static struct io_uring_sqe *next_entry(clinux_ring *ring) {
    struct io_uring_sqe *entry = io_uring_get_sqe(&ring->uring);
    if (entry) return entry;
    clinux_ring_submit(ring);
    return io_uring_get_sqe(&ring->uring);
}

int clinux_ring_readv(clinux_ring *ring, int fd, const struct iovec *vectors, unsigned count, uint64_t offset, uint64_t token, int aside) {
    struct io_uring_sqe *entry = next_entry(ring);
    if (!entry) return -EBUSY;
    io_uring_prep_readv(entry, fd, vectors, count, offset);
    io_uring_sqe_set_data64(entry, token);
    if (aside) io_uring_sqe_set_flags(entry, IOSQE_ASYNC);
    return 0;
}

int clinux_ring_writev(clinux_ring *ring, int fd, const struct iovec *vectors, unsigned count, uint64_t offset, uint64_t token) {
    struct io_uring_sqe *entry = next_entry(ring);
    if (!entry) return -EBUSY;
    io_uring_prep_writev(entry, fd, vectors, count, offset);
    io_uring_sqe_set_data64(entry, token);
    return 0;
}

int clinux_ring_fdatasync(clinux_ring *ring, int fd, uint64_t token) {
    struct io_uring_sqe *entry = next_entry(ring);
    if (!entry) return -EBUSY;
    io_uring_prep_fsync(entry, fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data64(entry, token);
    return 0;
}

int clinux_ring_fallocate(clinux_ring *ring, int fd, int mode, uint64_t offset, uint64_t length, uint64_t token) {
    struct io_uring_sqe *entry = next_entry(ring);
    if (!entry) return -EBUSY;
    io_uring_prep_fallocate(entry, fd, mode, offset, length);
    io_uring_sqe_set_data64(entry, token);
    return 0;
}

int clinux_ring_poll(clinux_ring *ring, int fd, uint64_t token) {
    struct io_uring_sqe *entry = next_entry(ring);
    if (!entry) return -EBUSY;
    io_uring_prep_poll_add(entry, fd, POLLIN);
    io_uring_sqe_set_data64(entry, token);
    return 0;
}

int clinux_ring_cancel(clinux_ring *ring, uint64_t target, uint64_t token) {
    struct io_uring_sqe *entry = next_entry(ring);
    if (!entry) return -EBUSY;
    io_uring_prep_cancel64(entry, target, 0);
    io_uring_sqe_set_data64(entry, token);
    return 0;
}

int clinux_ring_reclaim(clinux_ring *ring, uint64_t *token) {
    struct io_uring_sq *queue = &ring->uring.sq;
    if (!io_uring_sq_ready(&ring->uring)) return 0;
    unsigned last = queue->sqe_tail - 1;
    *token = queue->sqes[last & queue->ring_mask].user_data;
    queue->sqe_tail = last;
    // Also entries that a failed submission has made visible to the kernel: it reads them in such a call only.
    if ((int)(queue->sqe_head - last) > 0) {
        queue->sqe_head = last;
        *queue->ktail = last;
    }
    return 1;
}

/// After a failure that may be temporary: whether to repeat the call. `deadline` is 0 at first.
static int try_again(clinux_ring *ring, int64_t *deadline) {
    // Once it has lasted, each failure that follows is final: what waits for the end of a disk does not wait this long again.
    if (ring->refuses) return 0;
    int64_t now = milliseconds();
    if (!*deadline) {
        *deadline = now + PATIENCE;
        sched_yield();
        return 1;
    }
    if (now < *deadline) {
        usleep(1000);
        return 1;
    }
    ring->refuses = 1;
    return 0;
}

int clinux_ring_submit(clinux_ring *ring) {
    int64_t deadline = 0;
    // The kernel stops at an entry that it refuses, after posting its failure: the rest needs another call.
    while (io_uring_sq_ready(&ring->uring)) {
        int status = io_uring_submit(&ring->uring);
        if (status >= 0) {
            ring->refuses = 0;
            deadline = 0;
            continue;
        }
        if (status == -EINTR) continue;
        if (!may_pass(status)) return status;
        if (io_uring_cq_ready(&ring->uring)) return 0;
        if (!try_again(ring, &deadline)) return status;
    }
    return 0;
}

unsigned clinux_ring_queued(const clinux_ring *ring, uint64_t limit) {
    const struct io_uring_sq *queue = &ring->uring.sq;
    unsigned ready = io_uring_sq_ready(&ring->uring), count = 0;
    // The kernel takes them in their order: what it has not are the last ones.
    for (unsigned index = 1; index <= ready; index++)
        if (queue->sqes[(queue->sqe_tail - index) & queue->ring_mask].user_data < limit) count++;
    return count;
}

int clinux_ring_wait(clinux_ring *ring, unsigned count) {
    struct io_uring_cqe *entry;
    int64_t deadline = 0;
    int status;
    do status = io_uring_wait_cqe_nr(&ring->uring, &entry, count);
    while (status == -EINTR || (may_pass(status) && try_again(ring, &deadline)));
    // Those that are there can be taken.
    return may_pass(status) && io_uring_cq_ready(&ring->uring) ? 0 : status;
}

int clinux_ring_spin(clinux_ring *ring, unsigned nanoseconds) {
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        if (io_uring_cq_ready(&ring->uring)) return 1;
        // With COOP_TASKRUN completions are posted in system calls only.
        io_uring_get_events(&ring->uring);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000000000L + now.tv_nsec - start.tv_nsec < (long)nanoseconds);
    return io_uring_cq_ready(&ring->uring) != 0;
}

int clinux_ring_next(clinux_ring *ring, clinux_ring_completion *completion) {
    struct io_uring_cqe *entry;
    if (io_uring_peek_cqe(&ring->uring, &entry) != 0) return 0;
    completion->token = entry->user_data;
    completion->result = entry->res;
    io_uring_cqe_seen(&ring->uring, entry);
    return 1;
}

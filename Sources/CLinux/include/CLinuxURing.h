// SPDX-License-Identifier: Apache-2.0
// io_uring through liburing. Its header wants _GNU_SOURCE, which CLinux.h must not define, so Swift sees an opaque ring
// and these calls. Results are as the kernel gives them: a negative errno value is a failure.
#ifndef CLINUX_URING_H
#define CLINUX_URING_H

typedef struct clinux_ring clinux_ring;
typedef struct {
    uint64_t token;
    int32_t result;
} clinux_ring_completion;

/// A ring of at least `entries` submissions; null with an errno value in `error` when the host gives none.
clinux_ring *clinux_ring_create(unsigned entries, int *error);
void clinux_ring_destroy(clinux_ring *ring);
/// The ring's descriptor: readable while completions wait.
int clinux_ring_descriptor(const clinux_ring *ring);

// Each queues one operation and returns 0, or -EBUSY when the kernel takes no more. The vectors must live until
// clinux_ring_submit returns, the memory they name until the completion.
/// With `aside` in a thread of the kernel's from the start.
int clinux_ring_readv(clinux_ring *ring, int fd, const struct iovec *vectors, unsigned count, uint64_t offset, uint64_t token, int aside);
int clinux_ring_writev(clinux_ring *ring, int fd, const struct iovec *vectors, unsigned count, uint64_t offset, uint64_t token);
int clinux_ring_fdatasync(clinux_ring *ring, int fd, uint64_t token);
int clinux_ring_fallocate(clinux_ring *ring, int fd, int mode, uint64_t offset, uint64_t length, uint64_t token);
/// Completes when the descriptor is readable.
int clinux_ring_poll(clinux_ring *ring, int fd, uint64_t token);

/// Queues the cancellation of the operation that was queued with `target` (IORING_OP_ASYNC_CANCEL).
int clinux_ring_cancel(clinux_ring *ring, uint64_t target, uint64_t token);
/// Takes back the entry that was queued last, if the kernel has not got it, and gives its token. 0 when there is none.
int clinux_ring_reclaim(clinux_ring *ring, uint64_t *token);
/// Hands all that is queued to the kernel. Failures that may pass (memory, a full completion queue) are returned once
/// they have lasted for a second, and then immediately until the kernel accepts entries again; 0 while there are
/// completions to be taken first.
int clinux_ring_submit(clinux_ring *ring);
/// How many operations with tokens below a limit are queued that the kernel has not taken. It takes none by itself.
unsigned clinux_ring_queued(const clinux_ring *ring, uint64_t limit);
/// Waits for so many completions, at least 1. Failures that may pass are returned as clinux_ring_submit does.
int clinux_ring_wait(clinux_ring *ring, unsigned count);
/// Looks for a completion for so long without sleeping. Returns whether there is one.
int clinux_ring_spin(clinux_ring *ring, unsigned nanoseconds);
/// Takes the next completion; 0 when there is none.
int clinux_ring_next(clinux_ring *ring, clinux_ring_completion *completion);

#endif

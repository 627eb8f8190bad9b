// SPDX-License-Identifier: Apache-2.0

public import CLinux

/// An io_uring: file operations that the kernel carries out while the caller continues (io_uring(7)).
///
/// Operations are queued, handed over by one ``submit()``, and come back, in any order, from ``nextCompletion()`` with
/// the token that they were queued with. The ring's descriptor is readable while completions wait, so a thread
/// can watch it with ``Epoll``. One thread at a time uses a ring.
@safe public struct IORing: ~Copyable, @unchecked Sendable {
    /// The result of one operation.
    public struct Completion: Sendable {
        /// The token that the operation was queued with.
        public let token: UInt64
        /// Bytes moved, or 0, or a negative errno value.
        public let result: Int32

        public init(token: UInt64, result: Int32) {
            self.token = token
            self.result = result
        }
    }

    // The ring is used by its owner alone, which moves between threads as a whole: hence `Sendable`.
    private let ring: OpaquePointer

    /// - Parameter entries: operations that can be queued before a ``submit()``; the kernel rounds it up to a power of
    ///   two and keeps twice as many completions.
    /// - Throws: `ENOSYS`, `EPERM` or `ENOMEM` where the host has no io_uring for this process (an old kernel, the
    ///   sysctl `kernel.io_uring_disabled`, a seccomp filter, a memory limit).
    public init(entries: Int) throws(SystemCallError) {
        var error: Int32 = 0
        guard let ring = unsafe clinux_ring_create(UInt32(clamping: entries), &error) else {
            throw SystemCallError("io_uring_setup", errno: error)
        }
        unsafe self.ring = ring
    }

    deinit {
        unsafe clinux_ring_destroy(ring)
    }

    /// The ring's descriptor, for ``Epoll``.
    public var rawValue: Int32 { unsafe clinux_ring_descriptor(ring) }

    // The calls below: the ring lives as long as `self`; the caller guarantees that the vectors and their memory are
    // valid.

    /// Queues a `preadv`. The vectors live until ``submit()`` returns, the memory that they name until the completion.
    /// - Parameter isAside: a thread of the kernel's does it from the start (`IOSQE_ASYNC`), also where the caller
    ///   would not have to wait: so that large copies out of the page cache run in parallel. The vectors live
    ///   until the completion then.
    /// - Throws: `EBUSY` when the kernel takes no more before completions are taken.
    public func read(
        _ file: Int32, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64,
        isAside: Bool = false
    )
        throws(SystemCallError)
    {
        try check(
            unsafe clinux_ring_readv(ring, file, vectors, UInt32(clamping: count), offset, token, isAside ? 1 : 0),
            "readv")
    }

    /// Queues a `pwritev`; as ``read(_:_:count:at:token:)``.
    public func write(
        _ file: Int32, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64
    )
        throws(SystemCallError)
    {
        try check(unsafe clinux_ring_writev(ring, file, vectors, UInt32(clamping: count), offset, token), "writev")
    }

    /// Queues an `fdatasync`. It covers what was complete when it began, nothing that is merely queued.
    public func synchronize(_ file: Int32, token: UInt64) throws(SystemCallError) {
        try check(unsafe clinux_ring_fdatasync(ring, file, token), "fdatasync")
    }

    /// Queues an `fallocate` with the given `FALLOC_FL_*` bits.
    public func allocate(
        _ file: Int32, mode: Int32, at offset: UInt64, length: UInt64, token: UInt64
    ) throws(SystemCallError) {
        try check(unsafe clinux_ring_fallocate(ring, file, mode, offset, length, token), "fallocate")
    }

    /// Queues a wait until a descriptor is readable, once.
    public func poll(_ file: Int32, token: UInt64) throws(SystemCallError) {
        try check(unsafe clinux_ring_poll(ring, file, token), "poll")
    }

    /// Queues a request to cancel an operation, named by its token: what it has not begun then ends with `ECANCELED`,
    /// what it is about may end with `EINTR` or as always. The request has a completion of its own.
    public func cancel(_ target: UInt64, token: UInt64) throws(SystemCallError) {
        try check(unsafe clinux_ring_cancel(ring, target, token), "async_cancel")
    }

    /// Removes the last queued operation that the kernel has not received, when it accepts no calls any more; nil if
    /// there is none.
    /// - Returns: the operation's token. It has no completion.
    public func reclaim() -> UInt64? {
        var token: UInt64 = 0
        return unsafe clinux_ring_reclaim(ring, &token) != 0 ? token : nil
    }

    /// Hands everything queued to the kernel.
    /// - Throws: what cannot pass, such as a seccomp filter that forbids `io_uring_enter`; and `EAGAIN`, `EBUSY` or
    ///   `ENOMEM` when it has lasted for a second, then immediately until the kernel accepts entries again. What it has
    ///   not accepted stays queued: see ``reclaim()``.
    public func submit() throws(SystemCallError) {
        try check(unsafe clinux_ring_submit(ring), "io_uring_enter")
    }

    /// Operations that are queued and that the kernel does not have: it receives them in ``submit()``, or when there is
    /// no room for another.
    /// - Parameter limit: those with smaller tokens are counted.
    public func queued(below limit: UInt64 = .max) -> Int { Int(unsafe clinux_ring_queued(ring, limit)) }

    /// Looks for a completion without sleeping, for at most so many nanoseconds. Returns whether there is one.
    public func spin(nanoseconds: UInt32) -> Bool { unsafe clinux_ring_spin(ring, nanoseconds) != 0 }

    /// Waits until so many completions are there, of which that many are outstanding.
    /// - Throws: as ``submit()``.
    public func wait(for count: Int = 1) throws(SystemCallError) {
        try check(unsafe clinux_ring_wait(ring, UInt32(clamping: max(1, count))), "io_uring_enter")
    }

    /// The next completion, or nil when none waits.
    public func nextCompletion() -> Completion? {
        var completion = clinux_ring_completion()
        guard unsafe clinux_ring_next(ring, &completion) != 0 else { return nil }
        return Completion(token: completion.token, result: completion.result)
    }

    private func check(_ status: Int32, _ call: String) throws(SystemCallError) {
        if status < 0 { throw SystemCallError(call, errno: -status) }
    }
}

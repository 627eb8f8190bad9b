// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

extension GuestMemory {
    /// Allocates every page of the memory now, instead of when the guest first accesses it.
    ///
    /// For memory that the guest does not use yet.
    /// - Parameters:
    ///   - threads: how many work at it; by default one for each CPU of the host.
    ///   - isInterrupted: polled by each thread: whether to cancel.
    ///   - progress: gets the bytes that are done and those in all, now and then, from each of them.
    /// - Throws: ``GuestMemoryError/prealloc(size:_:)`` when there are too few pages; no SIGBUS is raised.
    ///   ``GuestMemoryError/interrupted``.
    public func prealloc(
        threads: Int? = nil, isInterrupted: @escaping @Sendable () -> Bool = { false }, progress: Progress? = nil
    ) throws(GuestMemoryError) {
        try prealloc(offset: 0, count: size, threads: threads, isInterrupted: isInterrupted, progress: progress)
    }

    /// A callback with the progress of a long operation on memory, in bytes. Called by the threads that do the work.
    public typealias Progress = @Sendable (_ done: UInt64, _ total: UInt64) -> Void

    /// The same for a run of whole pages, `offset` bytes from the first.
    func prealloc(
        offset: UInt64, count: UInt64, threads: Int? = nil, isInterrupted: @escaping @Sendable () -> Bool,
        progress: Progress? = nil
    ) throws(GuestMemoryError) {
        let pages = count / backing.pageSize
        let workers = UInt64(max(1, min(threads ?? usableProcessors, 64, Int(clamping: pages))))
        // The pages as one run in host memory, cut into as many even parts as there are workers.
        let bound = { @Sendable [backing] (part: UInt64) in
            offset &+ pages / workers &* part &* backing.pageSize &+ min(part, pages % workers) &* backing.pageSize
        }
        let failure = Guarded<SystemCallError?>(nil)
        let done = Guarded<UInt64>(0)
        progress?(0, count)
        withParallelWorkers(Int(workers), named: "prealloc") { [self] worker in
            let start = bound(UInt64(worker)), end = bound(UInt64(worker) &+ 1)
            // In steps of a few milliseconds, or of one page.
            let step = max(backing.pageSize, 16 << 20)
            var next = start
            while next < end, !isInterrupted() {
                let part = min(step, end - next)
                do throws(SystemCallError) { try populate(offset: Int(next), count: Int(part)) } catch {
                    return failure.withLock { $0 = $0 ?? error }
                }
                next += part
                // Reported under the lock, so that progress never goes back.
                if let progress {
                    done.withLock { done in
                        done &+= part
                        progress(done, count)
                    }
                }
            }
        }
        if isInterrupted() { throw .interrupted }
        if let failure = failure.withLock({ $0 }) { throw .prealloc(size: count, failure) }
    }

    /// Lets the kernel write-fault a run of pages.
    func populate(offset: Int, count: Int) throws(SystemCallError) {
        // The run lies within the mapping: `prealloc` cuts it out of what it was given, and that is a part of it.
        let start = unsafe regions[0].host + offset
        while unsafe madvise(start, count, MADV_POPULATE_WRITE) < 0 {
            switch errno {
            case EINTR, EAGAIN: continue
            case EINVAL: return try populateByReading(offset: offset, count: count)
            default: throw .last("madvise")
            }
        }
    }

    /// The same for kernels before 5.14: one zero byte is read into each page, by the kernel, which reports `EFAULT`
    /// where a store of ours would end in SIGBUS.
    func populateByReading(offset: Int, count: Int) throws(SystemCallError) {
        let number = try zeros.withLock { (zeros) throws(SystemCallError) in
            if let number = zeros?.rawValue { return number }
            let opened = try FileDescriptor.open("/dev/zero", O_RDONLY)
            let number = opened.rawValue
            zeros = consume opened
            return number
        }
        for page in stride(from: offset, to: offset + count, by: Int(backing.pageSize)) {
            // One byte of a page of the mapping.
            if unsafe Glibc.read(number, regions[0].host + page, 1) < 0 { throw .last("read") }
        }
    }
}

/// Runs `body` for 0 … `count` − 1 on a thread each and returns when all are done. A part whose thread cannot be
/// had is done by the caller.
func withParallelWorkers(_ count: Int, named name: String, _ body: @escaping @Sendable (Int) -> Void) {
    // Threads have one owner and cannot be in an array: each call keeps one while the next starts another.
    guard count > 1 else { return body(0) }
    do {
        let thread = try Thread.start(name: name) { body(count - 1) }
        withParallelWorkers(count - 1, named: name, body)
        thread.join()
    } catch {
        body(count - 1)
        withParallelWorkers(count - 1, named: name, body)
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The queue of an engine, and when it submits, listens and waits: how its one thread deals with the kernel and with
/// the wakeups of other engines.
struct EngineQueue: ~Copyable {
    /// Signalled by other engines; nil for the only engine of an image.
    private let wakeup: AttachedEngine.Wakeup?
    /// Where operations are carried out, but for a ``LoneTransfer``.
    let io: IOQueue
    private var lone: LoneTransfer
    /// Indicates whether the queue watches the wakeup. The owner's thread starts that with its first request; there is
    /// no wakeup before.
    private(set) var isListening = false
    /// Why the queue did not take operations, until the owner's next submission.
    private var error: SystemCallError?
    /// Requests started since the last submission to the kernel. With a ring they are submitted a few at a time: an
    /// idle disk would otherwise wait until all of them have been started.
    private var unsubmitted = 0
    /// How ``wait(for:isExclusive:)`` waits.
    private var waking = Waking()

    private static let batch = 8

    /// What a completion of the queue's is about, by its token. Those of operations are their indices.
    enum Token {
        /// Other engines' wakeups.
        static let wakeup = UInt64.max
        static let cancellation = UInt64.max - 1
    }

    /// Bytes of a read from which on a copy out of the page cache takes longer than having another thread do it.
    private static let asideLength: UInt64 = 256 << 10

    init(_ io: consuming IOQueue, wakeup: AttachedEngine.Wakeup?, calls: FileCalls) {
        self.wakeup = wakeup
        lone = LoneTransfer(calls: calls)
        self.io = io
    }

    // MARK: - Submitting

    /// Queues a transfer. Here and in ``submit(outstanding:)`` is decided how it is carried out: by a system call of
    /// this thread, in the ring, or in the ring by a thread of the kernel's.
    /// - Parameter isAlone: whether the queue has no other operation.
    mutating func begin(_ transfer: FileTransfer, isAlone: Bool) throws(SystemCallError) {
        if isAlone, lone.suits(transfer), io.allowsCall(transfer.file) { return lone.hold(transfer) }
        // Copies out of the page cache: this thread would do one after the other.
        let isAside = transfer.isCached && transfer.length >= Self.asideLength && !isAlone
        try queue(transfer, isAside: isAside)
    }

    private func queue(_ transfer: FileTransfer, isAside: Bool = false) throws(SystemCallError) {
        let (file, segments, offset, token) = (transfer.file, transfer.segments, transfer.offset, transfer.token)
        if transfer.isRead {
            try io.read(file, segments, at: offset, token: token, isAside: isAside)
        } else {
            try io.write(file, segments, at: offset, token: token)
        }
    }

    /// Submits what was queued to the kernel.
    /// - Parameter outstanding: operations that the queue has.
    /// - Returns: false if the kernel did not accept it; then ``reclaim(below:)`` returns those operations.
    mutating func submit(outstanding: Int) -> Bool {
        unsubmitted = 0
        do throws(SystemCallError) {
            if let transfer = lone.held, outstanding > 1 || !lone.carryOut() {
                try queue(transfer)
                lone.release()
            }
            try io.submit()
            return true
        } catch {
            self.error = error
            return false
        }
    }

    /// Counts a request. Returns whether those that were not submitted should be submitted now.
    mutating func isBatchComplete() -> Bool {
        unsubmitted += 1
        return unsubmitted == Self.batch && io.isRing
    }

    /// Why the queue did not accept an operation, once.
    mutating func takeError() -> SystemCallError? {
        guard let error else { return nil }
        self.error = nil
        return error
    }

    /// The index of an operation that the queue holds and could not submit, and which would otherwise never complete.
    /// - Parameter count: operations, whose tokens are below it.
    mutating func reclaim(below count: Int) -> Int32? {
        if let transfer = lone.release() { return Int32(truncatingIfNeeded: transfer.token) }
        while let token = io.reclaim() {
            if token == Token.wakeup { isListening = false }
            // One of the engine's, unless it is the wakeup's or a cancellation's.
            if token < UInt64(count) { return Int32(truncatingIfNeeded: token) }
        }
        return nil
    }

    /// Operations that were begun and that are neither done nor with the kernel.
    /// - Parameter limit: those with smaller tokens are counted.
    func queued(below limit: UInt64) -> Int {
        let held = lone.held.map { $0.token < limit } == true ? 1 : 0
        return held + io.queued(below: limit)
    }

    /// Cancels an operation, as ``IOQueue/cancel(_:token:)`` does.
    mutating func cancel(_ target: UInt64) {
        if !lone.cancel(target) { io.cancel(target, token: Token.cancellation) }
    }

    // MARK: - Completions

    /// Indicates whether a transfer has ended without making the descriptor readable.
    var hasEnded: Bool { lone.hasEnded }

    /// An operation that the queue has no more, with bytes done or a negative errno value.
    @inline(__always) mutating func nextCompletion() -> (index: Int32, result: Int)? {
        if let ended = lone.takeEnded() { return (Int32(truncatingIfNeeded: ended.token), ended.result) }
        while let completion = io.nextCompletion() {
            switch completion.token {
            case Token.wakeup: listen()
            // The word of a cancellation is none of the operation.
            case Token.cancellation: continue
            default: return (Int32(truncatingIfNeeded: completion.token), Int(completion.result))
            }
        }
        return nil
    }

    /// Watches for wakeups, and forgets those that were signalled before.
    mutating func listen() {
        isListening = true
        guard let wakeup else { return }
        wakeup.event.drain()
        try? io.watch(wakeup.event, token: Token.wakeup)
    }

    /// The eventfd that other engines signal, while the queue does not watch it.
    var unwatchedWakeup: Int32? { isListening ? nil : wakeup?.event.rawValue }

    /// Waits for completions, of which some are outstanding, or a wakeup.
    /// - Parameter isExclusive: whether there are no other engines.
    mutating func wait(for outstanding: Int, isExclusive: Bool) throws(SystemCallError) {
        if lone.hasEnded { return }
        if outstanding <= Waking.fewest, waking.spins(io) { return }
        // Of many several at a time: each waking costs as much as a request. None of them waits for another engine.
        try io.wait(for: isExclusive ? max(1, outstanding / Waking.share) : 1)
    }

    /// Waits for a completion or a wakeup, even if the queue accepts no calls any more: what it has still completes.
    func waitDespiteErrors() {
        if lone.hasEnded { return }
        if (try? io.wait()) != nil { return }
        var entries = [pollfd(fd: io.rawValue, events: Int16(POLLIN), revents: 0)]
        if let wakeup { entries.append(pollfd(fd: wakeup.event.rawValue, events: Int16(POLLIN), revents: 0)) }
        // As many entries as the array has.
        _ = unsafe poll(&entries, nfds_t(entries.count), -1)
        // The engine finds out by itself why it was signalled.
        wakeup?.event.drain()
    }

    /// Waits, when the engine ends, until the kernel has none of its operations: it may still write to the memory of
    /// requests, which must not be freed before.
    /// - Parameters:
    ///   - outstanding: operations that the queue has.
    ///   - count: operations, whose tokens are below it; the last is the commit's.
    /// - Returns: the errno value of a commit that failed: the host may have dropped what it could not store. Otherwise
    ///   0.
    func drain(_ outstanding: Int, of count: Int) -> Int32 {
        // A lone transfer is none of the kernel's: it has ended, or was not submitted.
        var left = lone.isIdle ? outstanding : outstanding - 1
        var failure: Int32 = 0
        io.drain(within: 0)
        var takesCalls = true
        while left > 0 {
            if let completion = io.nextCompletion() {
                // The wakeup is none of them.
                guard completion.token < UInt64(count) else { continue }
                left -= 1
                if completion.token == UInt64(count - 1), completion.result < 0 { failure = -completion.result }
            } else if !takesCalls {
                // What the kernel has completes without a call.
                waitUntilReadable(io.rawValue)
            } else if (try? io.submit()) == nil || (try? io.wait()) == nil {
                takesCalls = false
                // Operations that it has not accepted are never executed, though others may depend on them.
                let lost = io.queued(below: UInt64(count))
                if lost > 0 { failure = EIO }
                left -= lost
            }
        }
        return failure
    }
}

/// Indicates whether a thread that has nothing else to do looks for a completion for a moment before it sleeps: waking
/// up takes as long as a quick disk. It does
/// while that pays; where it did not, it is tried again ever more seldom.
private struct Waking {
    /// Operations under way up to which it is worth it: of more, one ends soon, and others with it.
    static let fewest = 2
    /// What part of the operations under way is waited for.
    static let share = 8

    private static let time: UInt32 = 100_000
    private static let longestPause = 1024

    private var pause = 1
    private var left = 0

    mutating func spins(_ queue: borrowing IOQueue) -> Bool {
        if left > 0 {
            left -= 1
            return false
        }
        if queue.spin(nanoseconds: Self.time) {
            pause = 1
            return true
        }
        left = pause
        pause = min(2 * pause, Self.longestPause)
        return false
    }
}

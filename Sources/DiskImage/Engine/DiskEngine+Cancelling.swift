// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Work is bounded in bytes: what the queue has at a time, what the owner's thread does in a turn, and what is still done of requests that are given up.
extension DiskEngine {
    /// Bytes of one call of the kernel's, which nothing ends once it is under way; the rest of an operation follows, as after a short transfer.
    static let largestCall: UInt64 = 4 << 20
    /// Bytes that the queues of a disk have at a time: more than a disk needs to be busy, and no more than it does in a moment.
    static let maximumBytesInFlight: UInt64 = 64 << 20
    /// The same where the owner's thread carries everything out by itself, and gains nothing by more.
    static let maximumBytesInFlightInTurn: UInt64 = 16 << 20
    /// Bytes that a turn of the owner's is worth: some ten milliseconds.
    private static let turn = 64 << 20
    /// What a look into the metadata is worth, in bytes.
    static let step = 4 << 10
    /// What a change of the metadata alone is worth: a 64th of the bytes that it is about.
    static let metadataShift: UInt64 = 6

    /// Begins a turn of the owner's, who has other things to look after: what is begun is bounded from here on, and when ``isTurnOver`` the rest waits
    /// for the next one. An owner that never calls it has one turn without end.
    public mutating func beginTurn() { turnLeft = Self.turn }

    /// Indicates whether so much was begun that others should have their turn. No descriptor tells that there is more:
    /// the owner comes back by itself.
    public var isTurnOver: Bool { turnLeft <= 0 }

    /// Indicates whether another operation may begin.
    var hasRoom: Bool { freeOperation >= 0 && bytesInFlight < maximumBytesInFlight && turnLeft > 0 }

    /// The queue has nothing of an operation any more.
    mutating func dequeued(_ index: Int32) {
        // An index of ours, back from the queue.
        outstanding -= 1
        bytesInFlight -= operations[index].submitted
        operations[index].submitted = 0
    }

    /// Indicates whether an operation is one of the requests that are given up. Metadata and commits are not: others
    /// may count on them.
    func isCancelled(_ kind: Operation.Kind) -> Bool { isCancelling && kind != .load && kind != .commit }

    // MARK: - Giving up

    /// Gives up all that is in flight, and releases it. Nothing more of a request begins; what the kernel has it gives back if it has not begun it; what it
    /// is about is waited for, whatever happens. Afterwards nobody uses the memory of requests. A write that was given up is done, done in part, or not at all.
    public mutating func cancelAll() {
        guard inFlight > 0 else { return }
        isCancelling = true
        turnLeft = .max
        queue.drain(within: Self.endTime)
        shared.lock()
        cancelWaiting()
        shared.unlock()
        cancelOperations()
        while inFlight > 0 {
            if let ended = nextCompletion() { release(ended.request) } else { waitForQueue() }
        }
        isCancelling = false
        submissionError = nil
    }

    /// Milliseconds for a server to end what it has; it may never answer.
    private static let endTime = 1000

    /// Ends the requests that the queue has nothing of.
    private mutating func cancelWaiting() {
        // Flushes for the next commit; those of the one under way end with it, soon.
        while let index = attachment.flushes.popFirst(requests) {
            // Indices in lists are those of requests.
            requests[index].pending = 0
            requests[index].error = ECANCELED
            complete(index)
        }
        retryOwn()
        let waiters = stalled
        stalled = IndexList()
        retry(waiters)
    }

    private func cancelOperations() {
        for index in 0..<operationCount {
            // Within the count.
            let operation = operations[index]
            if operation.isActive, isCancelled(operation.kind) { queue.cancel(UInt64(index), token: Self.cancelToken) }
        }
    }

    /// Waits until something has ended, here or at another engine. A queue that takes no calls any more ends what it has all the same.
    private mutating func waitForQueue() {
        submitQueued()
        if unqueuedOperation >= 0 || (try? queue.wait()) != nil { return }
        var entries = [pollfd(fd: queue.rawValue, events: Int16(POLLIN), revents: 0)]
        if let wakeup = attachment.wakeup { entries.append(pollfd(fd: wakeup.event.rawValue, events: Int16(POLLIN), revents: 0)) }
        // As many entries as the array has.
        _ = unsafe poll(&entries, nfds_t(entries.count), -1)
        // Why it was signalled the engine finds out without it.
        attachment.wakeup?.event.drain()
    }
}

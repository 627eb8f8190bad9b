// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// What engines of one image do for each other.
extension DiskEngine {
    /// Another engine has done what requests here may have waited for.
    mutating func attendWakeup() {
        completeFlushes()
        if !image.isLocked { linkDeferred() }
        retryOwn()
        // What was read may be replaced now that it has been looked at here, which may be what somebody waits for.
        if shared.unpinLoads(examinedBy: attachment) { retryWaiting() }
        // An engine that has gone cannot run what was asked of it.
        if shared.commit.step == .none, shared.commit.isWanted { startCommit() }
    }

    /// Gives up what is under way, so that nothing stays locked, claimed or awaited. What was not finished has not happened, but for writes in place.
    func detach() {
        // The kernel may still write to the memory of requests: nobody may free that before they have ended.
        var left = outstanding
        var failure: Int32 = 0
        queue.drain(within: 0)
        var takesCalls = true
        while left > 0 {
            if let completion = queue.nextCompletion() {
                // The wakeup is none of them.
                guard completion.token < UInt64(operationCount) else { continue }
                left -= 1
                // Of a commit: what the host could not store it may have forgotten.
                if completion.token == UInt64(operationCount - 1), completion.result < 0 { failure = -completion.result }
            } else if !takesCalls {
                // What it has ends without being asked.
                waitUntilReadable(queue.rawValue)
            } else if (try? queue.submit()) == nil || (try? queue.wait()) == nil {
                takesCalls = false
                // What it has not taken it never does, though others may count on it.
                let lost = queue.queued(below: UInt64(operationCount))
                if lost > 0 { failure = EIO }
                left -= lost
            }
        }
        var refused = unqueuedOperation
        while refused >= 0 {
            // A list of operations' indices.
            if operations[refused].kind != .zeroes { failure = EIO }
            refused = operations[refused].next
        }
        shared.lock()
        defer { shared.unlock() }
        if failure != 0 { image.failWriting(failure) }
        for index in 0..<operationCount where operations[index].isActive {
            // Within the count.
            let operation = operations[index]
            if let load = operation.load {
                // Others who wait for it read it themselves.
                image.complete(load, bytes: 0, error: EIO)
                image.unpin(load)
            }
            if operation.run.count > 0 { image.abandon(operation.run, at: operation.guestOffset, sequence: shared.sequence) }
        }
        for index in 0..<Int32(copies.count) where copies[index].isReading {
            image.abandon(copies[index].run, at: copies[index].guestOffset, sequence: shared.sequence)
        }
        shared.detach(attachment)
        if shared.commit.step != .none, shared.commit.engine == attachment.number { shared.abortCommit() }
        shared.wake(besides: attachment)
    }
}

extension SharedImage {
    /// The engine that ran the commit has gone. As long as it has not ended it can be begun again: what it wrote is covered by its first
    /// synchronisation then.
    func abortCommit() {
        commit.step = .none
        image.unlock()
        for engine in engines {
            // Flushes that came later come behind.
            engine.committing.append(contentsOf: engine.flushes, engine.requests)
            engine.flushes = engine.committing
            engine.committing = DiskEngine.IndexList()
            if !engine.flushes.isEmpty { engine.wake() }
        }
        // Who comes first runs it.
        commit.isWanted = !engines.isEmpty
    }
}

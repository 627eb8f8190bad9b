// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// How what has been written becomes durable, in the order of docs/qcow2.md. There is one commit at a time, which the engine runs that began it, for all.
extension DiskEngine {
    /// Begins a commit, or has one follow the one under way: it covers what has ended by now, at every engine.
    mutating func startCommit() {
        shared.assertLocked()
        guard shared.commit.step == .none else {
            shared.commit.isWanted = true
            return
        }
        shared.commit.isWanted = false
        shared.commit.engine = attachment.number
        for engine in shared.engines {
            engine.committing = engine.flushes
            engine.flushes = IndexList()
        }
        do throws(MetadataError) {
            guard try image.beginCommit(shared.calls) else { return try writeMapping() }
            // Data in a file of its own comes before what is written of it.
            synchronize(image.hasDataFile ? .data : .refcounts)
        } catch {
            endCommit(error)
        }
    }

    /// A synchronisation has ended.
    mutating func continueCommit(_ error: Int32) {
        let step = shared.commit.step
        do throws(MetadataError) {
            // Of a failure the host tells once: if another synchronisation heard of it, this one did not.
            if error != 0 { image.failures.note(FailedAccess(call: .synchronize, file: shared.commit.file, isMetadata: step != .data, offset: 0), error) }
            let error = error != 0 ? error : image.failure
            guard error == 0 else {
                image.failWriting(error)
                throw .lost(error)
            }
            if shared.commit.file + 1 < image.writtenFiles { return synchronize(step, file: shared.commit.file + 1) }
            switch step {
            case .data:
                synchronize(.refcounts)
            case .refcounts:
                if try image.writeRefcountTable(shared.calls) { synchronize(.refcountTable) } else { try writeMapping() }
            case .refcountTable:
                try writeMapping()
            case .mapping:
                // Failing costs space and nothing else.
                image.release(before: shared.firstSequence, shared.calls)
                endCommit(nil)
            case .none:
                break
            }
        } catch {
            endCommit(error)
        }
    }

    /// The counts are durable: now the mapping may refer to what they count.
    private mutating func writeMapping() throws(MetadataError) {
        try image.writeMapping(shared.calls)
        synchronize(.mapping)
        unlockMapping()
    }

    private mutating func unlockMapping() {
        guard image.isLocked else { return }
        image.unlock()
        linkDeferred()
        retryWaiting()
    }

    /// Finishes the writes that ended while the mapping was locked.
    mutating func linkDeferred() {
        var deferred = attachment.deferredOperation
        attachment.deferredOperation = -1
        while deferred >= 0 {
            let next = operations[deferred].next
            end(deferred, error: 0)
            deferred = next
        }
    }

    private mutating func endCommit(_ error: MetadataError?) {
        let code = error?.code ?? 0
        // Until all has been said of this one, no other begins.
        if shared.commit.step == .none { shared.commit.step = .mapping }
        unlockMapping()
        let failed = code == 0 ? nil : image.refusedAccess(of: code)
        for engine in shared.engines { engine.endCommit(code, failed) }
        shared.commit.step = .none
        completeFlushes()
        retryWaiting()
        if shared.commit.step == .none, shared.commit.isWanted || shared.engines.contains(where: { !$0.flushes.isEmpty }) { startCommit() }
    }

    /// The flushes whose commit has ended come back.
    mutating func completeFlushes() {
        var flushes = attachment.committed
        attachment.committed = IndexList()
        while let index = flushes.popFirst(requests) { complete(index) }
    }

    private mutating func synchronize(_ step: SharedImage.Commit.Step, file: Int = 0) {
        shared.commit.step = step
        shared.commit.file = file
        let index = Int32(operationCount - 1)
        operations[index] = Operation(kind: .commit, layer: file)
        enqueue(index)
    }
}

extension AttachedEngine {
    /// A commit has ended with an errno value, or 0: so do the flushes that it was for.
    func endCommit(_ error: Int32, _ failed: FailedAccess?) {
        while let index = committing.popFirst(requests) {
            // Indices in lists are those of requests.
            requests[index].pending = 0
            requests[index].error = error
            requests[index].failed = failed
            committed.append(index, requests)
        }
        // Who waited for room goes on, or fails: the room will not come.
        var index = waiting.first
        while index >= 0 {
            if requests[index].awaitsCommit, error != 0 {
                requests[index].error = error
                requests[index].failed = failed
            }
            requests[index].awaitsCommit = false
            index = requests[index].next
        }
    }
}

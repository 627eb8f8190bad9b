internal import Glibc

/// How what has been written becomes durable, in the order of docs/qcow2.md.
extension DiskEngine {
    /// A commit makes what has ended durable, in steps with a synchronisation after each.
    struct Commit {
        enum Step { case none, data, refcounts, refcountTable, mapping }

        var step = Step.none
        /// Flushes that wait for the next commit.
        var queue = IndexList()
        /// Flushes that end with this one.
        var flushes = IndexList()
        /// Whether another has to follow.
        var isWanted = false
    }

    /// Begins a commit, or has one follow the one under way: it covers what has ended by now.
    mutating func startCommit() {
        guard commit.step == .none else {
            commit.isWanted = true
            return
        }
        commit.isWanted = false
        commit.flushes = commit.queue
        commit.queue = IndexList()
        let file = metadataFile
        do throws(MetadataError) {
            let isBarrier = try image.withMetadata { qcow2 throws(MetadataError) in
                guard qcow2.failure == 0 else { throw .failed(qcow2.failure) }
                // Data in a file of its own is made durable by every flush, and before the mapping.
                guard qcow2.needsBarrier || qcow2.header.hasDataFile else { return false }
                try qcow2.refcounts?.writeSlices(file)
                qcow2.isLocked = true
                return true
            }
            if isBarrier == true { synchronize(image.hasDataFile ? .data : .refcounts) } else { try writeMapping() }
        } catch {
            endCommit(error)
        }
    }

    /// A synchronisation has ended.
    mutating func continueCommit(_ error: Int32) {
        let file = metadataFile
        let step = commit.step
        do throws(MetadataError) {
            guard error == 0 else {
                // What the host could not store it may have forgotten: nothing that follows could be relied upon.
                image.withMetadata { $0.failure = error }
                throw .failed(error)
            }
            switch step {
            case .data:
                synchronize(.refcounts)
            case .refcounts:
                let hasTable = try image.withMetadata { qcow2 throws(MetadataError) in
                    guard qcow2.refcounts?.isTableDirty == true else { return false }
                    try qcow2.refcounts?.writeTable(file)
                    return true
                }
                if hasTable == true { synchronize(.refcountTable) } else { try writeMapping() }
            case .refcountTable:
                try writeMapping()
            case .mapping:
                // Failing costs space and nothing else.
                let before = firstSequence
                _ = try? image.withMetadata { qcow2 throws(MetadataError) in try qcow2.refcounts?.release(before: before, file) }
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
        let file = metadataFile
        try image.withMetadata { qcow2 throws(MetadataError) in
            if qcow2.isLocked { qcow2.refcounts?.needsBarrier = false }
            try qcow2.writeMapping(file)
        }
        synchronize(.mapping)
        unlock()
    }

    private mutating func unlock() {
        guard isLocked else { return }
        image.withMetadata { $0.isLocked = false }
        var parked = parkedOperation
        parkedOperation = -1
        while parked >= 0 {
            let next = unsafe operations[Int(parked)].next
            end(parked, error: 0)
            parked = next
        }
        retryWaiting()
    }

    private mutating func endCommit(_ error: MetadataError?) {
        commit.step = .none
        var code: Int32 = 0
        if case .failed(let error) = error { code = error }
        if error == .needsCommit { code = EIO }
        unlock()
        var flushes = commit.flushes
        commit.flushes = IndexList()
        while let index = unsafe flushes.popFirst(requests) {
            unsafe requests[Int(index)].pending = 0
            unsafe requests[Int(index)].error = code
            complete(index)
        }
        // Who waited for room goes on, or fails: the room will not come.
        var waiters = waiting
        waiting = IndexList()
        var others = IndexList()
        while let index = unsafe waiters.popFirst(requests) {
            if unsafe requests[Int(index)].awaitsCommit, code != 0 { unsafe requests[Int(index)].error = code }
            unsafe requests[Int(index)].awaitsCommit = false
            unsafe others.append(index, requests)
        }
        retry(others)
        if commit.step == .none, commit.isWanted || !commit.queue.isEmpty { startCommit() }
    }

    private mutating func synchronize(_ step: Commit.Step) {
        commit.step = step
        let index = Int32(operationCount - 1)
        unsafe operations[Int(index)] = Operation(kind: .commit)
        enqueue(index)
    }

    /// The number of the first operation that is under way.
    private var firstSequence: UInt64 {
        var first = sequence
        for index in 0..<operationCount where unsafe operations[index].isActive { unsafe first = min(first, operations[index].sequence) }
        return first
    }
}

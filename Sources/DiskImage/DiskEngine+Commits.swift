internal import Glibc

/// How what has been written becomes durable, in the order of docs/qcow2.md.
extension DiskEngine {
    /// A commit makes what has ended durable, in steps with a synchronisation after each.
    struct Commit {
        enum Step { case none, data, refcounts, refcountTable, mapping }

        var step = Step.none
        /// Which of the image's files is being synchronised.
        var file = 0
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
        do throws(MetadataError) {
            guard try image.beginCommit(calls) else { return try writeMapping() }
            // Data in a file of its own comes before what is written of it.
            synchronize(image.hasDataFile ? .data : .refcounts)
        } catch {
            endCommit(error)
        }
    }

    /// A synchronisation has ended.
    mutating func continueCommit(_ error: Int32) {
        let step = commit.step
        do throws(MetadataError) {
            guard error == 0 else {
                // What the host could not store it may have forgotten: nothing that follows could be relied upon.
                image.failWriting(error)
                throw .failed(error)
            }
            if commit.file + 1 < image.writtenFiles { return synchronize(step, file: commit.file + 1) }
            switch step {
            case .data:
                synchronize(.refcounts)
            case .refcounts:
                if try image.writeRefcountTable(calls) { synchronize(.refcountTable) } else { try writeMapping() }
            case .refcountTable:
                try writeMapping()
            case .mapping:
                // Failing costs space and nothing else.
                image.release(before: firstSequence, calls)
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
        try image.writeMapping(calls)
        synchronize(.mapping)
        unlock()
    }

    private mutating func unlock() {
        guard isLocked else { return }
        image.unlock()
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

    private mutating func synchronize(_ step: Commit.Step, file: Int = 0) {
        commit.step = step
        commit.file = file
        let index = Int32(operationCount - 1)
        unsafe operations[Int(index)] = Operation(kind: .commit, layer: file)
        enqueue(index)
    }

    /// The number of the first operation that is under way.
    private var firstSequence: UInt64 {
        var first = sequence
        for index in 0..<operationCount where unsafe operations[index].isActive { unsafe first = min(first, operations[index].sequence) }
        return first
    }
}

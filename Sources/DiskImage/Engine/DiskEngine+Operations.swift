// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

extension DiskEngine {
    /// A request and how far it has come. `next` links it into the one list that it is in.
    struct Request {
        var operation = DiskOperation.flush
        /// The owner's memory of a transfer.
        var segments: IOSegments?
        var offset: UInt64 = 0
        var length: UInt64 = 0
        /// Bytes from the start for which operations are under way or done.
        var mapped: UInt64 = 0
        var search = DiskImage.Search(limit: 0)
        /// Operations under way.
        var pending: Int32 = 0
        var error: Int32 = 0
        /// The access that gave the error; nil where it is of no file.
        var failed: FailedAccess?
        /// Indicates whether it waits for a commit to make room, and fails with it.
        var awaitsCommit = false
        /// Indicates whether it is in `stalled` or `waiting` and will be advanced from there.
        var isListed = false
        var next: Int32 = -1

        var isTransfer: Bool { operation == .read || operation == .write }

        init() {}

        init(operation: DiskOperation, segments: IOSegments?, offset: UInt64, length: UInt64) {
            self.operation = operation
            self.segments = segments
            self.offset = offset
            self.length = length
            search.limit = length
        }
    }

    /// One operation of the queue.
    struct Operation {
        enum Kind: UInt8 { case read, write, synchronize, punch, zeroRange, writeZeroes, load, commit, zeroes }

        var kind = Kind.synchronize
        /// The request that it belongs to; -1 for a load.
        var request: Int32 = -1
        /// The file, by its number in the image.
        var layer = 0
        var fileOffset: UInt64 = 0
        /// Where in the request its bytes are.
        var start: UInt64 = 0
        var length: UInt64 = 0
        /// Bytes done, when the kernel did a part.
        var done: UInt64 = 0
        /// Bytes that the queue has of it.
        var submitted: UInt64 = 0
        var retries: Int32 = 0
        var load: MetadataLoad?
        /// New clusters that become those of the disk from `guestOffset` on when they are written.
        var run = ClusterRun(first: 0, count: 0)
        var guestOffset: UInt64 = 0
        /// The copy whose cluster it writes; else -1.
        var copy: Int32 = -1
        /// The buffer with what it writes, encrypted; else -1.
        var cipherBuffer: Int32 = -1
        var isActive = false
        /// The operations of all engines have numbers in the order in which they began.
        var sequence: UInt64 = 0
        /// The next free one.
        var next: Int32 = -1

        /// What it asks of the host.
        var access: FailedAccess {
            let call: FailedAccess.Call =
                switch kind {
                case .read, .load: .read
                case .write, .writeZeroes, .zeroes: .write
                case .synchronize, .commit: .synchronize
                case .punch, .zeroRange: .allocate
                }
            return FailedAccess(call: call, file: layer, isMetadata: kind == .load, offset: fileOffset &+ done)
        }
    }

    /// How often `EAGAIN` is taken for something that passes.
    private static let maximumRetries: Int32 = 1000

    /// Bytes of a read from which on a copy takes longer than having another thread do it.
    private static let asideLength: UInt64 = 256 << 10

    // MARK: - Requests, under the image's lock as all that follows

    /// Sets going what can be set going of a request, and completes it when nothing is left.
    mutating func advance(_ index: Int32) {
        shared.assertLocked()
        while requests[index].error == 0, !isMapped(index) {
            guard !isCancelling else {
                requests[index].error = ECANCELED
                break
            }
            guard hasRoom, encryption.hasRoom(requests[index].operation) else {
                requests[index].isListed = true
                stalled.append(index, requests)
                return
            }
            turnLeft -= Self.step
            if requests[index].operation == .flush {
                requests[index].mapped = 1
                if image.managesClusters {
                    requests[index].pending = 1
                    attachment.flushes.append(index, requests)
                    startCommit()
                    return
                }
                // What cannot be written needs no flush.
                if !image.isReadOnly { begin(Operation(kind: .synchronize, request: index)) }
                continue
            }
            if image.managesClusters, requests[index].operation != .read {
                if change(index) { continue } else { return }
            }
            let position = requests[index].offset + requests[index].mapped
            let lookup = image.locate(position, &requests[index].search)
            switch lookup {
            case .data(let place, let length):
                let kind: Operation.Kind =
                    switch requests[index].operation {
                    case .read: .read
                    case .write: .write
                    case .discard, .writeZeroesUnmapping: .punch
                    case .writeZeroes, .flush: refusesZeroRange ? .writeZeroes : .zeroRange
                    }
                let operation = Operation(
                    kind: kind, request: index, layer: requests[index].search.file, fileOffset: place, start: requests[index].mapped, length: length)
                requests[index].consume(length)
                begin(operation)
            case .zero(let all):
                // Piece by piece: the owner's turn may be over in between.
                let length = min(all, Self.largestCall)
                turnLeft -= Int(length)
                if requests[index].operation == .read { readZeroes(index, length: length) } else { requests[index].error = EROFS }
                requests[index].consume(length)
            case .memory(let bytes):
                let length = UInt64(bytes.count)
                // How an image that has these is written, `change` finds out.
                if requests[index].operation == .read { requests[index].segments?.copyIn(bytes, at: requests[index].mapped) } else { requests[index].error = EROFS }
                requests[index].consume(length)
            case .unallocated:
                // The chain ends in zeroes; it never says this.
                requests[index].error = EIO
            case .load(let load):
                wait(index)
                begin(load)
                return
            case .wait, .commit:
                stop(index, lookup)
                return
            case .failed:
                stop(index, lookup)
            }
        }
        if requests[index].pending == 0 { complete(index) }
    }

    mutating func complete(_ index: Int32) {
        if index >= depth { completeReading(copy: index - Int32(depth)) } else { completed.append(index, requests) }
    }

    private func isMapped(_ index: Int32) -> Bool {
        requests[index].operation == .flush
            ? requests[index].mapped != 0 : requests[index].mapped == requests[index].length
    }

    mutating func wait(_ index: Int32) {
        requests[index].isListed = true
        attachment.waiting.append(index, requests)
    }

    /// Lets the requests of a list, which the caller has emptied, try again; those that must wait on get into it anew.
    mutating func retry(_ list: IndexList) {
        var list = list
        while let index = list.popFirst(requests) {
            requests[index].isListed = false
            advance(index)
        }
    }

    // MARK: - Operations

    /// Starts an operation in a free slot, of which there is one.
    mutating func begin(_ operation: Operation) {
        shared.assertLocked()
        let index = freeOperation
        freeOperation = operations[index].next
        operations[index] = operation
        operations[index].isActive = true
        operations[index].sequence = shared.sequence
        shared.sequence &+= 1
        if operation.request >= 0 { requests[operation.request].pending += 1 }
        enqueueAfterWork(index)
    }

    mutating func begin(_ load: MetadataLoad) {
        begin(Operation(kind: .load, layer: load.layer, fileOffset: load.offset, length: UInt64(load.length), load: load))
    }

    /// Puts what is left of an operation into the queue. It needs no lock: descriptors do not change.
    mutating func enqueue(_ index: Int32) {
        let (kind, layer, length) = (operations[index].kind, operations[index].layer, operations[index].length)
        let token = UInt64(UInt32(bitPattern: index))
        let offset = operations[index].fileOffset &+ operations[index].done
        let left = length &- operations[index].done
        let call = min(left, Self.largestCall)
        outstanding += 1
        do throws(SystemCallError) {
            switch kind {
            case .read, .write, .writeZeroes, .load:
                let segments = self.segments(for: index, length: call)
                operations[index].submitted = call
                bytesInFlight += call
                turnLeft -= Int(call)
                let file = kind == .load
                    ? image.descriptor(layer, for: segments, offset: offset)
                    : image.dataDescriptor(layer, for: segments, offset: offset)
                if kind == .read || kind == .load {
                    // Copies out of the page cache: this thread would do one after the other.
                    let isAside = left >= Self.asideLength && outstanding > 1 && file == image.dataDescriptor(layer)
                    try queue.read(file, segments, at: offset, token: token, isAside: isAside)
                } else {
                    try queue.write(file, segments, at: offset, token: token)
                }
            case .synchronize:
                try queue.synchronize(image.descriptor(layer), token: token)
            case .commit:
                try queue.synchronize(shared.commit.step == .data ? image.dataDescriptor(layer) : image.descriptor(layer), token: token)
            case .punch where operations[index].request >= 0 && requests[operations[index].request].operation == .discard:
                try queue.discard(image.dataDescriptor(layer), at: offset, length: left, token: token)
            case .punch:
                let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                try queue.allocate(image.dataDescriptor(layer), mode: mode, at: offset, length: left, token: token)
            case .zeroRange:
                let mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
                try queue.allocate(image.dataDescriptor(layer), mode: mode, at: offset, length: left, token: token)
            case .zeroes:
                // They are there: nothing for the queue to do.
                endUnqueued(index)
            }
        } catch {
            // The queue has room for every operation, unless the kernel takes none.
            endUnqueued(index)
        }
    }

    /// Has an operation that the queue does not have end like any other, from `nextCompletion`.
    mutating func endUnqueued(_ index: Int32) {
        dequeued(index)
        operations[index].next = unqueuedOperation
        unqueuedOperation = index
    }

    /// An operation came back from the queue with bytes done or a negative errno value.
    mutating func completeOperation(_ index: Int32, result: Int) {
        let kind = operations[index].kind
        if result < 0 { return fail(index, Int32(clamping: -result)) }
        switch kind {
        case .synchronize, .commit, .punch, .zeroRange, .zeroes:
            return end(index, error: 0)
        case .read where result == 0:
            // The end of the file. Where it has always been, zeroes follow; elsewhere the file has been cut since.
            let place = operations[index].fileOffset + operations[index].done
            guard image.isEnd(place, operations[index].layer) else { return end(index, error: EIO) }
            fill(operations[index].request, from: operations[index].start + operations[index].done, length: operations[index].length - operations[index].done)
            return endRead(index)
        case .load where result == 0:
            return endLoad(index)
        case .write where result == 0, .writeZeroes where result == 0:
            return end(index, error: EIO)
        case .read, .write, .writeZeroes, .load:
            // Never more than was asked for; a kernel that says so is not believed.
            operations[index].done += min(UInt64(result), operations[index].length - operations[index].done)
            operations[index].retries = 0
            if operations[index].done < operations[index].length {
                return isCancelled(kind) ? end(index, error: ECANCELED) : enqueue(index)
            }
            switch kind {
            case .load: endLoad(index)
            case .read: endRead(index)
            default: end(index, error: 0)
            }
        }
    }

    private mutating func fail(_ index: Int32, _ error: Int32) {
        switch (operations[index].kind, error) {
        case (let kind, _) where isCancelled(kind):
            end(index, error: error)
        case (_, EINTR), (_, EAGAIN):
            operations[index].retries += 1
            if operations[index].retries > Self.maximumRetries { return end(index, error: error) }
            enqueue(index)
        case (.punch, EOPNOTSUPP):
            // A discard is best effort. Zeroes are not: if they cannot be made with a hole they are written.
            if requests[Int(operations[index].request)].operation == .discard { return end(index, error: 0) }
            operations[index].kind = .writeZeroes
            enqueue(index)
        case (.zeroRange, EOPNOTSUPP):
            refusesZeroRange = true
            operations[index].kind = .writeZeroes
            enqueue(index)
        default:
            end(index, error: error)
        }
    }

    /// The operation is over: its request may be, and those that waited for it go on.
    mutating func end(_ index: Int32, error: Int32) {
        shared.assertLocked()
        let ended = operations[index]
        if ended.kind == .commit { return continueCommit(error) }
        if ended.run.count > 0, deferLinking(index, error) { return }
        if encryption.isUsed { endEncryption(ended, error) }
        release(operation: index)
        if let load = ended.load {
            if error != 0 { image.failures.note(ended.access, error) }
            image.complete(load, bytes: Int(ended.done), error: error)
            retryWaiting()
            shared.unpin(load, readBy: attachment)
        } else {
            let request = ended.request
            if ended.run.count > 0 { completeClusters(ended, error) }
            requests[request].pending -= 1
            if error != 0, requests[request].error == 0 {
                requests[request].error = error
                requests[request].failed = ended.access
            }
            if requests[request].pending == 0, !requests[request].isListed { complete(request) }
            if ended.run.count > 0 { retryWaiting() }
        }
        if !stalled.isEmpty { retryStalled() }
    }

    /// Lets those that found no room try again, in their order, as long as there is some.
    mutating func retryStalled() {
        var waiters = stalled
        stalled = IndexList()
        while hasRoom, let index = waiters.popFirst(requests) {
            requests[index].isListed = false
            advance(index)
        }
        stalled.append(contentsOf: waiters, requests)
    }

    mutating func release(operation index: Int32) {
        operations[index].isActive = false
        operations[index].next = freeOperation
        freeOperation = index
    }

    // MARK: - Memory of requests

    /// The segments for the next bytes of an operation. They are stable until the operation is next put into the queue.
    private mutating func segments(for index: Int32, length left: UInt64) -> IOSegments {
        let list = Int(index), done = Int(operations[index].done), request = operations[index].request
        if let load = operations[index].load { return segmentLists.list(list, load.buffer.piece(done, Int(left))) }
        if operations[index].copy >= 0 { return segmentLists.list(list, copies.buffer(operations[index].copy).piece(done, Int(left))) }
        if operations[index].cipherBuffer >= 0 { return segmentLists.list(list, encryption.buffer(operations[index].cipherBuffer).piece(done, Int(left))) }
        if operations[index].kind == .writeZeroes { return segmentLists.list(list, repeating: zeroes.memory, length: left) }
        guard let all = requests[request].segments else { return segmentLists.list(list, zeroes.piece(0, 0)) }
        if left == requests[request].length { return all }
        return segmentLists.list(list, of: all, from: operations[index].start &+ operations[index].done, length: left)
    }

    func fill(_ request: Int32, from start: UInt64, length: UInt64) { requests[request].segments?.clear(from: start, length: length) }
}

extension DiskEngine.Request {
    mutating func consume(_ bytes: UInt64) {
        mapped += bytes
        search = DiskImage.Search(limit: length - mapped)
    }
}

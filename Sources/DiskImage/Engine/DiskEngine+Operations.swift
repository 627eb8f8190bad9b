// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

extension DiskEngine {
    /// A request and how far it has come. `next` links it into the one list that it is in.
    @safe struct Request {
        var operation = DiskOperation.flush
        /// The owner's vectors of a transfer.
        var vectors: UnsafePointer<iovec>?
        var segments = 0
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

        init(operation: DiskOperation, vectors: UnsafePointer<iovec>?, segments: Int, offset: UInt64, length: UInt64) {
            self.operation = operation
            unsafe self.vectors = vectors
            self.segments = segments
            self.offset = offset
            self.length = length
            search.limit = length
        }
    }

    /// One operation of the queue.
    @safe struct Operation {
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
        // Indices of requests and operations come from our own lists only, so they are in bounds, here and below.
        let request = unsafe requests + Int(index)
        while unsafe request.pointee.error == 0, unsafe !isMapped(request) {
            guard !isCancelling else {
                unsafe request.pointee.error = ECANCELED
                break
            }
            guard hasRoom, unsafe encryption.hasRoom(request.pointee.operation) else {
                unsafe request.pointee.isListed = true
                unsafe stalled.append(index, requests)
                return
            }
            turnLeft -= Self.step
            if unsafe request.pointee.operation == .flush {
                unsafe request.pointee.mapped = 1
                if image.managesClusters {
                    unsafe request.pointee.pending = 1
                    unsafe attachment.flushes.append(index, requests)
                    startCommit()
                    return
                }
                // What cannot be written needs no flush.
                if !image.isReadOnly { begin(Operation(kind: .synchronize, request: index)) }
                continue
            }
            if image.managesClusters, unsafe request.pointee.operation != .read {
                if change(index) { continue } else { return }
            }
            let position = unsafe request.pointee.offset + request.pointee.mapped
            let lookup = unsafe image.locate(position, &request.pointee.search)
            switch lookup {
            case .data(let place, let length):
                let kind: Operation.Kind =
                    switch unsafe request.pointee.operation {
                    case .read: .read
                    case .write: .write
                    case .discard, .writeZeroesUnmapping: .punch
                    case .writeZeroes, .flush: refusesZeroRange ? .writeZeroes : .zeroRange
                    }
                let operation = unsafe Operation(
                    kind: kind, request: index, layer: request.pointee.search.file, fileOffset: place, start: request.pointee.mapped, length: length)
                unsafe request.pointee.consume(length)
                begin(operation)
            case .zero(let all):
                // Piece by piece: the owner's turn may be over in between.
                let length = min(all, Self.largestCall)
                turnLeft -= Int(length)
                if unsafe request.pointee.operation == .read { readZeroes(index, length: length) } else { unsafe request.pointee.error = EROFS }
                unsafe request.pointee.consume(length)
            case .memory(let bytes, let length):
                // How an image that has these is written, `change` finds out.
                if unsafe request.pointee.operation == .read { unsafe copy(bytes, length: length, to: index, from: request.pointee.mapped) } else { unsafe request.pointee.error = EROFS }
                unsafe request.pointee.consume(length)
            case .unallocated:
                // The chain ends in zeroes; it never says this.
                unsafe request.pointee.error = EIO
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
        if unsafe request.pointee.pending == 0 { complete(index) }
    }

    mutating func complete(_ index: Int32) {
        if index >= depth { completeReading(copy: index - Int32(depth)) } else { unsafe completed.append(index, requests) }
    }

    private func isMapped(_ request: UnsafeMutablePointer<Request>) -> Bool {
        unsafe request.pointee.operation == .flush
            ? request.pointee.mapped != 0 : request.pointee.mapped == request.pointee.length
    }

    mutating func wait(_ index: Int32) {
        unsafe requests[Int(index)].isListed = true
        unsafe attachment.waiting.append(index, requests)
    }

    /// Lets the requests of a list, which the caller has emptied, try again; those that must wait on get into it anew.
    mutating func retry(_ list: IndexList) {
        var list = list
        while let index = unsafe list.popFirst(requests) {
            unsafe requests[Int(index)].isListed = false
            advance(index)
        }
    }

    // MARK: - Operations

    /// Starts an operation in a free slot, of which there is one.
    mutating func begin(_ operation: Operation) {
        shared.assertLocked()
        let index = freeOperation
        freeOperation = unsafe operations[Int(index)].next
        unsafe operations[Int(index)] = operation
        unsafe operations[Int(index)].isActive = true
        unsafe operations[Int(index)].sequence = shared.sequence
        shared.sequence &+= 1
        if operation.request >= 0 { unsafe requests[Int(operation.request)].pending += 1 }
        enqueueAfterWork(index)
    }

    mutating func begin(_ load: MetadataLoad) {
        begin(Operation(kind: .load, layer: load.layer, fileOffset: load.offset, length: UInt64(load.length), load: load))
    }

    /// Puts what is left of an operation into the queue. It needs no lock: descriptors do not change.
    mutating func enqueue(_ index: Int32) {
        let operation = unsafe operations[Int(index)]
        let token = UInt64(UInt32(bitPattern: index))
        let offset = operation.fileOffset &+ operation.done
        let left = operation.length &- operation.done
        let call = min(left, Self.largestCall)
        outstanding += 1
        do throws(SystemCallError) {
            switch operation.kind {
            case .read, .write, .writeZeroes, .load:
                let (vectors, count) = unsafe self.vectors(for: index, length: call)
                unsafe operations[Int(index)].submitted = call
                bytesInFlight += call
                turnLeft -= Int(call)
                let file = unsafe operation.kind == .load
                    ? image.descriptor(operation.layer, for: vectors, count: count, offset: offset)
                    : image.dataDescriptor(operation.layer, for: vectors, count: count, offset: offset)
                if operation.kind == .read || operation.kind == .load {
                    // Copies out of the page cache: this thread would do one after the other.
                    let isAside = left >= Self.asideLength && outstanding > 1 && file == image.dataDescriptor(operation.layer)
                    try unsafe queue.read(file, vectors, count: count, at: offset, token: token, isAside: isAside)
                } else {
                    try unsafe queue.write(file, vectors, count: count, at: offset, token: token)
                }
            case .synchronize:
                try queue.synchronize(image.descriptor(operation.layer), token: token)
            case .commit:
                try queue.synchronize(shared.commit.step == .data ? image.dataDescriptor(operation.layer) : image.descriptor(operation.layer), token: token)
            case .punch where unsafe operation.request >= 0 && requests[Int(operation.request)].operation == .discard:
                try queue.discard(image.dataDescriptor(operation.layer), at: offset, length: left, token: token)
            case .punch:
                let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                try queue.allocate(image.dataDescriptor(operation.layer), mode: mode, at: offset, length: left, token: token)
            case .zeroRange:
                let mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
                try queue.allocate(image.dataDescriptor(operation.layer), mode: mode, at: offset, length: left, token: token)
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
        unsafe operations[Int(index)].next = unqueuedOperation
        unqueuedOperation = index
    }

    /// An operation came back from the queue with bytes done or a negative errno value.
    mutating func completeOperation(_ index: Int32, result: Int) {
        let operation = unsafe operations + Int(index)
        let kind = unsafe operation.pointee.kind
        if result < 0 { return unsafe fail(index, operation, Int32(clamping: -result)) }
        switch kind {
        case .synchronize, .commit, .punch, .zeroRange, .zeroes:
            return end(index, error: 0)
        case .read where result == 0:
            // The end of the file. Where it has always been, zeroes follow; elsewhere the file has been cut since.
            let place = unsafe operation.pointee.fileOffset + operation.pointee.done
            guard unsafe image.isEnd(place, operation.pointee.layer) else { return end(index, error: EIO) }
            unsafe fill(operation.pointee.request, from: operation.pointee.start + operation.pointee.done, length: operation.pointee.length - operation.pointee.done)
            return endRead(index)
        case .load where result == 0:
            return endLoad(index)
        case .write where result == 0, .writeZeroes where result == 0:
            return end(index, error: EIO)
        case .read, .write, .writeZeroes, .load:
            // Never more than was asked for; a kernel that says so is not believed.
            unsafe operation.pointee.done += min(UInt64(result), operation.pointee.length - operation.pointee.done)
            unsafe operation.pointee.retries = 0
            if unsafe operation.pointee.done < operation.pointee.length {
                return isCancelled(kind) ? end(index, error: ECANCELED) : enqueue(index)
            }
            switch kind {
            case .load: endLoad(index)
            case .read: endRead(index)
            default: end(index, error: 0)
            }
        }
    }

    private mutating func fail(_ index: Int32, _ operation: UnsafeMutablePointer<Operation>, _ error: Int32) {
        switch (unsafe operation.pointee.kind, error) {
        case (let kind, _) where isCancelled(kind):
            end(index, error: error)
        case (_, EINTR), (_, EAGAIN):
            unsafe operation.pointee.retries += 1
            if unsafe operation.pointee.retries > Self.maximumRetries { return end(index, error: error) }
            enqueue(index)
        case (.punch, EOPNOTSUPP):
            // A discard is best effort. Zeroes are not: if they cannot be made with a hole they are written.
            if unsafe requests[Int(operation.pointee.request)].operation == .discard { return end(index, error: 0) }
            unsafe operation.pointee.kind = .writeZeroes
            enqueue(index)
        case (.zeroRange, EOPNOTSUPP):
            refusesZeroRange = true
            unsafe operation.pointee.kind = .writeZeroes
            enqueue(index)
        default:
            end(index, error: error)
        }
    }

    /// The operation is over: its request may be, and those that waited for it go on.
    mutating func end(_ index: Int32, error: Int32) {
        shared.assertLocked()
        let ended = unsafe operations[Int(index)]
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
            let request = unsafe requests + Int(ended.request)
            if ended.run.count > 0 { completeClusters(ended, error) }
            unsafe request.pointee.pending -= 1
            if error != 0, unsafe request.pointee.error == 0 {
                unsafe request.pointee.error = error
                unsafe request.pointee.failed = ended.access
            }
            if unsafe request.pointee.pending == 0, unsafe !request.pointee.isListed { complete(ended.request) }
            if ended.run.count > 0 { retryWaiting() }
        }
        if !stalled.isEmpty { retryStalled() }
    }

    /// Lets those that found no room try again, in their order, as long as there is some.
    mutating func retryStalled() {
        var waiters = stalled
        stalled = IndexList()
        while hasRoom, let index = unsafe waiters.popFirst(requests) {
            unsafe requests[Int(index)].isListed = false
            advance(index)
        }
        unsafe stalled.append(contentsOf: waiters, requests)
    }

    mutating func release(operation index: Int32) {
        unsafe operations[Int(index)].isActive = false
        unsafe operations[Int(index)].next = freeOperation
        freeOperation = index
    }

    // MARK: - Memory of requests

    /// The vectors for the next bytes of an operation. They are stable until the operation is next put into the queue.
    private func vectors(for index: Int32, length left: UInt64) -> (UnsafePointer<iovec>, count: Int) {
        let operation = unsafe operations[Int(index)]
        // The mapping holds `maximumSegments` for each operation.
        let own = unsafe self.vectors.start.assumingMemoryBound(to: iovec.self) + Int(index) * maximumSegments
        if let load = operation.load {
            unsafe own[0] = iovec(iov_base: load.buffer + Int(operation.done), iov_len: Int(left))
            return unsafe (UnsafePointer(own), 1)
        }
        if operation.copy >= 0 {
            unsafe own[0] = iovec(iov_base: copies.buffer(operation.copy) + Int(operation.done), iov_len: Int(left))
            return unsafe (UnsafePointer(own), 1)
        }
        if operation.cipherBuffer >= 0 {
            unsafe own[0] = iovec(iov_base: encryption.buffer(operation.cipherBuffer) + Int(operation.done), iov_len: Int(left))
            return unsafe (UnsafePointer(own), 1)
        }
        if operation.kind == .writeZeroes {
            var count = 0
            var rest = left
            while rest > 0, count < maximumSegments {
                let size = min(rest, UInt64(Self.zeroesSize))
                unsafe own[count] = iovec(iov_base: zeroes.start, iov_len: Int(size))
                rest -= size
                count += 1
            }
            return unsafe (UnsafePointer(own), count)
        }
        let request = unsafe requests[Int(operation.request)]
        if left == request.length, let all = unsafe request.vectors { return unsafe (all, request.segments) }
        var count = 0
        unsafe forEachPiece(operation.request, from: operation.start &+ operation.done, length: left) { base, length in
            unsafe own[count] = iovec(iov_base: base, iov_len: length)
            count += 1
        }
        return unsafe (UnsafePointer(own), count)
    }

    func fill(_ request: Int32, from start: UInt64, length: UInt64) {
        // Guest RAM: written through the helpers that the compiler does not look into.
        unsafe forEachPiece(request, from: start, length: length) { base, count in unsafe clinux_fill(base, 0, count) }
    }

    private func copy(_ bytes: UnsafeRawPointer, length: UInt64, to request: Int32, from start: UInt64) {
        var source = unsafe bytes
        unsafe forEachPiece(request, from: start, length: length) { base, count in
            unsafe clinux_copy(base, source, count)
            unsafe source += count
        }
    }

    /// Names the pieces of memory that hold the bytes `start ..< start + length` of a request.
    func forEachPiece(_ request: Int32, from start: UInt64, length: UInt64, _ body: (UnsafeMutableRawPointer, Int) -> Void) {
        let segments = unsafe requests[Int(request)].segments
        guard let vectors = unsafe requests[Int(request)].vectors else { return }
        var skip = start
        var rest = length
        for index in 0..<segments where rest > 0 {
            let size = unsafe UInt64(vectors[index].iov_len)
            if skip >= size {
                skip -= size
                continue
            }
            let count = min(size - skip, rest)
            // Inside the segment, which the request's owner vouches for.
            if let base = unsafe vectors[index].iov_base { unsafe body(base + Int(skip), Int(count)) }
            rest -= count
            skip = 0
        }
    }
}

extension DiskEngine.Request {
    mutating func consume(_ bytes: UInt64) {
        mapped += bytes
        search = DiskImage.Search(limit: length - mapped)
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Takes the requests of an engine from step to step: a request is cut into operations along the extents that the
/// image's metadata names, waits where something has to be read or written before it can continue, and completes when
/// the last of its operations has ended.
///
/// Everything here happens under the image's lock, but for ``work()`` and the owner's side at the end. Each part of the
/// state has an owner of its own.
struct RequestPipeline: ~Copyable {
    /// The image with what all its engines share. It comes first: what is changed by way of an engine's references, all
    /// of it under that lock, ThreadSanitizer's part of the compiler (6.3) notes by the first word of the engine, and
    /// fails where that is no reference.
    let shared: SharedImage
    /// What the others see of this engine.
    let attachment: AttachedEngine
    var requests: RequestTable
    var operations: OperationTable
    var copies: CopyTable
    var encryption: EngineEncryption

    /// - Parameters are as those of ``DiskEngine/init(_:depth:segments:usesRing:share:)``.
    init(
        _ shared: SharedImage, depth: Int, segments: Int, _ queue: consuming IOQueue, share: Int
    ) throws(DiskImageError) {
        let copies = try CopyTable(shared.image.managesClusters ? shared.clusterSize ?? 0 : 0, shared.path)
        let encryption = try EngineEncryption(shared.image)
        let wakeup: AttachedEngine.Wakeup?
        do throws(SystemCallError) { wakeup = shared.isExclusive ? nil : try .init(queue.makeWakeup()) } catch {
            throw .system(path: shared.path, error)
        }
        // After the owner's requests come those of copies.
        let attachment = AttachedEngine(
            requests: depth + copies.count, operations: OperationTable.count(depth: depth), wakeup: wakeup)
        let operations = try OperationTable(
            attachment.operations, shared.image, EngineQueue(queue, wakeup: wakeup, calls: shared.calls),
            segments: segments, share: share)
        try shared.attach(attachment)
        self.shared = shared
        self.attachment = attachment
        requests = RequestTable(attachment.requests, depth: depth)
        self.operations = operations
        self.copies = copies
        self.encryption = encryption
    }

    /// Aborts what is in progress, so that nothing stays locked, claimed or awaited. What has not completed has no
    /// effect, except for writes in place.
    deinit {
        let failure = operations.drain()
        let (shared, attachment) = (shared, attachment)
        shared.lock()
        defer { shared.unlock() }
        if failure != 0 { shared.image.failWriting(failure) }
        operations.forEachActive { operation in
            if let load = operation.load {
                // Others who wait for it read it themselves.
                shared.image.complete(load, bytes: 0, error: EIO)
                shared.image.unpin(load)
            }
            if operation.run.count > 0 {
                shared.image.abandon(operation.run, at: operation.guestOffset, sequence: shared.sequence)
            }
        }
        copies.forEachReading { shared.image.abandon($0.run, at: $0.guestOffset, sequence: shared.sequence) }
        shared.detach(attachment)
        shared.abortCommit(of: attachment)
        shared.wake(besides: attachment)
    }

    var image: DiskImage { shared.image }

    // MARK: - Requests

    /// Sets going what can be set going of a request, and completes it when nothing is left.
    mutating func advance(_ index: Int32) {
        shared.assertLocked()
        while requests[index].error == 0, !requests[index].isMapped {
            guard !operations.isCancelling else {
                requests[index].error = ECANCELED
                break
            }
            guard operations.hasRoom, encryption.hasRoom(requests[index].operation) else {
                return requests.stall(index)
            }
            operations.spendLookup()
            let operation = requests[index].operation
            let goesOn =
                operation == .flush
                ? flush(index) : operation != .read && image.managesClusters ? change(index) : transfer(index)
            if !goesOn { return }
        }
        if requests[index].pending == 0 { complete(index) }
    }

    mutating func complete(_ index: Int32) {
        if index >= requests.depth {
            completeReading(copy: index - Int32(requests.depth))
        } else {
            requests.complete(index)
        }
    }

    /// Lets those that found no room try again, in their order, as long as there is some.
    mutating func retryStalled() {
        var waiters = requests.takeStalled()
        while operations.hasRoom, let index = requests.unlist(&waiters) { advance(index) }
        requests.stall(contentsOf: waiters)
    }

    /// Something has ended that requests may have waited for, here or at other engines.
    mutating func retryWaiting() {
        shared.wake(besides: attachment)
        retryOwn()
    }

    private mutating func retryOwn() { retry(attachment.takeWaiting()) }

    /// Lets the requests of a list try again; those that must wait on get into it again.
    private mutating func retry(_ list: IndexList<DiskRequest>) {
        var list = list
        while let index = requests.unlist(&list) { advance(index) }
    }

    // MARK: - Steps of a request; each returns whether it continues immediately

    private mutating func flush(_ index: Int32) -> Bool {
        requests[index].consumeFlush()
        if image.managesClusters {
            attachment.flush(index)
            startCommit()
            return false
        }
        // What cannot be written needs no flush.
        if !image.isReadOnly { begin(IOOperation(kind: .synchronize, request: index)) }
        return true
    }

    /// Sets the next piece of a read going, or of any request where the metadata does not change.
    @inline(__always) private mutating func transfer(_ index: Int32) -> Bool {
        let isRead = requests[index].operation == .read
        let lookup = image.locate(requests[index].position, &requests[index].search)
        switch lookup {
        case .data(let place, let length):
            let kind = operations.kind(for: requests[index].operation)
            let part = isRead ? encryption.limited(reading: length, of: requests[index].search.file, image) : length
            begin(kind, index, at: place, part)
        case .zero(let all):
            // Piece by piece: the owner's turn may be over in between.
            let length = min(all, WorkBudget.largestCall)
            operations.spend(zeroes: length)
            if isRead { readZeroes(index, length) } else { requests[index].error = EROFS }
            requests[index].consume(length)
        case .memory(let bytes):
            // How an image that has these is written, `change` finds out.
            if isRead {
                requests[index].segments?.copyIn(bytes, at: requests[index].mapped)
            } else {
                requests[index].error = EROFS
            }
            requests[index].consume(UInt64(bytes.count))
        case .unallocated, .load, .wait, .commit, .failed:
            return stop(index, lookup)
        }
        return true
    }

    /// A reader's zeroes, immediately if no engine waits for the lock.
    private mutating func readZeroes(_ index: Int32, _ length: UInt64) {
        let start = requests[index].mapped
        if shared.isExclusive {
            requests[index].segments?.clear(from: start, length: length)
        } else {
            begin(
                IOOperation(kind: .zeroes, request: index, start: start, length: length, memory: requests[index].memory)
            )
        }
    }

    /// A request cannot continue as it is: it waits, or has failed.
    mutating func stop(_ index: Int32, _ lookup: RangeLookup) -> Bool {
        switch lookup {
        case .load(let load):
            attachment.wait(index)
            begin(
                IOOperation(
                    kind: .load, layer: load.layer, fileOffset: load.offset, length: UInt64(load.length),
                    memory: .piece(load.buffer), load: load))
            return false
        case .commit:
            requests[index].awaitsCommit = true
            attachment.wait(index)
            startCommit()
            return false
        case .wait:
            attachment.wait(index)
            return false
        case .failed(let error):
            image.markDamage(shared.calls)
            requests[index].fail(error, image.refusedAccess(of: error))
        case .data, .zero, .unallocated, .memory:
            // The chain ends in zeroes; what is written has a target.
            requests[index].error = EIO
        }
        return true
    }

    // MARK: - Operations

    /// Begins an operation on the next bytes of a request.
    @inline(__always) mutating func begin(
        _ kind: IOOperation.Kind, _ index: Int32, at place: UInt64, _ length: UInt64,
        _ run: ClusterRun = ClusterRun(first: 0, count: 0),
        _ guestOffset: UInt64 = 0
    ) {
        let operation = IOOperation(
            kind: kind, request: index, layer: requests[index].search.file, fileOffset: place,
            start: requests[index].mapped, length: length,
            memory: requests[index].memory, run: run, guestOffset: guestOffset)
        requests[index].consume(length)
        begin(operation)
    }

    /// Begins an operation, for which there is a slot.
    @inline(__always) mutating func begin(_ operation: IOOperation) {
        shared.assertLocked()
        let index = operations.add(operation, sequence: shared.nextSequence())
        if operation.request >= 0 { requests[operation.request].pending += 1 }
        if operation.kind == .read, encryption.isUsed, image.isEncrypted(operation.layer) {
            encryption.takeBuffer(forReading: &operations[index])
        }
        guard needsWork(index) else { return operations.enqueue(index) }
        // While it waits, no other operation can take the buffer that it needs.
        if operation.copy < 0 && operation.kind == .write { encryption.takeBuffer(for: &operations[index]) }
        operations.putOff(index)
    }

    /// An operation came back from the queue with bytes done or a negative errno value.
    mutating func complete(_ ended: (index: Int32, result: Int)) {
        let index = ended.index
        guard let error = operations.outcome(index, ended.result) else { return }
        if error == 0, operations[index].kind == .read, operations[index].cipherBuffer >= 0 {
            let operation = operations[index], request = requests[operation.request]
            shared.unlock()
            shared.calls.bulkWork?(.decryption)
            encryption.decrypt(operation, image, for: request)
            shared.lock()
        } else if error == 0, var load = operations[index].load, load.kind == .compressed {
            shared.unlock()
            shared.calls.bulkWork?(.decompression)
            image.decompress(&load, bytes: Int(operations[index].done))
            shared.lock()
            operations[index].load = load
        }
        end(index, error)
    }

    /// The operation is over: its request may be, and those that waited for it continue.
    mutating func end(_ index: Int32, _ error: Int32) {
        shared.assertLocked()
        let ended = operations[index]
        if ended.isCommit { return carryOut(shared.continueCommit(error)) }
        // The mapping does not change while it is locked: what has been written waits.
        if ended.run.count > 0, error == 0, image.isLocked { return attachment.deferLinking(index) }
        if encryption.isUsed { encryption.end(ended) }
        operations.remove(index)
        if let load = ended.load {
            if error != 0 { image.failures.note(ended.access, error) }
            let outcome = image.complete(load, bytes: Int(ended.done), error: error)
            // A table that the end of the file cuts: no call has failed, but this is where.
            if error == 0, outcome != 0, load.kind == .table { image.failures.note(ended.access, outcome) }
            retryWaiting()
            shared.unpin(load, readBy: attachment)
        } else {
            if ended.run.count > 0 { completeClusters(ended, error) }
            if error != 0 { requests[ended.request].fail(error, ended.access) }
            endOperation(of: ended.request)
            if ended.run.count > 0 { retryWaiting() }
        }
        if requests.hasStalled { retryStalled() }
    }

    /// One of what a request counts is over.
    @inline(__always) mutating func endOperation(of request: Int32) {
        requests[request].pending -= 1
        if requests[request].pending == 0, !requests[request].isListed { complete(request) }
    }

    // MARK: - Work on bytes

    /// Indicates whether an operation needs work before it can be queued.
    private func needsWork(_ index: Int32) -> Bool {
        operations[index].copy >= 0 || (encryption.encryptsWrites && operations[index].kind == .write)
            || operations[index].kind == .zeroes
    }

    /// Does what was put off, and queues its operations. Without the lock, whose holder may have put more off.
    mutating func work() {
        guard operations.hasPutOff else { return }
        shared.assertUnlocked()
        while let index = operations.popPutOff() {
            // What it is about is the engine's own until it ends: the operation, its request, and the memory of both.
            let (kind, copy) = (operations[index].kind, operations[index].copy)
            if copy >= 0 {
                shared.calls.bulkWork?(.merging)
                copies.merge(copy, requests[operations[index].request], diskSize: image.size)
            }
            if encryption.encryptsWrites, kind == .write {
                shared.calls.bulkWork?(.encryption)
                encryption.encrypt(&operations[index], image)
            }
            if kind == .zeroes {
                shared.calls.bulkWork?(.zeroes)
                operations[index].clear()
            }
            operations.enqueue(index)
        }
    }

    // MARK: - Other engines, and cancellation

    /// Another engine has completed what requests here may have waited for.
    mutating func attendWakeup() {
        completeFlushes()
        if !image.isLocked { linkDeferred() }
        retryOwn()
        // What was read may be evicted now that this engine has used it, which may be what a request waits for.
        if shared.unpinLoads(examinedBy: attachment) { retryWaiting() }
        if shared.isCommitOrphaned { startCommit() }
    }

    /// Completes the requests of which the queue has no operation.
    mutating func cancelWaiting() {
        // Flushes for the next commit; those of the commit in progress complete with it, soon.
        while let index = attachment.popFlush() {
            requests[index].error = ECANCELED
            complete(index)
        }
        retryOwn()
        retry(requests.takeStalled())
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The operations of an engine: it owns them, their segments, the queue that carries them out and the bounds of what is
/// under way. It knows nothing of requests; what becomes of one whose operation has ended is for a ``RequestPipeline``
/// to say.
@safe struct OperationTable: ~Copyable {
    private let slots: Slab<IOOperation>
    /// Whose files the operations are about.
    private let image: DiskImage
    private var queue: EngineQueue
    private var budget: WorkBudget
    /// The memory of each operation's call.
    private var lists: IOSegmentLists
    /// Zeroes to write where the file system cannot make any by itself.
    private let zeroes: IOBuffer

    private var free = IndexList<IOOperation>()
    /// Operations that wait for work on bytes, first in, first out.
    private var delayed = IndexList<IOOperation>()
    /// Operations that end without the queue: zeroes that are there, and what it did not take.
    private var unqueued = IndexList<IOOperation>()
    /// Operations that the queue has and has not completed.
    private(set) var outstanding = 0
    /// File systems differ in what `fallocate` can do; what this one refused is not asked again.
    private var refusesZeroRange = false
    /// Indicates whether everything in flight is being cancelled.
    private(set) var isCancelling = false

    private static let zeroesSize = 64 << 10
    /// How often `EAGAIN` is taken for something that passes.
    private static let maximumRetries: Int32 = 1000
    /// Milliseconds for a server to end what it has; it may never answer.
    private static let endTime = 1000

    /// Operations of an engine. Large requests on a fragmented image take several; a few more let small ones pass. The
    /// last is the commit's.
    static func count(depth: Int) -> Int { depth + 32 + 1 }

    /// - Parameters:
    ///   - segments: memory segments that an operation can have.
    ///   - share: as ``WorkBudget/init(isConcurrent:share:)`` has it.
    init(
        _ slots: Slab<IOOperation>, _ image: DiskImage, _ queue: consuming EngineQueue, segments: Int, share: Int
    ) throws(DiskImageError) {
        let lists = try IOSegmentLists(count: slots.count, capacity: segments, image.path)
        let zeroes = try IOBuffer(count: Self.zeroesSize, image.path)
        self.slots = slots
        self.image = image
        budget = WorkBudget(isConcurrent: queue.io.isConcurrent, share: share)
        self.queue = queue
        self.lists = lists
        self.zeroes = zeroes
        for index in 0..<slots.count - 1 { free.append(Int32(index), slots) }
    }

    @inline(__always) subscript(index: Int32) -> IOOperation {
        // The slab checks the index, and lives as long as this value.
        unsafeAddress { unsafe UnsafePointer(slots.address(of: Int(index))) }
        unsafeMutableAddress { unsafe slots.address(of: Int(index)) }
    }

    // MARK: - What is under way

    /// Indicates whether there is a slot for another operation.
    var hasFree: Bool { !free.isEmpty }

    /// Indicates whether another operation may begin.
    var hasRoom: Bool { hasFree && budget.hasRoom }

    /// Gives an operation a slot. The caller has checked ``hasFree`` or ``hasRoom``, so the number of requests does not
    /// matter; a second user of a slot would corrupt the disk, so without one the process ends.
    @inline(__always) mutating func add(_ operation: IOOperation, sequence: UInt64) -> Int32 {
        guard let index = free.popFirst(slots) else { preconditionFailure("no room for another operation") }
        slots[index] = operation
        slots[index].isActive = true
        slots[index].sequence = sequence
        return index
    }

    /// Frees the slot of an operation that has ended.
    mutating func remove(_ index: Int32) {
        slots[index].isActive = false
        free.prepend(index, slots)
    }

    func forEachActive(_ body: (IOOperation) -> Void) {
        for index in slots.indices where slots[index].isActive { body(slots[index]) }
    }

    /// Has an operation wait until its bytes have been worked on.
    mutating func putOff(_ index: Int32) { delayed.append(index, slots) }

    var hasPutOff: Bool { !delayed.isEmpty }

    mutating func popPutOff() -> Int32? { delayed.popFirst(slots) }

    // MARK: - The queue

    /// Puts what is left of an operation into the queue. It needs no lock: descriptors do not change.
    mutating func enqueue(_ index: Int32) {
        let (kind, layer, length) = (slots[index].kind, slots[index].layer, slots[index].length)
        let token = UInt64(UInt32(bitPattern: index))
        let offset = slots[index].fileOffset &+ slots[index].done
        let left = length &- slots[index].done
        outstanding += 1
        do throws(SystemCallError) {
            switch kind {
            case .read, .write, .writeZeroes, .load:
                try transfer(index, kind, layer, offset, left, token)
            case .synchronize, .commit:
                try queue.io.synchronize(image.descriptor(layer), token: token)
            case .commitData:
                try queue.io.synchronize(image.dataDescriptor(layer), token: token)
            case .discard:
                try queue.io.discard(image.dataDescriptor(layer), at: offset, length: left, token: token)
            case .punch:
                let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                try queue.io.allocate(image.dataDescriptor(layer), mode: mode, at: offset, length: left, token: token)
            case .zeroRange:
                let mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
                try queue.io.allocate(image.dataDescriptor(layer), mode: mode, at: offset, length: left, token: token)
            case .zeroes:
                // They are there: nothing for the queue to do.
                endUnqueued(index)
            }
        } catch {
            // The queue has room for every operation, unless the kernel takes none.
            endUnqueued(index)
        }
    }

    private mutating func transfer(
        _ index: Int32, _ kind: IOOperation.Kind, _ layer: Int, _ offset: UInt64, _ left: UInt64, _ token: UInt64
    ) throws(SystemCallError) {
        let call = min(left, WorkBudget.largestCall)
        let segments = self.segments(for: index, length: call)
        slots[index].submitted = call
        budget.queue(call)
        // A load is of metadata, or of a compressed cluster.
        let isLoad = kind == .load
        let file =
            isLoad
            ? image.descriptor(layer, for: segments, offset: offset)
            : image.dataDescriptor(layer, for: segments, offset: offset)
        let isCached = file == (isLoad ? image.descriptor(layer) : image.dataDescriptor(layer))
        let transfer = FileTransfer(
            isRead: isLoad || kind == .read, file: file, isCached: isCached, segments: segments, offset: offset,
            length: call, token: token)
        try queue.begin(transfer, isAlone: outstanding == 1)
    }

    /// The segments for the next bytes of an operation. They are stable until the operation is next put into the queue.
    private mutating func segments(for index: Int32, length left: UInt64) -> IOSegments {
        if slots[index].kind == .writeZeroes { return lists.list(Int(index), repeating: zeroes.memory, length: left) }
        switch slots[index].memory {
        case .piece(let memory):
            return lists.list(Int(index), memory.piece(Int(slots[index].done), Int(left)))
        case .segments(let all, let length):
            if left == length { return all }
            return lists.list(Int(index), of: all, from: slots[index].start &+ slots[index].done, length: left)
        case .none:
            return lists.list(Int(index), zeroes.piece(0, 0))
        }
    }

    /// The queue has nothing of an operation any more.
    private mutating func dequeued(_ index: Int32) {
        outstanding -= 1
        budget.dequeue(slots[index].submitted)
        slots[index].submitted = 0
    }

    /// Has an operation that the queue does not have end like any other, from ``nextEnded()``.
    private mutating func endUnqueued(_ index: Int32) {
        dequeued(index)
        unqueued.prepend(index, slots)
    }

    /// Synchronises a file of the image for a commit, of which there is one at a time.
    mutating func enqueueCommit(_ synchronization: CommitState.Synchronization) {
        let index = Int32(slots.count - 1)
        slots[index] = IOOperation(kind: synchronization.isOfData ? .commitData : .commit, layer: synchronization.file)
        enqueue(index)
    }

    /// How a range of a file is written that the request is about.
    func kind(for operation: DiskOperation) -> IOOperation.Kind {
        switch operation {
        case .read: .read
        case .write: .write
        case .discard: .discard
        case .writeZeroesUnmapping: .punch
        case .writeZeroes, .flush: refusesZeroRange ? .writeZeroes : .zeroRange
        }
    }

    // MARK: - Operations that have ended

    /// An operation that the queue has no more, with bytes done or a negative errno value.
    @inline(__always) mutating func nextEnded() -> (index: Int32, result: Int)? {
        if let index = unqueued.popFirst(slots) { return (index, slots[index].kind == .zeroes ? 0 : -Int(EIO)) }
        guard let ended = queue.nextCompletion() else { return nil }
        dequeued(ended.index)
        return ended
    }

    /// What became of an operation that came back from the queue: 0 or an errno value, or nil when the rest of it has
    /// been put into the queue.
    @inline(__always) mutating func outcome(_ index: Int32, _ result: Int) -> Int32? {
        let kind = slots[index].kind
        if result < 0 { return failure(index, Int32(clamping: -result)) }
        switch kind {
        case .synchronize, .commit, .commitData, .discard, .punch, .zeroRange, .zeroes:
            return 0
        case .read where result == 0:
            // The end of the file. Where it has always been, zeroes follow; elsewhere the file has been cut since.
            guard image.isEnd(slots[index].fileOffset + slots[index].done, slots[index].layer) else { return EIO }
            slots[index].clear(from: slots[index].done)
            return 0
        case .load where result == 0:
            return 0
        case .write where result == 0, .writeZeroes where result == 0:
            return EIO
        case .read, .write, .writeZeroes, .load:
            // Never more than was requested, even if the kernel reports more.
            slots[index].done += min(UInt64(result), slots[index].length - slots[index].done)
            slots[index].retries = 0
            if slots[index].done == slots[index].length { return 0 }
            if isCancelled(kind) { return ECANCELED }
            enqueue(index)
            return nil
        }
    }

    private mutating func failure(_ index: Int32, _ error: Int32) -> Int32? {
        switch (slots[index].kind, error) {
        case (let kind, _) where isCancelled(kind):
            return error
        case (_, EINTR), (_, EAGAIN):
            slots[index].retries += 1
            if slots[index].retries > Self.maximumRetries { return error }
        case (.discard, EOPNOTSUPP):
            // Best effort. Zeroes are not: if they cannot be made with a hole they are written.
            return 0
        case (.punch, EOPNOTSUPP):
            slots[index].kind = .writeZeroes
        case (.zeroRange, EOPNOTSUPP):
            refusesZeroRange = true
            slots[index].kind = .writeZeroes
        default:
            return error
        }
        enqueue(index)
        return nil
    }

    // MARK: - The owner's thread

    /// Hands what was queued to the kernel. What it does not take ends with an error.
    mutating func submit() {
        if queue.submit(outstanding: outstanding) { return }
        while let index = queue.reclaim(below: slots.count) { endUnqueued(index) }
    }

    /// Counts a request, and hands several at a time to the kernel.
    mutating func submitBatch() {
        if queue.isBatchComplete() { submit() }
    }

    /// Why something was not taken, once.
    mutating func takeSubmissionError() -> SystemCallError? { queue.takeError() }

    /// Indicates whether an operation has ended without making the descriptor readable, so that its result must be
    /// taken now: one that the queue refused, or a system call, which is executed immediately. Where all of them are
    /// system calls the descriptor is readable after the end of the owner's turn.
    var hasEnded: Bool {
        !unqueued.isEmpty || queue.hasEnded || queue.io.hasCompletion && !budget.isTurnOver
    }

    var usesRing: Bool { queue.io.isRing }
    var descriptor: Int32 { queue.io.rawValue }
    var unwatchedWakeup: Int32? { queue.unwatchedWakeup }

    /// Watches for other engines' wakeups, unless that was done already.
    mutating func listen() {
        if !queue.isListening { queue.listen() }
    }

    /// Called before the reason of a wakeup is examined, so that a later one is noticed again.
    mutating func listenAgain() {
        listen()
        queue.io.listen()
    }

    mutating func wait(isExclusive: Bool) throws(SystemCallError) {
        try queue.wait(for: outstanding, isExclusive: isExclusive)
    }

    mutating func beginTurn() { budget.beginTurn() }
    mutating func beginEndlessTurn() { budget.beginEndlessTurn() }
    var isTurnOver: Bool { budget.isTurnOver }

    mutating func spendLookup() { budget.spendLookup() }
    mutating func spend(zeroes bytes: UInt64) { budget.spend(zeroes: bytes) }
    mutating func spend(metadataOf bytes: UInt64) { budget.spend(metadataOf: bytes) }

    /// For tests.
    var bytesInFlight: UInt64 { budget.bytesInFlight }
    var maximumBytesInFlight: UInt64 { budget.maximumBytesInFlight }
    func queued(below limit: UInt64) -> Int { queue.queued(below: limit) }

    // MARK: - Cancellation

    /// Indicates whether an operation belongs to a request that is being cancelled. Metadata and commits do not: others
    /// may depend on them.
    private func isCancelled(_ kind: IOOperation.Kind) -> Bool {
        isCancelling && kind != .load && kind != .commit && kind != .commitData
    }

    /// No further operation of a request begins.
    mutating func beginCancelling() {
        isCancelling = true
        budget.beginEndlessTurn()
        queue.io.drain(within: Self.endTime)
    }

    /// Makes the kernel cancel what it has not started.
    mutating func cancelAll() {
        for index in slots.indices where slots[index].isActive && isCancelled(slots[index].kind) {
            queue.cancel(UInt64(index))
        }
    }

    /// Waits until an operation has completed, here or in another engine, even if submissions fail.
    mutating func waitDespiteErrors() {
        submit()
        if unqueued.isEmpty { queue.waitDespiteErrors() }
    }

    mutating func endCancelling() {
        isCancelling = false
        _ = queue.takeError()
    }

    /// Waits, when the engine ends, until the kernel has none of its operations.
    /// - Returns: an errno value if others may have depended on something that was not done; otherwise 0.
    func drain() -> Int32 {
        var failure = queue.drain(outstanding, of: slots.count)
        unqueued.forEach(slots) { if slots[$0].kind != .zeroes { failure = EIO } }
        return failure
    }
}

// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc
internal import Linux

/// The operation of a request on a range of the disk.
public enum DiskOperation: UInt8, Sendable {
    /// Disk to memory.
    case read
    /// Memory to disk.
    case write
    /// Makes durable every write that completed before this was started.
    case flush
    /// The range's contents no longer matter. What is read from it afterwards is the old data or zeroes.
    case discard
    /// The range reads as zeroes afterwards; its space stays reserved.
    case writeZeroes
    /// The range reads as zeroes afterwards and its space may be given back.
    case writeZeroesUnmapping

    /// What the system is asked for, as messages name it.
    var systemCall: String {
        switch self {
        case .read: "read"
        case .write: "write"
        case .flush: "fdatasync"
        case .discard, .writeZeroes, .writeZeroesUnmapping: "fallocate"
        }
    }
}

/// A request that has ended.
public struct DiskCompletion: Sendable {
    /// The number that ``DiskEngine/acquire()`` gave.
    public let request: Int
    public let operation: DiskOperation
    /// Byte of the disk where the request begins.
    public let offset: UInt64
    /// Bytes that the request was about.
    public let length: UInt64
    /// 0, or the errno value of the first failure.
    public let error: Int32
    /// The access that the host refused, for ``DiskEngine/failure(of:)``.
    let failed: FailedAccess?

    /// Indicates whether the image itself, and no file's I/O, is the likely reason.
    public var isDamage: Bool { failed == nil && error == EIO }

    /// Indicates whether the host had no room for what is written.
    public var isOutOfRoom: Bool { operation != .read && (error == ENOSPC || error == EDQUOT) }
}

/// Carries out requests on a disk image, many at a time, for the one thread that owns it.
///
/// A request is acquired and started; after a ``submit()`` it comes back from ``nextCompletion()``, and is then started with something else
/// or released. All memory is set aside when the engine is made, so a request costs no allocation, no lock and no reference count; where several
/// engines have one image, it costs the image's lock for as long as it takes to look into the metadata.
///
/// A request is cut into operations along the extents that the image's metadata names. Where the metadata has to be read first, the request
/// waits for that read and others go on. Nothing orders requests that are in flight together: who needs an order waits for completions.
@safe public struct DiskEngine: ~Copyable, @unchecked Sendable {
    /// The image with what all its engines share. From ``advance(_:)`` and ``completeOperation(_:result:)`` on, everything happens under its lock, but for work on
    /// bytes: ``work()``.
    /// It comes first: what is changed by way of an engine's references, all of it under that lock, ThreadSanitizer's part of the compiler (6.3)
    /// notes by the first word of the engine, and fails where that is no reference.
    let shared: SharedImage
    /// What the others see of this engine.
    let attachment: AttachedEngine

    /// Requests that can be in flight.
    public let depth: Int
    /// Memory segments that a request can have.
    public let maximumSegments: Int
    /// Requests started and not yet returned by ``nextCompletion()``.
    public internal(set) var inFlight = 0

    // Everything below is used by the owner's thread alone: hence `Sendable`.
    let queue: IOQueue
    let requests: Slab<Request>
    let operations: Slab<Operation>
    /// `maximumSegments` for each operation.
    var segmentLists: IOSegmentLists
    let operationCount: Int
    /// Zeroes to write where the file system cannot make any by itself.
    let zeroes: IOBuffer

    var freeRequests = IndexList()
    /// Requests that need an operation and found none free.
    var stalled = IndexList()
    var completed = IndexList()
    /// The first of those that the attachment has linked.
    var freeOperation: Int32 = 0
    /// Operations that end without the queue: zeroes that are there, and what it did not take.
    var unqueuedOperation: Int32 = -1
    /// Why the queue did not take them, until the owner's next ``submit()``.
    var submissionError: SystemCallError?
    var awaitingWork = WorkList()
    /// Operations that the queue has and has not completed.
    var outstanding = 0
    /// Indicates whether the queue watches the wakeup. The owner's thread has it do so, with its first request: before
    /// that nobody calls.
    var isListening = false
    /// File systems differ in what `fallocate` can do; what this one refused is not asked again.
    var refusesZeroRange = false

    var copies: Copies
    var freeCopy: Int32
    var encryption: EngineEncryption

    /// Requests started since the kernel was last told. A ring's are told of a few at a time, as a disk that has nothing to do waits as long as it takes
    /// to start all that there are.
    private var unsubmitted = 0
    private static let batch = 8

    /// Bytes that the queue has, and how many it may have when it gets more.
    var bytesInFlight: UInt64 = 0
    let maximumBytesInFlight: UInt64
    /// Bytes of work until the owner's turn is over.
    var turnLeft = Int.max
    /// Indicates whether all that is in flight is given up.
    var isCancelling = false

    /// How ``waitForCompletion()`` waits.
    private var waking = Waking()

    static let zeroesSize = 64 << 10
    /// The token of other engines' wakeups; those of operations are their indices.
    static let wakeupToken = UInt64.max
    /// That of cancellations.
    static let cancelToken = UInt64.max - 1

    /// An engine with an image of its own.
    /// - Parameters:
    ///   - depth: requests in flight, 1 … 4096.
    ///   - segments: memory segments of a request, 1 … 1024 (the kernel's limit).
    ///   - usesRing: false does without io_uring, as happens by itself where the host has none for this process.
    public init(_ image: DiskImage, depth: Int = 128, segments: Int = 128, usesRing: Bool = true) throws(DiskImageError) {
        try self.init(SharedImage(exclusive: image), depth: depth, segments: segments, usesRing: usesRing)
    }

    /// An engine whose system calls are a test's.
    init(_ image: DiskImage, depth: Int, segments: Int, calls: FileCalls) throws(DiskImageError) {
        try self.init(SharedImage(image, calls: calls, isExclusive: true), depth: depth, segments: segments, usesRing: false)
    }

    /// One of several engines of an image. Parameters are as those of an engine with an image of its own.
    /// - Parameter share: the engines together with which it keeps to a bound of bytes under way.
    public init(_ shared: SharedImage, depth: Int = 128, segments: Int = 128, usesRing: Bool = true, share: Int = 1) throws(DiskImageError) {
        let operations = Self.operationCount(depth)
        let queue: IOQueue
        do throws(SystemCallError) {
            queue = try shared.image.makeQueue(operations, usesRing: usesRing, calls: shared.calls)
        } catch { throw .system(path: shared.path, error) }
        try self.init(shared, depth: depth, segments: segments, queue: queue, share: share)
    }

    private init(_ shared: SharedImage, depth: Int, segments: Int, queue: consuming IOQueue, share: Int) throws(DiskImageError) {
        let depth = min(max(depth, 1), 4096)
        let segments = min(max(segments, 1), 1024)
        let operationCount = Self.operationCount(depth)
        let segmentLists: IOSegmentLists
        segmentLists = try IOSegmentLists(count: operationCount, capacity: segments, shared.path)
        let zeroes = try IOBuffer(count: Self.zeroesSize, shared.path)
        let copies = try Copies(shared.image.managesClusters ? shared.clusterSize ?? 0 : 0, shared.path)
        let encryption = try EngineEncryption(shared.image)
        let wakeup: AttachedEngine.Wakeup?
        do throws(SystemCallError) { wakeup = shared.isExclusive ? nil : try .init(queue.makeWakeup()) } catch { throw .system(path: shared.path, error) }
        // After the owner's requests come those of copies.
        let attachment = AttachedEngine(requests: depth + copies.count, operations: operationCount, wakeup: wakeup)
        try shared.attach(attachment)
        freeCopy = copies.count > 0 ? 0 : -1
        self.copies = copies
        self.encryption = encryption
        self.depth = depth
        maximumSegments = segments
        self.operationCount = operationCount
        self.shared = shared
        self.attachment = attachment
        maximumBytesInFlight = queue.isConcurrent ? max(Self.largestCall, Self.maximumBytesInFlight / UInt64(max(1, share))) : Self.maximumBytesInFlightInTurn
        self.queue = queue
        self.segmentLists = segmentLists
        self.zeroes = zeroes
        requests = attachment.requests
        operations = attachment.operations
        for index in 0..<depth { freeRequests.append(Int32(index), requests) }
    }

    deinit { detach() }

    private static func operationCount(_ depth: Int) -> Int {
        // Large requests on a fragmented image take several; a few more let small ones pass. One is the commit's.
        min(max(depth, 1), 4096) + 32 + 1
    }

    // MARK: - The owner's side

    /// The image. While it has other engines, only what never changes may be asked here: path, format, size, cluster size, whether it is read-only.
    public var image: DiskImage { shared.image }

    /// Indicates whether operations go through io_uring.
    public var usesRing: Bool { queue.isRing }

    /// A descriptor that is readable while operations have ended, or another engine of the image calls; after it became so, call
    /// ``nextCompletion()`` until it gives nil. Others may wait for that even while nothing is in flight here.
    public var descriptor: Int32 { queue.rawValue }

    /// A free request, or nil while all ``depth`` are taken.
    public mutating func acquire() -> Int? {
        guard let index = freeRequests.popFirst(requests) else { return nil }
        return Int(index)
    }

    /// Gives an acquired request back, which was not started, or has come back.
    public mutating func release(_ request: Int) {
        precondition(request >= 0 && request < depth)
        freeRequests.prepend(Int32(request), requests)
    }

    /// Starts an acquired request. A range that is not inside the disk, a write to a read-only one, and vectors whose lengths
    /// contradict `length` end it with an error, as any failure does; it always ends.
    /// - Parameters:
    ///   - offset: bytes from the start of the disk.
    ///   - length: bytes: the sum of the vectors for a transfer.
    ///   - vectors: the memory of a transfer. Both they and what they name stay as they are until the request has come back.
    ///   - count: how many vectors, at most ``maximumSegments``.
    public mutating func start(
        _ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64, vectors: UnsafePointer<iovec>, count: Int
    ) {
        // The caller vouches for the vectors and for the memory that they are about.
        start(request, operation, offset: offset, length: length, segments: unsafe IOSegments(vectors, count: max(0, count)))
    }

    /// The same with memory of this module's.
    mutating func start(_ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64, segments: IOSegments) {
        start(request, Request(operation: operation, segments: segments, offset: offset, length: length))
    }

    /// Starts an acquired request that transfers nothing. A flush has offset and length 0.
    public mutating func start(_ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64) {
        start(request, Request(operation: operation, segments: nil, offset: offset, length: length))
    }

    private mutating func start(_ index: Int, _ request: Request) {
        precondition(index >= 0 && index < depth)
        inFlight += 1
        requests[index] = request
        if let error = refusal(request) { requests[index].error = error }
        if !isListening { listen() }
        shared.lock()
        advance(Int32(index))
        shared.unlock()
        work()
        unsubmitted += 1
        if unsubmitted == Self.batch, queue.isRing { submitQueued() }
    }

    /// Hands what was started to the kernel; once after any number of requests is enough.
    /// - Throws: when the kernel has refused something since the last call. The requests concerned end with `EIO`, from
    ///   ``nextCompletion()`` as always; others may succeed.
    public mutating func submit() throws(DiskImageError) {
        shared.assertUnlocked()
        submitQueued()
        guard let error = submissionError else { return }
        submissionError = nil
        throw .request(path: shared.path, error)
    }

    /// Why a request failed, for the host's log: the image's damage where that is the reason, else the file, the byte and the system's reason.
    public func failure(of completion: DiskCompletion) -> DiskImageError? {
        guard completion.error != 0 else { return nil }
        shared.lock()
        defer { shared.unlock() }
        if completion.isDamage, let damage = image.damage { return damage }
        guard let failed = completion.failed else {
            let reason = SystemCallError(completion.operation.systemCall, errno: completion.error)
            return .transfer(path: shared.path, offset: completion.offset, length: completion.length, reason)
        }
        let path = image.path(of: failed), reason = SystemCallError(failed.call.name, errno: completion.error)
        // What is made durable is the whole file.
        return failed.call == .synchronize ? .request(path: path, reason) : .transfer(path: path, offset: failed.offset, length: nil, reason)
    }

    /// Indicates whether a request that failed may succeed when it is started again, once the cause is gone. It cannot where no access was
    /// refused (a damaged image, say), nor where the host could not make something durable: it reports that once, and may have lost the data.
    public func canRetry(_ completion: DiskCompletion) -> Bool {
        guard completion.failed.map({ $0.call != .synchronize }) ?? completion.isOutOfRoom else { return false }
        shared.lock()
        defer { shared.unlock() }
        return image.failure == 0
    }

    /// The same. A failure is the owner's to hear in its next ``submit()``.
    mutating func submitQueued() {
        unsubmitted = 0
        do { try queue.submit() } catch {
            submissionError = error
            reclaim()
        }
    }

    /// What the queue holds and did not get rid of ends, with an error: nobody would ever hear of it again.
    private mutating func reclaim() {
        while let token = queue.reclaim() {
            if token == Self.wakeupToken { isListening = false }
            // One of ours, unless it is the wakeup's or a cancellation's.
            if token < UInt64(operationCount) { endUnqueued(Int32(truncatingIfNeeded: token)) }
        }
    }

    /// The eventfd that other engines signal, while the queue does not watch it. Once it is readable, call ``nextCompletion()`` as for
    /// ``descriptor``.
    public var unwatchedWakeup: Int32? { isListening ? nil : attachment.wakeup?.event.rawValue }

    /// The next request that has ended, or nil when none has. What this sets going (the rest of a short transfer, say) is submitted
    /// before it answers nil.
    public mutating func nextCompletion() -> DiskCompletion? {
        // Those that waited for the owner's next turn.
        if !stalled.isEmpty, hasRoom {
            shared.lock()
            retryStalled()
            shared.unlock()
            work()
        }
        while true {
            // Also before a completion, after which the owner may ask nothing for long: the wakeup may have been heard among other things.
            if !shared.isExclusive, handleWakeup() { continue }
            if let index = completed.popFirst(requests) {
                inFlight -= 1
                let ended = requests[index]
                return DiskCompletion(request: Int(index), operation: ended.operation, offset: ended.offset, length: ended.length, error: ended.error,
                    failed: ended.failed)
            }
            if completeOperations() {
                submitForOthers()
                continue
            }
            if !shared.isExclusive {
                if !isListening { listen() }
                queue.listen()
                if handleWakeup() { continue }
            }
            submitQueued()
            // Calls that are done one after the other are done now, and the descriptor says so to an owner whose turn is over. What was refused ends at once.
            guard unqueuedOperation >= 0 || queue.hasCompletion && turnLeft > 0 else { return nil }
        }
    }

    /// Looks at what another engine has called for. Returns whether one had.
    private mutating func handleWakeup() -> Bool {
        guard attachment.takeWakeup() else { return false }
        shared.lock()
        attendWakeup()
        shared.unlock()
        work()
        submitForOthers()
        return true
    }

    /// What was set going may be for other engines, a commit say, and the owner of this one may do nothing for long once it has its completion.
    private mutating func submitForOthers() {
        if !shared.isExclusive { submitQueued() }
    }

    /// Finishes all operations that have ended. Returns whether there were any.
    private mutating func completeOperations() -> Bool {
        guard var next = nextOperation() else { return false }
        shared.lock()
        while true {
            completeOperation(next.index, result: next.result)
            guard let another = nextOperation() else { break }
            next = another
        }
        shared.unlock()
        work()
        return true
    }

    private mutating func nextOperation() -> (index: Int32, result: Int)? {
        if unqueuedOperation >= 0 {
            let index = unqueuedOperation
            unqueuedOperation = operations[index].next
            return (index, operations[index].kind == .zeroes ? 0 : -Int(EIO))
        }
        while let completion = queue.nextCompletion() {
            guard completion.token == Self.wakeupToken else {
                // The word of a cancellation is none of the operation.
                if completion.token == Self.cancelToken { continue }
                dequeued(Int32(truncatingIfNeeded: completion.token))
                return (Int32(truncatingIfNeeded: completion.token), Int(completion.result))
            }
            listen()
        }
        return nil
    }

    /// Watches for wakeups, and forgets those that were signalled before.
    private mutating func listen() {
        isListening = true
        guard let wakeup = attachment.wakeup else { return }
        wakeup.event.drain()
        try? queue.watch(wakeup.event, token: Self.wakeupToken)
    }

    /// Waits until a request has ended, if any is in flight.
    public mutating func waitForCompletion() throws(DiskImageError) -> DiskCompletion? {
        while true {
            try submit()
            if let completion = nextCompletion() { return completion }
            // What is in flight may wait for another engine, which will call.
            guard shared.isExclusive ? outstanding > 0 : inFlight > 0 else { return nil }
            if outstanding <= Waking.fewest, waking.spins(queue) { continue }
            // Of many several at a time: each waking costs as much as a request. None of them waits for anybody else.
            let count = shared.isExclusive ? max(1, outstanding / Waking.share) : 1
            do { try queue.wait(for: count) } catch { throw .request(path: shared.path, error) }
        }
    }

    /// One transfer from start to end, for tools and tests; nothing else may be in flight.
    public mutating func perform(_ operation: DiskOperation, at offset: UInt64, memory: UnsafeMutableRawBufferPointer) throws(DiskImageError) {
        // On the stack for as long as the request lasts; the memory is the caller's.
        var vector = unsafe iovec(iov_base: memory.baseAddress, iov_len: memory.count)
        try unsafe withUnsafePointer(to: &vector) { (vector) throws(DiskImageError) in
            let segments = unsafe IOSegments(vector, count: memory.isEmpty ? 0 : 1)
            try perform(Request(operation: operation, segments: segments, offset: offset, length: UInt64(memory.count)))
        }
    }

    /// The same for what transfers nothing.
    public mutating func perform(_ operation: DiskOperation, at offset: UInt64 = 0, length: UInt64 = 0) throws(DiskImageError) {
        try perform(Request(operation: operation, segments: nil, offset: offset, length: length))
    }

    private mutating func perform(_ request: Request) throws(DiskImageError) {
        precondition(inFlight == 0)
        guard let index = acquire() else { return }
        defer { release(index) }
        start(index, request)
        if let error = try waitForCompletion()?.error, error != 0 {
            throw .request(path: shared.path, SystemCallError("\(request.operation)", errno: error))
        }
    }

    /// Why a request cannot be; an errno value.
    private func refusal(_ request: Request) -> Int32? {
        guard request.offset <= image.size, request.length <= image.size - request.offset else { return EINVAL }
        if request.operation != .read, request.operation != .flush, image.isReadOnly { return EROFS }
        if encryption.isUsed, let error = encryption.refusal(request) { return error }
        guard request.isTransfer else { return nil }
        guard let segments = request.segments else { return request.length == 0 ? nil : EINVAL }
        guard segments.count <= maximumSegments else { return EINVAL }
        return segments.length == request.length ? nil : EINVAL
    }
}

func memory(_ size: Int, _ path: String) throws(DiskImageError) -> Mapping {
    do { return try Mapping(size: size, flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) } catch { throw .system(path: path, error) }
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

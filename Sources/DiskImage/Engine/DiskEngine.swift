// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc
internal import Linux

/// Carries out requests on a disk image, many at a time, for the one thread that owns it.
///
/// A request is acquired and started; after a ``submit()`` it is returned by ``nextCompletion()``, and is then started
/// with another operation or released. All memory is allocated when the engine is created, so a request needs no
/// allocation, no lock and no reference counting; if several engines share an image, it takes the image's lock while
/// the metadata is queried.
///
/// A request is split into operations along the extents of the image's metadata. If metadata must be read first, the
/// request waits for that read and others continue. Requests that are in flight together are not ordered: a caller that
/// needs an order waits for completions.
@safe public struct DiskEngine: ~Copyable, @unchecked Sendable {
    private let shared: SharedImage
    /// The requests and their operations. Only the owner's thread uses it: hence `Sendable`.
    private(set) var pipeline: RequestPipeline
    /// Memory segments that a request can have.
    public let maximumSegments: Int

    /// An engine with an image of its own.
    /// - Parameters:
    ///   - depth: requests in flight, 1 … 4096.
    ///   - segments: memory segments of a request, 1 … 1024 (the kernel's limit).
    ///   - usesRing: false does without io_uring, as happens by itself where the host has none for this process.
    public init(_ image: DiskImage, depth: Int = 128, segments: Int = 128, usesRing: Bool = true) throws(DiskImageError)
    {
        try self.init(SharedImage(exclusive: image), depth: depth, segments: segments, usesRing: usesRing)
    }

    /// An engine whose system calls are a test's.
    init(
        _ image: DiskImage, depth: Int, segments: Int, calls: FileCalls, usesRing: Bool = false
    ) throws(DiskImageError) {
        try self.init(
            SharedImage(image, calls: calls, isExclusive: true), depth: depth, segments: segments, usesRing: usesRing)
    }

    /// One of several engines of an image. Parameters are as those of an engine with an image of its own.
    /// - Parameter share: the engines together with which it keeps to a bound of bytes under way.
    public init(
        _ shared: SharedImage, depth: Int = 128, segments: Int = 128, usesRing: Bool = true, share: Int = 1
    ) throws(DiskImageError) {
        let depth = min(max(depth, 1), 4096)
        let segments = min(max(segments, 1), 1024)
        let queue: IOQueue
        do throws(SystemCallError) {
            queue = try shared.image.makeQueue(
                OperationTable.count(depth: depth), usesRing: usesRing, calls: shared.calls)
        } catch { throw .system(path: shared.path, error) }
        let pipeline = try RequestPipeline(shared, depth: depth, segments: segments, queue, share: share)
        self.shared = shared
        self.pipeline = pipeline
        maximumSegments = segments
    }

    // MARK: - The owner's side

    /// The image. While it has other engines, only what never changes may be asked here: path, format, size, cluster
    /// size, whether it is read-only.
    public var image: DiskImage { shared.image }

    /// Requests that can be in flight.
    public var depth: Int { pipeline.requests.depth }

    /// Requests started and not yet returned by ``nextCompletion()``.
    public var inFlight: Int { pipeline.requests.inFlight }

    /// Indicates whether nothing is in flight, and nothing under way for other engines of the image either.
    public var isIdle: Bool { inFlight == 0 && pipeline.operations.outstanding == 0 }

    /// Indicates whether operations go through io_uring.
    public var usesRing: Bool { pipeline.operations.usesRing }

    /// A descriptor that is readable while operations have ended, or another engine of the image calls; after it became
    /// so, call ``nextCompletion()`` until it gives nil. Others may wait for that even while nothing is in flight here.
    public var descriptor: Int32 { pipeline.operations.descriptor }

    /// The eventfd that other engines signal, while the queue does not watch it. Once it is readable, call
    /// ``nextCompletion()`` as for ``descriptor``.
    public var unwatchedWakeup: Int32? { pipeline.operations.unwatchedWakeup }

    /// A free request, or nil while all ``depth`` are taken.
    public mutating func acquire() -> Int? { pipeline.requests.acquire().map { Int($0) } }

    /// Releases an acquired request that was not started, or has completed.
    public mutating func release(_ request: Int) { pipeline.requests.release(Int32(request)) }

    /// Starts an acquired request. A range that is not inside the disk, a write to a read-only one, and vectors whose
    /// lengths contradict `length` end it with an error, as any failure does; it always ends.
    /// - Parameters:
    ///   - offset: bytes from the start of the disk.
    ///   - length: bytes: the sum of the vectors for a transfer.
    ///   - vectors: the memory of a transfer. Both they and what they name stay as they are until the request has come
    ///     back.
    ///   - count: how many vectors, at most ``maximumSegments``.
    public mutating func start(
        _ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64, vectors: UnsafePointer<iovec>,
        count: Int
    ) {
        // The caller guarantees that the vectors and their memory are valid.
        start(
            request, operation, offset: offset, length: length,
            segments: unsafe IOSegments(vectors, count: max(0, count)))
    }

    /// The same with memory of this module's.
    mutating func start(
        _ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64, segments: IOSegments
    ) {
        start(request, DiskRequest(operation, segments: segments, offset: offset, length: length))
    }

    /// Starts an acquired request that transfers nothing. A flush has offset and length 0.
    public mutating func start(_ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64) {
        start(request, DiskRequest(operation, offset: offset, length: length))
    }

    private mutating func start(_ request: Int, _ contents: DiskRequest) {
        let index = Int32(request)
        pipeline.requests.start(index, contents)
        if let error = refusal(contents) { pipeline.requests[index].error = error }
        pipeline.operations.listen()
        shared.lock()
        pipeline.advance(index)
        shared.unlock()
        pipeline.work()
        pipeline.operations.submitBatch()
    }

    /// Why a request cannot be; an errno value.
    private func refusal(_ request: DiskRequest) -> Int32? {
        guard request.offset <= image.size, request.length <= image.size - request.offset else { return EINVAL }
        if request.operation != .read, request.operation != .flush, image.isReadOnly { return EROFS }
        if pipeline.encryption.isUsed, let error = pipeline.encryption.refusal(request) { return error }
        guard request.isTransfer else { return nil }
        guard let segments = request.segments else { return request.length == 0 ? nil : EINVAL }
        guard segments.count <= maximumSegments else { return EINVAL }
        return segments.length == request.length ? nil : EINVAL
    }

    /// Hands what was started to the kernel; once after any number of requests is enough.
    /// - Throws: when the kernel has refused something since the last call. The requests concerned end with `EIO`, from
    ///   ``nextCompletion()`` as always; others may succeed.
    public mutating func submit() throws(DiskImageError) {
        shared.assertUnlocked()
        pipeline.operations.submit()
        if let error = pipeline.operations.takeSubmissionError() { throw .request(path: shared.path, error) }
    }

    /// Why a request failed, for the host's log: the image's damage where that is the reason, else the file, the byte
    /// and the system's reason.
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
        if let remote = image.remote, remote.path == path, let reason = remote.outageReason {
            return .remote(
                path: path,
                reason: failed.call == .synchronize
                    ? "flush: \(reason)"
                    : "\(failed.call.name): \(reason) (at byte \(failed.offset) of the remote disk)")
        }
        // What is made durable is the whole file.
        return failed.call == .synchronize
            ? .request(path: path, reason) : .transfer(path: path, offset: failed.offset, length: nil, reason)
    }

    /// Indicates whether a request that failed may succeed when it is started again, once the cause is gone. It cannot
    /// where no access was refused (a damaged image, say), nor where the host could not make something durable: it
    /// reports that once, and may have lost the data.
    public func canRetry(_ completion: DiskCompletion) -> Bool {
        guard completion.failed.map({ $0.call != .synchronize }) ?? completion.isOutOfRoom else { return false }
        shared.lock()
        defer { shared.unlock() }
        return image.failure == 0
    }

    /// The next request that has ended, or nil when none has. What this sets going (the rest of a short transfer, say)
    /// is submitted before it answers nil.
    public mutating func nextCompletion() -> DiskCompletion? {
        // Those that waited for the owner's next turn.
        if pipeline.requests.hasStalled, pipeline.operations.hasRoom {
            shared.lock()
            pipeline.retryStalled()
            shared.unlock()
            pipeline.work()
        }
        while true {
            // Also before a completion, after which the owner may ask nothing for long: the wakeup may have been heard
            // among other things.
            if !shared.isExclusive, handleWakeup() { continue }
            if let index = pipeline.requests.popCompleted() {
                let ended = pipeline.requests[index]
                return DiskCompletion(
                    request: Int(index), operation: ended.operation, offset: ended.offset, length: ended.length,
                    error: ended.error,
                    failed: ended.failed)
            }
            if completeOperations() {
                submitForOthers()
                continue
            }
            if !shared.isExclusive {
                pipeline.operations.listenAgain()
                if handleWakeup() { continue }
            }
            pipeline.operations.submit()
            guard pipeline.operations.hasEnded else { return nil }
        }
    }

    /// Looks at what another engine has called for. Returns whether one had.
    private mutating func handleWakeup() -> Bool {
        guard pipeline.attachment.takeWakeup() else { return false }
        shared.lock()
        pipeline.attendWakeup()
        shared.unlock()
        pipeline.work()
        submitForOthers()
        return true
    }

    /// What was set going may be for other engines, a commit say, and the owner of this one may do nothing for long
    /// once it has its completion.
    private mutating func submitForOthers() {
        if !shared.isExclusive { pipeline.operations.submit() }
    }

    /// Finishes all operations that have ended. Returns whether there were any.
    private mutating func completeOperations() -> Bool {
        guard var next = pipeline.operations.nextEnded() else { return false }
        shared.lock()
        while true {
            pipeline.complete(next)
            guard let another = pipeline.operations.nextEnded() else { break }
            next = another
        }
        shared.unlock()
        pipeline.work()
        return true
    }

    /// Waits until a request has ended, if any is in flight. An owner that waits has nothing else to do: its turn has
    /// no end, until it begins another.
    public mutating func waitForCompletion() throws(DiskImageError) -> DiskCompletion? {
        pipeline.operations.beginEndlessTurn()
        while true {
            try submit()
            if let completion = nextCompletion() { return completion }
            // What is in flight may wait for another engine, which will call.
            guard shared.isExclusive ? pipeline.operations.outstanding > 0 : inFlight > 0 else { return nil }
            do { try pipeline.operations.wait(isExclusive: shared.isExclusive) } catch {
                throw .request(path: shared.path, error)
            }
        }
    }

    /// One transfer from start to end, for who has nothing else in flight; it takes as long as it takes, see
    /// ``waitForCompletion()``.
    public mutating func perform(
        _ operation: DiskOperation, at offset: UInt64, memory: UnsafeMutableRawBufferPointer
    ) throws(DiskImageError) {
        // On the stack for as long as the request lasts; the memory is the caller's.
        var vector = unsafe iovec(iov_base: memory.baseAddress, iov_len: memory.count)
        try unsafe withUnsafePointer(to: &vector) { (vector) throws(DiskImageError) in
            let segments = unsafe IOSegments(vector, count: memory.isEmpty ? 0 : 1)
            try perform(DiskRequest(operation, segments: segments, offset: offset, length: UInt64(memory.count)))
        }
    }

    /// The same for what transfers nothing.
    public mutating func perform(
        _ operation: DiskOperation, at offset: UInt64 = 0, length: UInt64 = 0
    ) throws(DiskImageError) {
        try perform(DiskRequest(operation, offset: offset, length: length))
    }

    private mutating func perform(_ request: DiskRequest) throws(DiskImageError) {
        precondition(inFlight == 0)
        func failed(_ error: Int32) -> DiskImageError {
            .request(path: shared.path, SystemCallError("\(request.operation)", errno: error))
        }
        // An owner may keep all requests that have ended.
        guard let index = acquire() else { throw failed(EAGAIN) }
        defer { release(index) }
        start(index, request)
        let error = try waitForCompletion()?.error ?? EIO
        if error != 0 { throw failed(error) }
    }

    // MARK: - Turns and cancellation

    /// Begins a turn of the owner, which has other work to do: from here on the work that is begun is bounded, and when
    /// ``isTurnOver`` the rest waits for the next turn. An owner that never calls this has a single turn without a
    /// limit.
    public mutating func beginTurn() { pipeline.operations.beginTurn() }

    /// Indicates whether the turn's limit is reached. No descriptor becomes readable for the remaining work: the owner
    /// must continue by itself.
    public var isTurnOver: Bool { pipeline.operations.isTurnOver }

    /// Cancels all requests in flight, and releases them. No further operation of a request begins; operations that the
    /// kernel has not started are cancelled, and those that it has started are waited for, even if submissions fail.
    /// Afterwards nothing uses the memory of requests. A cancelled write may have been made completely, partly, or not
    /// at all.
    public mutating func cancelAll() {
        guard inFlight > 0 else { return }
        pipeline.operations.beginCancelling()
        shared.lock()
        pipeline.cancelWaiting()
        shared.unlock()
        pipeline.operations.cancelAll()
        while inFlight > 0 {
            if let ended = nextCompletion() {
                release(ended.request)
            } else {
                pipeline.operations.waitDespiteErrors()
            }
        }
        pipeline.operations.endCancelling()
    }

    /// Has a remote disk report the lost connections that were only counted: the machine is at its end.
    public func reportLosses() { image.remote?.reportLosses() }

    // MARK: - For this module, and for tests

    /// The system calls for metadata that is read and written synchronously.
    var calls: FileCalls { shared.calls }
    /// Indicates whether no engine of the image has anything under way, see ``SharedImage/isQuiet()``.
    var isImageQuiet: Bool { shared.isQuiet() }
    /// The number of the next operation, of any engine.
    var sequence: UInt64 { shared.sequence }
    var metadataFile: MetadataFile { MetadataFile(calls: calls, number: image.descriptor(0), failures: image.failures) }
    /// The file with the guest's data, which may be the same.
    var dataFile: MetadataFile { MetadataFile(calls: calls, number: image.dataDescriptor(0)) }

    var outstanding: Int { pipeline.operations.outstanding }
    var bytesInFlight: UInt64 { pipeline.operations.bytesInFlight }
    var maximumBytesInFlight: UInt64 { pipeline.operations.maximumBytesInFlight }
    func queued(below limit: UInt64) -> Int { pipeline.operations.queued(below: limit) }
    /// Its number at the image.
    var number: Int { pipeline.attachment.number }
    /// Indicates whether a request waits for something of the image's.
    var hasWaiting: Bool { pipeline.attachment.hasWaiting }
}

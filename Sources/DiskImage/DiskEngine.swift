public import CLinux
internal import Glibc
internal import Linux

/// What a request does to a range of the disk.
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
}

/// A request that has ended.
public struct DiskCompletion: Sendable {
    /// The number that ``DiskEngine/acquire()`` gave; it is free again.
    public let request: Int
    /// What the request was started with.
    public let token: UInt64
    /// Bytes that the request was about.
    public let length: UInt64
    /// 0, or the errno value of the first failure.
    public let error: Int32
}

/// Carries out requests on a disk image, many at a time, for the one thread that owns it.
///
/// A request is acquired, its memory segments are put into ``segments(of:)``, it is started, and after a
/// ``submit()`` it comes back from ``nextCompletion()``. All memory is set aside when the engine is made, so a request costs no
/// allocation, no lock and no reference count.
///
/// A request is cut into operations along the extents that the image's metadata names. Where the metadata has to be read first, the request
/// waits for that read and others go on. Nothing orders requests that are in flight together: who needs an order waits for completions.
@safe public struct DiskEngine: ~Copyable, @unchecked Sendable {
    public let image: DiskImage
    /// Requests that can be in flight.
    public let depth: Int
    /// Memory segments that a request can have.
    public let maximumSegments: Int
    /// Requests acquired and not yet returned by ``nextCompletion()``.
    public private(set) var inFlight = 0

    // Everything below is used by the owner's thread alone: hence `Sendable`.
    let queue: IOQueue
    let requests: UnsafeMutablePointer<Request>
    let operations: UnsafeMutablePointer<Operation>
    /// `maximumSegments` for each request, then as many for each operation; given by the kernel as they are touched.
    let vectors: Mapping
    let operationCount: Int
    /// Zeroes to write where the file system cannot make any by itself.
    let zeroes: Mapping

    var freeRequests = IndexList()
    /// Requests that need an operation and found none free.
    var stalled = IndexList()
    /// Requests that need metadata that is being read.
    var waiting = IndexList()
    var completed = IndexList()
    var freeOperation: Int32 = -1
    /// Operations that the queue did not take.
    var refusedOperation: Int32 = -1
    /// Operations that the queue has and has not completed.
    var outstanding = 0
    /// File systems differ in what `fallocate` can do; what this one refused is not asked again.
    var refusesZeroRange = false

    static let zeroesSize = 64 << 10

    /// - Parameters:
    ///   - depth: requests in flight, 1 … 4096.
    ///   - segments: memory segments of a request, 1 … 1024 (the kernel's limit).
    ///   - usesRing: false does without io_uring, as happens by itself where the host has none for this process.
    public init(_ image: consuming DiskImage, depth: Int = 128, segments: Int = 128, usesRing: Bool = true) throws(DiskImageError) {
        let operations = Self.operationCount(depth)
        // No ring, for whatever reason, is no reason to have no disk.
        if usesRing, let ring = try? IORing(entries: operations) {
            try self.init(image, depth: depth, segments: segments, queue: .ring(ring))
        } else {
            let io = try synchronousIO(operations, .host, image.path)
            try self.init(image, depth: depth, segments: segments, queue: .synchronous(io))
        }
    }

    /// An engine whose system calls are a test's.
    init(_ image: consuming DiskImage, depth: Int, segments: Int, calls: FileCalls) throws(DiskImageError) {
        let io = try synchronousIO(Self.operationCount(depth), calls, image.path)
        try self.init(image, depth: depth, segments: segments, queue: .synchronous(io))
    }

    private init(_ image: consuming DiskImage, depth: Int, segments: Int, queue: consuming IOQueue) throws(DiskImageError) {
        let depth = min(max(depth, 1), 4096)
        let segments = min(max(segments, 1), 1024)
        let operationCount = Self.operationCount(depth)
        let vectorSize = unsafe MemoryLayout<iovec>.stride
        let vectors = try memory((depth + operationCount) * segments * vectorSize, image.path)
        let zeroes = try memory(Self.zeroesSize, image.path)
        self.depth = depth
        maximumSegments = segments
        self.operationCount = operationCount
        self.image = image
        self.queue = queue
        self.vectors = vectors
        self.zeroes = zeroes
        unsafe requests = .allocate(capacity: depth)
        unsafe requests.initialize(repeating: Request(), count: depth)
        unsafe operations = .allocate(capacity: operationCount)
        unsafe operations.initialize(repeating: Operation(), count: operationCount)
        for index in 0..<depth { unsafe freeRequests.append(Int32(index), requests) }
        for index in (0..<operationCount).reversed() { release(operation: Int32(index)) }
    }

    deinit {
        // The kernel may still write to the memory of requests: nobody may free that before they have ended.
        var left = outstanding
        while left > 0, (try? queue.submit()) != nil, (try? queue.wait()) != nil {
            while queue.nextCompletion() != nil { left -= 1 }
        }
        unsafe requests.deallocate()
        unsafe operations.deallocate()
    }

    private static func operationCount(_ depth: Int) -> Int {
        // Large requests on a fragmented image take several; a few more let small ones pass.
        min(max(depth, 1), 4096) + 32
    }

    // MARK: - The owner's side

    /// Whether operations go through io_uring.
    public var usesRing: Bool { queue.isRing }

    /// A descriptor that is readable while operations have ended; after it became so, call ``nextCompletion()`` until it gives nil.
    public var descriptor: Int32 { queue.rawValue }

    /// A free request, or nil while ``depth`` are in flight.
    public mutating func acquire() -> Int? {
        guard let index = unsafe freeRequests.popFirst(requests) else { return nil }
        inFlight += 1
        return Int(index)
    }

    /// Room for the segments of an acquired request, ``maximumSegments`` of them. None may be empty.
    public func segments(of request: Int) -> UnsafeMutableBufferPointer<iovec> {
        precondition(request >= 0 && request < depth)
        return unsafe UnsafeMutableBufferPointer(start: requestVectors(request), count: maximumSegments)
    }

    /// Starts an acquired request. A range that is not inside the disk, a write to a read-only one, and segments whose lengths
    /// contradict `length` end it with an error, as any failure does; it always ends.
    /// - Parameters:
    ///   - offset: bytes from the start of the disk.
    ///   - length: bytes; the sum of the segments for a transfer, 0 for a flush.
    ///   - segments: how many were filled in. Their memory stays where it is until the request has come back.
    ///   - token: comes back with the completion.
    public mutating func start(_ request: Int, _ operation: DiskOperation, offset: UInt64, length: UInt64, segments: Int = 0, token: UInt64 = 0) {
        precondition(request >= 0 && request < depth)
        unsafe requests[request].begin(operation, offset: offset, length: length, segments: segments, token: token)
        if let error = refusal(request) { unsafe requests[request].error = error }
        advance(Int32(request))
    }

    /// Hands what was started to the kernel; once after a batch is enough.
    /// - Throws: when the kernel takes nothing any more. The engine is of no further use then.
    public mutating func submit() throws(DiskImageError) {
        do { try queue.submit() } catch { throw .request(path: image.path, error) }
    }

    /// The next request that has ended, or nil when none has. What this sets going (the rest of a short transfer, say) is submitted
    /// before it answers nil.
    public mutating func nextCompletion() -> DiskCompletion? {
        while true {
            if let index = unsafe completed.popFirst(requests) {
                inFlight -= 1
                let ended = unsafe requests[Int(index)]
                unsafe freeRequests.append(index, requests)
                return DiskCompletion(request: Int(index), token: ended.token, length: ended.length, error: ended.error)
            }
            if refusedOperation >= 0 {
                let index = refusedOperation
                unsafe refusedOperation = operations[Int(index)].next
                finish(index, result: -Int(EIO))
                continue
            }
            guard let completion = queue.nextCompletion() else {
                // A failure here shows again in the owner's next `submit`.
                try? queue.submit()
                return nil
            }
            outstanding -= 1
            finish(Int32(truncatingIfNeeded: completion.token), result: Int(completion.result))
        }
    }

    /// Waits until a request has ended, if any is in flight.
    public mutating func waitForCompletion() throws(DiskImageError) -> DiskCompletion? {
        while true {
            try submit()
            if let completion = nextCompletion() { return completion }
            guard outstanding > 0 else { return nil }
            do { try queue.wait() } catch { throw .request(path: image.path, error) }
        }
    }

    /// One request from start to end, for tools and tests. Others that end meanwhile would be lost, so there may be none.
    public mutating func perform(_ operation: DiskOperation, at offset: UInt64, length: UInt64, memory: UnsafeMutableRawPointer? = nil)
        throws(DiskImageError)
    {
        precondition(inFlight == 0)
        guard let request = acquire() else { return }
        if let memory = unsafe memory, length > 0 {
            unsafe segments(of: request)[0] = iovec(iov_base: memory, iov_len: Int(clamping: length))
        }
        start(request, operation, offset: offset, length: length, segments: unsafe memory == nil || length == 0 ? 0 : 1)
        guard let completion = try waitForCompletion() else { return }
        if completion.error != 0 { throw .request(path: image.path, SystemCallError("\(operation)", errno: completion.error)) }
    }

    /// Why a request cannot be; an errno value.
    private func refusal(_ index: Int) -> Int32? {
        let request = unsafe requests[index]
        guard request.offset <= image.size, request.length <= image.size - request.offset else { return EINVAL }
        if request.operation != .read, request.operation != .flush, image.isReadOnly { return EROFS }
        guard request.isTransfer else { return nil }
        guard request.segments >= 0, request.segments <= maximumSegments else { return EINVAL }
        var sum: UInt64 = 0
        // Within the request's vectors, by the check above.
        for segment in 0..<request.segments { sum &+= unsafe UInt64(requestVectors(index)[segment].iov_len) }
        return sum == request.length ? nil : EINVAL
    }
}

private func synchronousIO(_ capacity: Int, _ calls: FileCalls, _ path: String) throws(DiskImageError) -> SynchronousIO {
    do { return try SynchronousIO(capacity: capacity, calls: calls) } catch { throw .system(path: path, error) }
}

private func memory(_ size: Int, _ path: String) throws(DiskImageError) -> Mapping {
    do { return try Mapping(size: size, flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE) } catch { throw .system(path: path, error) }
}

internal import CLinux
internal import Glibc
internal import Linux

/// Where an engine's operations are carried out: in an io_uring, or, where the host gives none, by one system call after the other, or by a
/// remote disk's server. All look the same from above; the second merely has every operation done when ``submit()`` returns, and the
/// third is the one place that a remote disk's operations are about, whatever the descriptor.
enum IOQueue: ~Copyable {
    case ring(IORing)
    case synchronous(SynchronousIO)
    case remote(NBDDisk)

    /// Readable while completions wait.
    var rawValue: Int32 {
        switch self {
        case .ring(let ring): ring.rawValue
        case .synchronous(let calls): calls.rawValue
        case .remote(let disk): disk.descriptor
        }
    }

    var isRing: Bool {
        switch self {
        case .ring: true
        case .synchronous: false
        case .remote: false
        }
    }

    // The engine vouches for vectors and for the memory they name until the operation's completion.

    func read(_ file: Int32, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try unsafe ring.read(file, vectors, count: count, at: offset, token: token)
        case .synchronous(let calls): unsafe calls.read(file, vectors, count: count, at: offset, token: token)
        case .remote(let disk): try unsafe disk.transfer(.read, vectors, count: count, at: offset, token: token)
        }
    }

    func write(_ file: Int32, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try unsafe ring.write(file, vectors, count: count, at: offset, token: token)
        case .synchronous(let calls): unsafe calls.write(file, vectors, count: count, at: offset, token: token)
        case .remote(let disk): try unsafe disk.transfer(.write, vectors, count: count, at: offset, token: token)
        }
    }

    func synchronize(_ file: Int32, token: UInt64) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.synchronize(file, token: token)
        case .synchronous(let calls): calls.synchronize(file, token: token)
        case .remote(let disk): try disk.change(.flush, token: token)
        }
    }

    func allocate(_ file: Int32, mode: Int32, at offset: UInt64, length: UInt64, token: UInt64) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.allocate(file, mode: mode, at: offset, length: length, token: token)
        case .synchronous(let calls): calls.allocate(file, mode: mode, at: offset, length: length, token: token)
        case .remote(let disk):
            try disk.change(mode & FALLOC_FL_PUNCH_HOLE != 0 ? .zero : .zeroKeeping, at: offset, length: length, token: token)
        }
    }

    /// The range's contents no longer matter.
    func discard(_ file: Int32, at offset: UInt64, length: UInt64, token: UInt64) throws(SystemCallError) {
        switch self {
        case .remote(let disk): try disk.change(.trim, at: offset, length: length, token: token)
        default: try allocate(file, mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at: offset, length: length, token: token)
        }
    }

    func submit() throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.submit()
        case .synchronous: break
        case .remote(let disk): disk.submit()
        }
    }

    /// Waits for a completion, of which at least one is outstanding.
    func wait() throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.wait()
        case .synchronous: break
        case .remote(let disk): disk.wait()
        }
    }

    /// What is outstanding is over within a time: a server, other than a kernel, may never answer.
    func finish(within milliseconds: Int) {
        switch self {
        case .remote(let disk): disk.finish(within: milliseconds)
        default: break
        }
    }

    func nextCompletion() -> IORing.Completion? {
        switch self {
        case .ring(let ring): ring.nextCompletion()
        case .synchronous(let calls): calls.nextCompletion()
        case .remote(let disk): disk.nextCompletion()
        }
    }
}

/// The system calls of ``SynchronousIO``; a test passes others, which fail or do half. Results are as io_uring gives them:
/// a negative errno value is a failure.
@safe struct FileCalls: Sendable {
    var read: @Sendable (Int32, UnsafePointer<iovec>, Int32, off_t) -> Int
    var write: @Sendable (Int32, UnsafePointer<iovec>, Int32, off_t) -> Int
    var synchronize: @Sendable (Int32) -> Int
    var allocate: @Sendable (Int32, Int32, off_t, off_t) -> Int
    var truncate: @Sendable (Int32, off_t) -> Int = { file, size in outcome(Int(ftruncate(file, size))) }

    /// The kernel's.
    static let host = unsafe FileCalls(
        // The pointers go straight to the kernel, which looks at `count` vectors.
        read: { file, vectors, count, offset in unsafe outcome(preadv(file, vectors, count, offset)) },
        write: { file, vectors, count, offset in unsafe outcome(pwritev(file, vectors, count, offset)) },
        synchronize: { file in outcome(Int(fdatasync(file))) },
        allocate: { file, mode, offset, length in outcome(Int(clinux_fallocate(file, mode, offset, length))) })

    private static func outcome(_ result: Int) -> Int { result < 0 ? -Int(errno) : result }
}

/// File operations done at once in the calling thread; only their completions queue.
@safe final class SynchronousIO: @unchecked Sendable {
    private let calls: FileCalls
    private let bell: EventFD
    /// A ring of completions, as many as there can be operations. One thread at a time uses them: hence `Sendable`.
    private let completions: UnsafeMutableBufferPointer<IORing.Completion>
    private var first = 0
    private var count = 0

    init(capacity: Int, calls: FileCalls = .host) throws(SystemCallError) {
        bell = try EventFD()
        self.calls = calls
        unsafe completions = .allocate(capacity: max(1, capacity))
        unsafe completions.initialize(repeating: IORing.Completion(token: 0, result: 0))
    }

    deinit {
        unsafe completions.deallocate()
    }

    var rawValue: Int32 { bell.rawValue }

    func read(_ file: Int32, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64) {
        complete(token, unsafe calls.read(file, vectors, Int32(clamping: count), off_t(truncatingIfNeeded: offset)))
    }

    func write(_ file: Int32, _ vectors: UnsafePointer<iovec>, count: Int, at offset: UInt64, token: UInt64) {
        complete(token, unsafe calls.write(file, vectors, Int32(clamping: count), off_t(truncatingIfNeeded: offset)))
    }

    func synchronize(_ file: Int32, token: UInt64) {
        complete(token, calls.synchronize(file))
    }

    func allocate(_ file: Int32, mode: Int32, at offset: UInt64, length: UInt64, token: UInt64) {
        complete(token, calls.allocate(file, mode, off_t(truncatingIfNeeded: offset), off_t(truncatingIfNeeded: length)))
    }

    func nextCompletion() -> IORing.Completion? {
        guard count > 0 else { return nil }
        let completion = unsafe completions[first]
        first = unsafe (first + 1) % completions.count
        count -= 1
        if count == 0 { bell.drain() }
        return completion
    }

    private func complete(_ token: UInt64, _ result: Int) {
        // The engine has no more operations than the capacity, each with one completion at most.
        unsafe completions[(first + count) % completions.count] = IORing.Completion(token: token, result: Int32(clamping: result))
        count += 1
        if count == 1 { bell.signal() }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// Where an engine's operations are carried out: in an io_uring, or, where the host gives none, by one system call
/// after the other. Both look the same from above; with the second, every operation has completed when ``submit()``
/// returns. Nothing is executed before that: operations are queued under the lock of an image that several engines use,
/// and carried out without it. A remote disk is a queue of its own kind, for the one engine that it has: its operations
/// are about that disk, whatever the descriptor.
enum IOQueue: ~Copyable {
    case ring(IORing)
    case synchronous(SynchronousIO)
    case remote(NBDDisk)
    /// Files on top of a remote disk.
    case layered(LayeredIO)

    /// Readable while completions wait.
    var rawValue: Int32 {
        switch self {
        case .ring(let ring): ring.rawValue
        case .synchronous(let calls): calls.rawValue
        case .remote(let disk): disk.descriptor
        case .layered(let queues): queues.descriptor
        }
    }

    /// Indicates whether a completion waits that was done in this thread.
    var hasCompletion: Bool {
        switch self {
        case .ring: false
        case .synchronous(let calls): calls.hasCompletion
        case .remote(let disk): !disk.ended.isEmpty
        case .layered(let queues): queues.hasCompletion
        }
    }

    var isRing: Bool {
        switch self {
        case .ring: true
        case .synchronous: false
        case .remote: false
        case .layered(let queues): queues.files.isRing
        }
    }

    /// Indicates whether operations are carried out while the caller continues.
    var isConcurrent: Bool {
        switch self {
        case .synchronous: false
        case .layered(let queues): queues.files.isConcurrent
        case .ring: true
        case .remote: true
        }
    }

    /// Indicates whether a transfer with a file may be a system call of the owner's instead: the result is the same.
    func allowsCall(_ file: Int32) -> Bool {
        switch self {
        case .ring: true
        // All of them are.
        case .synchronous: false
        case .remote: false
        case .layered(let queues): queues.allowsCall(file)
        }
    }

    // The segments, and the memory that they are about, stay until the operation's completion: hence the ring may have
    // their addresses.

    /// - Parameter isAside: as ``IORing/read(_:_:count:at:token:isAside:)`` has it, where there is a ring.
    func read(
        _ file: Int32, _ segments: IOSegments, at offset: UInt64, token: UInt64, isAside: Bool
    ) throws(SystemCallError) {
        switch self {
        // They stay until the completion.
        case .ring(let ring):
            try unsafe ring.read(
                file, segments.vectors, count: segments.count, at: offset, token: token, isAside: isAside)
        case .synchronous(let calls): calls.read(file, segments, at: offset, token: token)
        case .remote(let disk): try disk.transfer(.read, segments, at: offset, token: token)
        case .layered(let queues): try queues.read(file, segments, at: offset, token: token, isAside: isAside)
        }
    }

    func write(_ file: Int32, _ segments: IOSegments, at offset: UInt64, token: UInt64) throws(SystemCallError) {
        switch self {
        // As above.
        case .ring(let ring):
            try unsafe ring.write(file, segments.vectors, count: segments.count, at: offset, token: token)
        case .synchronous(let calls): calls.write(file, segments, at: offset, token: token)
        case .remote(let disk): try disk.transfer(.write, segments, at: offset, token: token)
        case .layered(let queues): try queues.files.write(file, segments, at: offset, token: token)
        }
    }

    func synchronize(_ file: Int32, token: UInt64) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.synchronize(file, token: token)
        case .synchronous(let calls): calls.synchronize(file, token: token)
        case .remote(let disk): try disk.change(.flush, token: token)
        case .layered(let queues): try queues.files.synchronize(file, token: token)
        }
    }

    func allocate(_ file: Int32, mode: Int32, at offset: UInt64, length: UInt64, token: UInt64) throws(SystemCallError)
    {
        switch self {
        case .ring(let ring): try ring.allocate(file, mode: mode, at: offset, length: length, token: token)
        case .synchronous(let calls): calls.allocate(file, mode: mode, at: offset, length: length, token: token)
        case .remote(let disk):
            try disk.change(
                mode & FALLOC_FL_PUNCH_HOLE != 0 ? .zero : .zeroKeeping, at: offset, length: length, token: token)
        case .layered(let queues): try queues.files.allocate(file, mode: mode, at: offset, length: length, token: token)
        }
    }

    /// The range's contents no longer matter.
    func discard(_ file: Int32, at offset: UInt64, length: UInt64, token: UInt64) throws(SystemCallError) {
        switch self {
        case .remote(let disk): try disk.change(.trim, at: offset, length: length, token: token)
        default:
            try allocate(
                file, mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at: offset, length: length, token: token)
        }
    }

    /// A wakeup for others to ring, to be watched.
    func makeWakeup() throws(SystemCallError) -> EventFD {
        switch self {
        case .ring: try EventFD()
        case .synchronous(let calls): try calls.wakeup.duplicate()
        case .remote: try EventFD()
        case .layered(let queues): try queues.files.makeWakeup()
        }
    }

    /// Has ``rawValue`` become readable when an eventfd is signalled, once: a completion with this token reports it.
    /// Calls that are done one after the other have their own wakeup for that.
    func watch(_ wakeup: borrowing EventFD, token: UInt64) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.poll(wakeup.rawValue, token: token)
        case .synchronous: break
        // There is no other engine that would ring.
        case .remote: break
        case .layered: break
        }
    }

    /// Called before the reason of a signal is examined, so that a later signal is noticed again.
    func listen() {
        switch self {
        case .ring: break
        case .synchronous(let calls): calls.listen()
        case .remote: break
        case .layered: break
        }
    }

    func submit() throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.submit()
        case .synchronous(let calls): calls.submit()
        case .remote(let disk): disk.submit()
        case .layered(let queues): try queues.submit()
        }
    }

    /// Looks for a completion of the kernel's without sleeping. Returns whether there is one.
    func spin(nanoseconds: UInt32) -> Bool {
        switch self {
        case .ring(let ring): ring.spin(nanoseconds: nanoseconds)
        case .synchronous: false
        case .remote: false
        case .layered(let queues): queues.spin(nanoseconds: nanoseconds)
        }
    }

    /// Waits for a completion, of which at least one is outstanding, or a wakeup; of the kernel's for as many as are
    /// wanted.
    func wait(for count: Int = 1) throws(SystemCallError) {
        switch self {
        case .ring(let ring): try ring.wait(for: count)
        case .synchronous(let calls): calls.wait()
        case .remote(let disk): disk.wait()
        case .layered(let queues): try queues.wait()
        }
    }

    /// Operations that were begun and that the kernel does not have, nor ever will unless there is another
    /// ``submit()``.
    /// - Parameter limit: those with smaller tokens are counted.
    func queued(below limit: UInt64) -> Int {
        switch self {
        case .ring(let ring): ring.queued(below: limit)
        case .layered(let queues): queues.files.queued(below: limit)
        // They have none after their `submit`, which does not fail.
        case .synchronous: 0
        case .remote: 0
        }
    }

    /// Cancels an operation, as far as possible: it still completes, with an error if it was not executed. What belongs
    /// to a server ends by ``drain(within:)``.
    func cancel(_ target: UInt64, token: UInt64) {
        switch self {
        // Without room for it the operation ends by itself.
        case .ring(let ring): try? ring.cancel(target, token: token)
        case .synchronous(let calls): calls.cancel(target)
        case .layered(let queues): queues.files.cancel(target, token: token)
        case .remote: break
        }
    }

    /// Removes an operation that the kernel has not received and never will, and returns its token; nil if there is
    /// none.
    func reclaim() -> UInt64? {
        switch self {
        case .ring(let ring): ring.reclaim()
        case .layered(let queues): queues.files.reclaim()
        case .synchronous: nil
        case .remote: nil
        }
    }

    /// What is outstanding is over within a time: a server, other than a kernel, may never answer.
    func drain(within milliseconds: Int) {
        switch self {
        case .remote(let disk): disk.drain(within: milliseconds)
        case .layered(let queues): queues.remote.drain(within: milliseconds)
        default: break
        }
    }

    func nextCompletion() -> IORing.Completion? {
        switch self {
        case .ring(let ring): ring.nextCompletion()
        case .synchronous(let calls): calls.nextCompletion()
        case .remote(let disk): disk.nextCompletion()
        case .layered(let queues): queues.nextCompletion()
        }
    }
}

/// File operations done one after the other in the thread that submits them; only their completions queue.
final class SynchronousIO: @unchecked Sendable {
    private enum Call {
        case read, write, synchronize
        case allocate(mode: Int32, length: UInt64)
    }

    private struct Operation {
        var call = Call.synchronize
        var file: Int32 = -1
        var segments: IOSegments?
        var offset: UInt64 = 0
        var token: UInt64 = 0
        /// When it is done.
        var result: Int32 = 0
        var isCancelled = false
    }

    private let calls: FileCalls
    /// Readable while completions wait. Others may ring it too.
    let wakeup: EventFD
    /// A ring of operations in their order, as many as there can be: those that are done, and behind them those that
    /// are queued. One thread at a time uses them: hence `Sendable`.
    private let operations: Slab<Operation>
    private var first = 0
    private var done = 0
    private var queued = 0

    init(capacity: Int, calls: FileCalls = .host) throws(SystemCallError) {
        wakeup = try EventFD()
        self.calls = calls
        operations = Slab(count: max(1, capacity)) { _ in Operation() }
    }

    var rawValue: Int32 { wakeup.rawValue }
    var hasCompletion: Bool { done > 0 }

    // The segments live until the completion.

    func read(_ file: Int32, _ segments: IOSegments, at offset: UInt64, token: UInt64) {
        append(Operation(call: .read, file: file, segments: segments, offset: offset, token: token))
    }

    func write(_ file: Int32, _ segments: IOSegments, at offset: UInt64, token: UInt64) {
        append(Operation(call: .write, file: file, segments: segments, offset: offset, token: token))
    }

    func synchronize(_ file: Int32, token: UInt64) {
        append(Operation(call: .synchronize, file: file, token: token))
    }

    func allocate(_ file: Int32, mode: Int32, at offset: UInt64, length: UInt64, token: UInt64) {
        append(Operation(call: .allocate(mode: mode, length: length), file: file, offset: offset, token: token))
    }

    /// Does what is queued.
    func submit() {
        guard queued > 0 else { return }
        while queued > 0 {
            let index = (first + done) % operations.count
            operations[index].result = Int32(clamping: carryOut(operations[index]))
            queued -= 1
            done += 1
        }
        wakeup.signal()
    }

    /// An operation that is queued is not done.
    func cancel(_ target: UInt64) {
        for index in 0..<queued {
            let index = (first + done + index) % operations.count
            if operations[index].token == target { operations[index].isCancelled = true }
        }
    }

    func nextCompletion() -> IORing.Completion? {
        guard done > 0 else { return nil }
        let operation = operations[first]
        first = (first + 1) % operations.count
        done -= 1
        if done == 0 { wakeup.drain() }
        return IORing.Completion(token: operation.token, result: operation.result)
    }

    func listen() {
        if done == 0 { wakeup.drain() }
    }

    /// Waits for a completion or a signal of another thread.
    func wait() {
        if done == 0 { wakeup.wait() }
    }

    private func append(_ operation: Operation) {
        // The engine has no more operations than the capacity, each in the queue once at most.
        operations[(first + done + queued) % operations.count] = operation
        queued += 1
    }

    private func carryOut(_ operation: Operation) -> Int {
        if operation.isCancelled { return -Int(ECANCELED) }
        let offset = off_t(truncatingIfNeeded: operation.offset)
        switch (operation.call, operation.segments) {
        case (.read, let segments?): return calls.read(operation.file, segments, at: operation.offset)
        case (.write, let segments?): return calls.write(operation.file, segments, at: operation.offset)
        case (.allocate(let mode, let length), _):
            return calls.allocate(operation.file, mode, offset, off_t(truncatingIfNeeded: length))
        case (.synchronize, _), (_, nil): return calls.synchronize(operation.file)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

public import Linux
public import Sandbox
internal import Synchronization

/// A UNIX socket at which a server takes requests for the machine of a ``ForegroundSession``, and what the server asks
/// of that session's event loop. The server's thread exists before the machine does.
public final class RemoteSession: Sendable {
    let listener: Listener
    /// Readable when there is a request.
    let event: EventFD
    /// Answers to requests to write the metrics: whether that was done.
    private let flushes = Guarded<[@Sendable (Bool) -> Void]>([])
    private let isConfining = Atomic<Bool>(false)
    private let hold = Guarded<(@Sendable () -> @Sendable () -> Void)?>(nil)
    private let didStart = Guarded<(@Sendable (Machine, Sandbox) -> Void)?>(nil)

    /// Listens at a path where there is no file yet.
    /// - Throws: `EADDRINUSE` when there is one.
    public init(path: String) throws(SystemCallError) {
        event = try EventFD()
        listener = try Listener(path: path, replacesStale: false)
    }

    /// Another descriptor of the socket, for the server.
    public func duplicateDescriptor() throws(SystemCallError) -> FileDescriptor {
        try FileDescriptor.duplicate(of: listener.descriptor.rawValue)
    }

    /// - Parameter body: called when the machine's guest runs and the process is confined, with that confinement.
    public func whenStarted(_ body: @escaping @Sendable (Machine, Sandbox) -> Void) {
        didStart.withLock { $0 = body }
    }

    /// - Parameter body: called when the machine is about to be created: stops the server until the function that it
    ///   returns is called, when the guest runs or there is no machine.
    public func whenStarting(_ body: @escaping @Sendable () -> @Sendable () -> Void) { hold.withLock { $0 = body } }

    /// Has the metrics written.
    /// - Parameter answer: called by the event loop's thread: whether there is a file for them.
    public func flushMetrics(answer: @escaping @Sendable (Bool) -> Void) {
        flushes.withLock { $0.append(answer) }
        event.signal()
    }

    /// Removes the socket's file, unless another process does that.
    public func close() { listener.withdraw() }

    /// Indicates whether the process has begun to confine itself, so that it can create no other machine.
    public var hasConfined: Bool { isConfining.load(ordering: .acquiring) }

    /// Stops the server.
    func stop() -> @Sendable () -> Void { hold.withLock { $0 }?() ?? {} }

    func reportConfinement() { isConfining.store(true, ordering: .releasing) }

    func reportStart(of machine: Machine, _ sandbox: Sandbox) { didStart.withLock { $0 }?(machine, sandbox) }

    /// Serves the requests that there are.
    func serve(_ flush: () -> Bool) {
        event.drain()
        let answers = flushes.withLock { flushes in
            defer { flushes = [] }
            return flushes
        }
        guard !answers.isEmpty else { return }
        let isDone = flush()
        for answer in answers { answer(isDone) }
    }
}

// SPDX-License-Identifier: Apache-2.0

public import Linux
internal import Synchronization

/// The part of a device that runs on its own thread and owns the queues and the back-end.
///
/// All methods are called on the I/O thread of a ``DeviceWorker``, so the state needs neither locks nor references. The
/// worker has the queues' doorbells in the epoll instance; an engine adds the descriptors of its back-end with tokens
/// from ``DeviceWorkerToken/firstOfEngine`` on and may add, change and remove them at any time.
///
/// An engine does not hold its device or its worker, whose end waits for the engine's. It takes a bounded number of
/// chains in a call; when there are more, it signals the queue's doorbell itself (``Activation/doorbells``) and
/// returns, so that resets and the back-end get their turn however fast the driver is.
public protocol DeviceEngine: ~Copyable, SendableMetatype {
    /// The queue that was worked on last: what a method throws is about it.
    var queueAtWork: Int { get }
    /// The driver is ready: make the queues (``Activation/makeQueue(_:)``) and begin.
    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError)
    /// A queue's doorbell was signalled, or may have been: called once for each ready queue after it starts. One that
    /// was signalled together with the order to stop its queue may come after it.
    mutating func notified(queue: Int, epoll: borrowing Epoll) throws(VirtqueueError)
    /// A descriptor of the back-end is ready. Also called while not active, if the engine left it watched.
    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError)
    /// Completes or cancels what is in flight and releases all queues; returns when guest RAM is not accessed any more.
    ///
    /// Also called when a method has thrown, with the queues as the error left them. Harmless when not active.
    mutating func reset(epoll: borrowing Epoll)
    /// The same for one queue.
    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll)
    /// One queue, stopped before, starts again with a new configuration.
    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError)

    /// The machine pauses: takes nothing more from the queues, and no input, until ``resume(epoll:)`` or
    /// ``reset(epoll:)``. What is in flight continues to its end and is shown to the driver; queues keep their indices.
    /// Doorbells and the back-end are served until ``isQuiet``.
    mutating func pause(epoll: borrowing Epoll)
    /// Indicates whether nothing is in flight in a pause, so that guest RAM is not touched any more.
    var isQuiet: Bool { get }
    /// The pause is over. ``notified(queue:epoll:)`` follows for each ready queue.
    mutating func resume(epoll: borrowing Epoll)

    /// Takes a request of the device's own kind, from ``DeviceWorker/perform(_:)``; it may be completed later.
    mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll)
}

extension DeviceEngine where Self: ~Copyable {
    public mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll) {}
}

/// What a device asks of its engine besides the operations of all devices.
public protocol DeviceRequest: Sendable {}

/// Tokens in the epoll instance of a ``DeviceWorker``.
public enum DeviceWorkerToken {
    /// Doorbells have their queue's number; this is the worker's own.
    static let control: UInt64 = 1 << 32
    /// The first that an engine may use.
    public static let firstOfEngine: UInt64 = 1 << 33
}

/// A device's I/O thread: an epoll loop over the doorbells, the back-end and a mailbox.
///
/// State has one owner. A thread that changes a running device posts a request and waits for the reply, so a reset is
/// complete when it returns. A driver that breaks the rules (an engine's method throws) gets its device marked
/// NEEDS_RESET, and the engine is reset immediately; only ``reset()`` makes it usable again.
public final class DeviceWorker: Sendable {
    private let mailbox: Mailbox
    private let state: Guarded<State>

    private struct State: ~Copyable {
        /// What the thread does, until it is started.
        var body: (@Sendable () -> Void)?
        /// Joined when the worker goes.
        var thread: Thread?
    }

    /// Makes all that the thread needs of the host; ``start()`` starts it.
    /// - Parameters:
    ///   - name: the thread's name, at most 15 bytes of it.
    ///   - engine: moves to the thread and is destroyed there when the worker goes.
    ///   - events: gets the rules that the driver breaks.
    public init<Engine: DeviceEngine & ~Copyable>(
        name: String, engine: consuming sending Engine, events: DeviceEvents = .none
    ) throws(SystemCallError) {
        let mailbox = try Mailbox()
        let epoll = Handover(try Epoll())
        try epoll.value.withLock { (held) throws(SystemCallError) in
            try held?.add(mailbox.wakeup.rawValue, .input, token: DeviceWorkerToken.control)
        }
        let engine = Handover(engine)
        self.name = name
        self.mailbox = mailbox
        state = Guarded(
            State(body: {
                guard let epoll = epoll.take(), let engine = engine.take() else { return mailbox.close() }
                var loop = Loop(engine: engine, epoll: epoll, mailbox: mailbox, events: events)
                loop.run()
                mailbox.close()
            }))
    }

    private let name: String

    /// Starts the thread. Until then all requests are without effect. Harmless when it was started.
    /// - Parameter first: what the thread does before anything else.
    public func start(first: @escaping @Sendable () -> Void = {}) throws(SystemCallError) {
        try state.withLock { (state) throws(SystemCallError) in
            guard let body = state.body else { return }
            state.thread = try Thread.start(name: name) {
                first()
                body()
            }
            state.body = nil
            mailbox.open()
        }
    }

    deinit {
        mailbox.send(.stop)
    }

    /// Begins to serve; returns when the engine has begun.
    public func activate(_ activation: Activation) { mailbox.send(.activate(activation)) }
    /// Returns when nothing is in flight. Harmless when not active.
    public func reset() { mailbox.send(.reset) }
    /// Returns when nothing of this queue is in flight.
    public func stopQueue(_ index: Int) { mailbox.send(.stopQueue(index)) }
    /// Returns when the engine has taken the queue.
    public func startQueue(_ configuration: QueueConfiguration) { mailbox.send(.startQueue(configuration)) }

    /// Begins a pause, also of a device that is not active; returns immediately. A reset ends it.
    /// - Parameter onQuiet: called once on the I/O thread, when what was in flight has ended and doorbells are not
    ///   watched any more; also when a reset has ended the pause before. It must not wait.
    public func pause(onQuiet: @escaping @Sendable () -> Void) { mailbox.send(.pause(onQuiet)) }
    /// Ends a pause; returns when the engine works again. Harmless when there is none.
    public func resume() { mailbox.send(.resume) }
    /// Gives the engine a request; returns when it has taken it.
    public func perform(_ request: any DeviceRequest) { mailbox.send(.perform(request)) }
}

/// Passes one value with one owner to the thread that takes it.
private final class Handover<Value: ~Copyable>: Sendable {
    let value: Guarded<Value?>
    init(_ value: consuming sending Value) { self.value = Guarded(consume value) }
    func take() -> sending Value? { value.withLock { $0.take() } }
}

/// One request at a time, and the answer that it is done.
private final class Mailbox: Sendable {
    enum Request: Sendable {
        case activate(Activation)
        case reset
        case stopQueue(Int)
        case startQueue(QueueConfiguration)
        case pause(@Sendable () -> Void)
        case resume
        case perform(any DeviceRequest)
        case stop
    }

    /// Readable when there is a request.
    let wakeup: EventFD
    private let answer: EventFD
    private let senders = Guarded(())
    private let request = Guarded<Request?>(nil)
    private let isClosed = Atomic<Bool>(true)

    init() throws(SystemCallError) {
        wakeup = try EventFD()
        answer = try EventFD()
    }

    /// There is a thread that serves the mailbox.
    func open() { isClosed.store(false, ordering: .releasing) }

    /// Leaves a request and waits until it is done.
    func send(_ new: Request) {
        senders.withLock { _ in
            guard !isClosed.load(ordering: .acquiring) else { return }
            request.withLock { $0 = new }
            wakeup.signal()
            answer.wait()
        }
    }

    /// The request, or nil for a wakeup without one.
    func take() -> Request? {
        wakeup.drain()
        return request.withLock { $0.take() }
    }

    /// The request that was taken is done.
    func complete() { answer.signal() }

    /// The mailbox is not served any more: threads that wait continue, and later calls do not wait.
    func close() {
        isClosed.store(true, ordering: .releasing)
        answer.signal()
    }
}

/// The I/O thread's state.
private struct Loop<Engine: DeviceEngine & ~Copyable>: ~Copyable {
    var engine: Engine
    let epoll: Epoll
    let mailbox: Mailbox
    let events: DeviceEvents
    /// What the driver has activated, until its reset, or until it broke the rules.
    var activation: Activation?
    var isStopping = false
    /// Queues whose doorbells are watched, or will be again after a pause.
    private var served: Set<Int> = []
    private var isPaused = false
    /// During a pause, until the engine is quiescent: the callback that waits for it.
    private var onQuiet: (@Sendable () -> Void)?

    init(engine: consuming Engine, epoll: consuming Epoll, mailbox: Mailbox, events: DeviceEvents) {
        self.engine = engine
        self.epoll = epoll
        self.mailbox = mailbox
        self.events = events
    }

    mutating func run() {
        var ready = ReadyEvents()
        // Waiting fails only for a bad descriptor, which this is not; a loop that cannot wait has to end.
        while !isStopping, (try? epoll.wait { ready.append($0, $1) }) != nil {
            for index in 0..<ready.count { handle(ready[index].token, ready[index].events) }
            if onQuiet != nil { checkQuiet() }
            ready.removeAll()
        }
        end()
    }

    private mutating func handle(_ token: UInt64, _ events: Epoll.Events) {
        do throws(VirtqueueError) {
            switch token {
            case DeviceWorkerToken.control:
                if let request = mailbox.take() {
                    try serve(request)
                    mailbox.complete()
                }
            case DeviceWorkerToken.firstOfEngine...:
                try engine.ready(token: token, events: events, epoll: epoll)
            default:
                try serveDoorbell(of: Int(truncatingIfNeeded: token))
            }
        } catch {
            let queue = engine.queueAtWork
            self.events.report(
                .brokenRule(queue: queue), .warning,
                "the driver broke a rule in queue \(queue): \(error); the device does nothing until the driver resets it"
            )
            fail()
            if token == DeviceWorkerToken.control { mailbox.complete() }
        }
    }

    private mutating func serve(_ request: Mailbox.Request) throws(VirtqueueError) {
        switch request {
        case .activate(let new):
            end()
            activation = new
            try engine.activate(new, epoll: epoll)
            for queue in new.queues where queue.isReady { try begin(queue.index, new) }
        case .reset:
            end()
        case .stopQueue(let index):
            guard let activation else { return }
            ignore(index, activation)
            engine.stopQueue(index, epoll: epoll)
        case .startQueue(let configuration):
            guard let activation else { return }
            try engine.startQueue(configuration, of: activation, epoll: epoll)
            try begin(configuration.index, activation)
        case .pause(let onQuiet):
            self.onQuiet?()
            self.onQuiet = onQuiet
            guard !isPaused else { return }
            isPaused = true
            engine.pause(epoll: epoll)
        case .resume:
            try resume()
        case .perform(let request):
            engine.perform(request, epoll: epoll)
        case .stop:
            isStopping = true
        }
    }

    /// The engine was paused: its end of what was in flight is reported once.
    private mutating func checkQuiet() {
        guard isPaused, engine.isQuiet else { return }
        if let activation {
            for index in served where activation.doorbells.indices.contains(index) {
                epoll.remove(activation.doorbells[index].event.rawValue)
            }
        }
        onQuiet?()
        onQuiet = nil
    }

    private mutating func resume() throws(VirtqueueError) {
        guard isPaused else { return }
        endPause()
        engine.resume(epoll: epoll)
        guard let activation else { return }
        for index in served.sorted() {
            ignore(index, activation)
            try begin(index, activation)
        }
    }

    private mutating func endPause() {
        isPaused = false
        onQuiet?()
        onQuiet = nil
    }

    /// A queue's doorbell was signalled, unless a reset came between the event and now.
    private mutating func serveDoorbell(of index: Int) throws(VirtqueueError) {
        guard let activation, activation.doorbells.indices.contains(index) else { return }
        activation.counters.kicks.add(activation.doorbells[index].event.drain())
        try engine.notified(queue: index, epoll: epoll)
    }

    /// Waits for a queue's doorbell from now on, and processes the queue once: the driver may have filled it before it
    /// was ready.
    private mutating func begin(_ index: Int, _ activation: Activation) throws(VirtqueueError) {
        // A queue before this one may have ended it all.
        guard self.activation != nil, activation.doorbells.indices.contains(index) else { return }
        // The doorbell is an eventfd of our own, not watched yet: this fails only for lack of kernel memory.
        guard (try? epoll.add(activation.doorbells[index].event.rawValue, .input, token: UInt64(index))) != nil else {
            events.report(
                .needsReset, .error,
                "the host has no memory to wait for queue \(index); the device does nothing until the driver resets it")
            return fail()
        }
        served.insert(index)
        try engine.notified(queue: index, epoll: epoll)
    }

    private mutating func ignore(_ index: Int, _ activation: Activation) {
        guard activation.doorbells.indices.contains(index) else { return }
        served.remove(index)
        epoll.remove(activation.doorbells[index].event.rawValue)
    }

    /// The driver broke the rules.
    private mutating func fail() {
        activation?.counters.errors.add()
        activation?.interrupts.configuration.markNeedsReset()
        end()
    }

    private mutating func end() {
        guard let activation else { return endPauseOfIdleEngine() }
        for index in activation.doorbells.indices { ignore(index, activation) }
        engine.reset(epoll: epoll)
        self.activation = nil
        endPause()
    }

    /// A reset ends a pause also where no driver is active.
    private mutating func endPauseOfIdleEngine() {
        guard isPaused else { return }
        endPause()
        engine.resume(epoll: epoll)
    }
}

/// What one wait has brought, kept on the stack until it is handled: engines change the epoll instance meanwhile.
private struct ReadyEvents {
    private var events: InlineArray<16, (token: UInt64, events: Epoll.Events)> = .init(repeating: (0, []))
    private(set) var count = 0

    mutating func append(_ token: UInt64, _ ready: Epoll.Events) {
        guard count < events.count else { return }
        events[count] = (token, ready)
        count += 1
    }

    subscript(index: Int) -> (token: UInt64, events: Epoll.Events) { events[index] }

    mutating func removeAll() { count = 0 }
}

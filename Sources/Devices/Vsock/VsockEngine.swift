// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Virtio

/// The I/O thread of a ``VsockDevice``: the owner of its queues and connections.
struct VsockEngine: DeviceEngine, ~Copyable, @unchecked Sendable {
    // Moves to its thread as a whole and stays there, the queues with it: hence `Sendable`.

    /// Queues (virtio 1.2 §5.10.2).
    enum Queue {
        static let receive = 0
        static let transmit = 1
        static let event = 2
    }

    /// Connections have the tokens below these, by 32 bits of their own.
    private enum Token {
        static let listener = DeviceWorkerToken.firstOfEngine | 1 << 34
        /// There is more to be moved than was in one go.
        static let again = DeviceWorkerToken.firstOfEngine | 2 << 34
        static let timer = DeviceWorkerToken.firstOfEngine | 3 << 34
    }

    /// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7): all connections are gone, and the CID may be another one.
    private static let transportReset: UInt32 = 0
    /// Clients that are accepted in one turn.
    private static let acceptBudget = 16

    private let listener: FileDescriptor
    private let again: EventFD
    private let timer: TimerFD
    private let eventBuffers: IOVectorPool
    private let counters: VsockCounters
    private let events: DeviceEvents
    private var connections: VsockConnections
    private var receive: VsockReceivePath
    private var transmit: VsockTransmitPath
    private var eventQueue: Virtqueue?
    private var activation: Activation?
    private(set) var queueAtWork = Queue.receive
    private var isPaused = false
    /// Packets of the guest wait until their answers have room.
    private var isTransmitBlocked = false
    /// The event that the driver has not got yet.
    private var owesTransportReset = false
    private var isListening = false
    /// The host had no descriptor or memory for a client; the timer ends that.
    private var isAcceptDelayed = false
    private var isTimerRunning = false
    /// Packets are moved within one call. Sockets that become ready in a pause are only noted.
    let isQuiet = true

    /// - Parameter listener: a listening UNIX socket that does not block.
    init(
        guestCID: UInt64, path: String, listener: consuming FileDescriptor, queueSizes: [UInt16],
        counters: VsockCounters, events: DeviceEvents
    ) throws(SystemCallError) {
        let again = try EventFD()
        let timer = try TimerFD()
        let connections = try VsockConnections(guestCID: guestCID, path: path, counters: counters, events: events)
        self.listener = listener
        self.again = again
        self.timer = timer
        self.connections = connections
        self.counters = counters
        self.events = events
        eventBuffers = IOVectorPool(slots: 1, capacity: Int(queueSizes[Queue.event]))
        receive = VsockReceivePath(counters: counters)
        transmit = VsockTransmitPath(
            queueSize: queueSizes[Queue.transmit], counters: counters, events: events)
    }

    // MARK: Life

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        self.activation = activation
        // Fails only for lack of kernel memory; a long queue could stall without.
        do throws(SystemCallError) {
            try epoll.add(again.rawValue, .input, token: Token.again)
            try epoll.add(timer.rawValue, .input, token: Token.timer)
        } catch { return fail(error) }
        for queue in [Queue.receive, Queue.transmit, Queue.event] {
            queueAtWork = queue
            start(queue, try activation.makeQueue(queue), activation)
        }
        listen(epoll)
    }

    private mutating func start(_ index: Int, _ queue: consuming Virtqueue?, _ activation: Activation) {
        let interrupts = activation.interrupts.queues
        switch index {
        case Queue.receive: receive.start(queue, interrupts[index])
        case Queue.transmit: transmit.start(queue, interrupts[index])
        default: eventQueue = queue
        }
    }

    mutating func reset(epoll: borrowing Epoll) {
        connections.removeAll()
        receive.stop()
        transmit.stop()
        eventQueue = nil
        activation = nil
        isPaused = false
        isTransmitBlocked = false
        // The next driver begins with no connections.
        owesTransportReset = false
        for descriptor in [again.rawValue, timer.rawValue] { epoll.remove(descriptor) }
        isTimerRunning = false
        isAcceptDelayed = false
        listen(epoll)
    }

    mutating func pause(epoll: borrowing Epoll) {
        isPaused = true
        listen(epoll)
    }

    mutating func resume(epoll: borrowing Epoll) {
        isPaused = false
        listen(epoll)
    }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) {
        switch index {
        case Queue.receive: receive.stop()
        case Queue.transmit: transmit.stop()
        default: eventQueue = nil
        }
    }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        queueAtWork = configuration.index
        start(
            configuration.index,
            try Virtqueue(configuration, features: activation.features, ram: activation.ram), activation)
    }

    mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll) {
        guard request is VsockTransportReset, let activation else { return }
        connections.removeAll()
        owesTransportReset = true
        isTransmitBlocked = false
        listen(epoll)
        // The queue is served where an error of the driver's can be reported; in a pause, afterwards.
        activation.doorbells[Queue.event].event.signal()
    }

    // MARK: Work

    mutating func notified(queue: Int, epoll: borrowing Epoll) throws(VirtqueueError) {
        guard !isPaused else { return }
        switch queue {
        case Queue.receive: try moveIn(epoll)
        case Queue.transmit: try moveOut(epoll)
        default: try serveEvents()
        }
        listen(epoll)
    }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        switch token {
        case Token.listener: accept(epoll)
        case Token.again: again.drain()
        case Token.timer:
            guard timer.take() else { return }
            isTimerRunning = false
            isAcceptDelayed = false
            connections.retry(epoll)
        default: connections.ready(token: token & 0xffff_ffff, events, epoll)
        }
        if activation != nil, !isPaused {
            if token == Token.again { try moveOut(epoll) } else { try moveIn(epoll) }
        }
        listen(epoll)
    }

    /// Gives the guest what there is for it.
    private mutating func moveIn(_ epoll: borrowing Epoll) throws(VirtqueueError) {
        guard let activation, connections.hasPackets else { return }
        queueAtWork = Queue.receive
        if try receive.run(&connections, activation) == .paused { again.signal() }
        // There may be room for answers.
        if isTransmitBlocked, connections.hasRoomForResets { again.signal() }
    }

    /// Takes what the guest sends, then gives it the answers.
    private mutating func moveOut(_ epoll: borrowing Epoll) throws(VirtqueueError) {
        guard let activation else { return }
        queueAtWork = Queue.transmit
        isTransmitBlocked = false
        switch try transmit.run(&connections, activation, epoll) {
        case .drained: break
        case .blocked: isTransmitBlocked = true
        case .paused: again.signal()
        }
        try moveIn(epoll)
    }

    private mutating func serveEvents() throws(VirtqueueError) {
        queueAtWork = Queue.event
        guard owesTransportReset, var queue = eventQueue.take() else { return }
        repeat {
            queue.disableNotifications()
            // A buffer without room for an event comes back unused.
            while owesTransportReset, let chain = try queue.pop(into: eventBuffers[0]) {
                let isStored = chain.writable.byteCount >= 4 && chain.writable.store(Self.transportReset)
                queue.push(chain.head, written: isStored ? 4 : 0)
                if isStored { owesTransportReset = false } else { counters.badReceiveBuffers.add() }
            }
        } while owesTransportReset && queue.enableNotifications()
        if queue.publish() { activation?.interrupts.queues[Queue.event].signal() }
        eventQueue = consume queue
    }

    // MARK: The host's side

    /// Waits for clients while there is a driver and room for them, and for the timer while something needs it.
    private mutating func listen(_ epoll: borrowing Epoll) {
        let wanted = activation != nil && !isPaused && !isAcceptDelayed && connections.hasRoom
        if wanted != isListening {
            if wanted {
                do throws(SystemCallError) {
                    try epoll.add(listener.rawValue, .input, token: Token.listener)
                    isListening = true
                } catch { fail(error) }
            } else {
                epoll.remove(listener.rawValue)
                isListening = false
            }
        }
        if !isTimerRunning, isAcceptDelayed || connections.isConnecting {
            timer.start(milliseconds: VsockConnections.retryPeriod)
            isTimerRunning = true
        }
    }

    private mutating func accept(_ epoll: borrowing Epoll) {
        guard isListening else { return }
        for _ in 0..<Self.acceptBudget where connections.hasRoom {
            let socket = clinux_accept_nonblocking(listener.rawValue)
            if socket >= 0 {
                connections.add(socket, epoll)
                continue
            }
            let error = errno
            if [EAGAIN, EINTR, ECONNABORTED].contains(error) { return }
            // It stays in the backlog.
            isAcceptDelayed = true
            return events.report(
                .hostError(operation: 3, errno: error), .warning,
                "a client waits: \(SystemCallError("accept", errno: error))")
        }
    }

    /// epoll has no memory: nothing would wake the device again.
    private func fail(_ error: SystemCallError) {
        events.report(.needsReset, .error, "\(error); the device does nothing until the driver resets it")
        activation?.interrupts.configuration.markNeedsReset()
    }
}

/// All connections are gone, as after a snapshot.
struct VsockTransportReset: DeviceRequest {}

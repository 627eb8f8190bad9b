// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Virtio

/// The virtio console's I/O thread: the owner of its queues.
struct ConsoleEngine: DeviceEngine, ~Copyable, @unchecked Sendable {
    // Moves to its thread as a whole and stays there, the queues with it: hence `Sendable`.

    /// Offers what waits to the sink once more, and then what the driver's buffers still have.
    struct Flush: DeviceRequest {}

    private enum Token {
        static let input = DeviceWorkerToken.firstOfEngine, interrupt = input + 1, attention = input + 2
    }

    private enum Queue { static let receive = 0, transmit = 1 }

    /// Chains, and bytes, of a queue in one run; the rest waits for the next turn.
    private static let budget = (chains: 64, bytes: 256 << 10)

    /// How long the interrupt of the transmit queue is delayed, in microseconds.
    ///
    /// Linux waits for each buffer of its console by polling the ring, and then gets an interrupt that finds nothing.
    /// After 100,000 of those it disables the line ("nobody cared"), and with virtio-mmio the input's interrupts
    /// too. So an interrupt comes only if the driver has not taken its buffers by then.
    private static let interruptDelay: UInt32 = 500

    /// A driver's output of which the line has not taken all.
    private struct Held {
        let chain: DescriptorChain
        var done: UInt64 = 0
    }

    private let line: ConsoleLine
    private let lists: IOVectorPool
    /// Guest memory is copied here on its way out, since the guest may change it meanwhile.
    private var buffer = [UInt8](repeating: 0, count: 4096)
    private let events: DeviceEvents
    private let interruptTimer: TimerFD
    /// The transmit queue's interrupt waits for the timer.
    private var isInterruptDelayed = false
    private let attentionTimer: TimerFD
    /// Milliseconds.
    private let inputDelay: Int
    /// The driver has printed something, or had the time to begin.
    private var isAttended = false

    private(set) var queueAtWork = 0
    private var receive: Virtqueue?
    private var transmit: Virtqueue?
    private var held: Held?
    private var activation: Activation?
    private var isPaused = false
    /// Guest memory is accessed within a call only. What a held chain still has is neither taken nor lost in a pause.
    let isQuiet = true

    init(_ line: ConsoleLine, queueSize: UInt16, inputDelay: Int, events: DeviceEvents) throws(SystemCallError) {
        self.inputDelay = inputDelay
        // Both, or no engine.
        let interruptTimer = try TimerFD()
        let attentionTimer = try TimerFD()
        self.interruptTimer = interruptTimer
        self.attentionTimer = attentionTimer
        self.line = line
        self.events = events
        lists = IOVectorPool(slots: 2, capacity: Int(queueSize))
    }

    // MARK: Life

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        self.activation = activation
        queueAtWork = Queue.receive
        receive = try activation.makeQueue(Queue.receive)
        queueAtWork = Queue.transmit
        transmit = try activation.makeQueue(Queue.transmit)
        // Fails only for lack of kernel memory.
        do throws(SystemCallError) {
            try epoll.add(line.arrival.rawValue, .input, token: Token.input)
            try epoll.add(interruptTimer.rawValue, .input, token: Token.interrupt)
            try epoll.add(attentionTimer.rawValue, .input, token: Token.attention)
            attentionTimer.start(milliseconds: inputDelay)
        } catch {
            events.report(.needsReset, .error, "\(error); the device does nothing until the driver resets it")
            activation.interrupts.configuration.markNeedsReset()
        }
    }

    mutating func reset(epoll: borrowing Epoll) {
        epoll.remove(line.arrival.rawValue)
        epoll.remove(interruptTimer.rawValue)
        epoll.remove(attentionTimer.rawValue)
        isAttended = false
        isInterruptDelayed = false
        keepHeldOutput()
        receive = nil
        transmit = nil
        activation = nil
        isPaused = false
    }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) {
        if index == Queue.receive { return receive = nil }
        keepHeldOutput()
        isInterruptDelayed = false
        transmit = nil
    }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        queueAtWork = configuration.index
        let queue = try Virtqueue(configuration, features: activation.features, ram: activation.ram)
        if configuration.index == Queue.receive { receive = consume queue } else { transmit = consume queue }
    }

    mutating func pause(epoll: borrowing Epoll) {
        endInterruptDelay()
        isPaused = true
    }

    mutating func resume(epoll: borrowing Epoll) { isPaused = false }

    // MARK: Work

    mutating func notified(queue index: Int, epoll: borrowing Epoll) throws(VirtqueueError) {
        if index == Queue.receive { try giveInput() } else { try takeOutput() }
    }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        switch token {
        // One that runs for a delay which has ended finds nothing to do.
        case Token.interrupt: if interruptTimer.take() { endInterruptDelay() }
        case Token.attention: if attentionTimer.take() { try attend() }
        default:
            line.arrival.drain()
            try giveInput()
        }
    }

    /// From now on the driver gets input.
    private mutating func attend() throws(VirtqueueError) {
        guard !isAttended else { return }
        isAttended = true
        try giveInput()
    }

    private mutating func delayInterrupt() {
        guard !isInterruptDelayed else { return }
        isInterruptDelayed = true
        interruptTimer.start(microseconds: Self.interruptDelay)
    }

    /// Signals the interrupt that was delayed, unless the driver has found its buffers without it.
    private mutating func endInterruptDelay() {
        guard isInterruptDelayed else { return }
        isInterruptDelayed = false
        if transmit?.hasDriverSeenAll == false { activation?.interrupts.queues[Queue.transmit].signal() }
    }

    mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll) {
        // The doorbell brings the thread to the held chain: a rule that the driver breaks is reported there.
        guard line.flush(), held != nil else { return }
        activation?.doorbells[Queue.transmit].event.signal()
    }

    /// Fills the driver's buffers with input, as far as there are both.
    private mutating func giveInput() throws(VirtqueueError) {
        guard !isPaused, isAttended else { return }
        queueAtWork = Queue.receive
        var chains = Self.budget.chains
        repeat {
            receive?.disableNotifications()
            while chains > 0, line.hasInput, let chain = try receive?.pop(into: lists[0]) {
                let count = line.moveInput(to: chain.writable)
                receive?.push(chain.head, written: UInt32(clamping: count))
                line.counters.received.add(UInt64(count))
                activation?.counters.requests.add()
                // A buffer without a writable byte.
                if count == 0 { activation?.counters.errors.add() }
                chains -= 1
            }
            if receive?.publish() == true { activation?.interrupts.queues[Queue.receive].signal() }
            guard line.hasInput else { return }
            if chains == 0 { return activation?.doorbells[Queue.receive].event.signal() ?? () }
        } while receive?.enableNotifications() == true
    }

    /// Takes the driver's output, as far as the line does.
    private mutating func takeOutput() throws(VirtqueueError) {
        queueAtWork = Queue.transmit
        guard !isPaused else { return }
        var chains = Self.budget.chains, bytes = Self.budget.bytes
        repeat {
            transmit?.disableNotifications()
            while chains > 0, bytes > 0 {
                if held == nil {
                    guard let chain = try transmit?.pop(into: lists[1]) else { break }
                    held = Held(chain: chain)
                }
                bytes -= sendHeld(atMost: bytes)
                guard let chain = held?.chain, held?.done == chain.readable.byteCount else { break }
                held = nil
                transmit?.push(chain.head, written: 0)
                activation?.counters.requests.add()
                chains -= 1
            }
            if transmit?.publish() == true { delayInterrupt() }
            if chains == 0 || bytes <= 0 { return activation?.doorbells[Queue.transmit].event.signal() ?? () }
            // The line is full: a flush goes on.
            if held != nil { return }
        } while transmit?.enableNotifications() == true
        if chains < Self.budget.chains { try attend() }
    }

    /// Sends what the held chain still has, as far as the line takes it.
    /// - Returns: how many bytes.
    private mutating func sendHeld(atMost limit: Int) -> Int {
        var sent = 0
        while let current = held, sent < limit {
            let count = unsafe buffer.withUnsafeMutableBytes {
                unsafe current.chain.readable.copy(at: current.done, to: $0)
            }
            guard count > 0 else { break }
            let taken = line.send(buffer.span.extracting(first: count))
            held?.done += UInt64(taken)
            sent += taken
            line.counters.sent.add(UInt64(taken))
            if taken < count { break }
        }
        return sent
    }

    /// The queue ends: what its last chain has goes to the line, as far as that has room.
    private mutating func keepHeldOutput() {
        _ = sendHeld(atMost: ConsoleLine.outputCapacity)
        held = nil
    }
}

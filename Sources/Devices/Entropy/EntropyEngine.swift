// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux
internal import Virtio

/// The entropy device's I/O thread: the owner of its queue.
struct EntropyEngine: DeviceEngine, ~Copyable, @unchecked Sendable {
    // Moves to its thread as a whole and stays there, the queue with it: hence `Sendable`.

    private enum Token {
        /// A new period has begun.
        static let period = DeviceWorkerToken.firstOfEngine
    }

    /// Bytes for one request: §5.4.6.2 lets a device give less than was requested.
    static let largestAnswer: UInt64 = 64 << 10
    /// Requests, and bytes, in one run; the rest waits for the next turn.
    private static let budget = (requests: 64, bytes: 1 << 20 as UInt64)

    private let buffers: IOVectorPool
    private let limit: EntropyLimit?
    private let timer: TimerFD
    /// What is left of this period's bytes. A reset leaves it: a driver gets no more by starting over.
    private var left: UInt64
    private var isPeriodRunning = false
    private var isPaused = false
    /// A request is served within one call.
    let isQuiet = true

    let queueAtWork = 0
    private var queue: Virtqueue?
    private let events: DeviceEvents
    private var activation: Activation?
    private var interrupt: QueueInterrupt?

    init(queueSize: UInt16, limit: EntropyLimit?, events: DeviceEvents) throws(SystemCallError) {
        self.events = events
        timer = try TimerFD()
        buffers = IOVectorPool(slots: 1, capacity: Int(queueSize))
        self.limit = limit
        left = limit?.bytes ?? .max
    }

    // MARK: Life

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        self.activation = activation
        interrupt = activation.interrupts.queues[0]
        queue = try activation.makeQueue(0)
        // Fails only for lack of kernel memory; a limited device would stay at its limit.
        do throws(SystemCallError) { try epoll.add(timer.rawValue, .input, token: Token.period) } catch {
            events.report(.needsReset, .error, "\(error); the device does nothing until the driver resets it")
            activation.interrupts.configuration.markNeedsReset()
        }
    }

    mutating func reset(epoll: borrowing Epoll) {
        epoll.remove(timer.rawValue)
        queue = nil
        activation = nil
        interrupt = nil
        isPaused = false
    }

    mutating func pause(epoll: borrowing Epoll) { isPaused = true }

    mutating func resume(epoll: borrowing Epoll) { isPaused = false }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) { queue = nil }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        queue = try Virtqueue(configuration, features: activation.features, ram: activation.ram)
    }

    // MARK: Work

    mutating func notified(queue index: Int, epoll: borrowing Epoll) throws(VirtqueueError) { try serve() }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        guard timer.take() else { return }
        isPeriodRunning = false
        left = limit?.bytes ?? .max
        try serve()
    }

    /// Fills what the driver has offered, as far as this run and this period reach.
    private mutating func serve() throws(VirtqueueError) {
        guard !isPaused else { return }
        var requests = Self.budget.requests, bytes = Self.budget.bytes
        repeat {
            queue?.disableNotifications()
            while requests > 0, bytes > 0, left > 0, let chain = try queue?.pop(into: buffers[0]) {
                let count = fill(chain.writable)
                queue?.push(chain.head, written: UInt32(clamping: count))
                requests -= 1
                bytes -= min(count, bytes)
            }
            if queue?.publish() == true { interrupt?.signal() }
            // The rest waits for the next period; a kick until then finds nothing to be done.
            if left == 0 { return }
            if requests == 0 || bytes == 0 { return activation?.doorbells.first?.event.signal() ?? () }
        } while queue?.enableNotifications() == true
    }

    /// Puts random bytes into a request's buffers; returns how many.
    private mutating func fill(_ buffers: IOVectors) -> UInt64 {
        let wanted = min(buffers.byteCount, Self.largestAnswer, left)
        var done: UInt64 = 0
        for index in 0..<buffers.count where done < wanted {
            // Checked guest RAM; the kernel writes into it, and returns an error if it cannot.
            let buffer = unsafe buffers.base[index]
            let length = unsafe min(UInt64(buffer.iov_len), wanted - done)
            let count = unsafe getrandom(buffer.iov_base, Int(length), 0)
            guard count > 0 else { break }
            done += UInt64(count)
            // Interrupted half-way: what is there is enough.
            if count < length { break }
        }
        activation?.counters.requests.add()
        // A request without a writable byte, or a failure to allocate a host page.
        if done == 0 { activation?.counters.errors.add() }
        if limit != nil, done > 0 {
            left -= done
            if !isPeriodRunning {
                timer.start(milliseconds: limit?.period ?? 1)
                isPeriodRunning = true
            }
        }
        return done
    }
}

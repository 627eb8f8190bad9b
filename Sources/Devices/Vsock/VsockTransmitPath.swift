// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Virtio

/// From the guest to sockets: each chain of the transmit queue is a header and its data (virtio 1.2 §5.10.6.1), which
/// goes to the socket straight from guest RAM.
struct VsockTransmitPath: ~Copyable {
    /// Why a run ended.
    enum Outcome {
        /// The driver has no more packets, and will kick when it adds one.
        case drained
        /// Answers wait for receive buffers.
        case blocked
        /// Enough for now; there may be more.
        case paused
    }

    /// Packets, and bytes, in one run; the rest waits for the next turn.
    private static let budget = (packets: 256, bytes: 4 << 20 as UInt64)

    private let pool: IOVectorPool
    private var queue: Virtqueue?
    private var interrupt: QueueInterrupt?
    private let counters: VsockCounters
    private let events: DeviceEvents

    init(queueSize: UInt16, counters: VsockCounters, events: DeviceEvents) {
        pool = IOVectorPool(slots: 1, capacity: Int(queueSize))
        self.counters = counters
        self.events = events
    }

    mutating func start(_ queue: consuming Virtqueue?, _ interrupt: QueueInterrupt) {
        self.queue = queue
        self.interrupt = interrupt
    }

    mutating func stop() { queue = nil }

    /// Takes packets until there are no more, or for a while.
    mutating func run(
        _ connections: inout VsockConnections, _ activation: Activation, _ epoll: borrowing Epoll
    ) throws(VirtqueueError) -> Outcome {
        guard var queue = self.queue.take() else { return .drained }
        let bad = counters.badPackets.value
        var budget = Self.budget
        var outcome: Outcome
        repeat {
            queue.disableNotifications()
            outcome = try move(&connections, &queue, &budget, epoll)
        } while outcome == .drained && queue.enableNotifications()
        let new = counters.badPackets.value - bad
        activation.counters.requests.add(UInt64(Self.budget.packets - budget.packets))
        if new > 0 {
            activation.counters.errors.add(new)
            events.report(
                .badPackets, .warning, count: new,
                "a packet of the guest broke a rule of its connection, or of the device, and was answered by a reset")
        }
        if queue.publish() { interrupt?.signal() }
        self.queue = consume queue
        return outcome
    }

    private mutating func move(
        _ connections: inout VsockConnections, _ queue: inout Virtqueue,
        _ budget: inout (packets: Int, bytes: UInt64), _ epoll: borrowing Epoll
    ) throws(VirtqueueError) -> Outcome {
        while budget.packets > 0, budget.bytes > 0 {
            guard connections.hasRoomForResets else { return .blocked }
            guard let chain = try queue.pop(into: pool[0]) else { return .drained }
            budget.packets -= 1
            budget.bytes -= min(budget.bytes, chain.readable.byteCount)
            var payload = chain.readable
            if let header = VsockHeader(from: payload), payload.removeFirst(VsockHeader.size) {
                if UInt64(header.length) <= payload.byteCount {
                    connections.take(header, payload, epoll)
                } else {
                    connections.takeMalformed(header)
                }
            } else {
                counters.badPackets.add()
            }
            queue.push(chain.head, written: 0)
        }
        return .paused
    }
}

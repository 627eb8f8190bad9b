// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Virtio

/// From sockets to the guest: packets in the buffers of the receive queue (virtio 1.2 §5.10.6.1). Data is read straight
/// into them, several buffers at a time.
struct VsockReceivePath: ~Copyable {
    /// Why a run ended.
    enum Outcome {
        /// There is nothing for the guest.
        case drained
        /// The driver has no more buffers, and will kick when it adds one.
        case starved
        /// Enough for now; there may be more.
        case paused
    }

    /// A buffer that a read may fill: a header, and data behind it.
    private struct Taken: BitwiseCopyable {
        var chain: DescriptorChain
        var room: UInt64
    }

    /// Buffers in one read of a connection, and bytes.
    static let maximumBatch = 64
    private static let maximumRead = 256 << 10
    /// Buffers in one run; the rest waits for the next turn.
    private static let budget = 256
    /// The kernel takes 1,024 iovecs (UIO_MAXIOV) in a call.
    private static let listSize = 1024

    /// The first list has the buffers as they are, the second those that data goes to.
    private let pool = IOVectorPool(slots: 2, capacity: Self.listSize)
    private var taken: [Taken] = []
    private var queue: Virtqueue?
    private var interrupt: QueueInterrupt?
    private let counters: VsockCounters

    init(counters: VsockCounters) {
        self.counters = counters
        taken.reserveCapacity(Self.maximumBatch)
    }

    mutating func start(_ queue: consuming Virtqueue?, _ interrupt: QueueInterrupt) {
        self.queue = queue
        self.interrupt = interrupt
    }

    mutating func stop() { queue = nil }

    /// Gives the guest what there is for it until there is no more, or no buffer, or for a while.
    mutating func run(
        _ connections: inout VsockConnections, _ activation: Activation
    ) throws(VirtqueueError) -> Outcome {
        guard var queue = self.queue.take() else { return .starved }
        var budget = Self.budget
        queue.disableNotifications()
        var outcome = try move(&connections, &queue, &budget)
        // Buffers that were added since the queue was last read come without a kick.
        while outcome == .starved, queue.enableNotifications() {
            queue.disableNotifications()
            outcome = try move(&connections, &queue, &budget)
        }
        // Before the driver sees the packets, so that no figure is behind what it knows.
        if budget < Self.budget { activation.counters.requests.add(UInt64(Self.budget - budget)) }
        if queue.publish() { interrupt?.signal() }
        self.queue = consume queue
        return outcome
    }

    private mutating func move(
        _ connections: inout VsockConnections, _ queue: inout Virtqueue, _ budget: inout Int
    ) throws(VirtqueueError) -> Outcome {
        while connections.hasPackets {
            guard budget > 0 else { return .paused }
            if let header = connections.nextHeader() {
                guard let buffer = try take(&queue, &budget, from: 0, room: 0) else {
                    return budget > 0 ? .starved : .paused
                }
                header.store(in: buffer.chain.writable)
                queue.push(buffer.chain.head, written: UInt32(VsockHeader.size))
                connections.headerSent(header)
            } else if try !moveData(&connections, &queue, &budget) {
                return budget > 0 ? .starved : .paused
            }
        }
        return .drained
    }

    /// Reads once for the connection whose data is next.
    /// - Returns: false when there is no buffer.
    private mutating func moveData(
        _ connections: inout VsockConnections, _ queue: inout Virtqueue, _ budget: inout Int
    ) throws(VirtqueueError) -> Bool {
        guard let reader = connections.nextReader else { return true }
        let limit = UInt64(min(reader.credit, Self.maximumRead))
        var total: UInt64 = 0, entries = 0, dataEntries = 0
        taken.removeAll(keepingCapacity: true)
        while taken.count < min(reader.buffers, Self.maximumBatch), total < limit,
            entries + Int(queue.size) <= Self.listSize
        {
            guard var buffer = try take(&queue, &budget, from: entries, room: 1) else { break }
            entries += buffer.chain.entries
            let added = pool[1].append(
                buffer.chain.writable, skipping: VsockHeader.size, limit: limit - total, at: dataEntries)
            dataEntries += added.entries
            buffer.room = added.bytes
            total += added.bytes
            taken.append(buffer)
        }
        guard !taken.isEmpty else { return false }
        let moved = VsockSocket.receive(reader.socket, pool[1].prefix(dataEntries))
        var rest: UInt64 = if case .bytes(let count) = moved { UInt64(count) } else { 0 }
        let isFull = rest == total
        var used = 0, bytes = rest
        while bytes > 0, used < taken.count {
            bytes -= min(bytes, taken[used].room)
            used += 1
        }
        // The last ones are the first of the next read.
        queue.rewind(UInt16(taken.count - used))
        budget += taken.count - used
        for index in 0..<used {
            let length = min(rest, taken[index].room)
            connections.dataHeader(reader.index, length: Int(length)).store(in: taken[index].chain.writable)
            queue.push(taken[index].chain.head, written: UInt32(VsockHeader.size + length))
            rest -= length
        }
        connections.didRead(reader.index, moved, used: used, isFull: isFull)
        return true
    }

    /// Takes the next buffer that is one; others are returned unused, and use up some of the budget as well.
    /// - Parameters:
    ///   - first: where its entries go in the list.
    ///   - room: bytes that it must have behind a header.
    private mutating func take(
        _ queue: inout Virtqueue, _ budget: inout Int, from first: Int, room: UInt64
    ) throws(VirtqueueError) -> Taken? {
        while budget > 0, let chain = try queue.pop(into: pool[0], from: first) {
            budget -= 1
            if chain.readable.isEmpty, chain.writable.byteCount >= VsockHeader.size + room {
                return Taken(chain: chain, room: chain.writable.byteCount - VsockHeader.size)
            }
            // Those before it in a batch may go back to the queue, so this one does, too.
            guard first == 0 else {
                queue.rewind()
                budget += 1
                return nil
            }
            queue.push(chain.head, written: 0)
            counters.badReceiveBuffers.add()
        }
        return nil
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import HostNetwork
internal import Virtio

/// The control queue (virtio 1.2 §5.1.6.5): each chain is a class, a command, its data, and a byte for the answer.
struct NetworkControl: ~Copyable {
    private enum Class {
        static let receiveMode: UInt8 = 0
        static let macAddress: UInt8 = 1
        static let multiqueue: UInt8 = 4
        static let guestOffloads: UInt8 = 5
        static let coalescing: UInt8 = 6
    }

    private enum Command {
        /// Of receiveMode: promiscuous, all multicast. Data: one byte, 0 or 1.
        static let receiveModes: ClosedRange<UInt8> = 0...1
        /// Of macAddress: the unicast and multicast addresses to be received.
        static let setTable: UInt8 = 0
        /// Of macAddress: the device's own. Data: six bytes.
        static let setAddress: UInt8 = 1
        /// Of multiqueue. Data: the number of pairs that the driver uses, 16 bits.
        static let setPairs: UInt8 = 0
        /// Of guestOffloads. Data: feature bits, 64 of them.
        static let setOffloads: UInt8 = 0
        /// Of coalescing (virtio 1.3 §5.1.6.5.11). Data: packets and microseconds, 32 bits each.
        static let setTransmit: UInt8 = 0
        static let setReceive: UInt8 = 1
        /// Data: a queue's number and a reserved field, 16 bits each, then as above.
        static let setQueue: UInt8 = 2
        /// Data: a queue's number, 16 bits, and perhaps the reserved field. Packets and microseconds are the result.
        static let getQueue: UInt8 = 3
    }

    private enum Answer {
        static let ok: UInt8 = 0
        static let error: UInt8 = 1
    }

    private let pool: IOVectorPool
    /// nil in a device with one pair.
    private let pairs: PairSwitch?
    private var queue: Virtqueue?
    private var interrupt: QueueInterrupt?

    init(queueSize: UInt16, pairs: PairSwitch?) {
        pool = IOVectorPool(slots: 1, capacity: Int(queueSize))
        self.pairs = pairs
    }

    mutating func start(_ queue: consuming Virtqueue?, _ interrupt: QueueInterrupt) {
        self.queue = queue
        self.interrupt = interrupt
    }

    mutating func stop() { queue = nil }

    /// Serves all commands, at most as many as the queue has descriptors.
    /// - Returns: whether there may be more.
    mutating func run(_ activation: Activation, _ port: NetworkPort) throws(VirtqueueError) -> Bool {
        guard var queue = self.queue.take() else { return false }
        var budget = queue.size
        while budget > 0, let chain = try queue.pop(into: pool[0]) {
            budget -= 1
            var readable = chain.readable
            var result: CoalescingParameters?
            var isServed = serve(&readable, port, activation.features, &result)
            var written: UInt32 = 1
            if let result {
                // Behind the answer.
                isServed =
                    chain.writable.store(result.packets, at: 1) && chain.writable.store(result.microseconds, at: 5)
                if isServed { written += 8 }
            }
            let hasAnswer = chain.writable.store(isServed ? Answer.ok : Answer.error)
            queue.push(chain.head, written: hasAnswer ? written : 0)
        }
        let mayHaveMore = queue.enableNotifications()
        if queue.publish() { interrupt?.signal() }
        self.queue = consume queue
        return mayHaveMore
    }

    /// - Parameter result: what the driver requested, if the command is a query.
    /// - Returns: whether the command succeeded.
    private func serve(
        _ data: inout IOVectors, _ port: NetworkPort, _ features: FeatureSet, _ result: inout CoalescingParameters?
    ) -> Bool {
        guard let kind = data.load(UInt8.self), let command = data.load(UInt8.self, at: 1), data.removeFirst(2) else {
            return false
        }
        switch (kind, command) {
        case (Class.receiveMode, Command.receiveModes) where features.contains(.controlReceiveMode):
            // All that comes through the TAP is received in any mode; a device may receive more than was requested
            // (§5.1.6.5.1).
            return data.byteCount == 1
        case (Class.macAddress, Command.setTable) where features.contains(.controlReceiveMode):
            return Self.isAddressTable(data)
        case (Class.macAddress, Command.setAddress) where features.contains(.controlMACAddress):
            guard data.byteCount == 6, let high = data.load(UInt32.self), let low = data.load(UInt16.self, at: 4) else {
                return false
            }
            let value = UInt64(high.byteSwapped) << 16 | UInt64(low.byteSwapped)
            guard let address = try? MACAddress(rawValue: value) else { return false }
            return port.setAddress(address)
        case (Class.multiqueue, Command.setPairs) where features.contains(.networkMultiqueue):
            guard data.byteCount == 2, let count = data.load(UInt16.self) else { return false }
            return pairs?.use(Int(count), port) == true
        case (Class.guestOffloads, Command.setOffloads) where features.contains(.controlGuestOffloads):
            guard data.byteCount == 8, let bits = data.load(UInt64.self) else { return false }
            let wanted = FeatureSet(rawValue: UInt128(bits))
            guard features.intersection(.guestOffloads).isSuperset(of: wanted) else { return false }
            return port.attachment.setOffloads(wanted.tapOffloads)
        case (Class.coalescing, Command.setTransmit) where features.contains(.typeCoalescing):
            guard data.byteCount == 8, let parameters = Self.parameters(data, at: 0) else { return false }
            port.setCoalescing(ofAll: QueueLayout.transmit(ofPair: 0), parameters)
            return true
        case (Class.coalescing, Command.setReceive) where features.contains(.typeCoalescing):
            guard data.byteCount == 8, let parameters = Self.parameters(data, at: 0) else { return false }
            port.setCoalescing(ofAll: QueueLayout.receive(ofPair: 0), parameters)
            return true
        case (Class.coalescing, Command.setQueue) where features.contains(.queueCoalescing):
            guard data.byteCount == 12, let queue = Self.dataQueue(data, port, features),
                let parameters = Self.parameters(data, at: 4)
            else { return false }
            port.coalescing[queue].parameters = parameters
            return true
        case (Class.coalescing, Command.getQueue) where features.contains(.queueCoalescing):
            guard let queue = Self.dataQueue(data, port, features) else { return false }
            result = port.coalescing[queue].parameters
            return true
        default:
            return false
        }
    }

    private static func parameters(_ data: IOVectors, at offset: UInt64) -> CoalescingParameters? {
        guard let packets = data.load(UInt32.self, at: offset), let time = data.load(UInt32.self, at: offset + 4) else {
            return nil
        }
        return CoalescingParameters(packets: packets, microseconds: time)
    }

    /// The receive or transmit queue that a command is about; nil if the driver has none of that number.
    private static func dataQueue(_ data: IOVectors, _ port: NetworkPort, _ features: FeatureSet) -> Int? {
        let layout = QueueLayout(pairs: features.contains(.networkMultiqueue) ? port.counters.pairs.count : 1)
        guard let queue = data.load(UInt16.self), Int(queue) < layout.control else { return nil }
        return Int(queue)
    }

    /// Two lists, each a 32-bit count and as many addresses of six bytes.
    private static func isAddressTable(_ data: IOVectors) -> Bool {
        guard let unicast = data.load(UInt32.self) else { return false }
        let second = 4 + 6 * UInt64(unicast)
        guard let multicast = data.load(UInt32.self, at: second) else { return false }
        return data.byteCount == second + 4 + 6 * UInt64(multicast)
    }
}

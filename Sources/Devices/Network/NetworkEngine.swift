// SPDX-License-Identifier: Apache-2.0

internal import HostNetwork
internal import Linux
internal import Synchronization
internal import Virtio

/// An I/O thread of the network device: the owner of a pair of queues and of a queue of the TAP; the first also of the
/// control queue, and of what concerns the whole interface.
struct NetworkEngine: DeviceEngine, ~Copyable, @unchecked Sendable {
    // Moves to its thread as a whole and stays there, the queues with it: hence `Sendable`.

    private enum Token {
        static let tap = DeviceWorkerToken.firstOfEngine
        /// There is more to send, or to serve, than was done in one go.
        static let again = DeviceWorkerToken.firstOfEngine + 1
        /// The host has reported a change of its interfaces.
        static let link = DeviceWorkerToken.firstOfEngine + 2
        /// The delay of an interrupt is over.
        static let receiveTimer = DeviceWorkerToken.firstOfEngine + 3
        static let transmitTimer = DeviceWorkerToken.firstOfEngine + 4
        /// What has waited for the limits may continue.
        static let receiveLimit = DeviceWorkerToken.firstOfEngine + 5
        static let transmitLimit = DeviceWorkerToken.firstOfEngine + 6
        /// The guest has not acknowledged in time what the metadata's endpoint has sent.
        static let metadata = DeviceWorkerToken.firstOfEngine + 7
    }

    private let port: NetworkPort
    private let pair: Int
    private let receiveQueue: Int
    private let transmitQueue: Int
    /// nil for a stream, which has one pair.
    private let tapQueue: TAPQueue?
    private let tap: Int32
    private let again: EventFD
    private var receive: ReceivePath
    private var transmit: TransmitPath
    private var control: NetworkControl
    /// What both directions use; nil without metadata.
    private let metadata: MetadataLink?
    private var activation: Activation?
    private(set) var queueAtWork: Int
    /// Listens from the start, and is heard from the first activation on. Also while no driver is active.
    private var watcher: LinkWatcher?
    private var isWatching = false
    /// What the TAP is waited for; it is not in the epoll instance while that is nothing, or in a pause.
    private var watched: Epoll.Events = []
    private var wanted: Epoll.Events = []
    private var isPaused = false
    /// The driver takes frames from this pair, which the first always gives.
    private var isReceiving = false
    /// Frames are moved within one call. One that waits for buffers of the driver is held in memory of ours.
    let isQuiet = true

    /// - Parameters:
    ///   - others: of the first pair's engine, if there are other pairs.
    ///   - metadata: if there are none.
    init(
        port: NetworkPort, pair: Int, queueSizes: [UInt16], others: PairSwitch?, metadata: MetadataService? = nil
    ) throws(SystemCallError) {
        let link = try metadata.map { service throws(SystemCallError) in try MetadataLink(service) }
        let again = try EventFD()
        let spill = try ReceivePath.makeSpill()
        let socket = port.attachment.isStream ? port.attachment.descriptor(ofQueue: pair) : nil
        let reader = try socket.map { number throws(SystemCallError) in try FrameReader(socket: number) }
        let writer = try socket.map { number throws(SystemCallError) in try FrameWriter(socket: number) }
        let receiveCoalescer = try InterruptCoalescer(port.coalescing[QueueLayout.receive(ofPair: pair)])
        let transmitCoalescer = try InterruptCoalescer(port.coalescing[QueueLayout.transmit(ofPair: pair)])
        let receiveThrottle = try Throttle(port.receiveLimiter)
        let transmitThrottle = try Throttle(port.transmitLimiter)
        self.metadata = link
        self.again = again
        self.port = port
        self.pair = pair
        (receiveQueue, transmitQueue) = (QueueLayout.receive(ofPair: pair), QueueLayout.transmit(ofPair: pair))
        queueAtWork = receiveQueue
        // Without MQ it is where another pair's queue would be.
        let controlQueueSize = max(queueSizes[QueueLayout(pairs: 1).control], queueSizes.last ?? 0)
        watcher = pair == 0 ? port.attachment.watchLink() : nil
        tapQueue = port.attachment.queue(pair)
        tap = port.attachment.descriptor(ofQueue: pair)
        let headerSize = port.attachment.headerSize
        receive = ReceivePath(
            tap: tap, headerSize: headerSize, reader: reader, spill: spill, coalescer: receiveCoalescer,
            counters: port.counters,
            pair: pair, events: port.events, throttle: receiveThrottle, metadata: link)
        transmit = TransmitPath(
            tap: tap, headerSize: headerSize, writer: writer, queueSize: queueSizes[transmitQueue],
            coalescer: transmitCoalescer,
            counters: port.counters, pair: pair, events: port.events, lockedSource: port.lockedAddress,
            throttle: transmitThrottle, metadata: link)
        control = NetworkControl(queueSize: controlQueueSize, pairs: others)
    }

    // MARK: Life

    mutating func activate(_ activation: Activation, epoll: borrowing Epoll) throws(VirtqueueError) {
        self.activation = activation
        // Before the driver looks: the link may be down already.
        watchLink(epoll)
        // Without this eventfd a long queue could stall; adding it fails only for lack of kernel memory.
        do throws(SystemCallError) {
            try epoll.add(again.rawValue, .input, token: Token.again)
            if !activation.features.isDisjoint(with: .coalescing) {
                try epoll.add(receive.timer, .input, token: Token.receiveTimer)
                try epoll.add(transmit.timer, .input, token: Token.transmitTimer)
            }
            if let timer = receive.limitTimer { try epoll.add(timer, .input, token: Token.receiveLimit) }
            if let timer = transmit.limitTimer { try epoll.add(timer, .input, token: Token.transmitLimit) }
            if let metadata { try epoll.add(metadata.descriptor, .input, token: Token.metadata) }
        } catch { return fail(error) }
        // Frames from before the driver, which no offload of its can have shaped; then those for this driver.
        if receive.discard(withoutDriver: true) == .gone { lose() }
        if pair == 0 {
            port.attachment.setOffloads(activation.features.tapOffloads)
            isReceiving = true
        }
        receive.mode = ReceivePath.Mode(
            isMergeable: activation.features.contains(.mergeableBuffers),
            hasChecksum: activation.features.contains(.guestChecksum),
            longestFrame: longestFrame(activation.features),
            longestPlainFrame: activation.features.contains(.mtu)
                ? Int(PacketHeader.size) + 14 + port.promisedMTU : .max)
        transmit.features = activation.features
        let interrupts = activation.interrupts.queues
        receive.start(try makeQueue(receiveQueue, activation), interrupts[receiveQueue])
        transmit.start(try makeQueue(transmitQueue, activation), interrupts[transmitQueue])
        if let queue = controlQueue(activation) { control.start(try makeQueue(queue, activation), interrupts[queue]) }
    }

    /// The control queue's number; nil where it is not this thread's. Without CTRL_VQ there is no such queue (§5.1.2),
    /// whatever the driver has made ready.
    private func controlQueue(_ activation: Activation) -> Int? {
        guard pair == 0, activation.features.contains(.controlQueue) else { return nil }
        return QueueLayout(pairs: activation.features.contains(.networkMultiqueue) ? port.counters.pairs.count : 1)
            .control
    }

    private mutating func makeQueue(_ index: Int, _ activation: Activation) throws(VirtqueueError) -> Virtqueue? {
        queueAtWork = index
        return try activation.makeQueue(index)
    }

    mutating func reset(epoll: borrowing Epoll) {
        receive.stop()
        transmit.stop()
        control.stop()
        wanted = []
        isPaused = false
        watch(epoll)
        for descriptor in [again.rawValue, receive.timer, transmit.timer] { epoll.remove(descriptor) }
        if let timer = receive.limitTimer { epoll.remove(timer) }
        if let timer = transmit.limitTimer { epoll.remove(timer) }
        if let metadata {
            epoll.remove(metadata.descriptor)
            metadata.reset()
        }
        port.resetCoalescing(ofPair: pair)
        isReceiving = false
        if pair == 0 {
            // The next driver starts without, and with one pair.
            port.attachment.setOffloads([])
            port.pairsInUse.store(1, ordering: .relaxed)
        } else {
            _ = tapQueue?.setAttached(false)
        }
        activation = nil
    }

    mutating func stopQueue(_ index: Int, epoll: borrowing Epoll) {
        switch index {
        case receiveQueue:
            receive.stop()
            port.restoreCoalescing(ofQueue: index)
            wanted.remove(.input)
        case transmitQueue:
            transmit.stop()
            port.restoreCoalescing(ofQueue: index)
            wanted.remove(.output)
        default:
            control.stop()
        }
        watch(epoll)
    }

    mutating func startQueue(
        _ configuration: QueueConfiguration, of activation: Activation, epoll: borrowing Epoll
    ) throws(VirtqueueError) {
        queueAtWork = configuration.index
        let queue = try Virtqueue(configuration, features: activation.features, ram: activation.ram)
        let interrupts = activation.interrupts.queues
        switch configuration.index {
        case receiveQueue: receive.start(queue, interrupts[receiveQueue])
        case transmitQueue: transmit.start(queue, interrupts[transmitQueue])
        case controlQueue(activation): control.start(queue, interrupts[configuration.index])
        default: break
        }
    }

    mutating func perform(_ request: any DeviceRequest, epoll: borrowing Epoll) {
        guard let request = request as? PairRequest else { return }
        request.isDone.store(setReceiving(request.receives, epoll), ordering: .releasing)
    }

    /// Begins to give the driver frames from this pair, or ends it.
    /// - Returns: false when there is no queue to put them in, or the host does not give any.
    private mutating func setReceiving(_ on: Bool, _ epoll: borrowing Epoll) -> Bool {
        if on {
            guard activation != nil, receive.isReady, tapQueue?.setAttached(true) != false else { return false }
            wanted.insert(.input)
        } else {
            _ = tapQueue?.setAttached(false)
            receive.dropPending()
            wanted.remove(.input)
        }
        isReceiving = on
        watch(epoll)
        return true
    }

    mutating func pause(epoll: borrowing Epoll) {
        isPaused = true
        // Nothing is left to be done in the pause.
        receive.flushInterrupt()
        transmit.flushInterrupt()
        watch(epoll)
    }

    mutating func resume(epoll: borrowing Epoll) {
        isPaused = false
        watch(epoll)
    }

    // MARK: Work

    mutating func notified(queue: Int, epoll: borrowing Epoll) throws(VirtqueueError) {
        guard !isPaused else { return }
        switch queue {
        // While the TAP is watched its frames set the pace; after a pause, also those that a stream's reader holds.
        case receiveQueue: if !wanted.contains(.input) || receive.hasBuffered { try moveIn() }
        case transmitQueue: if !wanted.contains(.output) { try moveOut() }
        default: try serveControl()
        }
        watch(epoll)
    }

    mutating func ready(token: UInt64, events: Epoll.Events, epoll: borrowing Epoll) throws(VirtqueueError) {
        if token == Token.link {
            if let state = watcher?.latest() { follow(state) }
            return watch(epoll)
        }
        // Also without a driver and in a pause: the peer waits for the rest of a frame.
        if token == Token.tap, transmit.hasTail { transmit.flushTail() }
        // An event from before a reset.
        guard activation != nil else { return watch(epoll) }
        switch token {
        case Token.receiveTimer: receive.expireTimer()
        case Token.transmitTimer: transmit.expireTimer()
        case Token.receiveLimit:
            receive.expireLimit()
            // After a pause each queue is checked.
            if !isPaused { try moveIn() }
        case Token.transmitLimit:
            transmit.expireLimit()
            if !isPaused, !wanted.contains(.output) { try moveOut() }
        case Token.metadata:
            metadata?.expire()
            // After a pause each queue is checked.
            if !isPaused { try moveIn() }
        case Token.again:
            again.drain()
            // After a pause each queue is checked.
            guard !isPaused else { return }
            if !wanted.contains(.output) { try moveOut() }
            if receive.hasBuffered, wanted.contains(.input) { try moveIn() }
            try serveControl()
        default:
            // An event from before the pause; the TAP has it again afterwards.
            guard !isPaused else { return watch(epoll) }
            if events.contains(.input), wanted.contains(.input) { try moveIn() }
            if events.contains(.output), wanted.contains(.output) { try moveOut() }
            // What a stream's peer has sent before it closed comes first: then there is an end to be read.
            if !events.isDisjoint(with: [.error, .hangUp]), !port.attachment.isStream || !wanted.contains(.input) {
                lose()
            }
        }
        watch(epoll)
    }

    private mutating func moveIn() throws(VirtqueueError) {
        guard let activation, isReceiving, !port.isRemoved else { return }
        queueAtWork = receiveQueue
        defer { metadata?.setTimer() }
        let outcome =
            port.isLinkUp
            ? try receive.run(activation) : receive.discard(withoutDriver: false)
        switch outcome {
        case .drained: wanted.insert(.input)
        case .paused:
            wanted.insert(.input)
            // The descriptor may not be readable for these.
            if receive.hasBuffered { again.signal() }
        case .starved, .limited: wanted.remove(.input)
        case .gone: lose()
        }
    }

    private mutating func moveOut() throws(VirtqueueError) {
        guard let activation else { return }
        queueAtWork = transmitQueue
        switch try transmit.run(activation, isLinkUp: port.isLinkUp) {
        case .drained, .limited: wanted.remove(.output)
        case .blocked: wanted.insert(.output)
        case .paused:
            wanted.remove(.output)
            again.signal()
        }
        if metadata?.hasFrame == true { try moveIn() }
    }

    private mutating func serveControl() throws(VirtqueueError) {
        guard let activation, let queue = controlQueue(activation) else { return }
        queueAtWork = queue
        if try control.run(activation, port) { again.signal() }
    }

    /// The interface is gone: the guest sees the link go down, and what it sends is dropped and counted.
    private mutating func lose() {
        wanted = []
        transmit.discardTail()
        port.noteRemoval(impossibleLength: receive.impossibleLength)
        // What waited for the TAP to take more waits no longer.
        again.signal()
    }

    // MARK: Helpers

    /// Follows the host's interface from now on, if it can be seen from here.
    private mutating func watchLink(_ epoll: borrowing Epoll) {
        guard !isWatching else { return }
        isWatching = true
        guard let number = watcher?.descriptor, (try? epoll.add(number, .input, token: Token.link)) != nil else {
            return
        }
        // It listens already: no change is missed in between.
        if let state = watcher?.current() { follow(state) }
    }

    /// The guest's cable is the host's interface.
    private mutating func follow(_ state: LinkState) {
        switch state {
        case .present(let isCarrying, let mtu):
            port.noteMTU(mtu)
            port.setLink(up: isCarrying, because: isCarrying ? "is up" : "is down, or has no carrier")
        // A macvtap's descriptor does not report it.
        case .removed: lose()
        // It may be up there: the cable stays in until the interface is removed.
        case .elsewhere: port.setLink(up: true, because: "is in another network namespace")
        }
    }

    /// Header, Ethernet header, VLAN tag, and the largest packet that the driver may be given.
    private func longestFrame(_ features: FeatureSet) -> UInt64 {
        let packet = features.isDisjoint(with: .largeGuestPackets) ? port.currentMTU : 65536
        return PacketHeader.size + 18 + UInt64(max(0, packet))
    }

    /// Makes epoll watch the TAP for what is wanted. While that is nothing it is not watched at all: errors would be
    /// reported again and again.
    private mutating func watch(_ epoll: borrowing Epoll) {
        var wanted = isPaused ? [] : self.wanted
        // A frame that was begun is completed.
        if transmit.hasTail { wanted.insert(.output) }
        guard watched != wanted else { return }
        do throws(SystemCallError) {
            if wanted.isEmpty {
                epoll.remove(tap)
            } else if watched.isEmpty {
                try epoll.add(tap, wanted, token: Token.tap)
            } else {
                try epoll.modify(tap, wanted, token: Token.tap)
            }
            watched = wanted
        } catch { fail(error) }
    }

    /// epoll has no memory: nothing would wake the device again.
    private func fail(_ error: SystemCallError) {
        port.events.report(.needsReset, .error, "\(error); the device does nothing until the driver resets it")
        activation?.interrupts.configuration.markNeedsReset()
    }
}

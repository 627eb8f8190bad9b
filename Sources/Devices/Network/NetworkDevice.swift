// SPDX-License-Identifier: Apache-2.0

public import HostNetwork
public import Linux
internal import Synchronization
public import Virtio

/// A network card (virtio 1.2 §5.1) in front of a TAP, or of a ``FrameStream``: a pair of queues for each queue of the
/// TAP, with an I/O thread, and a control queue, which the first thread serves.
///
/// The driver's offloads are passed on to the TAP exactly as negotiated, and withdrawn at its reset.
public final class NetworkDevice: VirtioDevice {
    public let name: String
    public let deviceID: UInt32 = 1
    public let features: FeatureSet
    /// Receive and transmit of each pair, then control.
    public let maximumQueueSizes: [UInt16]
    public var configuration: ConfigurationSpace { port.configuration }
    public var deviceEvents: DeviceEvents { port.events }
    public var counters: NetworkCounters { port.counters }

    let port: NetworkPort
    /// One for each pair.
    private let workers: [DeviceWorker]
    /// Pairs that the driver has negotiated to use some of.
    private let pairs = Atomic<Int>(1)

    /// Makes the device; ``start()`` starts its I/O threads.
    /// - Parameters:
    ///   - name: `net0`, …; the first thread's name. Those of further pairs are `net0.1` and so on.
    ///   - address: the guest's Ethernet address.
    ///   - attachment: the TAP; it is let go when the device is.
    ///   - isAddressLocked: the driver cannot change its address, and frames from another one are dropped.
    ///   - limits: of all pairs of queues together.
    ///   - metadata: answers the guest at an address of the link; only with one pair of queues.
    ///   - events: gets what the log reports about the device.
    public init(
        name: String, address: MACAddress, attachment: consuming NetworkAttachment, isAddressLocked: Bool = false,
        limits: NetworkLimits = .none, metadata: MetadataService? = nil, events: DeviceEvents = .none
    ) throws(SystemCallError) {
        self.name = name
        features = .offered(before: attachment, withOffloads: attachment.offloads.isOn)
        let pairs = attachment.queueCount
        precondition(metadata == nil || pairs == 1)
        let sizes = Array(repeating: Self.queueSize, count: QueueLayout(pairs: pairs).control) + [Self.controlQueueSize]
        let port = NetworkPort(
            attachment, address: address, isAddressLocked: isAddressLocked, limits: limits, events: events)
        var others: [DeviceWorker] = []
        for pair in 1..<max(1, pairs) {
            let engine = try NetworkEngine(port: port, pair: pair, queueSizes: sizes, others: nil)
            others.append(try DeviceWorker(name: "\(name).\(pair)", engine: engine, events: events))
        }
        let first = try NetworkEngine(
            port: port, pair: 0, queueSizes: sizes, others: others.isEmpty ? nil : PairSwitch(others),
            metadata: metadata)
        workers = [try DeviceWorker(name: name, engine: first, events: events)] + others
        maximumQueueSizes = sizes
        self.port = port
    }

    private static let queueSize: UInt16 = 256
    private static let controlQueueSize: UInt16 = 64

    /// The guest's address: as given, or as the driver has set it since.
    public var address: MACAddress { port.address }

    /// Frames that the host's interface has dropped since the device was made; nil when it cannot be seen from here. A
    /// macvtap takes frames also while it is down, and does not count them all.
    public var hostDrops: HostDrops? { port.attachment.hostDrops.map { $0.since(port.earlierDrops) } }

    /// Reports those since the last call. It asks the kernel: not for a vCPU's thread.
    public func reportHostDrops() {
        guard let now = hostDrops else { return }
        let new = port.reportedDrops.withLock { reported in
            defer { reported = now }
            return now.since(reported)
        }
        let interface = hostInterface
        deviceEvents.report(
            .lostFrames(NetworkCounters.Loss.hostReceive), .warning, count: new.receive,
            "a frame for the guest was dropped by \(interface), mostly because its queue was full: the guest is too slow, or paused"
        )
        deviceEvents.report(
            .lostFrames(NetworkCounters.Loss.hostSend), .warning, count: new.send,
            "a frame of the guest was dropped by \(interface)")
    }

    /// Indicates whether the guest sees the link as up. While it is down, frames are dropped and counted in
    /// both directions.
    public var isLinkUp: Bool { port.isLinkUp }

    /// Plugs the guest's cable in, or pulls it. Any thread.
    /// - Returns: whether the link is up now, which it is only if the host's interface is, too.
    public func setCable(isPluggedIn: Bool) -> Bool {
        port.setCable(isPluggedIn: isPluggedIn)
        return port.isLinkUp
    }

    /// The name of the host's interface, or of what a stream is connected to.
    public var hostInterface: String { port.attachment.name }

    /// Why the link is down though the cable is plugged in.
    public var hostProblem: String {
        hostInterface + (port.attachment.isStream ? " is gone" : " is down on the host")
    }

    /// What another process needs to revert the changes on the host for the device; empty if there are none.
    public var restoringDescriptors: [Int32] { port.attachment.restoringDescriptors }

    /// Leaves that to a process that calls ``restoreHost()``.
    public func delegateRestoring() { port.attachment.delegateRestoring() }

    /// Reverts the changes on the host; in that process only.
    public func restoreHost() { port.attachment.restoreHost() }

    /// Pairs of queues that the driver may use, and those of them that it receives in.
    public var queuePairs: (count: Int, inUse: Int) { (workers.count, port.pairsInUse.load(ordering: .relaxed)) }

    /// Times that a queue had to wait for the limits of its direction.
    public var throttled: (receive: UInt64, transmit: UInt64) {
        (port.receiveLimiter?.waits.value ?? 0, port.transmitLimiter?.waits.value ?? 0)
    }

    // MARK: VirtioDevice

    public func accepts(_ features: FeatureSet) -> Bool { features.isConsistentForNetwork }

    public func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        for worker in workers { try worker.start(first: first) }
    }

    public func activate(_ activation: Activation) {
        // Without STATUS the link's state is nothing that the driver knows of.
        port.setInterrupt(activation.features.contains(.linkStatus) ? activation.interrupts.configuration : nil)
        let layout = QueueLayout(pairs: activation.features.contains(.networkMultiqueue) ? workers.count : 1)
        pairs.store(layout.pairs, ordering: .relaxed)
        // The first pair's thread may find a command for the others.
        for pair in (0..<layout.pairs).reversed() {
            workers[pair].activate(activation.only(queues: layout.queues(ofPair: pair)))
        }
    }

    public func reset() {
        // The first pair's first: then there are no commands for the others.
        for worker in workers { worker.reset() }
        port.setInterrupt(nil)
        port.renewMTU()
    }

    public func stopQueue(_ index: Int) { worker(ofQueue: index)?.stopQueue(index) }

    public func startQueue(_ configuration: QueueConfiguration) {
        worker(ofQueue: configuration.index)?.startQueue(configuration)
    }

    /// While a driver is active.
    private func worker(ofQueue index: Int) -> DeviceWorker? {
        QueueLayout(pairs: pairs.load(ordering: .relaxed)).pair(ofQueue: index).map { workers[$0] }
    }

    public func pause(onQuiet: @escaping @Sendable () -> Void) {
        let left = CountDown(workers.count, then: onQuiet)
        for worker in workers { worker.pause { left.arrive() } }
    }

    public func resume() { for worker in workers { worker.resume() } }
}

/// What a network interface may move in a second, in each direction.
public struct NetworkLimits: Sendable, Equatable {
    /// To the guest.
    public var receive = RateLimit.none
    /// From the guest.
    public var transmit = RateLimit.none

    public init() {}

    public static let none = NetworkLimits()
}

/// What the device's I/O threads and the rest of the process share.
final class NetworkPort: Sendable {
    let attachment: NetworkAttachment
    let configuration: ConfigurationSpace
    let counters: NetworkCounters
    let events: DeviceEvents
    /// Pairs that give frames to the driver: the first ones. The first pair's thread changes it.
    let pairsInUse = Atomic<Int>(1)
    private let link = Atomic<Bool>(true)
    private let ends = Guarded(LinkEnds())
    private let removed = Atomic<Bool>(false)
    /// What the host's interface had dropped before, and what was reported of the rest.
    let earlierDrops: HostDrops
    let reportedDrops = Guarded(HostDrops.none)
    /// The interface's, as the host has it now.
    private let linkMTU: Atomic<Int>
    /// Of receive and transmit of each pair. The first pair's thread sets them.
    let coalescing: [QueueCoalescing]
    /// What all receive, and all transmit queues were set to; a queue that was reset has it again.
    private let receiveCoalescing = QueueCoalescing()
    private let transmitCoalescing = QueueCoalescing()
    /// While a driver is active.
    private let interrupt = Guarded<ConfigurationInterrupt?>(nil)

    /// Fields of `struct virtio_net_config` (virtio 1.2 §5.1.4).
    private enum Field {
        static let address = 0..<6
        static let status = 6
        static let pairs = 8
        static let mtu = 10
        static let size = 12
        /// VIRTIO_NET_S_LINK_UP
        static let linkUp: UInt8 = 1
    }

    init(
        _ attachment: consuming NetworkAttachment, address: MACAddress, isAddressLocked: Bool, limits: NetworkLimits,
        events: DeviceEvents
    ) {
        receiveLimiter = RateLimiter(limits.receive)
        transmitLimiter = RateLimiter(limits.transmit)
        self.events = events
        lockedAddress = isAddressLocked ? address : nil
        linkMTU = Atomic(attachment.mtu)
        earlierDrops = attachment.hostDrops ?? .none
        let mtu = Self.possibleMTU(attachment.mtu)
        let pairs = attachment.queueCount
        counters = NetworkCounters(pairs: pairs)
        coalescing = (0..<QueueLayout(pairs: pairs).control).map { _ in QueueCoalescing() }
        self.attachment = attachment
        var fields = [UInt8](repeating: 0, count: Field.size)
        fields.replaceSubrange(Field.address, with: address.bytes)
        fields[Field.status] = Field.linkUp
        // max_virtqueue_pairs, which counts only with VIRTIO_NET_F_MQ.
        fields[Field.pairs] = UInt8(truncatingIfNeeded: pairs)
        fields[Field.mtu] = UInt8(truncatingIfNeeded: mtu)
        fields[Field.mtu + 1] = UInt8(truncatingIfNeeded: mtu >> 8)
        configuration = ConfigurationSpace(fields)
        given = address
    }

    private let given: MACAddress
    /// nil without limits.
    let receiveLimiter: RateLimiter?
    let transmitLimiter: RateLimiter?
    /// The address that the driver cannot change; nil where it may.
    let lockedAddress: MACAddress?

    var address: MACAddress {
        let value = (0..<6).reduce(UInt64(0)) { $0 << 8 | configuration.read(at: $1, size: 1) }
        return (try? MACAddress(rawValue: value)) ?? given
    }

    /// Sets the address, as the driver asks.
    /// - Returns: false when it is locked and another one.
    func setAddress(_ address: MACAddress) -> Bool {
        guard lockedAddress == nil || lockedAddress == address else { return false }
        configuration.update { $0.replaceSubrange(Field.address, with: address.bytes) }
        return true
    }

    // MARK: MTU

    /// The MTU that the configuration space names. It stays as long as a driver may have read it (§5.1.4.1: once set it
    /// is not modified).
    var promisedMTU: Int { Int(configuration.read(at: Field.mtu, size: 2)) }

    /// The MTU that the host's interface has now.
    var currentMTU: Int { linkMTU.load(ordering: .relaxed) }

    /// The host's interface has this MTU now; the next driver finds it.
    func noteMTU(_ mtu: Int) { linkMTU.store(mtu, ordering: .relaxed) }

    /// The driver has not read it since the reset: it gets the interface's current MTU.
    func renewMTU() {
        let mtu = Self.possibleMTU(currentMTU)
        configuration.update {
            $0[Field.mtu] = UInt8(truncatingIfNeeded: mtu)
            $0[Field.mtu + 1] = UInt8(truncatingIfNeeded: mtu >> 8)
        }
    }

    /// §5.1.4.1: from 68 to 65535.
    private static func possibleMTU(_ mtu: Int) -> UInt16 { max(68, UInt16(clamping: mtu)) }

    // MARK: The link

    var isLinkUp: Bool { link.load(ordering: .relaxed) }

    /// The host's interface was removed, or the stream has ended: the link is down for good.
    ///
    /// The kernel takes an interface down before it removes it: that is no change of the link, but worth a line.
    /// - Parameter impossibleLength: the length of a frame for which the stream was given up; nil if it has ended.
    func noteRemoval(impossibleLength: UInt32? = nil) {
        guard !removed.exchange(true, ordering: .relaxed) else { return }
        attachment.endStream()
        _ = change { $0.isHostUp = false }
        let reason =
            if let impossibleLength {
                "\(attachment.name) sent a frame with the length \(impossibleLength), which is impossible; the connection was closed"
            } else {
                "\(attachment.name) \(attachment.isStream ? "has closed the connection" : "was removed from the host")"
            }
        report(isUp: false, isUrgent: true, reason)
    }

    var isRemoved: Bool { removed.load(ordering: .relaxed) }

    /// What the link needs to be up.
    private struct LinkEnds {
        var isHostUp = true
        var isPluggedIn = true
        var isUp: Bool { isHostUp && isPluggedIn }
    }

    /// Takes the link up or down, as the host's interface is; a configuration change informs the driver. There is
    /// nothing to put back into an interface that was removed.
    /// - Parameter reason: what the interface did, for the log.
    func setLink(up: Bool, because reason: String) {
        guard !(up && isRemoved) else { return }
        if let isUp = change({ $0.isHostUp = up }) { report(isUp: isUp, "\(attachment.name) \(reason)") }
    }

    /// The same for the guest's cable, by request.
    func setCable(isPluggedIn: Bool) {
        guard let isUp = change({ $0.isPluggedIn = isPluggedIn }) else { return }
        report(isUp: isUp, "the cable was \(isPluggedIn ? "plugged in" : "pulled") by request")
    }

    /// - Returns: what the link is now, if that is another state.
    private func change(_ body: (inout LinkEnds) -> Void) -> Bool? {
        let change: Bool? = ends.withLock { ends in
            body(&ends)
            guard link.exchange(ends.isUp, ordering: .relaxed) != ends.isUp else { return nil }
            configuration.update { $0[Field.status] = ends.isUp ? Field.linkUp : 0 }
            return ends.isUp
        }
        if change != nil { interrupt.withLock { $0?.signal() } }
        return change
    }

    /// After the driver's interrupt.
    private func report(isUp: Bool, isUrgent: Bool = false, _ reason: String) {
        events.report(
            .link(isUp: isUp), isUp ? .notice : .warning, isUrgent: isUrgent,
            "the link is \(isUp ? "up again" : "down"): \(reason)")
    }

    // MARK: Coalescing

    private static func isReceive(_ queue: Int) -> Bool { queue == QueueLayout.receive(ofPair: queue / 2) }

    private func common(to queue: Int) -> QueueCoalescing {
        Self.isReceive(queue) ? receiveCoalescing : transmitCoalescing
    }

    /// Sets the parameters of all receive or of all transmit queues.
    func setCoalescing(ofAll queue: Int, _ parameters: CoalescingParameters) {
        common(to: queue).parameters = parameters
        for index in coalescing.indices where Self.isReceive(index) == Self.isReceive(queue) {
            coalescing[index].parameters = parameters
        }
    }

    /// A queue was reset, and has the parameters of all (virtio 1.3 §5.1.6.5.11.2).
    func restoreCoalescing(ofQueue queue: Int) { coalescing[queue].parameters = common(to: queue).parameters }

    /// After a reset of the device nothing is delayed.
    func resetCoalescing(ofPair pair: Int) {
        if pair == 0 { (receiveCoalescing.parameters, transmitCoalescing.parameters) = (.none, .none) }
        for queue in [QueueLayout.receive(ofPair: pair), QueueLayout.transmit(ofPair: pair)] {
            coalescing[queue].parameters = .none
        }
    }

    func setInterrupt(_ new: ConfigurationInterrupt?) { interrupt.withLock { $0 = new } }
}

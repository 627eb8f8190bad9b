// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import Linux

/// A device as a driver finds it, whatever the transport: status, features, queues, configuration (virtio 1.2 §2).
///
/// A transport decodes its registers into calls of these methods, on vCPU threads. The state is behind one lock, which
/// a reset holds until the device is quiet; kicks, the configuration space and the interrupts do not need it.
///
/// What a driver may do when:
/// - Status bits are set in the order ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK; one that comes too early is not
///   taken, one that is set stays set until reset (a write of 0). FAILED is always taken, and nothing but a reset after
///   it.
/// - Driver features are taken between DRIVER and FEATURES_OK. FEATURES_OK is refused, by reading back as 0, when they
///   have a bit that was not offered, lack VERSION_1, or the device does not accept them.
/// - Queues are set up between FEATURES_OK and DRIVER_OK, and, after a reset of theirs, also later. A queue that is
///   ready ignores changes. Enabling one is refused, by its staying not ready, when the size is not a power of two up
///   to the maximum or a ring is misaligned or not in RAM.
public final class VirtioFunction: Sendable {
    public let device: any VirtioDevice
    /// Made by the transport.
    public let interrupts: DeviceInterrupts
    /// One for each queue, for the machine to assign to the transport's place for notifications.
    public let doorbells: [Doorbell]
    public let counters: DeviceCounters
    /// The device's features and the transport's.
    public let offered: FeatureSet

    private let memory: GuestMemory
    private let resetTransport: @Sendable () -> Void
    private let state: Guarded<State>

    /// - Parameters:
    ///   - memory: guest RAM.
    ///   - interrupts: one for each queue of the device.
    ///   - counters: the ones that the interrupts count in.
    ///   - queues: the kind of queues to offer.
    ///   - resetTransport: sets the transport's own registers back; called in a reset when the device is quiet, before
    ///     a driver can see that the reset is done.
    public init(
        _ device: any VirtioDevice, memory: GuestMemory, interrupts: DeviceInterrupts, counters: DeviceCounters,
        queues: VirtqueueFormat, resetTransport: @escaping @Sendable () -> Void
    ) throws(SystemCallError) {
        self.device = device
        self.memory = memory
        self.interrupts = interrupts
        self.counters = counters
        self.resetTransport = resetTransport
        var doorbells: [Doorbell] = []
        for _ in device.maximumQueueSizes { doorbells.append(try Doorbell()) }
        self.doorbells = doorbells
        offered = device.features.union(.transport).union(queues.features)
        state = Guarded(State(queueSizes: device.maximumQueueSizes))
    }

    /// What a reset sets back.
    private struct State {
        var status: DeviceStatus = []
        var driverFeatures: FeatureSet = []
        /// A feature above bit 127 was requested; none is offered.
        var wantsUnknownFeatures = false
        var queues: [QueueConfiguration]

        init(queueSizes: [UInt16]) {
            queues = queueSizes.enumerated().map { QueueConfiguration(index: $0.offset, maximumSize: $0.element) }
        }

        var isLive: Bool { status.contains(.driverOK) }
        var canNegotiate: Bool { status.contains(.driver) && status.isDisjoint(with: [.featuresOK, .failed]) }

        /// A queue's place in the array; nil when the device has none of that number.
        func index(of queue: UInt32) -> Int? { queue < UInt32(queues.count) ? Int(queue) : nil }

        /// The same when its configuration may change.
        func configurable(_ queue: UInt32) -> Int? {
            guard let index = index(of: queue), !queues[index].isReady,
                status.contains(.featuresOK), !status.contains(.failed),
                !isLive || driverFeatures.contains(.ringReset)
            else { return nil }
            return index
        }
    }

    // MARK: Status

    /// The device status field; with NEEDS_RESET when the device does.
    public var status: DeviceStatus {
        state.withLock { $0.status.union(interrupts.configuration.needsReset ? .needsReset : []) }
    }

    /// Takes what a driver writes to the status field; 0 is a reset.
    public func writeStatus(_ value: UInt32) {
        state.withLock { state in
            device.deviceEvents.trace(
                "the driver writes 0x\(String(value, radix: 16)) to the status, which is 0x\(String(state.status.rawValue, radix: 16))"
            )
            guard value != 0 else { return reset(&state) }
            let wanted = DeviceStatus(rawValue: value)
            if wanted.contains(.failed) { state.status.insert(.failed) }
            guard !state.status.contains(.failed) else { return }
            if wanted.contains(.acknowledge) { state.status.insert(.acknowledge) }
            if wanted.contains(.driver), state.status.contains(.acknowledge) { state.status.insert(.driver) }
            if wanted.contains(.featuresOK), state.canNegotiate { acceptFeatures(&state) }
            if wanted.contains(.driverOK), state.status.contains(.featuresOK), !state.isLive {
                state.status.insert(.driverOK)
                device.activate(
                    Activation(
                        features: state.driverFeatures, queues: state.queues, memory: memory, interrupts: interrupts,
                        doorbells: doorbells,
                        counters: counters))
                let ready = state.queues.count { $0.isReady }
                device.deviceEvents.report(
                    .started, .debug,
                    "the driver started the device with the features \(state.driverFeatures) and "
                        + "\(ready) of \(state.queues.count) queues")
            }
        }
    }

    private func acceptFeatures(_ state: inout State) {
        if let reason = refusal(of: state) {
            counters.errors.add()
            return device.deviceEvents.report(
                .refusedFeatures, .warning,
                "the driver accepted the features \(state.driverFeatures), and FEATURES_OK is not set: \(reason)")
        }
        device.deviceEvents.trace("the driver accepted the features \(state.driverFeatures)")
        state.status.insert(.featuresOK)
        device.negotiated(state.driverFeatures)
    }

    /// Why the driver's features cannot be; nil if they can.
    private func refusal(of state: State) -> String? {
        let unknown = state.driverFeatures.subtracting(offered)
        if state.wantsUnknownFeatures { return "some are above bit 127, and none of those was offered" }
        if !unknown.isEmpty { return "\(unknown) was not offered" }
        if !state.driverFeatures.contains(.version1) {
            return "VIRTIO_F_VERSION_1 is missing, and there is no legacy interface"
        }
        return device.accepts(state.driverFeatures) ? nil : "some of them need others that are missing"
    }

    private func reset(_ state: inout State) {
        if state.isLive { device.deviceEvents.report(.reset, .debug, "the device was reset by its driver") }
        device.reset()
        // The device is quiet now and raises nothing any more.
        interrupts.configuration.reset()
        resetTransport()
        for doorbell in doorbells { doorbell.event.drain() }
        state = State(queueSizes: device.maximumQueueSizes)
    }

    // MARK: Features

    /// Takes one word of what the driver wants (``FeatureSet/subscript(word:)``).
    public func setDriverFeatures(word: UInt32, to bits: UInt32) {
        state.withLock { state in
            guard state.canNegotiate else { return }
            state.driverFeatures = state.driverFeatures.replacing(word: word, with: bits)
            if word >= FeatureSet.words, bits != 0 { state.wantsUnknownFeatures = true }
        }
    }

    /// What the driver has written so far, for transports on which it can be read.
    public func driverFeatures(word: UInt32) -> UInt32 { state.withLock { $0.driverFeatures[word: word] } }

    // MARK: Queues

    /// A queue as the driver has set it up so far; nil when the device has none of that number.
    public func queue(_ number: UInt32) -> QueueConfiguration? {
        state.withLock { state in state.index(of: number).map { state.queues[$0] } }
    }

    /// Changes a queue's size or the places of its rings, if they may be changed now.
    public func configureQueue(_ number: UInt32, _ change: (inout QueueConfiguration) -> Void) {
        state.withLock { state in
            guard let index = state.configurable(number) else { return }
            change(&state.queues[index])
            state.queues[index].isReady = false
        }
    }

    /// Makes a queue ready, if the driver has set it up validly.
    public func enableQueue(_ number: UInt32) {
        state.withLock { state in
            guard let index = state.configurable(number) else { return }
            do throws(VirtqueueError) { try state.queues[index].validate(state.driverFeatures, in: memory.ram) } catch {
                counters.errors.add()
                return device.deviceEvents.report(
                    .refusedQueue(index), .warning,
                    "the driver's configuration of queue \(index) is invalid; the queue stays disabled: \(error)")
            }
            state.queues[index].isReady = true
            device.deviceEvents.trace("queue \(index) is ready, with \(state.queues[index].size) entries")
            if state.isLive { device.startQueue(state.queues[index]) }
        }
    }

    /// Stops a queue, which keeps its configuration; returns when nothing of it is in flight.
    public func disableQueue(_ number: UInt32) {
        state.withLock { state in
            if let index = state.index(of: number) { stopQueue(index, &state) }
        }
    }

    /// Sets one queue back (§2.6.1), if the driver negotiated that: also before DRIVER_OK, so that it is not ready then
    /// (§4.2.2.1).
    public func resetQueue(_ number: UInt32) {
        state.withLock { state in
            guard let index = state.index(of: number),
                state.status.contains(.featuresOK), state.driverFeatures.contains(.ringReset)
            else { return }
            stopQueue(index, &state)
            state.queues[index] = QueueConfiguration(index: index, maximumSize: state.queues[index].maximumSize)
        }
    }

    private func stopQueue(_ index: Int, _ state: inout State) {
        guard state.queues[index].isReady else { return }
        state.queues[index].isReady = false
        if state.isLive { device.stopQueue(index) }
        device.deviceEvents.trace("queue \(index) was stopped")
    }

    /// Takes a kick that no ioeventfd has caught.
    public func kick(queue number: UInt64) {
        guard number < UInt64(doorbells.count) else { return }
        counters.exitKicks.add()
        doorbells[Int(number)].event.signal()
    }

    // MARK: Configuration

    /// Changes whenever the configuration space does.
    public var configurationGeneration: UInt32 { device.configuration.generation }

    /// Reads 1, 2, 4 or 8 aligned bytes of the configuration space; all ones for other accesses, and where there is
    /// nothing.
    public func readConfiguration(at offset: UInt64, size: Int) -> UInt64 {
        guard let offset = Self.configurationOffset(offset, size) else { return allOnes(size: size) }
        return device.configuration.read(at: offset, size: size)
    }

    /// Writes as many. What it means, if anything, is the device's affair.
    public func writeConfiguration(_ value: UInt64, at offset: UInt64, size: Int) {
        guard let offset = Self.configurationOffset(offset, size) else { return }
        device.deviceEvents.trace(
            "the driver writes 0x\(String(value & allOnes(size: size), radix: 16)) to byte \(offset) of the configuration"
        )
        device.writeConfiguration(value & allOnes(size: size), at: offset, size: size)
    }

    private static func configurationOffset(_ offset: UInt64, _ size: Int) -> Int? {
        guard [1, 2, 4, 8].contains(size), offset % UInt64(size) == 0 else { return nil }
        return Int(exactly: offset)
    }
}

// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import Linux

/// The register file of a virtio-mmio device, layout version 2 (virtio 1.2 §4.2.2), in front of a ``VirtioDevice``.
///
/// vCPU threads call ``read(at:size:)`` and ``write(_:at:size:)``. The data path does not come here: kicks go through
/// ioeventfds to the device's I/O thread, interrupts through the irqfd. Registers are behind one lock, except the interrupt
/// status, its acknowledgement and the kick, which are atomic, so that no CPU waits for another's reset there.
///
/// What a driver may do when:
/// - Status bits are set in the order ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK; one that comes too early is not taken, one
///   that is set stays set until reset (a write of 0). FAILED is always taken, and nothing but a reset after it.
/// - Driver features are taken between DRIVER and FEATURES_OK. FEATURES_OK is refused, by reading back as 0, when they
///   have a bit that was not offered, lack VERSION_1, or the device does not accept them.
/// - Queues are set up between FEATURES_OK and DRIVER_OK, and, after a `QueueReset` of theirs, also later. A queue that is
///   ready ignores changes. `QueueReady` is refused, by reading back as 0, when the size is not a power of two up to the maximum
///   or a ring is misaligned or not in RAM.
/// - Accesses below the configuration space are 32 bits wide and aligned; others read as all ones and write nothing.
///   Only a kick may have any width.
public final class MMIOTransport: Sendable {
    /// Bytes of guest-physical address space.
    public static let span: UInt64 = 0x1000
    /// Where `QueueNotify` is: the address for ioeventfds of 4 bytes with the queue's number as datamatch.
    public static let queueNotifyOffset: UInt64 = 0x050

    public let device: any VirtioDevice
    /// The device's one interrupt line, for the machine to assign to a GSI.
    ///
    /// All interrupts share it, and with it one eventfd. Two of them on one edge-triggered pin would not do: KVM raises and lowers the pin for each
    /// on a thread of its own, and an edge that comes while the other has the pin raised is none.
    public let irqfd: IRQFD
    public let interrupts: DeviceInterrupts
    /// One for each queue, for the machine to assign to ``queueNotifyOffset``.
    public let doorbells: [Doorbell]
    public let counters: DeviceCounters

    private let interruptStatus = InterruptStatus()
    private let memory: GuestMemory
    private let offered: FeatureSet
    private let state: Guarded<State>

    public init(device: any VirtioDevice, memory: GuestMemory) throws(SystemCallError) {
        self.device = device
        self.memory = memory
        let (irqfd, status, counters) = (try IRQFD(), interruptStatus, DeviceCounters())
        self.irqfd = irqfd
        self.counters = counters
        interrupts = DeviceInterrupts(
            configuration: ConfigurationInterrupt(irqfd, status: status, counters: counters),
            queues: device.maximumQueueSizes.map { _ in QueueInterrupt(irqfd, status: status, counters: counters) })
        var doorbells: [Doorbell] = []
        for _ in device.maximumQueueSizes { doorbells.append(try Doorbell()) }
        self.doorbells = doorbells
        offered = device.features.union(.transport)
        state = Guarded(State(queueSizes: device.maximumQueueSizes))
    }

    /// What a reset sets back.
    private struct State {
        var status: DeviceStatus = []
        var deviceFeaturesSelect: UInt32 = 0
        var driverFeaturesSelect: UInt32 = 0
        var driverFeatures: FeatureSet = []
        /// A feature above bit 127 was asked for; none is offered.
        var wantsUnknownFeatures = false
        var queueSelect: UInt32 = 0
        var queues: [QueueConfiguration]

        init(queueSizes: [UInt16]) {
            queues = queueSizes.enumerated().map { QueueConfiguration(index: $0.offset, maximumSize: $0.element) }
        }

        var isLive: Bool { status.contains(.driverOK) }
        var canNegotiate: Bool { status.contains(.driver) && status.isDisjoint(with: [.featuresOK, .failed]) }

        /// The selected queue's number, nil when the device has none of that number.
        var selected: Int? { queueSelect < UInt32(queues.count) ? Int(queueSelect) : nil }

        /// The selected queue's number when its configuration may change.
        var configurable: Int? {
            guard let selected, !queues[selected].isReady,
                  status.contains(.featuresOK), !status.contains(.failed),
                  !isLive || driverFeatures.contains(.ringReset) else { return nil }
            return selected
        }
    }

    // MARK: Reading

    /// A guest's read. Bits above `size` bytes are zero.
    /// - Parameters:
    ///   - offset: bytes from the device's base address.
    ///   - size: 1, 2, 4 or 8.
    public func read(at offset: UInt64, size: Int) -> UInt64 {
        if offset >= Register.configuration {
            guard isConfigurationAccess(offset, size) else { return allOnes(size: size) }
            return device.configuration.read(at: Int(offset - Register.configuration), size: size)
        }
        guard size == 4, offset % 4 == 0 else { return allOnes(size: size) }
        return UInt64(readRegister(offset))
    }

    private func readRegister(_ offset: UInt64) -> UInt32 {
        switch offset {
        case Register.magicValue: return 0x7472_6976  // "virt"
        case Register.version: return 2
        case Register.deviceID: return device.deviceID
        case Register.vendorID: return 0x4d56_4b53  // "SKVM"
        case Register.interruptStatus: return interruptStatus.value
        case Register.configGeneration: return device.configuration.generation
        // No shared memory region: a length of −1 (§4.2.2).
        case Register.sharedMemory: return .max
        default: break
        }
        return state.withLock { state in
            switch offset {
            case Register.deviceFeatures: offered[word: state.deviceFeaturesSelect]
            case Register.queueNumMax: state.selected.map { UInt32(state.queues[$0].maximumSize) } ?? 0
            case Register.queueReady: state.selected.map { state.queues[$0].isReady ? 1 : 0 } ?? 0
            // A reset has happened before the write that asks for it returns.
            case Register.queueReset: 0
            case Register.status: state.status.union(interrupts.configuration.needsReset ? .needsReset : []).rawValue
            default: UInt32.max
            }
        }
    }

    // MARK: Writing

    /// A guest's write.
    public func write(_ value: UInt64, at offset: UInt64, size: Int) {
        if offset == Register.queueNotify { return kick(value, size: size) }
        if offset >= Register.configuration {
            guard isConfigurationAccess(offset, size) else { return }
            return device.writeConfiguration(value & allOnes(size: size), at: Int(offset - Register.configuration), size: size)
        }
        guard size == 4, offset % 4 == 0 else { return }
        let value = UInt32(truncatingIfNeeded: value)
        if offset == Register.interruptACK { return interruptStatus.acknowledge(value) }
        state.withLock { writeRegister(value, at: offset, &$0) }
    }

    private func writeRegister(_ value: UInt32, at offset: UInt64, _ state: inout State) {
        switch offset {
        case Register.deviceFeaturesSel: state.deviceFeaturesSelect = value
        case Register.driverFeaturesSel: state.driverFeaturesSelect = value
        case Register.queueSel: state.queueSelect = value
        case Register.driverFeatures: writeDriverFeatures(value, &state)
        case Register.status: writeStatus(value, &state)
        case Register.queueReady: writeQueueReady(value, &state)
        case Register.queueReset: writeQueueReset(value, &state)
        default:
            guard let index = state.configurable else { return }
            switch offset {
            case Register.queueNum: state.queues[index].size = value
            case Register.queueDescLow: setLow(&state.queues[index].descriptorTable, value)
            case Register.queueDescHigh: setHigh(&state.queues[index].descriptorTable, value)
            case Register.queueDriverLow: setLow(&state.queues[index].availableRing, value)
            case Register.queueDriverHigh: setHigh(&state.queues[index].availableRing, value)
            case Register.queueDeviceLow: setLow(&state.queues[index].usedRing, value)
            case Register.queueDeviceHigh: setHigh(&state.queues[index].usedRing, value)
            default: break
            }
        }
    }

    /// A kick that no ioeventfd has caught: an odd width, or a machine without them.
    private func kick(_ value: UInt64, size: Int) {
        let queue = value & allOnes(size: size)
        guard queue < UInt64(doorbells.count) else { return }
        counters.exitKicks.add()
        doorbells[Int(queue)].event.signal()
    }

    private func writeDriverFeatures(_ value: UInt32, _ state: inout State) {
        guard state.canNegotiate else { return }
        let word = state.driverFeaturesSelect
        state.driverFeatures = state.driverFeatures.replacing(word: word, with: value)
        if word >= FeatureSet.words, value != 0 { state.wantsUnknownFeatures = true }
    }

    private func writeStatus(_ value: UInt32, _ state: inout State) {
        guard value != 0 else { return reset(&state) }
        let wanted = DeviceStatus(rawValue: value)
        if wanted.contains(.failed) { state.status.insert(.failed) }
        guard !state.status.contains(.failed) else { return }
        if wanted.contains(.acknowledge) { state.status.insert(.acknowledge) }
        if wanted.contains(.driver), state.status.contains(.acknowledge) { state.status.insert(.driver) }
        if wanted.contains(.featuresOK), state.canNegotiate, isAcceptable(state) {
            state.status.insert(.featuresOK)
            device.negotiated(state.driverFeatures)
        }
        if wanted.contains(.driverOK), state.status.contains(.featuresOK), !state.isLive {
            state.status.insert(.driverOK)
            device.activate(Activation(
                features: state.driverFeatures, queues: state.queues, memory: memory, interrupts: interrupts, doorbells: doorbells,
                counters: counters))
        }
    }

    private func isAcceptable(_ state: State) -> Bool {
        !state.wantsUnknownFeatures && offered.isSuperset(of: state.driverFeatures)
            && state.driverFeatures.contains(.version1) && device.accepts(state.driverFeatures)
    }

    private func reset(_ state: inout State) {
        device.reset()
        // The device is quiet now and raises nothing any more.
        interruptStatus.reset()
        interrupts.configuration.reset()
        for doorbell in doorbells { doorbell.event.drain() }
        state = State(queueSizes: device.maximumQueueSizes)
    }

    private func writeQueueReady(_ value: UInt32, _ state: inout State) {
        if value == 1, let index = state.configurable {
            guard (try? state.queues[index].validate(in: memory.ram)) != nil else { return counters.errors.add() }
            state.queues[index].isReady = true
            if state.isLive { device.startQueue(state.queues[index]) }
        } else if value == 0, let index = state.selected, state.queues[index].isReady {
            stopQueue(index, &state)
        }
    }

    /// Sets one queue back (§2.6.1), if the driver negotiated that: also before DRIVER_OK, so that QueueReady reads 0 (§4.2.2.1).
    private func writeQueueReset(_ value: UInt32, _ state: inout State) {
        guard value == 1, let index = state.selected,
            state.status.contains(.featuresOK), state.driverFeatures.contains(.ringReset) else { return }
        if state.queues[index].isReady { stopQueue(index, &state) }
        state.queues[index] = QueueConfiguration(index: index, maximumSize: state.queues[index].maximumSize)
    }

    private func stopQueue(_ index: Int, _ state: inout State) {
        state.queues[index].isReady = false
        if state.isLive { device.stopQueue(index) }
    }

    // MARK: Helpers

    private func isConfigurationAccess(_ offset: UInt64, _ size: Int) -> Bool {
        [1, 2, 4, 8].contains(size) && offset % UInt64(size) == 0 && offset < Self.span
    }

    private func setLow(_ address: inout GuestAddress, _ value: UInt32) {
        address = GuestAddress(address.rawValue & ~0xffff_ffff | UInt64(value))
    }

    private func setHigh(_ address: inout GuestAddress, _ value: UInt32) {
        address = GuestAddress(address.rawValue & 0xffff_ffff | UInt64(value) << 32)
    }
}

/// Offsets of the registers (virtio 1.2 §4.2.2).
private enum Register {
    static let magicValue: UInt64 = 0x000
    static let version: UInt64 = 0x004
    static let deviceID: UInt64 = 0x008
    static let vendorID: UInt64 = 0x00c
    static let deviceFeatures: UInt64 = 0x010
    static let deviceFeaturesSel: UInt64 = 0x014
    static let driverFeatures: UInt64 = 0x020
    static let driverFeaturesSel: UInt64 = 0x024
    static let queueSel: UInt64 = 0x030
    static let queueNumMax: UInt64 = 0x034
    static let queueNum: UInt64 = 0x038
    static let queueReady: UInt64 = 0x044
    static let queueNotify = MMIOTransport.queueNotifyOffset
    static let interruptStatus: UInt64 = 0x060
    static let interruptACK: UInt64 = 0x064
    static let status: UInt64 = 0x070
    static let queueDescLow: UInt64 = 0x080
    static let queueDescHigh: UInt64 = 0x084
    static let queueDriverLow: UInt64 = 0x090
    static let queueDriverHigh: UInt64 = 0x094
    static let queueDeviceLow: UInt64 = 0x0a0
    static let queueDeviceHigh: UInt64 = 0x0a4
    /// SHMLenLow, SHMLenHigh, SHMBaseLow and SHMBaseHigh; SHMSel is 0x0ac.
    static let sharedMemory: ClosedRange<UInt64> = 0x0b0...0x0bc
    static let queueReset: UInt64 = 0x0c0
    static let configGeneration: UInt64 = 0x0fc
    static let configuration: UInt64 = 0x100
}

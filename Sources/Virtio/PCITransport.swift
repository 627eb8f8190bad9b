// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import Linux
public import PCI
internal import Synchronization

/// A virtio device as a PCI function (virtio 1.2 §4.1), in front of a ``VirtioFunction``: modern only, one BAR for all
/// structures, MSI-X with a vector for each queue and one for the configuration, and INTA# for drivers without MSI-X.
///
/// The data path does not come here: a write to a queue's address for notifications signals its doorbell (ioeventfd),
/// wherever the guest has the BAR, and each queue and the configuration have an irqfd that the ``MSIXTable`` connects
/// to the vector's route.
///
/// Fields of the common configuration are accessed with their own width, 64-bit ones also by halves; others read as all
/// ones and write nothing.
public final class PCITransport: Sendable {
    /// The structures in BAR 0, each in pages of its own.
    public enum Region {
        static let common: UInt64 = 0x0000
        static let status: UInt64 = 0x1000
        static let device: UInt64 = 0x2000
        public static let notifications: UInt64 = 0x3000
        static let messages: UInt64 = 0x4000
        static let pendingBits: UInt64 = 0x5000
        /// Bytes of each.
        static let span: UInt64 = 0x1000
    }

    /// Bytes of BAR 0.
    public static let barSize: UInt64 = 0x8000
    /// Bytes from one queue's address for notifications to the next one's.
    public static let notificationStride: UInt64 = 4
    /// The most vectors that there is room for.
    private static let maximumVectors = Int(Region.span) / MSIXTable.entrySize

    public let function: VirtioFunction
    /// One for each queue, then the configuration's.
    let sources: [IRQFD]
    let messages: MSIXTable
    let pin: InterruptPin
    private let platform: any PCIPlatform
    private let selectors = Selectors()
    private let configuration: Guarded<PCIConfigurationSpace>
    /// Where BAR 0 is decoded, and doorbells are connected.
    private let place = Guarded<UInt64?>(nil)
    private let capabilities: Capabilities

    /// Offsets of the capabilities that do something.
    private struct Capabilities {
        /// VIRTIO_PCI_CAP_PCI_CFG.
        let window: Int
        let messages: Int
    }

    /// What the transport has besides the function: what a driver has selected.
    private final class Selectors: Sendable {
        let deviceFeatures = Atomic<UInt32>(0)
        let driverFeatures = Atomic<UInt32>(0)
        let queue = Atomic<UInt32>(0)

        func reset() {
            deviceFeatures.store(0, ordering: .relaxed)
            driverFeatures.store(0, ordering: .relaxed)
            queue.store(0, ordering: .relaxed)
        }
    }

    /// - Parameters:
    ///   - platform: connects this function, and no other.
    ///   - address: where BAR 0 is as after power-on, a multiple of ``barSize``.
    ///   - queues: the kind of queues to offer.
    public init(
        device: any VirtioDevice, memory: GuestMemory, platform: any PCIPlatform, address: UInt64,
        queues: VirtqueueFormat = .split
    ) throws(SystemCallError) {
        let count = device.maximumQueueSizes.count, events = device.deviceEvents
        var sources: [IRQFD] = []
        for _ in 0...count { sources.append(try IRQFD()) }
        let messages = MSIXTable(count: min(count + 1, Self.maximumVectors), sources: sources, platform: platform) {
            events.report(.refusedConnection(0), .error, "an interrupt is missing: \($0)")
        }
        let pin = InterruptPin { platform.setInterruptPin($0) }
        let counters = DeviceCounters(), selectors = selectors
        function = try VirtioFunction(
            device, memory: memory,
            interrupts: DeviceInterrupts(
                configuration: ConfigurationInterrupt(sources[count], status: nil, pin: pin, counters: counters),
                queues: sources.dropLast().map { QueueInterrupt($0, status: nil, pin: pin, counters: counters) }),
            counters: counters, queues: queues,
            resetTransport: {
                selectors.reset()
                messages.unassignAll()
                pin.reset()
            })
        self.sources = sources
        self.messages = messages
        self.pin = pin
        self.platform = platform
        let (space, capabilities) = Self.makeConfiguration(device, vectors: messages.count, address: address)
        configuration = Guarded(space)
        self.capabilities = capabilities
    }

    /// Ends all connections; the function leaves the machine, and its bridge has forgotten it.
    public func disconnect() {
        messages.disconnectAll()
        pin.reset()
        place([])
    }

    private static func makeConfiguration(
        _ device: any VirtioDevice, vectors: Int, address: UInt64
    ) -> (PCIConfigurationSpace, Capabilities) {
        let identifier = 0x1040 + UInt16(truncatingIfNeeded: device.deviceID)
        var space = PCIConfigurationSpace(
            PCIConfigurationSpace.Identity(
                vendor: 0x1af4, device: identifier, revision: 1, classCode: classCode(device.deviceID),
                subsystemVendor: 0x1af4, subsystem: identifier))
        space.addBAR(0, size: barSize, is64Bit: true, address: address)
        space.setInterruptPin()
        /// A structure's place (§4.1.4), without the identifier and the pointer.
        func structure(_ type: UInt8, _ offset: UInt64, _ length: UInt64, _ more: [UInt8] = []) -> [UInt8] {
            [UInt8(16 + more.count), type, 0, 0, 0, 0] + bytes(UInt32(offset)) + bytes(UInt32(length)) + more
        }
        func bytes(_ value: UInt32) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) } }
        let queues = UInt64(device.maximumQueueSizes.count)
        _ = space.addCapability(0x09, structure(1, Region.common, 60))
        _ = space.addCapability(
            0x09,
            structure(2, Region.notifications, max(4, queues * notificationStride), bytes(UInt32(notificationStride))))
        _ = space.addCapability(0x09, structure(3, Region.status, 1))
        if device.configuration.count > 0 {
            _ = space.addCapability(0x09, structure(4, Region.device, UInt64(device.configuration.count)))
        }
        // The BAR, offset and length that a driver chooses, and the data.
        let window = space.addCapability(
            0x09, structure(5, 0, 0, [0, 0, 0, 0]),
            writable: [0, 0, 0xff, 0, 0, 0] + [UInt8](repeating: 0xff, count: 12))
        let messages = space.addCapability(
            0x11,
            Array(bytes(UInt32(vectors - 1)).prefix(2)) + bytes(UInt32(Region.messages))
                + bytes(UInt32(Region.pendingBits)),
            writable: [0, 0xc0])
        space.addExpressCapability()
        return (space, Capabilities(window: window, messages: messages))
    }

    /// Base class, subclass and interface by the device type.
    private static func classCode(_ deviceID: UInt32) -> UInt32 {
        switch deviceID {
        case 1: 0x02_0000
        case 2: 0x01_8000
        case 3: 0x07_8000
        default: 0xff_0000
        }
    }
}

// MARK: Configuration space

extension PCITransport: PCIFunction {
    public var name: String { function.device.name }

    public var placements: [PCIConfigurationSpace.Placement] { configuration.withLock { $0.placements } }

    public func place(_ placements: [PCIConfigurationSpace.Placement]) {
        let new = placements.first { $0.bar == 0 }?.range.lowerBound
        place.withLock { place in
            guard new != place else { return }
            for (queue, doorbell) in function.doorbells.enumerated() {
                if let place { platform.disconnectDoorbell(doorbell.event, at: Self.address(ofQueue: queue, place)) }
            }
            place = new
            guard let new else { return }
            for (queue, doorbell) in function.doorbells.enumerated() {
                // Without it a notification is an exit to user space, but still arrives.
                do throws(PCIRefusal) {
                    try platform.connectDoorbell(doorbell.event, at: Self.address(ofQueue: queue, new))
                } catch {
                    function.device.deviceEvents.report(
                        .refusedConnection(1), .warning, "notifications of queue \(queue) are slow: \(error)")
                }
            }
        }
    }

    private static func address(ofQueue queue: Int, _ place: UInt64) -> UInt64 {
        place &+ Region.notifications &+ UInt64(queue) &* notificationStride
    }

    public func readConfiguration(at offset: Int, size: Int) -> UInt32 {
        if reachesWindow(offset, size) { readThroughWindow() }
        let value = configuration.withLock { $0.read(at: offset, size: size) }
        // Interrupt Status of the status register.
        guard offset <= 6, offset + size > 6, pin.isPending else { return value }
        return value | 1 << UInt32(3 + 8 * (6 - offset))
    }

    public func writeConfiguration(_ value: UInt32, at offset: Int, size: Int) {
        configuration.withLock { space in
            space.write(value, at: offset, size: size)
            let command = space.command, control = space.read(at: capabilities.messages + 2, size: 2)
            var messages = MSIXTable.Control()
            messages.isEnabled = control & 1 << 15 != 0
            messages.isMasked = control & 1 << 14 != 0
            messages.isBusMaster = command.contains(.busMaster)
            // Under the lock: the last write counts, for them as well.
            pin.configure(usesMessages: messages.isEnabled, isDisabled: command.contains(.interruptDisable))
            self.messages.setControl(messages)
        }
        if reachesWindow(offset, size) { writeThroughWindow() }
    }

    // MARK: The window into the BAR (§4.1.4.9)

    private func reachesWindow(_ offset: Int, _ size: Int) -> Bool {
        offset < capabilities.window + 20 && offset + size > capabilities.window + 16
    }

    /// What the window's fields say, if an access is possible.
    private func windowAccess(_ space: PCIConfigurationSpace) -> (offset: UInt64, size: Int)? {
        let bar = space.read(at: capabilities.window + 4, size: 1),
            offset = space.read(at: capabilities.window + 8, size: 4)
        let size = space.read(at: capabilities.window + 12, size: 4)
        guard bar == 0, size == 1 || size == 2 || size == 4, offset % size == 0, UInt64(offset) < Self.barSize else {
            return nil
        }
        return (UInt64(offset), Int(size))
    }

    // The access itself is outside of the lock: it may be a reset, which waits for the device.

    private func readThroughWindow() {
        guard let access = configuration.withLock({ windowAccess($0) }) else { return }
        let value = readBAR(0, at: access.offset, size: access.size)
        configuration.withLock {
            $0.store(UInt32(truncatingIfNeeded: value), at: capabilities.window + 16, size: access.size)
        }
    }

    private func writeThroughWindow() {
        let access = configuration.withLock { space in
            windowAccess(space).map { ($0.offset, $0.size, space.read(at: capabilities.window + 16, size: 4)) }
        }
        guard let (offset, size, value) = access else { return }
        writeBAR(0, UInt64(value) & allOnes(size: size), at: offset, size: size)
    }

    // MARK: BAR 0

    public func readBAR(_ bar: Int, at offset: UInt64, size: Int) -> UInt64 {
        guard bar == 0 else { return allOnes(size: size) }
        let inside = offset & (Region.span - 1)
        switch offset & ~(Region.span - 1) {
        case Region.common: return readCommon(Field(inside, size)) & allOnes(size: size)
        case Region.status where inside == 0 && size <= 4: return UInt64(pin.takeStatus())
        case Region.device: return function.readConfiguration(at: inside, size: size)
        case Region.messages: return messages.readTable(at: inside, size: size)
        case Region.pendingBits: return messages.readPendingBits(at: inside, size: size)
        default: return allOnes(size: size)
        }
    }

    public func writeBAR(_ bar: Int, _ value: UInt64, at offset: UInt64, size: Int) {
        guard bar == 0 else { return }
        let inside = offset & (Region.span - 1)
        switch offset & ~(Region.span - 1) {
        case Region.common: writeCommon(value, Field(inside, size))
        case Region.device: function.writeConfiguration(value, at: inside, size: size)
        // A notification that no ioeventfd has caught; the address says which queue it is for.
        case Region.notifications where inside % Self.notificationStride == 0:
            function.kick(queue: inside / Self.notificationStride)
        case Region.messages: messages.writeTable(value, at: inside, size: size)
        default: break
        }
    }
}

// MARK: Common configuration

/// A field of the common configuration (virtio 1.2 §4.1.4.3): offset and width.
private struct Field: Equatable {
    let offset: UInt64
    let size: Int

    init(_ offset: UInt64, _ size: Int) { (self.offset, self.size) = (offset, size) }

    static let deviceFeatureSelect = Field(0, 4)
    static let deviceFeature = Field(4, 4)
    static let driverFeatureSelect = Field(8, 4)
    static let driverFeature = Field(12, 4)
    static let configurationVector = Field(16, 2)
    static let queueCount = Field(18, 2)
    static let deviceStatus = Field(20, 1)
    static let configurationGeneration = Field(21, 1)
    static let queueSelect = Field(22, 2)
    static let queueSize = Field(24, 2)
    static let queueVector = Field(26, 2)
    static let queueEnable = Field(28, 2)
    static let queueNotifyOffset = Field(30, 2)
    static let queueNotifyData = Field(56, 2)
    static let queueReset = Field(58, 2)

    /// The part of an address that an access is to, if it is to one: the rings' fields follow each other from 32 to 56.
    var ring: (index: UInt64, part: Part)? {
        guard offset >= 32, offset < 56 else { return nil }
        let part: Part? =
            switch (offset % 8, size) {
            case (0, 8): .whole
            case (0, 4): .low
            case (4, 4): .high
            default: nil
            }
        return part.map { ((offset - 32) / 8, $0) }
    }

    enum Part { case whole, low, high }
}

extension PCITransport {
    private var selectedQueue: UInt32 { selectors.queue.load(ordering: .relaxed) }
    /// The source of the selected queue's interrupt; nil when there is no such queue.
    private var selectedSource: Int? { selectedQueue < UInt32(sources.count - 1) ? Int(selectedQueue) : nil }

    private func readCommon(_ field: Field) -> UInt64 {
        switch field {
        case .deviceFeatureSelect: UInt64(selectors.deviceFeatures.load(ordering: .relaxed))
        case .deviceFeature: UInt64(function.offered[word: selectors.deviceFeatures.load(ordering: .relaxed)])
        case .driverFeatureSelect: UInt64(selectors.driverFeatures.load(ordering: .relaxed))
        case .driverFeature: UInt64(function.driverFeatures(word: selectors.driverFeatures.load(ordering: .relaxed)))
        case .configurationVector: UInt64(messages.vector(of: sources.count - 1))
        case .queueCount: UInt64(sources.count - 1)
        case .deviceStatus: UInt64(function.status.rawValue)
        case .configurationGeneration: UInt64(function.configurationGeneration)
        case .queueSelect: UInt64(selectedQueue)
        default: readQueue(field)
        }
    }

    private func readQueue(_ field: Field) -> UInt64 {
        let queue = function.queue(selectedQueue)
        switch field {
        case .queueSize: return queue.map { UInt64($0.size) } ?? 0
        case .queueVector: return UInt64(selectedSource.map(messages.vector(of:)) ?? MSIXTable.noVector)
        case .queueEnable: return queue?.isReady == true ? 1 : 0
        case .queueNotifyOffset: return UInt64(selectedQueue)
        // The first says nothing without VIRTIO_F_NOTIF_CONFIG_DATA. A reset has happened before the write that asks
        // for it returns.
        case .queueNotifyData, .queueReset: return 0
        default: break
        }
        guard let (index, part) = field.ring else { return .max }
        let rings = [queue?.descriptorTable, queue?.availableRing, queue?.usedRing]
        return (rings[Int(index)]?.rawValue ?? 0) >> (part == .high ? 32 : 0)
    }

    private func writeCommon(_ value: UInt64, _ field: Field) {
        let bits = UInt32(truncatingIfNeeded: value)
        switch field {
        case .deviceFeatureSelect: selectors.deviceFeatures.store(bits, ordering: .relaxed)
        case .driverFeatureSelect: selectors.driverFeatures.store(bits, ordering: .relaxed)
        case .driverFeature:
            function.setDriverFeatures(word: selectors.driverFeatures.load(ordering: .relaxed), to: bits)
        case .configurationVector: messages.assign(UInt16(truncatingIfNeeded: bits), to: sources.count - 1)
        case .deviceStatus: function.writeStatus(bits)
        case .queueSelect: selectors.queue.store(bits, ordering: .relaxed)
        case .queueSize: function.configureQueue(selectedQueue) { $0.size = bits }
        case .queueVector:
            if let source = selectedSource { messages.assign(UInt16(truncatingIfNeeded: bits), to: source) }
        case .queueEnable where bits == 1: function.enableQueue(selectedQueue)
        case .queueReset where bits == 1: function.resetQueue(selectedQueue)
        default: writeRing(value, field)
        }
    }

    private func writeRing(_ value: UInt64, _ field: Field) {
        guard let (index, part) = field.ring else { return }
        function.configureQueue(selectedQueue) { queue in
            switch index {
            case 0: queue.descriptorTable.set(part, value)
            case 1: queue.availableRing.set(part, value)
            default: queue.usedRing.set(part, value)
            }
        }
    }
}

extension GuestAddress {
    fileprivate mutating func set(_ part: Field.Part, _ value: UInt64) {
        switch part {
        case .whole: self = GuestAddress(value)
        case .low: setLow(UInt32(truncatingIfNeeded: value))
        case .high: setHigh(UInt32(truncatingIfNeeded: value))
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import Linux
internal import Synchronization

/// The register file of a virtio-mmio device, layout version 2 (virtio 1.2 §4.2.2), in front of a ``VirtioFunction``.
///
/// vCPU threads call ``read(at:size:)`` and ``write(_:at:size:)``. The data path does not come here: kicks go through
/// ioeventfds to the device's I/O thread, interrupts through the irqfd. What the transport itself keeps, the selectors
/// and the interrupt status, is atomic, so that no CPU waits for another's reset there.
///
/// Accesses below the configuration space are 32 bits wide and aligned; others read as all ones and write nothing.
/// Only a kick may have any width.
public final class MMIOTransport: Sendable {
    /// Bytes of guest-physical address space.
    public static let span: UInt64 = 0x1000
    /// The offset of `QueueNotify`, for ioeventfds of 4 bytes with the queue's number as datamatch.
    public static let queueNotifyOffset: UInt64 = 0x050

    public let function: VirtioFunction
    /// The device's one interrupt line, for the machine to assign to a GSI.
    ///
    /// All interrupts share it, and with it one eventfd. Two of them on one edge-triggered pin would not do: KVM raises
    /// and lowers the pin for each on a thread of its own, and an edge that comes while the other has the pin raised is
    /// none.
    public let irqfd: IRQFD

    private let registers = Registers()

    /// - Parameter queues: the kind of queues to offer.
    public init(
        device: any VirtioDevice, memory: GuestMemory, queues: VirtqueueFormat = .split
    ) throws(SystemCallError) {
        let (irqfd, registers, counters) = (try IRQFD(), registers, DeviceCounters())
        let status = registers.interruptStatus
        self.irqfd = irqfd
        function = try VirtioFunction(
            device, memory: memory,
            interrupts: DeviceInterrupts(
                configuration: ConfigurationInterrupt(irqfd, status: status, counters: counters),
                queues: device.maximumQueueSizes.map { _ in QueueInterrupt(irqfd, status: status, counters: counters) }),
            counters: counters, queues: queues, resetTransport: { registers.reset() })
    }

    /// What the transport has besides the function.
    private final class Registers: Sendable {
        let interruptStatus = InterruptStatus()
        let deviceFeaturesSelect = Atomic<UInt32>(0)
        let driverFeaturesSelect = Atomic<UInt32>(0)
        let queueSelect = Atomic<UInt32>(0)

        func reset() {
            interruptStatus.reset()
            deviceFeaturesSelect.store(0, ordering: .relaxed)
            driverFeaturesSelect.store(0, ordering: .relaxed)
            queueSelect.store(0, ordering: .relaxed)
        }
    }

    private var selectedQueue: UInt32 { registers.queueSelect.load(ordering: .relaxed) }

    // MARK: Reading

    /// A guest's read. Bits above `size` bytes are zero.
    /// - Parameters:
    ///   - offset: bytes from the device's base address.
    ///   - size: 1, 2, 4 or 8.
    public func read(at offset: UInt64, size: Int) -> UInt64 {
        if offset >= Register.configuration {
            guard offset < Self.span else { return allOnes(size: size) }
            return function.readConfiguration(at: offset - Register.configuration, size: size)
        }
        guard size == 4, offset % 4 == 0 else { return allOnes(size: size) }
        return UInt64(readRegister(offset))
    }

    private func readRegister(_ offset: UInt64) -> UInt32 {
        switch offset {
        case Register.magicValue: 0x7472_6976  // "virt"
        case Register.version: 2
        case Register.deviceID: function.device.deviceID
        case Register.vendorID: 0x4d56_4b53  // "SKVM"
        case Register.deviceFeatures: function.offered[word: registers.deviceFeaturesSelect.load(ordering: .relaxed)]
        case Register.queueNumMax: function.queue(selectedQueue).map { UInt32($0.maximumSize) } ?? 0
        case Register.queueReady: function.queue(selectedQueue)?.isReady == true ? 1 : 0
        // A reset has happened before the write that asks for it returns.
        case Register.queueReset: 0
        case Register.interruptStatus: registers.interruptStatus.value
        case Register.status: function.status.rawValue
        case Register.configGeneration: function.configurationGeneration
        // Shared memory of a length of −1: there is none (§4.2.2). All else that is not there reads the same.
        default: .max
        }
    }

    // MARK: Writing

    /// A guest's write.
    public func write(_ value: UInt64, at offset: UInt64, size: Int) {
        // A kick that no ioeventfd has caught: an odd width, or a machine without them.
        if offset == Register.queueNotify { return function.kick(queue: value & allOnes(size: size)) }
        if offset >= Register.configuration {
            guard offset < Self.span else { return }
            return function.writeConfiguration(value, at: offset - Register.configuration, size: size)
        }
        guard size == 4, offset % 4 == 0 else { return }
        writeRegister(UInt32(truncatingIfNeeded: value), at: offset)
    }

    private func writeRegister(_ value: UInt32, at offset: UInt64) {
        switch offset {
        case Register.deviceFeaturesSel: registers.deviceFeaturesSelect.store(value, ordering: .relaxed)
        case Register.driverFeaturesSel: registers.driverFeaturesSelect.store(value, ordering: .relaxed)
        case Register.queueSel: registers.queueSelect.store(value, ordering: .relaxed)
        case Register.driverFeatures:
            function.setDriverFeatures(word: registers.driverFeaturesSelect.load(ordering: .relaxed), to: value)
        case Register.interruptACK: registers.interruptStatus.acknowledge(value)
        case Register.status: function.writeStatus(value)
        case Register.queueReady where value == 1: function.enableQueue(selectedQueue)
        case Register.queueReady where value == 0: function.disableQueue(selectedQueue)
        case Register.queueReset where value == 1: function.resetQueue(selectedQueue)
        case Register.queueNum: function.configureQueue(selectedQueue) { $0.size = value }
        case Register.queueDescLow: function.configureQueue(selectedQueue) { $0.descriptorTable.setLow(value) }
        case Register.queueDescHigh: function.configureQueue(selectedQueue) { $0.descriptorTable.setHigh(value) }
        case Register.queueDriverLow: function.configureQueue(selectedQueue) { $0.availableRing.setLow(value) }
        case Register.queueDriverHigh: function.configureQueue(selectedQueue) { $0.availableRing.setHigh(value) }
        case Register.queueDeviceLow: function.configureQueue(selectedQueue) { $0.usedRing.setLow(value) }
        case Register.queueDeviceHigh: function.configureQueue(selectedQueue) { $0.usedRing.setHigh(value) }
        default: break
        }
    }
}

extension GuestAddress {
    /// Replaces the lower 32 bits, as a driver writes them.
    mutating func setLow(_ bits: UInt32) { self = GuestAddress(rawValue & ~0xffff_ffff | UInt64(bits)) }

    /// Replaces the upper 32 bits.
    mutating func setHigh(_ bits: UInt32) { self = GuestAddress(rawValue & 0xffff_ffff | UInt64(bits) << 32) }
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
    static let queueReset: UInt64 = 0x0c0
    static let configGeneration: UInt64 = 0x0fc
    static let configuration: UInt64 = 0x100
}

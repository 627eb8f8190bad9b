// SPDX-License-Identifier: Apache-2.0

import Linux
import Testing

@testable import GuestMemory
@testable import Virtio

/// A transport as its driver uses it, for the tests that are about the function behind it (``VirtioFunctionTests``).
///
/// A new transport conforms to it and gets a case in ``TransportKind``: then all of them are about it, too.
protocol TransportHarness: Sendable {
    /// Puts a device behind the transport, as after power-on.
    init(device: any VirtioDevice, memory: GuestMemory, queues: VirtqueueFormat) throws
    var function: VirtioFunction { get }

    var deviceID: UInt32 { get }
    var status: UInt32 { get nonmutating set }
    func deviceFeatures(word: UInt32) -> UInt32
    func setDriverFeatures(word: UInt32, to bits: UInt32)

    /// 0 when there is no such queue.
    func maximumSize(ofQueue queue: UInt32) -> UInt32
    /// Writes the size and the places of the rings.
    func configure(queue: UInt32, as configuration: QueueConfiguration)
    func isReady(queue: UInt32) -> Bool
    func enable(queue: UInt32)
    /// False where a transport has no such thing (PCI's queue_enable takes no 0).
    func disable(queue: UInt32) -> Bool
    func reset(queue: UInt32)
    func kick(queue: UInt32)

    var configurationGeneration: UInt32 { get }
    func readConfiguration(at offset: UInt64, size: Int) -> UInt64
    func writeConfiguration(_ value: UInt64, at offset: UInt64, size: Int)

    /// Whether an interrupt has come since the last call that may be this queue's; takes it.
    func takeInterrupt(ofQueue queue: Int) -> Bool
    /// The same for a change of the configuration.
    func takeConfigurationInterrupt() -> Bool
}

enum TransportKind: String, CaseIterable, CustomTestStringConvertible, Sendable {
    /// The function alone.
    case none
    case mmio
    case pci

    var testDescription: String { rawValue }

    func make(
        _ device: any VirtioDevice, _ memory: GuestMemory, queues: VirtqueueFormat = .split
    ) throws -> any TransportHarness {
        switch self {
        case .none: try BareFunction(device: device, memory: memory, queues: queues)
        case .mmio: try MMIOTransport(device: device, memory: memory, queues: queues)
        case .pci: try PCIHarness(device: device, memory: memory, queues: queues)
        }
    }
}

/// What drivers do on any transport.
extension TransportHarness {
    /// Up to FEATURES_OK; returns what the status reads then.
    @discardableResult
    func negotiate(_ features: FeatureSet) -> UInt32 {
        for value: UInt32 in [0, 1, 3] { status = value }
        for word in 0..<FeatureSet.words { setDriverFeatures(word: word, to: features[word: word]) }
        status = 11
        return status
    }

    func setUp(_ queue: QueueConfiguration) {
        configure(queue: UInt32(queue.index), as: queue)
        enable(queue: UInt32(queue.index))
    }

    /// The whole way to DRIVER_OK.
    func bringUp(_ features: FeatureSet, _ queues: QueueConfiguration...) {
        negotiate(features)
        for queue in queues { setUp(queue) }
        status = 15
    }
}

/// No transport at all: the driver calls the function, and each interrupt has an irqfd of its own.
final class BareFunction: TransportHarness {
    let function: VirtioFunction

    init(device: any VirtioDevice, memory: GuestMemory, queues: VirtqueueFormat) throws {
        let counters = DeviceCounters()
        function = try VirtioFunction(
            device, memory: memory,
            interrupts: DeviceInterrupts(
                configuration: ConfigurationInterrupt(try IRQFD(), counters: counters),
                queues: try device.maximumQueueSizes.map { _ in QueueInterrupt(try IRQFD(), counters: counters) }),
            counters: counters, queues: queues, resetTransport: {})
    }

    var deviceID: UInt32 { function.device.deviceID }
    var status: UInt32 {
        get { function.status.rawValue }
        set { function.writeStatus(newValue) }
    }
    func deviceFeatures(word: UInt32) -> UInt32 { function.offered[word: word] }
    func setDriverFeatures(word: UInt32, to bits: UInt32) { function.setDriverFeatures(word: word, to: bits) }
    func maximumSize(ofQueue queue: UInt32) -> UInt32 { UInt32(function.queue(queue)?.maximumSize ?? 0) }
    func configure(queue: UInt32, as configuration: QueueConfiguration) {
        function.configureQueue(queue) {
            ($0.size, $0.descriptorTable) = (configuration.size, configuration.descriptorTable)
            ($0.availableRing, $0.usedRing) = (configuration.availableRing, configuration.usedRing)
            // Not theirs to change.
            $0.isReady = true
        }
    }
    func isReady(queue: UInt32) -> Bool { function.queue(queue)?.isReady ?? false }
    func enable(queue: UInt32) { function.enableQueue(queue) }
    func disable(queue: UInt32) -> Bool {
        function.disableQueue(queue)
        return true
    }
    func reset(queue: UInt32) { function.resetQueue(queue) }
    func kick(queue: UInt32) { function.kick(queue: UInt64(queue)) }
    var configurationGeneration: UInt32 { function.configurationGeneration }
    func readConfiguration(at offset: UInt64, size: Int) -> UInt64 {
        function.readConfiguration(at: offset, size: size)
    }
    func writeConfiguration(_ value: UInt64, at offset: UInt64, size: Int) {
        function.writeConfiguration(value, at: offset, size: size)
    }
    func takeInterrupt(ofQueue queue: Int) -> Bool { function.interrupts.queues[queue].irqfd.event.drain() > 0 }
    func takeConfigurationInterrupt() -> Bool { function.interrupts.configuration.irqfd.event.drain() > 0 }
}

/// The registers as a driver uses them (virtio 1.2 §4.2.2).
extension MMIOTransport: TransportHarness {
    func get(_ offset: UInt64) -> UInt32 { UInt32(read(at: offset, size: 4)) }
    func set(_ offset: UInt64, _ value: UInt32) { write(UInt64(value), at: offset, size: 4) }

    private func select(_ queue: UInt32) { set(0x30, queue) }

    var deviceID: UInt32 { self.get(0x08) }
    var status: UInt32 {
        get { self.get(0x70) }
        set { self.set(0x70, newValue) }
    }
    func deviceFeatures(word: UInt32) -> UInt32 {
        set(0x14, word)
        return self.get(0x10)
    }
    func setDriverFeatures(word: UInt32, to bits: UInt32) {
        set(0x24, word)
        set(0x20, bits)
    }
    func maximumSize(ofQueue queue: UInt32) -> UInt32 {
        select(queue)
        return self.get(0x34)
    }
    func configure(queue: UInt32, as configuration: QueueConfiguration) {
        select(queue)
        set(0x38, configuration.size)
        for (offset, address) in [
            (0x80, configuration.descriptorTable), (0x90, configuration.availableRing), (0xa0, configuration.usedRing),
        ] as [(UInt64, GuestAddress)] {
            set(offset, UInt32(truncatingIfNeeded: address.rawValue))
            set(offset + 4, UInt32(truncatingIfNeeded: address.rawValue >> 32))
        }
    }
    func isReady(queue: UInt32) -> Bool {
        select(queue)
        return self.get(0x44) == 1
    }
    func enable(queue: UInt32) {
        select(queue)
        set(0x44, 1)
    }
    func disable(queue: UInt32) -> Bool {
        select(queue)
        set(0x44, 0)
        return true
    }
    func reset(queue: UInt32) {
        select(queue)
        set(0xc0, 1)
        #expect(self.get(0xc0) == 0, "a reset that is under way")
    }
    func kick(queue: UInt32) { set(0x50, queue) }
    var configurationGeneration: UInt32 { self.get(0xfc) }
    func readConfiguration(at offset: UInt64, size: Int) -> UInt64 { read(at: 0x100 &+ offset, size: size) }
    func writeConfiguration(_ value: UInt64, at offset: UInt64, size: Int) {
        write(value, at: 0x100 &+ offset, size: size)
    }
    func takeInterrupt(ofQueue queue: Int) -> Bool { takeStatus(1) }
    func takeConfigurationInterrupt() -> Bool { takeStatus(2) }

    private func takeStatus(_ bit: UInt32) -> Bool {
        guard self.get(0x60) & bit != 0, irqfd.event.drain() > 0 else { return false }
        set(0x64, bit)
        // What else there is keeps its edge.
        if self.get(0x60) != 0 { irqfd.event.signal() }
        return true
    }
}

/// A device that only notes what is asked of it.
final class RecordingDevice: VirtioDevice {
    enum Event: Equatable {
        case activate(FeatureSet, ready: [Bool])
        case reset
        case stop(Int)
        case start(QueueConfiguration)
        case write(UInt64, offset: Int, size: Int)
    }

    static let wanted = FeatureSet(bit: 3), disliked = FeatureSet(bit: 50), high = FeatureSet(bit: 66),
        highest = FeatureSet(bit: 127)

    let name = "test0"
    let deviceID: UInt32 = 42
    let features: FeatureSet = [wanted, disliked, high, highest]
    let maximumQueueSizes: [UInt16] = [8, 256]
    let configuration = ConfigurationSpace([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99])
    private let recorded = Guarded<[Event]>([])
    private let lastActivation = Guarded<Activation?>(nil)
    private let lastFeatures = Guarded<FeatureSet?>(nil)

    var events: [Event] { recorded.withLock { $0 } }
    var activation: Activation? { lastActivation.withLock { $0 } }
    var negotiatedFeatures: FeatureSet? { lastFeatures.withLock { $0 } }

    func accepts(_ features: FeatureSet) -> Bool { !features.contains(Self.disliked) }
    func negotiated(_ features: FeatureSet) { lastFeatures.withLock { $0 = features } }
    func writeConfiguration(_ value: UInt64, at offset: Int, size: Int) {
        note(.write(value, offset: offset, size: size))
    }
    func activate(_ activation: Activation) {
        lastActivation.withLock { $0 = activation }
        note(.activate(activation.features, ready: activation.queues.map(\.isReady)))
    }
    func reset() { note(.reset) }
    func stopQueue(_ index: Int) { note(.stop(index)) }
    func startQueue(_ configuration: QueueConfiguration) { note(.start(configuration)) }
    func start(first: @escaping @Sendable () -> Void) {}
    func pause(onQuiet: @escaping @Sendable () -> Void) { onQuiet() }
    func resume() {}

    private func note(_ event: Event) { recorded.withLock { $0.append(event) } }
}

extension QueueConfiguration {
    /// The same queue of a device that would take a larger one.
    func with(maximumSize: UInt16) -> QueueConfiguration {
        var queue = QueueConfiguration(index: index, maximumSize: maximumSize)
        (queue.size, queue.isReady) = (size, isReady)
        (queue.descriptorTable, queue.availableRing, queue.usedRing) = (descriptorTable, availableRing, usedRing)
        return queue
    }
}

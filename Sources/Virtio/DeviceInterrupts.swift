// SPDX-License-Identifier: Apache-2.0

public import Linux
internal import Synchronization

/// A device's interrupts, which its transport makes: one for each queue, and one for changes of the configuration.
public struct DeviceInterrupts: Sendable {
    public let configuration: ConfigurationInterrupt
    /// One for each queue, in their order.
    public let queues: [QueueInterrupt]

    public init(configuration: ConfigurationInterrupt, queues: [QueueInterrupt]) {
        self.configuration = configuration
        self.queues = queues
    }
}

/// The interrupt of one queue: its used buffer notification (virtio 1.2 §2.3).
///
/// Lock-free, for any thread. What there is besides the irqfd, if anything, is the transport's affair.
public final class QueueInterrupt: Sendable {
    /// The queue's own, or one that it shares with others where the transport has a single line.
    public let irqfd: IRQFD
    private let status: InterruptStatus?
    private let pin: InterruptPin?
    private let counters: DeviceCounters

    public convenience init(_ irqfd: IRQFD, counters: DeviceCounters) {
        self.init(irqfd, status: nil, counters: counters)
    }

    /// - Parameters:
    ///   - status: the register that says why the line was raised, for a transport whose interrupts share one.
    ///   - pin: takes the interrupt in place of the irqfd while it is used, for a transport that has one.
    init(_ irqfd: IRQFD, status: InterruptStatus?, pin: InterruptPin? = nil, counters: DeviceCounters) {
        self.irqfd = irqfd
        self.status = status
        self.pin = pin
        self.counters = counters
    }

    /// Says that the queue has used buffers; after a ``Virtqueue/publish()`` that returned true.
    public func signal() {
        // The register first: the driver reads it when the interrupt has come.
        status?.raise(InterruptStatus.usedBuffers)
        counters.interrupts.add()
        if let pin, pin.raise(InterruptStatus.usedBuffers) { return }
        irqfd.event.signal()
    }
}

/// The interrupt that announces changes of a device's configuration (virtio 1.2 §2.3), and of its status to
/// DEVICE_NEEDS_RESET.
///
/// Lock-free, for any thread.
public final class ConfigurationInterrupt: Sendable {
    /// As ``QueueInterrupt/irqfd``.
    public let irqfd: IRQFD
    private let status: InterruptStatus?
    private let pin: InterruptPin?
    private let counters: DeviceCounters
    private let isBroken = Atomic<Bool>(false)

    public convenience init(_ irqfd: IRQFD, counters: DeviceCounters) {
        self.init(irqfd, status: nil, counters: counters)
    }

    /// - Parameters:
    ///   - status: as ``QueueInterrupt`` has it.
    ///   - pin: the same.
    init(_ irqfd: IRQFD, status: InterruptStatus?, pin: InterruptPin? = nil, counters: DeviceCounters) {
        self.irqfd = irqfd
        self.status = status
        self.pin = pin
        self.counters = counters
    }

    /// Says that the configuration space has changed.
    public func signal() {
        status?.raise(InterruptStatus.configurationChange)
        counters.interrupts.add()
        if let pin, pin.raise(InterruptStatus.configurationChange) { return }
        irqfd.event.signal()
    }

    /// Sets DEVICE_NEEDS_RESET and notifies the driver by a configuration change (§2.1.2). Until the reset the device
    /// does nothing more.
    public func markNeedsReset() {
        isBroken.store(true, ordering: .releasing)
        signal()
    }

    /// Indicates whether ``markNeedsReset()`` was called since the last reset.
    public var needsReset: Bool { isBroken.load(ordering: .acquiring) }

    /// Back to the state after reset; the device is quiet.
    func reset() { isBroken.store(false, ordering: .releasing) }
}

/// A register that shows which interrupts raised a shared line: InterruptStatus of MMIO (virtio 1.2 §4.2.2). The bits
/// are those of PCI's ISR status, too.
///
/// The device raises bits, the driver alone clears them, or a reset does. Lock-free, for any thread.
final class InterruptStatus: Sendable {
    static let usedBuffers: UInt32 = 1
    static let configurationChange: UInt32 = 2

    private let bits = Atomic<UInt32>(0)

    var value: UInt32 { bits.load(ordering: .acquiring) }

    func raise(_ bit: UInt32) { bits.bitwiseOr(bit, ordering: .acquiringAndReleasing) }

    /// A write to InterruptACK.
    func acknowledge(_ acknowledged: UInt32) { bits.bitwiseAnd(~acknowledged, ordering: .acquiringAndReleasing) }

    /// Back to the state after reset; the device is quiet.
    func reset() { bits.store(0, ordering: .releasing) }
}

// SPDX-License-Identifier: Apache-2.0

public import Linux
internal import Synchronization

/// What a device has done, for a status line and for tests. Any thread may read it.
public final class DeviceCounters: Sendable {
    /// One figure; a single addition, no order with anything else.
    public struct Counter: ~Copyable, Sendable {
        private let count = Atomic<UInt64>(0)
        public init() {}
        public func add(_ more: UInt64 = 1) { count.wrappingAdd(more, ordering: .relaxed) }
        public var value: UInt64 { count.load(ordering: .relaxed) }
    }

    /// Kicks that the I/O thread has seen, however they came; several may have been seen as one event.
    public let kicks = Counter()
    /// Kicks that came by an exit to user space instead of an ioeventfd.
    public let exitKicks = Counter()
    /// Interrupts raised.
    public let interrupts = Counter()
    /// Requests finished; the device counts them.
    public let requests = Counter()
    /// Requests that failed, and rules that the driver broke.
    public let errors = Counter()

    public init() {}
}

/// The doorbell of one queue: an eventfd that exists as long as the device, so that a kick before activation is kept in it.
///
/// The machine assigns it to writes of the queue's number to `QueueNotify` (ioeventfd); the transport signals it for
/// writes that reach user space.
public final class Doorbell: Sendable {
    public let event: EventFD
    init() throws(SystemCallError) { event = try EventFD() }
}

/// A device's interrupt: the status register (virtio 1.2 §4.2.2, InterruptStatus) and the irqfd behind it.
///
/// The I/O thread raises bits, the driver alone clears them (or a reset does). Lock-free, for any thread.
public final class DeviceInterrupt: Sendable {
    /// The line's eventfd, which the machine binds to the device's GSI (irqfd).
    public let line: EventFD
    private let counters: DeviceCounters
    private let raised = Atomic<UInt32>(0)
    private let isBroken = Atomic<Bool>(false)

    init(counters: DeviceCounters) throws(SystemCallError) {
        line = try EventFD()
        self.counters = counters
    }

    /// Says that a queue has used buffers; after a ``Virtqueue/publish()`` that returned true.
    public func signal() { raise(1) }

    /// Says that the configuration space has changed.
    public func configurationChanged() { raise(2) }

    /// Sets DEVICE_NEEDS_RESET and tells the driver by a configuration change (§2.1.2). Until the reset the device
    /// does nothing more.
    public func markNeedsReset() {
        isBroken.store(true, ordering: .releasing)
        configurationChanged()
    }

    /// Whether ``markNeedsReset()`` was called since the last reset.
    public var needsReset: Bool { isBroken.load(ordering: .acquiring) }

    /// The value of InterruptStatus: 1 used buffers, 2 configuration change.
    var status: UInt32 { raised.load(ordering: .acquiring) }

    /// A write to InterruptACK.
    func acknowledge(_ bits: UInt32) { raised.bitwiseAnd(~bits, ordering: .acquiringAndReleasing) }

    /// Back to the state after reset; the device is quiet.
    func reset() {
        raised.store(0, ordering: .releasing)
        isBroken.store(false, ordering: .releasing)
    }

    private func raise(_ bit: UInt32) {
        // The register first: the driver reads it when the line has rung.
        raised.bitwiseOr(bit, ordering: .acquiringAndReleasing)
        counters.interrupts.add()
        line.signal()
    }
}

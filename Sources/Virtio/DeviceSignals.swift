// SPDX-License-Identifier: Apache-2.0

public import Linux
internal import Synchronization

/// The counters of a device. Any thread may read them.
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

/// The doorbell of one queue: an eventfd that exists as long as the device, so that a kick before activation is kept in
/// it.
///
/// The machine assigns it to the transport's place for notifications (ioeventfd); the function signals it for
/// kicks that reach user space.
public final class Doorbell: Sendable {
    public let event: EventFD
    init() throws(SystemCallError) { event = try EventFD() }
}

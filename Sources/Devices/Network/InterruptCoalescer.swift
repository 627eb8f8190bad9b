// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization
internal import Virtio

/// How long an interrupt of a queue may be delayed, as the driver has set it (virtio 1.3 §5.1.6.5.11).
struct CoalescingParameters: Equatable, BitwiseCopyable {
    /// Packets after which a delayed interrupt is signalled immediately; 0 sets no limit.
    var packets: UInt32 = 0
    /// The longest delay; 0, as after a reset, delays nothing.
    var microseconds: UInt32 = 0

    static let none = CoalescingParameters()
}

/// The parameters of one queue. The thread that serves the control queue writes them, and the queue's thread reads
/// them.
final class QueueCoalescing: Sendable {
    /// Both in one word, so that they are never read half changed.
    private let word = Atomic<UInt64>(0)

    var parameters: CoalescingParameters {
        get {
            let word = word.load(ordering: .relaxed)
            return CoalescingParameters(
                packets: UInt32(truncatingIfNeeded: word >> 32), microseconds: UInt32(truncatingIfNeeded: word))
        }
        set { word.store(UInt64(newValue.packets) << 32 | UInt64(newValue.microseconds), ordering: .relaxed) }
    }
}

/// Delays the interrupts of one queue. It belongs to the queue's thread.
struct InterruptCoalescer: ~Copyable {
    /// Runs while an interrupt is delayed; for the thread's epoll instance.
    let timer: TimerFD
    private let settings: QueueCoalescing
    /// Packets since an interrupt was due for the first time, or since the last interrupt.
    private var packets: UInt64 = 0
    /// An interrupt is due, and delayed.
    private var isDelayed = false

    init(_ settings: QueueCoalescing) throws(SystemCallError) {
        timer = try TimerFD()
        self.settings = settings
    }

    /// Decides about the interrupt for packets that the driver can see now.
    /// - Parameter isWanted: whether the driver asked for an interrupt (``Virtqueue/publish()``). It asks once: later
    ///   packets belong to the same interrupt until it has come.
    /// - Returns: whether to signal it now.
    mutating func isDue(after count: Int, isWanted: Bool) -> Bool {
        let parameters = settings.parameters
        guard parameters.microseconds > 0 else {
            defer { endDelay() }
            return isWanted || isDelayed
        }
        guard isWanted || isDelayed else { return false }
        packets &+= UInt64(count)
        if parameters.packets > 0, packets >= UInt64(parameters.packets) {
            endDelay()
            return true
        }
        if !isDelayed { timer.start(microseconds: parameters.microseconds) }
        isDelayed = true
        return false
    }

    /// The timer's descriptor is readable.
    /// - Returns: whether to signal the interrupt. The timer may have run for one that did not wait for it.
    mutating func expire() -> Bool { timer.take() && flush() }

    /// Ends a delay.
    /// - Returns: whether there was one, so that the interrupt must be signalled.
    mutating func flush() -> Bool {
        defer { endDelay() }
        return isDelayed
    }

    /// Ends a delay. A timer that is still running is started again for the next delay, or expires without effect.
    private mutating func endDelay() {
        isDelayed = false
        packets = 0
    }
}

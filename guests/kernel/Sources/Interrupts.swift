// SPDX-License-Identifier: Apache-2.0

/// Interrupts in ring 3: ring 0 sets a bit for each; here the drivers' handlers are called for the bits, one after the
/// other, whenever the kernel waits. So a driver is never interrupted by another, and needs no lock.
final class Interrupts: @unchecked Sendable {
    private var handlers: [(() -> Void)?] = []
    /// How often each line's handler was called.
    private(set) var counts: [UInt64] = []
    /// Timer ticks per second.
    private(set) var timerFrequency: UInt64 = 1_000_000_000
    /// The time when the timer fires; 0 if it is off.
    private var armed: Nanoseconds = 0

    private let pending = Core.bootBlock + Core.pendingOffset
    private static let lines = 64

    /// Enables the boot processor's local APIC and measures the timer's frequency.
    func start() {
        for _ in 0..<Self.lines {
            handlers.append(nil)
            counts.append(0)
        }
        LocalAPIC.start()
        timerFrequency = Self.measureTimer()
    }

    /// The timer's ticks per second, or fewer: a timer that fires early is set again.
    private static func measureTimer() -> UInt64 {
        let span = milliseconds / 2
        var frequency: UInt64 = 1_000_000
        // Again if the host had no time for this CPU between the readings of a clock and the timer.
        for _ in 0..<10 {
            let before = clock.now
            LocalAPIC.setTimer(count: UInt32.max)
            let start = clock.now
            while clock.now - start < span { spinPause() }
            let end = clock.now
            let ticks = UInt64(UInt32.max - LocalAPIC.timerCount)
            let after = clock.now
            frequency = max(frequency, ticks * seconds / max(after - before, 1))
            if start - before + (after - end) < span / 4 { break }
        }
        LocalAPIC.setTimer(count: 0)
        return frequency
    }

    /// Calls `handler` for the interrupts of global interrupt `gsi`.
    func handle(gsi: UInt32, _ handler: @escaping () -> Void) {
        guard gsi < LocalAPIC.timerLine else { return }
        handlers[Int(gsi)] = handler
        IOAPIC.connect(gsi: gsi, line: Int(gsi), to: LocalAPIC.identifier)
    }

    /// Calls `handler` for the interrupts of an ISA line, with the firmware's mapping.
    func handle(isa line: Int, _ handler: @escaping () -> Void) { handle(gsi: acpi.isaInterrupts[line], handler) }

    /// Calls `handler` for a line that belongs to no device.
    func handle(line: Int, _ handler: (() -> Void)?) { handlers[line] = handler }

    /// Calls the handlers of pending interrupts.
    func dispatch() {
        guard pending.load() as UInt64 != 0 else { return }
        var bits = pending.exchange(0)
        while bits != 0 {
            let line = bits.trailingZeroBitCount
            bits &= bits - 1
            if line == LocalAPIC.timerLine { armed = 0 }
            counts[line] += 1
            handlers[line]?()
        }
    }

    /// Handles interrupts, and sleeps in between, until `condition` holds or `deadline` is reached. True if it holds.
    @discardableResult
    func wait(until deadline: Nanoseconds = .max, _ condition: () -> Bool) -> Bool {
        while true {
            dispatch()
            if condition() { return true }
            if deadline != .max {
                let now = clock.now
                if now >= deadline { return false }
                arm(deadline, now)
            }
            idle()
        }
    }

    /// Sets the timer for `deadline` unless it fires earlier already. It may fire early, never late.
    private func arm(_ deadline: Nanoseconds, _ now: Nanoseconds) {
        if armed > now && armed <= deadline { return }
        let span = min(deadline - now, seconds)
        let ticks = span * timerFrequency / seconds
        armed = now + span
        LocalAPIC.setTimer(count: UInt32(min(max(ticks, 1), UInt64(UInt32.max))))
    }

    /// Starts a timer interrupt `frequency` times per second, for the self-tests; 0 stops it.
    func setPeriodicTimer(frequency: UInt64) {
        armed = 0
        LocalAPIC.setTimer(
            count: frequency == 0 ? 0 : UInt32(min(timerFrequency / frequency, UInt64(UInt32.max))),
            periodic: frequency != 0)
    }

    /// One timer interrupt after `span`, for the self-tests.
    func setTimer(after span: Nanoseconds) {
        armed = 0
        LocalAPIC.setTimer(count: UInt32(min(max(span * timerFrequency / seconds, 1), UInt64(UInt32.max))))
    }
}

let interrupts = Interrupts()

// SPDX-License-Identifier: Apache-2.0

internal import GDBRemote
internal import KVM
internal import Linux
internal import Synchronization

/// The place where one vCPU's thread stops, with complete registers: for a debugger, and while the machine is paused.
///
/// A vCPU's state has one owner: its thread while it runs; the thread that requested the stop while it is stopped here.
/// The thread stops itself, and continues when no stop is requested any more: the reasons are independent of each
/// other.
final class PausePoint: Sendable {
    /// Who requests that the vCPU stops.
    struct Reasons: OptionSet, Sendable {
        let rawValue: UInt8
        static let debugger = Reasons(rawValue: 1)
        static let control = Reasons(rawValue: 2)
    }

    /// What a vCPU has stopped for by itself; only with a debugger.
    enum Event: Sendable {
        case debug(DebugEvent)
        /// The vCPU cannot continue, and the machine ends when it is resumed, unless the failure is forgiven.
        case failure(String, isEmulation: Bool)
    }

    private struct State {
        var reasons: Reasons
        var isStopped = false
        /// The thread is to take the address maps' tables of now.
        var needsReload = false
        var event: Event?
        var isForgiven = false

        var isIdle: Bool { reasons.isEmpty && !needsReload }
    }

    /// Indicates whether the machine has a debugger's address.
    let hasDebugger: Bool
    private let state: Guarded<State>
    /// There is a reason to stop, or to take other tables; what the thread checks between two runs of the guest.
    private let requested: Atomic<Bool>
    /// Signalled for the vCPU's thread when something may have changed.
    private let wakeup: EventFD
    /// Signalled when the vCPU has stopped: the control's, and the debugger's if there is one.
    private let observers: [StopObserver]

    /// - Parameters:
    ///   - control: signalled when the vCPU has stopped.
    ///   - debugger: the same, in a machine with a debugger's address.
    ///   - stopsFirst: the vCPU stops for the debugger before its first instruction.
    init(control: StopObserver, debugger: StopObserver? = nil, stopsFirst: Bool = false) throws(SystemCallError) {
        let reasons: Reasons = stopsFirst && debugger != nil ? .debugger : []
        state = Guarded(State(reasons: reasons))
        requested = Atomic(!reasons.isEmpty)
        wakeup = try EventFD()
        observers = [control] + (debugger.map { [$0] } ?? [])
        hasDebugger = debugger != nil
    }

    // MARK: The vCPU's thread

    /// Indicates whether the thread is to take other tables, or to stop as soon as the vCPU's registers are complete.
    var isRequested: Bool { requested.load(ordering: .acquiring) }

    /// Indicates whether the thread must take new tables; ``confirmReload()`` confirms that.
    var needsReload: Bool { state.withLock { $0.needsReload } }

    func confirmReload() {
        state.withLock { state in
            state.needsReload = false
            requested.store(!state.isIdle, ordering: .releasing)
        }
        for observer in observers { observer.event.signal() }
    }

    /// Stays for as long as anybody requests it, or until the machine ends.
    func stop(until isEnding: () -> Bool) {
        while !isEnding() {
            let stays = state.withLock { state in
                state.isStopped = !state.reasons.isEmpty
                return state.isStopped
            }
            guard stays else { return }
            for observer in observers { observer.event.signal() }
            wakeup.wait()
        }
    }

    /// Requests a stop for the debugger, with the reason.
    func report(_ event: Event) {
        state.withLock { state in
            state.event = event
            insert(.debugger, &state)
        }
    }

    /// Stops here because the vCPU cannot continue.
    /// - Returns: whether it can after all.
    func reportFailure(_ sentence: String, isEmulation: Bool, until isEnding: () -> Bool) -> Bool {
        report(.failure(sentence, isEmulation: isEmulation))
        stop(until: isEnding)
        return state.withLock { state in
            defer { state.isForgiven = false }
            return state.isForgiven
        }
    }

    // MARK: Who requests stops

    /// Requests a stop.
    /// - Returns: whether the thread has to be kicked: it is not stopped already.
    func request(_ reason: Reasons) -> Bool {
        state.withLock { state in
            insert(reason, &state)
            return !state.isStopped
        }
    }

    /// Withdraws a request. The thread owns the vCPU's state again, unless there is another one.
    func release(_ reason: Reasons) {
        state.withLock { state in
            state.reasons.remove(reason)
            guard state.reasons.isEmpty else { return }
            state.isStopped = false
            requested.store(!state.isIdle, ordering: .releasing)
        }
        wakeup.signal()
    }

    /// Requests that the thread takes the tables of now.
    /// - Returns: whether it has to be kicked: it is not stopped, where it has none.
    func requestReload() -> Bool {
        state.withLock { state in
            state.needsReload = true
            requested.store(true, ordering: .releasing)
            return !state.isStopped
        }
    }

    /// Indicates whether the thread uses no table from before ``requestReload()``.
    var isReloaded: Bool { state.withLock { !$0.needsReload || $0.isStopped } }

    var isStopped: Bool { state.withLock { $0.isStopped } }

    /// Indicates whether a stop is requested for this reason.
    func isRequested(for reason: Reasons) -> Bool { state.withLock { $0.reasons.contains(reason) } }

    private func insert(_ reason: Reasons, _ state: inout State) {
        state.reasons.insert(reason)
        requested.store(true, ordering: .releasing)
    }

    // MARK: The debugger's thread

    /// What the vCPU has stopped for, until it is taken.
    var event: Event? { state.withLock { $0.event } }

    func takeEvent() -> Event? {
        state.withLock { state in
            defer { state.event = nil }
            return state.event
        }
    }

    /// Takes what the vCPU has stopped for, which was no failure.
    func forgive() {
        state.withLock { state in
            state.event = nil
            state.isForgiven = true
        }
    }

    // MARK: Any thread

    /// Makes a stopped thread check whether the machine ends.
    func wake() { wakeup.signal() }
}

/// An eventfd that is signalled when a vCPU has stopped.
final class StopObserver: Sendable {
    let event: EventFD
    init() throws(SystemCallError) { event = try EventFD() }
}

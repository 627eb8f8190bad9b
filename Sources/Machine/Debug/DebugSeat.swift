// SPDX-License-Identifier: Apache-2.0

internal import GDBRemote
internal import KVM
internal import Linux

/// Where one vCPU's thread stops for a debugger.
///
/// A vCPU's state has one owner: its thread while it runs, the debugger's thread while it is parked here. The vCPU's thread parks
/// itself when it is wanted and the state is whole; the debugger's thread alone lets it go.
final class DebugSeat: Sendable {
    /// What a vCPU has stopped for.
    enum Event: Sendable {
        case debug(DebugEvent)
        /// The vCPU cannot go on, and the machine ends when it is let go, unless it is pardoned.
        case failure(String, isEmulation: Bool)
    }

    private struct State {
        var isWanted: Bool
        var isParked = false
        var event: Event?
        var isPardoned = false
    }

    private let state: Guarded<State>
    /// Rung for the vCPU's thread when something may have changed.
    private let bell: EventFD
    /// Rung for the debugger's thread when the vCPU has parked.
    private let parked: EventFD

    /// - Parameters:
    ///   - parked: a descriptor for the bell that all seats of a machine share.
    ///   - isWanted: the vCPU stops before its first instruction.
    init(parked: borrowing EventFD, isWanted: Bool = true) throws(SystemCallError) {
        state = Guarded(State(isWanted: isWanted))
        bell = try EventFD()
        self.parked = try parked.duplicate()
    }

    // MARK: The vCPU's thread

    /// Indicates whether the thread is to park as soon as its state is whole.
    var isWanted: Bool { state.withLock { $0.isWanted } }

    /// Stops here by itself.
    func report(_ event: Event) {
        state.withLock { state in
            state.event = event
            state.isWanted = true
        }
    }

    /// Stays for as long as it is wanted, or until the machine ends.
    func park(until isStopping: () -> Bool) {
        while !isStopping() {
            let stays = state.withLock { state in
                state.isParked = state.isWanted
                return state.isWanted
            }
            guard stays else { return }
            parked.signal()
            bell.wait()
        }
    }

    /// Stops here because the vCPU cannot go on.
    /// - Returns: whether it can after all.
    func reportFailure(_ sentence: String, isEmulation: Bool, until isStopping: () -> Bool) -> Bool {
        report(.failure(sentence, isEmulation: isEmulation))
        park(until: isStopping)
        return state.withLock { state in
            defer { state.isPardoned = false }
            return state.isPardoned
        }
    }

    // MARK: The debugger's thread

    /// Wants the vCPU to stop.
    /// - Returns: whether its thread has to be told.
    func stop() -> Bool {
        state.withLock { state in
            state.isWanted = true
            return !state.isParked
        }
    }

    var isParked: Bool { state.withLock { $0.isParked } }

    /// What it has stopped for, which stays until it is taken.
    var event: Event? { state.withLock { $0.event } }

    func takeEvent() -> Event? {
        state.withLock { state in
            defer { state.event = nil }
            return state.event
        }
    }

    /// Takes what it has stopped for, which was no failure.
    func pardon() {
        state.withLock { state in
            state.event = nil
            state.isPardoned = true
        }
    }

    /// Gives the vCPU's state back to its thread.
    func resume() {
        state.withLock { state in
            state.isWanted = false
            state.isParked = false
        }
        bell.signal()
    }

    // MARK: Any thread

    /// Makes a parked thread look whether the machine ends.
    func wake() { bell.signal() }
}

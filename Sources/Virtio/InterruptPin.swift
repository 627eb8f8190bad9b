// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Synchronization

/// The interrupt pin of a PCI function (INTA#) with the ISR status register that says why it is asserted (virtio 1.2
/// §4.1.4.5): for drivers that do not use MSI-X. It is asserted as long as the register is not 0, and reading it clears
/// it.
///
/// Any thread may call the methods.
final class InterruptPin: Sendable {
    private struct State {
        var status: UInt32 = 0
        var usesMessages = false
        /// By the command register.
        var isDisabled = false
        var isAsserted = false
    }

    private let state = Guarded(State())
    /// As in the state: what the data path checks first.
    private let usesMessages = Atomic<Bool>(false)
    private let assert: @Sendable (Bool) -> Void

    /// - Parameter assert: sets the line's level.
    init(assert: @escaping @Sendable (Bool) -> Void) { self.assert = assert }

    /// Sets a bit of the status, and with it the pin.
    /// - Returns: false when the function uses messages, and this has done nothing.
    func raise(_ bit: UInt32) -> Bool {
        guard !usesMessages.load(ordering: .acquiring) else { return false }
        return state.withLock { state in
            guard !state.usesMessages else { return false }
            state.status |= bit
            update(&state)
            return true
        }
    }

    /// A driver's read of the register.
    func takeStatus() -> UInt32 {
        state.withLock { state in
            let status = state.status
            state.status = 0
            update(&state)
            return status
        }
    }

    /// Interrupt Status of the PCI status register: an interrupt is pending, disabled or not.
    var isPending: Bool { state.withLock { $0.status != 0 && !$0.usesMessages } }

    func configure(usesMessages: Bool, isDisabled: Bool) {
        state.withLock { state in
            (state.usesMessages, state.isDisabled) = (usesMessages, isDisabled)
            self.usesMessages.store(usesMessages, ordering: .releasing)
            update(&state)
        }
    }

    /// Back to no interrupt; the device is quiet.
    func reset() { _ = takeStatus() }

    private func update(_ state: inout State) {
        let isAsserted = state.status != 0 && !state.usesMessages && !state.isDisabled
        guard isAsserted != state.isAsserted else { return }
        state.isAsserted = isAsserted
        assert(isAsserted)
    }
}

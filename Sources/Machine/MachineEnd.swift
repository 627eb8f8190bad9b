// SPDX-License-Identifier: Apache-2.0

public import KVM
internal import Devices

/// The end of a machine, with an exit status and a message.
public enum MachineEnd: Sendable {
    /// The guest powered off.
    case powerOff
    /// The guest reset itself.
    case reset
    /// The guest's own status, 0 … 63, through the exit device.
    case guestStatus(UInt8)
    /// A vCPU shut down.
    case tripleFault(cpu: UInt32, state: String)
    /// KVM could not continue a vCPU.
    case internalError(cpu: UInt32, InternalError, state: String)
    /// A vCPU returned with an exit that swkvm does not handle.
    case unexpectedExit(cpu: UInt32, name: String, state: String)
    /// A call of the host's failed under way.
    case hostError(String)
    /// The user ended it at the console.
    case quit
    /// A debugger ended it.
    case killed
    /// A signal ended it: the second one, after a first one that the guest did not follow.
    case signal(Int32)
    /// A signal ended it before there was a guest.
    case cancelled(Int32)
    /// The guest was asked to power off and had not done so after this many seconds.
    case stopTimeout(seconds: Int)

    /// The process's exit status (docs/platform.md says what a guest can choose).
    public var exitStatus: Int32 {
        switch self {
        case .powerOff: 0
        case .reset: ExitStatus.reset
        case .quit: ExitStatus.quit
        case .killed: ExitStatus.killed
        case .stopTimeout: ExitStatus.stopTimeout
        case .guestStatus(let status): Int32(status)
        case .tripleFault: ExitStatus.tripleFault
        case .internalError: ExitStatus.internalError
        case .unexpectedExit: ExitStatus.unexpectedExit
        case .hostError: ExitStatus.hostError
        case .signal(let number), .cancelled(let number): ExitStatus.signalBase + number
        }
    }

    /// Indicates whether the user ended it, and not the guest or a failure.
    var isForced: Bool {
        switch self {
        case .quit, .killed, .signal, .cancelled, .stopTimeout: true
        default: false
        }
    }

    /// Indicates whether a PC would boot again now.
    var isReset: Bool {
        switch self {
        case .reset, .tripleFault: true
        default: false
        }
    }

    /// Indicates whether the machine ends anyway when the guest has just reset itself.
    var overridesReset: Bool {
        if case .hostError = self { true } else { isForced }
    }

    /// Indicates whether a vCPU could not continue, so that its state is of interest.
    var isCrash: Bool {
        switch self {
        case .tripleFault, .internalError, .unexpectedExit: true
        default: false
        }
    }

    /// Indicates whether neither the guest nor the user ended it.
    public var isFailure: Bool { if case .hostError = self { true } else { isCrash } }

    /// Indicates whether KVM met an instruction that it cannot emulate.
    var isEmulationFailure: Bool {
        if case .internalError(_, let error, _) = self { error.isEmulation } else { false }
    }

    /// One sentence for the user; nil where the guest ended as guests do.
    public var sentence: String? {
        switch self {
        case .powerOff, .guestStatus(0): nil
        case .reset: "the guest rebooted (--on-reboot exit)"
        case .guestStatus(let status): "the guest ended with status \(status)"
        case .tripleFault(let cpu, _):
            "vCPU \(cpu) shut down (triple fault): the guest's kernel crashed before it could report, or reset itself that way"
        case .internalError(let cpu, let error, _): "KVM stopped vCPU \(cpu) with an internal error: \(error.reason)"
        case .unexpectedExit(let cpu, let name, _): "vCPU \(cpu) stopped with \(name), which swkvm does not handle"
        case .hostError(let text): text
        case .quit: "ended at the console"
        case .killed: "ended by the debugger"
        case .signal(let number): "ended by signal \(number) before the guest powered off"
        case .cancelled(let number): "ended by signal \(number) before the guest started"
        case .stopTimeout(let seconds): "ended: the guest did not power off within \(seconds) seconds (--stop-timeout)"
        }
    }

    /// Registers and instruction bytes, where they help; several lines.
    public var details: String? {
        switch self {
        case .internalError(_, _, let state), .unexpectedExit(_, _, let state): state
        case .tripleFault(_, let state):
            state + "\n  use `--gdb PORT` to debug the guest up to this point (docs/debugging.md)"
        default: nil
        }
    }
}

extension MachineEnd {
    init(_ request: MachineRequest) {
        switch request {
        case .powerOff: self = .powerOff
        case .reset: self = .reset
        case .exit(let status): self = .guestStatus(status)
        }
    }
}

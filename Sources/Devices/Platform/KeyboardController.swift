// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Platform

/// A keyboard controller (i8042) without a keyboard, at ``Ports/keyboardData`` and ``Ports/keyboardCommand``: it resets
/// the machine, and answers a driver's first questions so that it does not wait for the answers' time-outs.
public final class KeyboardController: ByteWideDevice {
    private enum Port { static let data: UInt16 = 0, command = Ports.keyboardCommand - Ports.keyboardData }
    private enum Status {
        static let outputFull: UInt8 = 1 << 0, systemFlag: UInt8 = 1 << 2, lastWasCommand: UInt8 = 1 << 3
    }

    private let state = Guarded(KeyboardState())
    private let request: @Sendable (MachineRequest) -> Void

    /// - Parameter request: called by the vCPU thread that requests the reset.
    public init(request: @escaping @Sendable (MachineRequest) -> Void) { self.request = request }

    func readByte(_ offset: UInt16) -> UInt8 {
        state.withLock { state in
            switch offset {
            case Port.data:
                defer { state.output = nil }
                return state.output ?? 0
            case Port.command:
                // Bit 1, input buffer full, is never set: a write takes effect immediately.
                return Status.systemFlag | (state.output == nil ? 0 : Status.outputFull)
                    | (state.lastWasCommand ? Status.lastWasCommand : 0)
            default:
                return 0xff
            }
        }
    }

    func writeByte(_ offset: UInt16, _ value: UInt8) {
        let resets = state.withLock { state in
            switch offset {
            case Port.command: state.take(command: value)
            case Port.data: state.take(data: value)
            default: false
            }
        }
        if resets { request(.reset) }
    }
}

private struct KeyboardState {
    /// The byte at the data port, if one is waiting.
    var output: UInt8?
    /// The command whose parameter is still to come at the data port.
    var command: UInt8?
    /// Both devices disabled, translation on, self-test passed.
    var commandByte: UInt8 = 0x74
    var lastWasCommand = false

    /// Returns whether the command resets the machine.
    mutating func take(command value: UInt8) -> Bool {
        lastWasCommand = true
        command = nil
        switch value {
        case 0x20: output = commandByte
        // The self-test passes; both interfaces' tests find the clock line stuck low, as where nothing is plugged in.
        case 0xaa: output = 0x55
        case 0xa9, 0xab: output = 0x01
        // Auxiliary and keyboard interface off and on.
        case 0xa7: commandByte |= 0x20
        case 0xa8: commandByte &= ~0x20
        case 0xad: commandByte |= 0x10
        case 0xae: commandByte &= ~0x10
        // The output port: reset line high, A20 on.
        case 0xd0: output = 0x03
        case 0x60, 0xd1...0xd4: command = value
        // Pulses the output port's lines whose bits are 0; line 0 is the reset.
        case 0xf0...0xff: return value & 1 == 0
        default: break
        }
        return false
    }

    /// Returns whether the parameter of a command resets the machine.
    mutating func take(data value: UInt8) -> Bool {
        lastWasCommand = false
        defer { command = nil }
        switch command {
        case 0x60: commandByte = value
        case 0xd1: return value & 1 == 0
        case 0xd2: output = value
        // Nothing comes back from the auxiliary port: the answer differs from every pattern but its complement.
        case 0xd3: output = ~value
        // No device there: it "timed out", which drivers take for a refusal.
        default: output = 0xfe
        }
        return false
    }
}

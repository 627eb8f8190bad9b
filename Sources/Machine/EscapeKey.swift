// SPDX-License-Identifier: Apache-2.0

/// Finds the console's escape sequences among the keys: Ctrl-A and a second key.
struct EscapeKey {
    enum Action: Equatable {
        /// Keys for the guest.
        case pass([UInt8])
        case quit
        case help
        case status
        /// Pauses the machine, or resumes it.
        case pause
        /// Resumes a paused machine.
        case resume
        /// Asks for a command.
        case prompt
    }

    private static let prefix: UInt8 = 0x01
    private var isArmed = false

    /// Splits input into keys for the guest and commands for swkvm, in their order. A Ctrl-A at the end waits for its
    /// second key.
    mutating func filter(_ keys: [UInt8]) -> [Action] {
        var actions: [Action] = []
        var passing: [UInt8] = []
        func flush() {
            if !passing.isEmpty { actions.append(.pass(passing)) }
            passing = []
        }
        for key in keys {
            guard isArmed else {
                if key == Self.prefix { isArmed = true } else { passing.append(key) }
                continue
            }
            isArmed = false
            switch key {
            case UInt8(ascii: "x"), UInt8(ascii: "X"): flush(); actions.append(.quit)
            case UInt8(ascii: "h"), UInt8(ascii: "H"), UInt8(ascii: "?"): flush(); actions.append(.help)
            case UInt8(ascii: "c"), UInt8(ascii: "C"): flush(); actions.append(.status)
            case UInt8(ascii: "p"), UInt8(ascii: "P"): flush(); actions.append(.pause)
            case UInt8(ascii: "r"), UInt8(ascii: "R"): flush(); actions.append(.resume)
            case UInt8(ascii: ":"): flush(); actions.append(.prompt)
            // Ctrl-A twice, or `a` after it, is a Ctrl-A for the guest.
            case Self.prefix, UInt8(ascii: "a"), UInt8(ascii: "A"): passing.append(Self.prefix)
            // Anything else was not meant for swkvm.
            default: passing += [Self.prefix, key]
            }
        }
        flush()
        return actions
    }

    static let help = """
        Ctrl-A x  end the machine
        Ctrl-A c  show the machine's counters
        Ctrl-A p  pause the machine, or resume it
        Ctrl-A r  resume the machine
        Ctrl-A :  type a command for swkvm, such as `help`
        Ctrl-A h  this help
        Ctrl-A a  send a Ctrl-A to the guest
        """
}

// SPDX-License-Identifier: Apache-2.0

import CSandbox
import Glibc
import Sandbox

/// The list that filters are made from.
var rules: [csandbox_rule] {
    var count = 0
    let first = csandbox_rules(&count)
    return Array(UnsafeBufferPointer(start: first, count: count))
}

let everyThread = CSANDBOX_VCPU.rawValue | CSANDBOX_DEVICE.rawValue | CSANDBOX_OTHER.rawValue | CSANDBOX_API.rawValue

extension csandbox_machine {
    init(_ needs: Sandbox.Needs, reports: Bool = false) {
        self.init(needs: needs.rawValue, process: getpid(), reports: reports ? 1 : 0)
    }

    /// The filter of some kinds of threads.
    func filter(_ threads: UInt32 = everyThread, otherwise fallback: UInt32) -> [sock_filter] {
        var machine = self, count: UInt16 = 0
        var buffer = [sock_filter](repeating: sock_filter(), count: Int(CSANDBOX_LIMIT))
        return buffer.withUnsafeMutableBufferPointer { buffer in
            let first = csandbox_compile(&machine, threads, fallback, buffer.baseAddress, &count)
            return Array(UnsafeBufferPointer(start: first, count: Int(count)))
        }
    }

    func has(_ rule: csandbox_rule, _ threads: UInt32) -> Bool {
        var rule = rule, machine = self
        return csandbox_applies(&rule, &machine, threads) != 0
    }
}

extension csandbox_rule {

    /// Indicates whether the condition holds for a call's arguments.
    func holds(for arguments: [UInt64], in machine: csandbox_machine) -> Bool {
        let word = UInt32(truncatingIfNeeded: arguments[Int(argument)])
        return switch UInt32(test) {
        case CSANDBOX_ANYTHING.rawValue: true
        case CSANDBOX_EQUAL.rawValue: word == value
        case CSANDBOX_UNEQUAL.rawValue: word != value
        case CSANDBOX_NO_BITS.rawValue: word & value == 0
        case CSANDBOX_OWN_PROCESS.rawValue: word == UInt32(bitPattern: machine.process)
        default: preconditionFailure("a test that is not known")
        }
    }
}

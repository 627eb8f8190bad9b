// SPDX-License-Identifier: Apache-2.0

/// What SIGINT, SIGTERM and SIGHUP ask of a machine: the first one a power-off of the guest, the next one the machine's
/// end.
///
/// Signals that come together are one: `timeout` and other wrappers send theirs to the process and then to its group, a
/// terminal that is closed sends SIGHUP twice, and a service manager SIGHUP after SIGTERM.
struct StopSignals {
    enum Action: Equatable {
        case powerOff
        case end
        /// The signal belongs to the previous one.
        case none
    }

    /// Milliseconds within which signals are one.
    static let together: UInt64 = 1000

    private var last: UInt64?

    /// Indicates whether the guest was asked to power off.
    var wasAsked: Bool { last != nil }

    /// - Parameter time: milliseconds of the monotonic clock.
    mutating func signal(at time: UInt64) -> Action {
        guard let last else {
            self.last = time
            return .powerOff
        }
        return time &- last < Self.together ? .none : .end
    }
}

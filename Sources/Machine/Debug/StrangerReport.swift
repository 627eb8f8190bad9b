// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Logging

/// Lines about clients of the debugger's address that are no debuggers: one in ten seconds, with the number of those
/// that got none.
struct StrangerReport {
    private static let interval: UInt64 = 10_000
    private var last: UInt64?
    private var unreported = 0

    /// - Parameter first: the byte that the client began with; nil for one that has begun as a debugger does.
    mutating func report(began first: UInt8?, to log: Logger, now: UInt64 = TimerFD.now) {
        if let last, now &- last < Self.interval { return unreported += 1 }
        let others = unreported == 0 ? "" : " (\(unreported) more before)"
        log.warning(
            "a client of --gdb was disconnected: it \(Self.text(first)), which is not a debugger packet\(others)")
        (last, unreported) = (now, 0)
    }

    private static func text(_ first: UInt8?) -> String {
        guard let first else { return "sent something between packets" }
        let isPrintable = (0x21...0x7e).contains(first)
        return "began with " + (isPrintable ? "'\(Unicode.Scalar(first))'" : "0x\(String(first, radix: 16))")
    }
}

// SPDX-License-Identifier: Apache-2.0

/// What is made of triple faults that reset the machine: one now and then is reported in full and followed by the next
/// boot at once; of a guest that does little else, each next one waits longer, and is a line.
struct TripleFaults {
    /// What follows one of them.
    struct Response: Equatable {
        /// Indicates whether the registers are of interest: those of the next ones are mostly the same.
        var isDetailed: Bool
        /// Milliseconds until the next boot.
        var pause: UInt64
    }

    /// A guest that runs for longer is not in a loop of resets, in milliseconds.
    static let calm: UInt64 = 60_000
    private static let pauses: ClosedRange<UInt64> = 1000...30_000

    /// When the boot began that follows the last one.
    private var lastStart: UInt64?
    private var lastPause: UInt64 = 0

    /// - Parameter time: milliseconds, of a clock that nobody sets.
    mutating func response(at time: UInt64) -> Response {
        let isSoon = lastStart.map { time &- $0 < Self.calm } ?? false
        let pause = isSoon ? min(max(lastPause * 2, Self.pauses.lowerBound), Self.pauses.upperBound) : 0
        (lastStart, lastPause) = (time &+ pause, pause)
        return Response(isDetailed: !isSoon, pause: pause)
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// What a device reports to the host's log: one sentence for each event, at a bounded rate.
///
/// The first event of a kind is reported at once. Further ones are counted, and reported as a number once a minute, so that a guest, a
/// failing disk or a flapping link cannot flood the log. Any thread may report; nothing here waits for I/O. The events belong to the device, so a
/// reset of the guest does not start the count anew.
public final class DeviceEvents: Sendable {
    /// How much an event matters.
    public enum Level: Sendable {
        /// Expected now and then.
        case info
        /// Worth knowing, nothing is wrong.
        case notice
        /// Something is wrong, and the device goes on.
        case warning
        /// The device, or a part of it, works no more.
        case error
    }

    /// What events have to have in common to be counted as one. There is a bounded number of kinds, whatever the guest does.
    public enum Kind: Hashable, Sendable {
        /// The driver broke a rule of the specification in this queue.
        case brokenRule(queue: Int)
        /// The driver set this queue up in a way that is not possible, and it is not ready.
        case refusedQueue(Int)
        /// The device has set DEVICE_NEEDS_RESET for a reason on the host.
        case needsReset
        /// The host failed an operation of this number with this errno value.
        case hostError(operation: UInt8, errno: Int32)
        /// The disk image is damaged.
        case damage
        /// The link went up or down.
        case link(isUp: Bool)
        /// Frames were dropped, for the cause of this number.
        case lostFrames(UInt8)
    }

    /// Milliseconds in which further events of a kind are only counted.
    public static let period: UInt64 = 60_000

    /// For devices whose events nobody reads.
    public static let none = DeviceEvents(device: "", now: { 0 }, log: { _, _ in })

    private struct Entry {
        var level: Level
        var sentence: String
        /// When the last line was printed, and events since.
        var printed: UInt64
        var count: UInt64 = 0
    }

    private let device: String
    private let now: @Sendable () -> UInt64
    private let log: @Sendable (Level, String) -> Void
    private let entries = Guarded<[Kind: Entry]>([:])

    /// - Parameters:
    ///   - device: begins each line: `blk0`.
    ///   - log: takes a line; called by any thread, must not wait.
    public convenience init(device: String, log: @escaping @Sendable (Level, String) -> Void) {
        self.init(device: device, now: { TimerFD.now }, log: log)
    }

    /// - Parameter now: milliseconds of a clock that does not go back.
    init(device: String, now: @escaping @Sendable () -> UInt64, log: @escaping @Sendable (Level, String) -> Void) {
        self.device = device
        self.now = now
        self.log = log
    }

    /// Reports events, or counts them.
    /// - Parameters:
    ///   - count: how many happened.
    ///   - sentence: asked for only when it is printed.
    public func report(_ kind: Kind, _ level: Level, count: UInt64 = 1, _ sentence: @autoclosure () -> String) {
        let time = now()
        let line: String? = entries.withLock { entries in
            guard let entry = entries[kind], time &- entry.printed < Self.period else {
                let before = entries[kind]?.count ?? 0
                let text = sentence()
                entries[kind] = Entry(level: level, sentence: text, printed: time, count: count &- 1)
                return before == 0 ? text : "\(text) (\(before) more before this)"
            }
            entries[kind]?.count &+= count
            return nil
        }
        if let line { log(level, "\(device): \(line)") }
    }

    /// Reports the numbers of events that were only counted and whose minute is over.
    /// - Parameter all: also those whose minute is not over, because the device ends.
    public func summarize(all: Bool = false) {
        let time = now()
        var lines: [(level: Level, text: String)] = []
        entries.withLock { entries in
            for (kind, entry) in entries where entry.count > 0 && (all || time &- entry.printed >= Self.period) {
                lines.append((entry.level, "\(entry.count) more: \(entry.sentence)"))
                entries[kind]?.count = 0
                entries[kind]?.printed = time
            }
        }
        for line in lines.sorted(by: { $0.text < $1.text }) { log(line.level, "\(device): \(line.text)") }
    }
}

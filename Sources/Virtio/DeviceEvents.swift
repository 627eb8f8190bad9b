// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// What a device reports to the host's log: one sentence for each event, at a bounded rate.
///
/// The first event of a kind is reported immediately. Further ones are counted, and reported as a number once a minute,
/// so that a guest, a failing disk or a flapping link cannot flood the log. Any thread may report; nothing here waits
/// for I/O. The events belong to the device, so a reset of the guest does not restart the count.
public final class DeviceEvents: Sendable {
    /// How much an event matters.
    public enum Level: Sendable {
        /// The steps of what the driver does, each of them.
        case trace
        /// What the driver does in the ordinary course of things.
        case debug
        /// Expected now and then.
        case info
        /// Worth knowing, nothing is wrong.
        case notice
        /// Something is wrong, and the device continues to work.
        case warning
        /// The device, or a part of it, does not work any more.
        case error
    }

    /// What events have to have in common to be counted as one. There is a bounded number of kinds, whatever the guest
    /// does.
    public enum Kind: Hashable, Sendable {
        /// The driver broke a rule of the specification in this queue.
        case brokenRule(queue: Int)
        /// The driver set this queue up in a way that is not possible, and it is not ready.
        case refusedQueue(Int)
        /// The device has set DEVICE_NEEDS_RESET for a reason on the host.
        case needsReset
        /// The host failed an operation of this number with this errno value.
        case hostError(operation: UInt8, errno: Int32)
        /// The host's kernel accepts no operations of the disk at all.
        case refusedOperations
        /// The disk image is damaged.
        case damage
        /// The link went up or down.
        case link(isUp: Bool)
        /// Frames were dropped, for the cause of this number.
        case lostFrames(UInt8)
        /// The driver gave pages to the balloon that are not RAM.
        case refusedPages
        /// Packets of the driver broke the rules of a protocol above the queues.
        case badPackets
        /// The driver accepted features that are not possible, and FEATURES_OK is not set.
        case refusedFeatures
        /// The driver has started the device.
        case started
        /// The driver, or the guest's reset, has reset the device.
        case reset
        /// The host refused to connect an interrupt (0) or a doorbell (1).
        case refusedConnection(UInt8)

        /// What metrics call events of this kind, whatever its details.
        public var name: String {
            switch self {
            case .brokenRule: "broken_rule"
            case .refusedQueue: "refused_queue"
            case .needsReset: "needs_reset"
            case .hostError: "host_error"
            case .refusedOperations: "refused_operations"
            case .damage: "damage"
            case .link(isUp: true): "link_up"
            case .link(isUp: false): "link_down"
            case .lostFrames: "lost_frames"
            case .badPackets: "bad_packets"
            case .refusedConnection: "refused_connection"
            case .refusedPages: "refused_pages"
            case .refusedFeatures: "refused_features"
            case .started: "start"
            case .reset: "reset"
            }
        }

        /// The names of all kinds.
        public static let names = [
            "broken_rule", "refused_queue", "needs_reset", "host_error", "refused_operations", "damage", "link_up",
            "link_down", "lost_frames", "bad_packets", "refused_connection", "refused_pages", "refused_features",
            "start", "reset",
        ]
    }

    /// Milliseconds in which further events of a kind are only counted.
    public static let period: UInt64 = 60_000

    /// For devices whose events are discarded.
    public static let none = DeviceEvents(now: { 0 }, log: { _, _ in })

    private struct Entry {
        var level: Level
        var sentence: String
        /// When the last line was printed, and events since.
        var printed: UInt64
        var count: UInt64 = 0
        /// Events in all.
        var total: UInt64 = 0
    }

    private let now: @Sendable () -> UInt64
    private let log: @Sendable (Level, String) -> Void
    private let isTracing: Bool
    private let state = Guarded(State())

    private struct State {
        var entries: [Kind: Entry] = [:]
        /// Nothing is reported any more.
        var hasEnded = false
    }

    /// - Parameter log: takes a line, without the device's name; called by any thread, must not wait.
    public convenience init(log: @escaping @Sendable (Level, String) -> Void) {
        self.init(now: { TimerFD.now }, log: log)
    }

    /// - Parameters:
    ///   - now: milliseconds of a clock that does not go back.
    ///   - isTracing: whether anybody reads what is reported by ``trace(_:)``.
    ///   - log: takes a line, without the device's name; called by any thread, must not wait.
    public init(
        now: @escaping @Sendable () -> UInt64, isTracing: Bool = false,
        log: @escaping @Sendable (Level, String) -> Void
    ) {
        self.now = now
        self.isTracing = isTracing
        self.log = log
    }

    /// Reports events, or counts them.
    /// - Parameters:
    ///   - count: how many happened.
    ///   - isUrgent: the user has to act: the line is printed even if the minute of its kind is not over.
    ///   - sentence: evaluated only when it is printed.
    public func report(
        _ kind: Kind, _ level: Level, count: UInt64 = 1, isUrgent: Bool = false, _ sentence: @autoclosure () -> String
    ) {
        guard count > 0 else { return }
        let time = now()
        let line: String? = state.withLock { state in
            guard !state.hasEnded else { return nil }
            guard let entry = state.entries[kind], !isUrgent, time &- entry.printed < Self.period else {
                let before = state.entries[kind]?.count ?? 0, total = state.entries[kind]?.total ?? 0
                let text = sentence()
                state.entries[kind] = Entry(
                    level: level, sentence: text, printed: time, count: count &- 1, total: total &+ count)
                return before == 0 ? text : "\(text) (\(before) more before this)"
            }
            state.entries[kind]?.count &+= count
            state.entries[kind]?.total &+= count
            return nil
        }
        if let line { log(level, line) }
    }

    /// Reports a step of the driver's, however many there are, if anybody reads it. Not for the path of a request.
    /// - Parameter sentence: evaluated only then.
    public func trace(_ sentence: @autoclosure () -> String) {
        if isTracing { log(.trace, sentence()) }
    }

    /// How many events of each kind there were, by ``Kind/name``.
    public var totals: [String: UInt64] {
        state.withLock { state in
            state.entries.reduce(into: [:]) { $0[$1.key.name, default: 0] &+= $1.value.total }
        }
    }

    /// Reports the numbers of events that were only counted and whose minute is over.
    public func summarize() { summarize(all: false) }

    /// Reports the numbers of all events that were only counted, and nothing after that: what changes on the host now
    /// is the end's own work.
    public func end() {
        summarize(all: true)
        state.withLock { $0.hasEnded = true }
    }

    private func summarize(all: Bool) {
        let time = now()
        var lines: [(level: Level, text: String)] = []
        state.withLock { state in
            for (kind, entry) in state.entries
            where entry.count > 0 && (all || time &- entry.printed >= Self.period) {
                lines.append((entry.level, "\(entry.count) more: \(entry.sentence)"))
                state.entries[kind]?.count = 0
                state.entries[kind]?.printed = time
            }
        }
        for line in lines.sorted(by: { $0.text < $1.text }) { log(line.level, line.text) }
    }
}

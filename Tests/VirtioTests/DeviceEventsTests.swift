// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@testable import Virtio

/// Lines of a log.
final class Lines: Sendable {
    private let lines = Guarded<[String]>([])
    var all: [String] { lines.withLock { $0 } }
    var add: @Sendable (DeviceEvents.Level, String) -> Void {
        { level, line in self.lines.withLock { $0.append("\(level): \(line)") } }
    }
}

/// Milliseconds that a test lets pass.
private final class Clock: Sendable {
    let time = Guarded<UInt64>(1_000)
}

@Suite(.timed) struct DeviceEventsTests {
    private let lines = Lines()
    private let clock = Clock()
    private let events: DeviceEvents

    init() {
        let clock = clock
        events = DeviceEvents(now: { clock.time.withLock { $0 } }, log: lines.add)
    }

    private func wait(_ milliseconds: UInt64) { clock.time.withLock { $0 += milliseconds } }

    @Test func theFirstOfEachKindIsReportedAtOnce() {
        events.report(.hostError(operation: 0, errno: 5), .error, "one")
        events.report(.hostError(operation: 1, errno: 5), .error, "two")
        events.report(.link(isUp: false), .warning, "three")
        #expect(lines.all == ["error: one", "error: two", "warning: three"])
    }

    @Test func furtherOnesAreCountedForAMinute() {
        for number in 0..<1_000 { events.report(.damage, .error, "damage \(number)") }
        #expect(lines.all == ["error: damage 0"])
        wait(DeviceEvents.period - 1)
        events.summarize()
        #expect(lines.all.count == 1)
        wait(1)
        events.summarize()
        #expect(lines.all.last == "error: 999 more: damage 0")
        // Nothing more has happened.
        wait(DeviceEvents.period)
        events.summarize()
        #expect(lines.all.count == 2)
        events.report(.damage, .error, "damage again")
        #expect(lines.all.last == "error: damage again")
    }

    /// Where nobody asks for the sums an event after the minute brings them.
    @Test func theNextEventBringsTheCount() {
        events.report(.lostFrames(0), .warning, count: 7, "lost")
        events.report(.lostFrames(0), .warning, count: 5, "lost")
        events.report(.lostFrames(0), .warning, count: 6, "lost")
        wait(DeviceEvents.period)
        events.report(.lostFrames(0), .warning, count: 1, "lost")
        #expect(lines.all == ["warning: lost", "warning: lost (17 more before this)"])
    }

    @Test func theEndReportsWhatIsLeft() {
        events.report(.damage, .error, "damage")
        events.report(.damage, .error, "damage")
        events.report(.link(isUp: true), .notice, "up")
        events.summarize(all: true)
        #expect(lines.all == ["error: damage", "notice: up", "error: 1 more: damage"])
    }

    /// What no event was is none, and does not turn the count of a later one around.
    @Test func noEventIsNotReported() {
        events.report(.lostFrames(0), .warning, count: 0, "lost")
        #expect(lines.all.isEmpty && events.totals.isEmpty)
        events.report(.lostFrames(0), .warning, count: 2, "lost")
        events.report(.lostFrames(0), .warning, count: 0, "lost")
        events.summarize(all: true)
        #expect(lines.all == ["warning: lost", "warning: 1 more: lost"])
    }

    @Test func allEventsAreCountedByTheirKind() {
        events.report(.hostError(operation: 0, errno: 5), .error, "one")
        events.report(.hostError(operation: 1, errno: 28), .error, "two")
        events.report(.hostError(operation: 1, errno: 28), .error, "two")
        events.report(.link(isUp: false), .warning, "down")
        events.summarize(all: true)
        wait(DeviceEvents.period)
        events.report(.link(isUp: false), .warning, "down")
        #expect(events.totals == ["host_error": 3, "link_down": 2])
        #expect(events.totals.keys.allSatisfy(DeviceEvents.Kind.names.contains))
    }

    /// A sentence costs something, and a guest may make a million events a second.
    @Test func whatIsOnlyCountedHasNoSentence() {
        var made = 0
        func sentence() -> String {
            made += 1
            return "x"
        }
        for _ in 0..<100 { events.report(.needsReset, .error, sentence()) }
        #expect(made == 1)
    }
}

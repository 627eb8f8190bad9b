// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@testable import Virtio

/// Lines of a log.
final class Lines: Sendable {
    private let lines = Guarded<[String]>([]), details = Guarded<[String]>([])
    var all: [String] { lines.withLock { $0 } }
    /// Those of the level debug, which others are not mixed with.
    var debug: [String] { details.withLock { $0 } }
    var add: @Sendable (DeviceEvents.Level, String) -> Void {
        { level, line in
            if level == .debug {
                self.details.withLock { $0.append(line) }
            } else {
                self.lines.withLock { $0.append("\(level): \(line)") }
            }
        }
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
        events.end()
        let reported = ["error: damage", "notice: up", "error: 1 more: damage"]
        #expect(lines.all == reported)
        // The end's own work is no news.
        events.report(.link(isUp: false), .warning, isUrgent: true, "down")
        #expect(lines.all == reported && events.totals["link_down"] == nil)
    }

    /// What no event was is none, and does not turn the count of a later one around.
    @Test func noEventIsNotReported() {
        events.report(.lostFrames(0), .warning, count: 0, "lost")
        #expect(lines.all.isEmpty && events.totals.isEmpty)
        events.report(.lostFrames(0), .warning, count: 2, "lost")
        events.report(.lostFrames(0), .warning, count: 0, "lost")
        events.end()
        #expect(lines.all == ["warning: lost", "warning: 1 more: lost"])
    }

    @Test func allEventsAreCountedByTheirKind() {
        events.report(.hostError(operation: 0, errno: 5), .error, "one")
        events.report(.hostError(operation: 1, errno: 28), .error, "two")
        events.report(.hostError(operation: 1, errno: 28), .error, "two")
        events.report(.link(isUp: false), .warning, "down")
        wait(DeviceEvents.period)
        events.summarize()
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

    /// What a driver does to a device's state is at hand, and what of it is refused is reported.
    @Test func theDriversStepsAreReported() throws {
        let guest = try TestGuest(), device = try EchoDevice()
        let function = try MMIOTransport(device: device, memory: guest.memory).function
        try device.start()
        for status: UInt32 in [1, 3] { function.writeStatus(status) }
        function.setDriverFeatures(word: 0, to: 1)
        function.writeStatus(11)
        #expect(
            device.lines.all == [
                "warning: the driver accepted the features 0x1, and FEATURES_OK is not set: 0x1 was not offered"
            ])
        function.setDriverFeatures(word: 0, to: 0)
        function.writeStatus(11)
        #expect(function.status.rawValue == 3 && function.counters.errors.value == 2)
        #expect(device.deviceEvents.totals == ["refused_features": 2])
        function.setDriverFeatures(word: 1, to: 1)
        for status: UInt32 in [11, 15] { function.writeStatus(status) }
        #expect(function.status.rawValue == 15)
        #expect(
            device.lines.debug == ["the driver started the device with the features 0x100000000 and 0 of 2 queues"])
        function.writeStatus(0)
        // A device that was not started has nothing to be reset.
        function.writeStatus(0)
        #expect(device.lines.debug.dropFirst() == ["the device was reset by its driver"])
        #expect(device.deviceEvents.totals == ["refused_features": 2, "start": 1, "reset": 1])
        #expect(device.lines.all.count == 1)
    }

    @Test(
        arguments: [
            (word: 1, bits: 0, "VIRTIO_F_VERSION_1 is missing, and there is no legacy interface"),
            (word: 4, bits: 1, "some are above bit 127, and none of those was offered"),
        ] as [(word: UInt32, bits: UInt32, String)])
    func whyFeaturesAreRefused(word: UInt32, bits: UInt32, reason: String) throws {
        let guest = try TestGuest(), device = try EchoDevice()
        let function = try MMIOTransport(device: device, memory: guest.memory).function
        try device.start()
        for status: UInt32 in [1, 3] { function.writeStatus(status) }
        function.setDriverFeatures(word: word, to: bits)
        function.writeStatus(11)
        #expect(device.lines.all.first?.hasSuffix("FEATURES_OK is not set: \(reason)") == true, "\(device.lines.all)")
    }
}

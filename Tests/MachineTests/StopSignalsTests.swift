// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import Machine

@Suite(.timed) struct StopSignalsTests {
    /// `timeout` signals the process and then its group: that is one request.
    @Test func aSignalThatIsSentTwiceIsOne() {
        var signals = StopSignals()
        #expect(!signals.wasAsked)
        #expect(signals.signal(at: 5_000) == .powerOff)
        #expect(signals.wasAsked)
        #expect(signals.signal(at: 5_000) == .none)
        #expect(signals.signal(at: 5_999) == .none)
        #expect(signals.wasAsked)
    }

    @Test func aSecondSignalLaterEndsIt() {
        var signals = StopSignals()
        #expect(signals.signal(at: 5_000) == .powerOff)
        #expect(signals.signal(at: 5_001) == .none)
        #expect(signals.signal(at: 6_000) == .end)
        #expect(signals.signal(at: 6_001) == .end)
    }
}

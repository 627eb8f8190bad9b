// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import Machine

@Suite(.timed) struct StopRequestsTests {
    /// `timeout` signals the process and then its group: that is one request.
    @Test func aSignalThatIsSentTwiceIsOne() {
        var requests = StopRequests()
        #expect(!requests.wasAsked)
        #expect(requests.signal(at: 5_000) == .powerOff)
        #expect(requests.wasAsked)
        #expect(requests.signal(at: 5_000) == .none)
        #expect(requests.signal(at: 5_999) == .none)
        #expect(requests.wasAsked)
    }

    @Test func aSecondSignalLaterEndsIt() {
        var requests = StopRequests()
        #expect(requests.signal(at: 5_000) == .powerOff)
        #expect(requests.signal(at: 5_001) == .none)
        #expect(requests.signal(at: 6_000) == .end)
        #expect(requests.signal(at: 6_001) == .end)
    }
}

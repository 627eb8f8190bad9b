// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct TimerFDTests {
    private func waitUntilReadable(_ timer: borrowing TimerFD) {
        var entry = pollfd(fd: timer.rawValue, events: Int16(POLLIN), revents: 0)
        while poll(&entry, 1, -1) != 1 {}
    }

    @Test func expiresOnceAndTellsSoOnce() throws {
        let timer = try TimerFD()
        let before = timer.take()
        timer.start(milliseconds: 1)
        waitUntilReadable(timer)
        let first = timer.take(), second = timer.take()
        #expect(!before && first && !second)
    }

    @Test func aNewTimeReplacesTheOld() throws {
        let timer = try TimerFD()
        timer.start(milliseconds: 1)
        timer.start(milliseconds: 3_600_000)
        let early = timer.take()
        // No time at all is the shortest, not none.
        timer.start(milliseconds: 0)
        waitUntilReadable(timer)
        let late = timer.take()
        #expect(!early && late)
    }
}

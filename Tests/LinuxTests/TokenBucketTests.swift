// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@Suite(.timed) struct TokenBucketTests {
    private static let second: UInt64 = 1_000_000_000

    @Test func theBurstIsThereAtOnceAndNoMore() {
        var bucket = TokenBucket(.init(perSecond: 10, burst: 3), now: 0)
        for _ in 0..<3 {
            #expect(bucket.delay(at: 0) == 0)
            bucket.charge(1)
        }
        #expect(bucket.delay(at: 0) == Self.second / 10)
        #expect(bucket.delay(at: Self.second / 10 - 1) > 0)
        #expect(bucket.delay(at: Self.second / 10) == 0)
        // However long nothing happens.
        for now in [100 * Self.second, .max] {
            #expect(bucket.available(at: now) == 3)
        }
    }

    /// Rates that do not divide a second, looked at at odd times: not a token is lost or made up.
    @Test(arguments: [1, 3, 7, 999, 1_000_003, 123_456_789_012] as [UInt64]) func theRateDoesNotDrift(rate: UInt64) {
        var bucket = TokenBucket(.init(perSecond: rate, burst: 2 * rate), now: 0)
        bucket.charge(2 * rate)
        var generator = SeededGenerator(seed: rate)
        var now: UInt64 = 0
        var taken: UInt64 = 0
        while now < 20 * Self.second {
            now += UInt64.random(in: 1...Self.second / 7, using: &generator)
            let there = bucket.available(at: now)
            bucket.charge(there)
            taken += there
            let (product, low) = rate.multipliedFullWidth(by: now)
            #expect(taken == Self.second.dividingFullWidth((product, low)).quotient)
        }
    }

    /// What costs more than the bucket holds starts, and is made up for.
    @Test func debtIsPaid() {
        var bucket = TokenBucket(.init(perSecond: 100, burst: 10), now: 0)
        #expect(bucket.delay(at: 0) == 0)
        bucket.charge(1000)
        // 990 are owed, and one has to be there.
        #expect(bucket.delay(at: 0) == 991 * Self.second / 100)
        #expect(bucket.available(at: 5 * Self.second) == 0)
        #expect(bucket.delay(at: 991 * Self.second / 100) == 0)
        #expect(bucket.available(at: 991 * Self.second / 100) == 1)
    }

    @Test func nothingOverflows() {
        var bucket = TokenBucket(.init(perSecond: .max, burst: .max), now: 0)
        for _ in 0..<100 { bucket.charge(.max) }
        #expect(bucket.delay(at: .max / 2) == 0)
        #expect(bucket.available(at: .max) == .max)
        var slow = TokenBucket(.init(perSecond: 1, burst: 1), now: .max - 5)
        for _ in 0..<100 { slow.charge(.max) }
        #expect(slow.delay(at: .max) == .max)
        #expect(slow.available(at: .max) == 0)
    }

    @Test func aClockThatGoesBackIsNone() {
        var bucket = TokenBucket(.init(perSecond: 10, burst: 1), now: Self.second)
        bucket.charge(1)
        #expect(bucket.delay(at: 0) == Self.second / 10)
        #expect(bucket.available(at: Self.second + Self.second / 10) == 1)
    }

    @Test func aThreadDoesNotWakeForEveryToken() {
        var bucket = TokenBucket(.init(perSecond: 1_000_000, burst: 1), now: 0)
        #expect(bucket.rate.burst == 1000)
        bucket.charge(1000)
        #expect(bucket.delay(at: 0) == TokenBucket.shortestWait)
        #expect(bucket.available(at: TokenBucket.shortestWait) == 1000)
    }

    @Test func ratesHaveDefaults() {
        #expect(TokenBucket.Rate(perSecond: 1000).burst == 100)
        #expect(TokenBucket.Rate(perSecond: 5).burst == 1)
        #expect(TokenBucket.Rate(perSecond: 0).perSecond == 1)
        #expect(TokenBucket.Rate(perSecond: 5, burst: 0).burst == 1)
    }
}

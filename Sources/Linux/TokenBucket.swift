// SPDX-License-Identifier: Apache-2.0

/// A token bucket: it fills at a steady rate up to its size, and what is done takes tokens out of it.
///
/// Something may start while there is at least one token, and then takes as many as it costs, also more than there are:
/// the bucket owes them, and nothing starts until it has made up for that. So nothing is too large ever to start, and
/// the rate is exact in the long run. The level is kept in billionths of a token, the exact product of nanoseconds and
/// tokens a second: nothing is rounded.
public struct TokenBucket: Sendable {
    /// How fast a bucket fills, and how much it holds.
    public struct Rate: Sendable, Equatable {
        /// Tokens a second, at least 1.
        public let perSecond: UInt64
        /// The bucket's size in tokens.
        public let burst: UInt64
        /// Tokens that there are once, besides, and which are taken first.
        public let extra: UInt64

        /// - Parameter burst: nil: what comes in a tenth of a second. It is never less than what comes in
        ///   a ``shortestWait``, or one token: with less, the rate would not be reached.
        public init(perSecond: UInt64, burst: UInt64? = nil, extra: UInt64 = 0) {
            self.perSecond = max(1, perSecond)
            self.extra = extra
            self.burst = max(1, perSecond / 1000, burst ?? perSecond / 10)
        }
    }

    /// The shortest wait, in nanoseconds: a thread that woke for every token would do little else.
    public static let shortestWait: UInt64 = 1_000_000

    /// In one token, and nanoseconds in a second.
    private static let scale: Int128 = 1_000_000_000

    public let rate: Rate
    /// Billionths of a token; below 0 what is owed.
    private var level: Int128
    /// What is left of ``Rate/extra``.
    private var extra: UInt64
    /// Nanoseconds; when the level was right.
    private var time: UInt64

    private var capacity: Int128 { Int128(rate.burst) * Self.scale }

    /// A full bucket.
    /// - Parameter now: nanoseconds, on any clock that does not go backwards.
    public init(_ rate: Rate, now: UInt64) {
        self.rate = rate
        level = Int128(rate.burst) * Self.scale
        extra = rate.extra
        time = now
    }

    /// Nanoseconds until something may start; 0: now.
    public mutating func delay(at now: UInt64) -> UInt64 {
        refill(now)
        guard level < Self.scale, extra == 0 else { return 0 }
        let missing = UInt128(Self.scale - level)
        let (time, rest) = missing.quotientAndRemainder(dividingBy: UInt128(rate.perSecond))
        return max(Self.shortestWait, UInt64(clamping: time + (rest > 0 ? 1 : 0)))
    }

    /// Whole tokens that are there.
    public mutating func available(at now: UInt64) -> UInt64 {
        refill(now)
        let tokens = level < 0 ? 0 : UInt64(clamping: level / Self.scale)
        let (sum, overflows) = tokens.addingReportingOverflow(extra)
        return overflows ? .max : sum
    }

    /// Takes tokens out.
    public mutating func charge(_ tokens: UInt64) {
        let extra = min(self.extra, tokens)
        self.extra -= extra
        let tokens = tokens - extra
        let (sum, overflows) = level.subtractingReportingOverflow(Int128(tokens) * Self.scale)
        // Only billions of such charges one after the other would come so far.
        level = overflows ? .min / 2 : sum
    }

    private mutating func refill(_ now: UInt64) {
        guard now > time else { return }
        // 64 bits times 64 bits.
        let product = UInt128(now - time) * UInt128(rate.perSecond)
        time = now
        let missing = UInt128(capacity - level)
        level = product < missing ? level + Int128(product) : capacity
    }
}

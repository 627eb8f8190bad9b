// SPDX-License-Identifier: Apache-2.0

public import Linux
public import Virtio

/// How much a device may do in a second.
public struct RateLimit: Sendable, Equatable {
    /// Of data.
    public var bytes: TokenBucket.Rate?
    /// Requests of a disk, or frames.
    public var operations: TokenBucket.Rate?

    public init(bytes: TokenBucket.Rate? = nil, operations: TokenBucket.Rate? = nil) {
        self.bytes = bytes
        self.operations = operations
    }

    public static let none = RateLimit()
}

/// What all queues of a device have together of a ``RateLimit``. Any thread may use it.
public final class RateLimiter: Sendable {
    private struct Buckets {
        var bytes: TokenBucket?
        var operations: TokenBucket?
    }

    private let buckets: Guarded<Buckets>
    /// Times that a queue had to wait.
    public let waits = DeviceCounters.Counter()

    /// - Returns: nil for no limit.
    public init?(_ limit: RateLimit, now: UInt64 = TimerFD.nanoseconds) {
        guard limit != .none else { return nil }
        buckets = Guarded(
            Buckets(
                bytes: limit.bytes.map { TokenBucket($0, now: now) },
                operations: limit.operations.map { TokenBucket($0, now: now) }))
    }

    /// Nanoseconds until something may start; 0: now.
    public func delay(now: UInt64 = TimerFD.nanoseconds) -> UInt64 {
        buckets.withLock { max($0.bytes?.delay(at: now) ?? 0, $0.operations?.delay(at: now) ?? 0) }
    }

    /// Counts what was started.
    public func charge(bytes: UInt64, operations: UInt64 = 1) {
        buckets.withLock {
            $0.bytes?.charge(bytes)
            $0.operations?.charge(operations)
        }
    }
}

/// A queue's view of a ``RateLimiter``: with the timer by which its thread waits.
///
/// Nothing is taken from the queue while it waits, so a reset or a pause finds nothing that is held back.
struct Throttle: ~Copyable {
    private let limiter: RateLimiter
    private let timer: TimerFD
    private var isWaiting = false

    /// The timer's descriptor: when it is readable, call ``expire()`` and process the queue again.
    var descriptor: Int32 { timer.rawValue }

    /// nil without a limiter.
    init?(_ limiter: RateLimiter?) throws(SystemCallError) {
        guard let limiter else { return nil }
        self.limiter = limiter
        timer = try TimerFD()
    }

    /// Indicates whether something may start now; the timer runs when not.
    mutating func mayStart() -> Bool {
        let delay = limiter.delay()
        guard delay > 0 else {
            isWaiting = false
            return true
        }
        if !isWaiting { limiter.waits.add() }
        isWaiting = true
        timer.start(nanoseconds: delay)
        return false
    }

    func charge(bytes: UInt64, operations: UInt64 = 1) { limiter.charge(bytes: bytes, operations: operations) }

    func expire() { _ = timer.take() }
}

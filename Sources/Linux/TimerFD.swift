// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// A timer whose descriptor becomes readable when it expires (timerfd_create(2)), on the monotonic clock.
public struct TimerFD: ~Copyable, Sendable {
    public let descriptor: FileDescriptor

    public var rawValue: Int32 { descriptor.rawValue }

    /// A timer that is not running.
    public init() throws(SystemCallError) {
        let number = timerfd_create(CLOCK_MONOTONIC, Int32(TFD_CLOEXEC | TFD_NONBLOCK))
        if number < 0 { throw .last("timerfd_create") }
        descriptor = FileDescriptor(owning: number)
    }

    /// Milliseconds on that clock.
    public static var now: UInt64 { nanoseconds / 1_000_000 }

    /// Nanoseconds on that clock.
    public static var nanoseconds: UInt64 {
        var time = timespec()
        // It fails only for a clock that does not exist.
        unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
    }

    /// Expires once, `milliseconds` (at least 1) from now; what was set before is forgotten.
    public func start(milliseconds: Int) {
        let time = max(1, milliseconds)
        start(seconds: time / 1000, nanoseconds: time % 1000 * 1_000_000)
    }

    /// The same in microseconds.
    public func start(microseconds: UInt32) {
        let time = Int(max(1, microseconds))
        start(seconds: time / 1_000_000, nanoseconds: time % 1_000_000 * 1000)
    }

    /// The same in nanoseconds.
    public func start(nanoseconds: UInt64) {
        // Years fit.
        let time = Int(clamping: max(1, nanoseconds))
        start(seconds: time / 1_000_000_000, nanoseconds: time % 1_000_000_000)
    }

    private func start(seconds: Int, nanoseconds: Int) {
        var setting = itimerspec()
        setting.it_value.tv_sec = seconds
        setting.it_value.tv_nsec = nanoseconds
        // It fails only for nanoseconds out of range.
        _ = unsafe timerfd_settime(rawValue, 0, &setting, nil)
    }

    /// Indicates whether it has expired since it was started; false from then on until it is started again.
    public func take() -> Bool {
        var count: UInt64 = 0
        // A timerfd gives 8 bytes or EAGAIN.
        return unsafe withUnsafeMutableBytes(of: &count) { unsafe read(rawValue, $0.baseAddress, $0.count) } == 8
    }
}

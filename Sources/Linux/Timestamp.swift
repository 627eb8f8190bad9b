// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc

/// The host's time of day in words.
public enum Timestamp {
    /// The moment, in UTC with milliseconds (RFC 3339): `2026-01-31T23:59:59.123Z`.
    public static var now: String {
        var time = timespec()
        // It fails only for a clock that does not exist.
        unsafe clock_gettime(CLOCK_REALTIME, &time)
        return text(seconds: time.tv_sec, nanoseconds: time.tv_nsec)
    }

    /// A time since 1970, likewise.
    public static func text(seconds: Int, nanoseconds: Int) -> String {
        var seconds = seconds
        var parts = unsafe tm()
        // It fails only for years that do not fit, and leaves zeroes then.
        _ = unsafe gmtime_r(&seconds, &parts)
        func padded(_ number: Int, _ digits: Int) -> String {
            let text = "\(number)"
            return String(repeating: "0", count: max(0, digits - text.count)) + text
        }
        // Numbers; the structure's pointer, to the zone's name, is not used.
        let date = unsafe [
            padded(Int(parts.tm_year) + 1900, 4), padded(Int(parts.tm_mon) + 1, 2), padded(Int(parts.tm_mday), 2),
        ]
        let clock = unsafe [padded(Int(parts.tm_hour), 2), padded(Int(parts.tm_min), 2), padded(Int(parts.tm_sec), 2)]
        return "\(date.joined(separator: "-"))T\(clock.joined(separator: ":")).\(padded(nanoseconds / 1_000_000, 3))Z"
    }
}

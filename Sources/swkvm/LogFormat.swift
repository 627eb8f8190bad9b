// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Glibc
internal import Linux
internal import Logging

/// `--log-format`.
enum LogFormat: String, ExpressibleByArgument, CaseIterable {
    case text, json

    /// A line of the log as JSON: time, level, device where it is of one, message.
    ///
    /// Bytes of a path that are no UTF-8 are printed as in the text (`\xe9`): every parser takes that.
    static func object(_ level: Logger.Level, device: String?, _ message: String) -> String {
        let lines = message.split(separator: "\n", omittingEmptySubsequences: false).map { String($0).printable }
        return JSON.object([
            ("time", .string(Timestamp.now)), ("level", .string("\(level)")), ("device", device.map(JSON.string)),
            ("message", .string(lines.joined(separator: "\n"))),
        ]).compact
    }
}

// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
internal import CLinux
internal import Glibc
internal import Linux
public import Logging
internal import Machine

extension Logger.Level: @retroactive ExpressibleByArgument {}

/// Lines for the user, so that standard output is the guest's alone.
struct StandardError {
    private let background: BackgroundErrors?
    private let format: LogFormat

    /// - Parameters:
    ///   - isBackground: no thread that prints waits for the reader of standard error: for threads that a guest waits
    ///     for.
    ///   - format: of all lines.
    init(isBackground: Bool = false, format: LogFormat = .text) {
        background = isBackground ? BackgroundErrors() : nil
        self.format = format
    }

    /// Prints lines, each with the program's name before the first; as JSON they are one object.
    /// - Parameter level: the level in JSON.
    func say(_ text: String, level: Logger.Level) {
        switch format {
        case .text: say(text)
        case .json: write(LogFormat.object(level, device: nil, text))
        }
    }

    /// The same for replies that the user has requested, or waits for.
    func say(_ text: String) {
        guard format == .text else { return say(text, level: .notice) }
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false).map { line in String(line).printable }
        write("swkvm: " + lines.joined(separator: "\n"))
    }

    /// Prints a line of the log.
    func log(_ text: String, level: Logger.Level, device: String?) {
        switch format {
        case .text: say("\(level): " + (device.map { "\($0): " } ?? "") + text)
        case .json: write(LogFormat.object(level, device: device, text))
        }
    }

    /// - Parameter text: printable, but for newlines.
    private func write(_ text: String) {
        // In raw mode a newline does not return the terminal's carriage.
        var mode = termios()
        let isRaw = unsafe tcgetattr(STDERR_FILENO, &mode) == 0 && mode.c_oflag & tcflag_t(OPOST) == 0
        var bytes: [UInt8] = []
        for byte in (text + "\n").utf8 {
            if isRaw, byte == UInt8(ascii: "\n") { bytes.append(UInt8(ascii: "\r")) }
            bytes.append(byte)
        }
        if background?.say(bytes) == true { return }
        // One call for all of it, so that lines of several processes do not mix; what does not fit is dropped.
        _ = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(STDERR_FILENO, $0.baseAddress, $0.count) }
    }

    /// Waits until all is printed, but not for a reader that takes nothing for a second.
    func close() { background?.close() }
}

/// Standard error, written by a thread that is started when there is something to be written.
private final class BackgroundErrors: Sendable {
    private let writer = Guarded<BackgroundWriter?>(nil)
    /// Bytes that may wait.
    private static let capacity = 64 << 10

    /// - Returns: false when there is no thread for it.
    func say(_ bytes: [UInt8]) -> Bool {
        writer.withLock { writer in
            if writer == nil, let descriptor = try? FileDescriptor.duplicate(of: STDERR_FILENO) {
                writer = try? BackgroundWriter(descriptor, name: "messages", capacity: Self.capacity)
            }
            // What no longer fits is lost as a whole: its reader is 64 KiB behind, and a part of a line is of no use.
            if let writer, writer.pending + bytes.count <= Self.capacity { _ = writer.take(bytes.span) }
            return writer != nil
        }
    }

    func close() {
        writer.withLock { writer in
            var turns = 100
            var left = writer?.pending ?? 0
            while left > 0, turns > 0 {
                usleep(10_000)
                let now = writer?.pending ?? 0
                turns = now < left ? 100 : turns - 1
                left = now
            }
            writer = nil
        }
    }
}

/// The log on standard error.
struct StandardErrorLog: LogHandler {
    private let output: StandardError
    var logLevel: Logger.Level
    var metadata: Logger.Metadata = [:]

    init(_ output: StandardError, level: Logger.Level) {
        self.output = output
        logLevel = level
    }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        let device = (event.metadata?[Logger.deviceKey] ?? metadata[Logger.deviceKey]).map { "\($0)" }
        output.log("\(event.message)", level: event.level, device: device)
    }
}

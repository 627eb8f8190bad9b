// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
internal import CLinux
internal import Linux
public import Logging

extension Logger.Level: @retroactive ExpressibleByArgument {}

/// Lines for the user, so that standard output is the guest's alone.
struct StandardError {
    private let background: BackgroundErrors?

    /// - Parameter isBackground: nobody who says something waits for the reader of standard error: for threads that a guest waits for.
    init(isBackground: Bool = false) { background = isBackground ? BackgroundErrors() : nil }

    /// Prints lines, each with the program's name before the first.
    func say(_ text: String) {
        // In raw mode a newline does not return the terminal's carriage.
        var mode = termios()
        let isRaw = unsafe tcgetattr(STDERR_FILENO, &mode) == 0 && mode.c_oflag & tcflag_t(OPOST) == 0
        let end = isRaw ? "\r\n" : "\n"
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false).map { line in String(line).printable }
        let bytes = Array(("swkvm: " + lines.joined(separator: end) + end).utf8)
        if background?.say(bytes) == true { return }
        // One call for all of it, so that lines of several processes do not mix; what does not fit is lost to nobody's harm.
        _ = unsafe bytes.withUnsafeBytes { unsafe write(STDERR_FILENO, $0.baseAddress, $0.count) }
    }

    /// Waits until all is printed, but not for a reader that takes nothing for a second.
    func finish() { background?.finish() }
}

/// Standard error, written by a thread that is started when there is something to be written.
private final class BackgroundErrors: Sendable {
    private let writer = Guarded<BackgroundWriter?>(nil)

    /// - Returns: false when there is no thread for it.
    func say(_ bytes: [UInt8]) -> Bool {
        writer.withLock { writer in
            if writer == nil, let descriptor = try? FileDescriptor.duplicate(of: STDERR_FILENO) {
                writer = try? BackgroundWriter(descriptor, name: "messages")
            }
            // Lines beyond what waits already are lost: whoever reads them is 64 KiB behind.
            _ = writer?.take(bytes.span)
            return writer != nil
        }
    }

    func finish() {
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

    func log(event: LogEvent) { output.say("\(event.level): \(event.message)") }
}

public import ArgumentParser
internal import CLinux
public import Logging

extension Logger.Level: @retroactive ExpressibleByArgument {}

/// Lines for the user, so that standard output is the guest's alone.
struct StandardError {
    /// Prints lines, each with the program's name before the first.
    func say(_ text: String) {
        // In raw mode a newline does not return the terminal's carriage.
        var mode = termios()
        let isRaw = unsafe tcgetattr(STDERR_FILENO, &mode) == 0 && mode.c_oflag & tcflag_t(OPOST) == 0
        let end = isRaw ? "\r\n" : "\n"
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        let bytes = Array(("swkvm: " + lines.joined(separator: end) + end).utf8)
        // One call for all of it, so that lines of several processes do not mix; what does not fit is lost to nobody's harm.
        _ = unsafe bytes.withUnsafeBytes { unsafe write(STDERR_FILENO, $0.baseAddress, $0.count) }
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

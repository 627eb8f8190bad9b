// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux
internal import Logging
internal import ManagementAPI
internal import Synchronization

/// Where the log goes and from which level on, as clients of the management API change them.
final class LogOutput: Sendable {
    private let output: StandardError
    private let level: Guarded<Logger.Level>

    init(_ output: StandardError, level: Logger.Level) {
        self.output = output
        self.level = Guarded(level)
    }

    /// Has all messages from now on go to a file, which must exist.
    func redirect(to path: String) throws(Fault) {
        do throws(SystemCallError) {
            let file = try FileDescriptor.open(path, O_WRONLY | O_APPEND | O_NONBLOCK | O_NOCTTY)
            output.close()
            if dup2(file.rawValue, STDERR_FILENO) < 0 { throw .last("dup2") }
        } catch {
            throw Fault("Logger error: Failed to open target file: \(error.reason) (os error \(error.errno))")
        }
    }

    func setLevel(_ level: LoggerSettings.Level) {
        self.level.withLock {
            $0 =
                switch level {
                case .off: .critical
                case .trace: .trace
                case .debug: .debug
                case .info: .info
                case .warning: .warning
                case .error: .error
                }
        }
    }

    /// A log whose level clients change.
    func logger(label: String) -> Logger { Logger(label: label) { _ in ChangingLog(output: self) } }

    private struct ChangingLog: LogHandler {
        let output: LogOutput
        var metadata: Logger.Metadata = [:]

        var logLevel: Logger.Level {
            get { output.level.withLock { $0 } }
            set {}
        }

        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }

        func log(event: LogEvent) {
            var log = StandardErrorLog(output.output, level: logLevel)
            log.metadata = metadata
            log.log(event: event)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux
internal import Logging
internal import Virtio

extension Configuration {
    /// `--metrics`.
    public struct Metrics: Sendable {
        public enum Format: String, Sendable, CaseIterable { case json, prometheus }

        public var path: String
        public var format: Format
        /// Seconds between two reports; nil for none but those on SIGUSR1 and at the end.
        public var interval: Int?

        public init(path: String, format: Format = .json, interval: Int? = nil) {
            self.path = path
            self.format = format
            self.interval = interval
        }
    }
}

/// Writes a machine's metrics: at intervals, on request, and at the end. It belongs to the event loop's thread.
final class MetricsReporter {
    private let configuration: Configuration.Metrics
    private let file: MetricsFile
    private let events: DeviceEvents
    private let timer: TimerFD
    /// The directory of a file that is replaced.
    let directory: Int32?

    /// Opens the file and starts its thread.
    init(_ configuration: Configuration.Metrics, log: Logger) throws(SystemCallError) {
        self.configuration = configuration
        let events = DeviceEvents { _, line in log.warning("\(line)") }
        self.events = events
        timer = try TimerFD()
        let target =
            switch configuration.format {
            case .json: try MetricsTarget.appending(to: configuration.path)
            case .prometheus: try MetricsTarget.replacing(configuration.path)
            }
        directory = if case .replace = target.kind { target.file.rawValue } else { nil }
        file = try MetricsFile(target, events: events)
    }

    /// Readable when it is time for a report, which ``takeTime()`` confirms.
    var descriptor: Int32 { timer.rawValue }

    func start() { if let interval = configuration.interval { timer.start(milliseconds: interval * 1000) } }

    /// Indicates whether it is time for a report, and waits for the next one.
    func takeTime() -> Bool {
        guard timer.take() else { return false }
        start()
        return true
    }

    func report(_ machine: Machine, _ reason: String) {
        let metrics = machine.metrics(reason)
        file.write(configuration.format == .json ? metrics.json : metrics.prometheus)
        events.summarize()
    }

    /// The machine has ended.
    func reportEnd(of machine: Machine) {
        report(machine, "end")
        file.close()
        events.end()
    }
}

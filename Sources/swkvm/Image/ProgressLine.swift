// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import DiskImage
internal import Linux

/// A line of a terminal that shows the progress of a long operation; and the signals that end such an operation
/// cleanly.
final class ProgressLine {
    private let signals = SignalSet([SIGINT, SIGTERM, SIGHUP])
    /// What was blocked before; nil if signals end the process immediately.
    private let before: SignalSet?
    private let signalDescriptor: FileDescriptor?
    /// Whether lines are overwritten, as a terminal can, or follow each other; nil shows none.
    private let isTerminal: Bool?
    private let start = ProgressLine.now()
    private var lastShown = 0.0
    private var isFinished = false
    private var lastLength = 0

    /// - Parameters:
    ///   - isShown: nil shows it where standard error is a terminal.
    ///   - holdsSignals: whether the work has something to put in order when a signal comes. One that only reads has
    ///     not, and may be waiting for a server.
    init(isShown: Bool?, holdsSignals: Bool = true) {
        // Threads that are started later have them blocked anyway; here they stay pending until they are checked.
        before = holdsSignals ? signals.block() : nil
        signalDescriptor = holdsSignals ? try? signals.descriptor() : nil
        let terminal = isatty(STDERR_FILENO) == 1
        isTerminal = isShown ?? terminal ? terminal : nil
    }

    /// Shows the progress, and returns whether to continue: not after a signal.
    func show(_ progress: ImageProgress) -> Bool {
        if let isTerminal {
            let now = Self.now()
            let isOver = progress.done == progress.total
            if isOver ? !isFinished : now - lastShown >= (isTerminal ? 0.1 : 1) {
                isFinished = isOver
                lastShown = now
                draw(Self.text(done: progress.done, total: progress.total, seconds: now - start), isTerminal)
            }
        }
        switch signalDescriptor {
        case .some(let descriptor): return SignalSet.next(from: descriptor) == nil
        case nil: return true
        }
    }

    /// Leaves the line, and lets signals through again.
    func end() {
        if isTerminal == true, lastLength > 0 { Self.write("\n") }
        before?.restore()
    }

    /// `  42.0%  1.2 GiB of 2.9 GiB  640 MiB/s  3 s left`.
    static func text(done: UInt64, total: UInt64, seconds: Double) -> String {
        let share = total == 0 ? 1 : Double(done) / Double(total)
        let thousandths = Int(share * 1000)
        var text = "\(thousandths / 10).\(thousandths % 10)%  \(ImageTool.size(done)) of \(ImageTool.size(total))"
        guard seconds > 0, done > 0 else { return text }
        let rate = Double(done) / seconds
        text += "  \(ImageTool.size(UInt64(min(rate, 1e18))))/s"
        if done < total { text += "  \(duration(Double(total - done) / rate)) left" }
        return text
    }

    /// `41 s`, `3 min 20 s`, `2 h 5 min`.
    static func duration(_ seconds: Double) -> String {
        let whole = Int(min(max(seconds, 0), 1e9).rounded(.up))
        if whole < 60 { return "\(whole) s" }
        if whole < 3600 { return "\(whole / 60) min \(whole % 60) s" }
        return "\(whole / 3600) h \(whole % 3600 / 60) min"
    }

    private func draw(_ text: String, _ isTerminal: Bool) {
        guard isTerminal else { return Self.write(text + "\n") }
        // Spaces over what is left of a longer one.
        let padding = String(repeating: " ", count: max(0, lastLength - text.count))
        lastLength = text.count
        Self.write("\r" + text + padding)
    }

    static func write(_ text: String) {
        let bytes = Array(text.utf8)
        // One call for all of it; what does not fit is dropped.
        _ = unsafe bytes.withUnsafeBytes { unsafe CLinux.write(STDERR_FILENO, $0.baseAddress, $0.count) }
    }

    typealias Seconds = Double

    static func now() -> Seconds {
        var time = timespec()
        unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}

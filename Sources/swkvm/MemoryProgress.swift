// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Linux

/// A line of the terminal that shows how far the guest's memory is filled (`--prealloc`), and disappears when it is.
final class MemoryProgress: Sendable {
    private struct State {
        var start: ProgressLine.Seconds?
        var lastShown: ProgressLine.Seconds = 0
        var length = 0
    }

    /// Worker threads report, one at a time.
    private let state = Guarded(State())

    /// nil where standard error is no terminal.
    init?() { if isatty(STDERR_FILENO) != 1 { return nil } }

    /// Shows it ten times a second at most.
    func show(_ done: UInt64, of total: UInt64) {
        state.withLock { state in
            let now = ProgressLine.now()
            let start = state.start ?? now
            if done >= total { return erase(&state) }
            guard state.start == nil || now - state.lastShown >= 0.1 else { return }
            state.start = start
            state.lastShown = now
            let text = "guest memory: " + ProgressLine.text(done: done, total: total, seconds: now - start)
            // Spaces over what is left of a longer one.
            let padding = String(repeating: " ", count: max(0, state.length - text.count))
            state.length = max(state.length, text.count)
            ProgressLine.write("\r" + text + padding)
        }
    }

    /// Takes the line away, however the work has ended.
    func end() { state.withLock { erase(&$0) } }

    private func erase(_ state: inout State) {
        if state.length > 0 { ProgressLine.write("\r" + String(repeating: " ", count: state.length) + "\r") }
        state = State()
    }
}

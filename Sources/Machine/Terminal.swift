// SPDX-License-Identifier: Apache-2.0

internal import CLinux
package import Devices
internal import Linux

/// The terminal on a descriptor, in raw mode while this process is its foreground job.
///
/// Raw: every key goes to the guest, Ctrl-C and Ctrl-Z too. The mode from before comes back with the object's end, and,
/// since a process can be killed, also by a guardian: a child process that does nothing but wait for this one's end.
package final class RawTerminal {
    private let descriptor: Int32
    /// The mode that the terminal had when it was first the process's.
    private var before: termios?
    private var guardian: Guardian?
    /// Indicates whether the terminal was the process's at the last ``update()``.
    package private(set) var isOurs = false

    /// What a process has of a terminal.
    package enum State {
        /// There is none.
        case none
        /// It is not the process's yet, and is taken when it is.
        case elsewhere
        /// It is, or was, the process's; a child process restores it.
        case guarded
    }

    package var state: State { before == nil ? .elsewhere : .guarded }

    /// nil when the descriptor, if there is one, is no terminal. The terminal is left as it is until ``update()``.
    package init?(_ descriptor: Int32?) {
        var mode = termios()
        guard let descriptor, unsafe tcgetattr(descriptor, &mode) == 0 else { return nil }
        self.descriptor = descriptor
    }

    /// Takes raw mode if the process is the terminal's foreground job now; a shell that has the terminal for itself is
    /// left alone. A process that is brought to the foreground, or continues after a stop, has to look again: the shell
    /// has changed the mode meanwhile.
    package func update() {
        isOurs = Self.isForeground(descriptor)
        var mode = termios()
        guard isOurs, unsafe tcgetattr(descriptor, &mode) == 0 else { return }
        if before == nil {
            before = mode
            // The guardian first: from here on there is something to restore.
            guardian = Guardian(descriptor, mode)
        }
        guard !mode.isRaw else { return }
        unsafe cfmakeraw(&mode)
        unsafe tcsetattr(descriptor, TCSANOW, &mode)
    }

    /// The terminal's size; nil if it does not report one.
    package var size: TerminalSize? {
        var size = winsize()
        guard unsafe clinux_ioctl(descriptor, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0, size.ws_row > 0 else {
            return nil
        }
        return TerminalSize(columns: size.ws_col, rows: size.ws_row)
    }

    /// Shows bytes on the terminal, as far as it takes them now: one whose output is held does not hold this process.
    package func show(_ bytes: [UInt8]) {
        var entry = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
        guard isOurs, unsafe poll(&entry, 1, 0) == 1 else { return }
        // A few bytes, for which there is room.
        _ = unsafe bytes.withUnsafeBytes { unsafe write(descriptor, $0.baseAddress, $0.count) }
    }

    /// Puts the mode from before back, if the terminal is the process's.
    package func restore() {
        isOurs = false
        if let before { Self.restore(descriptor, before) }
    }

    private static func restore(_ descriptor: Int32, _ mode: termios) {
        guard isForeground(descriptor) else { return }
        // What the guest has printed is to be printed the raw way, but a terminal whose output is held does not hold
        // this process.
        var turns = 100
        var waiting: Int32 = 0
        while turns > 0, unsafe clinux_ioctl(descriptor, UInt(TIOCOUTQ), &waiting) == 0, waiting > 0 {
            usleep(10_000)
            turns -= 1
        }
        var mode = mode
        unsafe tcsetattr(descriptor, TCSANOW, &mode)
    }

    private static func isForeground(_ descriptor: Int32) -> Bool {
        let group = tcgetpgrp(descriptor)
        // No group: it is not this session's terminal, and no shell's job control is about it.
        return group < 0 || group == getpgrp()
    }

    deinit {
        if let before { Self.restore(descriptor, before) }
    }
}

extension termios {
    /// Indicates whether it is what cfmakeraw(3) makes of a mode.
    fileprivate var isRaw: Bool {
        var raw = self
        unsafe cfmakeraw(&raw)
        return (raw.c_iflag, raw.c_oflag, raw.c_cflag, raw.c_lflag) == (c_iflag, c_oflag, c_cflag, c_lflag)
    }
}

/// The child that restores a terminal's mode if its parent cannot.
private struct Guardian: ~Copyable {
    private let process: pid_t
    /// The write end of a pipe that only this process holds: the child reads its end when this process is gone.
    private let lifeline: FileDescriptor

    /// nil when the host gives no pipe or process: the terminal is then restored by the parent alone.
    init?(_ terminal: Int32, _ mode: termios) {
        var ends: (Int32, Int32) = (-1, -1)
        let made = unsafe withUnsafeMutableBytes(of: &ends) {
            unsafe clinux_pipe_cloexec($0.assumingMemoryBound(to: Int32.self).baseAddress)
        }
        guard made == 0 else { return nil }
        let readEnd = FileDescriptor(owning: ends.0)
        let writeEnd = FileDescriptor(owning: ends.1)
        var mode = mode
        // Other threads may hold locks now: the child runs C that needs none, and never returns.
        let child = unsafe clinux_guard_terminal(terminal, &mode, readEnd.rawValue)
        guard child > 0 else { return nil }
        process = child
        lifeline = writeEnd
    }

    deinit {
        // It has nothing left to do: the parent has restored the mode, or is about to. A byte signals that, where the
        // pipe's end does not; a confined process sends no signals.
        var byte: UInt8 = 0
        _ = unsafe write(lifeline.rawValue, &byte, 1)
        var status: Int32 = 0
        unsafe waitpid(process, &status, 0)
    }
}

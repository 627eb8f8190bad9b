internal import CLinux
internal import Linux

/// The terminal in raw mode, for as long as the value lives.
///
/// Raw: every key goes to the guest, Ctrl-C and Ctrl-Z too. The mode from before comes back with the value's end, and, since a
/// process can be killed, also by a guardian: a child process that does nothing but wait for this one's end.
struct RawTerminal: ~Copyable {
    private let descriptor: Int32
    private let before: termios
    private let guardian: Guardian?

    /// nil when the descriptor is no terminal, or is one that the shell has for itself now: swkvm is a job in the background.
    init?(_ descriptor: Int32) {
        var mode = termios()
        let foreground = tcgetpgrp(descriptor)
        guard foreground < 0 || foreground == getpgrp() else { return nil }
        guard unsafe tcgetattr(descriptor, &mode) == 0 else { return nil }
        self.descriptor = descriptor
        before = mode
        // The guardian first: from here on there is something to restore.
        guardian = Guardian(descriptor, mode)
        unsafe cfmakeraw(&mode)
        unsafe tcsetattr(descriptor, TCSANOW, &mode)
    }

    deinit {
        var mode = before
        // TCSADRAIN: what the guest has printed is still printed the raw way.
        unsafe tcsetattr(descriptor, TCSADRAIN, &mode)
    }
}

/// The child that restores a terminal's mode if its parent cannot.
private struct Guardian: ~Copyable {
    private let process: pid_t
    /// The write end of a pipe that only this process holds: the child reads its end when this process is gone.
    private let lifeline: FileDescriptor

    /// nil when there is no pipe or process to be had: the terminal is then restored by the parent alone.
    init?(_ terminal: Int32, _ mode: termios) {
        var ends: (Int32, Int32) = (-1, -1)
        let made = unsafe withUnsafeMutableBytes(of: &ends) { unsafe clinux_pipe_cloexec($0.assumingMemoryBound(to: Int32.self).baseAddress) }
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
        // It has nothing left to do: the parent has restored the mode, or is about to.
        kill(process, SIGKILL)
        var status: Int32 = 0
        unsafe waitpid(process, &status, 0)
    }
}

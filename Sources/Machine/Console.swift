// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import DiskImage
internal import Glibc
internal import Linux
internal import Virtio

/// The host's side of a machine's serial port, as ``Configuration/ConsoleKind`` names it.
///
/// vCPU threads write output through ``output``; the event loop reads input and accepts clients.
struct Console {
    /// What the serial port writes to.
    let output: ConsoleOutput
    /// Where input comes from; nil when there is none, or only clients of the socket bring it.
    let input: ConsoleInput?
    /// A UNIX socket for clients.
    let listener: Listener?
    /// For the user: where the console is, when that is not where swkvm was started.
    let announcement: String?
    /// The files that were not there before.
    private let createdPaths: [String]

    private init(
        output: consuming FileDescriptor? = nil, mayBlock: Bool = false, rotation: FileRotation? = nil,
        limit: TokenBucket.Rate? = nil, input: consuming FileDescriptor? = nil,
        listener: Listener? = nil,
        announcement: String? = nil, name: String = "", log: consuming OutputFile? = nil,
        events: DeviceEvents = .none, createdPaths: [String] = []
    ) throws(SystemCallError) {
        self.createdPaths = createdPaths
        self.output = try ConsoleOutput(
            output, mayBlock: mayBlock, rotation: rotation, limit: limit, name: name, log: log, events: events)
        if let input { self.input = ConsoleInput(input) } else { self.input = nil }
        self.listener = listener
        self.announcement = announcement
    }

    /// Opens what the configuration names.
    /// - Parameter events: gets what the host refuses later.
    static func open(
        _ kind: Configuration.ConsoleKind, _ limits: Configuration.ConsoleLimits = .none,
        events: DeviceEvents = .none
    ) throws(MachineError) -> Console {
        let limit = limits.output
        var log: OutputFile?
        if let path = limits.log {
            do throws(SystemCallError) { log = try OutputFile(path, limits) } catch {
                throw .console(.file(path), error)
            }
        }
        let created = log?.createdPaths ?? []
        do throws(SystemCallError) {
            switch kind {
            case .none: return try Console()
            case .stdio: return try openStandard(limit, events)
            case .file(let path): return try openFile(path, limits, events)
            case .pty: return try openPseudoTerminal(limit)
            case .unix(let path):
                return try Console(
                    limit: limit, listener: Listener(path: path), announcement: "the console is the socket \(path)",
                    log: log.take(), events: events, createdPaths: created)
            }
        } catch {
            for path in created { removeName(path) }
            throw .console(kind, error)
        }
    }

    /// Takes back what opening it made: for a machine that does not start.
    func withdraw() {
        // The worst is an empty file.
        for path in createdPaths { removeName(path) }
    }

    private static func openFile(
        _ path: String, _ limits: Configuration.ConsoleLimits, _ events: DeviceEvents
    ) throws(SystemCallError) -> Console {
        let file = try OutputFile(path, limits)
        return try Console(
            output: file.descriptor, mayBlock: file.mayBlock, rotation: file.rotation, limit: limits.output,
            name: path, events: events, createdPaths: file.createdPaths)
    }

    private static func openStandard(
        _ limit: TokenBucket.Rate?, _ events: DeviceEvents
    ) throws(SystemCallError) -> Console {
        var input = openAnew(STDIN_FILENO, O_RDONLY)
        if input == nil { input = try duplicate(STDIN_FILENO) }
        if let own = openAnew(STDOUT_FILENO, O_WRONLY) { return try Console(output: own, limit: limit, input: input) }
        let isSocket = (FileDescriptor.kind(of: STDOUT_FILENO) ?? 0) == S_IFSOCK
        return try Console(
            output: duplicate(STDOUT_FILENO), mayBlock: !isSocket, limit: limit, input: input,
            name: "(standard output)", events: events)
    }

    /// A non-blocking descriptor of its own for a standard stream: the stream's own open file is shared with the shell,
    /// whose reads and writes would change with it. nil where there is none.
    private static func openAnew(_ number: Int32, _ mode: Int32) -> FileDescriptor? {
        guard let kind = FileDescriptor.kind(of: number) else { return nil }
        // Opening again works for terminals and pipes, unless another user made them. A regular file would lose its
        // position and a socket cannot be opened: those are duplicated.
        if kind == S_IFCHR || kind == S_IFIFO,
            let own = try? FileDescriptor.open("/proc/self/fd/\(number)", mode | O_NONBLOCK | O_NOCTTY)
        {
            return own
        }
        // A terminal that belongs to another user, as after `su`, can be opened as the controlling terminal that it is.
        return tcgetpgrp(number) >= 0 ? try? FileDescriptor.open("/dev/tty", mode | O_NONBLOCK | O_NOCTTY) : nil
    }

    private static func duplicate(_ number: Int32) throws(SystemCallError) -> FileDescriptor? {
        FileDescriptor.kind(of: number) == nil ? nil : try FileDescriptor.duplicate(of: number)
    }

    private static func openPseudoTerminal(_ limit: TokenBucket.Rate?) throws(SystemCallError) -> Console {
        let master = try FileDescriptor.open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK)
        var locked: Int32 = 0
        try master.ioctl(CLINUX_TIOCSPTLCK, &locked, named: "TIOCSPTLCK")
        var number: UInt32 = 0
        try master.ioctl(CLINUX_TIOCGPTN, &number, named: "TIOCGPTN")
        let path = "/dev/pts/\(number)"
        do {
            // What the guest sends is for the client to see, not for the terminal to echo back. Opened and closed: from
            // now on the kernel reports (POLLHUP) when no client has it open.
            let client = try FileDescriptor.open(path, O_RDWR | O_NOCTTY)
            var mode = termios()
            if unsafe tcgetattr(client.rawValue, &mode) == 0 {
                unsafe cfmakeraw(&mode)
                unsafe tcsetattr(client.rawValue, TCSANOW, &mode)
            }
        }
        return try Console(
            output: master.duplicate(), limit: limit, input: master, announcement: "the console is the terminal \(path)"
        )
    }
}

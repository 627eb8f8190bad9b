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
    /// A UNIX socket for clients, one at a time.
    let listener: Listener?
    /// For the user: where the console is, when that is not where swkvm was started.
    let announcement: String?
    /// The files that were not there before.
    private let createdPaths: [String]

    private init(
        output: consuming FileDescriptor? = nil, mayBlock: Bool = false, rotation: FileRotation? = nil,
        limit: TokenBucket.Rate? = nil, input: consuming FileDescriptor? = nil,
        listener: Listener? = nil,
        announcement: String? = nil, name: String = "", events: DeviceEvents = .none, createdPaths: [String] = []
    ) throws(SystemCallError) {
        self.createdPaths = createdPaths
        self.output = try ConsoleOutput(
            output, mayBlock: mayBlock, rotation: rotation, limit: limit, name: name, events: events)
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
        do throws(SystemCallError) {
            switch kind {
            case .none: return try Console()
            case .stdio: return try openStandard(limit, events)
            case .file(let path): return try openFile(path, limits, events)
            case .pty: return try openPseudoTerminal(limit)
            case .unix(let path):
                return try Console(
                    limit: limit, listener: Listener(path: path), announcement: "the console is the socket \(path)")
            }
        } catch { throw .console(kind, error) }
    }

    /// Takes back what opening it made: for a machine that does not start.
    func withdraw() {
        // The worst is an empty file.
        for path in createdPaths { removeName(path) }
    }

    private static func openFile(
        _ path: String, _ limits: Configuration.ConsoleLimits, _ events: DeviceEvents
    ) throws(SystemCallError) -> Console {
        // Non-blocking for a FIFO or a terminal, whose reader may not be there, or stop; a regular file does not heed
        // it.
        var flags = O_APPEND | O_NONBLOCK | O_NOCTTY
        var created: [String] = []
        guard let file = limits.file else {
            flags |= O_WRONLY
            let descriptor = try create(path, flags, &created)
            let kind = FileDescriptor.kind(of: descriptor.rawValue) ?? 0
            try checkUse(descriptor, kind)
            return try Console(
                output: descriptor, mayBlock: kind != S_IFIFO && kind != S_IFCHR, limit: limits.output,
                name: path, events: events, createdPaths: created)
        }
        // It is read when it is rotated.
        flags |= O_RDWR
        let descriptor = try create(path, flags, &created)
        do throws(SystemCallError) {
            try checkForRotation(descriptor)
            let rotation = FileRotation(limit: file.size, size: try descriptor.size())
            for name in limits.names(path).dropFirst() {
                // Symbolic links there are not followed.
                let backup = try create(name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, &created)
                try checkForRotation(backup)
                rotation.add(backup)
            }
            return try Console(
                output: descriptor, mayBlock: true, rotation: rotation, limit: limits.output, name: path,
                events: events,
                createdPaths: created)
        } catch {
            for path in created { removeName(path) }
            throw error
        }
    }

    /// Refuses what output would destroy: a block device, another process's disk.
    private static func checkUse(_ file: borrowing FileDescriptor, _ kind: mode_t) throws(SystemCallError) {
        if kind == S_IFBLK { throw SystemCallError("open", errno: ENOTSUP) }
        if kind == S_IFREG, isImageInUse(file) { throw SystemCallError("open", errno: ETXTBSY) }
    }

    /// Only a regular file can be rotated, and only by one machine.
    private static func checkForRotation(_ file: borrowing FileDescriptor) throws(SystemCallError) {
        guard (FileDescriptor.kind(of: file.rawValue) ?? 0) == S_IFREG else {
            throw SystemCallError("rotate", errno: ESPIPE)
        }
        try checkUse(file, S_IFREG)
        if flock(file.rawValue, LOCK_EX | LOCK_NB) < 0 { throw .last("flock") }
    }

    /// Opens a file.
    /// - Parameter created: gets its path if it was not there before.
    private static func create(
        _ path: String, _ flags: Int32, _ created: inout [String]
    ) throws(SystemCallError) -> FileDescriptor {
        if let new = try? FileDescriptor.open(path, flags | O_CREAT | O_EXCL, mode: 0o600) {
            created.append(path)
            return new
        }
        return try FileDescriptor.open(path, flags | O_CREAT, mode: 0o600)
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

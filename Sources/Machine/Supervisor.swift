internal import CLinux
internal import Devices
internal import GuestMemory
internal import Linux
public import Logging

/// Runs one machine in the foreground: signals, console and terminal, until the machine has ended.
///
/// SIGINT and SIGTERM ask the guest to power off, the second one ends the machine; so does SIGHUP at once. The terminal's mode is
/// restored before ``run(_:log:report:)`` returns.
public enum Supervisor {
    /// Makes the machine of a configuration, runs it, and gives back all it took.
    /// - Parameters:
    ///   - log: gets what happens inside.
    ///   - report: gets lines for the user, without a newline; the terminal is in raw mode, if there is one.
    public static func run(
        _ configuration: Configuration, log: Logger, report: (String) -> Void
    ) throws(MachineError) -> MachineEnd {
        // Before any other thread exists, so that all of them inherit it: signals are read from a descriptor; a client that has
        // gone, or a file grown to its limit, is an error of write(2), not a signal.
        let signals = SignalSet([SIGINT, SIGTERM, SIGHUP])
        let errors = SignalSet([SIGPIPE, SIGXFSZ, SIGTTOU, SIGTTIN])
        let before = signals.block()
        errors.block()
        defer {
            // One that came for this thread's own write would end the process now.
            errors.discardPending()
            before.restore()
        }
        let console = try Console.open(configuration.console)
        let machine: Machine
        do throws(MachineError) {
            machine = try Machine(configuration, output: console.output, log: log, isInterrupted: { signals.pending() != nil })
        } catch .memory(.interrupted) {
            // There is no guest yet that could power off.
            return .signal(signals.takePending() ?? SIGINT)
        }
        // Last before the start: an error's sentence is printed on an ordinary terminal.
        let terminal = configuration.console == .stdio ? RawTerminal(STDIN_FILENO) : nil
        var session: Session
        do throws(SystemCallError) {
            session = try Session(machine, console, signals: signals.descriptor(), isInteractive: terminal != nil)
        } catch { throw .host(purpose: "wait for signals and the console", error) }
        if let announcement = session.console.announcement { report(announcement) }
        try machine.start()
        if let announcement = machine.debuggerAnnouncement { report(announcement) }
        // What parsed the command line and built the machine is not needed again, and is most of what is resident.
        ProgramText.release()
        session.loop(report)
        let end = machine.finish()
        session.flushOutput(isPatient: configuration.console == .stdio && !end.isForced)
        _ = consume terminal
        if configuration.memory.backing == .transparent, let usage = machine.status.memory {
            report("the guest's RAM had \(usage.transparentHuge >> 20) MiB in transparent huge pages, of \(usage.resident >> 20) MiB resident")
        }
        if let table = machine.exitReport { report(table) }
        return end
    }
}

/// The state of the foreground's loop.
private struct Session: ~Copyable {
    private enum Token {
        static let end: UInt64 = 0, signal: UInt64 = 1, input: UInt64 = 2, room: UInt64 = 3, full: UInt64 = 4, writable: UInt64 = 5
        static let client: UInt64 = 6
    }

    let machine: Machine
    var console: Console
    private let signals: FileDescriptor
    private let isInteractive: Bool
    private let epoll: Epoll
    private var escape = EscapeKey()
    /// Input that the serial port has no room for yet.
    private var pending: [UInt8] = []
    /// The input may have more; false after it said that it has not.
    private var isReadable = true
    private var signalCount = 0

    init(_ machine: Machine, _ console: Console, signals: consuming FileDescriptor, isInteractive: Bool) throws(SystemCallError) {
        let epoll = try Epoll()
        try epoll.add(machine.endDescriptor, .input, token: Token.end)
        try epoll.add(machine.serialRoomDescriptor, .input, token: Token.room)
        try epoll.add(signals.rawValue, .input, token: Token.signal)
        try epoll.add(console.output.isFull.rawValue, .input, token: Token.full)
        if let listener = console.listener?.descriptor.rawValue {
            // Edge-triggered: a client that cannot be taken for lack of descriptors must not keep the loop busy.
            try epoll.add(listener, [.input, .edgeTriggered], token: Token.client)
        }
        if let input = console.input { try Self.watch(input, epoll) }
        self.machine = machine
        self.console = console
        self.signals = signals
        self.isInteractive = isInteractive
        self.epoll = epoll
    }

    /// Serves until the machine ends.
    mutating func loop(_ report: (String) -> Void) {
        pump(report)
        var hasEnded = false
        while !hasEnded {
            var ready: [UInt64] = []
            do throws(SystemCallError) { try epoll.wait { token, _ in ready.append(token) } } catch {
                return machine.stop(.hostError("the console's loop cannot wait: \(error)"))
            }
            for token in ready {
                switch token {
                case Token.end: hasEnded = true
                case Token.signal: handleSignals(report)
                case Token.input:
                    isReadable = true
                    pump(report)
                case Token.room:
                    machine.serialHasRoom()
                    pump(report)
                case Token.full: waitUntilWritable()
                case Token.writable: if machine.serial.flush() { stopWaiting() }
                case Token.client: acceptClients(report)
                default: break
                }
            }
        }
    }

    /// Gives what the guest has printed to whoever reads it.
    /// - Parameter isPatient: waits until it is taken or a signal comes, as any writer to a pipe does; otherwise a second at most after
    ///   the last byte taken: a machine must not outlive its guest because a client sleeps.
    mutating func flushOutput(isPatient: Bool) {
        while !machine.serial.flush(), let number = console.output.rawValue {
            let pending = machine.serial.pendingOutput
            var entries = [
                pollfd(fd: number, events: Int16(POLLOUT), revents: 0), pollfd(fd: signals.rawValue, events: Int16(POLLIN), revents: 0),
            ]
            // The array has two entries.
            _ = unsafe poll(&entries, 2, isPatient ? -1 : 1000)
            machine.serial.flush()
            if entries[1].revents != 0 || !isPatient && machine.serial.pendingOutput >= pending { return }
        }
    }

    private mutating func handleSignals(_ report: (String) -> Void) {
        while let number = SignalSet.next(from: signals) {
            signalCount += 1
            if signalCount > 1 || number == SIGHUP { return machine.stop(.signal(number)) }
            report("asked the guest to power off; a second signal ends it")
            machine.requestPowerOff()
        }
    }

    // MARK: Input

    private static func watch(_ input: ConsoleInput, _ epoll: borrowing Epoll) throws(SystemCallError) {
        guard input.isWaitable else { return }
        do throws(SystemCallError) {
            // Edge-triggered: input that the guest has no room for must not keep the loop busy.
            try epoll.add(input.descriptor.rawValue, [.input, .edgeTriggered], token: Token.input)
        } catch {
            // /dev/null and its like need no waiting.
            if error.errno != EPERM { throw error }
        }
    }

    /// Moves input into the serial port for as long as there is both.
    private mutating func pump(_ report: (String) -> Void) {
        while true {
            if !pending.isEmpty {
                let taken = machine.serial.receive(pending.span)
                pending.removeFirst(taken)
                if !pending.isEmpty { return }
            }
            guard isReadable, let input = console.input else { return }
            switch input.read() {
            case .empty:
                isReadable = false
            case .end:
                dropInput()
            case .bytes(let bytes):
                guard isInteractive else {
                    pending = bytes
                    continue
                }
                for action in escape.filter(bytes) {
                    switch action {
                    case .pass(let keys): pending += keys
                    case .quit: return machine.stop(.quit)
                    case .help: for line in EscapeKey.help.split(separator: "\n") { report(String(line)) }
                    case .status: report(machine.status.description)
                    }
                }
            }
        }
    }

    private mutating func dropInput() {
        if let input = console.input { epoll.remove(input.descriptor.rawValue) }
        console.input = nil
        // The end of a socket's client is the end of its output too; a standard input's end is not standard output's.
        if console.listener != nil {
            console.output.disconnect()
            // Nobody waits any more for what it did not take: that is dropped now, so that the guest's transmitter goes on.
            machine.serial.flush()
        }
    }

    private mutating func acceptClients(_ report: (String) -> Void) {
        // The one before may have gone, its end still unread.
        isReadable = true
        pump(report)
        while let client = console.listener?.accept() {
            // One at a time: a second client is told so by the end of its stream.
            guard console.input == nil, let output = try? client.duplicate() else { continue }
            let input = ConsoleInput(client)
            console.input = input
            console.output.connect(output)
            isReadable = true
            try? Self.watch(input, epoll)
            machine.serial.flush()
        }
    }

    // MARK: Output

    private func waitUntilWritable() {
        console.output.isFull.drain()
        guard let number = console.output.rawValue else { return _ = machine.serial.flush() }
        // Already watched: the pseudo-terminal's two sides are two descriptors, so this one is only ever for output.
        do throws(SystemCallError) { try epoll.add(number, .output, token: Token.writable) } catch {
            if error.errno != EEXIST { machine.serial.flush() }
        }
    }

    private func stopWaiting() {
        if let number = console.output.rawValue { epoll.remove(number) }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Devices
internal import Linux
internal import Logging
internal import Virtio

/// The event loop of a ``ForegroundSession``: console, terminal, signals and timers, for all boots of a machine.
///
/// What they ask of the machine goes to its ``MachineControl``.
struct EventLoop: ~Copyable {
    private enum Token {
        static let end: UInt64 = 0, signal: UInt64 = 1, input: UInt64 = 2, room: UInt64 = 3, attention: UInt64 = 4,
            writable: UInt64 = 5
        static let client: UInt64 = 6, stopTimer: UInt64 = 7, terminalTimer: UInt64 = 8, eventTimer: UInt64 = 9,
            metrics: UInt64 = 10, answer: UInt64 = 11, memoryTimer: UInt64 = 12, limitTimer: UInt64 = 13,
            remote: UInt64 = 14
    }

    /// How often a background job checks whether it is in the foreground, in milliseconds: a shell sends a job that
    /// runs no signal then.
    private static let terminalPause = 250
    /// When the memory of the start is freed, in milliseconds after it: most guests of a short life have ended, and
    /// those that boot a large kernel have done most of it a minute later.
    private static let memoryPauses = [1000, 60_000]
    /// Keys that are held for a guest that does not take them, in bytes; further ones are dropped. A text that is
    /// pasted fits.
    private static let maximumKeys = 64 << 10

    let machine: Machine
    let console: Console
    private var control: MachineControl { machine.control }
    private let signals: FileDescriptor
    private let epoll: Epoll
    private let stopTimer: TimerFD
    private let terminalTimer: TimerFD
    /// Once a minute, for events of devices that were only counted.
    private let eventTimer: TimerFD
    /// Milliseconds.
    private let eventPeriod: Int
    private let memoryTimer: TimerFD
    /// Until the console's limit allows more output.
    private let limitTimer: TimerFD
    /// Of ``memoryPauses``, those that the timer has not waited for.
    private var memoryPauses = Self.memoryPauses[...]
    private let metrics: MetricsReporter?
    private let remote: RemoteSession?
    /// Answers to requests that keys made.
    private let answers: ControlAnswers
    private var terminal: RawTerminal?
    private var escape = EscapeKey()
    private var prompt = CommandPrompt()
    private var stopSignals = StopSignals()
    /// Set by SIGHUP.
    private var isTerminalClosed = false
    /// What input comes from; nil where clients send it, and after its end.
    private var input: ConsoleInput?
    private var clients: ConsoleClients
    /// Input that the guest's console has no room for yet.
    private var pending: [UInt8] = []
    /// Keys were dropped since the guest last took all of them.
    private var hasDroppedKeys = false
    /// The input may have more; false after it reported that it has not.
    private var isReadable = true

    /// - Parameter terminal: what may be the terminal that keys come from.
    init(
        _ machine: Machine, _ console: Console, signals: consuming FileDescriptor, terminal: Int32?,
        metrics: MetricsReporter? = nil, remote: RemoteSession? = nil, eventPeriod: Int = 60_000
    ) throws(SystemCallError) {
        let epoll = try Epoll()
        let stopTimer = try TimerFD()
        let terminalTimer = try TimerFD()
        let eventTimer = try TimerFD()
        let memoryTimer = try TimerFD()
        let limitTimer = try TimerFD()
        let answers = try ControlAnswers()
        try epoll.add(machine.endDescriptor, .input, token: Token.end)
        try epoll.add(machine.consoleRoomDescriptor, .input, token: Token.room)
        try epoll.add(signals.rawValue, .input, token: Token.signal)
        try epoll.add(console.output.attention.rawValue, .input, token: Token.attention)
        try epoll.add(stopTimer.rawValue, .input, token: Token.stopTimer)
        try epoll.add(terminalTimer.rawValue, .input, token: Token.terminalTimer)
        try epoll.add(answers.event.rawValue, .input, token: Token.answer)
        try epoll.add(eventTimer.rawValue, .input, token: Token.eventTimer)
        eventTimer.start(milliseconds: eventPeriod)
        try epoll.add(memoryTimer.rawValue, .input, token: Token.memoryTimer)
        try epoll.add(limitTimer.rawValue, .input, token: Token.limitTimer)
        if let metrics {
            try epoll.add(metrics.descriptor, .input, token: Token.metrics)
            metrics.start()
        }
        if let remote { try epoll.add(remote.event.rawValue, .input, token: Token.remote) }
        if let listener = console.listener?.descriptor.rawValue {
            // Edge-triggered: a client that cannot be taken for lack of descriptors must not keep the loop busy.
            try epoll.add(listener, [.input, .edgeTriggered], token: Token.client)
        }
        if let input = console.input { try Self.watch(input, epoll) }
        self.machine = machine
        self.console = console
        self.signals = signals
        self.epoll = epoll
        self.stopTimer = stopTimer
        self.terminalTimer = terminalTimer
        self.eventTimer = eventTimer
        self.eventPeriod = eventPeriod
        self.memoryTimer = memoryTimer
        self.limitTimer = limitTimer
        self.metrics = metrics
        self.remote = remote
        self.answers = answers
        input = console.input
        clients = ConsoleClients(console.output)
        self.terminal = RawTerminal(terminal)
    }

    /// Serves until the guest ends or resets itself.
    mutating func run(_ report: (String) -> Void) {
        memoryPauses = Self.memoryPauses[...]
        startMemoryTimer()
        pump(report)
        do throws(SystemCallError) { while try !serve(report) {} } catch { fail(error) }
    }

    /// Serves for a time, while no guest runs: less when nobody wants the next boot any more.
    mutating func pause(milliseconds: UInt64, _ report: (String) -> Void) {
        let end = TimerFD.now &+ milliseconds
        // It stays readable until the next boot.
        epoll.remove(machine.endDescriptor)
        do throws(SystemCallError) {
            while !wasAskedToPowerOff, machine.canRestart {
                let now = TimerFD.now
                guard now < end else { break }
                _ = try serve(timeout: Int32(clamping: end - now), report)
            }
            try epoll.add(machine.endDescriptor, .input, token: Token.end)
        } catch { fail(error) }
    }

    private func fail(_ error: SystemCallError) { control.end(.hostError("the main event loop failed: \(error)")) }

    /// Handles the events that are there, or the next ones.
    /// - Parameter timeout: milliseconds to wait for them; -1 waits without a limit.
    /// - Returns: whether the guest has ended or reset itself.
    private mutating func serve(timeout: Int32 = -1, _ report: (String) -> Void) throws(SystemCallError) -> Bool {
        var ready: [UInt64] = []
        try epoll.wait(timeout: timeout) { token, _ in ready.append(token) }
        for token in ready {
            switch token {
            case Token.signal: handleSignals(report)
            case Token.input:
                isReadable = true
                pump(report)
                if clients.update(epoll) {
                    isReadable = true
                    pump(report)
                }
            case Token.room:
                machine.consoleHasRoom()
                pump(report)
            case Token.attention: waitUntilWritable()
            case Token.writable where console.listener != nil: clients.sendBacklogs(epoll, token: Token.writable)
            case Token.writable: if machine.consolePort.flush() || console.output.delay != nil { stopWaiting() }
            case Token.client: acceptClients(report)
            case Token.stopTimer: if stopTimer.take() { control.end(.stopTimeout(seconds: stopSeconds ?? 0)) }
            case Token.terminalTimer: if terminalTimer.take() { takeTerminal() }
            case Token.metrics: if metrics?.takeTime() == true { metrics?.report(machine, "interval") }
            case Token.remote:
                remote?.serve {
                    metrics?.report(machine, "request")
                    return metrics != nil
                }
            case Token.answer: reportAnswers(report)
            case Token.eventTimer: if eventTimer.take() { reportEvents() }
            case Token.limitTimer: if limitTimer.take() { machine.consolePort.flush() }
            case Token.memoryTimer:
                if memoryTimer.take() {
                    ProgramMemory.release()
                    startMemoryTimer()
                }
            default: break
            }
        }
        return ready.contains(Token.end)
    }

    /// Writes what the guest has printed to its reader.
    /// - Parameter isPatient: waits until it is taken or a signal comes, as any writer to a pipe does; otherwise a
    ///   second at most after the last byte taken: a machine must not outlive its guest because a client sleeps.
    mutating func flushOutput(isPatient: Bool) {
        while true {
            console.output.attention.drain()
            console.output.noticeNextWrite()
            let isTaken = machine.consolePort.flush()
            console.output.drainClients()
            let pending = machine.consolePort.pendingOutput + console.output.pending
            if isTaken, pending == 0 { return }
            let number = console.output.rawValue ?? console.output.descriptorBehind
            var entries = [
                pollfd(
                    fd: number ?? console.output.attention.rawValue, events: Int16(number == nil ? POLLIN : POLLOUT),
                    revents: 0),
                pollfd(fd: signals.rawValue, events: Int16(POLLIN), revents: 0),
            ]
            // The array has two entries.
            _ = unsafe poll(&entries, 2, isPatient ? -1 : 1000)
            if entries[1].revents != 0 {
                // Job control's are none that end anything.
                guard let signal = SignalSet.next(from: signals) else { continue }
                if ![SIGCONT, SIGTSTP, SIGUSR1, SIGUSR2].contains(signal) { return }
            }
            machine.consolePort.flush()
            console.output.drainClients()
            if !isPatient, machine.consolePort.pendingOutput + console.output.pending >= pending { return }
        }
    }

    /// Reports the answers to requests that keys made; once more when the control's thread has ended.
    func reportAnswers(_ report: (String) -> Void) {
        for line in answers.take() {
            // A disk that has stopped again has said that the machine is paused.
            if line == ControlService.running, machine.board.hasStoppedDisk { continue }
            report(line)
        }
    }

    /// Waits for the next time at which memory is freed, if there is one.
    private mutating func startMemoryTimer() {
        guard let pause = memoryPauses.popFirst() else { return }
        memoryTimer.start(milliseconds: pause)
    }

    private func reportEvents() {
        machine.summarizeEvents()
        console.output.events.summarize()
        eventTimer.start(milliseconds: eventPeriod)
    }

    // MARK: Signals

    /// Indicates whether the guest was asked to power off.
    var wasAskedToPowerOff: Bool { stopSignals.wasAsked }

    private mutating func handleSignals(_ report: (String) -> Void) {
        while let number = SignalSet.next(from: signals) {
            switch number {
            case SIGCONT: takeTerminal()
            case SIGWINCH: takeTerminalSize()
            case SIGTSTP:
                terminal?.restore()
                SignalSet.applyDefault(of: SIGTSTP)
                takeTerminal()
            case SIGUSR1: reportMetrics()
            case SIGUSR2: control.post(.resume, answer: answers.add)
            default: handleStopSignal(number, report)
            }
        }
    }

    private func reportMetrics() {
        guard let metrics else { return machine.log.warning("SIGUSR1: no --metrics file: nothing was written") }
        metrics.report(machine, "signal")
    }

    private mutating func handleStopSignal(_ number: Int32, _ report: (String) -> Void) {
        switch stopSignals.signal(at: TimerFD.now) {
        case .none: break
        case .end: control.end(.signal(number))
        case .powerOff:
            // The terminal is closed: no user is left to send another signal.
            if number == SIGHUP { isTerminalClosed = true }
            let limit = stopSeconds
            if let limit { stopTimer.start(milliseconds: limit * 1000) }
            report(
                "asked the guest to power off; a second signal ends the machine"
                    + (limit.map { ", and so does a timeout of \($0) seconds" } ?? ""))
            // A disk that has stopped is about to pause it.
            if control.isPaused || machine.board.hasStoppedDisk {
                report("the machine is paused: the guest can power off only after it has been resumed")
            }
            if machine.isStoppedByDebugger {
                report("the debugger has stopped the guest: it can power off only after the debugger has resumed it")
            }
            // Refused where the guest has just ended or reset itself: then the session ends too.
            control.post(.powerButton)
        }
    }

    /// How long the guest may take to power off, in seconds; nil for as long as it likes.
    private var stopSeconds: Int? {
        switch machine.configuration.stopTimeout {
        case .never: return nil
        case .seconds(let seconds): return seconds
        case .automatic:
            let isAtTerminal = !isTerminalClosed && (isatty(STDIN_FILENO) == 1 || isatty(STDERR_FILENO) == 1)
            return isAtTerminal ? nil : Configuration.StopTimeout.standard
        }
    }

    // MARK: The terminal

    /// Takes raw mode where that is due now, and looks again later where it is not.
    mutating func takeTerminal() {
        terminal?.update()
        takeTerminalSize()
        if terminal?.isOurs == false { terminalTimer.start(milliseconds: Self.terminalPause) }
    }

    /// Tells the guest how large the terminal is.
    private func takeTerminalSize() {
        if let size = terminal?.size { machine.setTerminalSize(size) }
    }

    /// Indicates whether keys come from a terminal, and two of them are for swkvm.
    var hasTerminal: Bool { terminal?.isOurs == true }

    /// What the process has of a terminal.
    var terminalState: RawTerminal.State { terminal?.state ?? .none }

    mutating func giveTerminalBack() { terminal = nil }

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

    /// Moves input into the guest's console for as long as there is both.
    private mutating func pump(_ report: (String) -> Void) {
        while true {
            if !pending.isEmpty {
                let taken = machine.consolePort.receive(pending.span)
                pending.removeFirst(taken)
                // A terminal is read on: keys for swkvm must come through, also when the guest takes none of its own,
                // as in a pause.
                if !pending.isEmpty, terminal?.isOurs != true { return }
            }
            if pending.isEmpty { hasDroppedKeys = false }
            guard isReadable, let input = input ?? clients.keyboard else { return }
            switch input.read() {
            case .empty: isReadable = false
            case .end: endInput()
            case .bytes(let bytes):
                guard terminal?.isOurs == true else {
                    pending = bytes
                    continue
                }
                for action in escape.filter(bytes) {
                    switch action {
                    case .pass(let keys): take(keys, report)
                    case .quit: return control.end(.quit)
                    case .help: for line in EscapeKey.help.split(separator: "\n") { report(String(line)) }
                    case .status: control.post(.status, answer: answers.add)
                    case .pause: control.post(.togglePause, answer: answers.add)
                    case .resume: control.post(.resume, answer: answers.add)
                    case .prompt:
                        prompt.open()
                        terminal?.show(prompt.takeEcho())
                    }
                }
            }
        }
    }

    /// Gives keys to the prompt, while there is one, and the rest to the guest.
    private mutating func take(_ keys: [UInt8], _ report: (String) -> Void) {
        var keys = keys[...]
        while prompt.isActive, !keys.isEmpty {
            let outcome = prompt.take(&keys)
            // Before the answer.
            terminal?.show(prompt.takeEcho())
            if case .entered(let line) = outcome { run(line, report) }
        }
        let room = max(0, Self.maximumKeys - pending.count)
        pending += keys.prefix(room)
        guard keys.count > room, !hasDroppedKeys else { return }
        hasDroppedKeys = true
        report(
            "the guest has not read the last \(Self.maximumKeys >> 10) KiB of keys; further ones are dropped until it has"
        )
    }

    private func run(_ line: String, _ report: (String) -> Void) {
        do throws(MachineControlError) {
            switch try MachineCommand.parse(line) {
            case nil: break
            case .help: for line in MachineCommand.helpLines { report(line) }
            case .quit: control.end(.quit)
            case .request(let request): control.post(request, answer: answers.add)
            }
        } catch { report(error.description) }
    }

    /// What input comes from is at its end.
    private mutating func endInput() {
        isReadable = true
        guard let own = input else { return clients.endKeyboard(epoll) }
        epoll.remove(own.descriptor.rawValue)
        input = nil
    }

    private mutating func acceptClients(_ report: (String) -> Void) {
        // One that has gone makes room, and may have had the keyboard.
        _ = clients.update(epoll)
        while let next = console.listener?.accept() { clients.add(next, epoll, token: Token.input) }
        machine.consolePort.flush()
        isReadable = true
        pump(report)
    }

    // MARK: Output

    private func waitUntilWritable() {
        console.output.attention.drain()
        if console.listener != nil { clients.sendBacklogs(epoll, token: Token.writable) }
        if let delay = console.output.delay { return limitTimer.start(nanoseconds: delay) }
        guard let number = console.output.rawValue else { return _ = machine.consolePort.flush() }
        // Already watched: the pseudo-terminal's two sides are two descriptors, so this one is only ever for output.
        do throws(SystemCallError) { try epoll.add(number, .output, token: Token.writable) } catch {
            if error.errno != EEXIST { machine.consolePort.flush() }
        }
    }

    private func stopWaiting() {
        if let number = console.output.rawValue { epoll.remove(number) }
    }
}

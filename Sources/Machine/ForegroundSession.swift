// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory
internal import Linux
public import Logging
internal import Virtio

/// Runs one machine in the foreground: signals, console and terminal, from boot to boot, until the machine has ended.
///
/// SIGINT, SIGTERM and SIGHUP ask the guest to power off, the second one ends the machine. SIGUSR1 writes the metrics,
/// SIGUSR2 resumes a paused machine. Those that were ignored at the start stay ignored. The terminal's mode is restored
/// before ``run(_:log:report:)`` returns.
public enum ForegroundSession {
    /// Creates the machine of a configuration, runs it, and releases all of its resources.
    /// - Parameters:
    ///   - log: gets what happens inside.
    ///   - report: gets lines for the user, without a newline; the terminal is in raw mode, if there is one. It must
    ///     not wait.
    ///   - didStart: called when the guest runs; false ends the machine.
    ///   - progress: gets the bytes of memory that are filled before the guest starts, and those in all, from the
    ///     threads that do it.
    ///   - remote: the socket of a server for the machine; nil for none.
    public static func run(
        _ configuration: Configuration, log: Logger, report: (String) -> Void,
        didStart: () -> Bool = { true }, progress: (@Sendable (_ done: UInt64, _ total: UInt64) -> Void)? = nil,
        remote: RemoteSession? = nil
    ) throws(MachineError) -> MachineEnd {
        // No program that is started for the machine gets a client's connection, and the sandbox closes none.
        let goOn = remote?.stop()
        defer { goOn?() }
        try OutputFiles(configuration).check()
        ProgramMemory.useOneHeap()
        // Before any other thread exists, so that all of them inherit it: signals are read from a descriptor; a client
        // that has gone, or a file grown to its limit, is an error of write(2), not a signal.
        let stops = SignalSet([SIGINT, SIGTERM, SIGHUP].filter { !SignalSet.isIgnored($0) })
        let jobControl = SignalSet(
            [SIGTSTP, SIGUSR1, SIGUSR2].filter { !SignalSet.isIgnored($0) } + [SIGCONT, SIGWINCH])
        let errors = SignalSet([SIGPIPE, SIGXFSZ, SIGTTOU, SIGTTIN])
        let before = stops.block()
        jobControl.block()
        errors.block()
        defer {
            // One that came for this thread's own write would end the process now.
            errors.discardPending()
            jobControl.discardPending()
            before.restore()
        }
        // First: of two starts of a machine, the second one must touch nothing.
        let process = try configuration.processFile.map { path throws(MachineError) in
            do throws(ProcessFile.Refusal) { return try ProcessFile(path) } catch {
                throw .processFile(path: path, error)
            }
        }
        defer { withExtendedLifetime(process) {} }
        // Before anything that a limit is about, and left after it.
        let group = try configuration.controlGroup.map { wanted throws(MachineError) in
            do throws(ControlGroupError) { return try ControlGroup.enter(wanted) } catch { throw .controlGroup(error) }
        }
        defer { group?.leave() }
        let metrics = try configuration.metrics.map { wanted throws(MachineError) in
            do throws(SystemCallError) { return try MetricsReporter(wanted, log: log) } catch {
                throw .metrics(path: wanted.path, error)
            }
        }
        let console = try Console.open(
            configuration.console, configuration.consoleLimits,
            events: DeviceEvents { _, line in log.warning("\(line)") })
        var hasStarted = false
        defer { if !hasStarted { console.withdraw() } }
        let machine: Machine
        do throws(MachineError) {
            machine = try Machine(
                configuration, output: console.output, log: log, isInterrupted: { stops.pending() != nil },
                progress: progress)
        } catch {
            // There is no guest yet that could power off, and a cancellation is not an error.
            if let signal = stops.takePending() { return .cancelled(signal) }
            throw error
        }
        var loop: EventLoop
        do throws(SystemCallError) {
            loop = try EventLoop(
                machine, console, signals: stops.union(jobControl).descriptor(),
                terminal: configuration.console == .stdio ? STDIN_FILENO : nil,
                metrics: metrics, remote: remote)
        } catch { throw .host(purpose: "wait for signals and the console", error) }
        // Who starts a machine in the background has named its socket.
        if configuration.messageFile == nil || configuration.console == .pty, let announcement = console.announcement {
            report(announcement)
        }
        // Last before the start: an error's sentence is printed on an ordinary terminal.
        loop.takeTerminal()
        if let note = configuration.bootNote { report(note) }
        // A kernel may print nothing for a long time, or nothing at all, and a raw terminal takes no Ctrl-C.
        if loop.hasTerminal {
            report("\(machine.bootDescription) boots; Ctrl-A x ends the machine, Ctrl-A h shows help")
        }
        // Everything is open, and the threads that follow inherit it.
        remote?.reportConfinement()
        let confinement = try Confinement(
            configuration, machine, console, metrics, process, remote, group?.parentDescriptor, loop.terminalState)
        defer { confinement.end() }
        try machine.start(confinement.sandbox)
        hasStarted = true
        remote?.reportStart(of: machine, confinement.sandbox)
        goOn?()
        for warning in confinement.warnings { report(warning) }
        if !didStart() { machine.control.end(.signal(SIGHUP)) }
        if let announcement = machine.debuggerAnnouncement { report(announcement) }
        let end = try serve(machine, &loop, stops, report)
        machine.endEvents()
        metrics?.reportEnd(of: machine)
        loop.console.output.endLimit()
        // A requested end does not wait for a reader of what the guest has printed.
        loop.flushOutput(isPatient: configuration.console == .stdio && !end.isForced && !loop.wasAskedToPowerOff)
        loop.console.output.events.end()
        loop.giveTerminalBack()
        if configuration.memory.backing == .transparent, let usage = machine.status.memory {
            report(
                "the guest's RAM had \(usage.transparentHuge >> 20) MiB in transparent huge pages, of \(usage.resident >> 20) MiB resident"
            )
        }
        if let table = machine.exitReport { report(table) }
        return end
    }

    /// Serves the guest's boots, one after the other, until one of them is the last.
    private static func serve(
        _ machine: Machine, _ loop: inout EventLoop, _ stops: SignalSet, _ report: (String) -> Void
    ) throws(MachineError) -> MachineEnd {
        var faults = TripleFaults()
        while true {
            loop.run(report)
            let end = machine.waitForEnd()
            loop.reportAnswers(report)
            guard machine.configuration.onReboot == .restart, machine.canRestart else { return end }
            // It was to power off, so it is not booted again: the host wants it to be off.
            if loop.wasAskedToPowerOff { return rebootedInstead(report) }
            if let sentence = end.sentence, case .tripleFault = end {
                let response = faults.response(at: TimerFD.now)
                report(sentence + "; it is reset" + (response.pause > 0 ? " in \(response.pause / 1000) s" : ""))
                if response.isDetailed, let details = end.details { report(details) }
                if response.pause > 0 {
                    loop.pause(milliseconds: response.pause, report)
                    if loop.wasAskedToPowerOff { return rebootedInstead(report) }
                }
            }
            do throws(MachineError) {
                guard try machine.restart(isInterrupted: { stops.pending() != nil }) else {
                    return machine.waitForEnd()
                }
            } catch .memory(.interrupted) {
                _ = stops.takePending()
                return rebootedInstead(report)
            }
            if let announcement = machine.debuggerAnnouncement { report(announcement) }
        }
    }

    private static func rebootedInstead(_ report: (String) -> Void) -> MachineEnd {
        report("the guest rebooted instead of powering off: the machine ends")
        return .powerOff
    }
}

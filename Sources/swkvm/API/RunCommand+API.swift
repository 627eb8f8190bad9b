// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Glibc
internal import Linux
internal import Logging
internal import Machine
internal import ManagementAPI
internal import Sandbox

/// `swkvm run --api-sock PATH` and `--config-file FILE`.
extension RunCommand {
    /// Exit statuses of Firecracker: a path where there is a file already, or a configuration that is refused.
    private static let managementFailure: Int32 = 1

    /// Indicates whether clients, or a file of theirs, describe the machine.
    var isDescribedByClients: Bool {
        configFile != nil || apiSock != nil && image == nil && kernel == nil && firmware == nil && boot == nil
    }

    /// Refuses options that describe the machine where something else does.
    func validateManagement() throws {
        for (option, path) in [("api-sock", apiSock), ("config-file", configFile)] where path?.isEmpty == true {
            throw ValidationError("the option --\(option) requires a non-empty path")
        }
        guard isDescribedByClients else { return }
        let given: [(String, Bool)] = [
            ("IMAGE", image != nil), ("--kernel", kernel != nil), ("--firmware", firmware != nil),
            ("--boot", boot != nil), ("--initrd", initrd != nil), ("--cmdline", !cmdline.isEmpty),
            ("--cmdline-raw", cmdlineRaw != nil), ("--append", !append.isEmpty), ("--cpus", cpus != 1),
            ("--mem", mem != Self.defaultMemory), ("--hugepages", hugepages != nil), ("--numa", !numa.isEmpty),
            ("--disk", !disk.isEmpty), ("--net", !net.isEmpty), ("--rng", rng != nil),
            ("--metrics", metrics != nil), ("--ssh-key and the like", !seed.files.isEmpty || !seed.sshKey.isEmpty),
        ]
        guard let option = given.first(where: \.1)?.0 else { return }
        if configFile != nil {
            throw ValidationError(
                "the options --config-file and \(option) cannot be combined: the file describes the machine")
        }
        throw ValidationError(
            "the option \(option) requires an IMAGE, --kernel or --firmware with --api-sock: without them requests describe the machine; `--kernel bundled` boots the bundled guest"
        )
    }

    /// What runs under the API, or what a file describes.
    func runManaged() throws {
        var start = try daemon.map { try startInBackground(messages: $0) }
        let output = StandardError(isBackground: true, format: logFormat)
        defer { output.close() }
        let logOutput = LogOutput(output, level: logLevel)
        var base = self.configuration
        let log = logOutput.logger(label: base.name)
        func fail(_ text: String, _ status: Int32 = Self.managementFailure) -> ExitCode {
            output.say(text, level: .critical)
            return ExitCode(status)
        }
        if isDescribedByClients, onReboot == nil { base.onReboot = .exit }
        var described: MachineDescription?
        if let configFile {
            do {
                let file = try ConfigurationFile(readFile(configFile, limit: 1 << 20))
                if let path = file.logger?.path { try logOutput.redirect(to: path) }
                if let level = file.logger?.level { logOutput.setLevel(level) }
                base = try base.adding(file.machine)
                described = file.machine
            } catch let error as Fault { throw fail("\(configFile.printable): \(error.message)") } catch {
                throw fail("the configuration file \(configFile.printable) cannot be read: \(error)")
            }
        } else if !isDescribedByClients {
            described = base.description
        }
        guard let apiSock else {
            return try finish(runSession(base, log, output, &start, nil), output)
        }
        let served: Served
        do throws(SystemCallError) {
            served = try Served(
                apiSock, name: name ?? "anonymous-instance", base, described, logOutput)
        } catch {
            if error.errno == EADDRINUSE {
                throw fail(
                    "the API's socket cannot be \(apiSock.printable): there is such a file; remove it if no process uses it"
                )
            }
            throw fail("the API's socket \(apiSock.printable) cannot be opened: \(error.reason) (\(error.call))")
        }
        let (session, machine) = (served.session, served.machine)
        defer { session.close() }
        if described != nil { return try finish(runSession(base, log, output, &start, session), output) }
        // Who waits for a machine in the background can use the socket now.
        if let begun = start.take(), !begun.finish() { return }
        while let configuration = machine.waitForStart(or: served.signals) {
            let end: MachineEnd
            do throws(MachineError) {
                end = try ForegroundSession.run(configuration, log: log, report: output.say, remote: session)
            } catch {
                // What is confined cannot start another machine.
                guard !session.hasConfined else { throw fail(error.description, error.exitStatus) }
                machine.startFailed(error.description)
                continue
            }
            return try finish(end, output)
        }
        let number = SignalSet.next(from: served.signals) ?? SIGTERM
        throw ExitCode(ExitStatus.signalBase + number)
    }

    /// Reports the machine's end. A guest that resets itself ends a machine of clients, as Firecracker's does.
    private func finish(_ end: MachineEnd, _ output: StandardError) throws {
        if isDescribedByClients, onReboot == nil, case .reset = end { return }
        try report(end, output)
    }

    private func runSession(
        _ configuration: Configuration, _ log: Logger, _ output: StandardError, _ start: inout BackgroundStart?,
        _ session: RemoteSession?
    ) throws -> MachineEnd {
        do throws(MachineError) {
            return try ForegroundSession.run(
                configuration, log: log, report: output.say, didStart: { start.take()?.finish() ?? true },
                remote: session)
        } catch {
            output.say(error.description, level: .critical)
            throw ExitCode(configFile != nil ? Self.managementFailure : error.exitStatus)
        }
    }
}

/// The server's socket and thread, and what they serve.
private struct Served: ~Copyable {
    let session: RemoteSession
    let machine: ManagedMachine
    /// Those that end the process.
    let signals: FileDescriptor

    init(
        _ path: String, name: String, _ base: Configuration, _ description: MachineDescription?, _ output: LogOutput
    ) throws(SystemCallError) {
        ProgramMemory.useOneHeap()
        // Before any other thread exists, so that all of them inherit it.
        let signals = SignalSet([SIGINT, SIGTERM, SIGHUP].filter { !SignalSet.isIgnored($0) })
        signals.block()
        let descriptor = try signals.descriptor()
        let session = try RemoteSession(path: path)
        let machine = try ManagedMachine(
            name: name, base: base, description ?? MachineDescription(), isDescribed: description != nil, session,
            output)
        let server = try ManagementServer(session.duplicateDescriptor(), machine)
        session.whenStarting { server.hold() }
        session.whenStarted { started, sandbox in
            server.perform {
                sandbox.confine(.api)
                machine.started(started)
            }
        }
        self.session = session
        self.machine = machine
        self.signals = descriptor
    }
}

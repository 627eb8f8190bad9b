// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux
internal import Machine
internal import ManagementAPI

/// A machine that clients of the management API describe, start and control.
///
/// The server's thread changes its state; the main thread waits for the start (``waitForStart(or:)``) and runs the
/// machine.
final class ManagedMachine: ManagementTarget {
    private enum Phase {
        /// It is being described.
        case described
        /// The main thread creates it.
        case starting
        case running(MachineControl)
    }

    private struct State {
        var phase = Phase.described
        var description: MachineDescription
        /// For the client that asked for the start.
        var didStart: (@Sendable (ManagementAnswer) -> Void)?
    }

    private let name: String
    /// What the description is added to.
    private let base: Configuration
    private let session: RemoteSession
    private let output: LogOutput
    private let state: Guarded<State>
    /// Signalled for the main thread.
    private let startRequest: EventFD

    /// - Parameters:
    ///   - description: of the machine so far.
    ///   - isDescribed: the machine is that of the command line or of a file, and is about to start.
    init(
        name: String, base: Configuration, _ description: MachineDescription, isDescribed: Bool,
        _ session: RemoteSession, _ output: LogOutput
    ) throws(SystemCallError) {
        self.name = name
        self.base = base
        self.session = session
        self.output = output
        state = Guarded(State(phase: isDescribed ? .starting : .described, description: description))
        startRequest = try EventFD()
    }

    // MARK: The main thread

    /// Waits until a client starts the machine.
    /// - Returns: its configuration; nil when a signal came first.
    func waitForStart(or signals: borrowing FileDescriptor) -> Configuration? {
        waitUntilReadable(startRequest.rawValue, or: signals.rawValue)
        guard startRequest.drain() > 0 else { return nil }
        let description = state.withLock { $0.description }
        do throws(Fault) { return try base.adding(description) } catch {
            // Each part was checked when it was set.
            startFailed(error.message)
            return waitForStart(or: signals)
        }
    }

    /// The machine could not be created: it may be described otherwise, and started again.
    func startFailed(_ reason: String) {
        let answer = state.withLock { state in
            state.phase = .described
            defer { state.didStart = nil }
            return state.didStart
        }
        answer?(.fault("Start microvm error: \(reason)"))
    }

    /// The guest runs.
    func started(_ machine: Machine) {
        let control = machine.control
        let answer = state.withLock { state in
            state.phase = .running(control)
            defer { state.didStart = nil }
            return state.didStart
        }
        answer?(.done)
    }

    // MARK: Requests

    func handle(_ request: ManagementRequest, answer: @escaping @Sendable (ManagementAnswer) -> Void) {
        switch request {
        case .instance: answer(instance)
        case .version:
            answer(
                .value(
                    .object([
                        ("firecracker_version", .string(Self.interfaceVersion)),
                        ("swkvm_version", .string(Command.version)),
                    ])))
        case .configuration: answer(.value(state.withLock { $0.description }.json))
        case .machineSettings: answer(.value(state.withLock { $0.description }.machineJSON))
        case .action(.start): start(answer)
        case .action(.sendCtrlAltDel): control(answer) { $0.post(.powerButton, answer: Self.reply(answer)) }
        case .action(.flushMetrics):
            control(answer) { [session] _ in
                session.flushMetrics { isDone in
                    answer(isDone ? .done : .fault("Metrics error: no file for metrics is configured (PUT /metrics)."))
                }
            }
        case .setState(let state):
            control(answer) { $0.post(state == .paused ? .pause : .resume, answer: Self.reply(answer)) }
        case .absent(let what): answer(refusal(of: what))
        default: answer(change(request))
        }
    }

    /// The version of Firecracker's API that this is.
    static let interfaceVersion = "1.12.1"

    private var instance: ManagementAnswer {
        let word =
            switch state.withLock({ $0.phase }) {
            case .described, .starting: "Not started"
            case .running(let control): control.isPaused ? "Paused" : "Running"
            }
        return .value(
            .object([
                ("id", .string(name)), ("state", .string(word)), ("vmm_version", .string(Command.version)),
                ("app_name", "swkvm"),
            ]))
    }

    private static let afterStart = "The requested operation is not supported after starting the microVM."
    private static let beforeStart = "The requested operation is not supported before starting the microVM."

    private func start(_ answer: @escaping @Sendable (ManagementAnswer) -> Void) {
        let refusal: ManagementAnswer? = state.withLock { state in
            guard case .described = state.phase else { return .fault(Self.afterStart) }
            guard state.description.boot != nil else {
                return .fault("Start microvm error: Cannot start microvm without kernel configuration.")
            }
            state.phase = .starting
            state.didStart = answer
            return nil
        }
        if let refusal { return answer(refusal) }
        startRequest.signal()
    }

    private func control(_ answer: (ManagementAnswer) -> Void, _ body: (MachineControl) -> Void) {
        guard case .running(let control) = state.withLock({ $0.phase }) else { return answer(.fault(Self.beforeStart)) }
        body(control)
    }

    private static func reply(
        _ answer: @escaping @Sendable (ManagementAnswer) -> Void
    ) -> @Sendable (MachineControl.Answer) -> Void {
        { result in
            switch result {
            case .success, .failure(.alreadyPaused), .failure(.notPaused): answer(.done)
            case .failure(let error): answer(.fault("\(error)."))
            }
        }
    }

    /// Changes the description of a machine that has not started.
    private func change(_ request: ManagementRequest) -> ManagementAnswer {
        let result: Result<Bool, Fault> = state.withLock { state in
            guard case .described = state.phase else { return .failure(Fault(Self.afterStart)) }
            var description = state.description
            do throws(Fault) {
                let isDeprecated = try apply(request, &description)
                state.description = description
                return .success(isDeprecated)
            } catch { return .failure(error) }
        }
        switch result {
        case .success(let isDeprecated):
            var answer = ManagementAnswer.done
            answer.isDeprecated = isDeprecated
            return answer
        case .failure(let fault): return .fault(fault.message)
        }
    }

    /// - Returns: whether the request has a deprecated member.
    private func apply(_ request: ManagementRequest, _ description: inout MachineDescription) throws(Fault) -> Bool {
        switch request {
        case .setMachine(let settings), .changeMachine(let settings):
            try description.change(settings)
            return settings.hasTemplate
        case .setBoot(let boot):
            try Self.checkReadable(boot.kernel, "Boot source error: The kernel file cannot be opened: ")
            if let initrd = boot.initrd {
                try Self.checkReadable(
                    initrd,
                    "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. ")
            }
            description.boot = boot
        case .setDrive(let drive):
            if drive.options == nil {
                try Self.checkReadable(
                    drive.path, isWritten: !drive.isReadOnly,
                    "Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: ",
                    suffix: " " + drive.path)
            }
            _ = try Configuration.disk(drive)
            try description.set(drive)
        case .setInterface(let interface):
            _ = try Configuration.network(interface)
            try description.set(interface)
        case .setEntropy(let limiter): description.entropy = .some(limiter)
        case .setSerial(let path): description.serial = path
        case .setLogger(let logger):
            if let path = logger.path { try output.redirect(to: path) }
            if let level = logger.level { output.setLevel(level) }
        case .setMetrics(let path):
            try Self.checkReadable(
                path, isWritten: true, "Metrics error: Cannot initialize the metrics system due to bad user input: ")
            try description.set(metrics: path)
        default: break
        }
        return false
    }

    private static func checkReadable(
        _ path: String, isWritten: Bool = false, _ prefix: String, suffix: String = ""
    ) throws(Fault) {
        do throws(SystemCallError) {
            _ = try FileDescriptor.open(path, (isWritten ? O_RDWR : O_RDONLY) | O_NONBLOCK | O_NOCTTY)
        } catch { throw Fault("\(prefix)\(error.reason) (os error \(error.errno))\(suffix)") }
    }

    /// What swkvm has not, in the words of Firecracker where it has no such device either.
    private func refusal(of what: ManagementRequest.Absent) -> ManagementAnswer {
        let isRunning: Bool
        if case .running = state.withLock({ $0.phase }) { isRunning = true } else { isRunning = false }
        switch what {
        case .balloonChange, .snapshot, .driveChange, .interfaceChange:
            guard isRunning else { return .fault(Self.beforeStart) }
        case .cpuTemplate, .vsock, .snapshotLoad:
            guard !isRunning else { return .fault(Self.afterStart) }
        case .balloon, .metadata: break
        }
        switch what {
        case .cpuTemplate: return .fault("CPU config error: swkvm has no CPU templates.")
        case .vsock: return .fault("Vsock config error: this API has no vsock device.")
        case .balloon, .balloonChange: return .fault("Balloon config error: No balloon device found.")
        case .metadata: return .fault("MMDS config error: this API has no metadata service.")
        case .snapshot: return .fault("Create snapshot error: swkvm has no snapshots of machines.")
        case .snapshotLoad: return .fault("Load snapshot error: swkvm has no snapshots of machines.")
        case .driveChange: return .fault("Drive config error: swkvm does not change the drives of a running machine.")
        case .interfaceChange:
            return .fault("Network config error: swkvm does not change the interfaces of a running machine.")
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import DiskImage
internal import KVM
internal import Linux
internal import Logging
internal import Sandbox
internal import Synchronization
internal import Virtio

/// What the control's thread does while one board's guest runs.
struct ControlService: Sendable {
    /// The answer to who has resumed the machine.
    static let running = "the machine is running"

    let control: MachineControl
    private let board: Board
    private let ending: Ending
    private let sandbox: Sandbox
    private let log: Logger
    private let status: @Sendable () -> MachineStatus

    init(
        _ control: MachineControl, _ board: Board, _ ending: Ending, _ sandbox: Sandbox, _ log: Logger,
        status: @escaping @Sendable () -> MachineStatus
    ) {
        self.control = control
        self.board = board
        self.ending = ending
        self.sandbox = sandbox
        self.log = log
        self.status = status
    }

    mutating func run() {
        // Beside the guest, which has just started: its end will not have to wait for this.
        board.virtualMachine.waitForReplacedBuses()
        serveUrgentRequests()
        while !ending.isStopping {
            if board.hasStoppedDisk, !control.isPaused {
                // Cancelled if a client resumes the machine, whose disk then tries again, or ends it.
                _ = try? pause()
            } else if let item = control.takeRequest() {
                serve(item)
            } else {
                waitForAttention()
            }
        }
        control.close()
    }

    private func serveUrgentRequests() {
        while !ending.isStopping, let item = control.takeUrgentRequest() { serve(item) }
    }

    private func serve(_ item: MachineControl.Item) {
        let answer: MachineControl.Answer
        log.trace("control: \(item.work)")
        do throws(MachineControlError) { answer = .success(try serve(item.work)) } catch { answer = .failure(error) }
        switch answer {
        case .success(let sentence): log.trace("control: \(item.work): \(sentence)")
        case .failure(let error): log.trace("control: \(item.work) was refused: \(error)")
        }
        item.answer(answer)
    }

    private func serve(_ work: MachineControl.Work) throws(MachineControlError) -> String {
        switch work {
        case .request(let request): try serve(request)
        case .attach(let device): try attach(device)
        case .detach(let name): try detach(name)
        }
    }

    private func serve(_ request: MachineControl.Request) throws(MachineControlError) -> String {
        switch request {
        case .pause: try pause()
        case .resume: try resume()
        case .togglePause: control.isPaused ? try resume() : try pause()
        case .status: status().description
        case .powerButton: pressPowerButton()
        case .setLink(let name, let isUp): try setLink(name, isUp: isUp)
        case .resize(let name, let size): try resize(name, to: size)
        case .balloon: try control.balloonStatistics().report
        case .setBalloonTarget(let target): try setBalloon(target)
        case .setBalloonInterval(let seconds): try setBalloonInterval(seconds)
        case .requestBalloonHints(let acknowledgesEnd):
            try hints("the guest is asked for hints about free memory") {
                $0.requestHints(acknowledgesEnd: acknowledgesEnd)
            }
        case .endBalloonHints: try hints("the guest may use all memory again") { $0.endHints() }
        }
    }

    private func pressPowerButton() -> String {
        board.power.requestPowerOff()
        return control.isPaused
            ? "the power button was pressed; the guest sees it when it is resumed" : "the power button was pressed"
    }

    // MARK: Pausing

    /// vCPUs first: then the devices get no new work, and only have to complete what they have in flight.
    private func pause() throws(MachineControlError) -> String {
        guard !control.isPaused else { throw .alreadyPaused }
        for cpu in board.cpus where cpu.pausePoint.request(.control) { cpu.kick() }
        try waitInPause { board.cpus.allSatisfy { $0.pausePoint.isStopped } }
        let devices = board.registry.slots
        let quiet = QuietDevices()
        for slot in devices {
            slot.device.pause { [control] in
                quiet.count.add(1, ordering: .acquiringAndReleasing)
                control.attention.event.signal()
            }
        }
        try waitInPause { quiet.count.load(ordering: .acquiring) == devices.count }
        board.timer.pause()
        control.setPaused(true)
        return "the machine is paused"
    }

    private func resume() throws(MachineControlError) -> String {
        guard control.isPaused else { throw .notPaused }
        board.timer.resume()
        // Notifies the guest's watchdog of the lost time. Refused if the guest does not use KVM's clock.
        for cpu in board.cpus { try? cpu.cpu.markPausedClock() }
        control.setPaused(false)
        letRun()
        return Self.running
    }

    private func letRun() {
        for slot in board.registry.slots { slot.device.resume() }
        for cpu in board.cpus { cpu.pausePoint.release(.control) }
    }

    // MARK: Devices

    private func attach(_ device: any VirtioDevice) throws(MachineControlError) -> String {
        let slot: VirtioSlot
        do throws(SystemCallError) { try device.start { [sandbox] in sandbox.confine(.device) } } catch {
            throw .refused(error.description)
        }
        do throws(MachineError) { slot = try board.registry.attach(device, board.virtualMachine) } catch {
            throw .refused(error.description)
        }
        if control.isPaused { device.pause {} }
        try reloadTables()
        return "\(slot.description) was attached"
    }

    private func detach(_ name: String) throws(MachineControlError) -> String {
        guard let slot = board.registry.slot(named: name) else {
            throw .noDevice(name, kind: "device", available: board.registry.slots.map(\.device.name))
        }
        board.registry.hide(slot)
        try reloadTables()
        board.registry.detach(slot, board.virtualMachine)
        return "\(name) was detached"
    }

    /// Has all vCPU threads take the address map's new table; when this returns, none uses another.
    private func reloadTables() throws(MachineControlError) {
        for cpu in board.cpus where cpu.pausePoint.requestReload() { cpu.kick() }
        while !board.cpus.allSatisfy({ $0.pausePoint.isReloaded }) {
            if ending.isStopping { throw .notRunning }
            waitForAttention()
        }
    }

    private func setLink(_ name: String, isUp: Bool) throws(MachineControlError) -> String {
        let devices = board.registry.slots.compactMap { $0.device as? NetworkDevice }
        guard let device = devices.first(where: { $0.name == name }) else {
            throw .noDevice(name, kind: "network interface", available: devices.map(\.name))
        }
        let isLinkUp = device.setCable(isPluggedIn: isUp)
        if isUp, !isLinkUp {
            return
                "the cable of \(name) is plugged in, but the link stays down: \(device.hostProblem)"
        }
        return "the link of \(name) is \(isUp ? "up" : "down")"
    }

    private func resize(_ name: String, to size: UInt64?) throws(MachineControlError) -> String {
        let devices = board.registry.slots.compactMap { $0.device as? BlockDevice }
        guard let device = devices.first(where: { $0.name == name }) else {
            throw .noDevice(name, kind: "disk", available: devices.map(\.name))
        }
        let result = Guarded<Result<UInt64, DiskImageError>?>(nil)
        let before = device.capacity
        device.resize(to: size) { [control] outcome in
            result.withLock { $0 = outcome }
            control.attention.event.signal()
        }
        while true {
            if let outcome = result.withLock({ $0 }) {
                do throws(DiskImageError) {
                    let size = try outcome.get()
                    return size == before
                        ? "\(name) has \(size) bytes, as before" : "\(name) has \(size) bytes now (\(before) before)"
                } catch { throw .refused(error.description) }
            }
            if ending.isStopping { throw .notRunning }
            waitForAttention()
        }
    }

    // MARK: Waiting

    /// Waits for what vCPUs and devices report by ``MachineControl/attention``; the machine's end, or a request to
    /// resume, is not kept waiting.
    private func waitInPause(until isReached: () -> Bool) throws(MachineControlError) {
        while !isReached() {
            // The end resets the devices.
            if ending.isStopping { throw .notRunning }
            if let item = control.takeResumeRequest() {
                letRun()
                item.answer(.success(Self.running))
                throw .pauseCancelled
            }
            waitForAttention()
        }
    }

    private func waitForAttention() {
        waitUntilReadable(control.attention.event.rawValue, or: ending.event.rawValue)
        control.attention.event.drain()
        serveUrgentRequests()
    }
}

/// How many devices are quiet.
private final class QuietDevices: Sendable {
    let count = Atomic<Int>(0)
}

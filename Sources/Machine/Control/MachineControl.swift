// SPDX-License-Identifier: Apache-2.0

public import Devices
internal import Linux
internal import Logging
internal import Sandbox
internal import Virtio

/// The mailbox of the thread that owns what may change about a running machine: whether it is paused, its devices and
/// their state.
///
/// The terminal's keys, signals, the debugger and programs that embed a ``Machine`` are its clients. Requests are
/// served one after the other, on the thread `control`, which exists while a guest runs: from ``Machine/start()`` to
/// its end or reset. Outside of that every request is refused. The power button and the status are also served while
/// another request waits for vCPUs or devices. ``end(_:)`` never waits, and is accepted at any time.
public final class MachineControl: Sendable {
    public enum Request: Sendable, Equatable {
        /// Stops the vCPUs, then the devices: when it is answered, nothing of the guest changes any more.
        case pause
        case resume
        /// The one or the other.
        case togglePause
        case status
        /// Presses the power button.
        case powerButton
        /// Plugs a network interface's cable in, or pulls it.
        case setLink(device: String, isUp: Bool)
        /// Makes a disk longer; nil takes the size that its raw image, or block device, has now.
        case resize(device: String, size: UInt64?)
        /// Reports the balloon and what the guest says of its memory.
        case balloon
        /// Changes the amount of memory that the guest is to give up: bytes, a multiple of 4 KiB.
        case setBalloonTarget(UInt64)
        /// Changes the seconds from one request for the guest's statistics to the next, if it has some.
        case setBalloonInterval(UInt32)
        /// Asks the guest for hints about memory that it does not use; with `acknowledgesEnd` it may use that again as
        /// soon as it has given them all, otherwise at ``endBalloonHints``.
        case requestBalloonHints(acknowledgesEnd: Bool)
        case endBalloonHints
    }

    /// A request, or one that only this module makes.
    enum Work: Sendable, CustomStringConvertible {
        case request(Request)
        case attach(any VirtioDevice)
        case detach(String)

        /// For the log.
        var description: String {
            switch self {
            case .request(let request): "\(request)"
            case .attach(let device): "attach \(device.name)"
            case .detach(let name): "detach \(name)"
            }
        }

        /// Indicates whether it is served while another one waits: it changes nothing that the other one uses, and
        /// waits for nothing.
        var isUrgent: Bool {
            switch self {
            case .request(.powerButton), .request(.status): true
            default: false
            }
        }

        /// Indicates whether it resumes a machine that is being paused.
        var isResume: Bool {
            switch self {
            case .request(.resume), .request(.togglePause): true
            default: false
            }
        }
    }

    /// What was done, in a sentence for the user, or why not.
    public typealias Answer = Result<String, MachineControlError>

    struct Item: Sendable {
        let work: Work
        let answer: @Sendable (Answer) -> Void
    }

    private struct State {
        var isOpen = false
        var items: [Item] = []
        /// Those that are served first (``Work/isUrgent``).
        var urgent: [Item] = []
        var isPaused = false
    }

    /// More requests than a user makes before one is served; of urgent ones and of others.
    private static let maximumRequests = 64

    private let state = Guarded(State())
    /// Signalled for the thread: when there is a request, a vCPU has stopped, a device is quiet, or a disk has stopped.
    let attention: StopObserver
    private let thread = Guarded<Thread?>(nil)
    /// The machine's balloon, and what the machine is.
    private let balloon = Guarded<(device: BalloonDevice, configuration: Configuration)?>(nil)
    private let ending: Ending

    init(_ ending: Ending) throws(SystemCallError) {
        self.ending = ending
        attention = try StopObserver()
    }

    // MARK: Clients

    /// Queues a request; returns immediately.
    /// - Parameter answer: called once, mostly on the control's thread. It must not wait.
    public func post(_ request: Request, answer: @escaping @Sendable (Answer) -> Void = { _ in }) {
        post(.request(request), answer: answer)
    }

    func post(_ work: Work, answer: @escaping @Sendable (Answer) -> Void) {
        let refusal: MachineControlError? = state.withLock { state in
            guard state.isOpen else { return .notRunning }
            let item = Item(work: work, answer: answer)
            guard (work.isUrgent ? state.urgent.count : state.items.count) < Self.maximumRequests else { return .busy }
            if work.isUrgent { state.urgent.append(item) } else { state.items.append(item) }
            return nil
        }
        if let refusal { return answer(.failure(refusal)) }
        attention.event.signal()
    }

    /// Leaves a request and waits for the answer. Not for vCPU threads and devices' threads, for which the control
    /// waits.
    @discardableResult
    public func perform(_ request: Request) throws(MachineControlError) -> String { try perform(.request(request)) }

    /// Attaches a device to the running machine, in the first free place. The tables that a guest boots with do not
    /// name it before the next boot.
    func attach(_ device: any VirtioDevice) throws(MachineControlError) { _ = try perform(.attach(device)) }

    /// Detaches a device, by its name: when this returns, no thread of the machine uses it.
    func detach(_ name: String) throws(MachineControlError) { _ = try perform(.detach(name)) }

    private func perform(_ work: Work) throws(MachineControlError) -> String {
        let result = Guarded<Answer?>(nil)
        let monitor = Monitor()
        post(work) { answer in
            monitor.locked {
                result.withLock { $0 = answer }
                monitor.broadcast()
            }
        }
        let answer: Answer = monitor.locked {
            while true {
                if let answer = result.withLock({ $0 }) { return answer }
                monitor.wait()
            }
        }
        return try answer.get()
    }

    /// Changes the amount of memory that the guest is to give up. It gives up what it can, when it can.
    /// - Parameter target: bytes, a multiple of 4 KiB, at most the guest's memory.
    public func setBalloonTarget(_ target: UInt64) throws(MachineControlError) {
        try perform(.setBalloonTarget(target))
    }

    /// The balloon's figures; at any time, also before the machine is started.
    /// - Throws: ``MachineControlError/noDevice(_:kind:available:)`` for a machine without one.
    public func balloonStatistics() throws(MachineControlError) -> BalloonStatistics { try balloonDevice().statistics }

    func balloonDevice() throws(MachineControlError) -> BalloonDevice {
        guard let device = balloon.withLock({ $0?.device }) else {
            throw .noDevice("balloon0", kind: "balloon", available: [])
        }
        return device
    }

    /// Refuses a target that does not fit the machine.
    func checkBalloon(target: UInt64) throws(MachineControlError) {
        guard let configuration = balloon.withLock({ $0?.configuration }) else { return }
        do throws(MachineError) { try configuration.checkBalloon(target: target) } catch {
            throw .refused(error.description)
        }
    }

    func setBalloon(_ device: BalloonDevice, _ configuration: Configuration) {
        balloon.withLock { $0 = (device, configuration) }
    }

    /// Ends the machine, whatever the guest does, and whatever the control's thread waits for: ``Machine/waitForEnd()``
    /// then returns soon. Any thread may call it, at any time; between two boots it prevents the next one. The first
    /// end counts, but it overrides a reset of the guest.
    public func end(_ end: MachineEnd) { ending.post(end) }

    /// Makes the thread check for disks that have stopped, and pause the machine for them. For a device's thread:
    /// returns immediately.
    func diskStopped() { attention.event.signal() }

    /// Indicates whether the machine is paused, by a request or for a disk that has stopped. One that is stopped by a
    /// debugger is not.
    public var isPaused: Bool { state.withLock { $0.isPaused } }

    // MARK: The machine

    /// Starts to serve a board's requests, until its end.
    func start(
        _ board: Board, _ sandbox: Sandbox, _ log: Logger, status: @escaping @Sendable () -> MachineStatus
    ) throws(SystemCallError) {
        attention.event.drain()
        state.withLock { state in
            state.isOpen = true
            state.isPaused = false
        }
        let service = ControlService(self, board, ending, sandbox, log, status: status)
        do throws(SystemCallError) {
            try thread.withLock { (thread) throws(SystemCallError) in
                thread = try Thread.start(name: "control") {
                    var service = service
                    service.run()
                }
            }
        } catch {
            close()
            throw error
        }
    }

    /// Waits for the thread's end, which the machine's end brings.
    func join() {
        if let thread = thread.withLock({ $0.take() }) { thread.join() }
    }

    // MARK: The thread

    func takeRequest() -> Item? { state.withLock { $0.items.isEmpty ? nil : $0.items.removeFirst() } }

    func takeUrgentRequest() -> Item? { state.withLock { $0.urgent.isEmpty ? nil : $0.urgent.removeFirst() } }

    /// Takes the first request that cancels a pause which is being waited for.
    func takeResumeRequest() -> Item? {
        state.withLock { state in
            state.items.firstIndex { $0.work.isResume }.map { state.items.remove(at: $0) }
        }
    }

    func setPaused(_ isPaused: Bool) { state.withLock { $0.isPaused = isPaused } }

    /// Refuses what has not been served, and everything from now on.
    func close() {
        let items = state.withLock { state in
            state.isOpen = false
            defer { (state.items, state.urgent) = ([], []) }
            return state.urgent + state.items
        }
        for item in items { item.answer(.failure(.notRunning)) }
    }
}

/// Why a request was not carried out.
public enum MachineControlError: Error, Equatable, CustomStringConvertible {
    /// The guest has ended, or is just being reset.
    case notRunning
    case busy
    case alreadyPaused
    case notPaused
    case noDevice(String, kind: String, available: [String])
    /// A sentence with the reason.
    case refused(String)
    /// A pause that was cancelled before what was in flight had completed.
    case pauseCancelled

    public var description: String {
        switch self {
        case .notRunning: "the guest is not running: it has ended or is being reset"
        case .busy: "too many requests are waiting; try again later"
        case .alreadyPaused: "the machine is paused already"
        case .notPaused: "the machine is not paused"
        case .noDevice(let name, let kind, let available):
            "there is no \(kind) '\(name)'; "
                + (available.isEmpty ? "the machine has none" : "there is: \(available.joined(separator: ", "))")
        case .refused(let reason): reason
        case .pauseCancelled: "the pause was cancelled: the machine was resumed before all disk requests had completed"
        }
    }
}

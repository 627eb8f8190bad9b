// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import CLinux
internal import GuestMemory
internal import KVM
internal import Linux
internal import Virtio
public import Devices
public import Logging
public import Sandbox

/// A virtual machine: everything that a ``Configuration`` asks for, owned by one object.
///
/// It is created in full or not at all: an initializer that throws has released everything. ``start()`` starts the
/// vCPUs, ``endDescriptor`` becomes readable when the guest has ended, reset itself or was ended, ``waitForEnd()``
/// joins all threads, and ``restart(isInterrupted:)`` boots the guest again. What the machine owns on the host (TAPs,
/// locks, memory) goes with the object.
public final class Machine: Sendable {
    /// The description of the kernel, for the first message.
    public let bootDescription: String
    /// The guest's end of the console: takes input, and output is flushed from it.
    public let consolePort: any ConsolePort

    let parts: Board.Parts
    let ending: Ending
    private let room: ConsoleRoom
    private let serialPin: InterruptPin
    let log: Logger
    /// The hardware of now; a reset puts another one into its place.
    private let current: Guarded<Board>

    public var configuration: Configuration { parts.configuration }
    var board: Board { current.withLock { $0 } }
    var memory: GuestMemory { parts.memory }
    var debugger: DebugServer? { parts.debugger }
    /// Takes requests to change the running machine, and to end it.
    public var control: MachineControl { parts.control }

    /// Takes from the host what the configuration requests, loads the kernel, and sets the vCPUs up.
    /// - Parameters:
    ///   - output: takes what the guest writes to its console; called by vCPU threads and a virtio console's, must not
    ///     wait.
    ///   - log: gets what happens inside.
    ///   - isInterrupted: asked several times a second in steps that may take long: memory is filled with pages, by
    ///     threads of its own; a disk's key or server is waited for, or a key computed. It returns whether to cancel,
    ///     which throws an error of that step.
    ///   - progress: gets the bytes of memory that are filled and those in all, from the same threads.
    public init(
        _ configuration: Configuration, output: any SerialSink, log: Logger,
        isInterrupted: @escaping @Sendable () -> Bool = { false },
        progress: (@Sendable (_ done: UInt64, _ total: UInt64) -> Void)? = nil
    ) throws(MachineError) {
        guard configuration.cpus > 0 else { throw .noCPUs(configuration.cpus) }
        try VirtioSlot.checkCount(
            configuration.disks.count + (configuration.seed == nil ? 0 : 1)
                + configuration.networks.count { !$0.isOptional }
                + (configuration.entropy == nil ? 0 : 1) + (configuration.balloon == nil ? 0 : 1)
                + (configuration.consoleDevice == .virtio ? 1 : 0) + (configuration.vsock == nil ? 0 : 1),
            configuration.bus)
        try NodeLayout.check(configuration)

        // Memory first: it is what is most often missing, and nothing on the host has been touched before it.
        let memory = try Self.makeMemory(configuration, isInterrupted: isInterrupted, progress: progress)
        let debugger = try configuration.debugger.map { address throws(MachineError) in
            try Self.makeDebugServer(address, log: log)
        }
        let (ending, room, control) = try Self.host("create an eventfd") { () throws(SystemCallError) in
            let ending = try Ending()
            return (ending, try ConsoleRoom(), try MachineControl(ending))
        }
        // KVM before the disks and TAPs: a host without it is left as it was.
        let system = try Self.makeSystem(configuration)
        let files = try BootSource(configuration)
        let firmware = try configuration.firmware.map { path throws(MachineError) in try Firmware(path, log: log) }
        let pin = InterruptPin()
        let virtioConsole: ConsoleDevice?
        switch configuration.consoleDevice {
        case .serial: virtioConsole = nil
        case .virtio: virtioConsole = try VirtioSlot.makeConsole(output, room, configuration, log: log)
        }
        let serial = SerialPort(
            sink: virtioConsole == nil ? output : DiscardedOutput(), interrupt: { pin.pulse() },
            onRoom: { room.event.signal() })
        let (devices, disk, vsockListener) = try VirtioSlot.makeDevices(
            configuration, control, console: virtioConsole, log: log, isInterrupted: isInterrupted)
        let parts = Board.Parts(
            configuration, system: system, memory: memory, boot: disk ?? files, virtioDevices: devices,
            serial: serial, ending: ending,
            debugger: debugger, control: control, firmware: firmware, vsockListener: vsockListener)
        let board = try Board(parts, waitsForDebugger: true)
        if board.namesLinux { Self.warnOfInterpretedRingZero(board.kernelName, parts.system, log: log) }
        if let warning = board.bootWarning { log.warning("\(warning)") }
        for slot in board.registry.slots { log.info("\(slot.description)") }
        log.info(
            "\(configuration.cpus) vCPU\(configuration.cpus == 1 ? "" : "s"), \(memory.size >> 20) MiB of RAM (\(memory.backing)), boot at 0x\(String(board.entry, radix: 16))"
        )
        self.parts = parts
        bootDescription = board.bootDescription
        consolePort = virtioConsole ?? serial
        self.ending = ending
        self.room = room
        self.log = log
        serialPin = pin
        current = Guarded(board)
    }

    // MARK: Life

    /// Starts the devices' threads and the vCPUs. Called once. All that the machine needs of the host was opened
    /// before.
    /// - Parameter sandbox: confines these threads, and those of later boots; the caller has confined the process.
    public func start(_ sandbox: Sandbox = .off) throws(MachineError) {
        parts.sandbox.withLock { $0 = sandbox }
        _ = clinux_install_interrupting_signal(CPUThread.kickSignal)
        for (_, device) in parts.devices.all {
            try Self.host("start the threads of \(device.name)") { () throws(SystemCallError) in
                let kind: Sandbox.Thread = device is VsockDevice ? .sockets : .device
                try device.start { sandbox.confine(kind) }
            }
        }
        try start(board)
    }

    private func start(_ board: Board) throws(MachineError) {
        serialPin.connect(board.serialLine)
        do throws(SystemCallError) { try board.start(parts.sandbox.withLock { $0 }) } catch {
            control.end(.hostError("vCPU threads could not be started: \(error)"))
            _ = waitForEnd()
            throw .host(purpose: "start a thread for each vCPU", error)
        }
        try startControl(board)
        try startDebugger(board)
    }

    /// What its thread gets has no reference to the machine, which would otherwise live as long as the thread does.
    private func startControl(_ board: Board) throws(MachineError) {
        do throws(SystemCallError) {
            let sandbox = parts.sandbox.withLock { $0 }
            try control.start(board, sandbox, log) { [configuration, memory, control] in
                MachineStatus(configuration, memory, board.registry.slots, isPaused: control.isPaused, sandbox)
            }
        } catch {
            control.end(.hostError("the control's thread could not be started: \(error)"))
            _ = waitForEnd()
            throw .host(purpose: "start a thread for the machine's control", error)
        }
    }

    /// Indicates whether the guest, which has ended, reset itself, so that ``restart(isInterrupted:)`` boots it again.
    ///
    /// A triple fault resets a PC. It counts as a reset here when a driver had used a virtio device, as an operating
    /// system that reboots this way has. Before that it is a crash that the next boot, from the same memory with the
    /// same kernel, would repeat.
    public var canRestart: Bool {
        switch ending.end {
        case .reset?: true
        case .tripleFault?: board.wasDriven
        default: false
        }
    }

    /// Boots the guest again after ``waitForEnd()``, if ``canRestart`` allows it: RAM is zero again, the hardware is
    /// another one, the kernel is read again from the file that was opened at the start, or found again on its disk.
    /// Disks, TAPs, the console and a debugger's address stay what they are.
    ///
    /// Called by the thread that calls ``waitForEnd()``.
    /// - Parameter isInterrupted: as ``init(_:output:log:isInterrupted:)`` has it.
    /// - Returns: false when the machine was ended meanwhile, as ``waitForEnd()`` then says.
    /// - Throws: when the host has not what it takes any more, or the kernel's file has changed; the machine has ended
    ///   then.
    public func restart(isInterrupted: @escaping @Sendable () -> Bool = { false }) throws(MachineError) -> Bool {
        guard canRestart else { return false }
        serialPin.connect(nil)
        parts.serial.reset()
        parts.clock.reset()
        do throws(GuestMemoryError) {
            try memory.clear(isInterrupted: isInterrupted)
            if configuration.memory.isPreallocated { try memory.prealloc(isInterrupted: isInterrupted) }
        } catch { throw .memory(error) }
        let board = try Board(parts, waitsForDebugger: debugger?.wasAttached == true)
        // The kernel takes some milliseconds to free the old hardware: not under the lock.
        let old = current.withLock { current in
            defer { current = board }
            return current
        }
        parts.past.withLock { $0.add(old.registry.slots) }
        guard ending.clear() else { return false }
        log.info("the guest was reset, boot at 0x\(String(board.entry, radix: 16))")
        try start(board)
        return true
    }

    /// Readable from the moment on when the machine ends, until ``restart(isInterrupted:)``; for `poll` and the like.
    /// Valid while the object lives.
    public var endDescriptor: Int32 { ending.event.rawValue }

    /// Readable when ``consolePort`` takes input again after it had refused some; ``consoleHasRoom()`` resets it.
    public var consoleRoomDescriptor: Int32 { room.event.rawValue }

    public func consoleHasRoom() { room.event.drain() }

    /// Tells the guest the size of its terminal, where its console can.
    func setTerminalSize(_ size: TerminalSize) { (consolePort as? ConsoleDevice)?.setSize(size) }

    /// Waits until the guest has ended, or reset itself, and all vCPUs and devices are quiet.
    public func waitForEnd() -> MachineEnd {
        ending.wait()
        board.join()
        control.join()
        debugger?.join()
        for (_, device) in parts.devices.all { device.reset() }
        return ending.end ?? .quit
    }

    deinit {
        // Threads of a machine that was started and then dropped.
        ending.post(.quit)
        board.join()
        control.join()
        debugger?.join()
    }

    // MARK: Status

    /// Has the devices report the numbers of events that they have only counted and whose minute is over.
    func summarizeEvents() {
        for (_, device) in parts.devices.all {
            (device as? NetworkDevice)?.reportHostDrops()
            device.deviceEvents.summarize()
        }
    }

    /// Has the devices report the numbers of all events that they have only counted, and nothing after that: the
    /// machine has ended.
    func endEvents() {
        for (_, device) in parts.devices.all {
            (device as? NetworkDevice)?.reportHostDrops()
            // Its thread may be waiting for the host until the end.
            (device as? BlockDevice)?.reportLosses()
            device.deviceEvents.end()
        }
    }

    /// Figures of the moment, for a status line.
    public var status: MachineStatus {
        MachineStatus(
            configuration, memory, board.registry.slots, isPaused: control.isPaused, parts.sandbox.withLock { $0 })
    }
}

/// Signalled when the guest's console takes input again after it had refused some.
final class ConsoleRoom: Sendable {
    let event: EventFD
    init() throws(SystemCallError) { event = try EventFD() }
}

/// Takes what a guest writes to a port that nothing is connected to.
private final class DiscardedOutput: SerialSink {
    func take(_ bytes: Span<UInt8>) -> Int { bytes.count }
}

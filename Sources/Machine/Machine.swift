internal import Boot
internal import CLinux
internal import GuestMemory
internal import KVM
internal import Linux
internal import Virtio
public import Devices
public import Logging

/// A virtual machine: everything that a ``Configuration`` asks for, owned by one object.
///
/// It is made in full or not at all: an initializer that throws has given back whatever it had taken. ``start()`` starts the
/// vCPUs, ``endDescriptor`` becomes readable when the guest has ended or was ended, ``finish()`` joins all threads. What the machine
/// owns on the host (TAPs, locks, memory) goes with the object.
public final class Machine: Sendable {
    public let configuration: Configuration
    /// The console's UART: takes input, and output is flushed from it.
    public let serial: SerialPort

    let virtualMachine: VirtualMachine
    let memory: GuestMemory
    let cpus: [CPUThread]
    let devices: [VirtioSlot]
    let power: PowerController
    private let room: SerialRoom
    let ending: Ending
    private let settler = Guarded<Thread?>(nil)
    let ports: PortBus
    let mmio: MMIOBus
    let debugger: DebugServer?
    /// Whether KVM holds interrupts back from a vCPU that steps, where it is asked to.
    let holdsInterrupts: Bool

    /// Takes from the host what the configuration asks for, loads the kernel, and sets the vCPUs up.
    /// - Parameters:
    ///   - output: takes what the guest writes to its serial port; called by vCPU threads, must not wait.
    ///   - log: gets what happens inside.
    ///   - isInterrupted: asked now and then while memory is filled with pages, the one step that may take long, by threads that do it:
    ///     whether to give up, which throws the memory's `interrupted`.
    public init(
        _ configuration: Configuration, output: any SerialSink, log: Logger, isInterrupted: @escaping @Sendable () -> Bool = { false }
    ) throws(MachineError) {
        guard configuration.cpus > 0 else { throw .noCPUs(configuration.cpus) }
        try VirtioSlot.checkCount(configuration.disks.count + configuration.networks.count + (configuration.entropy == nil ? 0 : 1))
        try NodeLayout.check(configuration)

        // Memory first: it is what is most often missing, and nothing on the host has been touched before it.
        let memory = try Self.makeMemory(configuration, isInterrupted: isInterrupted)
        let debugger = try configuration.debugger.map { address throws(MachineError) in try Self.makeDebugServer(address) }
        let system = try Self.kvm { () throws(KVMError) in try System() }
        let virtualMachine = try Self.makeVirtualMachine(system, configuration, memory)
        let (ending, room) = try Self.host("make an eventfd") { () throws(SystemCallError) in (try Ending(), try SerialRoom()) }
        let timer = try Self.kvm { () throws(KVMError) in try virtualMachine.intervalTimer() }
        let (serialLine, powerLine) = try Self.kvm { () throws(KVMError) in
            (try virtualMachine.interruptLine(gsi: Wiring.serialGSI), try virtualMachine.interruptLine(gsi: Wiring.powerGSI))
        }
        let kernel = try Self.openKernel(configuration)
        let devices = try VirtioSlot.makeAll(configuration, memory, virtualMachine, log: log)
        for slot in devices { log.info("\(slot.description)") }

        let request: @Sendable (MachineRequest) -> Void = { ending.post(MachineEnd($0)) }
        let serial = SerialPort(sink: output, interrupt: { serialLine.pulse() }, onRoom: { room.bell.signal() })
        let power = PowerController(request: request, interrupt: { powerLine.pulse() })
        let ports = PortBus([
            PortBus.Entry(first: 0x3f8, count: 8, device: serial),
            PortBus.Entry(first: 0x501, count: 1, device: ExitDevice(request: request)),
            PortBus.Entry(first: 0x600, count: 3, device: power),
            PortBus.Entry(first: 0x40, count: 4, device: TimerPorts(timer, first: 0x40)),
            PortBus.Entry(first: 0x61, count: 1, device: TimerPorts(timer, first: 0x61)),
            PortBus.Entry(first: 0x60, count: 5, device: KeyboardController(request: request)),
            PortBus.Entry(first: 0x70, count: 2, device: RealTimeClock(memorySize: memory.size)),
            PortBus.Entry(first: 0x80, count: 1, device: PostCodePort()),
        ])
        let mmio = MMIOBus(devices.map(\.transport))

        let layout = NodeLayout(configuration, memory.regions)
        let model = try Self.kvm { () throws(KVMError) in try CPUModel(system, layout) }
        let state = try Self.load(kernel, configuration, memory, layout, devices, model)
        var cpus: [CPUThread] = []
        for id in layout.localAPICIDs {
            let cpu = try Self.kvm { () throws(KVMError) in
                try virtualMachine.makeCPU(id: id, model, boot: id == 0 ? state : nil)
            }
            let seat = try debugger.map { debugger throws(MachineError) in try Self.makeSeat(debugger) }
            let exits = configuration.countsExits ? ExitCounter() : nil
            cpus.append(CPUThread(cpu, ports: ports, mmio: mmio, ram: memory.ram, ending: ending, seat: seat, exits: exits))
        }

        log.info("\(configuration.cpus) vCPUs, \(memory.size >> 20) MiB of RAM (\(memory.backing)), boot at 0x\(String(state.rip, radix: 16))")
        self.configuration = configuration
        self.serial = serial
        self.virtualMachine = virtualMachine
        self.memory = memory
        self.cpus = cpus
        self.devices = devices
        self.power = power
        self.room = room
        self.ending = ending
        self.ports = ports
        self.mmio = mmio
        self.debugger = debugger
        holdsInterrupts = system.canHoldInterrupts
    }

    // MARK: Life

    /// Starts the vCPUs. Called once.
    public func start() throws(MachineError) {
        _ = clinux_install_interrupting_signal(CPUThread.kickSignal)
        for cpu in cpus {
            do throws(SystemCallError) { try cpu.start() } catch {
                stop(.hostError("vCPU threads could not be started: \(error)"))
                _ = finish()
                throw .host(purpose: "start a thread for each vCPU", error)
            }
        }
        try startDebugger()
        // Beside the guest; without a thread the end takes longer, that is all.
        settler.withLock { thread in thread = try? Thread.start(name: "settle") { [self] in virtualMachine.settle() } }
    }

    /// Readable from the moment on when the machine ends; for `poll` and the like. Valid while the object lives.
    public var endDescriptor: Int32 { ending.bell.rawValue }

    /// Readable when the serial port takes input again after it had refused some; ``serialHasRoom()`` resets it.
    public var serialRoomDescriptor: Int32 { room.bell.rawValue }

    public func serialHasRoom() { room.bell.drain() }

    /// Asks the guest to power off, as a power button does. It may take its time, or not listen.
    public func requestPowerOff() { power.requestPowerOff() }

    /// Ends the machine from outside, whatever the guest does; ``finish()`` then returns soon.
    public func stop(_ end: MachineEnd) { ending.post(end) }

    /// Waits until the machine has ended and all its vCPUs and devices are quiet.
    public func finish() -> MachineEnd {
        ending.wait()
        for cpu in cpus { cpu.kick() }
        for cpu in cpus { cpu.join() }
        debugger?.join()
        if let thread = settler.withLock({ $0.take() }) { thread.join() }
        for device in devices { device.transport.device.reset() }
        return ending.end ?? .quit
    }

    deinit {
        // Threads of a machine that was started and then dropped.
        ending.post(.quit)
        for cpu in cpus { cpu.kick() }
        for cpu in cpus { cpu.join() }
        debugger?.join()
    }

    // MARK: Status

    /// Figures of the moment, for a status line.
    public var status: MachineStatus { MachineStatus(configuration, memory, devices) }
}

/// Rung when the serial port takes input again after it had refused some.
private final class SerialRoom: Sendable {
    let bell: EventFD
    init() throws(SystemCallError) { bell = try EventFD() }
}

// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Platform
internal import Virtio

/// The virtual hardware between a power-on and the next reset: KVM's machine, vCPUs, interrupt lines, platform devices and the registers
/// of the virtio devices.
///
/// What a reset keeps is the ``Machine``'s and given to each board: RAM, the disks, TAPs and their threads, the serial port with its output on the
/// way, the battery-backed clock. A reset makes a new board: nothing of the guest's can survive in what did not exist before.
final class Board: Sendable {
    /// What outlives a board.
    final class Parts: Sendable {
        let configuration: Configuration
        let system: System
        let memory: GuestMemory
        let kernel: BootFile
        let initrd: BootFile?
        let virtioDevices: [any VirtioDevice]
        let serial: SerialPort
        let clock: RealTimeClock
        let ending: Ending
        let debugger: DebugServer?
        /// When the machine was made, in milliseconds of ``TimerFD/now``.
        let created = TimerFD.now
        /// What boots before this one have counted.
        let past = Guarded(PastCounters())
        /// One for each vCPU, where exits are counted.
        let exits: [ExitCounter]

        init(
            _ configuration: Configuration, system: consuming System, memory: GuestMemory, kernel: BootFile, initrd: BootFile?,
            virtioDevices: [any VirtioDevice], serial: SerialPort, ending: Ending, debugger: DebugServer?
        ) {
            self.configuration = configuration
            self.system = system
            self.memory = memory
            self.kernel = kernel
            self.initrd = initrd
            self.virtioDevices = virtioDevices
            self.serial = serial
            clock = RealTimeClock(memorySize: memory.size)
            self.ending = ending
            self.debugger = debugger
            exits = configuration.countsExits ? (0..<configuration.cpus).map { _ in ExitCounter() } : []
        }
    }

    let virtualMachine: VirtualMachine
    let cpus: [CPUThread]
    /// For metrics, one for each vCPU; nil where KVM has none.
    let counterFiles: [CounterFile?]
    let devices: [VirtioSlot]
    let power: PowerController
    let ports: PortBus
    let mmio: MMIOBus
    /// The serial port's, which is connected to it while this board's vCPUs run.
    let serialLine: InterruptLine
    /// Indicates whether KVM holds interrupts back from a vCPU that steps, where it is asked to.
    let holdsInterrupts: Bool
    /// Where the boot processor begins.
    let entry: UInt64
    /// What boots, in words.
    let bootDescription: String
    let isBzImage: Bool
    /// Indicates whether the vCPUs stop before their first instruction until a debugger lets them go.
    let waitsForDebugger: Bool
    private let settler = Guarded<Thread?>(nil)

    /// Makes the hardware and loads the kernel into RAM, which is all zero.
    /// - Parameter waitsForDebugger: the vCPUs stop before their first instruction, where the machine has a debugger's address.
    init(_ parts: Parts, waitsForDebugger: Bool) throws(MachineError) {
        let (configuration, memory, ending) = (parts.configuration, parts.memory, parts.ending)
        let virtualMachine = try Machine.makeVirtualMachine(parts.system, memory)
        let timer = try Machine.kvm { () throws(KVMError) in try virtualMachine.intervalTimer() }
        let (serialLine, powerLine) = try Machine.kvm { () throws(KVMError) in
            (try virtualMachine.interruptLine(gsi: GSIs.serial), try virtualMachine.interruptLine(gsi: GSIs.power))
        }
        var devices: [VirtioSlot] = []
        for device in parts.virtioDevices { devices.append(try VirtioSlot(device, index: devices.count, memory, virtualMachine)) }

        let request: @Sendable (MachineRequest) -> Void = { ending.post(MachineEnd($0)) }
        let power = PowerController(request: request, interrupt: { powerLine.pulse() })
        let ports = PortBus([
            PortBus.Entry(Ports.serial, parts.serial),
            PortBus.Entry(Ports.exit...Ports.exit, ExitDevice(request: request)),
            PortBus.Entry(Ports.sleepControl...Ports.powerEvents, power),
            PortBus.Entry(Ports.timer, TimerPorts(timer, first: Ports.timer.lowerBound)),
            // Between the keyboard controller's ports: before them.
            PortBus.Entry(Ports.systemControl...Ports.systemControl, TimerPorts(timer, first: Ports.systemControl)),
            PortBus.Entry(Ports.keyboardData...Ports.keyboardCommand, KeyboardController(request: request)),
            PortBus.Entry(Ports.clock, parts.clock),
            PortBus.Entry(Ports.postCode...Ports.postCode, PostCodePort()),
        ])
        let mmio = MMIOBus(devices.map(\.transport))

        let layout = NodeLayout(configuration, memory.regions)
        let model = try Machine.kvm { () throws(KVMError) in try CPUModel(parts.system, layout) }
        let (state, kernel) = try Machine.load(parts.kernel, parts.initrd, configuration, memory, layout, devices, model)
        var cpus: [CPUThread] = []
        for (index, id) in layout.localAPICIDs.enumerated() {
            let cpu = try Machine.kvm { () throws(KVMError) in
                try virtualMachine.makeCPU(id: id, model, boot: id == 0 ? state : nil)
            }
            let seat = try parts.debugger.map { debugger throws(MachineError) in
                try Machine.makeSeat(debugger, isWanted: waitsForDebugger)
            }
            cpus.append(
                CPUThread(
                    cpu, ports: ports, mmio: mmio, ram: memory.ram, ending: ending, seat: seat,
                    exits: configuration.countsExits ? parts.exits[index] : nil))
        }
        self.virtualMachine = virtualMachine
        self.cpus = cpus
        counterFiles = configuration.metrics == nil ? [] : cpus.map { try? $0.cpu.counterFile() }
        self.devices = devices
        self.power = power
        self.ports = ports
        self.mmio = mmio
        self.serialLine = serialLine
        holdsInterrupts = parts.system.canHoldInterrupts
        entry = state.rip
        bootDescription = Machine.bootDescription(kernel, configuration)
        isBzImage = kernel.entry == .bzImage
        self.waitsForDebugger = waitsForDebugger && parts.debugger != nil
    }

    /// Starts the vCPUs. Called once.
    func start() throws(SystemCallError) {
        for cpu in cpus { try cpu.start() }
        // Beside the guest; without a thread the end takes longer, that is all.
        settler.withLock { thread in thread = try? Thread.start(name: "settle") { [self] in virtualMachine.settle() } }
    }

    /// Waits until all vCPUs have left the guest; the machine's ``Ending`` has a reason.
    func join() {
        for cpu in cpus { cpu.kick() }
        for cpu in cpus { cpu.join() }
        if let thread = settler.withLock({ $0.take() }) { thread.join() }
    }

    /// Indicates whether a driver has used a virtio device: what ran here had come as far as an operating system comes.
    var wasDriven: Bool { devices.contains { $0.transport.function.counters.kicks.value > 0 } }
}

/// The interrupt line of a device that outlives boards: it is connected to the board that runs.
final class InterruptPin: Sendable {
    private let line = Guarded<InterruptLine?>(nil)

    func connect(_ new: InterruptLine?) { line.withLock { $0 = new } }

    /// Raises and lowers the line, if there is a board.
    func pulse() { line.withLock { $0 }?.pulse() }
}

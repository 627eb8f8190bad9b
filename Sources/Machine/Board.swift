// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Platform
internal import Sandbox
internal import Virtio

/// The virtual hardware between a power-on and the next reset: KVM's machine, vCPUs, interrupt lines, platform devices
/// and the registers of the virtio devices.
///
/// What a reset keeps is the ``Machine``'s and given to each board: RAM, the disks, TAPs and their threads, the serial
/// port with its output on the way, the battery-backed clock. A reset makes a new board: nothing of the guest's can
/// survive in what did not exist before.
final class Board: Sendable {
    /// What outlives a board.
    final class Parts: Sendable {
        let configuration: Configuration
        let system: System
        let memory: GuestMemory
        let boot: BootSource
        let devices: AttachedDevices
        let serial: SerialPort
        let clock: RealTimeClock
        let ending: Ending
        let debugger: DebugServer?
        /// What the machine starts with instead of a kernel; nil for a machine without firmware.
        let firmware: Firmware?
        /// When the machine was made, in milliseconds of ``TimerFD/now``.
        let created = TimerFD.now
        /// What boots before this one have counted.
        let past = Guarded(PastCounters())
        let control: MachineControl
        /// The socket of a vsock device, whose file goes with it.
        let vsockListener: Listener?
        /// What confines the threads of devices and vCPUs, from ``Machine/start(_:)`` on.
        let sandbox = Guarded(Sandbox.off)
        /// One for each vCPU, where exits are counted.
        let exits: [ExitCounter]

        init(
            _ configuration: Configuration, system: consuming System, memory: GuestMemory, boot: BootSource,
            virtioDevices: [any VirtioDevice], serial: SerialPort, ending: Ending, debugger: DebugServer?,
            control: MachineControl, firmware: Firmware?, vsockListener: Listener?
        ) {
            self.configuration = configuration
            self.system = system
            self.memory = memory
            self.boot = boot
            devices = AttachedDevices(virtioDevices, count: VirtioSlot.maximumCount(configuration.bus))
            self.serial = serial
            clock = RealTimeClock(memorySize: memory.size)
            self.ending = ending
            self.debugger = debugger
            self.control = control
            self.firmware = firmware
            self.vsockListener = vsockListener
            exits = configuration.countsExits ? (0..<configuration.cpus).map { _ in ExitCounter() } : []
        }
    }

    let virtualMachine: VirtualMachine
    let cpus: [CPUThread]
    /// For metrics, one for each vCPU; nil where KVM has none.
    let counterFiles: [CounterFile?]
    let registry: DeviceRegistry
    let power: PowerController
    let timer: IntervalTimer
    let ports: AddressMap<any PortDevice>
    /// The serial port's, which is connected to it while this board's vCPUs run.
    let serialLine: InterruptLine
    /// Indicates whether KVM holds interrupts back from a vCPU that steps, where it is asked to.
    let holdsInterrupts: Bool
    /// Where the boot processor begins.
    let entry: UInt64
    /// What boots, in words.
    let bootDescription: String
    /// A sentence about what the user may not have expected of the kernel's start; nil where there is nothing to say.
    let bootWarning: String?
    /// Indicates whether the kernel's file itself says that it is Linux.
    let namesLinux: Bool
    /// The kernel's file, as messages call it.
    let kernelName: String
    /// Indicates whether the vCPUs stop before their first instruction until a debugger lets them go.
    let waitsForDebugger: Bool

    /// Makes the hardware and loads the kernel into RAM, which is all zero.
    /// - Parameter waitsForDebugger: the vCPUs stop before their first instruction, where the machine has a debugger's
    ///   address.
    init(_ parts: Parts, waitsForDebugger: Bool) throws(MachineError) {
        let (configuration, memory, ending) = (parts.configuration, parts.memory, parts.ending)
        let virtualMachine = try Machine.makeVirtualMachine(parts.system, memory, parts.firmware)
        let timer = try Machine.kvm { () throws(KVMError) in try virtualMachine.intervalTimer() }
        let (serialLine, powerLine) = try Machine.kvm { () throws(KVMError) in
            (try virtualMachine.interruptLine(gsi: GSIs.serial), try virtualMachine.interruptLine(gsi: GSIs.power))
        }
        let layout = NodeLayout(configuration, memory.regions)
        let model = try Machine.kvm { () throws(KVMError) in try CPUModel(parts.system, layout) }
        let root = try Self.makeRoot(parts, virtualMachine, model)
        let registry = try DeviceRegistry(
            parts.devices, memory, virtualMachine, root, queues: parts.configuration.virtqueues)

        let request: @Sendable (MachineRequest) -> Void = { ending.post(MachineEnd($0)) }
        let power = PowerController(request: request, interrupt: { powerLine.pulse() })
        let start = try Self.makeStart(parts, layout, registry, model, request: request)
        let ports = AddressMap<any PortDevice>(
            [
                .init(Ports.serial, parts.serial),
                .init(Ports.exit...Ports.exit, ExitDevice(request: request)),
                .init(Ports.sleepControl...Ports.powerEvents, power),
                .init(Ports.timer, TimerPorts(timer, first: Ports.timer.lowerBound)),
                // Between the keyboard controller's ports: before them.
                .init(Ports.systemControl...Ports.systemControl, TimerPorts(timer, first: Ports.systemControl)),
                .init(Ports.keyboardData...Ports.keyboardCommand, KeyboardController(request: request)),
                .init(Ports.clock, parts.clock),
                .init(Ports.postCode...Ports.postCode, PostCodePort()),
            ] + start.ports + (root.map { [$0.portEntry] } ?? []))

        var cpus: [CPUThread] = []
        for (index, id) in layout.localAPICIDs.enumerated() {
            let cpu = try Machine.kvm { () throws(KVMError) in
                try virtualMachine.makeCPU(id: id, model, boot: id == 0 ? start.state : nil)
            }
            let pausePoint = try Machine.host("create an eventfd") { () throws(SystemCallError) in
                try PausePoint(
                    control: parts.control.attention, debugger: parts.debugger?.stopped, stopsFirst: waitsForDebugger)
            }
            cpus.append(
                CPUThread(
                    cpu, ports: ports, mmio: registry.map, ram: memory.ram, ending: ending, pausePoint: pausePoint,
                    exits: configuration.countsExits ? parts.exits[index] : nil))
        }
        self.virtualMachine = virtualMachine
        self.cpus = cpus
        counterFiles = configuration.metrics == nil ? [] : cpus.map { try? $0.cpu.counterFile() }
        self.registry = registry
        self.power = power
        self.timer = timer
        self.ports = ports
        self.serialLine = serialLine
        holdsInterrupts = parts.system.canHoldInterrupts
        entry = start.state?.rip ?? PhysicalLayout.firmware.upperBound - 16
        kernelName = start.kernel?.name ?? ""
        bootDescription = start.description
        namesLinux = start.kernel?.namesLinux == true
        bootWarning = start.warning
        self.waitsForDebugger = waitsForDebugger && parts.debugger != nil
    }

    /// What the processors start with.
    private struct Start {
        /// The boot processor's registers; nil: as after a reset, for firmware.
        var state: BootState?
        var kernel: KernelImage?
        /// In words.
        var description: String
        /// What the user may not have expected.
        var warning: String?
        /// Devices that only firmware has.
        var ports: [AddressMap<any PortDevice>.Entry] = []
    }

    /// Loads the kernel into RAM, or prepares it for firmware.
    private static func makeStart(
        _ parts: Parts, _ layout: NodeLayout, _ registry: DeviceRegistry, _ model: CPUModel,
        request: @escaping @Sendable (MachineRequest) -> Void
    ) throws(MachineError) -> Start {
        guard let firmware = parts.firmware else {
            let files = try parts.boot.next()
            let (state, kernel) = try Machine.load(files, parts.configuration, parts.memory, layout, registry, model)
            return Start(
                state: state, kernel: kernel,
                description: Machine.bootDescription(kernel, files, parts.configuration),
                warning: Machine.warnOfUnseenDevices(kernel, files, parts.configuration, registry))
        }
        let contents = try Machine.firmwareConfiguration(parts, layout, registry, model)
        return Start(
            description: "\(firmware.name) (firmware)",
            ports: try firmware.start(contents, parts.memory, request: request))
    }

    /// The PCI hierarchy, where the configuration has one.
    private static func makeRoot(
        _ parts: Parts, _ machine: borrowing VirtualMachine, _ model: CPUModel
    ) throws(MachineError) -> PCIRoot? {
        guard parts.configuration.bus == .pci else { return nil }
        do throws(KVMError) {
            return try PCIRoot(
                parts.system, machine, endOfMemory: parts.memory.regions.map(\.end.rawValue).max() ?? 0,
                addressBits: model.physicalAddressBits, isForFirmware: parts.firmware != nil)
        } catch { throw .kvm(error) }
    }

    /// Starts the vCPUs. Called once.
    /// - Parameter sandbox: what confines their threads.
    func start(_ sandbox: Sandbox) throws(SystemCallError) {
        for cpu in cpus { try cpu.start { sandbox.confine(.vcpu) } }
    }

    /// Waits until all vCPUs have left the guest; the machine's ``Ending`` has a reason.
    func join() {
        for cpu in cpus { cpu.kick() }
        for cpu in cpus { cpu.join() }
    }

    /// Indicates whether a disk waits, after an error on the host, for a pause and its end.
    var hasStoppedDisk: Bool { registry.slots.contains { ($0.device as? BlockDevice)?.isStopped == true } }

    /// Indicates whether a driver has used a virtio device: what ran here had come as far as an operating system comes.
    var wasDriven: Bool { registry.slots.contains { $0.function.counters.kicks.value > 0 } }
}

/// The interrupt line of a device that outlives boards: it is connected to the board that runs.
final class InterruptPin: Sendable {
    private let line = Guarded<InterruptLine?>(nil)

    func connect(_ new: InterruptLine?) { line.withLock { $0 = new } }

    /// Raises and lowers the line, if there is a board.
    func pulse() { line.withLock { $0 }?.pulse() }
}

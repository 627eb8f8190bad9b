public import CLinux
internal import Boot
internal import BundledGuest
internal import Devices
internal import GuestMemory
internal import KVM
internal import Linux
internal import Synchronization
internal import Virtio

/// A virtual machine: everything that a ``Configuration`` asks for, owned by one object.
///
/// It is made in full or not at all: an initializer that throws has given back whatever it had taken. ``start()``
/// starts the vCPUs, ``endDescriptor`` becomes readable when the guest ends or is ended, ``finish()`` joins all threads. What it
/// owns on the host (TAPs, locks, memory) goes with the object.
public final class Machine: Sendable {
    public let configuration: Configuration

    private let memory: GuestMemory
    // Declared after the memory, which its slots point to; Swift destroys properties in this order, so KVM's view is closed
    // explicitly before that: `deinit` says how.
    private let virtualMachine: VirtualMachine
    private let cpus: [CPUThread]
    private let ending: Ending
    private let devices: [VirtioAttachment]
    private let serial: SerialPort
    private let power: PowerController
    private let room: EventFD

    /// Takes from the host what the configuration asks for, loads the kernel, and sets the vCPUs up.
    /// - Parameter output: takes what the guest writes to its serial port; called by vCPU threads, must not wait.
    public init(_ configuration: Configuration, output: any SerialSink) throws(MachineError) {
        guard configuration.cpus > 0 else { throw .noCPUs(configuration.cpus) }
        try VirtioAttachment.checkCount(configuration.disks.count + configuration.networks.count)
        let kernel = try Self.openKernel(configuration)

        // Memory first: it is what is most often missing, and nothing on the host has been touched before it.
        let memory = try Self.makeMemory(configuration.memory)
        let system = try adapting { () throws(KVMError) in try System() }
        let virtualMachine = try adapting { () throws(KVMError) in try Self.makeVirtualMachine(system, configuration, memory) }
        let ending = try hosting("make an eventfd") { () throws(SystemCallError) in try Ending() }
        let devices = try VirtioAttachment.makeAll(configuration, memory: memory.ram, virtualMachine)

        let wires = try hosting("make an eventfd") { () throws(SystemCallError) in try InterruptWires() }
        let room = try hosting("make an eventfd") { () throws(SystemCallError) in try EventFD() }
        let roomBell = Bell(room)
        let request: @Sendable (MachineRequest) -> Void = { ending.post(MachineEnd($0)) }
        serial = SerialPort(sink: output, interrupt: { wires.serial.signal() }, onRoom: { roomBell.signal() })
        power = PowerController(request: request, interrupt: { wires.power.signal() })
        try adapting { () throws(KVMError) in
            try virtualMachine.setInterruptBell(wires.serial, gsi: Wiring.serialGSI)
            try virtualMachine.setInterruptBell(wires.power, gsi: Wiring.powerGSI)
        }
        let ports = PortBus([
            PortBus.Entry(first: 0x3f8, count: 8, device: serial),
            PortBus.Entry(first: 0x501, count: 1, device: ExitDevice(request: request)),
            PortBus.Entry(first: 0x600, count: 3, device: power),
            PortBus.Entry(first: 0x60, count: 5, device: KeyboardController(request: request)),
            PortBus.Entry(first: 0x70, count: 2, device: RealTimeClock(memorySize: memory.size)),
            PortBus.Entry(first: 0x80, count: 1, device: PostCodePort()),
        ])
        let mmio = MMIOBus(devices.map(\.transport))

        let state = try adapting { () throws(BootError) in
            try Self.load(kernel, configuration, memory, slots: devices.map(\.slot))
        }
        let model = try adapting { () throws(KVMError) in try CPUModel(system, count: configuration.cpus) }
        var cpus: [CPUThread] = []
        for id in 0..<UInt32(configuration.cpus) {
            let cpu = try adapting { () throws(KVMError) in
                try CPUSetup.makeCPU(id: id, of: virtualMachine, model, boot: id == 0 ? state : nil)
            }
            cpus.append(CPUThread(cpu, ports: ports, mmio: mmio, ram: memory.ram, ending: ending))
        }
        self.cpus = cpus
        self.configuration = configuration
        self.memory = memory
        self.virtualMachine = virtualMachine
        self.ending = ending
        self.devices = devices
        self.room = room
    }
}

internal import Boot
internal import BundledGuest
internal import GuestMemory
internal import KVM
internal import Linux

/// The steps of ``Machine/init(_:output:log:)``, each with its module's error.
extension Machine {
    static func makeMemory(_ wanted: Configuration.Memory) throws(MachineError) -> GuestMemory {
        do throws(GuestMemoryError) {
            let memory = try GuestMemory(size: wanted.size, backing: wanted.backing, shared: wanted.isShared)
            if wanted.isPreallocated { try memory.prealloc() }
            return memory
        } catch { throw .memory(error) }
    }

    static func makeVirtualMachine(
        _ system: borrowing System, _ configuration: Configuration, _ memory: GuestMemory
    ) throws(MachineError) -> VirtualMachine {
        do throws(KVMError) {
            try system.requireCapabilities()
            guard configuration.cpus <= system.maximumCPUs else {
                throw .tooManyCPUs(wanted: configuration.cpus, maximum: system.maximumCPUs)
            }
            let machine = try system.createVirtualMachine()
            try machine.setTSSAddress(Wiring.taskStateSegment)
            try machine.setIdentityMapAddress(Wiring.identityMap)
            for (slot, region) in memory.regions.enumerated() {
                // The memory outlives the machine: ``Machine`` holds both until its end.
                try unsafe machine.setMemory(slot: UInt32(slot), at: region.start.rawValue, size: region.size, host: region.host)
            }
            // After the memory: the kernel retires the bus of each controller's predecessor in the background, and a change of
            // memory would have to wait for that, some milliseconds.
            try machine.createInterruptControllers()
            return machine
        } catch { throw .kvm(error) }
    }

    static func openKernel(_ configuration: Configuration) throws(MachineError) -> BootFile {
        switch configuration.kernel {
        case .bundled:
            // The bytes are constants of this binary.
            return unsafe BootFile(
                name: "the bundled guest", memory: UnsafeRawBufferPointer(start: bundled_guest_start(), count: bundled_guest_size()))
        case .file(let path):
            do throws(BootError) { return try BootFile(path: path) } catch { throw .boot(error) }
        }
    }

    static func load(
        _ kernel: BootFile, _ configuration: Configuration, _ memory: GuestMemory, _ devices: [VirtioSlot], _ model: CPUModel
    ) throws(MachineError) -> BootState {
        let slots = devices.map(\.place)
        do throws(BootError) {
            var initrd: BootFile?
            if let path = configuration.initrd { initrd = try BootFile(path: path) }
            let loader = try KernelLoader(
                kernel: kernel, initrd: initrd,
                commandLine: KernelCommandLine.assemble(configuration.commandLine, devices: slots),
                tables: ACPITables(ACPIDescription(cpus: configuration.cpus, virtioDevices: slots)),
                identity: SMBIOSTables(SMBIOSDescription(
                    name: configuration.name, uuid: configuration.uuid?.bytes ?? [], cpus: configuration.cpus, processor: model.processor,
                    memory: memory.regions.map { $0.start.rawValue..<$0.end.rawValue })),
                processors: MPTable(cpus: configuration.cpus))
            return try loader.load(into: memory, isFresh: true)
        } catch { throw .boot(error) }
    }

    static func kvm<Result: ~Copyable>(_ body: () throws(KVMError) -> Result) throws(MachineError) -> Result {
        do throws(KVMError) { return try body() } catch { throw .kvm(error) }
    }

    static func host<Result>(_ purpose: String, _ body: () throws(SystemCallError) -> Result) throws(MachineError) -> Result {
        do throws(SystemCallError) { return try body() } catch { throw .host(purpose: purpose, error) }
    }
}

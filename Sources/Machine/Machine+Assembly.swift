internal import Boot
internal import BundledGuest
internal import GuestMemory
internal import KVM
internal import Linux

/// The steps of ``Machine/init(_:output:log:)``, each with its module's error.
extension Machine {
    /// Guest RAM, placed and filled as the configuration wants.
    static func makeMemory(
        _ configuration: Configuration, isInterrupted: @escaping @Sendable () -> Bool
    ) throws(MachineError) -> GuestMemory {
        let wanted = configuration.memory
        do throws(GuestMemoryError) {
            // Huge pages are counted by another controller.
            if wanted.isPreallocated, wanted.backing.pageSize == 4096 { try GuestMemory.checkControlGroup(size: wanted.size) }
            let memory = try GuestMemory(size: wanted.size, backing: wanted.backing, shared: wanted.isShared)
            var offset: UInt64 = 0
            for node in configuration.nodes {
                if let policy = node.policy { try memory.place(offset: offset, count: node.memory, by: policy, isInterrupted: isInterrupted) }
                offset &+= node.memory
            }
            if wanted.isPreallocated { try memory.prealloc(isInterrupted: isInterrupted) }
            return memory
        } catch { throw .memory(error) }
    }

    /// KVM, which can do what the configuration wants.
    static func makeSystem(_ configuration: Configuration) throws(MachineError) -> System {
        do throws(KVMError) {
            let system = try System()
            try system.requireCapabilities()
            guard configuration.cpus <= system.maximumCPUs else {
                throw .tooManyCPUs(wanted: configuration.cpus, maximum: system.maximumCPUs)
            }
            return system
        } catch { throw .kvm(error) }
    }

    static func makeVirtualMachine(_ system: borrowing System, _ memory: GuestMemory) throws(MachineError) -> VirtualMachine {
        do throws(KVMError) {
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
        case .file(let path): return try open(path)
        }
    }

    static func open(_ path: String) throws(MachineError) -> BootFile {
        do throws(BootError) { return try BootFile(path: path) } catch { throw .boot(error) }
    }

    static func load(
        _ kernel: BootFile, _ initrd: BootFile?, _ configuration: Configuration, _ memory: GuestMemory, _ layout: NodeLayout,
        _ devices: [VirtioSlot], _ model: CPUModel
    ) throws(MachineError) -> BootState {
        let slots = devices.map(\.place)
        do throws(BootError) {
            let loader = try KernelLoader(
                kernel: kernel, initrd: initrd,
                commandLine: KernelCommandLine.assemble(configuration.commandLine, devices: slots),
                tables: ACPITables(description(layout, slots)),
                identity: SMBIOSTables(SMBIOSDescription(
                    name: configuration.name, uuid: configuration.uuid?.bytes ?? [], sockets: layout.sockets, processor: model.processor,
                    memory: memory.regions.map { $0.start.rawValue..<$0.end.rawValue })),
                processors: MPTable(localAPICIDs: layout.localAPICIDs), memorySize: memory.size)
            return try loader.load(into: memory, isFresh: true)
        } catch { throw .boot(error) }
    }

    private static func description(_ layout: NodeLayout, _ slots: [VirtioMMIOSlot]) -> ACPIDescription {
        var description = ACPIDescription(localAPICIDs: layout.localAPICIDs, virtioDevices: slots)
        description.nodes = layout.nodes
        description.distances = layout.distances
        return description
    }

    static func kvm<Result: ~Copyable>(_ body: () throws(KVMError) -> Result) throws(MachineError) -> Result {
        do throws(KVMError) { return try body() } catch { throw .kvm(error) }
    }

    static func host<Result>(_ purpose: String, _ body: () throws(SystemCallError) -> Result) throws(MachineError) -> Result {
        do throws(SystemCallError) { return try body() } catch { throw .host(purpose: purpose, error) }
    }
}

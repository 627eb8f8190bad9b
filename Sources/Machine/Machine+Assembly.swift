// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import GuestMemory
internal import KVM
internal import Linux
internal import Logging
internal import Platform

/// The steps of ``Machine/init(_:output:log:)``, each with its module's error.
extension Machine {
    /// Guest RAM, placed and filled as the configuration wants.
    static func makeMemory(
        _ configuration: Configuration, isInterrupted: @escaping @Sendable () -> Bool, progress: GuestMemory.Progress?
    ) throws(MachineError) -> GuestMemory {
        let wanted = configuration.memory
        do throws(GuestMemoryError) {
            // Huge pages are counted by another controller.
            if wanted.isPreallocated, wanted.backing.pageSize == 4096 {
                try GuestMemory.checkControlGroup(size: wanted.size)
            }
            let memory = try GuestMemory(size: wanted.size, backing: wanted.backing, shared: wanted.isShared)
            var offset: UInt64 = 0
            for node in configuration.nodes {
                if let policy = node.policy {
                    try memory.place(
                        offset: offset, count: node.memory, by: policy, isInterrupted: isInterrupted, progress: progress
                    )
                }
                offset &+= node.memory
            }
            if wanted.isPreallocated { try memory.prealloc(isInterrupted: isInterrupted, progress: progress) }
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

    static func makeVirtualMachine(
        _ system: borrowing System, _ memory: GuestMemory, _ firmware: Firmware?
    ) throws(MachineError) -> VirtualMachine {
        do throws(KVMError) {
            let machine = try system.createVirtualMachine()
            try machine.setTSSAddress(UInt32(PhysicalLayout.taskStateSegment))
            try machine.setIdentityMapAddress(PhysicalLayout.identityMap)
            for (slot, region) in memory.regions.enumerated() {
                // The memory outlives the machine: ``Machine`` holds both until its end.
                try unsafe machine.setMemory(
                    slot: UInt32(slot), at: region.start.rawValue, size: region.size, host: region.host)
            }
            try firmware?.map(machine, slot: UInt32(memory.regions.count))
            // After the memory: the kernel retires the bus of each controller's predecessor in the background, and a
            // change of memory would have to wait for that, some milliseconds.
            try machine.createInterruptControllers()
            return machine
        } catch { throw .kvm(error) }
    }

    /// `vmlinuz (a Linux bzImage) with initrd.img`.
    static func bootDescription(
        _ kernel: KernelImage, _ files: BootSource.Files, _ configuration: Configuration
    ) -> String {
        switch configuration.kernel {
        case .automatic, .bundled: return kernel.name
        case .file, .disk:
            let title = files.title.map { "\($0): " } ?? ""
            return "\(title)\(kernel.name) (\(kernel.kind))" + (files.initrd.map { " with \($0.name)" } ?? "")
        }
    }

    /// Says that a stock Linux will hardly boot, where that is so.
    static func warnOfInterpretedRingZero(_ kernel: String, _ system: borrowing System, log: Logger) {
        guard RingZero.found(on: system) == .interpreted else { return }
        log.warning(
            """
            KVM on this host emulates guest ring 0 in software and does not support all instructions that a stock Linux kernel uses \
            (tested: cmpxchg16b). \(kernel) is unlikely to boot: it runs for a while, prints nothing, and ends in a KVM internal error. \
            It needs a host with VT-x or AMD-V; run `swkvm doctor` for details
            """)
    }

    static func open(_ path: String) throws(MachineError) -> BootFile {
        do throws(BootError) { return try BootFile(path: path) } catch { throw .boot(error) }
    }

    static func load(
        _ files: BootSource.Files, _ configuration: Configuration, _ memory: GuestMemory, _ layout: NodeLayout,
        _ registry: DeviceRegistry, _ model: CPUModel
    ) throws(MachineError) -> (state: BootState, kernel: KernelImage) {
        let slots = registry.slots.compactMap(\.mmio)
        let kernel: KernelImage
        do throws(BootError) { kernel = try KernelImage(files.kernel, memorySize: memory.size) } catch {
            throw .boot(error)
        }
        var words = KernelCommandLine(files.commandLine)
        // Only in one of the two places: Linux claims what it finds in the second once more, and complains of each
        // device.
        let discovery = configuration.discovery ?? (kernel.isLinux && words.turnsACPIOff ? .commandLine : .acpi)
        if !configuration.isCommandLineRaw {
            if kernel.isLinux, configuration.console != .none, configuration.addsConsole {
                words.addConsole(configuration.consoleDevice == .virtio ? "hvc0" : "ttyS0")
            }
            if discovery == .commandLine { words.add(slots) }
        }
        do throws(BootError) {
            var machine = description(layout, slots)
            if discovery == .commandLine { machine.virtioDevices = [] }
            machine.pci = registry.root?.description
            let loader = try KernelLoader(
                kernel, initrd: files.initrd, commandLine: words, tables: ACPITables(machine),
                identity: SMBIOSTables(identity(configuration, layout, model, memory)),
                processors: MPTable(localAPICIDs: layout.localAPICIDs),
                reserved: machine.pci.map { [$0.reserved] } ?? [])
            return (try loader.load(into: memory, isFresh: true), kernel)
        } catch { throw .boot(error) }
    }

    /// A sentence about devices that nothing describes to the kernel; nil if it can find all of them.
    static func warnOfUnseenDevices(
        _ kernel: KernelImage, _ files: BootSource.Files, _ configuration: Configuration, _ registry: DeviceRegistry
    ) -> String? {
        let words = KernelCommandLine(files.commandLine), count = registry.slots.count { $0.mmio != nil }
        guard kernel.isLinux, words.turnsACPIOff, count > 0, !words.hasWord(beginning: "virtio_mmio.device="),
            configuration.isCommandLineRaw || configuration.discovery == .acpi
        else { return nil }
        return
            "the kernel's command line has acpi=off and no virtio_mmio.device=, so Linux \(count == 1 ? "does not find the machine's device" : "finds none of the machine's \(count) devices"). "
            + (configuration.isCommandLineRaw
                ? "--cmdline instead of --cmdline-raw adds the words for each device"
                : "--discovery cmdline adds the words for each device")
    }

    static func identity(
        _ configuration: Configuration, _ layout: NodeLayout, _ model: CPUModel, _ memory: GuestMemory
    ) -> SMBIOSDescription {
        SMBIOSDescription(
            name: configuration.name, uuid: configuration.uuid?.bytes ?? [], sockets: layout.sockets,
            processor: model.processor, memory: memory.regions.map { $0.start.rawValue..<$0.end.rawValue })
    }

    static func description(_ layout: NodeLayout, _ slots: [VirtioMMIOSlot]) -> ACPIDescription {
        var description = ACPIDescription(localAPICIDs: layout.localAPICIDs, virtioDevices: slots)
        description.nodes = layout.nodes
        description.distances = layout.distances
        return description
    }

    static func kvm<Result: ~Copyable>(_ body: () throws(KVMError) -> Result) throws(MachineError) -> Result {
        do throws(KVMError) { return try body() } catch { throw .kvm(error) }
    }

    static func host<Result>(
        _ purpose: String, _ body: () throws(SystemCallError) -> Result
    ) throws(MachineError) -> Result {
        do throws(SystemCallError) { return try body() } catch { throw .host(purpose: purpose, error) }
    }
}

extension Configuration {
    /// A sentence for a user who may have expected something else to boot; nil where there is nothing to say.
    var bootNote: String? {
        guard kernel == .automatic, firmware == nil, let disk = disks.first else { return nil }
        // A user who gives the bundled guest its own words wants it (docs/guest.md, "Command line").
        let words = KernelCommandLine(commandLine)
        if ["test=", "bench=", "run=", "crash="].contains(where: { words.hasWord(beginning: $0) }) { return nil }
        return """
            no kernel was specified: the bundled guest boots, with \(disk.path) as a disk. To boot the system on a disk, \
            add `--boot default`, or specify its kernel: `--kernel vmlinuz --initrd initrd.img --cmdline 'root=/dev/vda1 ro'`; \
            `--kernel bundled` suppresses this note
            """
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Devices
internal import DiskImage
internal import GuestMemory
internal import HostNetwork
internal import Linux
internal import Machine
internal import Sandbox

/// What the options of `swkvm run` mean together.
extension RunCommand {
    /// Refuses options that exclude each other.
    func validate() throws {
        if initrd != nil, kernel == nil, image != nil || boot != nil {
            throw ValidationError(
                "the option --initrd requires --kernel: the initial RAM disk is that of the boot entry; to use another one, specify --kernel too"
            )
        }
        if let initrd, kernel == nil || kernel == Self.bundled {
            throw ValidationError(
                "the option --initrd requires --kernel: the bundled guest does not use an initial RAM disk. Specify its kernel: --kernel vmlinuz --initrd \(initrd)"
            )
        }
        if boot != nil, kernel != nil {
            throw ValidationError(
                "the options --boot and --kernel cannot be combined: the kernel is that of a disk, or a file")
        }
        if let boot, image == nil, disk.isEmpty {
            throw ValidationError("the option --boot \(boot) requires a disk: swkvm run IMAGE, or --disk PATH")
        }
        if firmware != nil { try validateFirmware() }
        if cmdlineRaw != nil, !append.isEmpty {
            throw ValidationError("the options --append and --cmdline-raw cannot be combined")
        }
        if cmdlineRaw != nil, !cmdline.isEmpty {
            throw ValidationError("the options --cmdline and --cmdline-raw cannot be combined")
        }
        if discovery == .cmdline, let cmdlineRaw, cmdlineRaw.firstOccurrence(of: "virtio_mmio.device=") == nil {
            throw ValidationError(
                "the options --discovery cmdline and --cmdline-raw cannot be combined unless the words have a virtio_mmio.device= for each device: nothing is added to them"
            )
        }
        if bus == .pci, let discovery {
            throw ValidationError(
                "the option --discovery \(discovery.rawValue) requires --bus mmio: a guest finds PCI devices by itself")
        }
        for (option, path) in [
            ("kernel", kernel), ("initrd", initrd), ("metrics", metrics), ("daemon", daemon), ("pid-file", pidFile),
        ] where path?.isEmpty == true {
            throw ValidationError("the option --\(option) requires a non-empty path")
        }
        if daemon != nil, console?.kind == .stdio {
            throw ValidationError(
                "the options --daemon and --console stdio cannot be combined: the machine has no terminal; use unix:PATH, file:PATH or pty"
            )
        }
        if console?.device == .virtio, firmware == nil, boot == nil, image == nil,
            kernel ?? Self.bundled == Self.bundled
        {
            throw ValidationError(
                "the option --console device=virtio requires --kernel, --boot or --firmware: the bundled guest has only the serial port"
            )
        }
        if runAs != nil, sandbox.mode != .on {
            throw ValidationError("the option --run-as requires --sandbox on")
        }
        if metrics == nil, metricsFormat != nil || metricsInterval != nil {
            throw ValidationError(
                "the option --metrics-\(metricsFormat != nil ? "format" : "interval") requires --metrics")
        }
        try validateManagement()
        if let hugepages, hugepages.backing == nil {
            throw ValidationError(
                "The value '\(hugepages)' is invalid for '--hugepages <kind>': expected one of \(HugePages.allValueStrings.joined(separator: ", "))"
            )
        }
        do { _ = try rng?.entropy() } catch {
            throw ValidationError("The value '\(rng?.description ?? "")' is invalid for '--rng <limit>': \(error)")
        }
        do throws(MachineError) {
            var machine = Configuration(
                memory: Configuration.Memory(size: mem.bytes, backing: hugepages?.backing ?? .automatic))
            machine.balloon = balloon?.settings
            try machine.checkBalloon()
        } catch {
            throw ValidationError(error.description)
        }
        if net.count > 1, net.contains(where: { $0.network == nil }) {
            throw ValidationError("the option --net none cannot be combined with another --net")
        }
        if metadata != nil {
            guard !configuration.networks.isEmpty else {
                throw ValidationError("the option --metadata requires a network interface: specify --net")
            }
            if let queues = net.compactMap(\.network?.queues).first(where: { $0 > 1 }) {
                throw ValidationError(
                    "the option --metadata requires interfaces with one pair of queues; queues=\(queues) was requested")
            }
        }
        do throws(MachineError) { try Configuration(networks: net.compactMap(\.network)).checkNetworks() } catch {
            throw ValidationError(error.description)
        }
    }

    /// The machine that the options describe.
    var configuration: Configuration {
        var machine = Configuration(
            name: name ?? Configuration.usualName, cpus: cpus, commandLine: cmdlineRaw ?? cmdline)
        machine.isNamed = name != nil
        machine.isCommandLineRaw = cmdlineRaw != nil
        machine.bus = bus
        machine.virtqueues = virtqueues
        machine.discovery = discovery?.discovery
        machine.memory = Configuration.Memory(
            size: mem.bytes, backing: hugepages?.backing ?? .automatic, isShared: shared, isPreallocated: prealloc)
        machine.nodes = numa.map(\.node)
        if let kernel {
            machine.kernel = kernel == Self.bundled ? .bundled : .file(kernel)
        } else if firmware == nil, image != nil || boot != nil {
            machine.kernel = .disk(index: 0, entry: boot == "default" ? nil : boot)
        }
        machine.firmware = firmware?.path
        machine.initrd = initrd
        machine.appendedWords = append
        machine.uuid = uuid.map(\.uuid) ?? name.map(HostIdentity().uuid(ofMachine:))
        machine.disks = (bootImage.map { [$0] } ?? []) + disk.map(\.disk)
        machine.networks = net.compactMap(\.network)
        // A system on a disk expects a network.
        if net.isEmpty, image != nil, kernel == nil { machine.networks = [NetworkArgument.usual] }
        machine.entropy = try? rng?.entropy()
        machine.balloon = balloon?.settings
        machine.vsock = vsock?.vsock
        machine.console = console?.kind ?? (daemon == nil ? .stdio : .none)
        machine.consoleLimits = console?.limits ?? .none
        machine.consoleDevice = console?.device ?? .serial
        machine.processFile = pidFile
        machine.messageFile = daemon
        machine.debugger = gdb?.place
        machine.onReboot = onReboot?.action ?? .restart
        machine.stopTimeout = stopTimeout?.timeout ?? .automatic
        machine.onDiskError = onDiskError
        machine.sandbox = sandbox
        machine.controlGroup = cgroup?.group
        machine.runAs = runAs?.user
        machine.metrics = metrics.map {
            Configuration.Metrics(path: $0, format: metricsFormat ?? .json, interval: metricsInterval)
        }
        machine.countsExits = trace.contains(.exits)
        machine.seedFiles = seed.files
        if let metadata { machine.seedFiles.append(("--metadata", metadata.path)) }
        return machine
    }

    /// The image as the first disk, which stays as it is.
    private var bootImage: Configuration.Disk? {
        guard var disk = image?.disk else { return nil }
        disk.isTransient = !disk.options.readOnly
        return disk
    }
}

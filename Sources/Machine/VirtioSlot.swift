// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import DiskImage
internal import GuestMemory
internal import HostNetwork
internal import KVM
internal import Linux
internal import Logging
internal import PCI
internal import Platform
internal import Virtio

/// A virtio device in its place on a board: transport, address and interrupt line.
struct VirtioSlot: Sendable {
    enum Place: Sendable {
        case mmio(MMIOTransport, VirtioMMIOSlot)
        case pci(PCITransport, PCIAddress)
    }

    /// The number of the place, from 0.
    let index: Int
    let place: Place

    var function: VirtioFunction {
        switch place {
        case .mmio(let transport, _): transport.function
        case .pci(let transport, _): transport.function
        }
    }
    var device: any VirtioDevice { function.device }
    /// For guests that do not look for it by themselves; nil for a PCI function.
    var mmio: VirtioMMIOSlot? { if case .mmio(_, let slot) = place { slot } else { nil } }

    static func address(ofDevice index: Int) -> UInt64 {
        PhysicalLayout.virtioMMIO + UInt64(index) * PhysicalLayout.virtioMMIOSpan
    }

    /// For the log: `blk0 at 0xd0000000, GSI 16`, or `blk0 at PCI 00:01.0`.
    var description: String {
        switch place {
        case .mmio(_, let slot): "\(device.name) at 0x\(String(slot.address, radix: 16)), GSI \(slot.gsi)"
        case .pci(_, let address): "\(device.name) at PCI \(address)"
        }
    }

    /// The most devices of a machine.
    static func maximumCount(_ bus: Configuration.Bus) -> Int {
        switch bus {
        case .mmio: GSIs.virtio.count
        case .pci: PCIRoot.maximumFunctions
        }
    }

    static func checkCount(_ wanted: Int, _ bus: Configuration.Bus) throws(MachineError) {
        let maximum = maximumCount(bus)
        if wanted > maximum { throw .tooManyDevices(wanted: wanted, maximum: maximum) }
    }

    /// Makes the disks, the seed's behind them, the entropy device, the balloon, the console, the socket device, then
    /// the network interfaces.
    /// - Parameter console: takes its place behind the balloon.
    /// - Returns: them, what a disk boots, if the configuration boots one, and the socket device's own socket.
    /// - Parameter isInterrupted: polled several times a second while something is waited for: a disk's key or server,
    ///   for example.
    static func makeDevices(
        _ configuration: Configuration, _ control: MachineControl, console: ConsoleDevice?, log: Logger,
        isInterrupted: @escaping @Sendable () -> Bool = { false }
    ) throws(MachineError) -> (devices: [any VirtioDevice], boot: BootSource?, vsockListener: Listener?) {
        try configuration.checkNetworks()
        try configuration.checkBalloon()
        var devices: [any VirtioDevice] = []
        var opened = OpenDisks()
        var boot: BootSource?
        // What the machine's owner names, its images may name, too.
        let stated = configuration.disks.flatMap { [$0.path] + ($0.options.dataFile.map { [$0] } ?? []) }
        for (index, disk) in configuration.disks.enumerated() {
            var disk = disk
            disk.options.namedFiles.stated += stated
            disk.options.isInterrupted = isInterrupted
            let (device, contents) = try makeDisk(disk, index: index, &opened, configuration, control, log: log)
            devices.append(device)
            // Before any network: what does not boot changes nothing on the host.
            if case .disk(index, let entry) = configuration.kernel {
                boot = try BootSource(configuration, booting: contents, disk.path, entry: entry)
            }
        }
        try OutputFiles(configuration).check(opened)
        if let seed = configuration.seed {
            devices.append(try makeSeed(seed, index: configuration.disks.count, configuration, control, log: log))
        }
        if let entropy = configuration.entropy {
            devices.append(
                try Machine.host("create the descriptors of rng0") { () throws(SystemCallError) in
                    try EntropyDevice(name: "rng0", limit: entropy.limit, events: events(log.of("rng0"), configuration))
                })
        }
        if let settings = configuration.balloon {
            let balloon = try Machine.host("create the descriptors of balloon0") { () throws(SystemCallError) in
                try BalloonDevice(
                    name: "balloon0", settings: settings, events: events(log.of("balloon0"), configuration))
            }
            control.setBalloon(balloon, configuration)
            devices.append(balloon)
        }
        if let console { devices.append(console) }
        var vsockListener: Listener?
        if let vsock = configuration.vsock {
            let made = try makeVsock(vsock, configuration, log: log)
            devices.append(made.device)
            vsockListener = made.listener
        }
        // Networks last: what they change on the host is undone when a later step fails, but better not done at all.
        var addresses: Set<MACAddress> = []
        for (index, network) in configuration.networks.enumerated() {
            if network.isOptional, devices.count >= maximumCount(configuration.bus) { continue }
            guard let device = try makeNetwork(network, index: index, configuration, log: log, isInterrupted) else {
                continue
            }
            guard addresses.insert(device.address).inserted else { throw .networks(.sameAddress(device.address)) }
            devices.append(device)
        }
        return (devices, boot, vsockListener)
    }

    /// Makes the virtio console.
    /// - Parameters:
    ///   - output: takes what the guest writes.
    ///   - room: is signalled when input is taken again.
    static func makeConsole(
        _ output: any SerialSink, _ room: ConsoleRoom, _ configuration: Configuration, log: Logger
    ) throws(MachineError) -> ConsoleDevice {
        try Machine.host("create the descriptors of con0") { () throws(SystemCallError) in
            try ConsoleDevice(
                name: "con0", sink: output, onRoom: { room.event.signal() },
                events: events(log.of("con0"), configuration))
        }
    }

    private static func makeDisk(
        _ disk: Configuration.Disk, index: Int, _ opened: inout OpenDisks, _ configuration: Configuration,
        _ control: MachineControl,
        log: Logger
    ) throws(MachineError) -> (BlockDevice, ImageContents) {
        do throws(DiskImageError) {
            var options = disk.options
            let log = log.of("blk\(index)")
            options.report = { log.warning("\($0)") }
            options.notice = options.report
            try options.namedFiles.checkDirectories()
            options.keys += try disk.keys.map { source throws(DiskImageError) in
                try DiskKey(source, isInterrupted: options.isInterrupted, report: options.report)
            }
            let image =
                try disk.isTransient
                ? DiskImage(overlaying: disk.path, options: options) : DiskImage(path: disk.path, options: options)
            try opened.add(image, as: disk.path)
            guard disk.queues <= image.maximumEngines else {
                throw .impossible(
                    path: disk.path,
                    reason: "a remote disk, or an image on one, has one queue; queues=\(disk.queues) was requested")
            }
            let contents = ImageContents(image)
            let device = try BlockDevice(
                name: "blk\(index)", image: image, serial: disk.serial ?? "swkvm-\(index)", queues: disk.queues,
                limit: disk.limit, events: events(log, configuration), onError: configuration.onDiskError,
                onStop: control.diskStopped)
            return (device, contents)
        } catch { throw .disk(opened.explain(error, opening: disk.path)) }
    }

    private static func makeSeed(
        _ contents: [UInt8], index: Int, _ configuration: Configuration, _ control: MachineControl, log: Logger
    ) throws(MachineError) -> BlockDevice {
        let file: FileDescriptor
        do throws(SystemCallError) { file = try FileDescriptor.sealedMemory("swkvm-seed", contents: contents) } catch {
            throw .host(purpose: "keep the seed for cloud-init in memory", error)
        }
        do throws(DiskImageError) {
            return try BlockDevice(
                name: "blk\(index)", image: try DiskImage(name: "the seed for cloud-init", contents: file),
                serial: "cidata", queues: 1, events: events(log.of("blk\(index)"), configuration),
                onError: configuration.onDiskError, onStop: control.diskStopped)
        } catch { throw .disk(error) }
    }

    /// - Returns: nil for an interface that the machine can do without, and that the host does not provide.
    private static func makeNetwork(
        _ network: Configuration.Network, index: Int, _ configuration: Configuration, log: Logger,
        _ isInterrupted: () -> Bool
    ) throws(MachineError) -> NetworkDevice? {
        let log = log.of("net\(index)")
        let attachment: NetworkAttachment
        do throws(MachineError) { attachment = try attach(network, isInterrupted) } catch {
            guard network.isOptional, !isInterrupted(), case .network(let error) = error else { throw error }
            if case .nat = network.backend {
                log.notice("\(error). The guest has the network of this user instead (--net user)")
                var other = network
                other.backend = .user()
                return try makeNetwork(other, index: index, configuration, log: log, isInterrupted)
            }
            log.notice("the guest has no network interface: \(error). Choose one with --net, or --net none")
            return nil
        }
        // An interface that is slower than possible without a request for that deserves more than a line that is
        // usually hidden.
        for note in attachment.notes { log.notice("\(note)") }
        if network.isOptional, case .nat(let name, _) = network.backend {
            log.notice("the guest is in the network \(name) of this host (--net nat); choose another one with --net")
        }
        let offloads = attachment.offloads
        let isUnexpected = network.offload == nil && !offloads.isOn && !attachment.isStream
        log.log(level: isUnexpected ? .notice : .info, "\(offloads)")
        let address =
            network.mac
            ?? HostIdentity().address(
                ofMachine: configuration.name,
                interface: configuration.identity(ofNetwork: index, interface: attachment.name))
        do throws(HostNetworkError) { try attachment.start(with: address) } catch { throw .network(error) }
        if case .nat(let name, _) = network.backend, configuration.hasOwnName {
            // Without it the guest only has no name there.
            do throws(NetworkError) { try Networks().register(address, configuration.name, in: name) } catch {
                log.warning("\(error)")
            }
        }
        do throws(SystemCallError) {
            return try NetworkDevice(
                name: "net\(index)", address: address, attachment: attachment,
                isAddressLocked: network.isMACLocked, limits: network.limits, metadata: configuration.metadata,
                events: events(log, configuration))
        } catch { throw .host(purpose: "create the descriptors of net\(index)", error) }
    }

    static func events(_ log: Logger, _ configuration: Configuration) -> DeviceEvents {
        DeviceEvents(now: configuration.eventClock ?? { TimerFD.now }, isTracing: log.logLevel <= .trace) {
            level, line in
            switch level {
            case .trace: log.trace("\(line)")
            case .debug: log.debug("\(line)")
            case .info: log.info("\(line)")
            case .notice: log.notice("\(line)")
            case .warning: log.warning("\(line)")
            case .error: log.error("\(line)")
            }
        }
    }

    private static func attach(
        _ network: Configuration.Network, _ isInterrupted: () -> Bool
    ) throws(MachineError) -> NetworkAttachment {
        do throws(HostNetworkError) {
            if let namespace = network.namespace {
                return try NetworkAttachment.inNamespace(
                    namespace, network.backend, queues: network.queues, offload: network.offload)
            }
            return try NetworkAttachment(
                network.backend, queues: network.queues, offload: network.offload, isInterrupted: isInterrupted)
        } catch { throw .network(error) }
    }

    /// Makes a device's registers, doorbells and interrupts, new as after power-on. Nothing is connected yet.
    /// - Parameters:
    ///   - root: the board's PCI hierarchy; nil for a device of virtio-mmio.
    ///   - queues: the kind of queues to offer.
    init(
        _ device: any VirtioDevice, index: Int, _ memory: GuestMemory, _ root: PCIRoot?, queues: VirtqueueFormat
    ) throws(MachineError) {
        self.index = index
        place = try Machine.host("create the eventfds of \(device.name)") { () throws(SystemCallError) -> Place in
            if let root {
                let address = PCIRoot.address(ofSlot: index)
                return .pci(
                    try PCITransport(
                        device: device, memory: memory, platform: root.platform(for: address),
                        address: PCIRoot.barAddress(ofSlot: index), queues: queues), address)
            }
            return .mmio(
                try MMIOTransport(device: device, memory: memory, queues: queues),
                VirtioMMIOSlot(
                    address: Self.address(ofDevice: index), size: UInt32(PhysicalLayout.virtioMMIOSpan),
                    gsi: GSIs.virtio[index]))
        }
    }

    /// Connects doorbells and interrupt with KVM; a PCI function's are as its driver has the BAR and the messages.
    func connect(to machine: borrowing VirtualMachine) throws(MachineError) {
        guard case .mmio(let transport, let slot) = place else { return }
        do throws(KVMError) {
            for (queue, doorbell) in transport.function.doorbells.enumerated() {
                try machine.assignIOEventFD(doorbell.event, for: Self.match(ofQueue: queue, slot))
            }
            try machine.assignIRQFD(transport.irqfd.event, gsi: slot.gsi)
        } catch { throw .kvm(error) }
    }

    /// Disconnects what is connected of them.
    func disconnect(from machine: borrowing VirtualMachine) {
        switch place {
        case .mmio(let transport, let slot):
            for (queue, doorbell) in transport.function.doorbells.enumerated() {
                try? machine.deassignIOEventFD(doorbell.event, for: Self.match(ofQueue: queue, slot))
            }
            try? machine.deassignIRQFD(transport.irqfd.event, gsi: slot.gsi)
        case .pci(let transport, _): transport.disconnect()
        }
    }

    private static func match(ofQueue queue: Int, _ slot: VirtioMMIOSlot) -> IOEventMatch {
        IOEventMatch(address: slot.address + MMIOTransport.queueNotifyOffset, length: 4, value: UInt64(queue))
    }
}

extension Logger {
    /// The key of the metadata that names the device which a line is about.
    package static let deviceKey = "device"

    /// The log of a device.
    func of(_ device: String) -> Logger {
        var log = self
        log[metadataKey: Self.deviceKey] = .string(device)
        return log
    }
}

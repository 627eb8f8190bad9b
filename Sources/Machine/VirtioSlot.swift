// SPDX-License-Identifier: Apache-2.0

internal import Boot
internal import Devices
internal import DiskImage
internal import GuestMemory
internal import HostNetwork
internal import KVM
internal import Linux
internal import Logging
internal import Platform
internal import Virtio

/// A virtio device in its place on a board: transport, address and interrupt line.
struct VirtioSlot: Sendable {
    /// The number of the place, from 0.
    let index: Int
    let transport: MMIOTransport
    let place: VirtioMMIOSlot

    var device: any VirtioDevice { transport.function.device }

    static func address(ofDevice index: Int) -> UInt64 { PhysicalLayout.virtioMMIO + UInt64(index) * PhysicalLayout.virtioMMIOSpan }

    /// For the log: `blk0 at 0xd0000000, GSI 16: disk.raw`.
    var description: String {
        "\(transport.function.device.name) at 0x\(String(place.address, radix: 16)), GSI \(place.gsi)"
    }

    static func checkCount(_ wanted: Int) throws(MachineError) {
        let maximum = GSIs.virtio.count
        if wanted > maximum { throw .tooManyDevices(wanted: wanted, maximum: maximum) }
    }

    /// Makes the disks, the entropy device, then the network interfaces.
    static func makeDevices(
        _ configuration: Configuration, _ control: MachineControl, log: Logger
    ) throws(MachineError) -> [any VirtioDevice] {
        try configuration.checkNetworks()
        var devices: [any VirtioDevice] = []
        var opened = OpenDisks()
        // What the machine's owner names, its images may name, too.
        let stated = configuration.disks.flatMap { [$0.path] + ($0.options.dataFile.map { [$0] } ?? []) }
        for (index, disk) in configuration.disks.enumerated() {
            var disk = disk
            disk.options.namedFiles.stated += stated
            devices.append(try makeDisk(disk, index: index, &opened, configuration, control, log: log))
        }
        if let entropy = configuration.entropy {
            devices.append(
                try Machine.host("create the descriptors of rng0") { () throws(SystemCallError) in
                    try EntropyDevice(name: "rng0", limit: entropy.limit, events: events(log.of("rng0"), configuration))
                })
        }
        // Networks last: what they change on the host is undone when a later step fails, but better not done at all.
        var addresses: Set<MACAddress> = []
        for (index, network) in configuration.networks.enumerated() {
            let device = try makeNetwork(network, index: index, configuration, log: log)
            guard addresses.insert(device.address).inserted else { throw .networks(.sameAddress(device.address)) }
            devices.append(device)
        }
        return devices
    }

    private static func makeDisk(
        _ disk: Configuration.Disk, index: Int, _ opened: inout OpenDisks, _ configuration: Configuration, _ control: MachineControl,
        log: Logger
    ) throws(MachineError) -> BlockDevice {
        do throws(DiskImageError) {
            var options = disk.options
            let log = log.of("blk\(index)")
            options.report = { log.warning("\($0)") }
            options.notice = options.report
            try options.namedFiles.checkDirectories()
            options.keys += try disk.keys.map { source throws(DiskImageError) in try DiskKey(source) }
            let image = try DiskImage(path: disk.path, options: options)
            opened.add(image)
            guard disk.queues <= image.maximumEngines else {
                throw .impossible(path: disk.path, reason: "a remote disk, or an image on one, has one queue; queues=\(disk.queues) was requested")
            }
            return try BlockDevice(
                name: "blk\(index)", image: image, serial: disk.serial ?? "swkvm-\(index)", queues: disk.queues,
                events: events(log, configuration), onError: configuration.onDiskError, onStop: control.diskStopped)
        } catch { throw .disk(opened.explain(error, opening: disk.path)) }
    }

    private static func makeNetwork(
        _ network: Configuration.Network, index: Int, _ configuration: Configuration, log: Logger
    ) throws(MachineError) -> NetworkDevice {
        let attachment = try attach(network)
        let log = log.of("net\(index)")
        // Slower than it could be, though nobody has asked for that, is worth more than a line that is usually hidden.
        let offloads = attachment.offloads
        log.log(level: network.offload == nil && !offloads.isOn ? .notice : .info, "\(offloads)")
        let address = network.mac ?? HostIdentity().address(ofMachine: configuration.name, interface: attachment.tap.name)
        do throws(SystemCallError) {
            return try NetworkDevice(
                name: "net\(index)", address: address, attachment: attachment, events: events(log, configuration))
        } catch { throw .host(purpose: "create the descriptors of net\(index)", error) }
    }

    private static func events(_ log: Logger, _ configuration: Configuration) -> DeviceEvents {
        DeviceEvents(now: configuration.eventClock ?? { TimerFD.now }) { level, line in
            switch level {
            case .info: log.info("\(line)")
            case .notice: log.notice("\(line)")
            case .warning: log.warning("\(line)")
            case .error: log.error("\(line)")
            }
        }
    }

    private static func attach(_ network: Configuration.Network) throws(MachineError) -> NetworkAttachment {
        do throws(HostNetworkError) { return try NetworkAttachment(network.backend, offload: network.offload) } catch { throw .network(error) }
    }

    /// Makes a device's registers, doorbells and interrupt, new as after power-on. Nothing is connected yet.
    init(_ device: any VirtioDevice, index: Int, _ memory: GuestMemory) throws(MachineError) {
        self.index = index
        place = VirtioMMIOSlot(
            address: Self.address(ofDevice: index), size: UInt32(PhysicalLayout.virtioMMIOSpan), gsi: GSIs.virtio[index])
        transport = try Machine.host("create the eventfds of \(device.name)") { () throws(SystemCallError) in
            try MMIOTransport(device: device, memory: memory)
        }
    }

    /// Connects doorbells and interrupt with KVM.
    func connect(to machine: borrowing VirtualMachine) throws(MachineError) {
        do throws(KVMError) {
            for (queue, doorbell) in transport.function.doorbells.enumerated() {
                try machine.assignIOEventFD(doorbell.event, for: match(ofQueue: queue))
            }
            try machine.assignIRQFD(transport.irqfd.event, gsi: place.gsi)
        } catch { throw .kvm(error) }
    }

    /// Disconnects what is connected of them.
    func disconnect(from machine: borrowing VirtualMachine) {
        for (queue, doorbell) in transport.function.doorbells.enumerated() {
            try? machine.deassignIOEventFD(doorbell.event, for: match(ofQueue: queue))
        }
        try? machine.deassignIRQFD(transport.irqfd.event, gsi: place.gsi)
    }

    private func match(ofQueue queue: Int) -> IOEventMatch {
        IOEventMatch(address: place.address + MMIOTransport.queueNotifyOffset, length: 4, value: UInt64(queue))
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

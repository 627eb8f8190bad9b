// SPDX-License-Identifier: Apache-2.0

internal import Devices
internal import DiskImage
internal import GuestMemory
internal import Linux
internal import Machine
internal import ManagementAPI

/// A description of the management API as a machine's configuration, and the other way round.
extension Configuration {
    /// What Firecracker gives to a kernel without a command line.
    private static let usualArguments =
        "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"

    /// This configuration with what a description says.
    func adding(_ description: MachineDescription) throws(Fault) -> Configuration {
        var machine = self
        machine.cpus = Int(description.cpus)
        machine.memory.size = description.memory << 20
        if description.hugePages == .twoMiB { machine.memory.backing = HugePages.twoMiB.backing ?? .automatic }
        machine.addsConsole = false
        if let boot = description.boot {
            machine.kernel = .file(boot.kernel)
            machine.initrd = boot.initrd
            var words = boot.arguments ?? Self.usualArguments
            if let root = description.drives.first, root.isRoot {
                words += " root=" + (root.partition.map { "PARTUUID=\($0)" } ?? "/dev/vda")
                words += root.isReadOnly ? " ro" : " rw"
            }
            machine.commandLine = words
        }
        machine.disks = try description.drives.map { drive throws(Fault) in try Self.disk(drive) }
        machine.networks = try description.interfaces.map { interface throws(Fault) in try Self.network(interface) }
        machine.entropy = description.entropy.map { limiter in
            Entropy(
                limit: limiter?.bandwidth.flatMap { bucket in
                    bucket.size > 0 && bucket.refill > 0
                        ? EntropyLimit(bytes: bucket.size, period: Int(clamping: bucket.refill)) : nil
                })
        }
        if let path = description.serial { machine.console = .file(path) }
        if let path = description.metrics { machine.metrics = Metrics(path: path) }
        return machine
    }

    /// The disk of a drive: a raw image, unless words of swkvm's own say otherwise.
    static func disk(_ drive: DriveSettings) throws(Fault) -> Disk {
        let path = drive.path.split(separator: ",", omittingEmptySubsequences: false).joined(separator: ",,")
        let words = drive.options ?? "format=raw"
        var disk: Disk
        do { disk = try DiskArgument(parsing: words.isEmpty ? path : path + "," + words).disk } catch {
            throw Fault("Drive config error: \(error)")
        }
        if drive.isReadOnly { disk.options.readOnly = true }
        if disk.serial == nil { disk.serial = String(drive.id.prefix(20)) }
        if let limiter = drive.limiter { disk.limit = RateLimit(limiter) }
        return disk
    }

    /// The interface on a TAP.
    static func network(_ interface: InterfaceSettings) throws(Fault) -> Network {
        var words = "tap=\(interface.host)"
        if let mac = interface.mac { words += ",mac=\(mac)" }
        if let options = interface.options, !options.isEmpty { words += "," + options }
        var network: Network?
        do { network = try NetworkArgument(parsing: words).network } catch {
            throw Fault("Network config error: \(error)")
        }
        guard var network else { throw Fault("Network config error: \(words) is no interface") }
        if let limiter = interface.receiveLimiter { network.limits.receive = RateLimit(limiter) }
        if let limiter = interface.transmitLimiter { network.limits.transmit = RateLimit(limiter) }
        return network
    }

    /// What clients see of a machine that the command line describes.
    var description: MachineDescription {
        var description = MachineDescription()
        description.cpus = UInt64(cpus)
        description.memory = memory.size >> 20
        if memory.backing == HugePages.twoMiB.backing { description.hugePages = .twoMiB }
        if case .file(let path) = kernel {
            description.boot = BootSettings(kernel: path, initrd: initrd, arguments: commandLine)
        }
        for (index, disk) in disks.enumerated() {
            let drive = DriveSettings(
                id: "blk\(index)", path: disk.path, isRoot: false, isReadOnly: disk.options.readOnly)
            // Ids differ, and none is the root.
            try? description.set(drive)
        }
        return description
    }
}

extension RateLimit {
    fileprivate init(_ settings: LimiterSettings) {
        self.init(
            bytes: settings.bandwidth.flatMap(TokenBucket.Rate.init),
            operations: settings.operations.flatMap(TokenBucket.Rate.init))
    }
}

extension TokenBucket.Rate {
    /// nil for a bucket with a 0, which limits nothing.
    fileprivate init?(_ bucket: BucketSettings) {
        guard bucket.size > 0, bucket.refill > 0 else { return nil }
        let product = bucket.size.multipliedFullWidth(by: 1000)
        let perSecond = product.high < bucket.refill ? bucket.refill.dividingFullWidth(product).quotient : .max
        self.init(perSecond: perSecond, burst: bucket.size, extra: bucket.burst ?? 0)
    }
}

// SPDX-License-Identifier: Apache-2.0

package import Linux

/// A machine as requests describe it, before it starts, and as `/vm/config` has it afterwards.
package struct MachineDescription: Sendable {
    package var cpus: UInt64 = 1
    /// MiB.
    package var memory: UInt64 = 128
    package var smt = false
    package var tracksDirtyPages = false
    package var hugePages = MachineSettings.HugePages.none
    package var boot: BootSettings?
    /// The root drive is the first one.
    package private(set) var drives: [DriveSettings] = []
    package private(set) var interfaces: [InterfaceSettings] = []
    package var entropy: LimiterSettings??
    /// The file of the serial port's output.
    package var serial: String?
    package private(set) var metrics: String?

    package init() {}

    /// vCPUs of a Firecracker machine.
    package static let maximumCPUs: UInt64 = 32

    package mutating func change(_ settings: MachineSettings) throws(Fault) {
        let old = settings.isComplete ? MachineDescription() : self
        let cpus = settings.cpus ?? old.cpus, memory = settings.memory ?? old.memory, smt = settings.smt ?? old.smt
        let hugePages = settings.hugePages ?? old.hugePages
        guard (1...Self.maximumCPUs).contains(cpus), !smt || cpus == 1 || cpus.isMultiple(of: 2) else {
            throw Fault(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled."
            )
        }
        // As many as a 64-bit number of bytes can say.
        guard memory > 0, memory <= UInt64.max >> 20, hugePages == .none || memory.isMultiple(of: 2) else {
            throw Fault(
                "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
            )
        }
        (self.cpus, self.memory, self.smt, self.hugePages) = (cpus, memory, smt, hugePages)
        tracksDirtyPages = settings.tracksDirtyPages ?? old.tracksDirtyPages
    }

    /// Adds a drive, or replaces the one with its id.
    package mutating func set(_ drive: DriveSettings) throws(Fault) {
        if drive.isRoot, drives.contains(where: { $0.isRoot && $0.id != drive.id }) {
            throw Fault("Drive config error: A root block device already exists!")
        }
        let old = drives.firstIndex { $0.id == drive.id }
        if let old, !drive.isRoot || old == 0 {
            drives[old] = drive
        } else {
            if let old { drives.remove(at: old) }
            drives.insert(drive, at: drive.isRoot ? 0 : drives.count)
        }
    }

    /// Adds an interface, or replaces the one with its id.
    package mutating func set(_ interface: InterfaceSettings) throws(Fault) {
        let others = interfaces.filter { $0.id != interface.id }
        if let mac = interface.mac?.lowercased(), others.contains(where: { $0.mac?.lowercased() == mac }) {
            throw Fault(
                "Network config error: The MAC address is already in use: \(mac)")
        }
        if others.contains(where: { $0.host == interface.host }) {
            throw Fault(
                "Network config error: Could not create the network device: Open tap device failed: another interface of this machine uses the TAP \(interface.host)."
            )
        }
        if let old = interfaces.firstIndex(where: { $0.id == interface.id }) {
            interfaces[old] = interface
        } else {
            interfaces.append(interface)
        }
    }

    package mutating func set(metrics path: String) throws(Fault) {
        guard metrics == nil else {
            throw Fault(
                "Metrics error: Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed."
            )
        }
        metrics = path
    }

    /// `/machine-config`.
    package var machineJSON: JSON {
        .object([
            ("vcpu_count", .number(cpus)), ("mem_size_mib", .number(memory)), ("smt", .bool(smt)),
            ("track_dirty_pages", .bool(tracksDirtyPages)), ("huge_pages", .string(hugePages.rawValue)),
        ])
    }

    /// `/vm/config`.
    package var json: JSON {
        .object([
            ("balloon", .null), ("drives", .array(drives.map(\.json))),
            (
                "boot-source",
                .object([
                    ("kernel_image_path", .string(boot?.kernel ?? "")),
                    ("initrd_path", boot?.initrd.map(JSON.string) ?? .null),
                    ("boot_args", boot?.arguments.map(JSON.string) ?? .null),
                ])
            ),
            ("cpu-config", .null), ("logger", .null), ("machine-config", machineJSON), ("metrics", .null),
            ("mmds-config", .null), ("network-interfaces", .array(interfaces.map(\.json))), ("vsock", .null),
            ("entropy", entropy.map { .object([("rate_limiter", $0?.json ?? .null)]) } ?? .null),
        ])
    }
}

/// Firecracker's configuration file (`--config-file`).
package struct ConfigurationFile: Sendable {
    package var machine: MachineDescription
    package var logger: LoggerSettings?

    private static let sections: [String] = [
        "boot-source", "drives", "machine-config", "network-interfaces", "logger", "metrics", "entropy", "balloon",
        "vsock", "mmds-config", "cpu-config",
    ]

    /// - Throws: for what a request with these contents would be refused for, too.
    package init(_ text: [UInt8]) throws(Fault) {
        guard case .object(let pairs) = try ManagementRequest.value(text) else {
            throw .body("invalid type, expected struct VmmConfig")
        }
        var machine = MachineDescription(), hasDrives = false, hasBoot = false
        for (name, value) in pairs {
            guard let value else { continue }
            if case .null = value { continue }
            switch name {
            case "boot-source":
                machine.boot = try BootSettings(value)
                hasBoot = true
            case "machine-config": try machine.change(MachineSettings(value, isComplete: true))
            case "drives":
                for item in try Self.items(value, name) { try machine.set(DriveSettings(item)) }
                hasDrives = true
            case "network-interfaces":
                for item in try Self.items(value, name) { try machine.set(InterfaceSettings(item)) }
            case "logger": logger = try LoggerSettings(value)
            case "metrics":
                try machine.set(
                    metrics: Fields(value, of: "MetricsConfig", ["metrics_path"]).requiredText("metrics_path"))
            case "entropy": machine.entropy = .some(try ManagementRequest.entropy(value))
            case let name where Self.sections.contains(name): throw Fault("swkvm does not support \(name).")
            // As Firecracker has it.
            default: break
            }
        }
        guard hasBoot else { throw .body("missing field `boot-source`") }
        guard hasDrives else { throw .body("missing field `drives`") }
        self.machine = machine
    }

    private static func items(_ value: JSON, _ name: String) throws(Fault) -> [JSON] {
        guard case .array(let items) = value else { throw .body("invalid type: \(value.kind), expected a sequence") }
        return items
    }
}

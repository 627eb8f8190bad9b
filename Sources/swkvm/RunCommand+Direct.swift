// SPDX-License-Identifier: Apache-2.0

internal import DiskImage
internal import Devices
internal import Logging
internal import Machine
internal import Sandbox
internal import Virtio

/// The direct way from words to a ``RunCommand``. The argument parser finds a command's options by reflection, which
/// takes longer than all the rest of a machine's start; for help, completions and messages that does not matter.
///
/// It takes well-formed command lines only, and leaves everything else to the parser: help, mistakes, and rare
/// spellings. A test compares the two.
extension RunCommand {
    /// How the value of an option gets into its property.
    struct Rule: Sendable {
        enum Kind { case flag, value, repeatableValue, optionalValue }

        /// Without hyphens.
        let name: String
        let kind: Kind
        /// Sets the property to what it is without the option.
        let reset: @Sendable (inout RunCommand) -> Void
        /// Sets the property, or adds to it.
        let store: @Sendable (inout RunCommand, String) throws -> Void

        init(
            _ name: String, _ kind: Kind = .value, reset: @escaping @Sendable (inout RunCommand) -> Void,
            store: @escaping @Sendable (inout RunCommand, String) throws -> Void
        ) {
            (self.name, self.kind, self.reset, self.store) = (name, kind, reset, store)
        }
    }

    /// One for each option that is declared.
    static let rules = machineRules + seedRules

    private static let machineRules: [Rule] = [
        Rule("name", reset: { $0.name = nil }, store: { $0.name = $1 }),
        Rule("uuid", reset: { $0.uuid = nil }, store: { $0.uuid = try UUIDArgument(parsing: $1) }),
        Rule("cpus", reset: { $0.cpus = 1 }, store: { $0.cpus = try wholeNumber(Int.min...Int.max)($1) }),
        Rule("mem", reset: { $0.mem = defaultMemory }, store: { $0.mem = try ByteSize.memory($1) }),
        Rule("hugepages", .optionalValue, reset: { $0.hugepages = nil }) {
            $0.hugepages = $1.isEmpty ? HugePages.twoMiB : HugePages(argument: $1)
        },
        Rule("prealloc", .flag, reset: { $0.prealloc = false }, store: { command, _ in command.prealloc = true }),
        Rule("shared", .flag, reset: { $0.shared = false }, store: { command, _ in command.shared = true }),
        Rule(
            "numa", .repeatableValue, reset: { $0.numa = [] }, store: { $0.numa.append(try NodeArgument(parsing: $1)) }),
        Rule("kernel", reset: { $0.kernel = nil }, store: { $0.kernel = $1 }),
        Rule("boot", reset: { $0.boot = nil }, store: { $0.boot = $1 }),
        Rule(
            "firmware", reset: { $0.firmware = nil }, store: { $0.firmware = try FirmwareArgument(parsing: $1) }),
        Rule("append", reset: { $0.append = "" }, store: { $0.append = $1 }),
        Rule("initrd", reset: { $0.initrd = nil }, store: { $0.initrd = $1 }),
        Rule("cmdline", reset: { $0.cmdline = "" }, store: { $0.cmdline = $1 }),
        Rule("cmdline-raw", reset: { $0.cmdlineRaw = nil }, store: { $0.cmdlineRaw = $1 }),
        Rule("bus", reset: { $0.bus = .mmio }, store: { $0.bus = try word($1) }),
        Rule("virtqueues", reset: { $0.virtqueues = .split }, store: { $0.virtqueues = try word($1) }),
        Rule("discovery", reset: { $0.discovery = nil }, store: { $0.discovery = try word($1) }),
        Rule(
            "disk", .repeatableValue, reset: { $0.disk = [] }, store: { $0.disk.append(try DiskArgument(parsing: $1)) }),
        Rule(
            "net", .repeatableValue, reset: { $0.net = [] }, store: { $0.net.append(try NetworkArgument(parsing: $1)) }),
        Rule("metadata", reset: { $0.metadata = nil }, store: { $0.metadata = try MetadataArgument(parsing: $1) }),
        Rule("rng", .optionalValue, reset: { $0.rng = nil }, store: { $0.rng = EntropyArgument(argument: $1) }),
        Rule("balloon", reset: { $0.balloon = nil }, store: { $0.balloon = try BalloonArgument(parsing: $1) }),
        Rule("vsock", reset: { $0.vsock = nil }, store: { $0.vsock = try VsockArgument(parsing: $1) }),
        Rule(
            "console", reset: { $0.console = nil },
            store: { $0.console = try ConsoleArgument(parsing: $1) }),
        Rule("on-reboot", reset: { $0.onReboot = nil }, store: { $0.onReboot = try word($1) as RebootArgument }),
        Rule("api-sock", reset: { $0.apiSock = nil }, store: { $0.apiSock = $1 }),
        Rule("config-file", reset: { $0.configFile = nil }, store: { $0.configFile = $1 }),
        Rule(
            "stop-timeout", reset: { $0.stopTimeout = nil },
            store: { $0.stopTimeout = try StopTimeoutArgument(parsing: $1) }),
        Rule("gdb", reset: { $0.gdb = nil }, store: { $0.gdb = try DebuggerArgument(parsing: $1) }),
        Rule("trace", .repeatableValue, reset: { $0.trace = [] }, store: { $0.trace.append(try word($1)) }),
        Rule("on-disk-error", reset: { $0.onDiskError = .enospc }, store: { $0.onDiskError = try word($1) }),
        Rule("sandbox", reset: { $0.sandbox = .on }, store: { $0.sandbox = try Sandbox.Policy(parsing: $1) }),
        Rule("run-as", reset: { $0.runAs = nil }, store: { $0.runAs = try RunAsArgument(parsing: $1) }),
        Rule("cgroup", reset: { $0.cgroup = nil }, store: { $0.cgroup = try ControlGroupArgument(parsing: $1) }),
        Rule("daemon", reset: { $0.daemon = nil }, store: { $0.daemon = $1 }),
        Rule("pid-file", reset: { $0.pidFile = nil }, store: { $0.pidFile = $1 }),
        Rule("metrics", reset: { $0.metrics = nil }, store: { $0.metrics = $1 }),
        Rule("metrics-format", reset: { $0.metricsFormat = nil }, store: { $0.metricsFormat = try word($1) }),
        Rule(
            "metrics-interval", reset: { $0.metricsInterval = nil },
            store: { $0.metricsInterval = try wholeNumber(1...86_400)($1) }),
        Rule("log-level", reset: { $0.logLevel = .notice }, store: { $0.logLevel = try word($1) }),
        Rule("log-format", reset: { $0.logFormat = .text }, store: { $0.logFormat = try word($1) }),
    ]

    /// Those of ``SeedOptions``; the first one sets the group, which the parser has not.
    private static let seedRules: [Rule] = [
        Rule(
            "ssh-key", .repeatableValue,
            reset: {
                $0.seed = SeedOptions()
                $0.seed.sshKey = []
            }, store: { $0.seed.sshKey.append($1) }),
        Rule("user", reset: { $0.seed.user = nil }, store: { $0.seed.user = try SeedOptions.userName($1) }),
        Rule("password-file", reset: { $0.seed.passwordFile = nil }, store: { $0.seed.passwordFile = $1 }),
        Rule("hostname", reset: { $0.seed.hostname = nil }, store: { $0.seed.hostname = try SeedOptions.hostName($1) }),
        Rule("user-data", reset: { $0.seed.userData = nil }, store: { $0.seed.userData = $1 }),
        Rule("meta-data", reset: { $0.seed.metaData = nil }, store: { $0.seed.metaData = $1 }),
        Rule("network-config", reset: { $0.seed.networkConfig = nil }, store: { $0.seed.networkConfig = $1 }),
    ]

    /// One of a type's words.
    private static func word<Value: RawRepresentable<String>>(_ text: String) throws -> Value {
        guard let value = Value(rawValue: text) else { throw ArgumentProblem("'\(text)' is not recognized") }
        return value
    }

    /// Parses a command line that needs nothing of the argument parser.
    /// - Parameter words: those after `run`.
    /// - Returns: nil for one that the parser must process.
    init?(directly words: some Collection<String>) {
        self.init()
        for rule in Self.rules { rule.reset(&self) }
        image = nil
        var given: Set<String> = []
        var rest = words.makeIterator()
        var next = rest.next()
        while let word = next {
            next = rest.next()
            if !word.hasPrefix("-"), image == nil {
                do { image = try DiskArgument(parsing: word) } catch { return nil }
                continue
            }
            guard word.hasPrefix("--") else { return nil }
            let parts = word.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard let name = parts.first, let rule = Self.rules.first(where: { $0.name == name }),
                given.insert(rule.name).inserted || rule.kind == .repeatableValue
            else { return nil }
            var value = parts.count > 1 ? String(parts[1]) : nil
            // What begins with a hyphen is another option, or a mistake.
            let takesNext = rule.kind != .flag && value == nil && next?.hasPrefix("-") == false
            if takesNext {
                value = next
                next = rest.next()
            }
            switch (rule.kind, value) {
            case (.flag, nil), (.optionalValue, nil): value = ""
            case (.flag, _?), (_, nil), (_, ""?): return nil
            case (_, _?): break
            }
            do { try rule.store(&self, value ?? "") } catch { return nil }
        }
        do {
            try seed.validate()
            try validate()
        } catch { return nil }
    }
}

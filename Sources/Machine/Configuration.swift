// SPDX-License-Identifier: Apache-2.0

public import Devices
public import DiskImage
public import GuestMemory
public import Linux
public import Sandbox
public import Virtio

/// The description of a machine. It consists of values only: nothing on the host is changed until
/// ``Machine/init(_:output:log:)``.
public struct Configuration: Sendable {
    /// The machine's name, for messages, and from which MAC addresses are derived.
    public var name: String
    /// The UUID in the guest's SMBIOS tables; nil: none, which is all zero there.
    public var uuid: UUID?
    /// Number of vCPUs, from 1 to KVM's limit.
    public var cpus: Int
    public var memory: Memory
    /// The guest's NUMA nodes; empty for a guest without.
    public var nodes: [Node]
    public var kernel: Kernel
    /// The file with the code that the machine starts with instead of ``kernel``.
    public var firmware: String?
    /// Path of an initial RAM disk.
    public var initrd: String?
    /// The kernel's command line as the user gave it. With ``Kernel/disk(index:entry:)`` it replaces that of the disk's
    /// boot entry, unless it is empty.
    public var commandLine: String
    /// Words that are added to the command line, whether it is the user's or a boot entry's.
    public var appendedWords = ""
    /// Indicates whether the kernel gets it as it is, with nothing added.
    public var isCommandLineRaw = false
    /// Indicates whether a Linux kernel is told to use the serial port as its console, if its command line names none.
    public var addsConsole = true
    /// How the guest is connected with its virtio devices.
    public var bus = Bus.mmio
    /// The kind of queues that its virtio devices offer.
    public var virtqueues = VirtqueueFormat.split
    /// The discovery of virtio devices; nil: ACPI, or the command line if that disables ACPI in Linux.
    public var discovery: DeviceDiscovery?
    /// The disks, in the order of the guest's vda, vdb, …
    public var disks: [Disk]
    /// The contents of a read-only disk behind these, which is in memory: the seed of the guest's cloud-init. nil for
    /// none.
    public var seed: [UInt8]?
    /// The files that the seed was made from, each with the option that named it.
    public var seedFiles: [(option: String, path: String)] = []
    public var networks: [Network]
    /// What the guest finds at an address of the links of its interfaces; nil for nothing.
    public var metadata: MetadataService?
    /// Whether the machine was given its name; nil: unless it is the usual one.
    public var isNamed: Bool?
    /// A source of random numbers for the guest; nil for none.
    public var entropy: Entropy?
    /// A balloon, by which the guest can give memory up; nil for none.
    public var balloon: BalloonSettings?
    /// A socket device (virtio-vsock); nil for none.
    public var vsock: Vsock?
    public var console: ConsoleKind
    public var consoleLimits = ConsoleLimits.none
    /// The guest's end of the console.
    public var consoleDevice = ConsoleDeviceKind.serial
    /// The address for a debugger; the guest then waits for one at its first instruction.
    public var debugger: Debugger?
    /// Indicates whether exits to user space are counted (``Machine/exitReport``).
    public var countsExits = false
    /// How the process is confined (``ForegroundSession``).
    public var sandbox = Sandbox.Policy.off
    /// The user to switch to if root starts the process; nil for the owner of the first disk, or `nobody`.
    public var runAs: Sandbox.User?
    /// The action when the guest resets itself.
    public var onReboot = OnReboot.restart
    /// The time limit for the guest to power off after a signal.
    public var stopTimeout = StopTimeout.automatic
    /// What happens when the host fails a request of a disk.
    public var onDiskError = DiskErrorPolicy.enospc
    /// The file that messages go to; nil for standard error as it is.
    public var messageFile: String?
    /// A file with the process's number, locked while the machine runs (``ProcessFile``); nil for none.
    public var processFile: String?
    /// nil: the one that the process is started in.
    public var controlGroup: ControlGroup?
    /// nil writes none.
    public var metrics: Metrics?
    /// Milliseconds, for the devices' events: a test's clock.
    var eventClock: (@Sendable () -> UInt64)?

    public init(
        name: String = Self.usualName, uuid: UUID? = nil, cpus: Int = 1, memory: Memory = Memory(size: 512 << 20),
        nodes: [Node] = [],
        kernel: Kernel = .automatic, initrd: String? = nil,
        commandLine: String = "", disks: [Disk] = [], networks: [Network] = [], entropy: Entropy? = nil,
        console: ConsoleKind = .none
    ) {
        self.name = name
        self.uuid = uuid
        self.cpus = cpus
        self.memory = memory
        self.nodes = nodes
        self.kernel = kernel
        self.initrd = initrd
        self.commandLine = commandLine
        self.disks = disks
        self.networks = networks
        self.entropy = entropy
        self.console = console
    }

    /// Guest RAM.
    public struct Memory: Sendable, Equatable {
        /// Bytes.
        public var size: UInt64
        public var backing: MemoryBacking
        /// Indicates whether it is a memfd that another process could map.
        public var isShared: Bool
        /// Indicates whether all pages are touched before the guest starts.
        public var isPreallocated: Bool

        public init(
            size: UInt64, backing: MemoryBacking = .anonymous, isShared: Bool = false, isPreallocated: Bool = false
        ) {
            self.size = size
            self.backing = backing
            self.isShared = isShared
            self.isPreallocated = isPreallocated
        }
    }

    /// The action on a guest's reset.
    public enum OnReboot: Sendable {
        /// The guest boots again, in the same process.
        case restart
        /// The machine ends.
        case exit
    }

    /// The time limit for a guest to power off.
    public enum StopTimeout: Sendable, Equatable {
        /// ``standard`` unless swkvm runs on a terminal: otherwise there may be no user to send another signal.
        case automatic
        case never
        case seconds(Int)

        /// Seconds, as service managers have it.
        public static let standard = 90
    }

    /// A NUMA node of the guest's.
    public struct Node: Sendable, Equatable {
        /// Numbers of its CPUs.
        public var cpus: [Int]
        /// Bytes of its memory, a multiple of the page size. Nodes have theirs behind each other in the order of
        /// addresses.
        public var memory: UInt64
        /// The NUMA policy of the node's memory on the host; nil: the kernel's default.
        public var policy: MemoryPolicy?
        /// The distances to other nodes, by number; the default is that of the other direction, or 20. The distance to
        /// itself is 10.
        public var distances: [Int: UInt8]

        public init(cpus: [Int], memory: UInt64, policy: MemoryPolicy? = nil, distances: [Int: UInt8] = [:]) {
            self.cpus = cpus
            self.memory = memory
            self.policy = policy
            self.distances = distances
        }
    }

    /// A control group for the process.
    public struct ControlGroup: Sendable, Equatable {
        /// Its directory in the cgroup2 file system; made, and removed at the end, if it is not there.
        public var path: String
        /// Microseconds of CPU time in each tenth of a second, of all threads.
        public var cpu: UInt64?
        /// Bytes, of guest RAM and all else.
        public var memory: UInt64?
        /// 1 to 10000, relative to other groups; 100 is usual.
        public var ioWeight: Int?

        public init(path: String, cpu: UInt64? = nil, memory: UInt64? = nil, ioWeight: Int? = nil) {
            self.path = path
            self.cpu = cpu
            self.memory = memory
            self.ioWeight = ioWeight
        }

        /// What is written to the group's files.
        var settings: [(controller: String, file: String, value: String)] {
            var all: [(String, String, String)] = []
            if let cpu { all.append(("cpu", "cpu.max", "\(cpu) 100000")) }
            if let memory { all.append(("memory", "memory.max", "\(memory)")) }
            if let ioWeight { all.append(("io", "io.weight", "default \(ioWeight)")) }
            return all
        }
    }

    /// The kernel that the guest boots.
    public enum Kernel: Sendable, Equatable {
        /// The default: the bundled guest.
        case automatic
        /// The guest in swkvm's own binary.
        case bundled
        /// An ELF file or a bzImage.
        case file(String)
        /// What a disk, by its index, boots from its own files: a kernel, an initrd and a command line, read again at
        /// each boot.
        /// - Parameter entry: the number of the boot menu's entry, from 1, its id or its title; nil for the default.
        case disk(index: Int, entry: String?)
    }

    /// What the virtio devices are to the guest.
    public enum Bus: String, CaseIterable, Sendable {
        /// virtio-mmio: registers at fixed addresses, one interrupt line for each device.
        case mmio
        /// Functions of a PCI Express root complex, with MSI-X.
        case pci
    }

    /// The way in which a guest discovers its virtio devices.
    public enum DeviceDiscovery: Sendable {
        /// Devices in the DSDT.
        case acpi
        /// Parameters `virtio_mmio.device=` on its command line; the DSDT does not have them, since a guest that reads
        /// both would find
        /// each device twice.
        case commandLine
    }

    /// The device by which a guest uses its console.
    public enum ConsoleDeviceKind: String, CaseIterable, Sendable {
        /// The serial port, which every guest has.
        case serial
        /// A virtio console; what the guest writes to the serial port is dropped.
        case virtio
    }

    /// The host's end of the guest's console.
    public enum ConsoleKind: Sendable, Equatable {
        /// Standard input and output; a terminal is put into raw mode.
        case stdio
        /// Output is dropped, input never comes.
        case none
        /// A new pseudo-terminal, whose name is printed.
        case pty
        /// A UNIX socket that swkvm listens on, for one client at a time.
        case unix(String)
        /// Output is appended to a file.
        case file(String)
    }

    /// What the guest may write to its console.
    public struct ConsoleLimits: Sendable, Equatable {
        /// A bound for a console's file.
        public struct File: Sendable, Equatable {
            /// Bytes.
            public var size: UInt64
            /// Files of older output that are kept, each of that size.
            public var backups: Int

            public init(size: UInt64, backups: Int) {
                self.size = size
                self.backups = backups
            }
        }

        /// nil: none.
        public var file: File?
        /// Bytes a second; nil: as many as the reader takes.
        public var output: TokenBucket.Rate?
        /// A file that gets all output of a console that is a socket, whether it has a client or not; ``file`` bounds
        /// it. nil: none.
        public var log: String?

        public init(file: File? = nil, output: TokenBucket.Rate? = nil, log: String? = nil) {
            self.file = file
            self.output = output
            self.log = log
        }

        public static let none = ConsoleLimits()
    }

    /// The address for a debugger.
    public enum Debugger: Sendable, Equatable {
        /// A TCP port of 127.0.0.1; 0 is any that is free.
        case port(UInt16)
        /// A UNIX socket, for its owner alone.
        case unix(String)
    }

    /// A disk.
    public struct Disk: Sendable {
        public var path: String
        /// Format, read-only, cache.
        public var options: DiskImageOptions
        /// The disk's serial number for the guest, up to 20 bytes; nil: `swkvm-N` by its number.
        public var serial: String?
        /// The sources of the keys of the image and its backing files, like ``DiskImageOptions/keys``; read when the
        /// disk is opened.
        public var keys: [KeySource] = []
        /// Virtqueues, each with a thread, at least 1.
        public var queues: Int
        /// What it may do in a second.
        public var limit = RateLimit.none
        /// Indicates whether the image stays as it is: what the guest writes goes to a temporary overlay.
        public var isTransient = false

        public init(
            path: String, options: DiskImageOptions = DiskImageOptions(), serial: String? = nil, queues: Int = 1
        ) {
            self.path = path
            self.options = options
            self.serial = serial
            self.queues = queues
        }
    }

    /// A virtio entropy device.
    public struct Entropy: Sendable, Equatable {
        /// nil for as much as the guest asks for.
        public var limit: EntropyLimit?

        public init(limit: EntropyLimit? = nil) { self.limit = limit }
    }
}

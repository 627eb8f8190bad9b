// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CloudInit
internal import Devices
internal import DiskImage
internal import GuestMemory
internal import HostNetwork
internal import Linux
internal import Logging
internal import Machine
internal import Metadata
internal import Sandbox
internal import Virtio

/// `swkvm run`: one machine, in the foreground.
struct RunCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "run",
        abstract: "Boot a virtual machine and connect it to this terminal.",
        discussion: """
            With an IMAGE, the system on it boots: the kernel, its initrd and command line are found from the configuration of its boot loader, \
            without firmware, and again at each reboot of the guest. The image is not changed: what the guest writes goes to a temporary \
            overlay. Without an IMAGE and --kernel, the bundled guest boots to a prompt. The terminal is the guest's console; \
            Ctrl-A x ends the machine, Ctrl-A p pauses and resumes it, Ctrl-A : takes a command, Ctrl-A h lists all keys. SIGINT, SIGTERM \
            and SIGHUP ask the guest to power off; a second signal, at least a second later, ends the machine. SIGUSR1 writes --metrics, \
            SIGUSR2 resumes a paused machine.

            EXAMPLES
              swkvm run debian.qcow2
              swkvm run debian.qcow2 --boot list
              swkvm run --mem 2G
              swkvm run --disk debian.qcow2 --boot default --append quiet
              swkvm run --cpus 2 --mem 512M --disk disk.qcow2,ro --disk data.raw \\
                        --net tap=swtap0,bridge=swbr0,mac=52:54:00:12:34:56
              swkvm run --kernel vmlinux --initrd initrd.img --mem 1G \\
                        --cmdline 'root=/dev/vda1 ro' --disk system.qcow2
              swkvm run --cmdline 'test=all' --disk scratch.raw --console stdio
              swkvm run --gdb 1234 --kernel vmlinux --cmdline nokaslr

            EXIT STATUS
            \(HelpTable.text(ExitStatus.table.map { ($0.statuses, $0.meaning) }))
            """)

    @Option(
        help: "Machine name, used in messages and to derive MAC addresses and, if given, the UUID. (default: swkvm)")
    var name: String?

    @Option(
        help: ArgumentHelp(
            "UUID in the SMBIOS tables, or none. Default: derived from --name and the host's machine-id; none without --name.",
            valueName: "uuid"),
        completion: .list(["none"]), transform: UUIDArgument.init(parsing:))
    var uuid: UUIDArgument?

    @Option(
        help: ArgumentHelp("Number of vCPUs. (default: 1)", valueName: "n"), transform: wholeNumber(Int.min...Int.max))
    var cpus = 1

    @Option(
        help: ArgumentHelp(
            "Guest RAM, in bytes or with K, M, G or T: 2G, 1.5G. (default: \(defaultMemory))", valueName: "size"),
        transform: ByteSize.memory)
    var mem = defaultMemory

    static let defaultMemory = ByteSize(bytes: 512 << 20)

    @Option(
        defaultAsFlag: HugePages.twoMiB, parsing: .next,
        help: ArgumentHelp(
            """
            Back guest RAM with huge pages: 2M (the default if no kind is given), 1G, thp (transparent huge pages), or off. Without the option, \
            RAM above the first 4 MiB is in transparent huge pages where the kernel has some.
            """,
            valueName: "kind"),
        completion: .list(HugePages.allValueStrings))
    var hugepages: HugePages?

    @Flag(help: "Allocate all guest RAM before the guest starts.")
    var prealloc = false

    @Flag(help: "Allocate guest RAM as shared memory (memfd).")
    var shared = false

    @Option(
        help: ArgumentHelp(
            """
            A NUMA node of the guest: mem=SIZE[,cpus=N|FIRST-LAST]…[,host=N|FIRST-LAST[,policy=bind|preferred|interleave]][,distance=NODE:DISTANCE]…. \
            Repeat for each node, in order; the sizes must add up to --mem, and every CPU must be in exactly one node.
            """,
            valueName: "node"),
        completion: NodeArgument.completion, transform: NodeArgument.init(parsing:))
    var numa: [NodeArgument] = []

    @Option(
        help: ArgumentHelp(
            """
            Kernel: an ELF file with a PVH note, a 64-bit ELF file, or a bzImage; an ELF file may be compressed with gzip; or bundled, for the \
            bundled guest, which is the default.
            """,
            valueName: "file|bundled"),
        completion: ValueCompletion.one(of: [Self.bundled, "@file"]))
    var kernel: String?

    @Argument(
        help: ArgumentHelp(
            """
            A disk image to boot with its own kernel and configuration; it is not modified. It accepts the options of --disk, such as \
            IMAGE,format=qcow2, and is the first disk. With --kernel, that kernel boots instead.
            """,
            valueName: "image"),
        completion: DiskArgument.completion, transform: DiskArgument.init(parsing:))
    var image: DiskArgument?

    @Option(
        help: ArgumentHelp(
            """
            Boot from the files of IMAGE, or else of the first --disk, which the guest then writes to: the default entry of its boot menu, the entry with \
            this number, id or title, or, with list, print the entries and exit.
            """,
            valueName: "default|list|entry"),
        completion: .list(["default", "list"]))
    var boot: String?

    @Option(
        help: ArgumentHelp(
            """
            Start this firmware, such as SeaBIOS, instead of a kernel: it boots from the disks. A comma in FILE is written twice.
            """,
            valueName: "file"),
        completion: .file(), transform: FirmwareArgument.init(parsing:))
    var firmware: FirmwareArgument?

    @Option(
        help: ArgumentHelp(
            "Add words to the kernel command line, that of --cmdline or of the boot entry.", valueName: "words"))
    var append = ""

    @Option(help: ArgumentHelp("Initial RAM disk; requires --kernel.", valueName: "file"), completion: .file())
    var initrd: String?

    @Option(
        help: ArgumentHelp(
            "Kernel command line. For a Linux kernel, console=ttyS0 is prepended unless it contains console= or --console is none.",
            valueName: "words"))
    var cmdline = ""

    @Option(help: ArgumentHelp("Kernel command line, passed unmodified.", valueName: "words"))
    var cmdlineRaw: String?

    @Option(
        help: ArgumentHelp(
            """
            How the guest sees its virtio devices: mmio (virtio-mmio), or pci (PCI Express with MSI-X, which is faster and needs a kernel \
            with virtio-pci).
            """,
            valueName: "mmio|pci"))
    var bus = Configuration.Bus.mmio

    @Option(
        help: ArgumentHelp(
            """
            The kind of queues that virtio devices offer: split, or packed (VIRTIO_F_RING_PACKED). A driver without support for \
            packed queues uses split ones.
            """,
            valueName: "split|packed"))
    var virtqueues = VirtqueueFormat.split

    @Option(
        help: ArgumentHelp(
            """
            How the guest discovers its virtio devices: acpi (ACPI tables) or cmdline (virtio_mmio.device= parameters added to \
            its command line, for kernels without ACPI; with --cmdline-raw, its words must have them). Default: acpi, and cmdline for a Linux kernel with acpi=off.
            """,
            valueName: "acpi|cmdline"))
    var discovery: DiscoveryArgument?

    @Option(
        help: ArgumentHelp(
            """
            A disk: PATH[,format=raw|qcow2|vmdk|vdi|vpc|vhdx][,ro][,snapshot=NAME][,data-file=PATH][,key-file=PATH|key-fd=N][,cache=writeback|none][,backing=on|off|anywhere][,backing-dir=DIR][,vhd-size=chs|current][,lock=on|off][,reconnect=SECONDS][,serial=TEXT][,queues=N][,bps=SIZE[,bps-burst=SIZE]][,iops=N[,iops-burst=N]]. The format is given by the file extension (.raw, .img, \
            .qcow2, .vmdk, .vdi, .vhd, .vhdx) or by format=. snapshot= attaches an internal qcow2 snapshot, data-file= an external qcow2 \
            data file. key-file= or key-fd= holds the key of an encrypted image (repeat for its backing files, in order). Backing files \
            must be in or below the image's directory or be named on the command line; backing-dir= (repeatable) allows another \
            directory, backing=anywhere allows all, including remote disks, backing=off none. The extents of a VMDK must be in or below the \
            image's directory. PATH can be a remote disk, \
            nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; reconnect= sets how long requests wait for a reconnect (10 by default). \
            bps= and iops= limit bytes and requests a second, of all queues together; -burst= sets the burst size (a \
            tenth of a second's worth by default). vhd-size= selects which of the two sizes in a VHD footer is used, that of the geometry or that in bytes. Repeatable. A comma in \
            PATH is written twice.
            """,
            valueName: "disk"),
        completion: DiskArgument.completion, transform: DiskArgument.init(parsing:))
    var disk: [DiskArgument] = []

    @OptionGroup var seed: SeedOptions

    @Option(
        help: ArgumentHelp(
            """
            A network interface: user[,publish=[ADDRESS:]PORT:GUESTPORT[/udp]]…[,mtu=N], nat[=NETWORK][,mtu=N], tap=NAME[,bridge=NAME[,create]][,netns=NAME][,mtu=N][,offload=on|off][,queues=N], fd=N[:N…][,offload=on|off], bridge=NAME[,mtu=N][,netns=NAME], macvtap=NAME, stream=PATH[,mtu=N], or none; \
            each but none also accepts mac=MAC and mac-lock=on|off. user gives the guest the network of this user without any privilege, by the program passt; publish= (repeatable) \
            forwards a port of the host to the guest, from the host only (127.0.0.1) unless ADDRESS is specified. nat connects the guest to a network of this host with DHCP, DNS and address translation, which is brought up if it is down (needs root; swkvm network). \
            bridge= without tap= makes it a port of an existing bridge, by a TAP of its own; macvtap= creates a macvtap on an interface of the host, which puts the guest on that network; netns= looks the TAP and the bridge up, or creates them, in a network namespace by its name. stream= connects to a UNIX socket of a program such as passt or gvproxy. \
            Default for an IMAGE that boots by itself: nat for root, if dnsmasq and nft are installed, or else user, if passt is; otherwise none. \
            mac-lock=on drops the guest's frames whose source MAC address is not the interface's, which the guest then cannot change. \
            offload= controls whether the guest may offload checksums and segmentation to the host; by default this depends on what the \
            interface is connected to. queues= gives the guest several pairs of queues, each with a thread (1 by default, up to \
            \(TAPDevice.maximumQueues)); fd= takes a descriptor for each. rx-bps=, rx-pps=, tx-bps= and tx-pps= limit the bytes and frames a second \
            that the guest receives and sends, each with -burst= as for --disk. Repeatable.
            """,
            valueName: "net"),
        completion: NetworkArgument.completion, transform: NetworkArgument.init(parsing:))
    var net: [NetworkArgument] = []

    @Option(
        help: ArgumentHelp(
            """
            Serve this JSON file (up to \(MetadataStore.defaultLimit) bytes) to the guest by HTTP at 169.254.169.254, or at address=, which answers on \
            all of its interfaces and is not on the host's networks. version=2 requires the token of a session, as Firecracker's MMDS and clouds do; 1 by default. \
            A comma in FILE is written twice.
            """,
            valueName: "file[,version=1|2][,address=A]"),
        completion: MetadataArgument.completion, transform: MetadataArgument.init(parsing:))
    var metadata: MetadataArgument?

    @Option(
        defaultAsFlag: EntropyArgument.unlimited, parsing: .next,
        help: ArgumentHelp(
            "Add a virtio-rng device, backed by the host's random number generator; max-bytes=SIZE[,period=MS] limits its rate.",
            valueName: "limit"),
        completion: EntropyArgument.completion)
    var rng: EntropyArgument?

    @Option(
        help: ArgumentHelp(
            """
            Add a virtio balloon: the guest gives up this amount of memory, which is returned to the host and can be changed while the machine \
            runs (0: only later). deflate-on-oom=on lets the guest take it back when it has no other memory; stats=SECONDS asks it for statistics; \
            reporting=on has it report unused memory continuously, and hinting=on on request, which is returned too.
            """,
            valueName: "size"),
        completion: BalloonArgument.completion, transform: BalloonArgument.init(parsing:))
    var balloon: BalloonArgument?

    @Option(
        help: ArgumentHelp(
            """
            Add a virtio-vsock device: cid=CID,path=PATH, CID being the guest's address, from 3 on. The guest's connection to port P of the host \
            (CID 2) goes to the UNIX socket PATH_P. A program of the host connects to PATH, which the machine creates, writes CONNECT P and a newline, \
            and gets OK and its own port when the guest has accepted. A comma in PATH is written twice.
            """,
            valueName: "vsock"),
        completion: VsockArgument.completion, transform: VsockArgument.init(parsing:))
    var vsock: VsockArgument?

    @Option(
        help: ArgumentHelp(
            """
            Where the guest's console goes: stdio, none, pty, unix:PATH[,log=PATH] or file:PATH; log= names a file that gets all output of a socket's \
            console. size=SIZE[,keep=N] limits that file, and keeps N (3 by default) files of older output beside it, PATH.1 and so on. bps=SIZE[,bps-burst=SIZE] limits the guest's output in bytes a second. \
            device=virtio connects a virtio console (hvc0 in Linux) instead of the serial port. A comma in PATH is written twice. Default: stdio, and none with --daemon.
            """,
            valueName: "console"),
        completion: ConsoleArgument.completion, transform: ConsoleArgument.init(parsing:))
    var console: ConsoleArgument?

    @Option(
        help: ArgumentHelp(
            """
            Action on a guest reboot: restart boots it again, exit ends the machine with exit status 103. Default: restart; a machine that \
            --config-file or requests describe ends with exit status 0.
            """,
            valueName: "what"))
    var onReboot: RebootArgument?

    @Option(
        help: ArgumentHelp(
            """
            Serve Firecracker's management API on this UNIX socket, which must not exist. Without an IMAGE, --kernel or --firmware, requests \
            describe the machine and start it; otherwise they control it.
            """,
            valueName: "path"),
        completion: .file())
    var apiSock: String?

    @Option(
        help: ArgumentHelp(
            "Start the machine that a configuration file of Firecracker (JSON) describes.", valueName: "file"),
        completion: .file())
    var configFile: String?

    @Option(
        help: ArgumentHelp(
            """
            Seconds to wait for the guest to power off after a signal before the machine is ended, or none. Default: none on a terminal, \
            \(Configuration.StopTimeout.standard) elsewhere.
            """,
            valueName: "seconds|none"),
        completion: .list(["none"]), transform: StopTimeoutArgument.init(parsing:))
    var stopTimeout: StopTimeoutArgument?

    @Option(
        help: ArgumentHelp(
            """
            Listen for GDB on a port of 127.0.0.1 (1234, :1234 or localhost:1234; 0: any free port) or on unix:PATH. The guest waits at its first instruction until the \
            debugger continues it.
            """,
            valueName: "port|unix:path"),
        completion: DebuggerArgument.completion, transform: DebuggerArgument.init(parsing:))
    var gdb: DebuggerArgument?

    @Option(
        help: ArgumentHelp(
            "Statistics to collect: exits (exits to user space by reason, address and vCPU); printed as a table at the end.",
            valueName: "what"))
    var trace: [TraceArgument] = []

    @Option(
        help: ArgumentHelp(
            """
            Action when the host fails a request of a disk: report gives the guest an I/O error; stop pauses the machine, and starts the \
            request again when it is resumed (Ctrl-A r or SIGUSR2); ignore tells the guest that the request succeeded, which loses data; \
            enospc stops if the host has no room for a write, and reports other errors.
            """,
            valueName: "what"))
    var onDiskError = DiskErrorPolicy.enospc

    @Option(
        help: ArgumentHelp(
            """
            Confine the process to what a running machine needs: on drops root, all capabilities and, by Landlock and seccomp, access to \
            files, ports and system calls that it does not need; on,namespaces also gives it namespaces of its own. Parts given by name \
            (user, capabilities, landlock, seccomp, namespaces) must be supported. report prints a line for each system call that on would refuse. \
            (default: on)
            """,
            valueName: "off|report|on|part,…"),
        completion: Sandbox.Policy.completion, transform: Sandbox.Policy.init(parsing:))
    var sandbox = Sandbox.Policy.on

    @Option(
        help: ArgumentHelp(
            "User to switch to when root starts the machine with --sandbox on: a name, or UID:GID. Default: the owner of the first disk, or nobody.",
            valueName: "user"),
        transform: RunAsArgument.init(parsing:))
    var runAs: RunAsArgument?

    @Option(
        help: ArgumentHelp(
            """
            Run in a control group: PATH[,cpu=N][,memory=SIZE][,io-weight=N]. PATH is a directory in a cgroup2 file system; it is created, and \
            removed at the end, if it does not exist. cpu= is the number of CPUs that the process may use, such as 1.5; memory= includes the \
            guest's RAM; io-weight= is from 1 to 10000.
            """,
            valueName: "group"),
        completion: ControlGroupArgument.completion, transform: ControlGroupArgument.init(parsing:))
    var cgroup: ControlGroupArgument?

    @Option(
        help: ArgumentHelp(
            "Run in the background: exit once the guest has started, and append messages to this file.",
            valueName: "file"),
        completion: .file())
    var daemon: String?

    @Option(
        help: ArgumentHelp(
            "Write the process ID to this file, which is locked while the machine runs and removed at its end. One with other contents than a process ID is refused.",
            valueName: "path"),
        completion: .file())
    var pidFile: String?

    @Option(
        help: ArgumentHelp(
            "Write all counters of the machine to a file, at the end and on SIGUSR1, in the format of --metrics-format.",
            valueName: "path"),
        completion: .file())
    var metrics: String?

    @Option(
        help: ArgumentHelp(
            """
            Format of --metrics: json appends one object a line, to a file, pipe or character device; prometheus replaces the file each time \
            by one in Prometheus' text format. Default: json.
            """,
            valueName: "format"))
    var metricsFormat: Configuration.Metrics.Format?

    @Option(
        help: ArgumentHelp(
            "Seconds between two reports to --metrics, from 1 to 86400. Default: none.", valueName: "seconds"),
        transform: wholeNumber(1...86_400))
    var metricsInterval: Int?

    @Option(
        help: ArgumentHelp(
            "Log level on standard error: trace, debug, info, notice, warning, error or critical.", valueName: "level"))
    var logLevel = Logger.Level.notice

    @Option(
        help: ArgumentHelp(
            """
            Format of the lines that swkvm itself writes to standard error: text, or json (one object a line with time, level, device and \
            message).
            """,
            valueName: "format"))
    var logFormat = LogFormat.text

    /// What `--kernel` calls the bundled guest; a file of this name is `./bundled`.
    static let bundled = "bundled"

    func run() throws {
        if boot == "list" { return try listEntries() }
        if apiSock != nil || configFile != nil { return try runManaged() }
        var start = try daemon.map { try startInBackground(messages: $0) }
        let output = StandardError(isBackground: true, format: logFormat)
        defer { output.close() }
        var configuration = self.configuration
        let log = Logger(label: configuration.name) { _ in StandardErrorLog(output, level: logLevel) }
        do throws(SeedError) {
            let seed = try seed.seed(for: configuration, name: name)
            for warning in seed?.warnings ?? [] { log.warning("\(warning)") }
            configuration.seed = seed?.image
        } catch {
            output.say(error.description, level: .critical)
            throw ExitCode(ExitStatus.noInput)
        }
        do throws(ArgumentProblem) { configuration.metadata = try metadata?.service() } catch {
            output.say(error.description, level: .critical)
            throw ExitCode(ExitStatus.noInput)
        }
        let progress = logFormat == .text ? MemoryProgress() : nil
        let end: MachineEnd
        do throws(MachineError) {
            end = try ForegroundSession.run(
                configuration, log: log, report: output.say, didStart: { start.take()?.finish() ?? true },
                progress: { progress?.show($0, of: $1) })
            progress?.end()
        } catch {
            progress?.end()
            output.say(error.description, level: .critical)
            throw ExitCode(error.exitStatus)
        }
        try report(end, output)
    }

    /// Reports the machine's end, and throws its exit status.
    func report(_ end: MachineEnd, _ output: StandardError) throws {
        let level: Logger.Level = end.isFailure ? .critical : .notice
        if let sentence = end.sentence { output.say(sentence, level: level) }
        if let details = end.details { output.say(details, level: level) }
        // Throwing makes the parser process its whole help text: only for a status that has something to say.
        if end.exitStatus != 0 { throw ExitCode(end.exitStatus) }
    }
}

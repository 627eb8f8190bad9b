// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Machine

/// Options of QEMU, virt-install and Firecracker, and what `swkvm run` has instead.
///
/// Looked at only after the parser has refused a command line, or was requested help by it: `-nographic` is `-n -o …
/// -h` to the parser.
enum ForeignWords {
    /// What to do about an option of another program.
    enum Advice {
        /// Another spelling, perhaps with a remark.
        case use(String, note: String? = nil)
        /// It can be left out.
        case notNeeded(String)
        /// There is no such thing here.
        case unavailable(String)
    }

    /// What is wrong with the options of a machine, in one line; nil when none of them is another program's.
    /// - Parameter words: the command line after the program's name.
    static func problem(in words: [String]) -> String? {
        guard let first = words.first else { return nil }
        let isRun = first == "run"
        // Options of the program itself, and of other commands.
        guard isRun || first.hasPrefix("-") && !ownOptions.contains(name(of: first)) else { return nil }
        var problems: [String] = []
        for word in words.dropFirst(isRun ? 1 : 0) where word.hasPrefix("-") {
            if word == "--" { break }
            guard let sentence = sentence(for: word), !problems.contains(sentence) else { continue }
            problems.append(sentence)
        }
        if isRun { return problems.isEmpty ? nil : problems.joined(separator: "; ") }
        guard !problems.isEmpty || machineOptions.contains(name(of: first)) else { return nil }
        return (["a machine's options come after `swkvm run`"] + problems).joined(separator: "; ")
    }

    /// What is wrong with a command line that the parser took for a request for help because of an `h` among letters,
    /// as in `-machine`.
    static func unrequestedHelp(_ words: some Sequence<String>) -> String? {
        let asks = words.contains {
            $0 == "-h" || $0 == "help" || $0.hasPrefix("--") && ownOptions.contains(name(of: $0))
        }
        guard !asks else { return nil }
        let letters = words.first { $0.hasPrefix("-") && !$0.hasPrefix("--") && $0.utf8.count > 2 && $0.contains("h") }
        return letters.map { "Unknown option '\($0)'" }
    }

    /// - Parameter word: begins with a hyphen.
    private static func sentence(for word: String) -> String? {
        let name = name(of: word)
        let isLong = word.hasPrefix("--")
        let shown = "'\(isLong ? "--" : "-")\(name)'"
        if isLong, machineOptions.contains(name) || ownOptions.contains(name) { return nil }
        if let advice = advice[name] { return "\(shown) \(text(of: advice))" }
        // A single letter is the parser's affair, and so is a negative number.
        guard !isLong, name.utf8.count > 1, name.first?.isNumber == false else { return nil }
        return machineOptions.contains(name) ? "\(shown): use --\(name)" : "Unknown option \(shown)"
    }

    private static func text(of advice: Advice) -> String {
        switch advice {
        case .use(let spelling, let note): "is \(spelling) here" + (note.map { " (\($0))" } ?? "")
        case .notNeeded(let reason): "is not needed: \(reason)"
        case .unavailable(let reason): "is not available: \(reason)"
        }
    }

    /// Without its hyphens and value.
    private static func name(of word: String) -> String { String(word.drop { $0 == "-" }.prefix { $0 != "=" }) }

    /// What the parser takes without a command.
    private static let ownOptions: Set<String> = [
        "h", "help", "help-hidden", "version", "generate-completion-script", "experimental-dump-help", "completion",
    ]

    /// The long options of `swkvm run`.
    static let machineOptions = Set(RunCommand.rules.map(\.name) + ["help"])

    /// By their names without hyphens.
    static let advice: [String: Advice] = {
        var advice: [String: Advice] = [:]
        for (names, one) in table { for name in names.split(separator: " ") { advice[String(name)] = one } }
        return advice
    }()

    private static let table: [(String, Advice)] = [
        // Memory and CPUs
        ("m memory ram r", .use("--mem SIZE", note: "SIZE without a unit is in bytes: QEMU's -m 2048 is --mem 2048M")),
        ("smp vcpus ncpus", .use("--cpus N")),
        ("cpu", .notNeeded("the guest gets the CPU features that KVM supports on this host")),
        ("mem-path memorybacking", .use("--hugepages KIND")),
        ("mem-prealloc", .use("--prealloc")),
        ("numatune", .use("--numa mem=SIZE,host=N,policy=bind")),
        (
            "cpuset cputune",
            .unavailable("start swkvm with `taskset`, or bind its threads by their names vcpu0, vcpu1 …")
        ),
        ("memballoon", .use("--balloon SIZE")),
        // What boots
        ("extra-args x kernel-opts kernel-cmdline cmd", .use("--cmdline WORDS")),
        (
            "install pxe location l",
            .use("--kernel FILE --initrd FILE", note: "swkvm boots a kernel directly, or the one of a disk image")
        ),
        ("initramfs", .use("--initrd FILE")),
        (
            "bios pflash L uefi",
            .use("--firmware FILE", note: "swkvm run IMAGE and --kernel FILE boot a kernel without firmware")
        ),
        (
            "dtb loader option-rom fw_cfg acpitable smbios no-acpi no-hpet",
            .unavailable("swkvm generates the firmware tables")
        ),
        ("import", .use("swkvm run IMAGE")),
        (
            "unattended",
            .unavailable("swkvm run IMAGE boots an installed system; --user-data and its like configure it")
        ),
        ("cloud-init", .use("--user-data FILE", note: "see also --ssh-key, --user, --password-file and --hostname")),
        ("os-variant osinfo os-type", .notNeeded("all guests have the same devices")),
        // Disks
        (
            "drive blockdev hda hdb hdc hdd f file root-drive rootfs sd",
            .use("--disk PATH[,format=FORMAT][,ro]", note: "swkvm run IMAGE boots the system on a disk image")
        ),
        ("cdrom", .use("--disk PATH,format=raw,ro", note: "a read-only disk; it is not bootable")),
        ("fda fdb floppy", .unavailable("a machine has virtio disks only: --disk PATH")),
        (
            "snapshot",
            .use(
                "swkvm run IMAGE",
                note:
                    "the image is not changed; for another disk, create an overlay with `swkvm image create --backing BASE overlay.qcow2`"
            )
        ),
        // Network
        ("netdev nic network w", .use("--net user, --net nat, or --net bridge=NAME")),
        ("tap tap-device", .use("--net tap=NAME[,bridge=NAME]")),
        ("publish p hostfwd", .use("--net user,publish=PORT:GUESTPORT")),
        ("bridge b", .use("--net bridge=NAME")),
        ("mac", .use("--net tap=NAME,mac=MAC")),
        // Devices
        ("device", .unavailable("the devices are virtio: --disk, --net, --rng and --balloon")),
        (
            "object",
            .unavailable(
                "see --hugepages, --shared and --numa for memory, key-file= of --disk for keys, --rng for random numbers"
            )
        ),
        ("virtfs fsdev filesystem fs", .unavailable("host directories cannot be shared yet")),
        (
            "usb usbdevice tpm tpmdev watchdog sound soundhw audio audiodev input hostdev host-device smartcard redirdev panic "
                + "controller channel iommu parallel pmem video",
            .unavailable("a machine has disks, network interfaces, an entropy device, a balloon, sockets and a console")
        ),
        // Console
        ("nographic nographics", .notNeeded("the terminal is the guest's serial port")),
        (
            "vnc spice display graphics vga sdl gtk curses full-screen k",
            .unavailable("there is no display, the serial port is the console (--console)")
        ),
        ("serial chardev debugcon semihosting", .use("--console stdio, none, pty, unix:PATH or file:PATH")),
        ("noautoconsole", .use("--console pty")),
        (
            "monitor mon",
            .notNeeded("Ctrl-A : on the console takes commands (`help` lists them), Ctrl-A h lists the keys")
        ),
        (
            "qmp qmp-pretty",
            .unavailable("there is no control socket; Ctrl-A : on the console takes commands (`help` lists them)")
        ),
        (
            "daemonize",
            .unavailable("a machine runs in the foreground: start it from a service manager, with --console unix:PATH")
        ),
        ("pidfile", .unavailable("the machine runs in the swkvm process itself: use the PID of that process")),
        // Debugging
        ("s", .use("--gdb 1234")),
        ("S", .use("--gdb PORT", note: "the guest waits for the debugger")),
        (
            "d D log-path level show-level show-log-origin log-file",
            .use("--log-level LEVEL", note: "on standard error")
        ),
        ("loadvm incoming", .unavailable("the state of a machine cannot be saved yet")),
        // The machine and the program
        (
            "M machine arch features no-user-config nodefaults",
            .notNeeded("there is one machine type, and it has no default devices")
        ),
        ("enable-kvm accel virt-type hvm", .notNeeded("every machine runs on KVM")),
        ("paravirt tcg icount tb-size plugin dfilter", .unavailable("every machine runs on KVM")),
        (
            "no-reboot noreboot",
            .use("--on-reboot exit", note: "the machine ends, with status \(ExitStatus.reset), when the guest reboots")
        ),
        (
            "action events",
            .use("--on-reboot restart|exit", note: "a guest that powers off or crashes ends the machine")
        ),
        ("no-shutdown", .unavailable("a guest that powers off ends the machine")),
        ("version V", .use("--version")),
        ("rtc", .notNeeded("the clock is the host's, in UTC")),
        ("id n", .use("--name NAME")),
        ("seccomp-level no-seccomp seccomp-filter", .use("--sandbox on|report|off|PART,…")),
        (
            "runas uid", .use("--run-as USER")
        ),
        (
            "chroot chroot-base-dir security",
            .notNeeded("--sandbox confines the process to what the machine needs, --run-as changes its user")
        ),
        ("overcommit", .use("--prealloc", note: "--cgroup PATH,memory=SIZE limits the memory of the process")),
        ("metrics-path", .use("--metrics PATH")),
        ("api-socket", .use("--api-sock PATH", note: "requests are Firecracker's")),
        (
            "no-api boot-timer module start-time-us start-time-cpu-us",
            .unavailable("there is an API only with --api-sock PATH")
        ),
        (
            "connect autostart transient description wait print-xml dry-run check",
            .unavailable("there is no daemon: each `swkvm run` process is one machine")
        ),
        (
            "global set readconfig writeconfig nodefconfig preconfig compat qemu-commandline",
            .unavailable("there are only command-line options")
        ),
    ]
}

/// Commands that are not there. To the parser they are arguments too many, or a request for the help of those above.
enum UnknownCommand {
    static func problem(in words: [String]) -> String? {
        var words = words[...]
        if words.first == "help" { words.removeFirst() }
        guard let first = words.first, !first.hasPrefix("-") else { return nil }
        let commands = names(of: Command.self)
        guard commands.contains(first) || first == "help" else { return problem(first, of: nil, commands) }
        guard first == "image", let verb = words.dropFirst().first, !verb.hasPrefix("-") else { return nil }
        let verbs = names(of: ImageCommand.self)
        return verbs.contains(verb) ? nil : problem(verb, of: "swkvm image", verbs)
    }

    /// - Parameter program: nil for swkvm itself, whose name every message begins with.
    private static func problem(_ word: String, of program: String?, _ names: [String]) -> String {
        let near = names.first { Suggestion.isTypo(word[...], for: $0[...]) }
        let advice = near.map { "did you mean '\($0)'?" } ?? "the commands are \(names.joined(separator: ", "))"
        return "'\(word)' is not a command" + (program.map { " of \($0)" } ?? "") + "; \(advice)"
    }

    private static func names(of command: any ParsableCommand.Type) -> [String] {
        command.configuration.subcommands.map { $0._commandName }
    }
}

/// The parser's suggestions.
enum Suggestion {
    /// `message` without a suggestion that is no more than similar letters: `--ram` is not `--rng`.
    static func keepingNear(_ message: String) -> String {
        let parts = message.split(separator: "'", omittingEmptySubsequences: false)
        // Unknown option '--…'. Did you mean '--…'?
        guard parts.count == 5, parts[0] == "Unknown option ", parts[2] == ". Did you mean ",
            !isTypo(parts[1], for: parts[3])
        else { return message }
        return "\(parts[0])'\(parts[1])'"
    }

    /// Whether one is the other with a slip of the finger, or two in a long word.
    static func isTypo(_ typed: Substring, for meant: Substring) -> Bool {
        let (a, b) = (Array(typed.drop { $0 == "-" }.utf8), Array(meant.drop { $0 == "-" }.utf8))
        return distance(a, b) <= (min(a.count, b.count) < 6 ? 1 : 2)
    }

    /// Letters to insert, leave out, change, or swap with the next one (optimal string alignment).
    private static func distance(_ a: [UInt8], _ b: [UInt8]) -> Int {
        var beforeLast: [Int] = [], last = Array(0...b.count)
        for i in a.indices {
            var row = [i + 1]
            for j in b.indices {
                var best = min(last[j] + (a[i] == b[j] ? 0 : 1), last[j + 1] + 1, row[j] + 1)
                if i > 0, j > 0, a[i] == b[j - 1], a[i - 1] == b[j] { best = min(best, beforeLast[j - 1] + 1) }
                row.append(best)
            }
            (beforeLast, last) = (last, row)
        }
        return last[b.count]
    }
}

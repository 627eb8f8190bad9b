// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import Glibc
internal import HostNetwork
internal import Inventory
internal import Linux

/// `swkvm list`.
struct ListCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "list",
        abstract: "List the machines that are defined, and which of them run.",
        discussion: """
            USED is the memory that the machine's process has, its guest's included, and DISK what the machine's own directory takes on the \
            host. ADDRESS is what the guest has from the DHCP server of a network (--net nat). A published port is shown as HOST:PORT → guest's port. STATE is \
            running, stopped, invalid (the definition), elsewhere (the machine runs on another host that has the same directory, or in another \
            PID namespace) or unknown (the machine's files cannot be read).

            \(MachineTool.exitStatuses)
            """)

    @Flag(help: "Print a JSON array with an object for each machine; sizes in bytes, times in seconds.")
    var json = false

    @Flag(help: "Print only the names.")
    var names = false

    func run() throws {
        let inventory = try inventory()
        let all = try attempt { () throws(InventoryError) in try inventory.names() }
        if names {
            for name in all { print(name) }
            return
        }
        let addresses = MachineAddresses()
        let states = all.compactMap { MachineState($0, inventory, addresses) }
        if json { return print(JSON.array(states.map(\.json))) }
        for line in HelpTable.columns([MachineState.heads] + states.map(\.row)) { print(line) }
    }
}

/// `swkvm info`.
struct InfoCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "info",
        abstract: "Show the definition and state of a machine.",
        discussion: MachineTool.exitStatuses)

    @Flag(help: "Print JSON, as `swkvm list --json` has it.")
    var json = false

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let (inventory, files) = try machine(self.name)
        let name = files.name
        guard let state = MachineState(name, inventory, MachineAddresses()) else { return }
        if json { return print(state.json) }
        let addresses =
            state.addresses.isEmpty ? nil : state.addresses.map(\.description).joined(separator: " ")
        let rows: [(String, String?)] = [
            ("name", "\(name)"), ("state", state.word),
            ("process", state.process.map { "\($0)" }),
            ("up", state.seconds.map(MachineState.duration)),
            ("memory used", state.memory.map(ImageTool.size)),
            ("disk used", ImageTool.size(state.disk)), ("autostart", state.autostart ? "yes" : nil),
            ("address", addresses),
            ("definition", files.definition.printable), ("directory", files.directory.printable),
            ("console", state.process == nil ? nil : files.console.printable),
        ]
        for line in HelpTable.columns(rows.compactMap { head, value in value.map { [head + ":", $0] } }) { print(line) }
        if let problem = state.problem { return StandardError().say(problem) }
        print("options of swkvm run:")
        for option in state.definition.options {
            print("  --\(option.name)\(option.value.map { " " + $0.printable } ?? "")")
        }
    }
}

/// What is known of a machine at one moment.
struct MachineState {
    let name: MachineName
    let definition: Definition
    /// Why the definition cannot be read.
    let problem: String?
    /// nil while it does not run.
    let process: Int32?
    /// Why `process` is nil when nothing else says so: it is not a process of this host, or its file cannot be read.
    private let obscurity: String?
    /// Since the process began.
    let seconds: UInt64?
    /// Bytes of the process.
    let memory: UInt64?
    /// Bytes on the host.
    let disk: UInt64
    /// That its guest has from a network of this host.
    let addresses: [IPv4Address]
    /// It starts with the host.
    let autostart: Bool

    /// nil for a machine that is deleted at this moment.
    init?(_ name: MachineName, _ inventory: Inventory, _ addresses: MachineAddresses) {
        guard let files = try? inventory.files(of: name) else { return nil }
        self.name = name
        do throws(InventoryError) {
            definition = try inventory.definition(of: name)
            problem = nil
        } catch {
            definition = Definition()
            problem = error.description
        }
        do throws(InventoryError) {
            process = try files.runningProcess()?.number
            obscurity = nil
        } catch {
            process = nil
            if case .runningElsewhere = error { obscurity = "elsewhere" } else { obscurity = "unknown" }
        }
        seconds = process.flatMap(Self.age)
        memory = process.flatMap(Self.residentBytes)
        disk = inventory.bytes(of: files)
        self.addresses = process == nil ? [] : addresses.all(of: name, definition)
        autostart = Autostart.isEnabled(name)
    }

    var word: String { obscurity ?? (process != nil ? "running" : problem != nil ? "invalid" : "stopped") }

    static let heads = ["NAME", "STATE", "CPUS", "MEMORY", "USED", "DISK", "UP", "AUTOSTART", "ADDRESS", "PORTS"]

    var row: [String] {
        [
            "\(name)", word, problem == nil ? definition.value(of: "cpus") ?? "1" : "-",
            problem == nil ? definition.value(of: "mem") ?? "\(RunCommand.defaultMemory)" : "-",
            memory.map(ImageTool.size) ?? "-", ImageTool.size(disk), seconds.map(Self.duration) ?? "-",
            autostart ? "yes" : "-",
            addresses.isEmpty ? "-" : addresses.map(\.description).joined(separator: " "),
            ports.isEmpty ? "-" : ports.map { "\($0.address):\($0.port) → \($0.guestPort)" }.joined(separator: " "),
        ]
    }

    var json: JSON {
        .object([
            ("name", .string("\(name)")), ("state", .string(word)),
            ("process", process.map { .number(UInt64($0)) }),
            ("cpus", UInt64(definition.value(of: "cpus") ?? "1").map { .number($0) }),
            (
                "memory",
                ByteSize(argument: definition.value(of: "mem") ?? "\(RunCommand.defaultMemory)").map {
                    .number($0.bytes)
                }
            ),
            ("used-memory", memory.map { .number($0) }), ("used-disk", .number(disk)),
            ("up", seconds.map { .number($0) }), ("autostart", .bool(autostart)),
            ("addresses", .array(addresses.map { .string("\($0)") })),
            (
                "ports",
                .array(
                    ports.map {
                        .object([
                            ("address", .string($0.address)), ("host", .number(UInt64($0.port))),
                            ("guest", .number(UInt64($0.guestPort))),
                        ])
                    })
            ),
            ("problem", problem.map { .string($0) }),
        ])
    }

    /// Ports of the host that are forwarded to the guest.
    var ports: [PublishedPort] { PublishedPort.all(in: definition) }

    /// `5 s`, `12 min`, `3 h 5 min`, `2 d 4 h`.
    static func duration(_ seconds: UInt64) -> String {
        switch seconds {
        case ..<60: "\(seconds) s"
        case ..<3600: "\(seconds / 60) min"
        case ..<86_400: "\(seconds / 3600) h \(seconds / 60 % 60) min"
        default: "\(seconds / 86_400) d \(seconds / 3600 % 24) h"
        }
    }

    // MARK: The process, proc(5)

    private static func fields(_ process: Int32, _ file: String) -> [Substring] {
        guard let bytes = try? readFile("/proc/\(process)/\(file)", limit: 4096) else { return [] }
        // A name in parentheses may have spaces; what follows it has none.
        let text = String(decoding: bytes, as: UTF8.self)
        let start = text.lastIndex(of: ")").map(text.index(after:)) ?? text.startIndex
        return text[start...].split { $0 == " " || $0 == "\n" }
    }

    private static func residentBytes(_ process: Int32) -> UInt64? {
        let fields = fields(process, "statm")
        guard fields.count > 1, let pages = UInt64(fields[1]) else { return nil }
        return pages &* UInt64(sysconf(Int32(_SC_PAGESIZE)))
    }

    private static func age(_ process: Int32) -> UInt64? {
        // The 22nd field of the line, of which two come before the name's end.
        let fields = fields(process, "stat")
        guard fields.count > 19, let start = UInt64(fields[19]) else { return nil }
        var now = timespec()
        unsafe clock_gettime(CLOCK_BOOTTIME, &now)
        let began = start / UInt64(max(1, sysconf(Int32(_SC_CLK_TCK))))
        return UInt64(max(0, now.tv_sec)).subtractingReportingOverflow(began).overflow ? 0 : UInt64(now.tv_sec) - began
    }
}

extension PublishedPort {
    /// The TCP ports of the host that `--net user,publish=` of a machine forwards to its guest.
    static func all(in definition: Definition) -> [PublishedPort] {
        definition.values(of: "net").flatMap { net in
            OptionList(net).items.compactMap { key, value in
                guard key == "publish", let value, let port = try? PublishedPort(parsing: value), !port.isUDP else {
                    return nil
                }
                return port
            }
        }
    }
}

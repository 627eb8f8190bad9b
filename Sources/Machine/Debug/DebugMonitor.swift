// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GDBRemote
internal import GuestMemory
internal import KVM

/// What the debugger's `monitor` commands ask of the machine besides its vCPUs and memory.
struct DebugMonitor: Sendable {
    /// Takes the commands that the debugger shares with the terminal's prompt.
    let control: MachineControl
    /// The table of exits so far; nil when they are not counted.
    let exits: (@Sendable () -> String)?
}

extension MachineDebugTarget {
    private static let help =
        MachineCommand.helpLines.map { $0 + "\n" }.joined() + """
            cpus                the state and position of each vCPU
            translate ADDRESS   the guest-physical address of a virtual address
            physical ADDRESS [COUNT]
                                dump COUNT bytes of guest-physical memory (default 64)
            exits               exits to user space so far (with --trace exits)

            """

    func monitor(_ command: String, thread: Int) -> String {
        let words = command.split(separator: " ").map(String.init)
        if words.isEmpty || MachineCommand.entry(words[0]) != nil { return run(command) }
        let numbers = words.dropFirst().compactMap(Self.number)
        guard numbers.count == max(0, words.count - 1) else {
            return "expected numbers, decimal or with 0x: '\(command)'\n"
        }
        switch (words[0], numbers.count) {
        case ("cpus", 0): return list()
        case ("translate", 1):
            let physical = physical(numbers[0], thread: thread)
            return "\(Self.hexadecimal(numbers[0])) \(physical.map { "is at \($0)" } ?? "is not mapped")\n"
        case ("physical", 1): return dump(numbers[0], 64)
        case ("physical", 2): return dump(numbers[0], Int(clamping: min(numbers[1], 1024)))
        case ("exits", 0): return monitor.exits?() ?? "exits are not counted: start swkvm with --trace exits\n"
        default: return "'\(command)' is not recognized; `monitor help` lists the commands\n"
        }
    }

    /// A command that the terminal's prompt has, too.
    private func run(_ line: String) -> String {
        do throws(MachineControlError) {
            switch try MachineCommand.parse(line) {
            case nil, .help: return Self.help
            case .quit:
                kill()
                return "the machine ends\n"
            case .request(let request): return try monitor.control.perform(request) + "\n"
            }
        } catch { return "\(error)\n" }
    }

    private func list() -> String {
        cpus.enumerated().map { index, cpu in
            let place = (try? cpu.cpu.registers()).map { ", rip \(Self.hexadecimal($0.rip))" } ?? ""
            return "vCPU \(index): \(Self.state(cpu))\(place)\n"
        }.joined()
    }

    /// Sixteen bytes a line.
    private func dump(_ address: UInt64, _ count: Int) -> String {
        guard let bytes = try? ram.readBytes(at: GuestAddress(address), count: count) else {
            return "\(Self.hexadecimal(address)): no RAM\n"
        }
        var lines = ""
        for start in stride(from: 0, to: bytes.count, by: 16) {
            let part = bytes[start..<min(start + 16, bytes.count)]
            let digits = part.map { String(UInt16($0) + 0x100, radix: 16).dropFirst() }.joined(separator: " ")
            lines += "\(Self.hexadecimal(address &+ UInt64(start))): \(digits)\n"
        }
        return lines
    }

    private static func hexadecimal(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }

    /// Decimal, or hexadecimal behind `0x`.
    private static func number(_ text: String) -> UInt64? {
        text.lowercased().hasPrefix("0x") ? UInt64(text.dropFirst(2), radix: 16) : UInt64(text)
    }
}

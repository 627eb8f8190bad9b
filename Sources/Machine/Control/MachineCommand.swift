// SPDX-License-Identifier: Apache-2.0

/// The commands of the prompt behind Ctrl-A : and of the debugger's `monitor`: one table for both.
public enum MachineCommand: Equatable, Sendable {
    case help
    case request(MachineControl.Request)
    /// Ends the machine.
    case quit

    struct Entry: Sendable {
        /// The first one is the one that help shows.
        let names: [String]
        let arguments: String
        let purpose: String
        /// The command with these arguments; nil when they do not fit.
        let parse: @Sendable ([String]) -> MachineCommand?
    }

    static let table = [
        Entry(names: ["help"], arguments: "", purpose: "show this list") { $0.isEmpty ? .help : nil },
        Entry(names: ["status", "info"], arguments: "", purpose: "show the machine, its memory and its devices") {
            plain(.status, $0)
        },
        Entry(names: ["pause"], arguments: "", purpose: "stop the vCPUs and the devices") { plain(.pause, $0) },
        Entry(names: ["resume"], arguments: "", purpose: "resume a paused machine") { plain(.resume, $0) },
        Entry(names: ["power"], arguments: "", purpose: "press the power button") { plain(.powerButton, $0) },
        Entry(
            names: ["link"], arguments: "NET up|down",
            purpose: "plug the cable of a network interface in, or pull it: link net0 down"
        ) { words in
            guard words.count == 2, ["up", "down"].contains(words[1]) else { return nil }
            return .request(.setLink(device: words[0], isUp: words[1] == "up"))
        },
        Entry(
            names: ["resize"], arguments: "DISK [SIZE]",
            purpose: "grow a disk: resize blk0 20G; without SIZE, to the current size of its image"
        ) {
            words in
            guard words.count == 1 || words.count == 2 else { return nil }
            guard words.count == 2 else { return .request(.resize(device: words[0], size: nil)) }
            return size(words[1]).map { .request(.resize(device: words[0], size: $0)) }
        },
        Entry(
            names: ["balloon"], arguments: "[SIZE|hints|end-hints]",
            purpose: "show the balloon; ask the guest to give up memory: balloon 512M; or for hints about free memory"
        ) { words in
            guard let word = words.first else { return .request(.balloon) }
            guard words.count == 1 else { return nil }
            switch word {
            case "hints": return .request(.requestBalloonHints(acknowledgesEnd: true))
            case "end-hints": return .request(.endBalloonHints)
            default: return size(word).map { .request(.setBalloonTarget($0)) }
            }
        },
        Entry(names: ["quit"], arguments: "", purpose: "end the machine immediately") { $0.isEmpty ? .quit : nil },
    ]

    /// What a line means; nil for a line without words, a sentence for one that means nothing.
    static func parse(_ line: String) throws(MachineControlError) -> MachineCommand? {
        let words = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).map(String.init)
        guard let name = words.first else { return nil }
        guard let entry = entry(name) else { throw .refused("unknown command '\(name)'; `help` lists the commands") }
        guard let command = entry.parse(Array(words.dropFirst())) else { throw .refused("usage: \(entry.usage)") }
        return command
    }

    static func entry(_ name: String) -> Entry? { table.first { $0.names.contains(name) } }

    /// A line for each command.
    static var helpLines: [String] { table.map(\.helpLine) }

    private static func plain(_ request: MachineControl.Request, _ words: [String]) -> MachineCommand? {
        words.isEmpty ? .request(request) : nil
    }

    /// Bytes, with K, M, G or T for powers of 1024.
    private static func size(_ text: String) -> UInt64? {
        let shifts: [Character: UInt64] = ["K": 10, "M": 20, "G": 30, "T": 40]
        let shift = text.last.flatMap { shifts[Character($0.uppercased())] }
        guard let number = UInt64(shift == nil ? text[...] : text.dropLast()) else { return nil }
        let (size, overflow) = number.multipliedReportingOverflow(by: 1 << (shift ?? 0))
        return overflow ? nil : size
    }
}

extension MachineCommand.Entry {
    var usage: String { arguments.isEmpty ? names[0] : "\(names[0]) \(arguments)" }

    /// `pause               stop the vCPUs and the devices`.
    var helpLine: String { usage + String(repeating: " ", count: max(1, 20 - usage.utf8.count)) + purpose }
}

// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import Glibc
internal import Inventory
internal import Linux

/// `swkvm snapshot`.
struct MachineSnapshotCommand: MachineVerb {
    enum Action: String, ExpressibleByArgument, CaseIterable {
        case create, list, revert, delete
    }

    static let configuration = CommandConfiguration(
        commandName: "snapshot",
        abstract: "Manage snapshots of a stopped machine's own disks.",
        discussion: """
            A snapshot has the contents of all disks in the machine's directory, not its memory: the machine must be stopped. It is stored in \
            the disks' qcow2 files. Each action is done for all disks or for none; one that was interrupted is undone or finished before the \
            machine is used again. `revert` discards what the disks have now; the snapshot stays.

            EXAMPLES
              swkvm snapshot web create before-upgrade
              swkvm snapshot web list
              swkvm snapshot web revert before-upgrade

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    @Argument(help: "One of create, list, revert and delete.")
    var action: Action

    @Argument(help: "The snapshot's name, 1 to 255 bytes; for create, the date and time by default.")
    var tag: String?

    @Flag(help: "Print the list as JSON.")
    var json = false

    func validate() throws {
        if action == .list, tag != nil { throw ValidationError("list takes no snapshot's name") }
        if action == .revert || action == .delete, tag == nil {
            throw ValidationError(
                "\(action.rawValue) requires the name of a snapshot: swkvm snapshot \(name) \(action.rawValue) TAG")
        }
        if json, action != .list { throw ValidationError("the option --json requires list") }
        if let tag, !(1...255).contains(tag.rawBytes.count) || tag.rawBytes.contains(where: { $0 < 0x20 }) {
            throw ValidationError("a snapshot's name has 1 to 255 bytes, and no control characters")
        }
    }

    func run() throws {
        let inventory = try inventory()
        let machine = try machineName(name)
        try changeDisks(machine) { () throws(MachineDiskError) in
            try inventory.withStopped(machine, failure: MachineDiskError.inventory) {
                (files, definition) throws(MachineDiskError) in
                if let done = try MachineSnapshots.recover(files, definition) {
                    StandardError().say("\(machine): \(done)")
                }
                let snapshots = try MachineSnapshots(definition, files)
                switch action {
                case .list: show(try snapshots.all(), of: snapshots.diskCount)
                case .create: try change(.create, tag ?? Self.now, snapshots, "created", machine)
                case .revert: try change(.revert, tag ?? "", snapshots, "reverted to", machine)
                case .delete: try change(.delete, tag ?? "", snapshots, "deleted", machine)
                }
                if action != .list {
                    for disk in OwnDisk.others(in: definition, files) {
                        StandardError().say(
                            "\(disk.printable) is not in the machine's directory, and not part of its snapshots")
                    }
                }
            }
        }
    }

    private func change(
        _ change: MachineSnapshots.Change, _ tag: String, _ snapshots: MachineSnapshots, _ word: String,
        _ machine: MachineName
    ) throws(MachineDiskError) {
        try snapshots.perform(change, tag)
        let disks = snapshots.diskCount == 1 ? "" : " of \(snapshots.diskCount) disks"
        print("\(machine): \(word) snapshot \(tag.printable)\(disks)")
    }

    private func show(_ all: [MachineSnapshots.Snapshot], of count: Int) {
        if json {
            return print(
                JSON.array(
                    all.map {
                        .object([
                            ("name", .string($0.name)), ("date-sec", .number(UInt64($0.seconds))),
                            ("disk-size", .number($0.size)), ("disks", .number(UInt64($0.count))),
                        ])
                    }
                ).description)
        }
        let rows = all.map { snapshot in
            [
                snapshot.name.printable, Self.date(Int(snapshot.seconds)),
                ImageTool.size(snapshot.size), snapshot.count == count ? "\(count)" : "\(snapshot.count) of \(count)",
            ]
        }
        for line in HelpTable.columns([["TAG", "DATE", "DISK SIZE", "DISKS"]] + rows) { print(line) }
    }

    private static var now: String {
        let text = date(time(nil))
        return String(text.map { $0 == " " ? "T" : $0 })
    }

    /// In local time.
    private static func date(_ seconds: Int) -> String {
        var seconds = time_t(seconds)
        // The structure's pointer, to a time zone's name, is not used.
        var date = unsafe tm()
        _ = unsafe localtime_r(&seconds, &date)
        func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : "\(number)" }
        return
            unsafe "\(Int(date.tm_year) + 1900)-\(two(date.tm_mon + 1))-\(two(date.tm_mday)) \(two(date.tm_hour)):\(two(date.tm_min)):\(two(date.tm_sec))"
    }
}

extension MachineVerb {
    /// Reports an error in one line, and ends the program.
    func changeDisks<Answer>(
        _ name: MachineName, _ body: () throws(MachineDiskError) -> Answer
    ) throws -> Answer {
        do throws(MachineDiskError) { return try body() } catch {
            StandardError().say(error.description)
            throw error.isUsage ? ExitCode.validationFailure : ExitCode(MachineTool.failure)
        }
    }
}

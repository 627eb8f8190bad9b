// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import Inventory
internal import Linux

/// `swkvm resize`.
struct ResizeMachineCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "resize",
        abstract: "Change a machine's disk size, memory and CPUs.",
        discussion: """
            The disk is the first one in the machine's directory. It can grow while the machine is stopped; cloud-init in the guest grows the file system \
            into it at the next start. --mem and --cpus change the definition; a machine that runs has them when it is restarted.

            EXAMPLES
              swkvm resize web --disk-size 40G
              swkvm resize web --disk-size +5G --mem 4G --cpus 4

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    @Option(
        help: ArgumentHelp("New size of the disk, or what is added to it: 40G, +5G.", valueName: "size"),
        transform: SizeChange.init(parsing:))
    var diskSize: SizeChange?

    @Option(help: ArgumentHelp("Memory, as of `swkvm run --mem`.", valueName: "size"))
    var mem: String?

    @Option(help: ArgumentHelp("Number of vCPUs.", valueName: "count"))
    var cpus: String?

    func validate() throws {
        guard diskSize != nil || mem != nil || cpus != nil else {
            throw ValidationError("nothing to change: specify --disk-size, --mem or --cpus")
        }
        guard diskSize?.sign != .minus else {
            throw ValidationError("a machine's disk cannot shrink; `swkvm image resize --shrink` does that to its file")
        }
        do { _ = try RunCommand.parse(changed(Definition()).words) } catch {
            throw ValidationError(Command.oneLine(RunCommand.message(for: error)))
        }
    }

    private func changed(_ definition: Definition) -> Definition {
        var definition = definition
        if let mem { definition.set("mem", to: mem) }
        if let cpus { definition.set("cpus", to: cpus) }
        return definition
    }

    func run() throws {
        let inventory = try inventory()
        let machine = try machineName(name)
        let files = try attempt { () throws(InventoryError) in try inventory.files(of: machine) }
        let before = try attempt { () throws(InventoryError) in try inventory.definition(of: machine) }
        // What fits together only with the rest, such as NUMA nodes.
        if let problem = DefinitionCheck.problem(changed(before), files) { throw ValidationError(problem) }
        var done: [String] = []
        if let diskSize {
            let size = try changeDisks(machine) { () throws(MachineDiskError) in
                try inventory.withStopped(machine, failure: MachineDiskError.inventory) {
                    (files, definition) throws(MachineDiskError) in
                    if let done = try MachineSnapshots.recover(files, definition) {
                        StandardError().say("\(machine): \(done)")
                    }
                    return try Self.enlarge(diskSize, definition, files)
                }
            }
            done.append("disk \(ImageTool.size(size))")
        }
        if mem != nil || cpus != nil {
            try attempt { () throws(InventoryError) in try inventory.change(machine, changed) }
            if let mem { done.append("memory \(mem)") }
            if let cpus { done.append(cpus == "1" ? "1 CPU" : "\(cpus) CPUs") }
        }
        let runs = try attempt { () throws(InventoryError) in try files.runningProcess() != nil }
        print(
            "\(machine): \(done.joined(separator: ", "))\(runs ? ", when it is restarted: `swkvm restart \(machine)`" : "")"
        )
    }

    /// - Returns: bytes of the disk.
    private static func enlarge(
        _ change: SizeChange, _ definition: Definition, _ files: MachineFiles
    ) throws(MachineDiskError) -> UInt64 {
        do throws(DiskImageError) {
            guard let disk = try OwnDisk.all(in: definition, files).first else {
                throw .impossible(path: files.directory, reason: "\(files.name) has no disk of its own there")
            }
            var engine = try DiskEngine(DiskImage(path: disk.path, options: disk.options), depth: 1)
            let old = engine.image.size
            guard let new = change.applied(to: old), new >= old else {
                throw .impossible(
                    path: disk.path,
                    reason:
                        "the disk has \(ImageTool.size(old)), and cannot shrink to \(ImageTool.size(change.amount.bytes))"
                )
            }
            if new > old { try engine.resize(to: new, preallocation: .off, shrinks: false) }
            return new
        } catch { throw .disk(error) }
    }
}

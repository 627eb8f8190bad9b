// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import Inventory
internal import Linux

/// `swkvm clone`.
struct CloneCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "clone",
        abstract: "Define a machine like a stopped one, with copies of its disks.",
        discussion: """
            The disks in the machine's directory are copied, and depend on the same images as before; with --copy they depend on none. The two machines are independent of \
            each other. The new one has a name, UUID, MAC addresses, published ports and an instance-id for cloud-init of its own, so that cloud-init \
            configures it as a new machine: host name, SSH host keys. A guest without cloud-init keeps what it has of these.

            EXAMPLES
              swkvm clone web web2
              swkvm clone --copy web backup

            \(MachineTool.exitStatuses)
            """)

    @Flag(help: "Copy the images that the disks depend on, too, and leave out snapshots.")
    var copy = false

    @Flag(help: "Show the progress: on a terminal as a line that changes, otherwise as lines.")
    var progress = false

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    @Argument(help: "The new machine's name.")
    var newName: String

    func run() throws {
        let inventory = try inventory()
        let source = try machineName(name), new = try machineName(newName)
        var report: [String] = []
        try changeDisks(new) { () throws(MachineDiskError) in
            let ports = MachinePorts.used(in: inventory)
            try inventory.withStopped(source, failure: MachineDiskError.inventory) {
                (files, definition) throws(MachineDiskError) in
                if let done = try MachineSnapshots.recover(files, definition) {
                    StandardError().say("\(source): \(done)")
                }
                try inventory.create(new, failure: MachineDiskError.inventory) {
                    (newFiles) throws(MachineDiskError) in
                    var clone = try copyDisks(definition, files, newFiles)
                    clone = MachinePorts.renumbered(MachineIdentity.removed(from: clone), used: ports, &report)
                    report += shared(clone, files, with: source)
                    return clone
                }
            }
        }
        print("\(new): created, a clone of \(source)\(report.isEmpty ? "" : "; " + report.joined(separator: "; "))")
    }

    /// - Returns: the definition with the copies.
    private func copyDisks(
        _ definition: Definition, _ files: MachineFiles, _ newFiles: MachineFiles
    ) throws(MachineDiskError) -> Definition {
        var clone = definition
        do throws(DiskImageError) {
            for disk in try OwnDisk.all(in: definition, files) {
                let name = disk.path.directoryAndName.name
                guard disk.path == "\(files.directory)/\(name)" else {
                    throw .impossible(
                        path: disk.path, reason: "it is in a directory below the machine's own: copy it by hand")
                }
                var words = disk.words.map { key, value in
                    key.commaDoubled + (value.map { "=" + $0.commaDoubled } ?? "")
                }
                if copy {
                    guard disk.options.keys.isEmpty else {
                        throw .impossible(
                            path: disk.path,
                            reason: "it is encrypted, and would be copied in plain: clone it without --copy")
                    }
                    words = disk.words.filter { !["backing-dir", "backing", "data-file"].contains($0.key) }
                        .map { key, value in key.commaDoubled + (value.map { "=" + $0.commaDoubled } ?? "") }
                } else {
                    try checkIsAlone(disk)
                }
                try copy(disk, to: "\(newFiles.directory)/\(name)")
                clone.options[disk.index] = Definition.Option(
                    "disk", ([name.commaDoubled] + words).joined(separator: ","))
            }
        } catch { throw .disk(error) }
        return clone
    }

    /// Refuses a disk that does not work in another directory.
    private func checkIsAlone(_ disk: OwnDisk) throws(DiskImageError) {
        let information = try ImageInformation(path: disk.path, format: disk.options.format, locking: true)
        let isRelative = information.backing.map {
            $0.name.utf8.first != UInt8(ascii: "/") && !DiskImage.isRemote($0.name)
        }
        guard isRelative != true, disk.options.dataFile == nil, information.qcow2?.dataFile == nil else {
            throw .impossible(
                path: disk.path,
                reason: "it depends on another file by a path relative to its own: use --copy, which needs none")
        }
    }

    private func copy(_ disk: OwnDisk, to path: String) throws(DiskImageError) {
        let format = try ImageInformation(path: disk.path, format: disk.options.format, locking: true).format
        var conversion = ImageConversion(source: disk.path, target: path, format: copy ? format : .raw)
        conversion.sourceOptions = disk.options
        conversion.sourceOptions.readOnly = true
        if !copy {
            // The file as it is, with its snapshots.
            conversion.sourceOptions = DiskImageOptions(format: .raw, readOnly: true)
        }
        let line = ProgressLine(isShown: progress ? true : nil)
        defer { line.end() }
        try conversion.run(line.show)
    }

    /// What both machines have, and only one of them can use at a time.
    private func shared(_ definition: Definition, _ files: MachineFiles, with source: MachineName) -> [String] {
        var found = OwnDisk.others(in: definition, files).map { "the disk \($0.printable)" }
        for option in definition.options {
            guard let value = option.value else { continue }
            switch option.name {
            case "net":
                found += OptionList(value).items.filter { $0.key == "tap" }.map {
                    "the TAP \(($0.value ?? "").printable)"
                }
            case "console", "gdb", "metrics", "cgroup", "vsock":
                if value.utf8.contains(UInt8(ascii: "/")) { found.append("--\(option.name) \(value.printable)") }
            default: break
            }
        }
        return found.isEmpty
            ? [] : ["\(found.joined(separator: ", ")) as \(source): change it with `swkvm edit \(newName)`"]
    }
}

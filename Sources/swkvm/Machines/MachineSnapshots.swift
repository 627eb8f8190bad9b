// SPDX-License-Identifier: Apache-2.0

internal import DiskImage
internal import Glibc
internal import Inventory
internal import Linux

/// Snapshots of all disks of a machine that does not run: internal ones of its qcow2 images, all with one name.
///
/// An image's snapshot is created, reverted to or deleted in full or not at all. With several disks, a file in the
/// machine's directory says what is being done, from before the first until after the last: what was interrupted is
/// undone (create) or finished (revert, delete) before the machine's disks are used again.
struct MachineSnapshots {
    enum Change: String {
        case create, revert, delete
    }

    private let files: MachineFiles
    private let disks: [OwnDisk]
    private var journal: String { files.snapshotting }

    /// - Throws: for a machine that has no disk of its own, or one that cannot have snapshots.
    init(_ definition: Definition, _ files: MachineFiles) throws(MachineDiskError) {
        self.files = files
        disks = try Self.attempt { () throws(DiskImageError) in try OwnDisk.all(in: definition, files) }
        guard !disks.isEmpty else {
            throw .refused("\(files.name) has no disk of its own that a snapshot could be made of")
        }
    }

    // MARK: What is there

    /// One of all disks.
    struct Snapshot {
        let name: String
        let seconds: UInt32
        /// Bytes of the first disk.
        let size: UInt64
        /// How many of the disks have it.
        let count: Int
    }

    var diskCount: Int { disks.count }

    /// Those with their names, oldest first.
    func all() throws(MachineDiskError) -> [Snapshot] {
        var names: [String] = []
        var found: [String: Snapshot] = [:]
        for disk in disks {
            for snapshot in try snapshots(of: disk) {
                let before = found[snapshot.name]
                if before == nil { names.append(snapshot.name) }
                found[snapshot.name] = Snapshot(
                    name: snapshot.name, seconds: before?.seconds ?? snapshot.seconds,
                    size: before?.size ?? snapshot.size, count: (before?.count ?? 0) + 1)
            }
        }
        return names.compactMap { found[$0] }
    }

    private func snapshots(of disk: OwnDisk) throws(MachineDiskError) -> [DiskSnapshot] {
        try Self.attempt { () throws(DiskImageError) in try open(disk, readOnly: true).snapshots() }
    }

    private func open(_ disk: OwnDisk, readOnly: Bool = false) throws(DiskImageError) -> DiskEngine {
        try DiskImage.requireQCOW2(disk.path, format: disk.options.format) { known in
            "it is \(known.name), and only qcow2 images have snapshots"
        }
        var options = disk.options
        options.format = .qcow2
        options.readOnly = readOnly
        // Only tables change.
        options.opensData = false
        return try DiskEngine(DiskImage(path: disk.path, options: options), depth: 1)
    }

    // MARK: Changes

    /// Changes all disks, or none.
    func perform(_ change: Change, _ name: String) throws(MachineDiskError) {
        var holders: [OwnDisk] = []
        for disk in disks where try snapshots(of: disk).contains(where: { $0.name == name }) { holders.append(disk) }
        switch change {
        case .create:
            guard holders.isEmpty else { throw .refused("\(files.name) has a snapshot '\(name.printable)' already") }
        case .revert where holders.count < disks.count, .delete where holders.isEmpty:
            let others = holders.isEmpty ? "" : " on all of its disks"
            throw .refused(
                "\(files.name) has no snapshot '\(name.printable)'\(others); `swkvm snapshot \(files.name) list` shows all"
            )
        case .revert, .delete: break
        }
        guard disks.count > 1 else { return try apply(change, name, to: disks) }
        try begin(change, name)
        do throws(MachineDiskError) { try apply(change, name, to: disks) } catch {
            // What cannot be undone or finished now is tried again later: the file stays then.
            _ = try? Self.recover(files, self)
            throw error
        }
        removeName(journal)
    }

    private func apply(_ change: Change, _ name: String, to disks: [OwnDisk]) throws(MachineDiskError) {
        for disk in disks {
            try Self.attempt { () throws(DiskImageError) in
                var engine = try open(disk)
                // By its number: a name may be another one's number.
                let id = try engine.snapshots().first { $0.name == name }?.id
                switch (change, id) {
                case (.create, nil): try engine.createSnapshot(named: name)
                case (.revert, let id?): try engine.applySnapshot(id)
                case (.delete, let id?): try engine.deleteSnapshot(id)
                case (.create, _?), (_, nil): break
                }
            }
        }
    }

    private func begin(_ change: Change, _ name: String) throws(MachineDiskError) {
        do throws(SystemCallError) {
            try writeFile(journal, "\(change.rawValue)\n\(name)".rawBytes)
        } catch { throw .inventory(.system(purpose: "write", path: journal, error)) }
    }

    /// Undoes or finishes what was interrupted; the machine is locked, and does not run.
    /// - Returns: what was done, as a sentence; nil if there was nothing.
    static func recover(_ files: MachineFiles, _ definition: Definition) throws(MachineDiskError) -> String? {
        guard fileStatus(ofPath: files.directory + "/.snapshot") != nil else { return nil }
        return try recover(files, MachineSnapshots(definition, files))
    }

    private static func recover(
        _ files: MachineFiles, _ snapshots: MachineSnapshots
    ) throws(MachineDiskError) -> String? {
        guard let bytes = try? readFile(snapshots.journal, limit: 4096) else { return nil }
        let parts = bytes.split(separator: UInt8(ascii: "\n"), maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2, let change = Change(rawValue: String(raw: parts[0])) else {
            throw .refused("\(snapshots.journal.printable) is not a record of a snapshot: remove it")
        }
        let name = String(raw: parts[1])
        // Of a created one that all disks have, only the end was missing.
        let isComplete = try snapshots.all().first { $0.name == name }?.count == snapshots.disks.count
        if change != .create || !isComplete {
            try snapshots.apply(change == .create ? .delete : change, name, to: snapshots.disks)
        }
        removeName(snapshots.journal)
        return change == .create && !isComplete
            ? "removed the incomplete snapshot '\(name.printable)'"
            : "finished what was interrupted: \(change.rawValue) of the snapshot '\(name.printable)'"
    }

    private static func attempt<Answer: ~Copyable>(
        _ body: () throws(DiskImageError) -> Answer
    ) throws(MachineDiskError) -> Answer {
        do throws(DiskImageError) { return try body() } catch { throw .disk(error) }
    }
}

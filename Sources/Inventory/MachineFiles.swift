// SPDX-License-Identifier: Apache-2.0

internal import Glibc
public import Linux

/// Where the files of a machine are.
public struct MachineFiles: Equatable, Sendable {
    public let name: MachineName
    /// The definition.
    public let definition: String
    /// The machine's own directory: its disk, its logs, the host keys of its guest. Relative paths of the definition
    /// begin here.
    public let directory: String
    /// The directory of what exists only while the machine runs.
    public let runtime: String

    package init(_ name: MachineName, _ directories: Directories) {
        self.name = name
        definition = "\(directories.definitions)/\(name).toml"
        directory = "\(directories.data)/\(name)"
        runtime = "\(directories.runtime)/\(name)"
    }

    /// Locked by the machine's process (``ProcessFile``). It is not among the run-time files, whose directory depends
    /// on the session from which a verb is called.
    public var process: String { directory + "/pid" }
    /// The socket of the serial port.
    public var console: String { runtime + "/console" }
    /// What the serial port printed.
    public var consoleLog: String { directory + "/console.log" }
    /// What swkvm itself reported.
    public var messages: String { directory + "/messages.log" }
    /// The keys by which ssh recognizes the guest.
    public var knownHosts: String { directory + "/known_hosts" }
    /// Present while the directory is being made or removed.
    var unfinished: String { directory + "/.unfinished" }
    /// Present while the machine gets another name; has what is needed to finish that.
    var renaming: String { directory + "/.renaming" }
    /// Present while snapshots of the machine's disks are changed; has what is needed to finish or undo that.
    public var snapshotting: String { directory + "/.snapshot" }

    /// The machine's process, nil if it does not run.
    /// - Throws: `runningElsewhere`, `system`.
    public func runningProcess() throws(InventoryError) -> RunningProcess? {
        do throws(SystemCallError) { return try ProcessFile.owner(process) } catch {
            if error == SystemCallError("fcntl", errno: ESRCH) { throw .runningElsewhere(name, lock: process) }
            throw .system(purpose: "read", path: process, error)
        }
    }
}

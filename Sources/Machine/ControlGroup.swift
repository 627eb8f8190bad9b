// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
public import Linux

/// The control group (cgroups(7), version 2) that the process has entered because of `--cgroup`.
///
/// The process enters it as a whole, before it has taken anything of the host that a limit is about. A group that was
/// made for the machine is removed at its end: the process goes back to where it came from first, through a descriptor
/// that was opened before.
final class ControlGroup {
    private let parent: FileDescriptor
    private let name: String
    /// Indicates whether it was made here.
    private var isCreated = false
    /// `cgroup.procs` of the group before; nil if that cannot be opened.
    private var wayBack: FileDescriptor?

    /// Makes the group unless it is there, sets its limits, and moves the process into it.
    static func enter(_ wanted: Configuration.ControlGroup) throws(ControlGroupError) -> ControlGroup {
        let group = try ControlGroup(wanted.path)
        do throws(ControlGroupError) {
            try group.setUp(wanted)
            return group
        } catch {
            group.remove()
            throw error
        }
    }

    private init(_ path: String) throws(ControlGroupError) {
        let trimmed = path.utf8.reversed().drop { $0 == UInt8(ascii: "/") }.reversed()
        let bytes = Array(trimmed)
        let slash = bytes.lastIndex(of: UInt8(ascii: "/"))
        name = String(raw: Array(bytes[(slash.map { $0 + 1 } ?? 0)...]))
        let directory = slash.map { $0 == 0 ? "/" : String(raw: Array(bytes[..<$0])) } ?? "."
        guard !name.isEmpty, name != ".", name != ".." else { throw .noName(path) }
        do throws(SystemCallError) {
            parent = try FileDescriptor.open(directory, O_RDONLY | O_DIRECTORY)
        } catch { throw .system("open \(directory)", error) }
        switch clinux_cgroup_version(parent.rawValue) {
        case 2: break
        case 1: throw .version1(directory)
        default: throw .notAGroup(directory)
        }
    }

    private func setUp(_ wanted: Configuration.ControlGroup) throws(ControlGroupError) {
        if mkdirat(name) {
            isCreated = true
        } else if errno != EEXIST {
            throw .system("create the control group \(wanted.path)", .last("mkdir"))
        }
        let group: FileDescriptor
        do throws(SystemCallError) { group = try open(name, O_RDONLY | O_DIRECTORY, in: parent) } catch {
            throw .system("open the control group \(wanted.path)", error)
        }
        for (controller, file, value) in wanted.settings {
            try enable(controller, group, wanted.path)
            do throws(SystemCallError) { try write(value, to: file, in: group) } catch {
                throw .system("set \(file) of the control group \(wanted.path) to \(value)", error)
            }
        }
        wayBack = isCreated ? Self.openPresent(below: group) : nil
        do throws(SystemCallError) { try write("0", to: "cgroup.procs", in: group) } catch {
            if [EBUSY, EOPNOTSUPP].contains(error.errno) { throw .noLeaf(wanted.path) }
            throw .system("move into the control group \(wanted.path)", error)
        }
    }

    /// Has the group's parent pass a controller on, if the group lacks it.
    private func enable(
        _ controller: String, _ group: borrowing FileDescriptor, _ path: String
    ) throws(ControlGroupError) {
        if Self.words("cgroup.controllers", in: group).contains(Substring(controller)) { return }
        guard Self.words("cgroup.controllers", in: parent).contains(Substring(controller)) else {
            throw .noController(controller, path)
        }
        do throws(SystemCallError) { try write("+" + controller, to: "cgroup.subtree_control", in: parent) } catch {
            if error.errno == EBUSY { throw .parentHasProcesses(controller, path) }
            throw .system("enable the controller \(controller) for the control group \(path)", error)
        }
    }

    /// Goes back to the group before and removes this one, if it was made here.
    func leave() {
        guard isCreated, wayBack != nil, (try? wayBack?.writeAll("0".utf8)) != nil else { return }
        remove()
    }

    /// Where the group is removed.
    var parentDescriptor: Int32 { parent.rawValue }

    private func remove() {
        guard isCreated else { return }
        isCreated = false
        _ = name.withRawCString { unsafe unlinkat(parent.rawValue, $0, AT_REMOVEDIR) }
    }

    // MARK: Files

    private func mkdirat(_ name: String) -> Bool {
        name.withRawCString { unsafe Glibc.mkdirat(parent.rawValue, $0, 0o755) } == 0
    }

    private static func words(_ file: String, in directory: borrowing FileDescriptor) -> [Substring] {
        guard let descriptor = try? FileDescriptor.open("/proc/self/fd/\(directory.rawValue)/\(file)", O_RDONLY),
            let bytes = try? readFile(descriptor, limit: 4096)
        else { return [] }
        return String(decoding: bytes, as: UTF8.self).split { $0 == " " || $0 == "\n" }
    }

    private func open(
        _ name: String, _ flags: Int32, in directory: borrowing FileDescriptor
    ) throws(SystemCallError) -> FileDescriptor {
        try FileDescriptor.open("/proc/self/fd/\(directory.rawValue)/\(name)", flags)
    }

    private func write(
        _ value: String, to file: String, in directory: borrowing FileDescriptor
    ) throws(SystemCallError) {
        try open(file, O_WRONLY, in: directory).writeAll(value.utf8)
    }

    /// `cgroup.procs` of the group that the process is in now, in the file system of `group`.
    private static func openPresent(below group: borrowing FileDescriptor) -> FileDescriptor? {
        guard let text = try? readFile("/proc/self/cgroup", limit: 64 << 10),
            let line = text.split(separator: UInt8(ascii: "\n")).first(where: { $0.starts(with: "0::/".utf8) }),
            let device = (try? group.status())?.st_dev
        else { return nil }
        // The root is where the parent is in another file system.
        var root = "/proc/self/fd/\(group.rawValue)"
        for _ in 0..<64 {
            var status = stat()
            guard (root + "/..").withRawCString({ unsafe stat($0, &status) }) == 0 else { return nil }
            if status.st_dev != device { break }
            root += "/.."
        }
        return try? FileDescriptor.open(root + String(raw: Array(line.dropFirst(3))) + "/cgroup.procs", O_WRONLY)
    }
}

/// Why the process could not enter the requested control group.
public enum ControlGroupError: Error, CustomStringConvertible {
    case noName(String)
    case notAGroup(String)
    case version1(String)
    case noController(String, String)
    case parentHasProcesses(String, String)
    case noLeaf(String)
    /// What was tried.
    case system(String, SystemCallError)

    public var description: String {
        switch self {
        case .noName(let path):
            "'\(path)' is not a valid control group path: expected a path such as /sys/fs/cgroup/machines/vm1"
        case .notAGroup(let directory):
            "\(directory) is not in a cgroup2 file system: mount one (`mount -t cgroup2 none /sys/fs/cgroup`), or specify a path below the one that `findmnt -t cgroup2` shows"
        case .version1(let directory):
            "\(directory) is in a file system of cgroup version 1: --cgroup needs version 2 (`findmnt -t cgroup2`)"
        case .noController(let controller, let path):
            "the control group \(path) cannot have a limit of the controller \(controller): its parent does not have it (cgroup.controllers); enable it in the groups above, or leave the limit out"
        case .parentHasProcesses(let controller, let path):
            "the controller \(controller) cannot be enabled for the control group \(path): its parent has processes of its own; specify a group below an empty one"
        case .noLeaf(let path):
            "the process cannot move into the control group \(path): it has groups with controllers below it, or is threaded; specify a group below it"
        case .system(let purpose, let error) where error.errno == EACCES || error.errno == EPERM:
            "no permission to \(purpose): run as root, or have the group delegated to this user (Delegate=yes of systemd)"
        case .system(let purpose, let error): "cannot \(purpose): \(error.reason) (\(error.call))"
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

public import Boot
internal import CLinux
public import DiskImage
public import FileSystems
public import GuestMemory
public import HostNetwork
public import KVM
public import Linux
public import Sandbox

/// An error while a machine is created or started: that of the part that failed, or one of the machine's own.
public enum MachineError: Error, CustomStringConvertible {
    case kvm(KVMError)
    case memory(GuestMemoryError)
    case boot(BootError)
    case disk(DiskImageError)
    /// A disk that was to boot by its own files, and does not.
    case bootDisk(path: String, FileSystemError)
    /// A remote disk that was to boot by its own files.
    case bootDiskIsRemote(path: String)
    case network(HostNetworkError)
    /// Network interfaces that cannot be together in one machine.
    case networks(Configuration.NetworkProblem)
    /// A balloon that the machine cannot have.
    case balloon(Configuration.BalloonProblem)
    /// A socket device that cannot be as configured.
    case vsock(Configuration.VsockProblem)
    /// A socket device whose UNIX socket could not be opened.
    case vsockSocket(path: String, SystemCallError)
    /// A call of the host's failed; `purpose` completes "could not …".
    case host(purpose: String, SystemCallError)
    /// A number of vCPUs below 1.
    case noCPUs(Int)
    /// NUMA nodes that cannot be as configured.
    case nodes(NodeProblem)
    /// More virtio devices than there are interrupt lines.
    case tooManyDevices(wanted: Int, maximum: Int)
    /// The debugger's address could not be opened.
    case debugger(Configuration.Debugger, SystemCallError)
    /// The console could not be opened as configured.
    case console(Configuration.ConsoleKind, SystemCallError)
    /// The process could not enter its control group.
    case controlGroup(ControlGroupError)
    /// The file for metrics could not be opened.
    case metrics(path: String, SystemCallError)
    /// A file for output is also another file of the machine, which `other` names.
    case outputFile(option: String, path: String, other: String)
    /// There is no file with the process's number (`--pid-file`).
    case processFile(path: String, ProcessFile.Refusal)
    /// The process cannot be confined as configured.
    case sandbox(Sandbox.Refusal)

    public var description: String {
        switch self {
        case .kvm(let error): error.description
        case .memory(let error): error.description
        case .boot(let error): error.description
        case .controlGroup(let error): error.description
        case .disk(let error): error.description
        case .bootDisk(let path, let error): "\(path) cannot be booted: \(error)"
        case .bootDiskIsRemote(let path):
            "\(path) cannot be booted: swkvm reads no kernel from a remote disk; specify --kernel, --initrd and --cmdline"
        case .network(let error): error.description
        case .networks(let problem): problem.description
        case .balloon(let problem): problem.description
        case .vsock(let problem): problem.description
        case .vsockSocket(let path, let error) where error.errno == EADDRINUSE:
            "the vsock device's socket \(path) is in use: another process listens on it; choose another path, or end that process"
        case .vsockSocket(let path, let error) where error.errno == EEXIST:
            "the vsock device's socket cannot be \(path): a file that is not a socket has that name; choose another path or remove it"
        case .vsockSocket(let path, let error):
            "the vsock device's socket \(path) cannot be opened: \(error.reason) (\(error.call))"
        case .host(let purpose, let error): "could not \(purpose): \(error.reason) (\(error.call))"
        case .noCPUs(let count): "\(count) vCPUs were requested, a machine needs at least 1: use `--cpus 1`"
        case .nodes(let problem): problem.description
        case .tooManyDevices(let wanted, let maximum):
            "\(wanted) disks and other virtio devices were requested, but a machine has \(maximum) slots: remove \(wanted - maximum)"
        case .debugger(.port(let port), let error) where error.errno == EADDRINUSE:
            "port \(port) of 127.0.0.1 is in use: choose another one for the debugger, or 0 for any free port"
        case .debugger(.port(let port), let error):
            "port \(port) of 127.0.0.1 cannot be opened for the debugger: \(error.reason) (\(error.call))"
        case .debugger(.unix(let path), let error) where error.errno == EADDRINUSE:
            "the debugger's socket \(path) is in use: another process listens on it; choose another path, or end that process"
        case .debugger(.unix(let path), let error) where error.errno == EEXIST:
            "the debugger's socket cannot be \(path): a file that is not a socket has that name; choose another path or remove it"
        case .debugger(.unix(let path), let error) where error.errno == ENAMETOOLONG:
            "the debugger's socket has a path of \(path.rawBytes.count) bytes, the limit is 107: choose a shorter one"
        case .debugger(.unix(let path), let error):
            "the debugger's socket \(path) cannot be opened: \(error.reason) (\(error.call))"
        case .console(.unix(let path), let error) where error.errno == EADDRINUSE:
            "the console's socket \(path) is in use: another process listens on it; choose another path, or end that process"
        case .console(.unix(let path), let error) where error.errno == EEXIST:
            "the console's socket cannot be \(path): a file that is not a socket has that name; choose another path or remove it"
        case .console(.unix(let path), let error) where error.errno == ENAMETOOLONG:
            "the console's socket has a path of \(path.rawBytes.count) bytes, the limit is 107: choose a shorter one"
        case .console(.file(let path), let error) where error.errno == EWOULDBLOCK:
            "the console's file \(path), or one of those beside it (\(path).1 and so on), is in use: another machine rotates it; choose another path"
        case .console(.file(let path), let error) where error.errno == ESPIPE:
            "the console cannot be \(path) with size=: it, or one of the files beside it (\(path).1 and so on), is not a regular file"
        case .console(.file(let path), let error) where error.errno == ELOOP:
            "the console cannot be \(path): it, or one of the files beside it (\(path).1 and so on), is a symbolic link"
        case .console(.file(let path), let error) where error.errno == ENOTSUP:
            "the console cannot be \(path): it is a block device, whose contents would be overwritten"
        case .console(.file(let path), let error) where error.errno == ETXTBSY:
            "the console cannot be \(path): another process uses this file as a disk; choose another path"
        case .console(.unix(let path), let error), .console(.file(let path), let error):
            "the console \(path) cannot be opened: \(error.reason) (\(error.call))"
        case .metrics(let path, let error) where error.errno == ENOTSUP:
            "the file for metrics cannot be \(path): it is not a regular file (see --metrics-format)"
        case .metrics(let path, let error) where error.errno == ELOOP:
            "the file for metrics cannot be \(path): it is a symbolic link; specify the file itself, or a pipe made with `mkfifo`"
        case .metrics(let path, let error) where error.errno == EEXIST:
            "the file for metrics cannot be \(path): it has other contents than metrics in the format of --metrics-format; choose another path or remove it"
        case .metrics(let path, let error) where error.errno == ETXTBSY:
            "the file for metrics cannot be \(path): another process uses this file as a disk; choose another path"
        case .metrics(let path, let error):
            "the file for metrics, \(path), cannot be opened: \(error.reason) (\(error.call))"
        case .outputFile(let option, let path, let other):
            "\(option) \(path) and \(other) use the same file: specify another one for \(option)"
        case .processFile(let path, .taken(let process)):
            "the process file \(path) is locked by \(process > 0 ? "process \(process)" : "another process"): the machine is running already"
        case .processFile(let path, .foreign):
            "the process file cannot be \(path): it has other contents than a process ID; choose another path or remove it"
        case .processFile(let path, .system(let error)) where error.errno == EEXIST:
            "the process file cannot be \(path): it is not a regular file"
        case .processFile(let path, .system(let error)) where error.errno == ELOOP:
            "the process file cannot be \(path): it is a symbolic link"
        case .processFile(let path, .system(let error)):
            "the process file \(path) cannot be written: \(error.reason) (\(error.call))"
        case .sandbox(let refusal):
            "the process cannot be confined by \(refusal.part.rawValue): \(refusal.reason) (see --sandbox)"
        case .console(_, let error): "the console cannot be opened: \(error.reason) (\(error.call))"
        }
    }
}

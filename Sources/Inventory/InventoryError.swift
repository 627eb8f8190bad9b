// SPDX-License-Identifier: Apache-2.0

public import Linux

/// Why a verb on defined machines failed.
public enum InventoryError: Error, Equatable, CustomStringConvertible {
    case badName(String)
    case notDefined(MachineName)
    case alreadyDefined(MachineName)
    /// A directory with data, of a machine that is not defined.
    case dataWithoutDefinition(MachineName, directory: String)
    case running(MachineName, process: Int32)
    /// A process has the lock of the machine's file that has no number here.
    case runningElsewhere(MachineName, lock: String)
    case notRunning(MachineName)
    /// A definition that was read is another one by now.
    case changedMeanwhile(MachineName)
    /// Another process changes the machine.
    case busy(MachineName)
    /// A definition that cannot be read: `line` counts from 1.
    case badDefinition(path: String, line: Int, String)
    /// A directory that others can write to, or own.
    case unsafeDirectory(String)
    /// No directory is known for the user's machines.
    case noHome
    /// A call of the host's failed for a file; `purpose` completes "could not".
    case system(purpose: String, path: String, SystemCallError)

    public var description: String {
        switch self {
        case .badName(let text):
            "'\(text.printable)' is not a machine's name; expected up to \(MachineName.maximumLength) letters, digits, '.', '_' and '-', of which the first is a letter or digit"
        case .notDefined(let name): "there is no machine \(name); `swkvm list` shows all, `swkvm create` makes one"
        case .alreadyDefined(let name):
            "there is a machine \(name) already: choose another name, or delete it with `swkvm delete \(name)`"
        case .dataWithoutDefinition(let name, let directory):
            "\(directory.printable) has data of a machine \(name) that is not defined: move or remove it first"
        case .running(let name, let process):
            "\(name) is running\(process > 0 ? " (process \(process))" : ""); `swkvm stop \(name)` stops it"
        case .runningElsewhere(let name, let lock):
            "\(name) runs on another host, or in another PID namespace of this one, whose process has locked \(lock.printable)"
        case .notRunning(let name): "\(name) is not running; `swkvm start \(name)` starts it"
        case .changedMeanwhile(let name): "the definition of \(name) was changed by somebody else meanwhile"
        case .busy(let name): "another swkvm process is changing \(name) at this moment; try again"
        case .badDefinition(let path, let line, let problem): "\(path.printable), line \(line): \(problem)"
        case .unsafeDirectory(let path):
            "\(path.printable) is not a directory of this user or of root that others cannot write to"
        case .noHome: "SWKVM_HOME, or else HOME, has to be an absolute path: there is no other place for machines"
        case .system(let purpose, let path, let error):
            "could not \(purpose) \(path.printable): \(error.reason) (\(error.call))"
        }
    }

    /// Indicates whether the command line asked for something impossible, and not the host.
    public var isUsage: Bool {
        switch self {
        case .badName, .notDefined, .alreadyDefined: true
        default: false
        }
    }
}

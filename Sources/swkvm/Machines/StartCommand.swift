// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import Glibc
internal import Inventory
internal import Linux
internal import Machine

/// `swkvm start`: a defined machine, in the background.
struct StartCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "start",
        abstract: "Start machines that `swkvm create` has defined.",
        discussion: """
            Each machine is a process of its own in the background; there is no daemon. Messages of the machine are appended to a log \
            (`swkvm logs --messages`), and those of its start are printed too.

            EXAMPLES
              swkvm start web
              swkvm start web && swkvm console web

            \(MachineTool.exitStatuses)
            """)

    @Argument(help: "The machines.", completion: MachineCompletion.names)
    var names: [String]

    func run() throws {
        let inventory = try inventory()
        try forEach(names) { name in try Self.start(name, inventory, self) }
    }

    /// Starts a machine, and waits until its guest runs.
    static func start(_ name: MachineName, _ inventory: Inventory, _ verb: some MachineVerb) throws {
        let lock = try verb.attempt { () throws(InventoryError) in try inventory.prepareStart(name) }
        let definition = try verb.attempt { () throws(InventoryError) in try inventory.definition(of: name) }
        let words = words(definition, lock.files)
        if let problem = DefinitionCheck.problem(definition, lock.files) {
            StandardError().say("\(lock.files.definition.printable): \(problem)")
            throw ExitCode(MachineTool.failure)
        }
        let done = try verb.changeDisks(name) { () throws(MachineDiskError) in
            try MachineSnapshots.recover(lock.files, definition)
        }
        if let done { StandardError().say("\(name): \(done)") }
        // Relative paths of the definition begin there.
        guard lock.files.directory.withRawCString({ unsafe chdir($0) }) == 0 else {
            StandardError().say(
                "could not enter \(lock.files.directory.printable): \(SystemCallError.last("chdir").reason)")
            throw ExitCode(MachineTool.failure)
        }
        rotateMessages(lock.files.messages)
        let status = MachineTool.run("/proc/self/exe", ["run"] + words)
        _ = consume lock
        guard let status else {
            StandardError().say("could not start this program again: /proc/self/exe cannot be executed")
            throw ExitCode(MachineTool.failure)
        }
        guard status == 0 else {
            StandardError().say("\(name) was not started (status \(status))")
            throw ExitCode(MachineTool.failure)
        }
        print("\(name): started")
    }

    /// Messages of earlier starts go to the file beside it when there are many. A machine reports what repeats itself
    /// rarely, so one run adds little.
    private static func rotateMessages(_ path: String) {
        guard let status = fileStatus(ofPath: path, followsLinks: false), status.st_size >= messagesLimit else {
            return
        }
        // Best effort: otherwise, it is appended to.
        _ = path.withRawCString { from in (path + ".1").withRawCString { to in unsafe rename(from, to) } }
    }

    /// Bytes.
    private static let messagesLimit = 1 << 20

    /// What `swkvm run` gets.
    static func words(_ definition: Definition, _ files: MachineFiles) -> [String] {
        var words = ["--name=\(files.name)"] + definition.words
        if !definition.has("console") {
            words.append(
                "--console=unix:\(files.console.commaDoubled),log=\(files.consoleLog.commaDoubled),size=\(consoleLogSize),keep=1"
            )
        }
        return words + ["--daemon=\(files.messages)", "--pid-file=\(files.process)"]
    }

    private static let consoleLogSize = "4M"
}

/// `swkvm stop`.
struct StopCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "stop",
        abstract: "Stop running machines: ask the guest to power off, and wait.",
        discussion: """
            The guest has the time that its --stop-timeout says, \(Configuration.StopTimeout.standard) seconds by default; then the machine is ended. \
            With --force it has about a second. Disks are closed properly in both cases; what the guest has not flushed is lost.

            EXAMPLES
              swkvm stop web
              swkvm stop --timeout 20 web db

            \(MachineTool.exitStatuses)
            """)

    @Option(
        help: ArgumentHelp(
            "Seconds that the guest has to power off before the machine is ended.", valueName: "seconds"),
        transform: wholeNumber(1...86_400))
    var timeout: Int?

    @Flag(help: "Give the guest about a second to power off.")
    var force = false

    @Argument(help: "The machines.", completion: MachineCompletion.names)
    var names: [String]

    func validate() throws {
        guard timeout == nil || !force else {
            throw ValidationError("the options --timeout and --force cannot be combined")
        }
    }

    func run() throws {
        let inventory = try inventory()
        try forEach(names) { name in
            try Self.stop(name, inventory, seconds: force ? 0 : timeout, self)
            print("\(name): stopped")
        }
    }

    /// Two signals within a second count as one (``StopSignals``).
    private static let pauseBetweenSignals: Int32 = 1200
    /// Milliseconds that a machine may take to close its disks before it is killed.
    private static let patience: Int32 = 10_000

    /// Milliseconds after which a machine has ended by itself, unless it does not react any more; -1 for never.
    private static func ownLimit(_ name: MachineName, _ inventory: Inventory) -> Int32 {
        let stated = (try? inventory.definition(of: name))?.value(of: "stop-timeout")
        if stated == "none" { return -1 }
        // Whatever a file says that was not checked since it was changed.
        let seconds = min(max(0, stated.flatMap { Int($0) } ?? Configuration.StopTimeout.standard), 1_000_000)
        return Int32(clamping: seconds * 1000 + Int(patience))
    }

    /// Stops a machine, and returns when its process has ended.
    /// - Parameter seconds: nil for as long as the machine itself gives its guest; 0 ends it at once.
    static func stop(
        _ name: MachineName, _ inventory: Inventory, seconds: Int?, _ verb: some MachineVerb
    ) throws {
        let process = try verb.attempt { () throws(InventoryError) in
            guard let process = try inventory.files(of: name).runningProcess() else { throw .notRunning(name) }
            return process
        }
        do throws(SystemCallError) {
            try process.send(signal: SIGTERM)
            let limit =
                seconds.map { max(pauseBetweenSignals, Int32(clamping: $0 * 1000)) } ?? ownLimit(name, inventory)
            if process.waitForEnd(milliseconds: limit) { return }
            try process.send(signal: SIGTERM)
            if process.waitForEnd(milliseconds: patience) { return }
            StandardError().say("\(name) does not end, and is killed")
            try process.send(signal: SIGKILL)
            if process.waitForEnd(milliseconds: patience) { return }
        } catch {
            // It has ended by itself.
            if error.errno == ESRCH { return }
            StandardError().say("\(name) (process \(process.number)) cannot be stopped: \(error.reason)")
            throw ExitCode(MachineTool.failure)
        }
        StandardError().say("\(name) (process \(process.number)) has been killed, and does not end")
        throw ExitCode(MachineTool.failure)
    }
}

/// `swkvm restart`.
struct RestartCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "restart",
        abstract: "Stop machines, if they run, and start them.",
        discussion: MachineTool.exitStatuses)

    @Option(
        help: ArgumentHelp(
            "Seconds that the guest has to power off before the machine is ended.", valueName: "seconds"),
        transform: wholeNumber(1...86_400))
    var timeout: Int?

    @Argument(help: "The machines.", completion: MachineCompletion.names)
    var names: [String]

    func run() throws {
        let inventory = try inventory()
        try forEach(names) { name in
            let isRunning = try attempt { () throws(InventoryError) in
                try inventory.files(of: name).runningProcess() != nil
            }
            if isRunning { try StopCommand.stop(name, inventory, seconds: timeout, self) }
            try StartCommand.start(name, inventory, self)
        }
    }
}

/// `swkvm delete`.
struct DeleteCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "delete",
        abstract: "Delete machines, with their own disks and logs.",
        discussion: """
            Files outside of the machine's directory, such as the image that it was created from, stay. What is deleted cannot be restored.

            \(MachineTool.exitStatuses)
            """)

    @Flag(help: "End a machine that is running first.")
    var force = false

    @Argument(help: "The machines.", completion: MachineCompletion.names)
    var names: [String]

    func run() throws {
        let inventory = try inventory()
        try forEach(names) { name in
            let isRunning = try attempt { () throws(InventoryError) in
                try inventory.files(of: name).runningProcess() != nil
            }
            if force, isRunning { try StopCommand.stop(name, inventory, seconds: 0, self) }
            let starts = Autostart.isEnabled(name)
            try attempt { () throws(InventoryError) in try inventory.delete(name) }
            if starts { try Autostart.set(false, name) }
            print("\(name): deleted")
        }
    }
}

enum MachineCompletion {
    /// The names of the machines that are there.
    static let names = CompletionKind.shellCommand("swkvm list --names 2>/dev/null")
}

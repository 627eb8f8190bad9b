// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Glibc
internal import Inventory
internal import Linux
internal import Machine

/// `swkvm console`.
struct ConsoleCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "console",
        abstract: "Connect this terminal to the serial port of a running machine.",
        discussion: """
            The last lines of what the guest has printed are shown first. Ctrl-] disconnects; the machine goes on. Several clients may be connected: \
            the first has the keyboard, and the others watch until it has gone. No client stops the guest: one that does not read loses \
            output, which the log has (`swkvm logs`).

            \(MachineTool.exitStatuses)
            """)

    @Option(
        help: ArgumentHelp("Lines of earlier output to show. (default: 20)", valueName: "n"),
        transform: wholeNumber(0...10_000))
    var lines = 20

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let files = try machine(name).files
        try attempt { () throws(InventoryError) in
            guard try files.runningProcess() != nil else { throw .notRunning(files.name) }
        }
        let end: ConsoleClient.End
        do throws(SystemCallError) {
            let client = try ConsoleClient(path: files.console)
            if isatty(STDIN_FILENO) == 1 { StandardError().say("connected to \(name); Ctrl-] disconnects") }
            if lines > 0, let log = try? Log(files.consoleLog) { log.printEnd(lines: lines) }
            end = try client.run()
        } catch {
            let reason =
                error.errno == ENOENT ? "its definition has another --console" : "\(error.reason) (\(error.call))"
            StandardError().say("the console of \(name) cannot be opened: \(reason)")
            throw ExitCode(MachineTool.failure)
        }
        switch end {
        case .escape: StandardError().say("disconnected from \(name)")
        case .outputClosed(let error): Command.end(0, outputError: error)
        case .signal(let number): throw ExitCode(ExitStatus.signalBase + number)
        case .closed:
            // It closes its console just before its end.
            guard try Self.isStillRunning(files) else { return StandardError().say("the machine has ended") }
            StandardError().say("the machine has closed the connection: see above, or `swkvm logs --messages \(name)`")
            throw ExitCode(MachineTool.failure)
        }
    }

    private static func isStillRunning(_ files: MachineFiles) throws -> Bool {
        guard let process = try files.runningProcess() else { return false }
        return !process.waitForEnd(milliseconds: 3000)
    }
}

/// `swkvm logs`.
struct LogsCommand: MachineVerb {
    static let configuration = CommandConfiguration(
        commandName: "logs",
        abstract: "Print what a machine's serial port has printed, or messages of swkvm about it.",
        discussion: """
            On a terminal, control characters of the guest are shown as escapes; to a file or a pipe they are passed on. The log of the serial \
            port has the last 4 to 8 MiB, of several starts.

            \(MachineTool.exitStatuses)
            """)

    @Flag(help: "Print messages of swkvm.")
    var messages = false

    @Option(
        name: [.customShort("n"), .long],
        help: ArgumentHelp("Print only the last lines.", valueName: "n"), transform: wholeNumber(0...10_000_000))
    var lines: Int?

    @Flag(name: [.customShort("f"), .long], help: "Go on printing what is added, until SIGINT.")
    var follow = false

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let files = try machine(name).files
        let path = messages ? files.messages : files.consoleLog
        do throws(SystemCallError) {
            // What was rotated away first.
            if lines == nil, let older = try? Log(path + ".1") { older.printAll() }
            let log = try Log(path)
            if let lines { log.printEnd(lines: lines) } else { log.printAll() }
            if follow { log.follow() }
        } catch {
            guard error.errno != ENOENT else { return StandardError().say("\(name) has not been started yet") }
            StandardError().say("\(path.printable) cannot be read: \(error.reason) (\(error.call))")
            throw ExitCode(MachineTool.failure)
        }
    }
}

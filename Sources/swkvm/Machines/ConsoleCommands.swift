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
            The last lines of what the guest has printed are shown first. Ctrl-] disconnects; the machine goes on. A console has one client \
            at a time.

            \(MachineTool.exitStatuses)
            """)

    @Option(
        help: ArgumentHelp("Lines of earlier output to show. (default: 20)", valueName: "n"),
        transform: wholeNumber(0...10_000))
    var lines = 20

    @Argument(help: "The machine.", completion: MachineCompletion.names)
    var name: String

    func run() throws {
        let inventory = try inventory()
        let name = try machineName(name)
        let files = try attempt { () throws(InventoryError) in
            let files = try inventory.files(of: name)
            guard try files.runningProcess() != nil else { throw .notRunning(name) }
            return files
        }
        let end: ConsoleClient.End
        var hasBegun = false
        do throws(SystemCallError) {
            let client = try ConsoleClient(path: files.console)
            if isatty(STDIN_FILENO) == 1 { StandardError().say("connected to \(name); Ctrl-] disconnects") }
            if lines > 0, let log = try? Log(files.consoleLog) { log.printEnd(lines: lines) }
            end = try client.run(hasBegun: { hasBegun = true })
        } catch {
            let reason =
                error.errno == ENOENT ? "its definition has another --console" : "\(error.reason) (\(error.call))"
            StandardError().say("the console of \(name) cannot be opened: \(reason)")
            throw ExitCode(MachineTool.failure)
        }
        switch end {
        case .escape: StandardError().say("disconnected from \(name)")
        case .outputClosed: break
        case .signal(let number): throw ExitCode(ExitStatus.signalBase + number)
        case .closed:
            let isRunning = (try? files.runningProcess()) != nil
            guard isRunning, !hasBegun else { return StandardError().say("the machine has ended") }
            StandardError().say("another client is connected to the console of \(name)")
            throw ExitCode(MachineTool.failure)
        }
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
        let inventory = try inventory()
        let name = try machineName(name)
        let files = try attempt { () throws(InventoryError) in try inventory.files(of: name) }
        let path = messages ? files.messages : files.consoleLog
        do throws(SystemCallError) {
            // What was rotated away first.
            if lines == nil, !messages, let older = try? Log(path + ".1") { older.printAll() }
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

/// A file of a machine that grows while it is printed.
final class Log {
    private let path: String
    private var file: FileDescriptor
    private var offset: UInt64 = 0
    private let isTerminal = isatty(STDOUT_FILENO) == 1

    init(_ path: String) throws(SystemCallError) {
        self.path = path
        file = try FileDescriptor.open(path, O_RDONLY | O_NOCTTY)
    }

    /// Prints what there is.
    func printAll() { while printNext() {} }

    /// Prints so many lines from the end. The last one need not be complete.
    func printEnd(lines: Int) {
        offset = (try? file.size()) ?? 0
        var missing = lines
        var isFirst = true
        while offset > 0 {
            let start = offset > UInt64(Self.window) ? offset - UInt64(Self.window) : 0
            let bytes = read(at: start, count: Int(offset - start))
            for index in bytes.indices.reversed() where bytes[index] == UInt8(ascii: "\n") {
                // The newline at the very end begins no line.
                if !(isFirst && index == bytes.count - 1) { missing -= 1 }
                guard missing > 0 else {
                    offset = start + UInt64(index) + 1
                    return printAll()
                }
            }
            isFirst = false
            offset = start
        }
        if lines > 0 { printAll() }
    }

    /// Prints what is added, until a signal ends the process; goes on with the new file after a rotation.
    func follow() {
        while true {
            printAll()
            usleep(200_000)
            guard let size = try? file.size() else { return }
            // A rotated file begins anew, as the same file.
            if size < offset { offset = 0 }
        }
    }

    private static let window = 64 << 10

    private func read(at offset: UInt64, count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        // Into the array, as long as it is.
        let read = unsafe bytes.withUnsafeMutableBytes { unsafe (try? file.read(into: $0, at: offset)) ?? 0 }
        return Array(bytes[..<read])
    }

    /// - Returns: false at the end.
    private func printNext() -> Bool {
        let bytes = read(at: offset, count: Self.window)
        guard !bytes.isEmpty else { return false }
        offset += UInt64(bytes.count)
        var output = bytes
        if isTerminal {
            // A character may be cut in two at the end of a window: its bytes are then shown as such.
            let lines = bytes.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
            output = Array(
                lines.map { line in String(raw: line.last == 0x0d ? line.dropLast() : line).printable }
                    .joined(separator: "\n").utf8)
        }
        var rest = output[...]
        while !rest.isEmpty {
            let count = unsafe rest.withUnsafeBytes { unsafe write(STDOUT_FILENO, $0.baseAddress, $0.count) }
            if count < 0, errno == EINTR { continue }
            // SIGPIPE is blocked: a reader that has gone ends the program.
            guard count > 0 else { exit(1) }
            rest.removeFirst(count)
        }
        return true
    }
}

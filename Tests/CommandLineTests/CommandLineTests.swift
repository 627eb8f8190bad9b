// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import DiskImage
import GuestMemory
import HostNetwork
import Inventory
import Machine
import TestSupport
import Testing

@testable import swkvm

/// What the command line as a whole means, and what is said of it.
@Suite(.timed) struct RunCommandTests {
    private func parse(_ arguments: String...) throws -> RunCommand {
        try #require(try Command.parseAsRoot(["run"] + arguments) as? RunCommand)
    }

    @Test func nothingGiven() throws {
        let command = try parse()
        #expect(
            command.name == nil && command.uuid == nil && command.cpus == 1 && command.mem.bytes == 512 << 20
                && command.hugepages == nil)
        #expect(
            !command.prealloc && !command.shared && command.kernel == nil && command.initrd == nil
                && command.cmdline.isEmpty)
        #expect(
            command.disk.isEmpty && command.net.isEmpty && command.configuration.console == .stdio
                && command.logLevel == .notice
        )
    }

    @Test func everything() throws {
        let command = try parse(
            "--name", "vm", "--cpus", "3", "--mem", "1G", "--prealloc", "--shared", "--kernel", "k", "--initrd", "i",
            "--cmdline", "a b=c -- d",
            "--disk", "a.raw", "--disk", "b.qcow2,ro", "--net", "tap=t", "--net", "fd=5", "--console", "file:log",
            "--log-level", "debug")
        #expect(
            command.name == "vm" && command.cpus == 3 && command.mem.bytes == 1 << 30 && command.prealloc
                && command.shared)
        #expect(command.kernel == "k" && command.initrd == "i" && command.cmdline == "a b=c -- d")
        #expect(
            command.disk.map(\.disk.path) == ["a.raw", "b.qcow2"]
                && command.disk.map(\.disk.options.readOnly) == [false, true])
        #expect(command.net.count == 2 && command.net[1].network?.backend == .descriptor(5))
        #expect(command.console?.kind == .file("log") && command.logLevel == .debug)
    }

    @Test func hugePages() throws {
        #expect(try parse("--hugepages").hugepages == .twoMiB)
        #expect(
            try parse().configuration.memory.backing == .automatic
                && parse("--hugepages=off").configuration.memory.backing == .anonymous)
        // The word after it is its own, not the option's.
        #expect(try parse("--hugepages", "--mem", "2G").hugepages == .twoMiB)
        let kinds: [(String, MemoryBacking)] = [
            ("2M", .hugePages(.twoMiB)), ("2m", .hugePages(.twoMiB)), ("1G", .hugePages(.oneGiB)),
            ("1g", .hugePages(.oneGiB)),
            ("thp", .transparent), ("THP", .transparent), ("off", .anonymous),
        ]
        for (text, backing) in kinds {
            // Whatever comes before and after it.
            #expect(try parse("--hugepages=\(text)").hugepages?.backing == backing)
            #expect(try parse("--hugepages=\(text)", "--prealloc").hugepages?.backing == backing)
            #expect(try parse("--mem", "2G", "--hugepages", text, "--cpus", "2").hugepages?.backing == backing)
        }
        for arguments in [["--hugepages=4M"], ["--hugepages=4M", "--prealloc"], ["--hugepages", "4M"]] {
            #expect(throws: (any Error).self, "\(arguments)") { try Command.parseAsRoot(["run"] + arguments) }
        }
    }

    @Test func debuggersAndTraces() throws {
        let expected: [(String, Configuration.Debugger)] = [
            ("0", .port(0)), ("65535", .port(65535)), ("unix:/run/gdb", .unix("/run/gdb")), (":1234", .port(1234)),
            ("localhost:1234", .port(1234)),
            ("127.0.0.1:1234", .port(1234)), ("tcp::1234", .port(1234)), ("tcp:localhost:1234", .port(1234)),
        ]
        for (text, place) in expected { #expect(try parse("--gdb", text).configuration.debugger == place) }
        for text in ["", "65536", "-1", "+1", ":", "localhost:", "0.0.0.0:1234", "tcp:", "unix:", "pty"] {
            #expect(throws: (any Error).self) { try parse("--gdb", text) }
        }
        #expect(try parse("--trace", "exits").configuration.countsExits)
        #expect(throws: (any Error).self) { try parse("--trace", "calls") }
        #expect(try parse().configuration.debugger == nil && !parse().configuration.countsExits)
    }

    @Test func consoles() throws {
        let expected: [(String, Configuration.ConsoleKind)] = [
            ("stdio", .stdio), ("none", .none), ("pty", .pty), ("unix:/a:b", .unix("/a:b")), ("unix:x", .unix("x")),
            ("file:/dev/null", .file("/dev/null")),
        ]
        for (text, kind) in expected { #expect(try parse("--console", text).console?.kind == kind) }
        let limited = try #require(
            try parse("--console", "file:a,,b=c,size=1M,keep=5,bps=10K,bps-burst=2K").console)
        #expect(limited.kind == .file("a,b=c") && limited.limits.file == .init(size: 1 << 20, backups: 5))
        #expect(limited.limits.output == .init(perSecond: 10 << 10, burst: 2 << 10))
        #expect(try parse("--console", "file:a,size=64K").console?.limits.file == .init(size: 64 << 10, backups: 3))
        let logged = try #require(try parse("--console", "unix:/s,log=/l,,m,size=1M,keep=1").console)
        #expect(logged.kind == .unix("/s") && logged.limits.log == "/l,m")
        #expect(logged.limits.file == .init(size: 1 << 20, backups: 1))
        #expect(try parse("--console", "pty").console?.limits == Configuration.ConsoleLimits.none)
        #expect(try parse("--console", "pty").configuration.consoleDevice == .serial)
        let virtio = try parse("--kernel", "vmlinuz", "--console", "stdio,device=virtio,bps=1M")
        #expect(virtio.configuration.consoleDevice == .virtio && virtio.console?.limits.output?.perSecond == 1 << 20)
        #expect(throws: (any Error).self) { try parse("--console", "stdio,device=virtio") }
        #expect(throws: (any Error).self) { try parse("--kernel", "bundled", "--console", "pty,device=virtio") }
        for text in [
            "", "STDIO", "unix", "unix:", "file:", "tcp:1", " pty", "file:a,", "file:a,b", "file:a,size=",
            "file:a,size=1K",
            "file:a,size=2T", "file:a,keep=2", "file:a,size=1M,keep=0", "file:a,size=1M,keep=17", "stdio,size=1M",
            "pty,bps=0",
            "pty,bps", "none,bps=1K", "unix:/a,bps-burst=1K", "file:,size=1M", "unix:/a,size=1M", "unix:/a,log",
            "unix:/a,log=", "file:/a,log=/b", "stdio,log=/b", "stdio,device=hvc0", "stdio,device", "none,device=virtio",
        ] {
            #expect(throws: (any Error).self) { try parse("--console", text) }
        }
    }

    @Test(arguments: ["trace", "debug", "info", "notice", "warning", "error", "critical"]) func logLevels(
        level: String
    ) throws {
        #expect(try parse("--log-level", level).logLevel.rawValue == level)
    }

    /// The parser's own mistakes are the command line's: status 64.
    @Test(arguments: [
        ["run", "--unknown"], ["run", "a.raw", "word"], ["run", "--cpus"], ["run", "--cpus", "two"],
        ["run", "--mem", "1.5"],
        ["run", "--disk", ""],
        ["run", "--net", "tap=a,mac=zz"], ["run", "--log-level", "loud"], ["walk"], ["doctor", "--all"],
    ])
    func mistakes(arguments: [String]) {
        do {
            _ = try Command.parseAsRoot(arguments)
            Issue.record("\(arguments) was taken")
        } catch {
            #expect(Command.exitCode(for: error) == .validationFailure && ExitCode.validationFailure.rawValue == 64)
            let sentence = Command.message(for: error)
            #expect(!sentence.isEmpty)
        }
    }
}

@Suite(.timed) struct HelpTests {
    private func text(_ arguments: String...) -> (text: String, status: Int32) { text(arguments) }

    private func text(_ arguments: [String]) -> (text: String, status: Int32) {
        do {
            var command = try Command.parseAsRoot(arguments)
            try command.run()
            return ("", -1)
        } catch {
            return (Command.fullMessage(for: error), Command.exitCode(for: error).rawValue)
        }
    }

    @Test func ofTheProgram() {
        let help = text("--help")
        #expect(help.status == 0)
        for word in ["swkvm run --mem 2G\n", "swkvm doctor", "SUBCOMMANDS", "--version"] {
            #expect(help.text.contains(word), "\(word)")
        }
    }

    /// The parser adds the default of some options; their own text does not state it then.
    @Test func noOptionStatesItsDefaultTwice() throws {
        var options = 0
        for (path, command) in try CommandTree.whole().all() {
            for argument in command.arguments ?? [] where argument.kind == "option" {
                let own = (argument.abstract ?? "").lowercased()
                let isStated = own.contains("(default:") || own.contains("default: ")
                #expect(!isStated || argument.defaultValue == nil, "\(path) \(argument.names ?? [])")
                options += 1
            }
        }
        #expect(options > 50)
    }

    @Test func ofRun() {
        let help = text("run", "--help")
        #expect(help.status == 0)
        for option in [
            "--name", "--uuid", "--cpus", "--mem", "--hugepages", "--prealloc", "--shared", "--numa", "--kernel",
            "--initrd", "--cmdline", "--cmdline-raw", "--bus", "--virtqueues", "--discovery", "--disk", "--net",
            "--rng", "--balloon", "--console", "--boot", "--firmware", "--append", "--metadata", "--sandbox",
            "--run-as",
            "--ssh-key", "--user",
            "--password-file", "--hostname", "--user-data", "--meta-data", "--network-config",
            "--gdb", "--trace", "--cgroup", "--vsock",
            "--log-level", "--version", "--help", "EXAMPLES", "EXIT STATUS",
        ] {
            #expect(help.text.contains(option), "\(option)")
        }
        // The lines are broken where it fits.
        let words = help.text.split(whereSeparator: \.isWhitespace).joined(separator: " ")
        #expect(words.contains("(default: 512M)") && words.contains("Default: stdio, and none"))
        // The statuses are those that the program ends with.
        for status in [
            ExitStatus.hostError, ExitStatus.tripleFault, ExitStatus.internalError, ExitStatus.unexpectedExit,
        ] {
            #expect(help.text.contains("\(status) "), "\(status)")
        }
    }

    /// A line of a table or an example that is too long is continued below its beginning, not at the margin.
    @Test func noIndentedLineIsContinuedAtTheMargin() throws {
        for (path, _) in try CommandTree.whole().all() {
            let lines = text(path + ["--help"]).text.split(separator: "\n", omittingEmptySubsequences: false)
            for (line, next) in zip(lines, lines.dropFirst()) where line.hasPrefix("  ") && !next.isEmpty {
                #expect(next.hasPrefix("  "), "\(path): \(line)\n\(next)")
            }
        }
    }

    @Test func tablesAreWrappedBelowTheirSecondColumn() {
        let rows = [("1", "a short meaning"), ("128 + N", "one that goes on behind the end of a line of thirty")]
        #expect(
            HelpTable.text(rows.map { (word: $0.0, meaning: $0.1) }, columns: 30) == """
                  1        a short meaning
                  128 + N  one that goes on
                           behind the end of a
                           line of thirty
                """)
        let table = HelpTable.text(ExitStatus.table.map { (word: $0.statuses, meaning: $0.meaning) })
        #expect(table.split(separator: "\n").allSatisfy { $0.count <= 80 && $0.hasPrefix("  ") })
        #expect(table.contains("kernel or a\n           disk image\n"))
    }

    @Test func ofDoctor() {
        let help = text("doctor", "--help")
        #expect(help.status == 0 && help.text.contains("whether this host can run machines"))
    }

    @Test(arguments: [["--version"], ["run", "--version"]]) func version(arguments: [String]) {
        let version = arguments.count == 1 ? text("--version") : text("run", "--version")
        #expect(version.status == 0 && version.text == "swkvm \(Command.version)")
    }

    /// What a release recorded comes behind the version; a build that recorded nothing says so.
    @Test func verboseVersion() {
        #expect(Command.verboseVersion(components: "revision 1\n") == "swkvm \(Command.version)\nrevision 1")
        #expect(Command.verboseVersion(components: "").hasPrefix("swkvm \(Command.version)\nthis is not a binary of"))
    }

    @Test(arguments: ["bash", "zsh", "fish"]) func completions(shell: String) {
        let script = text("--generate-completion-script", shell)
        #expect(script.status == 0)
        for word in ["run", "doctor", "hugepages"] { #expect(script.text.contains(word)) }
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// What verbs print, and what becomes of it.
@Suite(.timed) struct MachineOutputTests {
    private let home: MachineHome

    init() throws { home = try MachineHome() }

    /// The status of a command line whose output goes elsewhere, and what it says on standard error.
    private func run(_ words: String, into redirection: String) throws -> [Substring] {
        try shell(
            "export SWKVM_HOME='\(home.path)'; s=0; '\(Host.swkvm)' \(words) 2>&1 \(redirection) || s=$?; echo status=$s"
        ).split(separator: "\n")
    }

    /// Output that is lost is an error of every verb that prints, and is reported once.
    @Test func aFullOutput() throws {
        try home.swkvm("create", "web", "--mem", "64M")
        try home.directory.write(Array("lines\nof\na\nlog\n".utf8), to: "home/machines/web/console.log")
        try shell("truncate -s 1M '\(home.directory("disk.raw"))'")
        let disk = "'\(home.directory("disk.raw"))'"
        for words in [
            "list", "list --json", "list --names", "info web", "info --json web", "logs web", "--help", "list --help",
            "--version", "--version --verbose", "image info -f raw \(disk)", "image map -f raw \(disk)",
            "image create '\(home.directory("new.qcow2"))' 1M", "create db",
        ] {
            #expect(
                try run(words, into: ">/dev/full") == [
                    "swkvm: standard output cannot be written: No space left on device", "status=1",
                ], "\(words)")
        }
        // It was done all the same.
        #expect(try home.states == ["db stopped", "web stopped"])
        // A status that says more stays.
        #expect(try run("start none", into: ">/dev/full").last == "status=64")
    }

    /// A reader that has enough is no error.
    @Test func aClosedPipe() throws {
        try home.swkvm("create", "web", "--mem", "64M")
        for words in ["list", "info web", "--help"] {
            // The reader has gone before the first line.
            let lines = try shell(
                """
                export SWKVM_HOME='\(home.path)'; mkfifo '\(home.directory("pipe"))'
                exec 3<>'\(home.directory("pipe"))' 4>'\(home.directory("pipe"))' 3<&-
                '\(Host.swkvm)' \(words) 2>&1 >&4; echo status=$?; rm '\(home.directory("pipe"))'
                """)
            #expect(lines == "status=0\n", "\(words)")
        }
    }

    /// What is rotated away between two looks of `logs -f` is printed, too.
    @Test func aLogIsFollowedThroughRotations() throws {
        try home.swkvm("create", "web", "--mem", "64M")
        let log = home.path + "/machines/web/console.log"
        try shell("echo line 0 >'\(log)'")
        let logs = try home.start(["logs", "-f", "web"])
        defer { logs.send(signal: SIGTERM) }
        try logs.wait(for: "line 0\n")
        for round in 1...4 {
            // As a machine does it: a line, the copy, the file emptied, and more lines than there were before.
            try shell(
                """
                cd '\(home.path)/machines/web' && echo line \(round) >>console.log && cat console.log >console.log.1
                : >console.log && for n in 1 2 3 4 5 6 7 8 9; do echo after \(round).$n >>console.log; done
                """)
            try logs.wait(for: "after \(round).9\n")
        }
        let lines = logs.output.lines
        for round in 1...4 { #expect(lines.filter { $0 == "line \(round)" }.count == 1, "\(lines)") }
        #expect(lines.filter { $0.hasPrefix("after") }.count == 36, "\(lines)")
    }

    /// Messages of many starts do not fill the disk.
    @Test(.enabled(if: Host.isFit, Host.needed)) func messagesAreBounded() throws {
        try home.swkvm("create", "web", "--mem", "64M", "--kernel", home.directory("none"))
        let log = home.path + "/machines/web/messages.log"
        try shell("yes message | head -c 1M >'\(log)'")
        #expect(try home.swkvm("start", "web", status: 1).errors.text.contains("none"))
        #expect(try shell("wc -c <'\(log).1'") == "1048576\n")
        #expect(try shell("cat '\(log)'").contains("none"))
        let shown = try home.swkvm("logs", "--messages", "web").output.text
        #expect(shown.hasPrefix("message\n") && shown.contains("none"))
    }

    /// A file that is not there yet is no mistake, but perhaps one.
    @Test func filesThatAreNotThere() throws {
        let disk = home.directory("none.raw")
        for words in [["--disk", "\(disk),ro"], ["--kernel", disk], ["--kernel", disk, "--initrd", disk]] {
            let create = try home.start(["create", "web"] + words)
            #expect(try create.waitForEnd() == .status(0), "\(create.story)")
            #expect(create.errors.lines.first == "swkvm: web cannot start before \(disk) exists", "\(create.story)")
            try home.swkvm("delete", "web")
        }
        #expect(try home.swkvm("create", "web", "--disk", "nbd://127.0.0.1/x").errors.text.isEmpty)
    }

    /// A time that no machine has, in a definition that was changed by hand.
    @Test(.enabled(if: Host.isFit, Host.needed)) func aStopTimeoutOfManyDigits() throws {
        try home.swkvm("create", "web", "--mem", "64M", "--start")
        try shell("echo 'stop-timeout = 999999999999999999' >>'\(home.path)/definitions/web.toml'")
        try home.swkvm("stop", "web")
        #expect(try home.states == ["web stopped"])
        #expect(try home.swkvm("start", "web", status: 1).errors.text.contains("--stop-timeout"))
    }
}

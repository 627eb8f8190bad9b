// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// Machines in the background: defined, started, stopped and deleted by verbs, with nothing but files between them.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct MachineVerbTests {
    private let directory: TemporaryDirectory
    private var home: String { directory("home") }

    init() throws { directory = try TemporaryDirectory() }

    private func program(_ arguments: [String], input: Program.Stream = .null) throws -> Program {
        try Program(["env", "SWKVM_HOME=\(home)", "HOME=\(directory.path)", Host.swkvm] + arguments, input: input)
    }

    /// Runs a verb to its end.
    @discardableResult private func swkvm(
        _ arguments: String..., status: Int32 = 0, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> Program {
        let program = try program(arguments)
        #expect(try program.waitForEnd() == .status(status), "\(program.story)", sourceLocation: sourceLocation)
        return program
    }

    /// The machines as `list` shows them: name and state.
    private var states: [String] {
        get throws {
            try swkvm("list").output.lines.dropFirst().map { line in
                line.split(separator: " ").prefix(2).joined(separator: " ")
            }
        }
    }

    /// Ends what a test that failed has left.
    private func stopAll() { for name in ["web", "db"] { _ = try? program(["stop", "--force", name]).waitForEnd() } }

    @Test func aLife() throws {
        defer { stopAll() }
        #expect(try states == [])
        #expect(try swkvm("create", "web", "--mem", "64M", "--cpus", "2").output.text == "web: created\n")
        #expect(try states == ["web stopped"])
        #expect(try swkvm("start", "web").output.text == "web: started\n")
        #expect(try states == ["web running"])
        let info = try swkvm("info", "web").output.text
        #expect(info.contains("state:        running") && info.contains("--cpus 2"), "\(info)")
        // The guest powers off as it is asked to.
        #expect(try swkvm("stop", "web").output.text == "web: stopped\n")
        #expect(try states == ["web stopped"])
        let log = try swkvm("logs", "web").output.text
        #expect(log.contains("2 CPUs, 63 MiB") && log.contains("power button: powering off"), "\(log)")
        #expect(try swkvm("logs", "-n", "1", "web").output.lines.count == 1)
        #expect(try swkvm("logs", "--messages", "web").output.text.contains("asked the guest to power off"))
        // Twice, and once more from its end.
        try swkvm("restart", "web")
        try swkvm("restart", "web")
        #expect(try states == ["web running"])
        try swkvm("delete", "--force", "web")
        #expect(try states == [])
        #expect(try shell("find '\(home)' -name '*web*'").isEmpty)
    }

    @Test func nothingIsLeftAtTheEnd() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--start")
        #expect(try shell("ls '\(home)/run/web'").split(separator: "\n") == ["console"])
        try swkvm("stop", "web")
        #expect(try shell("ls -A '\(home)/run/web'").isEmpty)
        #expect(try shell("ls '\(home)/machines/web'").contains("pid") == false)
    }

    /// The lock, and not the file, tells whether a machine runs.
    @Test func aKilledMachineIsStoppedAndStartsAgain() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--start")
        let number = try #require(pid_t(try shell("cat '\(home)/machines/web/pid'").filter(\.isNumber)))
        #expect(kill(number, SIGKILL) == 0)
        while kill(number, 0) == 0 { usleep(10_000) }
        #expect(try states == ["web stopped"])
        #expect(try swkvm("stop", "web", status: 1).errors.text.contains("web is not running"))
        try swkvm("start", "web")
        #expect(try states == ["web running"])
    }

    /// Of several starts at once one has the machine.
    @Test func startsAtOnce() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M")
        let starts = try (0..<6).map { _ in try program(["start", "web"]) }
        let ends = try starts.map { try $0.waitForEnd() }
        #expect(ends.filter { $0 == .status(0) }.count == 1, "\(starts.map(\.story))")
        for (start, end) in zip(starts, ends) where end != .status(0) {
            #expect(end == .status(1) && start.errors.lines.count == 1, "\(start.story)")
            #expect(start.errors.text.contains("web is running") || start.errors.text.contains("another swkvm process"))
        }
        #expect(try states == ["web running"])
    }

    @Test func aStartThatFailsSaysWhy() throws {
        try swkvm("create", "web", "--mem", "64M", "--disk", directory("none.raw"))
        let start = try swkvm("start", "web", status: 1)
        #expect(start.errors.text.contains("none.raw") && start.errors.text.contains("No such file"), "\(start.story)")
        #expect(start.errors.text.contains("web was not started (status 66)"))
        #expect(try states == ["web stopped"])
        // A definition that somebody has spoiled.
        let definition = home + "/definitions/web.toml"
        _ = try shell("echo 'cpus = \"two\"' >'\(definition)'")
        let wrong = try swkvm("start", "web", status: 1).errors.text
        #expect(wrong.contains(definition) && wrong.contains("--cpus"), "\(wrong)")
        _ = try shell("echo 'cpus' >'\(definition)'")
        #expect(try swkvm("start", "web", status: 1).errors.text.contains("web.toml, line 1: expected '='"))
        #expect(try states == ["web invalid"])
        try swkvm("delete", "web")
    }

    @Test func whatIsRefused() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--start")
        for (arguments, status, sentence) in [
            (["create", "web"], 64, "there is a machine web already"),
            (["create", "../x"], 64, "'../x' is not a machine's name"), (["create"], 64, "expected the machine's name"),
            (["create", "db", "--cpus", "two"], 64, "--cpus"), (["create", "db", "--console", "stdio"], 64, "stdio"),
            (["create", "db", directory("none.qcow2")], 1, "No such file"),
            (["start", "db"], 64, "there is no machine db"), (["start", "web"], 1, "web is running"),
            (["delete", "web"], 1, "web is running"), (["stop", "db"], 64, "there is no machine db"),
            (["stop", "--timeout", "0", "web"], 64, "--timeout"), (["ssh", "web"], 1, "guest's port 22"),
            (["console", "db"], 64, "there is no machine db"), (["logs", "db"], 64, "there is no machine db"),
        ] as [([String], Int32, String)] {
            let program = try program(arguments)
            #expect(try program.waitForEnd() == .status(status), "\(program.story)")
            #expect(program.errors.text.contains(sentence), "\(program.story)")
        }
        // One of several: the others are stopped.
        let stop = try swkvm("stop", "db", "web", status: 64)
        #expect(stop.output.text == "web: stopped\n", "\(stop.story)")
        #expect(try states == ["web stopped"])
    }

    /// A guest that does not react: it has the time that was given, and is ended.
    @Test func aDeafGuestIsEnded() throws {
        defer { stopAll() }
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf), to: "kernel")
        try swkvm("create", "web", "--kernel", kernel, "--mem", "16M", "--start")
        try swkvm("stop", "--timeout", "2", "web")
        #expect(try states == ["web stopped"])
        #expect(try swkvm("logs", "--messages", "web").output.text.contains("signal"))
        try swkvm("start", "web")
        try swkvm("stop", "--force", "web")
        #expect(try states == ["web stopped"])
    }

    @Test func theConsole() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--start")
        let client = try program(["console", "web"], input: .pipe)
        try client.wait(for: Program.prompt)
        try client.type("echo some words\n")
        try client.wait(for: "\nsome words")
        // The second one sees what was printed before, and watches; then it has the keyboard.
        let second = try program(["console", "web"], input: .pipe)
        try second.wait(for: "\nsome words")
        try second.wait(for: "read-only: another client has the keyboard")
        try client.type("echo more words\n")
        try second.wait(for: "\nmore words")
        client.send(signal: SIGTERM)
        #expect(try client.waitForEnd() == .status(128 + SIGTERM), "\(client.story)")
        try second.wait(for: "the keyboard is yours now")
        try second.type("echo last words\n")
        try second.wait(for: "\nlast words")
        try swkvm("stop", "web")
        #expect(try second.waitForEnd() == .status(0), "\(second.story)")
        #expect(second.errors.text.contains("the machine has ended"), "\(second.story)")
        #expect(try swkvm("console", "web", status: 1).errors.text.contains("web is not running"))
    }

    @Test func theConsoleOfATerminal() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--start")
        let terminal = try PseudoTerminal()
        let client = try Program(
            ["env", "SWKVM_HOME=\(home)", Host.swkvm, "console", "web"], terminal: terminal)
        try client.wait(for: "Ctrl-] disconnects")
        try client.wait(for: Program.prompt)
        try client.type("\u{1d}")
        #expect(try client.waitForEnd() == .status(0), "\(client.story)")
        #expect(try states == ["web running"])
    }

    /// An image whose kernel is the bundled guest, which tests its disk, and this user's key.
    private func bootableImage() throws -> String {
        let key = String(repeating: "A", count: 43)
        _ = try shell(
            """
            export PATH=$PATH:/usr/sbin:/sbin; cd '\(directory.path)' && mkdir -p tree/boot/grub tree/etc .ssh
            cp '\(Host.guestKernel)' tree/boot/guest && echo 'ID="tiny"' >tree/etc/os-release && echo 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI\(key) x' >.ssh/id_ed25519.pub
            echo "menuentry 'One' { linux /boot/guest test=disk }" >tree/boot/grub/grub.cfg
            truncate -s 16M system && mkfs.ext4 -q -F -d tree system && qemu-img convert -f raw -O qcow2 system disk.qcow2
            """)
        return directory("disk.qcow2")
    }

    /// An image that boots, as a machine's own disk: changed in the overlay only, and still changed after a restart.
    @Test func anImage() throws {
        defer { stopAll() }
        let image = try bootableImage(), before = try readFile(image, limit: 1 << 30)
        let created = try swkvm("create", "web", image, "--mem", "64M", "--disk-size", "32M", "--net", "none").output
            .text
        #expect(
            created
                == "web: created; disk 32 MiB, an overlay over \(image), which must stay as it is; user tiny, SSH key \(directory.path)/.ssh/id_ed25519.pub\n"
        )
        let definition = try shell("cat '\(home)/definitions/web.toml'")
        #expect(definition.contains("disk = \"disk.qcow2,backing-dir=\(directory.path)\""), "\(definition)")
        #expect(definition.contains("boot = \"default\"") && definition.contains("user = \"tiny\""), "\(definition)")
        // The guest tests its disk, and powers off.
        try swkvm("start", "web")
        while try states == ["web running"] { usleep(50_000) }
        #expect(try swkvm("logs", "web").output.text.contains("vda"))
        #expect(try readFile(image, limit: 1 << 30) == before)
        let copied = try swkvm("create", "db", image, "--copy", "--disk-size", "20M", "--user", "me", "--net", "none")
            .output.text
        #expect(copied == "db: created; disk 20 MiB, a copy of \(image)\n")
        #expect(try shell("qemu-img info '\(home)/machines/db/disk.qcow2'").contains("backing") == false)
        // Nothing is left of one that cannot be.
        _ = try shell("echo no key >'\(directory("bad.pub"))'")
        let bad = try swkvm("create", "x", image, "--ssh-key", directory("bad.pub"), status: 1)
        #expect(bad.errors.text.contains("bad.pub, line 1, is not a public key"), "\(bad.story)")
        let small = try swkvm("create", "x", image, "--disk-size", "1M", status: 64)
        #expect(small.errors.text.contains("more than --disk-size 1 MiB"), "\(small.story)")
        #expect(try shell("find '\(home)' -name 'x*'").isEmpty)
    }

    /// Each machine has a port of its own for ssh.
    @Test func theNetworkOfAnImage() throws {
        let image = try bootableImage()
        for name in ["web", "db"] {
            let create = try Program(
                withoutNATPrograms + ["env", "SWKVM_HOME=\(home)", Host.swkvm, "create", name, image])
            #expect(try create.waitForEnd() == .status(0), "\(create.story)")
        }
        let ports = try ["web", "db"].map { name in
            let line = try shell("grep ^net '\(home)/definitions/\(name).toml'")
            return try #require(Int(line.drop { $0 != "h" }.filter(\.isNumber).dropLast(2)), "\(line)")
        }
        #expect(ports[0] != ports[1] && ports.allSatisfy { $0 >= 2222 })
        let list = try swkvm("list").output.text
        for port in ports { #expect(list.contains("127.0.0.1:\(port) → 22"), "\(list)") }
        // A host without the program says so, and the machine has none.
        let without = try Program(
            withoutNATPrograms + [
                "/usr/bin/env", "-i", "SWKVM_HOME=\(home)", "PATH=/nowhere", Host.swkvm, "create", "x", image,
            ])
        #expect(try without.waitForEnd() == .status(0), "\(without.story)")
        #expect(without.output.text.contains("no network: passt is not installed"), "\(without.story)")
        #expect(try shell("grep -c ^net '\(home)/definitions/x.toml' || true") == "0\n")
        // For root, a network of the host is the default.
        #expect(try swkvm("create", "nat", image).output.text.contains("network default of this host (--net nat)"))
        #expect(try shell("grep ^net '\(home)/definitions/nat.toml'") == "net = \"nat\"\n")
    }

    /// A `create` that is killed at any time leaves a machine, or nothing.
    @Test func createIsKilledAtAnyTime() throws {
        var generator = SeededGenerator(seed: UInt64(getpid()))
        for round in 0..<12 {
            let create = try program(["create", "m\(round)", "--mem", "64M", "--disk-size", "1G"])
            usleep(UInt32.random(in: 0...40_000, using: &generator))
            create.send(signal: SIGKILL)
            _ = try create.waitForEnd()
            _ = try swkvm("list")
            let isDefined =
                try shell("ls '\(home)/definitions' 2>/dev/null | grep -c '^m\(round).toml$' || true") == "1\n"
            let hasData = try shell("ls '\(home)/machines' 2>/dev/null | grep -c '^m\(round)$' || true") == "1\n"
            #expect(isDefined == hasData)
            if isDefined {
                #expect(try shell("qemu-img check '\(home)/machines/m\(round)/disk.qcow2'").contains("No errors"))
            }
        }
    }

    @Test func aChangedDefinition() throws {
        try swkvm("create", "web", "--mem", "64M")
        func edit(_ editor: String, status: Int32 = 0) throws -> Program {
            let program = try Program([
                "env", "SWKVM_HOME=\(home)", "VISUAL=\(editor)", Host.swkvm, "edit", "web",
            ])
            #expect(try program.waitForEnd() == .status(status), "\(program.story)")
            return program
        }
        #expect(try edit("true").output.text == "web: not changed\n")
        #expect(try edit("sed -i 's/64M/96M/'").output.text == "web: changed\n")
        #expect(try swkvm("info", "web").output.text.contains("--mem 96M"))
        #expect(try edit("false", status: 1).errors.text.contains("nothing was changed"))
        #expect(
            try edit("sed -i 's/mem/memory/'", status: 1).errors.text.contains(
                "nothing was changed, and your text is in"))
        #expect(try swkvm("info", "web").output.text.contains("--mem 96M"))
    }

    /// What an editor does to the text, or another one at the same time, loses nothing.
    @Test func anEditLosesNothing() throws {
        try swkvm("create", "web", "--mem", "64M")
        func edit(_ editor: String) throws -> Program {
            try Program(["env", "SWKVM_HOME=\(home)", "VISUAL=\(editor)", Host.swkvm, "edit", "web"])
        }
        for editor in ["rm", "truncate -s 0", "sed -i '$a name = \"x\"'", "sed -i '$a help = true'", "false"] {
            let program = try edit(editor)
            #expect(try program.waitForEnd() == .status(1), "\(program.story)")
            #expect(program.errors.text.contains("nothing was changed") && program.errors.lines.count == 1)
        }
        // The first one waits for the second, which is quicker.
        let first = try edit("sh -c 'while [ ! -e \(directory("done")) ]; do sleep 0.05; done; echo cpus = 2 >>$1' sh")
        let second = try edit("sed -i 's/64M/96M/'")
        #expect(try second.waitForEnd() == .status(0), "\(second.story)")
        try directory.write([], to: "done")
        #expect(try first.waitForEnd() == .status(1), "\(first.story)")
        #expect(first.errors.text.contains("changed by somebody else meanwhile"), "\(first.story)")
        let info = try swkvm("info", "web").output.text
        #expect(info.contains("--mem 96M") && !info.contains("--cpus"), "\(info)")
        // Its text is there.
        #expect(try shell("cat '\(home)'/machines/web/edited-*").contains("cpus = 2"))
    }

    /// A session with other run-time files, and one in which the process is not visible, lose no machine.
    @Test func otherSessionsSeeTheMachine() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--start")
        _ = try shell("mv '\(home)/run' '\(home)/run-of-a-session'")
        #expect(try states == ["web running"])
        try swkvm("delete", "web", status: 1)
        func elsewhere(_ words: String...) throws -> Program {
            try Program(
                ["unshare", "--pid", "--fork", "--mount-proc", "env", "SWKVM_HOME=\(home)", Host.swkvm] + words)
        }
        for verb in ["delete", "start", "stop", "restart", "console"] {
            let program = try elsewhere(verb, "web")
            #expect(try program.waitForEnd() == .status(1), "\(program.story)")
            #expect(program.errors.text.hasPrefix("swkvm: web runs on another host, or"), "\(program.story)")
        }
        let list = try elsewhere("list")
        try list.expectEnd(0)
        #expect(list.output.text.contains("web   elsewhere"), "\(list.story)")
        #expect(try states == ["web running"])
        try swkvm("stop", "web")
    }

    /// A machine that is stopped in its tracks is ended all the same.
    @Test func aMachineThatDoesNotReactIsKilled() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M", "--stop-timeout", "1", "--start")
        let number = try #require(pid_t(try shell("cat '\(home)/machines/web/pid'").filter(\.isNumber)))
        kill(number, SIGSTOP)
        let stop = try swkvm("stop", "--timeout", "1", "web")
        #expect(stop.errors.text.contains("web does not end, and is killed"), "\(stop.story)")
        #expect(try states == ["web stopped"])
    }

    @Test func directoriesOfOthersAreRefused() throws {
        defer { stopAll() }
        try swkvm("create", "web", "--mem", "64M")
        for name in ["definitions", "machines", ""] {
            _ = try shell("chmod 0777 '\(home)/\(name)'")
            #expect(try swkvm("start", "web", status: 1).errors.text.contains("others cannot write to"))
            #expect(try swkvm("create", "db", status: 1).errors.text.contains("others cannot write to"))
            _ = try shell("chmod 0700 '\(home)/\(name)'")
        }
        #expect(try states == ["web stopped"])
    }

    // MARK: swkvm run

    @Test func inTheBackground() throws {
        let log = directory("log"), pid = directory("pid"), socket = directory("socket")
        let words = ["--mem", "64M", "--daemon", log, "--pid-file", pid]
        let first = try Program.machine(words + ["--console", "unix:\(socket),log=\(directory("console"))"])
        try first.expectEnd(0)
        let number = try #require(pid_t(try shell("cat '\(pid)'").filter(\.isNumber)))
        defer { kill(number, SIGKILL) }
        // It is in a session of its own, and the file is locked.
        #expect(getsid(number) == number)
        let second = try Program.machine(words)
        #expect(try second.waitForEnd() == .status(71), "\(second.story)")
        #expect(second.errors.text.contains("\(pid) is locked by process \(number): the machine is running already"))
        while try !shell("cat '\(directory("console"))'").contains("type help") { usleep(50_000) }
        kill(number, SIGTERM)
        while kill(number, 0) == 0 { usleep(10_000) }
        #expect(try directory.contents.sorted() == ["console", "log"])
        #expect(try shell("cat '\(log)'").contains("asked the guest to power off"))
    }

    @Test func whatCannotBeInTheBackground() throws {
        let kernel = try directory.write([1, 2, 3], to: "kernel")
        let other = try directory.write(Array("12 notes\n".utf8), to: "notes")
        let wrong = try Program.machine(["--kernel", kernel, "--daemon", directory("log")])
        #expect(try wrong.waitForEnd() == .status(66), "\(wrong.story)")
        #expect(wrong.errors.text.contains(kernel), "\(wrong.story)")
        #expect(try shell("cat '\(directory("log"))'").contains(kernel))
        for (words, status, sentence) in [
            (["--daemon", directory("log"), "--console", "stdio"], 64, "--daemon and --console stdio"),
            (["--daemon", directory("none/log")], 66, "No such file"),
            (["--daemon", "/dev/null"], 64, "not a regular file"),
            (["--daemon", directory("log"), "--pid-file", directory("log")], 64, "use the same file"),
            (["--pid-file", directory("none/pid")], 66, "No such file"),
            (["--pid-file", "/dev/null"], 66, "not a regular"),
            (["--pid-file", other], 66, "\(other): it has other contents than a process ID"),
            (["--pid-file", kernel, "--kernel", kernel], 64, "use the same file"),
        ] as [([String], Int32, String)] {
            let machine = try Program.machine(words)
            #expect(try machine.waitForEnd() == .status(status), "\(machine.story)")
            #expect(machine.errors.text.contains(sentence), "\(machine.story)")
        }
        #expect(try shell("cat '\(other)'") == "12 notes\n")
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// The terminal that swkvm is started from: raw while the machine runs, and as before however it ends.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct TerminalTests {
    private let terminal: PseudoTerminal
    private let before: [UInt8]

    init() throws {
        terminal = try PseudoTerminal()
        before = terminal.mode
    }

    private func machineAtPrompt(_ arguments: [String] = []) throws -> Program {
        let machine = try Program.machineAtPrompt(arguments, terminal: terminal)
        #expect(terminal.isRaw && terminal.mode != before)
        return machine
    }

    private func expectRestored(sourceLocation: SourceLocation = #_sourceLocation) {
        #expect(terminal.mode == before, sourceLocation: sourceLocation)
    }

    // MARK: Ends

    @Test(arguments: [("poweroff", 0), ("reboot", 103), ("panic", 63), ("crash triple", 100)])
    func theGuestEnds(command: String, status: Int32) throws {
        let machine = try machineAtPrompt(["--on-reboot", "exit"])
        try machine.type(command + "\r")
        try machine.expectEnd(status)
        expectRestored()
    }

    @Test func oneSignal() throws {
        let machine = try machineAtPrompt()
        machine.send(signal: SIGTERM)
        try machine.wait(for: "swkvm: asked the guest to power off; a second signal ends the machine\r\n")
        try machine.expectEnd(0)
        expectRestored()
    }

    @Test func twoSignals() throws {
        let directory = try TemporaryDirectory()
        let machine = try Program.machine(
            ["--kernel", try directory.write(TinyKernel.elf(TinyKernel.deaf), to: "kernel")], terminal: terminal)
        #expect(try eventually { terminal.isRaw })
        machine.send(signal: SIGTERM)
        try machine.wait(for: "asked the guest to power off")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(143)
        expectRestored()
    }

    @Test func kill() throws {
        let machine = try machineAtPrompt()
        machine.send(signal: SIGKILL)
        #expect(try machine.waitForEnd() == .signal(SIGKILL))
        #expect(try eventually { terminal.mode == before })
    }

    /// What restores the terminal and the host is not named so that `pkill swkvm` kills it.
    @Test func theProcessesThatRestoreHaveOtherNames() throws {
        let host = try Namespace()
        try host.shell("ip tuntap add tap0 mode tap; ip link add br0 type bridge; ip link set br0 up")
        let machine = try Program.machineAtPrompt(["--net", "tap=tap0,bridge=br0"], in: host, terminal: terminal)
        let names = try shell(
            "for child in $(cat /proc/\(machine.pid)/task/*/children); do cat /proc/$child/comm; done")
        #expect(names.split(separator: "\n").sorted() == ["vm-broker", "vm-terminal"])
        machine.send(signal: SIGKILL)
        #expect(try machine.waitForEnd() == .signal(SIGKILL))
        #expect(try eventually { terminal.mode == before })
        #expect(try eventually { try !host.shell("ip -o link show dev tap0").contains("master br0") })
    }

    /// The whole process group is killed: the guardian of the terminal's mode is in another one.
    @Test func killOfTheGroup() throws {
        let machine = try machineAtPrompt()
        #expect(Glibc.kill(-machine.pid, SIGKILL) == 0)
        #expect(try machine.waitForEnd() == .signal(SIGKILL))
        #expect(try eventually { terminal.mode == before })
    }

    /// The terminal's window is closed: its processes get SIGHUP, and the guest is asked to power off.
    @Test func hangUp() throws {
        let machine = try machineAtPrompt()
        machine.send(signal: SIGHUP)
        try machine.wait(
            for:
                "asked the guest to power off; a second signal ends the machine, and so does a timeout of 90 seconds\r\n"
        )
        try machine.expectEnd(0)
        expectRestored()
    }

    /// An error is reported on a terminal whose mode was not changed.
    @Test func aMachineThatCannotStart() throws {
        let machine = try Program.machine(["--kernel", "/nonexistent"], terminal: terminal)
        try machine.expectEnd(66)
        // A cooked terminal makes the newline's carriage return itself, so there must be no second one.
        #expect(machine.output.text == "swkvm: cannot read /nonexistent: No such file or directory\r\n")
        expectRestored()
    }

    /// The terminal and its guardian stay the terminal's: no process is left.
    @Test func noProcessIsLeft() throws {
        let machine = try machineAtPrompt()
        let children = try shell("cat /proc/\(machine.pid)/task/*/children").split(separator: " ").compactMap {
            pid_t($0.filter(\.isNumber))
        }
        #expect(children.count == 1)
        try machine.type("poweroff\r")
        try machine.expectEnd(0)
        for child in children { #expect(Glibc.kill(child, 0) == -1 && errno == ESRCH) }
    }

    // MARK: Lines

    @Test func oneLineSaysWhatBootsAndHowToLeave() throws {
        let machine = try machineAtPrompt()
        try machine.type("poweroff\r")
        try machine.expectEnd(0)
        #expect(
            machine.output.text.contains(
                "swkvm: the bundled guest boots; Ctrl-A x ends the machine, Ctrl-A h shows help\r\n"),
            "\(machine.output.text)")

        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf), to: "vmlinux")
        let silent = try Program.machine(["--kernel", kernel, "--initrd", kernel], terminal: terminal)
        try silent.wait(
            for:
                "swkvm: \(kernel) (a 64-bit ELF file, entered as Linux is) with \(kernel) boots; Ctrl-A x ends the machine, Ctrl-A h shows help\r\n"
        )
        try silent.type("\u{1}x")
        try silent.waitForEnd()
    }

    @Test func preallocShowsItsProgress() throws {
        let machine = try Program.machine(
            ["--mem", "256M", "--prealloc", "--cmdline", "test=none"], terminal: terminal)
        try machine.expectEnd(0)
        let text = machine.output.text
        #expect(text.hasPrefix("\rguest memory: 0.0%  0 B of 256 MiB"), "\(text)")
        // It goes when the memory is there.
        // What comes behind it, the guest's first line or ours, is not in a certain order.
        let blank =
            text.split(separator: "\r", omittingEmptySubsequences: true).first { !$0.hasPrefix("guest memory") } ?? ""
        #expect(!blank.isEmpty && blank.allSatisfy { $0 == " " }, "\(text)")
        let other = try Program.machine(["--mem", "256M", "--cmdline", "test=none"], terminal: terminal)
        try other.expectEnd(0)
        #expect(!other.output.text.contains("guest memory"))
    }

    // MARK: Keys

    @Test func ctrlAXEndsTheMachine() throws {
        let machine = try machineAtPrompt()
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
        #expect(machine.output.text.hasSuffix("swkvm: ended at the console\r\n"))
        expectRestored()
    }

    @Test func ctrlAHHelps() throws {
        let machine = try machineAtPrompt()
        try machine.type("\u{1}h")
        for line in [
            "Ctrl-A x  end the machine\r\n", "Ctrl-A c  show the machine's counters\r\n", "Ctrl-A h  this help\r\n",
        ] {
            try machine.wait(for: "swkvm: " + line)
        }
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
    }

    @Test func ctrlACShowsTheCounters() throws {
        let directory = try TemporaryDirectory()
        let disk = try directory.write([UInt8](repeating: 1, count: 4096), to: "disk.raw")
        let machine = try machineAtPrompt(["--name", "mine", "--cpus", "2", "--disk", disk])
        _ = try machine.ask("sum vda 0 8")
        try machine.type("\u{1}c")
        try machine.wait(for: "swkvm: machine mine: 2 vCPUs, ")
        try machine.wait(for: " MiB resident, ")
        try machine.wait(for: " dirty")
        try machine.wait(for: "\r\ndevice  requests")
        try machine.wait(for: "drops\r\nblk0")
        try machine.wait(for: "-\r\n")
        let cells =
            machine.output.text.split(separator: "\r\n").last { $0.hasPrefix("blk0") }?.split(separator: " ") ?? []
        // What was read, and nothing written; the data path: a queue's notification is an ioeventfd's, never an exit to
        // user space.
        #expect(
            cells.count == 9 && cells[2] == "4096B" && cells[3] == "0B" && cells[5] == "0" && cells[7] == "0",
            "\(cells)")
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
    }

    /// Keys that a cooked terminal keeps for itself are the guest's.
    @Test func ctrlCIsTheGuests() throws {
        let machine = try machineAtPrompt()
        try machine.type("half a line\u{3}")
        try machine.wait(for: "^C")
        #expect(try machine.ask("echo whole") == ["whole"])
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
    }

    /// However many keys the guest does not take, those for swkvm come through.
    @Test func ctrlAComesThroughBehindManyKeys() throws {
        let machine = try machineAtPrompt()
        try machine.type("\u{1}p")
        try machine.wait(for: "the machine is paused")
        for _ in 0..<70 { try machine.type(String(repeating: "k", count: 1024)) }
        try machine.wait(
            for: "the guest has not read the last 64 KiB of keys; further ones are dropped until it has\r\n")
        try machine.type("\u{1}p")
        try machine.wait(for: "the machine is running")
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
    }

    /// Ctrl-A and the second key may come in two reads.
    @Test func ctrlAAndItsKeyApart() throws {
        let machine = try machineAtPrompt()
        try machine.type("\u{1}")
        #expect(machine.isRunning)
        try machine.type("x")
        try machine.expectEnd(104)
    }

    @Test func ctrlAXEndsAGuestThatDoesNotListen() throws {
        let directory = try TemporaryDirectory()
        for code in [TinyKernel.deaf, TinyKernel.busy, TinyKernel.talking] {
            let kernel = try directory.write(TinyKernel.elf(code), to: "kernel")
            let machine = try Program.machine(["--kernel", kernel], terminal: terminal)
            #expect(try eventually { terminal.isRaw })
            try machine.type("typed ahead, more than the port holds: 0123456789\u{1}x")
            try machine.expectEnd(104)
            expectRestored()
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// `--sandbox`: what is in force in a running machine, and that it does not miss anything.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct SandboxTests {
    /// A field of `/proc/PID/task/*/status`, one value for each thread.
    private func values(of field: String, in process: pid_t) throws -> Set<String> {
        let script = "sed -n 's/^\(field):[[:space:]]*//p' /proc/\(process)/task/*/status"
        let program = try Program(["sh", "-euc", script])
        try program.expectEnd(0)
        return Set(program.output.lines.filter { !$0.isEmpty })
    }

    /// Also those that were there before: of a console's file, of metrics, of messages.
    @Test(arguments: [false, true]) func everyThreadIsConfined(hasEarlyThreads: Bool) throws {
        let directory = try TemporaryDirectory()
        let early = hasEarlyThreads ? ["--metrics", directory("metrics"), "--log-level", "debug"] : []
        let machine = try Program.machineAtPrompt(["--sandbox", "on", "--cpus", "2", "--rng"] + early)
        #expect(try values(of: "Seccomp", in: machine.pid) == ["2"])
        #expect(try values(of: "NoNewPrivs", in: machine.pid) == ["1"])
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] where geteuid() == 0 {
            #expect(try values(of: set, in: machine.pid) == ["0000000000000000"], "\(set)")
        }
        if geteuid() == 0 {
            for set in ["Uid", "Gid"] {
                #expect(try values(of: set, in: machine.pid) == ["65534\t65534\t65534\t65534"])
            }
            #expect(try values(of: "Groups", in: machine.pid).allSatisfy { $0.allSatisfy { $0 == " " } })
        }
        try machine.type("poweroff\n")
        #expect(try machine.waitForEnd() == .status(0))
    }

    @Test(.enabled(if: geteuid() == 0, "only root changes its user")) func whoAMachineIs() throws {
        let directory = try TemporaryDirectory()
        let disk = try directory.write(Array(repeating: 0, count: 1 << 20), to: "disk.raw")
        try Program(["chown", "4321:1234", disk]).expectEnd(0)
        for (arguments, uid, gid) in [
            (["--disk", disk], "4321", "1234"), (["--run-as", "77:88", "--disk", disk], "77", "88"),
            (["--metrics", directory("m.prom"), "--metrics-format", "prometheus"], "0", "0"),
            (["--sandbox", "capabilities,landlock,seccomp"], "0", "0"), (["--sandbox", "on,user"], "65534", "65534"),
        ] {
            let machine = try Program.machineAtPrompt(arguments)
            #expect(try values(of: "Uid", in: machine.pid) == [[uid, uid, uid, uid].joined(separator: "\t")])
            #expect(try values(of: "Gid", in: machine.pid) == [[gid, gid, gid, gid].joined(separator: "\t")])
            try machine.powerOff()
        }
    }

    @Test(.enabled(if: geteuid() == 0, "an ordinary user may have no namespaces"))
    func namespacesOfItsOwn() throws {
        let machine = try Program.machineAtPrompt(["--sandbox", "on,namespaces"])
        for kind in ["mnt", "net", "ipc", "uts", "cgroup"] {
            let links = try Program(["readlink", "/proc/self/ns/\(kind)", "/proc/\(machine.pid)/ns/\(kind)"])
            try links.expectEnd(0)
            #expect(Set(links.output.lines.filter { !$0.isEmpty }).count == 2, "\(kind): \(links.output.text)")
        }
        // Nothing is in its root.
        let listing = try Program(["ls", "-A", "/proc/\(machine.pid)/root"])
        try listing.expectEnd(0)
        #expect(listing.output.text.isEmpty)
        try machine.type("reboot\n")
        try machine.wait(for: Program.prompt)
        try machine.powerOff()
    }

    /// The process that keeps the rights to remove it does so.
    @Test(arguments: ["--console", "--gdb"], [SIGTERM, SIGKILL])
    func aSocketGoesHoweverTheMachineEnds(option: String, signal: Int32) throws {
        let directory = try TemporaryDirectory()
        let machine = try Program.machine([option, "unix:" + directory("socket"), "--stop-timeout", "0"])
        try machine.waitForError(option == "--gdb" ? "target remote" : "the console is the socket")
        #expect(try eventually { try values(of: "Seccomp", in: machine.pid) == ["2"] })
        machine.send(signal: signal)
        _ = try machine.waitForEnd()
        #expect(try eventually { try directory.contents.isEmpty })
    }

    @Test func whatTheOptionsDoNotTake() throws {
        let unknown = try Program.machine(["--sandbox", "on,firewall"])
        try unknown.expectEnd(64)
        let without = try Program.machine(["--sandbox", "off", "--run-as", "1:1"])
        try without.expectEnd(64)
    }

    @Test func theProcessGivesUpWhatItDoesNotNeed() throws {
        let null = try FileDescriptor.open("/dev/null", O_RDWR)
        let machine = try Program.machineAtPrompt(["--sandbox", "on"], passing: [(null.rawValue, 9)])
        let files = "/proc/\(machine.pid)"
        #expect(access("\(files)/fd/9", F_OK) != 0)
        #expect(access("\(files)/fd/2", F_OK) == 0)
        #expect(try values(of: "Umask", in: machine.pid) == ["0077"])
        let limits = try Program(["cat", "\(files)/limits"])
        try limits.expectEnd(0)
        func limit(_ name: String) -> [Substring] {
            let line = limits.output.lines.first { $0.hasPrefix(name) } ?? ""
            return Array(line.dropFirst(name.count).split(separator: " ").prefix(2))
        }
        #expect(limit("Max core file size") == ["0", "0"])
        let open = limit("Max open files")
        #expect(open.count == 2 && open[0] == open[1], "\(open)")
        try machine.powerOff()
    }

    /// Metrics that are replaced are for a collector, which may be another user.
    @Test func filesForACollectorAreReadable() throws {
        let directory = try TemporaryDirectory()
        let metrics = directory("swkvm.prom")
        let machine = try Program.machineAtPrompt([
            "--sandbox", "on", "--metrics", metrics, "--metrics-format", "prometheus",
        ])
        try machine.powerOff()
        let listing = try Program(["stat", "-c", "%a", metrics])
        try listing.expectEnd(0)
        #expect(listing.output.lines == ["644"])
    }

    @Test func theStatusKeyShowsIt() throws {
        let machine = try Program.machineAtPrompt(["--sandbox", "on"], terminal: try PseudoTerminal())
        try machine.type("\u{1}c")
        try machine.wait(for: ", sandbox on (")
        try machine.wait(for: "seccomp)")
        try machine.powerOff()
    }

    @Test func withoutItThereIsNone() throws {
        let machine = try Program.machineAtPrompt(["--sandbox", "off"])
        #expect(try values(of: "Seccomp", in: machine.pid) == ["0"])
        try machine.powerOff()
    }

    @Test(arguments: ["mmio", "pci"], ["report", "on"])
    func theGuestsAttacksNeedNoOtherCalls(bus: String, mode: String) throws {
        let directory = try TemporaryDirectory()
        let disk = directory("disk.raw")
        try Program(["truncate", "-s", "64M", disk]).expectEnd(0)
        let machine = try Program.machine([
            "--sandbox", mode, "--bus", bus, "--cmdline", "test=all", "--disk", disk, "--rng", "--cpus", "2",
        ])
        try machine.expectEnd(0)
        #expect(!machine.errors.text.contains("sandbox"), "\(machine.errors.text)")
    }

    /// A guest's first access to a port can need a call that nothing else does: that of the interval timer makes it.
    @Test(arguments: ["mmio", "pci"], ["report", "on"])
    func everyPortNeedsNoOtherCalls(bus: String, mode: String) throws {
        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.portSweeper), to: "kernel")
        let machine = try Program.machine([
            "--sandbox", mode, "--bus", bus, "--rng", "--console", "none", "--kernel", kernel,
        ])
        try machine.expectEnd(42)
        #expect(!machine.errors.text.contains("sandbox"), "\(machine.errors.text)")
    }

    /// With the interval timer, whose state is read and written.
    @Test func aPauseOfTheIntervalTimerNeedsNoOtherCalls() throws {
        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.timerUser), to: "kernel")
        let machine = try Program.machine(["--sandbox", "on", "--kernel", kernel], terminal: try PseudoTerminal())
        try machine.wait(for: "t")
        for _ in 0..<2 {
            try machine.type("\u{1}p")
            try machine.wait(for: "swkvm: the machine is paused")
            try machine.type("\u{1}r")
            try machine.wait(for: "swkvm: the machine is running")
        }
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
    }

    @Test func aGuestThatRebootsIsStillConfined() throws {
        let machine = try Program.machineAtPrompt(["--sandbox", "on", "--cpus", "2"])
        try machine.type("reboot\n")
        try machine.wait(for: Program.prompt)
        #expect(try values(of: "Seccomp", in: machine.pid) == ["2"])
        try machine.powerOff()
    }
}

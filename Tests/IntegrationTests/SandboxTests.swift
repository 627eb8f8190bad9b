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

    @Test func everyThreadHasAFilter() throws {
        let machine = try Program.machineAtPrompt(["--sandbox", "on", "--cpus", "2", "--rng"])
        #expect(try values(of: "Seccomp", in: machine.pid) == ["2"])
        #expect(try values(of: "NoNewPrivs", in: machine.pid) == ["1"])
        try machine.powerOff()
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
        try machine.wait(for: ", sandbox on")
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

    @Test func aGuestThatRebootsIsStillConfined() throws {
        let machine = try Program.machineAtPrompt(["--sandbox", "on", "--cpus", "2"])
        try machine.type("reboot\n")
        try machine.wait(for: Program.prompt)
        #expect(try values(of: "Seccomp", in: machine.pid) == ["2"])
        try machine.powerOff()
    }
}

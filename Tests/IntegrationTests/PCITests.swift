// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Devices that are PCI functions, with MSI-X, as the bundled guest's drivers use them.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct PCITests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    private func disk(_ name: String, megabytes: Int = 8) throws -> String {
        try directory.write([UInt8](repeating: 0, count: megabytes << 20), to: name)
    }

    /// Reads, writes, several queues, random numbers, and drivers that break every rule.
    @Test(arguments: [1, 2]) func theGuestsOwnTests(cpus: Int) throws {
        let machine = try Program.machine([
            "--bus", "pci", "--cpus", "\(cpus)", "--disk", try disk("one.raw"), "--disk",
            try disk("two.raw") + ",queues=3", "--rng",
            "--cmdline", "test=all,hostile",
        ])
        try machine.expectSelfTestsPassed(skipped: ["no network device"])
    }

    @Test func theGuestsNetworkTests() throws {
        let host = try Namespace()
        let peer = try Program.machineAtPrompt(
            ["--bus", "pci", "--name", "peer", "--net", "tap=tap0,bridge=br0,create"], words: "ip=192.168.77.2/24",
            in: host)
        try host.shell("ip addr add 192.168.77.1/24 dev br0")
        #expect(try host.shell("ping -q -c 200 -i 0.002 -W 10 192.168.77.2").contains("200 received"))
        let machine = try Program.machine(
            [
                "--bus", "pci", "--net", "tap=tap1,bridge=br0", "--cmdline",
                "test=net,hostile ip=192.168.77.3/24 peer=192.168.77.2",
            ], in: host)
        try machine.expectSelfTestsPassed()
        #expect(try peer.ask("ping 192.168.77.1 1").last == "1 of 1 came back")
        try peer.powerOff()
    }

    /// A reset makes another board: BARs, masks and routes are as after power-on.
    @Test func afterAReboot() throws {
        let machine = try Program.machineAtPrompt([
            "--kernel", "bundled", "--bus", "pci", "--disk", try disk("disk.raw"), "--rng",
        ])
        let sum = try machine.ask("sum vda 0 8")
        for _ in 0..<3 {
            try machine.type("reboot\n")
            try machine.wait(for: "swkvm guest\r\n")
            try machine.wait(for: Program.prompt)
            #expect(try machine.ask("sum vda 0 8") == sum)
        }
        try machine.powerOff()
    }

    /// Exits are those of setting up: notifications are ioeventfds, and interrupts need none.
    @Test func logAndTraceNameTheFunctions() throws {
        let path = try disk("disk.raw")
        let machine = try Program.machine(
            ["--bus", "pci", "--disk", path, "--log-level", "info", "--cmdline", "run=disks", "--trace", "exits"])
        let end = try machine.waitForEnd()
        #expect(end == .status(0), "\(machine.story)")
        #expect(machine.errors.text.contains("blk0 at PCI 00:01.0"), "\(machine.story)")
        #expect(machine.errors.text.contains("blk0 configuration+0x"), "\(machine.story)")
        #expect(!machine.errors.text.contains("blk0+0x3000"), "a notification by an exit: \(machine.story)")
    }

    @Test func whatCannotBeTogether() throws {
        let machine = try Program.machine(["--bus", "pci", "--discovery", "cmdline"])
        try machine.expectEnd(64)
        #expect(machine.errors.text.contains("requires --bus mmio"), "\(machine.story)")
        let many = try Program.machine(["--bus", "pci"] + (0..<65).flatMap { _ in ["--disk", "none.raw"] })
        let end = try many.waitForEnd()
        #expect(end != .status(0) && many.errors.text.contains("a machine has 64 slots"), "\(many.story)")
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// What is changed about a running machine by commands, at the terminal's prompt and by the debugger.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct ControlTests {
    private let directory: TemporaryDirectory
    private let host: Namespace
    private let terminal: PseudoTerminal

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
        terminal = try PseudoTerminal()
    }

    private func machine(_ arguments: [String]) throws -> Program {
        try Program.machineAtPrompt(arguments, words: "ip=192.168.77.2/24", in: host, terminal: terminal)
    }

    private func command(_ command: String, _ answer: String, _ machine: Program) throws {
        try machine.type("\u{1}:\(command)\r")
        try machine.wait(for: "(swkvm) \(command)")
        try machine.wait(for: "swkvm: \(answer)")
    }

    /// The guest sees the link go down, and no frame passes until it is up again.
    @Test func theLink() throws {
        let machine = try machine(["--net", "tap=tap0"])
        try host.shell("ip addr add 192.168.77.1/24 dev tap0")
        func ping() throws -> String { try host.shell("ping -q -c 2 -i 0.2 -W 2 192.168.77.2 || true") }
        #expect(try ping().contains("2 received"))
        for _ in 0..<3 {
            try command("link net0 down", "the link of net0 is down", machine)
            #expect(try machine.ask("net").first?.contains("link down") == true)
            #expect(try ping().contains("0 received"))
            try command("link net0 up", "the link of net0 is up", machine)
            #expect(try machine.ask("net").first?.contains("link up") == true)
            // The host may have stopped asking for the guest's address, and asks again a second later.
            #expect(try eventually { try ping().contains("2 received") })
        }
        // The host's interface has to be up as well.
        try command("link net0 down", "the link of net0 is down", machine)
        try host.shell("ip link set tap0 down")
        try command("link net1 up", "there is no network interface 'net1'; there is: net0", machine)
        try host.shell("ip link set tap0 up")
        try command("link net0 up", "the link of net0 is up", machine)
        try machine.type("\r")
        try machine.powerOff()
    }

    @Test(arguments: ["raw", "qcow2"], [1, 3]) func aDiskIsMadeLonger(format: String, queues: Int) throws {
        let path = directory("disk.\(format)")
        try shell("\(Host.swkvm) image create \(path) 4M")
        let machine = try machine(["--disk", "\(path),queues=\(queues)"])
        #expect(try machine.ask("disks").first?.hasPrefix("vda: 8192 sectors") == true)
        #expect(try machine.ask("read vda 8192").last?.contains("reading sector 8192") == true)
        try command("resize blk0 8M", "blk0 has 8388608 bytes now (4194304 before)", machine)
        // An interrupt notified it: it does not look otherwise.
        #expect(try machine.ask("disks").first?.hasPrefix("vda: 16384 sectors") == true)
        #expect(try machine.ask("write vda 16383 the last sector").last == "written")
        #expect(try machine.ask("read vda 16383").first?.contains("the last sector") == true)
        try command("resize blk0 4M", "disk \"\(path)\"", machine)
        try machine.wait(for: "a disk cannot shrink while its guest runs")
        try command("resize blk0 1000", "disk", machine)
        try command("resize blk7 8M", "there is no disk 'blk7'; there is: blk0", machine)
        if format == "raw" {
            try shell("truncate -s 16M \(path)")
            try command("resize blk0", "blk0 has 16777216 bytes now (8388608 before)", machine)
            #expect(try machine.ask("disks").first?.hasPrefix("vda: 32768 sectors") == true)
        } else {
            try command("resize blk0", "disk", machine)
            try machine.wait(for: "changes by itself")
        }
        try machine.type("\r")
        try machine.powerOff()
        #expect(try shell("\(Host.swkvm) image info \(path)").contains(format == "raw" ? "16 MiB" : "8 MiB"))
        if format == "qcow2" { try shell("qemu-img check -q \(path)") }
    }

    /// What the host's queue cannot hold in a pause is among the counters, and in the log.
    @Test func framesThatAPausedMachineLoses() throws {
        let machine = try machine(["--net", "tap=tap0"])
        try host.shell("ip addr add 192.168.77.1/24 dev tap0; ip link set tap0 txqueuelen 10")
        #expect(try host.shell("ping -q -c 1 -W 2 192.168.77.2 || true").contains("1 received"))
        try command("pause", "the machine is paused", machine)
        try host.shell("ping -f -q -c 200 -w 3 192.168.77.2 || true")
        try machine.type("\u{1}c")
        try machine.wait(for: "drops\r\nnet0")
        try machine.wait(for: "\r\n")
        let cells = machine.output.text.split(separator: "\r\n").last { $0.hasPrefix("net0") }?.split(separator: " ")
        #expect(cells?.last.flatMap { Int($0) }.map { $0 > 50 } == true, "\(machine.output.tail)")
        try command("resume", "the machine is running", machine)
        try machine.type("\r")
        try machine.powerOff()
        #expect(
            machine.output.text.contains("net0: a frame for the guest was dropped by tap0, mostly"),
            "\(machine.output.tail)")
    }

    /// By so much that the disk's thread has other turns meanwhile; the end comes through afterwards.
    @Test(arguments: ["20G", "1T"], [1, 2]) func aDiskIsMadeMuchLonger(size: String, queues: Int) throws {
        let path = directory("disk.qcow2"), bytes = size == "1T" ? 1 << 40 : 20 << 30
        try shell("\(Host.swkvm) image create \(path) 64M")
        let machine = try machine(["--disk", "\(path),queues=\(queues)"])
        try command("resize blk0 \(size)", "blk0 has \(bytes) bytes now (67108864 before)", machine)
        #expect(try machine.ask("disks").first?.hasPrefix("vda: \(bytes / 512) sectors") == true)
        #expect(try machine.ask("write vda \(bytes / 512 - 1) the last sector").last == "written")
        try machine.type("\r")
        try machine.powerOff()
        try shell("qemu-img check -q \(path)")
    }

    @Test func thePrompt() throws {
        let machine = try machine([])
        try command("help", "help                show this list", machine)
        try machine.wait(for: "resize DISK [SIZE]")
        try command("pause", "the machine is paused", machine)
        try command("status", "", machine)
        try command("resume", "the machine is running", machine)
        try command("resume", "the machine is not paused", machine)
        try command("nonsense", "unknown command 'nonsense'; `help` lists the commands", machine)
        // Given up: the guest gets what comes after.
        try machine.type("\u{1}:quit\u{3}\r")
        #expect(try machine.ask("echo still there").last == "still there")
        try machine.type("\u{1}:quit\r")
        try machine.expectEnd(104)
    }

    /// The steps of drivers and of the control, and only at level trace.
    @Test(arguments: ["trace", "debug"]) func theLogAtLevelTrace(level: String) throws {
        let machine = try Program.machineAtPrompt(["--rng", "--log-level", level])
        machine.send(signal: SIGUSR2)
        try machine.waitForError("swkvm: the machine is not paused")
        try machine.powerOff()
        for sentence in [
            "rng0: the driver writes 0x1 to the status, which is 0x0", "rng0: the driver accepted the features ",
            "rng0: queue 0 is ready, with ", "control: resume was refused: the machine is not paused",
        ] {
            #expect(machine.errors.text.contains("swkvm: trace: \(sentence)") == (level == "trace"), "\(sentence)")
        }
    }
}

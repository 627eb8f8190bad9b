// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// Machines beside each other.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct ManyTests {
    @Test func twentyAtOnce() throws {
        let host = try Namespace()
        try host.shell("ip link add br0 type bridge; ip addr add 192.168.77.1/24 dev br0; ip link set br0 up")
        let directory = try TemporaryDirectory()
        let numbers = 10..<30
        let machines = try numbers.map { number in
            let disk = try directory.write([UInt8](repeating: UInt8(number), count: 64 << 10), to: "\(number).raw")
            return try Program.machine(
                [
                    "--name", "machine \(number)", "--mem", "64M", "--disk", disk, "--net",
                    "tap=tap\(number),bridge=br0", "--cmdline",
                    "ip=192.168.77.\(number)/24",
                ], input: .pipe, in: host)
        }
        for machine in machines { try machine.wait(for: Program.prompt) }
        #expect(try host.linkNames().count == 21)
        for (number, machine) in zip(numbers, machines) {
            #expect(try host.shell("ping -c 1 -W 10 192.168.77.\(number)").contains("1 received"))
            let other = number == 29 ? 10 : number + 1
            #expect(try machine.ask("ping 192.168.77.\(other) 1").last == "1 of 1 came back")
            let sum = hexadecimal(crc32(repeatElement(UInt8(number), count: 64 << 10)))
            #expect(try machine.ask("sum vda 0 128") == ["crc32 vda 0 128 \(sum)"])
        }
        // Half of them are asked to end, half are killed.
        for (number, machine) in zip(numbers, machines) { machine.send(signal: number % 2 == 0 ? SIGTERM : SIGKILL) }
        for (number, machine) in zip(numbers, machines) {
            let end = try machine.waitForEnd()
            #expect(end == (number % 2 == 0 ? .status(0) : .signal(SIGKILL)), "\(machine.story)")
        }
        #expect(try eventually { try host.linkNames() == ["br0"] })
    }

    /// One after the other, with all that a machine can have: each releases its resources for the next.
    @Test func fiftyInARow() throws {
        let host = try Namespace()
        let directory = try TemporaryDirectory()
        let disk = try directory.write([UInt8](repeating: 0, count: 64 << 10), to: "disk.raw")
        for _ in 0..<50 {
            try Program.machine(
                ["--disk", disk, "--net", "tap=tap0,bridge=br0,create", "--cpus", "2", "--cmdline", "test=none"],
                in: host
            ).expectEnd(0)
        }
        #expect(try host.linkNames().isEmpty)
    }
}

/// Everything at once.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct SelfTestTests {
    @Test func allWithDisksAndNetwork() throws {
        let host = try Namespace()
        try host.shell("ip link add br0 type bridge; ip addr add 192.168.77.1/24 dev br0; ip link set br0 up")
        let directory = try TemporaryDirectory()
        try shell("cd '\(directory.path)'; truncate -s 64M scratch.raw; qemu-img create -q -f qcow2 disk.qcow2 1G")
        let pool = try HugePagePool(.twoMiB, free: 128)
        let available = try pool.available
        let peer = try Program.machineAtPrompt(
            ["--name", "peer", "--net", "tap=tap1,bridge=br0"], words: "ip=192.168.77.3/24", in: host)
        let machine = try Program.machine(
            [
                "--mem", "256M", "--hugepages", "--cpus", "2", "--disk", directory("scratch.raw"), "--disk",
                directory("disk.qcow2") + ",ro",
                "--net", "tap=tap0,bridge=br0,mac=52:54:00:12:34:56", "--rng", "--cmdline",
                "test=all ip=192.168.77.2/24 peer=192.168.77.3",
            ], in: host)
        try machine.expectSelfTestsPassed()
        for subject in ["memory", "cpus", "timer", "irq", "disk vda", "disk vdb", "net ", "rng", "hostile"] {
            #expect(
                machine.output.lines.contains { $0.hasPrefix("ok ") && $0.contains(subject) }, "no test of \(subject)")
        }
        try peer.powerOff()
        #expect(try eventually { try host.linkNames() == ["br0"] })
        #expect(try pool.available == available)
    }

    @Test(arguments: [["--rng"], ["--rng=max-bytes=8K,period=20"], ["--rng", "--shared", "--cpus", "3"]])
    func randomNumbers(options: [String]) throws {
        try Program.machine(["--mem", "64M", "--cmdline", "test=rng"] + options).expectSelfTestsPassed()
    }

    /// The same ELF on another monitor: what the guest needs of swkvm is no secret handshake.
    @Test func qemuBootsTheSameELF() throws {
        let qemu = try Program([
            "qemu-system-x86_64", "-M", "microvm,rtc=on", "-cpu", "max", "-accel", "tcg", "-m", "128M", "-smp", "2",
            "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0x501,iosize=1",
            "-kernel", Host.guestKernel,
            "-append", "test=memory,irq",
        ])
        // isa-debug-exit makes 2 N + 1 of a status N.
        try qemu.expectEnd(1)
        #expect(qemu.output.lines.contains { $0.hasPrefix("ok 1 - memory") })
        #expect(!qemu.output.text.contains("not ok"))
    }
}

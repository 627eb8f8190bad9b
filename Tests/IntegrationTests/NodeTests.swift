// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// The guest's NUMA nodes. What a guest makes of them is the lab's affair: stock kernels read the tables.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct NodeTests {
    @Test(
        .enabled(
            if: access("/sys/devices/system/node/node0", F_OK) == 0,
            "the host's kernel knows of no NUMA nodes (CONFIG_NUMA)"))
    func theMemoryOfANodeComesFromTheHostsNode() throws {
        let machine = try Program.machineAtPrompt([
            "--mem", "192M", "--cpus", "2", "--numa", "mem=64M,cpus=0", "--numa", "mem=128M,cpus=1,host=0,policy=bind",
        ])
        // The second node's memory is a mapping of its own behind the first one's.
        let maps = try shell("cat /proc/\(machine.pid)/numa_maps").split(separator: "\n").filter {
            $0.split(separator: " ").dropFirst().first == "bind:0"
        }
        #expect(maps.count == 1, "\(maps)")
        try machine.powerOff()
    }

    /// Three sockets' APIC IDs are not the numbers from 0 on.
    @Test func cpusOfUnequalSocketsAllRun() throws {
        let machine = try Program.machine([
            "--mem", "128M", "--cpus", "5", "--numa", "mem=64M,cpus=0,cpus=2,cpus=4", "--numa", "mem=64M,cpus=1,cpus=3",
            "--cmdline", "test=cpus,irq",
        ])
        try machine.expectSelfTestsPassed()
    }

    @Test(arguments: [
        (
            ["--numa", "mem=64M,cpus=0", "--numa", "mem=64M"],
            "the NUMA nodes have 128 MiB in all, the machine 512 MiB: give `--mem 128MiB`"
        ),
        (
            ["--mem", "128M", "--cpus", "2", "--numa", "mem=128M,cpus=0"],
            "CPU 1 is in no NUMA node: name it in one, cpus=1"
        ),
        (["--mem", "128M", "--numa", "mem=128M,cpus=0,host=4000"], "this host has no NUMA node 4000, it has "),
        (
            ["--mem", "128M", "--numa", "mem=128M,cpus=0,distance=1:20"],
            "NUMA node 0 has a distance to node 1; expected another one of the nodes 0 to 0"
        ),
    ])
    func whatCannotBeIsOneSentence(arguments: [String], sentence: String) throws {
        let machine = try Program.machine(arguments)
        try machine.expectEnd(arguments.contains { $0.contains("host=") } ? 71 : 64)
        #expect(
            machine.errors.lines.count == 1 && machine.errors.text.hasPrefix("swkvm: \(sentence)"),
            "\(machine.errors.text)")
    }
}

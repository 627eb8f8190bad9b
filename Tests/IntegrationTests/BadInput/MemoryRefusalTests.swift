// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// Sizes of memory and numbers of vCPUs that cannot be, or that the host lacks.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct MemoryRefusalTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    @Test func memoryLargerThanTheHosts() throws {
        let size = Host.memorySize >> 30 + 1000
        try expectRefused(["--mem", "\(size)G"], "\(size) GiB of guest memory exceeds what this host has")
        for size in ["16777215T", "17179869183G"] { try expectRefused(["--mem", size], "") }
    }

    @Test func memoryOfSizeZero() throws {
        try expectRefused(["--mem", "0"], "guest memory cannot be 0 bytes", status: Status.usage)
    }

    @Test func memoryThatIsNoMultipleOfItsPages() throws {
        try expectRefused(
            ["--mem", "67108865"], "67108865 bytes of guest memory is not a multiple of its 4 KiB pages",
            status: Status.usage)
        try expectRefused(
            ["--mem", "65M", "--hugepages"], "\(65 << 20) bytes of guest memory is not a multiple of its 2 MiB pages",
            status: Status.usage)
    }

    @Test(arguments: ["", "M", "-1", "1.5", "12X", "0x10", "99999999999999999999", "16777216T", " 1G"])
    func memorySizeThatIsNone(size: String) throws {
        try expectRefused(["--mem=\(size)"], "", status: Status.usage)
    }

    @Test func tooFewHugePages() throws {
        let pool = try HugePagePool(.twoMiB, free: 0)
        let (available, total) = (try pool.available, try pool.total)
        let pages = available + 512
        try expectRefused(["--mem", "\(pages * 2)M", "--hugepages"], "")
        let machine = try Program.machine(["--mem", "\(pages * 2)M", "--hugepages"])
        try machine.expectEnd(71)
        #expect(
            machine.errors.text.contains(
                "needs \(pages) huge pages, \(available) are free: `sysctl vm.nr_hugepages=\(total + 512)`"))
        #expect(try pool.available == available && pool.total == total)
    }

    @Test func numbersOfCPUs() throws {
        try expectRefused(["--cpus", "0"], "0 vCPUs were requested, a machine needs at least 1", status: Status.usage)
        try expectRefused(["--cpus=-1"], "-1 vCPUs were requested, a machine needs at least 1", status: Status.usage)
        try expectRefused(["--cpus", "5000"], "5000 vCPUs were requested, but this host's KVM allows ")
        try expectRefused(["--cpus", "9223372036854775807"], "9223372036854775807 vCPUs were requested")
        try expectRefused(["--cpus", "two"], "", status: Status.usage)
    }
}

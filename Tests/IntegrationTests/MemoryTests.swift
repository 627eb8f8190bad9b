// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Guest RAM of every size and kind.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct MemoryTests {
    /// Around the hole below 4 GiB, and more than a machine of the tests' own size has touched.
    @Test(arguments: ["64M", "128M", "512M", "1G", "2G", "3G", "3073M", "4G", "8G"]) func sizes(size: String) throws {
        let machine = try Program.machine(["--mem", size, "--cmdline", "test=memory"])
        try machine.expectSelfTestsPassed()
    }

    @Test func theGuestSeesAllOfIt() throws {
        let machine = try Program.machineAtPrompt(["--mem", "5G"])
        let line = try #require(try machine.ask("mem").first { $0.contains("KiB RAM") })
        let size = try #require(Int(line.prefix { $0.isNumber }))
        // All but the platform's own pages below 1 MiB.
        #expect(size <= 5 << 20 && size > 5 << 20 - 1024)
        try machine.powerOff()
    }

    @Test(arguments: [
        [], ["--shared"], ["--prealloc"], ["--shared", "--prealloc"], ["--hugepages=thp"],
        ["--hugepages=thp", "--prealloc"], ["--hugepages=off"],
    ])
    func kinds(options: [String]) throws {
        let machine = try Program.machine(["--mem", "192M", "--cpus", "2", "--cmdline", "test=memory,cpus"] + options)
        try machine.expectSelfTestsPassed()
    }

    @Test func sharedMemoryIsAFile() throws {
        let machine = try Program.machineAtPrompt(["--shared"])
        #expect(try shell("cat /proc/\(machine.pid)/maps").contains("/memfd:"))
        try machine.powerOff()
    }

    @Test(arguments: [[], ["--shared"], ["--hugepages=thp"]]) func preallocatedMemoryIsThereAtTheStart(
        options: [String]
    ) throws {
        let size = 96 << 20
        let machine = try Program.machineAtPrompt(["--mem", "96M", "--prealloc"] + options)
        let resident = try shell("awk '/^Rss/ { print $2 }' /proc/\(machine.pid)/smaps_rollup")
        #expect(Int(resident.prefix { $0.isNumber })! << 10 >= size)
        try machine.powerOff()
    }

    /// Filling gigabytes takes its time, and nobody has to wait for its end.
    @Test(arguments: [SIGINT, SIGTERM, SIGHUP]) func aSignalEndsPreallocation(signal: Int32) throws {
        let machine = try Program.machine(["--mem", "6G", "--prealloc"])
        func resident() throws -> Int {
            Int(try shell("awk '/^VmRSS/ { print $2 }' /proc/\(machine.pid)/status").prefix { $0.isNumber }) ?? 0
        }
        #expect(try eventually { try resident() > 100 << 10 })
        machine.send(signal: signal)
        try machine.expectEnd(128 + signal)
        #expect(
            machine.errors.text == "swkvm: ended by signal \(signal) before the guest started\n"
                && machine.output.bytes.isEmpty)
    }

    /// The guest's own 64 MiB and no more: an ordinary guest takes what it touches.
    @Test func otherMemoryComesWhenItIsTouched() throws {
        let machine = try Program.machineAtPrompt(["--mem", "4G"])
        let resident = try shell("awk '/^Rss/ { print $2 }' /proc/\(machine.pid)/smaps_rollup")
        #expect(Int(resident.prefix { $0.isNumber })! << 10 < 64 << 20)
        try machine.powerOff()
    }

    /// KiB of the guest's RAM in the order of its addresses, and whether the kernel is asked for huge pages there.
    @Test(arguments: [
        ([], "4096 no 61440 yes"), (["--hugepages=thp"], "65536 yes"), (["--hugepages=off"], "65536 no"),
    ]) func hugePagesThatTheKernelIsAskedFor(options: [String], expected: String) throws {
        let machine = try Program.machineAtPrompt(["--mem", "64M"] + options)
        let mappings = try shell(
            """
            awk '/^[0-9a-f]+-/ { anonymous = $2 == "rw-p" && NF == 5 } /^Size:/ { size = $2 }
                /^VmFlags:/ && anonymous && / dd( |$)/ && (size == 4096 || size >= 61440) {
                    printf "%s%d %s", separator, size, / hg( |$)/ ? "yes" : "no"; separator = " " }' /proc/\(machine.pid)/smaps
            """)
        #expect(mappings == expected)
        try machine.powerOff()
    }

    /// A second after the start, code and constants that only the start needed are not resident; the guest goes on.
    @Test func theMemoryOfTheStartIsFreed() throws {
        let machine = try Program.machineAtPrompt(["--mem", "128M"])
        /// KiB of the read-only mappings of the program's file.
        func program() throws -> Int {
            let sum = try shell(
                """
                awk '/^[0-9a-f]+-/ { counts = ($2 == "r-xp" || $2 == "r--p") && $6 ~ "^/" } /^Rss:/ && counts { sum += $2 }
                    END { print sum + 0 }' /proc/\(machine.pid)/smaps
                """)
            return try #require(Int(sum.prefix { $0.isNumber }))
        }
        var size = 0
        let isSmall = try eventually {
            size = try program()
            return size <= 1024
        }
        #expect(isSmall, "\(size) KiB")
        #expect(try machine.ask("mem").contains { $0.contains("KiB RAM") })
        try machine.powerOff()
    }

    @Test func theEndTellsHowMuchWasInTransparentHugePages() throws {
        let machine = try Program.machine(["--mem", "64M", "--hugepages=thp", "--prealloc", "--cmdline", "test=none"])
        try machine.expectEnd(0)
        #expect(machine.errors.text.contains("MiB in transparent huge pages, of 64 MiB resident"))
    }

    @Test func theStatusLineTellsOfTransparentHugePages() throws {
        let terminal = try PseudoTerminal()
        let machine = try Program.machineAtPrompt(["--hugepages=thp", "--prealloc"], terminal: terminal)
        try machine.type("\u{1}c")
        try machine.wait(for: "1 vCPU, 64 MiB of RAM (64 MiB resident")
        try machine.wait(for: "MiB in transparent huge pages")
        try machine.type("poweroff\n")
        try machine.expectEnd(0)
    }
}

/// Huge pages are the host's, and these tests take them in turn.
@Suite(.timed, .serialized, .enabled(if: Host.isFit, Host.needed)) struct HugePageTests {
    @Test(arguments: [[], ["--prealloc"], ["--shared"], ["--shared", "--prealloc"]]) func areReservedUsedAndGivenBack(
        options: [String]
    ) throws {
        let pool = try HugePagePool(.twoMiB, free: 64)
        let (available, total) = (try pool.available, try pool.total)
        let machine = try Program.machineAtPrompt(["--mem", "128M", "--hugepages"] + options)
        #expect(try pool.available == available - 64)
        try machine.powerOff()
        #expect(try pool.available == available)
        try Program.machine(["--mem", "128M", "--hugepages", "--cmdline", "test=memory"] + options)
            .expectSelfTestsPassed()
        #expect(try pool.available == available && pool.total == total)
    }

    @Test func areGivenBackAfterKill() throws {
        let pool = try HugePagePool(.twoMiB, free: 32)
        let available = try pool.available
        let terminal = try PseudoTerminal()
        // With a terminal, so that its guardian is there: it must not hold on to them.
        let machine = try Program.machineAtPrompt(["--hugepages", "--prealloc"], terminal: terminal)
        #expect(try pool.available == available - 32)
        machine.send(signal: SIGKILL)
        #expect(try machine.waitForExit() == .signal(SIGKILL))
        #expect(try eventually { try pool.available == available })
    }

    @Test func ofOneGiB() throws {
        // A host that has been up for long may have no such piece, whatever is free.
        guard let pool = try? HugePagePool(.oneGiB, free: 1) else {
            return withKnownIssue("no GiB of memory in one piece is free here") { Issue.record("not tried") }
        }
        let available = try pool.available
        try Program.machine(["--mem", "1G", "--hugepages=1G", "--cmdline", "test=memory"]).expectSelfTestsPassed()
        #expect(try pool.available == available)
    }

    @Test func tooFewAreAnErrorWithTheNumbers() throws {
        let pool = try HugePagePool(.twoMiB, free: 3)
        let (available, total) = (try pool.available, try pool.total)
        let wanted = available + 29
        let machine = try Program.machine(["--mem", "\(wanted * 2)M", "--hugepages"])
        try machine.expectEnd(71)
        #expect(machine.errors.lines.count == 1)
        #expect(machine.errors.text.hasPrefix("swkvm: "))
        #expect(
            machine.errors.text.contains(
                " in 2 MiB pages needs \(wanted) huge pages, \(available) are free: `sysctl vm.nr_hugepages=\(total + 29)`"
            ))
        #expect(machine.output.bytes.isEmpty)
        #expect(try pool.available == available && pool.total == total)
    }
}

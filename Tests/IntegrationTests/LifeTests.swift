// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// How machines start and end, and what the exit status says of it.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct LifeTests {
    @Test func bootsToTheExit() throws {
        let machine = try Program.machine(["--cmdline", "test=none"])
        try machine.expectEnd(0)
        #expect(machine.output.text == "swkvm guest\r\n")
        #expect(machine.errors.bytes.isEmpty)
    }

    /// The bundled guest and its ELF file are the same.
    @Test func bootsTheGuestFromAFile() throws {
        let machine = try Program.machine(["--kernel", Host.guestKernel, "--cmdline", "test=none"])
        try machine.expectEnd(0)
        #expect(machine.output.text == "swkvm guest\r\n")
    }

    @Test func bootsWithAnInitialRAMDisk() throws {
        let directory = try TemporaryDirectory()
        let disk = try directory.write([UInt8](repeating: 7, count: 300_000), to: "initrd")
        try Program.machine(["--kernel", Host.guestKernel, "--initrd", disk, "--cmdline", "test=memory"])
            .expectSelfTestsPassed()
    }

    @Test func bootsA64BitELFWithoutNotes() throws {
        let directory = try TemporaryDirectory()
        // mov dx, 0x501; mov al, 42; out dx, al
        let kernel = try directory.write(
            TinyKernel.elf([0x66, 0xba, 0x01, 0x05, 0xb0, 42, 0xee, 0xeb, 0xfe]), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel])
        try machine.expectEnd(42)
        #expect(machine.errors.text == "swkvm: the guest ended with status 42\n")
    }

    @Test func endsWithTheGuestsStatus() throws {
        let machine = try Program.machineAtPrompt()
        try machine.type("panic\n")
        try machine.expectEnd(63)
        #expect(machine.errors.text == "swkvm: the guest ended with status 63\n")
    }

    @Test func failedSelfTestsAreTheStatus() throws {
        let machine = try Program.machine(["--cmdline", "test=bogus"])
        try machine.expectEnd(1)
        #expect(machine.output.lines.contains { $0.hasPrefix("not ok 1 - bogus") })
    }

    @Test func endsFromThePrompt() throws {
        let machine = try Program.machineAtPrompt()
        try machine.powerOff()
        #expect(machine.errors.bytes.isEmpty)
    }

    /// Reset and power-off with other CPUs halted, and with other CPUs running.
    @Test(arguments: [("poweroff", 0), ("reboot", 103)]) func endsWithManyCPUs(command: String, status: Int32) throws {
        let machine = try Program.machineAtPrompt(["--cpus", "4", "--on-reboot", "exit"])
        #expect(try machine.ask("cpus").filter { $0.hasSuffix("works") }.count == 3)
        try machine.type(command + "\n")
        try machine.expectEnd(status)
    }

    @Test(arguments: [1, 2, 4, 8]) func startsAllCPUs(count: Int) throws {
        let machine = try Program.machine(["--cpus", "\(count)", "--mem", "128M", "--cmdline", "test=cpus,timer,irq"])
        try machine.expectSelfTestsPassed()
        #expect(machine.output.text.contains("all \(count) respond"))
    }

    /// As many as a whole byte of local APIC IDs names, which is more than most hosts have.
    @Test func startsAsManyCPUsAsLocalAPICsHaveIDs() throws {
        let machine = try Program.machine(["--cpus", "200", "--cmdline", "test=none"])
        try machine.expectEnd(0)
    }

    // MARK: Crashes

    private func expectRegisters(_ machine: Program, sourceLocation: SourceLocation = #_sourceLocation) {
        for register in ["rip ", "rfl ", "rax ", "rsp ", "r15 ", "cr0 ", "cr3 ", "efer "] {
            #expect(machine.errors.text.contains(register), "\(machine.errors.text)", sourceLocation: sourceLocation)
        }
    }

    @Test func aTripleFaultShowsTheRegistersAndTheWayToADebugger() throws {
        let machine = try Program.machine(["--cmdline", "crash=triple"])
        try machine.expectEnd(100)
        #expect(machine.errors.text.hasPrefix("swkvm: vCPU 0 shut down (triple fault)"))
        expectRegisters(machine)
        #expect(machine.errors.lines.last?.contains("`--gdb PORT`") == true, "\(machine.errors.text)")
        // The guest's values, but on AMD-V, where KVM says that it has none.
        let isReset = machine.errors.text.contains("KVM resets the vCPU")
        #expect(isReset == machine.errors.text.contains("rip 000000000000fff0"), "\(machine.errors.text)")
    }

    /// Where KVM runs ring 0 natively there is no such instruction: the guest says so.
    @Test func internalError() throws {
        let machine = try Program.machine(["--cmdline", "crash=internal run=help"])
        let end = try machine.waitForEnd()
        if machine.output.text.contains("ring 0 runs natively here") { return }
        #expect(end == .status(101), "\(machine.story)")
        let lines = machine.errors.lines
        #expect(lines.first == "swkvm: KVM stopped vCPU 0 with an internal error: it cannot emulate the instruction")
        expectRegisters(machine)
        // popcnt rax, rax
        #expect(lines.last?.contains("instruction bytes at rip: f3 48 0f b8 c0") == true)
    }

    /// A fault in the guest is the guest's own business: it reports it and ends with a status.
    @Test func faultInTheGuest() throws {
        let machine = try Program.machine(["--cmdline", "crash=null"])
        try machine.expectEnd(62)
        #expect(machine.output.text.contains("fault: page fault, vector 14"))
    }

    // MARK: Signals

    @Test(arguments: [SIGTERM, SIGINT]) func aSignalAsksTheGuestToPowerOff(number: Int32) throws {
        let machine = try Program.machineAtPrompt()
        machine.send(signal: number)
        try machine.expectEnd(0)
        #expect(machine.output.text.contains("power button"))
        #expect(machine.errors.text.hasPrefix("swkvm: asked the guest to power off; a second signal ends the machine"))
        #expect(machine.errors.lines.count == 1)
    }

    @Test(arguments: [TinyKernel.deaf, TinyKernel.busy, TinyKernel.talking], [SIGTERM, SIGINT])
    func aSecondSignalEndsAGuestThatDoesNotListen(code: [UInt8], number: Int32) throws {
        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(code), to: "kernel")
        let machine = try Program.machine([
            "--kernel", kernel, "--console", code == TinyKernel.talking ? "stdio" : "none",
        ])
        try machine.waitUntilRunning()
        machine.send(signal: number)
        try machine.waitForError("asked the guest to power off")
        machine.sendOneMore(signal: number)
        try machine.expectEnd(128 + number)
        #expect(machine.errors.lines.last == "swkvm: ended by signal \(number) before the guest powered off")
    }

    /// Many at once, and while the machine starts: none may be lost or kill it the raw way.
    @Test func aSignalWhileItStarts() throws {
        for _ in 0..<10 {
            let machine = try Program.machine(["--console", "none"])
            machine.send(signal: SIGTERM)
            // Before the signals are blocked it is the kernel that ends the process, later the guest powers off.
            let end = try machine.waitForEnd()
            #expect(end == .status(0) || end == .signal(SIGTERM), "\(machine.story)")
        }
    }
}

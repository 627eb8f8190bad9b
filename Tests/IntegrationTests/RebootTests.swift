// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// A guest that reboots boots again, with nothing left of the boot before but what a PC keeps.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct RebootTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    /// Counts its boots in CMOS RAM, which a battery keeps, and resets itself by the keyboard controller until there
    /// were three; ends with status 7. Where RAM is not zero, as it should be after a reset, with status 1.
    private static let counting: [UInt8] = [
        0xb0, 0x50, 0xe6, 0x70, 0xe4, 0x71,  // mov al, 0x50; out 0x70, al; in al, 0x71
        0x3c, 0x03, 0x73, 0x1f, 0xfe, 0xc0, 0xe6, 0x71,  // cmp al, 3; jae done; inc al; out 0x71, al
        0x83, 0x3c, 0x25, 0, 0, 0x40, 0, 0, 0x75, 0x15,  // cmp dword [0x400000], 0; jne bad
        0xc7, 0x04, 0x25, 0, 0, 0x40, 0, 1, 0, 0, 0,  // mov dword [0x400000], 1
        0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe,  // mov al, 0xfe; out 0x64, al; jmp .
        0xb0, 7, 0xeb, 2,  // done: mov al, 7; jmp exit
        0xb0, 1,  // bad: mov al, 1
        0x66, 0xba, 0x01, 0x05, 0xee, 0xeb, 0xfe,  // exit: mov dx, 0x501; out dx, al; jmp .
    ]
    /// Resets itself at once.
    private static let looping: [UInt8] = [0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe]

    @Test(arguments: [[], ["--prealloc"], ["--shared"], ["--hugepages=thp"], ["--cpus", "3"], ["--mem", "5G"]])
    func memoryIsZeroAndTheClocksMemoryIsKept(arguments: [String]) throws {
        let kernel = try directory.write(TinyKernel.elf(Self.counting), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel, "--console", "none"] + arguments)
        try machine.expectEnd(7)
    }

    @Test(arguments: [[], ["--prealloc"], ["--shared"]]) func hugePagesAreZeroAndStay(arguments: [String]) throws {
        let pool = try HugePagePool(.twoMiB, free: 32)
        let kernel = try directory.write(TinyKernel.elf(Self.counting), to: "kernel")
        let machine = try Program.machine(
            ["--kernel", kernel, "--console", "none", "--mem", "64M", "--hugepages"] + arguments)
        try machine.expectEnd(7)
        withExtendedLifetime(pool) {}
    }

    /// TAP, disks and console are the ones from before, and the host sees none of them go.
    @Test func disksInterfacesAndConsoleStay() throws {
        let host = try Namespace()
        let disk = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        let machine = try Program.machineAtPrompt(
            ["--kernel", "bundled", "--cpus", "2", "--disk", disk, "--net", "tap=tap0,bridge=br0,create", "--rng"],
            words: "ip=192.168.127.2/24", in: host)
        try host.shell("ip addr add 192.168.127.1/24 dev br0")
        let index = try host.shell("ip -o link show dev tap0 | cut -d: -f1")
        for _ in 0..<3 {
            #expect(try machine.ask("ping 192.168.127.1 1").last == "1 of 1 came back")
            let sum = try machine.ask("sum vda 0 8")
            try machine.type("reboot\n")
            try machine.wait(for: "swkvm guest\r\n")
            try machine.wait(for: Program.prompt)
            #expect(try machine.ask("sum vda 0 8") == sum)
            #expect(try machine.ask("cpus").contains("CPU 1: works"))
            #expect(try host.shell("ip -o link show dev tap0 | cut -d: -f1") == index)
        }
        try machine.powerOff()
        #expect(machine.errors.bytes.isEmpty, "\(machine.story)")
    }

    @Test func withOnRebootExitItEndsWithAStatusOfItsOwn() throws {
        let machine = try Program.machineAtPrompt(["--on-reboot", "exit"])
        try machine.type("reboot\n")
        try machine.expectEnd(103)
        #expect(machine.errors.text == "swkvm: the guest rebooted (--on-reboot exit)\n")
    }

    /// A triple fault resets a system that was up, and says so; one before any device was used ends the machine.
    @Test func aTripleFaultOfASystemThatWasUp() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", disk])
        _ = try machine.ask("sum vda 0 1")
        try machine.type("crash triple\n")
        try machine.waitForError("vCPU 0 shut down (triple fault)")
        try machine.waitForError("instruction bytes at rip: ")
        try machine.waitForError("`--gdb PORT`")
        try machine.wait(for: "swkvm guest\r\n")
        try machine.wait(for: Program.prompt)
        try machine.powerOff()
        let exiting = try Program.machineAtPrompt(["--disk", disk, "--on-reboot", "exit"])
        _ = try exiting.ask("sum vda 0 1")
        try exiting.type("crash triple\n")
        try exiting.expectEnd(100)
    }

    /// Triple faults one after the other: each boot waits longer for its turn, and nothing is said twice.
    @Test(arguments: [true, false]) func aLoopOfTripleFaults(endsBySignal: Bool) throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        let terminal = endsBySignal ? nil : try PseudoTerminal()
        let machine = try Program.machine(
            ["--mem", "64M", "--kernel", "bundled", "--disk", disk, "--cmdline", "run='read vda 0; crash triple'"],
            terminal: terminal)
        func wait(for text: String) throws {
            if endsBySignal { try machine.waitForError(text) } else { try machine.wait(for: text) }
        }
        for text in ["; it is reset\(endsBySignal ? "" : "\r")\n", "; it is reset in 1 s", "; it is reset in 2 s"] {
            try wait(for: text)
        }
        try wait(for: "; it is reset in 4 s")
        // Signals and keys come through meanwhile.
        if endsBySignal {
            machine.send(signal: SIGTERM)
            try machine.expectEnd(0)
            #expect(machine.errors.text.hasSuffix("the guest rebooted instead of powering off: the machine ends\n"))
        } else {
            try machine.type("\u{1}x")
            try machine.expectEnd(104)
        }
        let said = endsBySignal ? machine.errors.text : machine.output.text
        #expect(said.ranges(of: "instruction bytes at rip: ").count == 1, "\(machine.story)")
    }

    /// A guest that resets itself at once, for ever, is one that signals and keys end.
    @Test(arguments: [1, 2]) func aLoopOfRebootsEndsBySignals(cpus: Int) throws {
        let kernel = try directory.write(TinyKernel.elf(Self.looping), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel, "--cpus", "\(cpus)", "--console", "none"])
        try machine.waitUntilRunning()
        usleep(300_000)
        #expect(machine.isRunning, "\(machine.story)")
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
        #expect(machine.errors.text.hasSuffix("swkvm: the guest rebooted instead of powering off: the machine ends\n"))
    }

    @Test func aLoopOfRebootsEndsByTheConsolesKeys() throws {
        let terminal = try PseudoTerminal()
        let kernel = try directory.write(TinyKernel.elf(Self.looping), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel], terminal: terminal)
        #expect(try eventually { terminal.isRaw })
        try machine.type("\u{1}x")
        try machine.expectEnd(104)
        #expect(!terminal.isRaw)
    }

    /// The kernel's file is the one that was opened at the start, whatever has its name now.
    @Test func theKernelIsTheOneFromTheStart() throws {
        let kernel = try directory.write(try readFile(Host.guestKernel, limit: 16 << 20), to: "kernel")
        let machine = try Program.machineAtPrompt(["--kernel", kernel])
        #expect(unlink(kernel) == 0)
        try machine.type("reboot\n")
        try machine.wait(for: "swkvm guest\r\n")
        try machine.wait(for: Program.prompt)
        try machine.powerOff()
    }

    /// A kernel that was written over cannot boot again: the machine ends, and says why.
    @Test func aKernelThatWasCutShortMeanwhile() throws {
        let kernel = try directory.write(try readFile(Host.guestKernel, limit: 16 << 20), to: "kernel")
        let machine = try Program.machineAtPrompt(["--kernel", kernel])
        #expect(truncate(kernel, 100) == 0)
        try machine.type("reboot\n")
        try machine.expectEnd(66)
        #expect(machine.errors.text.contains("\(kernel) is truncated"), "\(machine.story)")
    }

    /// A debugger that is there finds the next boot at its first instruction; without one the guest boots on.
    @Test func withADebugger() throws {
        let socket = directory("gdb")
        let machine = try Program.machine(["--mem", "64M", "--gdb", "unix:" + socket], input: .pipe)
        try machine.waitForError("target remote")
        do {
            let visitor = DebugConnection(try connect(toSocket: socket))
            #expect(try visitor.ask("vMustReplyEmpty") == "")
            try visitor.put("vCont;c")
            try machine.wait(for: Program.prompt)
            try machine.type("reboot\n")
            #expect(try visitor.next() == "W67")
        }
        try machine.waitForError("target remote")
        let next = DebugConnection(try connect(toSocket: socket))
        #expect(try next.ask("?") == "T02thread:1;")
        #expect(try next.ask("D") == "OK")
        #expect(next.isAtEnd())
        try machine.wait(for: Program.prompt)
        try machine.type("reboot\n")
        try machine.wait(for: Program.prompt)
        try machine.powerOff()
    }
}

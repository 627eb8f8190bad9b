// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// `--gdb`: the real GDB, and a debugger that says what no GDB would.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct DebuggerTests {
    private let directory: TemporaryDirectory
    private var socket: String { directory("gdb") }

    init() throws { directory = try TemporaryDirectory() }

    /// A machine whose guest waits for a debugger.
    private func waitingMachine(_ arguments: [String] = [], words: String = "test=none") throws -> Program {
        let machine = try Program.machine(["--gdb", "unix:" + socket, "--mem", "64M", "--cmdline", words] + arguments)
        try machine.waitForError("the guest waits at its first instruction for a debugger: target remote \(socket)\n")
        return machine
    }

    /// GDB with the bundled guest's symbols, connected; it carries out the commands and detaches at the end.
    private func gdb(_ commands: [String]) throws -> String {
        let all = ["set confirm off", "target remote \(socket)"] + commands
        let gdb = try Program(
            ["gdb", "-nx", "-batch", Host.package + "/guests/kernel/build/guest.symbols.elf"]
                + all.flatMap { ["-ex", $0] })
        try gdb.waitForEnd()
        return gdb.output.text + gdb.errors.text
    }

    // MARK: GDB

    @Test func registersMemoryAndThreads() throws {
        let machine = try waitingMachine(["--cpus", "2"])
        let text = try gdb([
            "info threads", "info registers", "print/x $mxcsr", "print $xmm0.uint128", "print $st0", "x/i $pc",
            "x/4xb &gdt", "x/x 0xd0000000",
            "set $rax = 0x1122334455667788", "print/x $rax", "set $xmm3.uint128 = 77", "print $xmm3.uint128",
            "set $st1 = 2.5", "print $st1",
            "set {int}0x200000 = 0x12345678", "print/x *(int *)0x200000", "monitor physical 0x200000 4",
            "monitor translate 0x200000",
            "monitor translate 0xdead00000000beef", "monitor help", "monitor info", "monitor cpus", "monitor nonsense",
            "set $rax = 0", "detach",
        ])
        for wanted in [
            "in entry64 ()", "* 1    Thread 1 (vCPU 0, running)", "  2    Thread 2 (vCPU 1, waits for INIT)",
            "cr0            0x80010033",
            "[ PE MP ET NE WP PG ]", "efer           0x500               [ LME LMA ]", "$1 = 0x1f80", "=> ",
            "<entry64>:",
            "Cannot access memory at address 0xd0000000", "= 0x1122334455667788", "= 77\n", "= 2.5\n", "= 0x12345678",
            "0x200000: 78 56 34 12",
            "0x200000 is at 0x200000", "0xdead00000000beef is not mapped", "press the power button", "2 vCPUs",
            "vCPU 1: waits for INIT",
            "'nonsense' is not recognized", "[Inferior 1 (Remote target) detached]",
        ] { #expect(text.contains(wanted), "\(wanted) is missing in:\n\(text)") }
        try machine.expectEnd(0)
        #expect(machine.output.text == "swkvm guest\r\n")
        #expect(try !directory.contents.contains("gdb"), "the socket is still there")
    }

    /// In ring 0, which KVM interprets on some hosts and runs natively on the others: both kinds of breakpoints and
    /// steps work there.
    @Test(arguments: ["break", "hbreak"]) func breakpointsAndSteps(kind: String) throws {
        let machine = try waitingMachine()
        let text = try gdb([
            "stepi", "info symbol $pc", "\(kind) outputService", "continue", "print (long)$rcx", "x/s $rsi",
            "x/2xb outputService", "stepi",
            "info symbol $pc", "delete", "continue",
        ])
        for wanted in [
            "entry64 + 5 in section", "Breakpoint 1, 0x", "in outputService ()", "$1 = 13", "\"swkvm guest\\r\\n\"",
            "<outputService>:\t0xf3\t0x6e",
            "outputService + 2 in section", "exited normally]",
        ] { #expect(text.contains(wanted), "\(wanted) is missing in:\n\(text)") }
        try machine.expectEnd(0)
        #expect(machine.output.text == "swkvm guest\r\n")
    }

    @Test func theGuestsStatusIsGDBs() throws {
        let machine = try waitingMachine(words: "test=bogus")
        #expect(try gdb(["continue"]).contains("exited with code 01]"))
        try machine.expectEnd(1)
    }

    /// A last look at a vCPU that cannot go on.
    @Test func aTripleFaultCanBeLookedAt() throws {
        let machine = try waitingMachine(words: "crash=triple")
        let text = try gdb(["continue", "info registers rip", "continue"])
        for wanted in ["vCPU 0 shut down (triple fault)", "received signal SIGABRT", "rip  ", "exited with code 0144]"]
        {
            #expect(text.contains(wanted), "\(wanted) is missing in:\n\(text)")
        }
        try machine.expectEnd(100)
    }

    @Test func killed() throws {
        let machine = try waitingMachine()
        #expect(try gdb(["kill"]).contains("killed]"))
        try machine.expectEnd(105)
        #expect(machine.errors.lines.last == "swkvm: ended by the debugger")
    }

    // MARK: Another debugger

    private func connection() throws -> DebugConnection { DebugConnection(try connect(toSocket: socket)) }

    /// The prompt, typed at while a debugger comes and goes; all CPUs have run.
    @Test func comesAndGoesWhileTheGuestRuns() throws {
        let machine = try Program.machine(["--gdb", "unix:" + socket, "--cpus", "4", "--mem", "64M"], input: .pipe)
        try machine.waitForError("target remote")
        do {
            let first = try connection()
            #expect(try first.ask("?") == "T02thread:1;")
            #expect(try first.ask("qfThreadInfo") == "m1,2,3,4")
            // It goes without a word, and leaves a breakpoint.
            #expect(try first.ask("Z1,100000,1") == "OK")
        }
        try machine.wait(for: Program.prompt)
        #expect(try machine.ask("cpus").filter { $0.hasSuffix("works") }.count == 3)
        for round in 0..<10 {
            let visitor = try connection()
            #expect(try visitor.ask("qC").hasPrefix("QC"))
            try visitor.put("vCont;c")
            if round % 2 == 0 {
                // Stopped again by Ctrl-C, and let go by a farewell.
                try visitor.send([3])
                #expect(try visitor.next().hasPrefix("T02thread:"))
                #expect(try visitor.ask("D") == "OK")
                #expect(visitor.isAtEnd())
            }
        }
        #expect(try machine.ask("echo still here") == ["still here"])
        try machine.type("poweroff\n")
        try machine.expectEnd(0)
    }

    @Test func aSecondDebuggerIsTurnedAway() throws {
        let machine = try waitingMachine()
        let first = try connection()
        #expect(try first.ask("qAttached") == "1")
        #expect(try connection().isAtEnd())
        #expect(try first.ask("D") == "OK")
        try machine.expectEnd(0)
    }

    /// What a web page can have a browser send to the port. The guest goes on waiting for a debugger.
    @Test func aBrowserIsTurnedAway() throws {
        let machine = try waitingMachine()
        let body = "$vCont;c#a8"
        for request in [
            "POST / HTTP/1.1\r\nContent-Length: \(body.utf8.count)\r\n\r\n\(body)", "\u{16}\u{3}\u{1}", "\n",
        ] {
            let browser = try connection()
            try browser.send(Array(request.utf8))
            #expect(browser.isAtEnd())
        }
        try machine.waitForError(
            "a client of --gdb was disconnected: it began with 'P', which is not a debugger packet\n")
        // One that says nothing gives way to one that does.
        let silent = try connection()
        let debugger = try connection()
        #expect(try debugger.ask("?") == "T02thread:1;")
        #expect(silent.isAtEnd())
        #expect(machine.output.bytes.isEmpty)
        // Noise later on ends the visit.
        try debugger.send(Array("GET".utf8))
        #expect(debugger.isAtEnd())
        try machine.expectEnd(0)
        #expect(machine.errors.lines.count == 2)
    }

    /// GDB's other ways to interrupt: `BREAK` is a Telnet command on such a connection.
    @Test func interruptSequences() throws {
        let machine = try Program.machine(["--gdb", "unix:" + socket, "--mem", "64M"], input: .pipe)
        try machine.waitForError("target remote")
        let visitor = try connection()
        try visitor.send([UInt8(ascii: "+")])
        #expect(try visitor.ask("?") == "T02thread:1;")
        try visitor.put("vCont;c")
        try machine.wait(for: Program.prompt)
        try visitor.send([255, 243])
        #expect(try visitor.next().hasPrefix("T02thread:"))
        #expect(try visitor.ask("D") == "OK")
        try machine.powerOff()
    }

    @Test func aPortOfThisHostOnly() throws {
        let machine = try Program.machine(["--gdb", "0", "--mem", "64M", "--cmdline", "test=none"])
        try machine.waitForError("target remote 127.0.0.1:")
        try machine.waitForError("\n")
        let port = try #require(machine.errors.lines[0].split(separator: ":").last.flatMap { UInt16($0) })
        let rows = try shell("cat /proc/net/tcp /proc/net/tcp6").split(separator: "\n")
        let digits = String(UInt32(port) + 0x10000, radix: 16, uppercase: true).dropFirst()
        #expect(
            rows.filter { $0.contains(":\(digits) ") && $0.contains(" 0A ") }.map { $0.contains("0100007F:\(digits)") }
                == [true])
        // The port is taken, for another machine.
        let other = try Program.machine(["--gdb", "\(port)"])
        try other.expectEnd(71)
        #expect(other.errors.text.contains("port \(port) of 127.0.0.1 is in use"))
        let visitor = DebugConnection(try connect(toPort: port))
        #expect(try visitor.ask("vMustReplyEmpty") == "")
        #expect(try visitor.ask("vCont;c") == "W00")
        try machine.expectEnd(0)
    }

    @Test func theSocketIsForItsOwnerAlone() throws {
        let machine = try waitingMachine()
        var status = stat()
        #expect(stat(socket, &status) == 0 && status.st_mode & 0o777 == 0o600)
        let other = try Program.machine(["--gdb", "unix:" + socket])
        try other.expectEnd(71)
        #expect(other.errors.lines.count == 1 && other.errors.text.contains("is in use"))
        machine.send(signal: SIGTERM)
        try machine.waitForError("asked the guest to power off")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(128 + SIGTERM)
        #expect(try directory.contents.isEmpty)
    }

    /// A guest that waits for a debugger can be ended all the same, with one at its side or not.
    @Test(arguments: [false, true]) func aWaitingMachineEndsBySignals(hasVisitor: Bool) throws {
        let machine = try waitingMachine(["--cpus", "2"])
        let visitor = try connection()
        if hasVisitor { #expect(try visitor.ask("?") == "T02thread:1;") }
        machine.send(signal: SIGTERM)
        try machine.waitForError("asked the guest to power off")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(128 + SIGTERM)
        #expect(visitor.isAtEnd())
    }

    @Test func badRequestsAreErrors() throws {
        let machine = try waitingMachine(["--cpus", "2"])
        let visitor = try connection()
        for (request, answer) in [
            ("md0000000,4", "E0e"), ("mffffffffffffffff,8", "E0e"), ("mdead000000000000,1", "E0e"),
            ("Md0000000,1:00", "E0e"),
            ("Z0,d0000000,1", "E0e"), ("Z3,1000,1", ""), ("Z2,1000,100", "E1c"), ("Z9,0,0", "E16"), ("z0,1234,1", "OK"),
            ("Hg7", "E16"),
            // A selector, and a control register that no processor takes.
            ("P12=ffff0000", "E16"), ("P3c=ffffffffffffffff", "E16"), ("p3c", "3300018000000000"), ("vCont;c:7", "E16"),
            ("bogus", ""), ("T3", "E16"),
        ] { #expect(try visitor.ask(request) == answer, "\(request)") }
        // A read that begins in RAM and leaves it brings what there is.
        let end = String(UInt64(64 << 20) - 4, radix: 16)
        #expect(try visitor.ask("m\(end),10").count == 8)
        #expect(try visitor.ask("D") == "OK")
        try machine.expectEnd(0)
    }

    /// Answers wait for as long as the debugger does not read them.
    @Test func answersWaitForTheirReader() throws {
        let machine = try waitingMachine()
        let visitor = try connection()
        let count = 150
        for _ in 0..<count { try visitor.put("m100000,400") }
        for number in 0..<count {
            // 300 KB in all: more than a socket takes at once.
            #expect(try visitor.next().count == 2048, "answer \(number)")
        }
        #expect(try visitor.ask("D") == "OK")
        try machine.expectEnd(0)
    }

    /// Noise, half packets, and packets without end: the machine bears them, and serves the next one.
    @Test func noiseDoesNoHarm() throws {
        let machine = try Program.machine(["--gdb", "unix:" + socket, "--mem", "64M"], input: .pipe)
        try machine.waitForError("target remote")
        for seed in 0..<20 as Range<UInt64> {
            let visitor = try connection()
            #expect(try visitor.ask("qAttached") == "1")
            var state = seed &* 0x9e37_79b9_7f4a_7c15 | 1
            let bytes: [UInt8] = (0..<20_000).map { _ in
                state = state &* 6_364_136_223_846_793_005 &+ 1
                return UInt8(truncatingIfNeeded: state >> 33)
            }
            // It may be turned out in the middle of it, or go by itself.
            try? visitor.send(bytes + Array("$m".utf8) + [UInt8](repeating: 0x31, count: 100_000))
        }
        try machine.wait(for: Program.prompt)
        #expect(try machine.ask("echo still here") == ["still here"])
        try machine.powerOff()
    }
}

/// `--trace exits`.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct TraceTests {
    /// The lines of the first table: their cells.
    private func table(_ machine: Program) -> [[Substring]] {
        let lines = machine.errors.lines.drop { !$0.hasSuffix("exits to user space") }.dropFirst()
        return lines.prefix { $0.hasPrefix(" ") }.map { $0.split(separator: " ") }
    }

    private func number(_ text: Substring) -> Int? { Int(text.filter { $0 != "," }) }

    @Test func countsWhatTheGuestDoes() throws {
        // mov dx, 0x3f8; mov ecx, 300; 1: out dx, al; loop 1b; mov eax, [0xd0000000]; mov dx, 0x501; mov al, 0; out dx,
        // al
        let code: [UInt8] = [
            0x66, 0xba, 0xf8, 0x03, 0xb9, 0x2c, 1, 0, 0, 0xee, 0xe2, 0xfd, 0xba, 0, 0, 0, 0xd0, 0x8b, 0x02, 0x66, 0xba,
            0x01, 0x05, 0xb0, 0, 0xee,
        ]
        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(code), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel, "--trace", "exits", "--console", "none"])
        try machine.expectEnd(0)
        let rows = table(machine)
        #expect(rows[0].map(String.init) == ["exits", "%", "reason", "access", "bytes", "address", "device"])
        #expect(rows[1].map(String.init) == ["300", "99.3", "IO", "write", "1", "0x3f8", "SerialPort"])
        #expect(rows.contains { $0[2...] == ["MMIO", "read", "4", "0xd0000000"] && $0[0] == "1" })
        #expect(rows.contains { $0[2...] == ["IO", "write", "1", "0x501", "ExitDevice"] && $0[0] == "1" })
        #expect(rows.last?.last == "total" && rows.last?.first == "302")
        // The kernel's own, or the sentence that there are none.
        #expect(
            machine.errors.text.contains("counted in the kernel")
                || machine.errors.text.contains("KVM_CAP_BINARY_STATS_FD"))
    }

    /// A guest that touches more addresses than there is room for; the sum is right all the same.
    @Test func manyAddressesAreBounded() throws {
        // mov edx, 0xc0000000; mov ecx, 5000; 1: mov eax, [rdx]; add edx, 4; loop 1b; mov dx, 0x501; mov al, 0; out dx,
        // al
        let code: [UInt8] = [
            0xba, 0, 0, 0, 0xc0, 0xb9, 0x88, 0x13, 0, 0, 0x8b, 0x02, 0x83, 0xc2, 4, 0xe2, 0xf9, 0x66, 0xba, 0x01, 0x05,
            0xb0, 0, 0xee,
        ]
        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(code), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel, "--trace", "exits", "--console", "none"])
        try machine.expectEnd(0)
        let rows = table(machine)
        #expect(rows.count < 60)
        let others = try #require(rows.first { $0.contains("addresses") })
        #expect((number(others[0]) ?? 0) > 4000)
        #expect(rows.dropFirst().dropLast().compactMap { number($0[0]) }.reduce(0, +) == 5001)
        #expect(rows.last.flatMap { number($0[0]) } == 5001)
    }

    /// However the machine ends.
    @Test func theTableComesWithEverySignalAndCrash() throws {
        let directory = try TemporaryDirectory()
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.talking), to: "kernel")
        let signalled = try Program.machine(["--kernel", kernel, "--trace", "exits", "--console", "none"])
        try signalled.waitUntilRunning()
        signalled.send(signal: SIGINT)
        signalled.sendOneMore(signal: SIGINT)
        _ = try signalled.waitForEnd()
        #expect(table(signalled).contains { $0.contains("SerialPort") })
        let crashed = try Program.machine(["--cmdline", "crash=triple", "--trace", "exits"])
        try crashed.expectEnd(100)
        #expect(table(crashed).contains { $0.contains("SHUTDOWN") })
    }

    @Test func nothingIsSaidWithoutIt() throws {
        let machine = try Program.machine(["--cmdline", "test=none"])
        try machine.expectEnd(0)
        #expect(machine.errors.bytes.isEmpty)
    }
}

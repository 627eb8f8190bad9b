// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// What signals do to a machine, from any sender, and however often.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct SignalTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    /// A machine whose guest does not hear of a power button.
    private func deafMachine(_ arguments: [String] = [], errors: Program.Stream = .pipe) throws -> Program {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf), to: "kernel")
        let machine = try Program.machine(["--kernel", kernel, "--console", "none"] + arguments, errors: errors)
        try machine.waitUntilRunning()
        return machine
    }

    // MARK: One and two

    /// `timeout` signals the process, then its group: that is one request.
    @Test(arguments: [(SIGTERM, SIGTERM), (SIGTERM, SIGHUP), (SIGINT, SIGTERM)]) func twoSignalsTogetherAreOne(
        first: Int32, second: Int32
    ) throws {
        let machine = try deafMachine()
        machine.send(signal: first)
        try machine.waitForError("asked the guest to power off")
        machine.send(signal: second)
        usleep(300_000)
        #expect(machine.isRunning, "\(machine.story)")
        machine.sendOneMore(signal: second)
        try machine.expectEnd(128 + second)
    }

    @Test func underTimeout() throws {
        let machine = try Program(["timeout", "2", Host.swkvm, "run", "--mem", "64M", "--console", "none"])
        #expect(try machine.waitForEnd() == .status(124))
        #expect(machine.errors.lines.count == 1, "\(machine.story)")
        #expect(machine.errors.text.contains("asked the guest to power off"))
    }

    @Test func aHangUpAsksForAPowerOff() throws {
        let machine = try Program.machineAtPrompt()
        machine.send(signal: SIGHUP)
        try machine.expectEnd(0)
        #expect(machine.output.text.contains("power button"))
    }

    /// SIGUSR1 writes metrics, SIGUSR2 resumes: neither ends a machine that has nothing of the kind to do.
    @Test func signalsWithoutAPurpose() throws {
        let machine = try deafMachine()
        machine.send(signal: SIGUSR1)
        try machine.waitForError("swkvm: warning: SIGUSR1: no --metrics file: nothing was written")
        machine.send(signal: SIGUSR2)
        try machine.waitForError("swkvm: the machine is not paused")
        machine.send(signal: SIGTERM)
        try machine.waitForError("asked the guest to power off")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(143)
    }

    // MARK: Before the guest starts

    /// A machine that waits for its disk's key has no guest to ask: one signal is its end, and nothing is left.
    @Test(arguments: [SIGTERM, SIGINT]) func whileAKeyIsWaitedFor(signal: Int32) throws {
        let (pipe, key, disk) = (
            directory.path + "/pipe", try directory.write(Array("secret".utf8), to: "key"),
            directory.path + "/disk.qcow2"
        )
        #expect(mkfifo(pipe, 0o600) == 0)
        try Program([Host.swkvm, "image", "create", "--encrypt", "--key-file", key, disk, "1M"]).expectEnd(0)
        let machine = try Program.machine([
            "--disk", "\(disk),key-file=\(pipe)", "--console", "unix:\(directory.path)/socket",
        ])
        usleep(300_000)
        #expect(machine.isRunning, "\(machine.story)")
        machine.send(signal: signal)
        try machine.expectEnd(128 + signal)
        #expect(
            machine.errors.text == "swkvm: ended by signal \(signal) before the guest started\n", "\(machine.story)"
        )
        #expect(try directory.contents.sorted() == ["disk.qcow2", "key", "pipe"])
    }

    /// A name server that does not answer: the resolver would wait for many seconds, and asks again.
    @Test(.enabled(if: Host.isFit, Host.needed), arguments: [SIGTERM, SIGINT]) func whileANameServerIsWaitedFor(
        signal: Int32
    ) throws {
        let host = try Namespace()
        let server = try host.run {
            let socket = FileDescriptor(owning: Glibc.socket(AF_INET, Int32(SOCK_DGRAM.rawValue), 0))
            var address = sockaddr_in()
            address.sin_family = sa_family_t(AF_INET)
            address.sin_port = in_port_t(53).bigEndian
            address.sin_addr.s_addr = in_addr_t(INADDR_LOOPBACK).bigEndian
            let size = socklen_t(MemoryLayout<sockaddr_in>.size)
            let status = withUnsafePointer(to: &address) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { bind(socket.rawValue, $0, size) }
            }
            guard status == 0 else { throw SystemCallError.last("bind") }
            return socket.release()
        }
        defer { close(server) }
        let configuration = try directory.write(
            Array("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n".utf8), to: "resolv.conf")
        let script = "mount --bind '\(configuration)' /etc/resolv.conf && exec \"$@\""
        let machine = try Program(
            ["unshare", "-m", "sh", "-c", script, "sh", Host.swkvm, "run", "--disk", "nbd://server.invalid/disk"],
            in: host)
        // The question has arrived.
        var ready = pollfd(fd: server, events: Int16(POLLIN), revents: 0)
        #expect(poll(&ready, 1, -1) == 1)
        #expect(machine.isRunning, "\(machine.story)")
        machine.send(signal: signal)
        try machine.expectEnd(128 + signal)
        #expect(
            machine.errors.text == "swkvm: ended by signal \(signal) before the guest started\n", "\(machine.story)"
        )
    }

    /// Another process has a lease on the disk, and does not give it up, which the kernel lets it do for 45 seconds.
    @Test(arguments: [SIGTERM, SIGINT]) func whileALeaseIsWaitedFor(signal: Int32) throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let file = try FileDescriptor.open(disk, O_RDWR)
        // The kernel tells the holder by SIGURG, which is ignored unless somebody handles it.
        #expect(fcntl(file.rawValue, Lease.setSignal, SIGURG) == 0)
        #expect(fcntl(file.rawValue, Lease.set, F_WRLCK) == 0)
        let machine = try Program.machine(["--disk", disk])
        // It is asked for the lease.
        while fcntl(file.rawValue, Lease.get) == F_WRLCK { usleep(10_000) }
        #expect(machine.isRunning, "\(machine.story)")
        machine.send(signal: signal)
        try machine.expectEnd(128 + signal)
        #expect(
            machine.errors.text == "swkvm: ended by signal \(signal) before the guest started\n", "\(machine.story)"
        )
    }

    /// The guest cannot power off while a debugger keeps it: that is said.
    @Test func whileADebuggerIsWaitedFor() throws {
        let machine = try Program.machine(["--gdb", "unix:\(directory.path)/gdb"])
        try machine.waitForError("gdb")
        machine.send(signal: SIGTERM)
        try machine.waitForError("the debugger has stopped the guest")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(128 + SIGTERM)
    }

    // MARK: Ignored ones

    /// What was ignored at the start, as SIGHUP is under nohup and SIGINT in a script's background job, stays ignored.
    @Test(arguments: [
        ("HUP", SIGHUP), ("INT", SIGINT), ("TERM", SIGTERM), ("USR1", SIGUSR1), ("USR2", SIGUSR2),
    ]) func whatWasIgnoredStaysIgnored(name: String, number: Int32) throws {
        let machine = try Program(
            ["sh", "-c", "trap '' \(name); exec \"$@\"", "sh", Host.swkvm, "run", "--mem", "64M"], input: .pipe)
        try machine.wait(for: Program.prompt)
        for _ in 0..<2 {
            machine.send(signal: number)
            #expect(try machine.ask("echo alive") == ["alive"])
            usleep(1_100_000)
        }
        try machine.powerOff()
        #expect(machine.errors.bytes.isEmpty, "\(machine.story)")
    }

    @Test func underNohup() throws {
        let machine = try Program(["nohup", Host.swkvm, "run", "--mem", "64M"], input: .pipe)
        try machine.wait(for: Program.prompt)
        machine.send(signal: SIGHUP)
        #expect(try machine.ask("echo after the logout") == ["after the logout"])
        try machine.powerOff()
    }

    // MARK: The time a guest may take

    @Test func aGuestThatDoesNotPowerOffInTimeIsEnded() throws {
        let machine = try deafMachine(["--stop-timeout", "1"])
        machine.send(signal: SIGTERM)
        try machine.waitForError(
            "asked the guest to power off; a second signal ends the machine, and so does a timeout of 1 seconds\n")
        try machine.expectEnd(106)
        #expect(
            machine.errors.lines.last == "swkvm: ended: the guest did not power off within 1 seconds (--stop-timeout)")
    }

    /// At a terminal somebody can give another signal; a service manager waits, and then kills.
    @Test func withoutATerminalTheTimeIsLimited() throws {
        let machine = try deafMachine()
        machine.send(signal: SIGTERM)
        try machine.waitForError(
            "asked the guest to power off; a second signal ends the machine, and so does a timeout of 90 seconds\n")
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(143)
        let other = try deafMachine(["--stop-timeout", "none"])
        other.send(signal: SIGTERM)
        try other.waitForError("asked the guest to power off; a second signal ends the machine\n")
        other.sendOneMore(signal: SIGTERM)
        try other.expectEnd(143)
    }

    @Test(arguments: ["-1", "x", "1.5", "86401", "99999999999999999999"]) func timesThatAreNone(text: String) throws {
        let machine = try Program.machine(["--stop-timeout=\(text)"])
        try machine.expectEnd(64)
        #expect(machine.errors.text.contains("a number of seconds from 0 to 86400, or none"), "\(machine.story)")
    }

    // MARK: Readers that stall

    /// Standard output is a full pipe that another user made, which cannot be opened anew to be non-blocking: no vCPU
    /// waits in a write.
    @Test(arguments: [SIGTERM, SIGINT]) func aStalledReaderOfStandardOutputDoesNotKeepTheMachine(number: Int32) throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.talking), to: "kernel")
        let (reading, writing) = try makePipe()
        defer { close(reading) }
        #expect(fchown(writing, 65534, 65534) == 0)
        // Root as other users are: without the right to open every file.
        let machine = try Program(
            ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", Host.swkvm, "run", "--kernel", kernel],
            output: .descriptor(writing))
        close(writing)
        var count: Int32 = 0
        for _ in 0..<9_000 where count < 60 << 10 {
            usleep(10_000)
            _ = ioctl(reading, UInt(FIONREAD), &count)
        }
        // Full to the last page: writes come in pieces.
        #expect(count >= 60 << 10)
        machine.send(signal: number)
        try machine.waitForError("asked the guest to power off")
        machine.sendOneMore(signal: number)
        try machine.expectEnd(128 + number)
    }

    /// The guest powers off as it is asked to, with output that nobody reads: the process ends, too, without a second
    /// signal.
    @Test func aStalledReaderDoesNotKeepAMachineThatHasPoweredOff() throws {
        let (reading, writing) = try makePipe()
        defer { close(reading); close(writing) }
        let filling = [UInt8](repeating: UInt8(ascii: "-"), count: 64 << 10)
        #expect(write(writing, filling, filling.count) == filling.count)
        let machine = try Program.machine(["--mem", "64M"], output: .descriptor(writing))
        try machine.waitUntilRunning()
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
    }

    /// Standard error is a full pipe: what is said is lost, nobody waits for it.
    @Test func aStalledReaderOfStandardErrorDoesNotKeepTheMachine() throws {
        let (reading, writing) = try makePipe()
        defer { close(reading); close(writing) }
        let filling = [UInt8](repeating: UInt8(ascii: "-"), count: 64 << 10)
        #expect(write(writing, filling, filling.count) == filling.count)
        let machine = try deafMachine(errors: .descriptor(writing))
        machine.send(signal: SIGTERM)
        machine.sendOneMore(signal: SIGTERM)
        try machine.expectEnd(143)
    }

    /// fcntl(2)'s commands for leases, which need _GNU_SOURCE in C.
    private enum Lease {
        static let setSignal: Int32 = 10, set: Int32 = 1024, get: Int32 = 1025
    }
}

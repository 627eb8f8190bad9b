// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Machines whose disk stops since the host's file system is full (`--on-disk-error`).
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct DiskStopTests {
    private let directory: TemporaryDirectory
    private let terminal: PseudoTerminal
    /// Has the mount namespace with the small file system: 4 MiB, of which a file takes 2.
    private let holder: Program
    private let mount: String

    private static let stopped =
        "; the machine is paused, and the request is started again when it is resumed (Ctrl-A r or SIGUSR2)"

    init() throws {
        directory = try TemporaryDirectory()
        terminal = try PseudoTerminal()
        mount = directory("mount")
        holder = try Program([
            "unshare", "-m", "sh", "-euc",
            """
            mkdir '\(mount)'
            mount -t tmpfs -o size=4M none '\(mount)'
            head -c 2M /dev/zero >'\(mount)/filler'
            echo mounted
            exec sleep infinity
            """,
        ])
        try holder.wait(for: "mounted")
    }

    /// Runs a script that sees the small file system.
    @discardableResult
    private func inside(_ script: String) throws -> String {
        let program = try Program(["nsenter", "-m", "-t", "\(holder.pid)", "sh", "-euc", script])
        guard try program.waitForEnd() == .status(0) else { throw TestFailure(program.story) }
        return program.output.text
    }

    /// A machine at its prompt with a disk of 8 MiB on the small file system, and another one where there is room.
    private func machine(_ format: String, _ options: String = "", arguments: [String] = []) throws -> Program {
        let swkvm = Host.swkvm, large = directory("large.raw")
        try inside(
            "[ -e '\(disk(format))' ] || \(swkvm) image create -f \(format) '\(disk(format))' 8M; truncate -s 8M '\(large)'"
        )
        let machine = try Program(
            [
                "nsenter", "-m", "-t", "\(holder.pid)", swkvm, "run", "--mem", "64M", "--disk", disk(format) + options,
                "--disk", large,
            ]
                + arguments, terminal: terminal)
        try machine.wait(for: Program.prompt)
        return machine
    }

    private func disk(_ format: String) -> String { "\(mount)/disk.\(format)" }

    /// Writes more than there is room for, until the disk stops.
    private func fill(_ machine: Program, _ format: String) throws {
        try machine.type("write vda 100 pattern 6000\r")
        try machine.wait(for: "error: blk0: disk \"\(disk(format))\": write: No space left on device (at byte ")
        try machine.wait(for: Self.stopped)
    }

    private func sums(_ machine: Program) throws -> [String] {
        try ["vda", "vdb"].map { disk in
            try machine.ask("sum \(disk) 0 16384").last?.replacing(disk, with: "disk") ?? ""
        }
    }

    /// The guest notices nothing but time, however the machine is resumed, and however often there is no room.
    @Test(arguments: [
        ("raw", "", "key"), ("qcow2", "", "signal"), ("qcow2", ",queues=2", "command"), ("qcow2", "", "pause key"),
    ])
    func goesOnOnceThereIsRoom(format: String, options: String, how: String) throws {
        let metrics = directory("m.prom")
        let machine = try machine(format, options, arguments: ["--metrics", metrics, "--metrics-format", "prometheus"])
        func resume() throws {
            switch how {
            case "key": try machine.type("\u{1}r")
            case "signal": machine.send(signal: SIGUSR2)
            case "command": try machine.type("\u{1}:resume\r")
            default: try machine.type("\u{1}p")
            }
        }
        func figures() throws -> [String] {
            unlink(metrics)
            machine.send(signal: SIGUSR1)
            #expect(try eventually { access(metrics, R_OK) == 0 })
            return try shell("grep -E '^swkvm_(machine_paused|block_stop|block_failures)' '\(metrics)'").split(
                separator: "\n"
            )
            .filter { !$0.contains("blk1") }.map { String($0.split(separator: " ").last ?? "") }
        }
        #expect(try machine.ask("write vdb 100 pattern 6000").last == "written")
        try fill(machine, format)
        try machine.type("\u{1}:pause\r")
        try machine.wait(for: "swkvm: the machine is paused already")
        try machine.type("\u{1}c")
        try machine.wait(for: ", paused after an error of blk0, sandbox ")
        #expect(try figures() == ["1", "1", "1", "0"])
        for _ in 0..<2 {
            try resume()
            try machine.wait(for: Self.stopped)
            // Not that it is running, after that it is paused.
            try machine.type("\u{1}c")
            try machine.wait(for: ", paused after an error of blk0, sandbox ")
            let text = machine.output.text
            let last = text.ranges(of: Self.stopped).last
            #expect(
                text[(last?.upperBound ?? text.startIndex)...].firstRange(of: "the machine is running") == nil,
                "\(machine.output.tail)")
        }
        try inside("rm '\(mount)/filler'")
        try resume()
        try machine.wait(for: "written")
        #expect(try figures() == ["0", "0", "3", "0"])
        let sums = try sums(machine)
        #expect(sums[0] == sums[1] && sums[0].contains("crc32"), "\(sums)")
        try machine.powerOff()
        #expect(
            !machine.output.text.contains("I/O error") && !machine.output.text.contains(" more"),
            "\(machine.output.tail)")
        if format == "qcow2" { try inside("qemu-img check -q '\(disk(format))'") }
        try inside("\(Host.swkvm) image compare '\(disk(format))' '\(directory("large.raw"))'")
    }

    /// What was written before is there afterwards, and the image is closed.
    @Test(arguments: [("raw", "", "key"), ("qcow2", "", "signal"), ("qcow2", ",queues=2", "signal")])
    func endsWhileStopped(format: String, options: String, how: String) throws {
        let first = try machine(format, options)
        #expect(try first.ask("write vda 0 pattern 100").last == "written")
        let sum = try first.ask("sum vda 0 100").last
        try fill(first, format)
        if how == "key" {
            try first.type("\u{1}x")
            try first.expectEnd(104)
        } else {
            first.send(signal: SIGTERM)
            try first.wait(for: "the machine is paused: the guest can power off only after it has been resumed")
            first.sendOneMore(signal: SIGTERM)
            try first.expectEnd(143)
        }
        if format == "qcow2" { try inside("qemu-img check -q '\(disk(format))'") }
        try inside("rm '\(mount)/filler'")
        let second = try machine(format, options)
        #expect(try second.ask("sum vda 0 100").last == sum)
        try second.powerOff()
    }

    /// It was asked to power off while it was stopped, and does so when it is resumed.
    @Test func powersOffOnceThereIsRoom() throws {
        let machine = try machine("qcow2")
        try fill(machine, "qcow2")
        machine.send(signal: SIGTERM)
        try machine.wait(for: "after it has been resumed")
        try inside("rm '\(mount)/filler'")
        machine.send(signal: SIGUSR2)
        try machine.expectEnd(0)
        try inside("qemu-img check -q '\(disk("qcow2"))'")
    }

    /// The guest resets the device before the pause, or after it. Reads fail since the file was truncated.
    @Test func theGuestResetsADiskThatHasStopped() throws {
        let path = directory("disk.raw"), size: off_t = 1100 << 20
        try shell("truncate -s \(size) '\(path)'")
        let machine = try Program.machineAtPrompt(["--on-disk-error", "stop", "--disk", path], terminal: terminal)
        let sum = try machine.ask("sum vda 0 8").last
        for _ in 0..<10 {
            #expect(truncate(path, 0) == 0)
            try machine.type("flood vda 2 reset\r")
            try machine.wait(for: Self.stopped)
            // Paused already, or now: nothing fails any more when the file is long again.
            try machine.type("\u{1}:pause\r")
            try machine.wait(for: "swkvm: the machine is paused")
            #expect(truncate(path, size) == 0)
            try machine.type("\u{1}r")
            try machine.wait(for: "reset within")
            #expect(try machine.ask("sum vda 0 8").last == sum)
        }
        try machine.powerOff()
    }

    /// SIGUSR2 of a machine that is not paused does nothing.
    @Test func theSignalOfAMachineThatRuns() throws {
        let machine = try machine("raw")
        machine.send(signal: SIGUSR2)
        try machine.wait(for: "swkvm: the machine is not paused")
        #expect(try machine.ask("echo still there").last == "still there")
        try machine.powerOff()
    }
}

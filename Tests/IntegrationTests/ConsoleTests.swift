// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// A console on standard streams: input, output, and what becomes of either.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct ConsoleTests {
    /// What is typed before the guest listens is for the guest all the same.
    @Test func inputFromThePipesFirstByteOn() throws {
        let machine = try Program.machine([], input: .pipe)
        try machine.type("echo first\necho second\npoweroff\n")
        machine.closeInput()
        try machine.expectEnd(0)
        #expect(machine.output.lines.contains("first") && machine.output.lines.contains("second"))
        #expect(machine.output.lines.contains("> echo first"))
        #expect(
            machine.output.lines.contains {
                $0.hasPrefix("1 CPU, ") && $0.hasSuffix(" MiB, 0 disks, 0 network interfaces; type help")
            })
    }

    @Test func inputFromARegularFile() throws {
        let directory = try TemporaryDirectory()
        let script = try directory.write(Array("mem\necho from a file\npoweroff\n".utf8), to: "script")
        let machine = try Program.machine([], input: .file(script, O_RDONLY))
        try machine.expectEnd(0)
        #expect(machine.output.lines.contains("from a file"))
    }

    /// 10 KB at once, as a paste is: much more than any buffer on the way.
    @Test func aPasteOfTenKilobytes() throws {
        let machine = try Program.machineAtPrompt()
        let lines = (0..<100).map {
            "line \($0) " + String(repeating: Character(UnicodeScalar(97 + UInt8($0 % 26))), count: 90)
        }
        try machine.type(lines.map { "echo \($0)\n" }.joined())
        try machine.wait(for: "\n" + lines[99])
        let answers = machine.output.lines.filter { $0.hasPrefix("line ") }
        #expect(answers == lines)
        try machine.powerOff()
    }

    @Test(arguments: [Program.Stream.null, .closed]) func withoutInput(input: Program.Stream) throws {
        let machine = try Program.machine([], input: input)
        try machine.wait(for: Program.prompt)
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
    }

    /// The end of the input is not the end of the machine.
    @Test func theEndOfInput() throws {
        let machine = try Program.machineAtPrompt()
        #expect(try machine.ask("echo before") == ["before"])
        machine.closeInput()
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
    }

    /// Nobody to read, no room to write: the guest goes on and ends as it would.
    @Test func outputThatNobodyTakes() throws {
        let (reading, writing) = try makePipe()
        close(reading)
        defer { close(writing) }
        for output: Program.Stream in [.closed, .file("/dev/full", O_WRONLY), .null, .descriptor(writing)] {
            let machine = try Program.machine(["--cmdline", "test=irq"], output: output)
            try machine.expectEnd(0)
            #expect(machine.errors.bytes.isEmpty)
        }
    }

    @Test func allStreamsClosed() throws {
        try Program.machine(["--cmdline", "test=irq"], input: .closed, output: .closed, errors: .closed).expectEnd(0)
        try Program.machine(["--kernel", "/nonexistent"], input: .closed, output: .closed, errors: .closed).expectEnd(
            66)
    }

    @Test func outputToAFile() throws {
        let directory = try TemporaryDirectory()
        let machine = try Program.machine(
            ["--cmdline", "test=irq"], output: .file(directory("log"), O_WRONLY | O_CREAT | O_TRUNC))
        try machine.expectEnd(0)
        #expect(String(decoding: try readFile(directory("log"), limit: 1 << 20), as: UTF8.self).hasSuffix("1..2\r\n"))
    }

    /// More than a pipe and the port's own buffer hold, to a reader that comes late: every byte arrives, also those of
    /// the end.
    @Test(arguments: [true, false]) func muchOutputToASlowReader(poweringOff: Bool) throws {
        let directory = try TemporaryDirectory()
        let content = (0..<64 * 512).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ $0 >> 9) }
        let disk = try directory.write(content, to: "disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", disk + ",ro"])
        try machine.type("read vda 0 64\n" + (poweringOff ? "poweroff\n" : ""))
        // The pipe is full by then, or it will be: the outcome is the same.
        sleep(1)
        if poweringOff {
            try machine.expectEnd(0)
        } else {
            try machine.wait(for: Program.prompt)
            try machine.powerOff()
        }
        let rows = machine.output.lines.filter { $0.count > 60 }
        #expect(rows == dump(content))
    }

    /// The guest does not wait, and its user hears of what is lost.
    @Test(arguments: ["", ",size=64K"]) func aFileOnAFullFileSystem(options: String) throws {
        let directory = try TemporaryDirectory()
        let mount = directory("mount"), metrics = directory("m.prom")
        let machine = try Program([
            "unshare", "-m", "sh", "-uc",
            """
            mkdir '\(mount)'
            mount -t tmpfs -o size=64K none '\(mount)'
            head -c 1M /dev/zero >'\(mount)/filler' 2>/dev/null
            exec '\(Host.swkvm)' run --mem 64M --cmdline '' --console 'file:\(mount)/out\(options)' \\
                --metrics '\(metrics)' --metrics-format prometheus
            """,
        ])
        try machine.waitForError(
            "swkvm: warning: console file \(mount)/out: write: No space left on device; output of the guest is lost\n")
        machine.send(signal: SIGUSR1)
        let figure = #"swkvm_machine_console_lost_bytes_total{machine="swkvm",cause="file"} "#
        #expect(
            try eventually {
                let text = String(decoding: (try? readFile(metrics, limit: 1 << 20)) ?? [], as: UTF8.self)
                let line = text.split(separator: "\n").first { $0.hasPrefix(figure) }
                return line.map { $0.dropFirst(figure.count) != "0" } == true
            })
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
        // The rest is a number at the end.
        let lines = machine.errors.lines.filter { $0.firstRange(of: "No space left on device") != nil }
        #expect(lines.count <= 2, "\(machine.story)")
    }

    /// A pipe that is full when the guest ends: the process waits with the last bytes, as any writer to a pipe does,
    /// until they are read or a signal says not to.
    @Test(arguments: [true, false]) func theLastBytesWaitForTheReader(isRead: Bool) throws {
        let ends = try makePipe()
        let reading = FileDescriptor(owning: ends.reading)
        var written = 0
        do {
            let writing = FileDescriptor(owning: ends.writing)
            try writing.setNonBlocking(true)
            let filling = [UInt8](repeating: UInt8(ascii: "-"), count: 4096)
            while let count = try? filling.withUnsafeBytes({ try writing.write($0) }) { written += count }
            let machine = try Program.machine(["--cmdline", "test=irq"], output: .descriptor(writing.rawValue))
            // Time enough for the guest to start and to end; it may be too little, but then nothing is tested and
            // nothing fails.
            sleep(3)
            #expect(machine.isRunning)
            guard isRead else {
                #expect(
                    try eventually {
                        machine.send(signal: SIGTERM); return !machine.isRunning
                    })
                return
            }
            try reading.setNonBlocking(true)
            var transcript = Transcript()
            while machine.isRunning {
                _ = transcript.read(from: reading.rawValue)
                usleep(1_000)
            }
            _ = transcript.read(from: reading.rawValue)
            let text = String(decoding: transcript.bytes.dropFirst(written), as: UTF8.self)
            #expect(text.hasPrefix("swkvm guest\r\n") && text.hasSuffix("1..2\r\n"), "\(text)")
            try machine.expectEnd(0)
        }
    }

    /// A reader that goes away while output waits for it: the status is the guest's, and no signal's.
    @Test func aReaderThatGoesAway() throws {
        let directory = try TemporaryDirectory()
        let disk = try directory.write([UInt8](repeating: 0, count: 200 * 512), to: "disk.raw")
        let (reading, writing) = try makePipe()
        let machine = try Program.machine(["--disk", disk + ",ro"], input: .pipe, output: .descriptor(writing))
        close(writing)
        try machine.type("read vda 0 200\npanic\n")
        // The pipe is full, and after a quarter of the time that this took the port's own buffer too, which the guest
        // waits for: it is swkvm's main thread that finds nobody there.
        var (waits, count) = (0, Int32(0))
        while count < 64 << 10, waits < 9_000 {
            usleep(10_000)
            waits += 1
            _ = ioctl(reading, UInt(FIONREAD), &count)
        }
        usleep(UInt32(waits) * 10_000 / 2 + 500_000)
        close(reading)
        try machine.expectEnd(63)
    }

    /// The rows of the guest's `read`.
    private func dump(_ bytes: [UInt8]) -> [String] {
        stride(from: 0, to: bytes.count, by: 16).map { start in
            let row = bytes[start..<start + 16]
            let digits = row.map { " " + ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
            let letters = String(
                decoding: row.map { (0x20..<0x7f).contains($0) ? $0 : UInt8(ascii: ".") }, as: UTF8.self)
            return hexadecimal(UInt32(start)) + " " + digits + "  " + letters
        }
    }
}

extension Program.Stream: CustomTestStringConvertible {
    var testDescription: String {
        switch self {
        case .pipe: "pipe"
        case .null: "/dev/null"
        case .closed: "closed"
        case .descriptor(let number): "descriptor \(number)"
        case .file(let path, _): path
        }
    }
}

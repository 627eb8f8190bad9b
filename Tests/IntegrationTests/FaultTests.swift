// SPDX-License-Identifier: Apache-2.0

import CSandboxTest
import Glibc
import Linux
import TestSupport
import Testing

/// How the binary of a release protects its constants, and what it says when it fails itself.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct FaultTests {
    @Test(arguments: ["swkvm", "vcpu0", "blk0"]) func aFaultIsReported(thread: String) throws {
        let directory = try TemporaryDirectory()
        let disk = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", disk])
        // Never mapped.
        #expect(hostile_jump(try machine.thread(named: thread), 0) == 0)
        try machine.expectEnd(70)
        // Before them, what is said of the disk.
        let lines = machine.errors.lines.filter { !$0.isEmpty }.suffix(2)
        let report = try #require(lines.first)
        #expect(
            report.hasPrefix(
                "swkvm: internal error: SIGSEGV at program counter 0x0, accessing address 0x0, in the thread '\(thread)', build ID "
            ) && report.hasSuffix(": please report this bug of swkvm"), "\(report)")
        #expect(lines.last?.hasPrefix("swkvm: called from 0x") == true, "\(machine.story)")
    }

    /// It is the sender's business, not a bug.
    @Test(arguments: [SIGSEGV, SIGABRT]) func aSignalOfAnotherProcessEndsItAsEver(signal: Int32) throws {
        let machine = try Program.machineAtPrompt()
        machine.send(signal: signal)
        #expect(try machine.waitForEnd() == .signal(signal))
        #expect(!machine.errors.text.contains("internal error"), "\(machine.story)")
    }

    // MARK: The file

    private static let writable: UInt32 = 2, executable: UInt32 = 1
    private static let load: UInt32 = 1, stack: UInt32 = 0x6474_e551, relro: UInt32 = 0x6474_e552

    private struct Segment {
        let type: UInt32, flags: UInt32, addresses: Range<UInt64>
    }

    /// The program headers (System V ABI, chapter 5).
    private func segments() throws -> [Segment] {
        let file = try readFile(Host.swkvm, limit: 64 << 20)
        func number<Number: FixedWidthInteger>(_ offset: Int, _: Number.Type) -> UInt64 {
            (0..<Number.bitWidth / 8).reduce(0) { $0 | UInt64(file[offset + $1]) << (8 * UInt64($1)) }
        }
        let start = Int(number(32, UInt64.self)), size = Int(number(54, UInt16.self))
        return (0..<Int(number(56, UInt16.self))).map { index in
            let header = start + index * size
            let address = number(header + 16, UInt64.self)
            return Segment(
                type: UInt32(number(header, UInt32.self)), flags: UInt32(number(header + 4, UInt32.self)),
                addresses: address..<address + number(header + 40, UInt64.self))
        }
    }

    @Test func nothingIsWritableAndExecutable() throws {
        let segments = try segments()
        for segment in segments where segment.type == Self.load {
            #expect(segment.flags & Self.writable == 0 || segment.flags & Self.executable == 0)
        }
        let stack = try #require(segments.first { $0.type == Self.stack })
        #expect(stack.flags & Self.executable == 0)
        // The tables of functions, 350 KB at least.
        let constants = try #require(segments.first { $0.type == Self.relro }).addresses
        #expect(constants.count > 350 << 10)

        let machine = try Program.machineAtPrompt()
        var constantsSeen: UInt64 = 0
        for line in String(decoding: try readFile("/proc/\(machine.pid)/maps", limit: 1 << 20), as: UTF8.self)
            .split(separator: "\n")
        {
            let words = line.split(separator: " ")
            let ends = words[0].split(separator: "-").compactMap { UInt64($0, radix: 16) }
            try #require(ends.count == 2)
            #expect(!words[1].contains("w") || !words[1].contains("x"), "\(line)")
            // Whole pages.
            let part = (ends[0]..<ends[1]).clamped(to: constants.lowerBound..<constants.upperBound & ~4095)
            guard !part.isEmpty else { continue }
            #expect(!words[1].contains("w"), "\(line)")
            constantsSeen += UInt64(part.count)
        }
        #expect(constantsSeen > 350 << 10)
        try machine.powerOff()
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import Testing

extension Program {
    /// `swkvm run` with these arguments.
    static func machine(
        _ arguments: [String], input: Stream = .null, output: Stream = .pipe, errors: Stream = .pipe,
        in namespace: Namespace? = nil,
        passing: [(descriptor: Int32, number: Int32)] = [], terminal: PseudoTerminal? = nil
    ) throws -> Program {
        // `SWKVM_TEST_SANDBOX=report` has all machines report what the sandbox would refuse.
        let mode = getenv("SWKVM_TEST_SANDBOX").map { ["--sandbox", String(cString: $0)] } ?? []
        return try Program(
            [Host.swkvm, "run"] + mode + arguments, input: input, output: output, errors: errors, in: namespace,
            passing: passing,
            terminal: terminal)
    }

    /// A machine with the bundled guest, which has come to its prompt.
    static func machineAtPrompt(
        _ arguments: [String] = [], words: String = "", errors: Stream = .pipe, in namespace: Namespace? = nil,
        passing: [(descriptor: Int32, number: Int32)] = [], terminal: PseudoTerminal? = nil
    ) throws -> Program {
        let machine = try machine(
            ["--mem", "64M", "--cmdline", words] + arguments, input: .pipe, errors: errors, in: namespace,
            passing: passing, terminal: terminal)
        try machine.wait(for: prompt)
        return machine
    }

    static let prompt = "\n> "

    /// Types a command at the guest's prompt.
    /// - Returns: the lines of its answer.
    func ask(_ command: String) throws -> [String] {
        let start = output.bytes.count
        try type(command + "\n")
        // The echo first: a prompt that was there already is not the answer's.
        try wait(for: command)
        try wait(for: Self.prompt)
        let answer = output.guestText(from: start).split(whereSeparator: \.isNewline).map(String.init)
        return Array(answer.dropFirst().dropLast())
    }

    /// Powers the guest off at its prompt, and checks that the machine ends well and says nothing.
    func powerOff(sourceLocation: SourceLocation = #_sourceLocation) throws {
        try type("poweroff\n")
        try expectEnd(0, sourceLocation: sourceLocation)
    }

    /// Sends a signal that is one more than those before: signals that come within a second are one.
    func sendOneMore(signal number: Int32) {
        usleep(1_100_000)
        send(signal: number)
    }

    /// Waits for the end and checks the status.
    func expectEnd(_ status: Int32, sourceLocation: SourceLocation = #_sourceLocation) throws {
        let end = try waitForEnd()
        #expect(end == .status(status), "\(story)", sourceLocation: sourceLocation)
    }

    /// Checks that the guest's self-tests have all been run and all are `ok`.
    /// - Parameter skipped: parts of the lines that may be skipped, which no other may.
    func expectSelfTestsPassed(skipped: [String] = [], sourceLocation: SourceLocation = #_sourceLocation) throws {
        try expectEnd(0, sourceLocation: sourceLocation)
        let results = output.lines.filter { $0.hasPrefix("ok ") || $0.hasPrefix("not ok ") }
        let plan = output.lines.last { $0.hasPrefix("1..") }
        #expect(plan == "1..\(results.count)", "\(story)", sourceLocation: sourceLocation)
        #expect(!results.isEmpty, sourceLocation: sourceLocation)
        for (index, line) in results.enumerated() {
            #expect(line.hasPrefix("ok \(index + 1) - "), sourceLocation: sourceLocation)
            guard line.contains("# SKIP") else { continue }
            #expect(skipped.contains { line.contains($0) }, "\(line)", sourceLocation: sourceLocation)
        }
    }
}

/// CRC-32 as in IEEE 802.3, which the guest's `sum` prints.
func crc32(_ bytes: some Sequence<UInt8>) -> UInt32 {
    let bytes = Array(bytes)
    return crcTable.withUnsafeBufferPointer { table in
        bytes.withUnsafeBufferPointer { bytes in
            var value = UInt32.max
            for byte in bytes { value = value >> 8 ^ table[Int(UInt8(truncatingIfNeeded: value) ^ byte)] }
            return ~value
        }
    }
}

private let crcTable: [UInt32] = (0..<256).map { byte in
    (0..<8).reduce(UInt32(byte)) { value, _ in value >> 1 ^ (value & 1 == 0 ? 0 : 0xedb8_8320) }
}

func hexadecimal(_ value: UInt32) -> String {
    let text = String(value, radix: 16)
    return String(repeating: "0", count: 8 - text.count) + text
}

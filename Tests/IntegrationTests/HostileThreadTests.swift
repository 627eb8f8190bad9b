// SPDX-License-Identifier: Apache-2.0

import CSandboxTest
import Glibc
import Linux
import TestSupport
import Testing

/// Threads of a running machine, the program as it is, make the calls that code of an attacker in them would make. What
/// they open, change or signal is the test's own, or they are harmless.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed), .enabled(if: geteuid() == 0, "it traces a process of root's"))
struct HostileThreadTests {
    private struct Outcome {
        let name: String
        let isOnlyBegun: Bool
        /// What the kernel answered; an errno value is negative.
        let answer: Int
        var isRefused: Bool { answer == HOSTILE_REFUSED }
    }

    /// A process that waits, which an attacker is to leave alone.
    private static func bystander() throws -> Program { try Program(["sleep", "1000"]) }

    /// Has a thread of a machine make all calls.
    private static func outcomes(of name: String, in machine: Program, _ directory: String) throws -> [Outcome] {
        for file in ["secret", "image", "removed", "renamed"] {
            try Program(["sh", "-euc", "umask 077; head -c 8192 /dev/zero > \(directory)/\(file)"]).expectEnd(0)
        }
        let bystander = try bystander()
        var answers = [Int](repeating: 0, count: Int(hostile_attempt_count))
        let thread = try machine.thread(named: name)
        let status = hostile_attempt_all(thread, bystander.pid, directory, &answers)
        try #require(status == 0, "\(name): \(SystemCallError("ptrace", errno: status)); \(machine.story)")
        return answers.enumerated().map { index, answer in
            Outcome(
                name: String(cString: hostile_attempt_name(Int32(index))),
                isOnlyBegun: hostile_attempt_is_only_begun(Int32(index)) != 0, answer: answer)
        }
    }

    private static func machine(_ mode: String, _ disk: String) throws -> Program {
        try Program.machineAtPrompt(["--sandbox", mode, "--disk", disk, "--rng"])
    }

    private static let threads = ["vcpu0", "blk0", "rng0", "control", "swkvm"]

    @Test(arguments: threads) func nothingSucceedsInAConfinedThread(thread: String) throws {
        let directory = try TemporaryDirectory(), other = try TemporaryDirectory()
        let disk = try directory.write(Array(repeating: 0, count: 1 << 20), to: "disk.raw")
        let machine = try Self.machine("on", disk)
        let outcomes = try Self.outcomes(of: thread, in: machine, other.path)
        #expect(outcomes.count >= 60)
        for outcome in outcomes where !outcome.isRefused {
            // Errors that the C library copes with.
            #expect([-Int(EACCES), -Int(ENOSYS)].contains(outcome.answer), "\(outcome.name): \(outcome.answer)")
        }
        // Nothing has happened, and the machine goes on.
        let files = ["secret", "image", "removed", "renamed"].map { other($0) }
        let listing = try Program(["stat", "-c", "%n %a %s"] + files)
        try listing.expectEnd(0)
        #expect(listing.output.lines.allSatisfy { $0.hasSuffix(" 600 8192") }, "\(listing.output.text)")
        try machine.powerOff()
    }

    /// Otherwise the test above would show nothing.
    @Test(arguments: ["vcpu0", "blk0"]) func theKernelMakesTheCallsOfAThreadThatIsNotConfined(thread: String) throws {
        let directory = try TemporaryDirectory(), other = try TemporaryDirectory()
        let disk = try directory.write(Array(repeating: 0, count: 1 << 20), to: "disk.raw")
        let machine = try Self.machine("off", disk)
        // What a host may be built or set up without.
        let mayLack = ["the number of a 32-bit program", "a packet socket", "a ring of io_uring without limits"]
        for outcome in try Self.outcomes(of: thread, in: machine, other.path) {
            #expect(!outcome.isRefused, "\(outcome.name)")
            if outcome.isOnlyBegun || mayLack.contains(outcome.name) { continue }
            #expect(outcome.answer >= 0, "\(outcome.name): \(outcome.answer)")
        }
        try machine.powerOff()
    }
}

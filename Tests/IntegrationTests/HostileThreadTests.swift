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
    fileprivate struct Outcome {
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

    /// What each layer makes of each attempt in a vCPU's thread, as a table: without the sandbox, with Landlock alone,
    /// without filters, and with all of it.
    @Test func withoutFiltersWhatHasANameIsRefusedToo() throws {
        let doctor = try Program([Host.swkvm, "doctor"])
        try doctor.expectEnd(0)
        let hasLandlock = doctor.output.lines.contains { $0.hasPrefix("ok") && $0.dropFirst(9).hasPrefix("landlock ") }
        var columns: [[Outcome]] = []
        for mode in ["off", "landlock", "user,capabilities,landlock", "on"] where hasLandlock || mode != "landlock" {
            let directory = try TemporaryDirectory(), other = try TemporaryDirectory()
            let disk = try directory.write(Array(repeating: 0, count: 1 << 20), to: "disk.raw")
            let machine = try Self.machine(mode, disk)
            columns.append(try Self.outcomes(of: "vcpu0", in: machine, other.path))
            try machine.powerOff()
        }
        for index in columns[0].indices {
            let name = columns[0][index].name, padding = String(repeating: " ", count: max(0, 44 - name.count))
            print(name + padding + columns.map { $0[index].word }.joined(separator: "  "))
        }
        for outcome in hasLandlock ? columns[1] : [] where Self.areFiles.contains(outcome.name) {
            #expect(outcome.answer == -Int(EACCES), "\(outcome.name): \(outcome.answer)")
        }
        let refused = Set(Self.needRights)
        var found = 0
        for outcome in columns[hasLandlock ? 2 : 1] where refused.contains(outcome.name) {
            found += 1
            // A host may be built without what some of them want.
            let isRefused = [-Int(EACCES), -Int(EPERM), -Int(ENOSYS)].contains(outcome.answer)
            #expect(isRefused, "\(outcome.name): \(outcome.answer)")
        }
        #expect(found == refused.count)
    }

    /// Attempts that Landlock alone refuses, root too.
    private static let areFiles = [
        "open a file of root's", "the same by open", "the same by openat2", "open another machine's image",
        "create a file", "open /dev/kvm again", "open its own memory", "remove a file", "rename a file",
        "make a directory", "link to a file",
    ]

    /// Attempts that filters are not needed for.
    private static let needRights = [
        "open a file of root's", "the same by open", "the same by openat2", "open another machine's image",
        "create a file", "open /dev/kvm again", "open its own memory", "make a file everybody's", "give a file away",
        "cut a file", "remove a file", "rename a file", "make a directory", "link to a file", "change the root",
        "mount a file system", "enter a new namespace", "signal another process",
        "signal a thread of another process", "another process's limits", "a packet socket", "another kernel",
        "a name of the host", "swap",
    ]
}

extension HostileThreadTests.Outcome {
    private static let errors = [
        EPERM: "EPERM", EACCES: "EACCES", ENOSYS: "ENOSYS", EBADF: "EBADF", EFAULT: "EFAULT", EINVAL: "EINVAL",
        ENOENT: "ENOENT", EIO: "EIO",
    ]

    /// For a table.
    fileprivate var word: String {
        let word =
            isRefused ? "SIGSYS" : answer >= 0 ? "made" : Self.errors[Int32(-answer)] ?? "error \(-answer)"
        return word + String(repeating: " ", count: max(0, 9 - word.count))
    }
}

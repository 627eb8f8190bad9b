// SPDX-License-Identifier: Apache-2.0

import CSandbox
import CSandboxTest
import Glibc
import Sandbox
import TestSupport
import Testing

/// A thread with the filter of a machine tries what an attacker in the process would. Each attempt is harmless by
/// itself: what it opens, changes or signals is the test's own.
@Suite(.timed) struct ConfinedThreadTests {
    /// Runs all attempts of ``attempts`` in a thread, which a filter may confine first.
    private static func results(confined: Bool, _ threads: UInt32 = everyThread) throws -> [String: Int32] {
        // Not a signal, which would end the test: an error that the kernel gives for none of these calls.
        let code = csandbox_machine([]).filter(threads, otherwise: 0x0005_0000 | UInt32(ENOTNAM))
        var results = [Int32](repeating: 0, count: Int(csandbox_attempt_count))
        let status = code.withUnsafeBufferPointer { code in
            csandbox_attempt_all(confined ? code.baseAddress : nil, UInt16(code.count), &results)
        }
        try #require(status == 0)
        var named: [String: Int32] = [:]
        for (index, result) in results.enumerated() {
            named[String(cString: csandbox_attempt_name(Int32(index)))] = result
        }
        return named
    }

    @Test(arguments: [CSANDBOX_VCPU.rawValue, CSANDBOX_DEVICE.rawValue, everyThread])
    func `Nothing that an attacker tries succeeds`(_ threads: UInt32) throws {
        let results = try Self.results(confined: true, threads)
        #expect(results.count >= 50)
        for (name, result) in results.sorted(by: { $0.key < $1.key }) {
            #expect(
                [ENOTNAM, EACCES, EPERM, ENOSYS].contains(result), "\(name): \(result == 0 ? "succeeded" : "\(result)")"
            )
        }
    }

    @Test func `The attempts succeed without a filter`() throws {
        let results = try Self.results(confined: false)
        // The others need rights or parts of the kernel that a host may lack.
        for name in [
            "open a file", "create a file", "socket", "memory that can be executed", "a mapping made executable",
            "fork",
            "memfd_create", "dup", "pipe2", "chdir", "umask", "setpriority", "inotify_init1", "personality",
        ] {
            #expect(results[name] == 0, "\(name)")
        }
    }

    /// What a child process with this end of a refused call says, and how it ends.
    private static func child(_ exitStatus: Int32) -> (status: Int32, text: String) {
        let code = csandbox_machine([], reports: exitStatus < 0).filter(otherwise: 0x0003_0000)
        var text = [CChar](repeating: 0, count: 4096)
        let status = code.withUnsafeBufferPointer {
            csandbox_refused_in_child($0.baseAddress, UInt16($0.count), exitStatus, &text, Int32(text.count))
        }
        return (status, text.withUnsafeBufferPointer { String(cString: $0.baseAddress!) })
    }

    @Test func `A refused call ends the process, which says what it was`() {
        let (status, text) = Self.child(Sandbox.exitStatus)
        #expect(status == Sandbox.exitStatus << 8)
        #expect(text.hasPrefix("test: the thread 'attacker' made the system call getppid(0x"))
        #expect(text.hasSuffix("), which the sandbox does not allow: the process ends\n"))
    }

    @Test func `A call that is only reported is made`() {
        let (status, text) = Self.child(-1)
        #expect(status == 7 << 8)
        #expect(text.hasPrefix("test: the thread 'attacker' made the system call getppid(0x"))
        #expect(text.hasSuffix("), which the sandbox does not allow\n"))
    }

    @Test(
        arguments: [
            (0, "SIGILL at program counter 0x"), (1, "SIGTRAP at program counter 0x"),
            (2, "SIGSEGV at program counter 0x"),
            (3, "SIGABRT at program counter 0x"), (4, "SIGSEGV at program counter 0x"),
            (5, "SIGILL at program counter 0x"),
        ] as [(Int32, String)]) func `A fault is reported`(kind: Int32, beginning: String)
    {
        var text = [CChar](repeating: 0, count: 4096)
        let status = csandbox_fault_in_child(kind, &text, Int32(text.count))
        #expect(status == Sandbox.faultStatus << 8)
        let lines = text.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }.split(separator: "\n")
        let report = lines.first ?? ""
        #expect(report.hasPrefix("test: internal error: " + beginning), "\(report)")
        #expect(report.contains(", accessing address 0x8, ") == (kind == 2), "\(report)")
        #expect(report.contains(", in the thread 'faulty'"), "\(report)")
        #expect(report.hasSuffix(": please report this bug of swkvm"))
        // The others have left their frames.
        if kind < 3 { #expect(lines.last?.hasPrefix("test: called from 0x") == true) }
    }
}

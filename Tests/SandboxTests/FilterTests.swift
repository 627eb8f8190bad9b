// SPDX-License-Identifier: Apache-2.0

import CSandbox
import Glibc
import Sandbox
import TestSupport
import Testing

/// The compiled filters, interpreted, against the rules that they were made from.
@Suite(.timed) struct FilterTests {
    /// What the kernel's interpreter does with a filter and `struct seccomp_data`.
    private static func run(
        _ filter: [sock_filter], _ number: UInt32, _ arguments: [UInt64], architecture: UInt32 = CSANDBOX_ARCHITECTURE,
        pointer: UInt64 = 0
    ) throws -> UInt32 {
        var data = [
            number, architecture, UInt32(truncatingIfNeeded: pointer), UInt32(truncatingIfNeeded: pointer >> 32),
        ]
        for argument in arguments {
            data += [UInt32(truncatingIfNeeded: argument), UInt32(truncatingIfNeeded: argument >> 32)]
        }
        var accumulator: UInt32 = 0
        var next = 0
        while true {
            let instruction = filter[next]
            next += 1
            func branch(_ holds: Bool) { next += Int(holds ? instruction.jt : instruction.jf) }
            switch Int32(instruction.code) {
            case BPF_LD | BPF_W | BPF_ABS:
                let index = Int(instruction.k / 4)
                accumulator = try #require(data.indices.contains(index) ? data[index] : nil)
            case BPF_JMP | BPF_JA: next += Int(instruction.k)
            case BPF_JMP | BPF_JEQ | BPF_K: branch(accumulator == instruction.k)
            case BPF_JMP | BPF_JGE | BPF_K: branch(accumulator >= instruction.k)
            case BPF_JMP | BPF_JSET | BPF_K: branch(accumulator & instruction.k != 0)
            case BPF_RET | BPF_K: return instruction.k
            default: throw Unknown(code: instruction.code)
            }
        }
    }

    private struct Unknown: Error { let code: UInt16 }

    private static let allow: UInt32 = 0x7fff_0000, trap: UInt32 = 0x0003_0000, kill: UInt32 = 0x8000_0000

    private static func result(_ rule: csandbox_rule?) -> UInt32 {
        guard let rule else { return trap }
        return rule.error == 0 ? allow : 0x0005_0000 | UInt32(rule.error)
    }

    private static let needs: [Sandbox.Needs] = [
        [], .terminal, .laterTerminal, .vsock, .remoteDisk, .remoteTLS, .metricsFile, .broker, .rotatedFile,
        .controlGroup,
        [.terminal, .remoteDisk, .remoteTLS, .metricsFile, .broker, .rotatedFile, .controlGroup],
    ]
    private static let threads = [
        CSANDBOX_VCPU.rawValue, CSANDBOX_DEVICE.rawValue, CSANDBOX_OTHER.rawValue, everyThread,
        CSANDBOX_DEVICE.rawValue | CSANDBOX_SOCKETS.rawValue, CSANDBOX_BROKER.rawValue, CSANDBOX_API.rawValue,
    ]

    @Test(arguments: needs, threads) func `A filter decides as the first rule whose condition holds`(
        _ needs: Sandbox.Needs, _ threads: UInt32
    ) throws {
        let machine = csandbox_machine(needs)
        let filter = machine.filter(threads, otherwise: Self.trap)
        let own = rules.filter { machine.has($0, threads) }
        var random = SeededGenerator(seed: 14)
        // Values that conditions name, those beside them, and others.
        var values: [UInt64] = [0, 1, 4, 7, .max, 4711, 4712, 1 << 32, 1 << 32 | 4711, UInt64(getpid())]
        for rule in rules { values += [UInt64(rule.value), UInt64(rule.value) + 1, UInt64(rule.value) ^ 1] }
        for number in 0..<600 {
            let candidates = own.filter { Int($0.call) == number }
            let turns = candidates.contains { UInt32($0.test) != CSANDBOX_ANYTHING.rawValue } ? 400 : 2
            for _ in 0..<turns {
                let arguments = (0..<6).map { _ in values.randomElement(using: &random)! }
                let expected = candidates.first { $0.holds(for: arguments, in: machine) }
                let result = try Self.run(filter, UInt32(number), arguments)
                #expect(result == Self.result(expected), "call \(number) with \(arguments)")
            }
        }
    }

    @Test func `Each rule that has a condition decides some call`() throws {
        let machine = csandbox_machine(Sandbox.Needs(rawValue: .max))
        let filter = machine.filter(otherwise: Self.trap)
        let allowed = rules.filter { $0.error == 0 && UInt32($0.threads) & everyThread != 0 }
        for rule in allowed where UInt32(rule.test) == CSANDBOX_EQUAL.rawValue {
            var arguments = [UInt64](repeating: 0, count: 6)
            arguments[Int(rule.argument)] = UInt64(rule.value)
            #expect(try Self.run(filter, UInt32(rule.call), arguments) == Self.allow, "\(String(cString: rule.name))")
        }
    }

    @Test func `Another architecture and the numbers of x32 are not let through`() throws {
        let filter = csandbox_machine([]).filter(otherwise: Self.trap)
        let nothing = [UInt64](repeating: 0, count: 6)
        #expect(try Self.run(filter, UInt32(SYS_read), nothing) == Self.allow)
        // 1 is write for x86-64 and exit for i386.
        #expect(try Self.run(filter, 1, nothing, architecture: 0x4000_0003) == Self.kill)
        for number in [UInt32(SYS_read) | 0x4000_0000, .max] {
            #expect(try Self.run(filter, number, nothing) == Self.trap)
        }
    }

    @Test func `Only the instruction of a report makes any call`() throws {
        let passage = csandbox_passage()
        let filter = csandbox_machine([], reports: true).filter(otherwise: Self.trap)
        let nothing = [UInt64](repeating: 0, count: 6)
        #expect(try Self.run(filter, UInt32(SYS_execve), nothing, pointer: passage) == Self.allow)
        // The C library tries it with all signals blocked.
        #expect(try Self.run(filter, 435, nothing) == 0x0005_0000 | UInt32(ENOSYS))
        for other in [0, passage + 1, passage & 0xffff_ffff ^ 1, passage ^ 1 << 40] {
            #expect(try Self.run(filter, UInt32(SYS_execve), nothing, pointer: other) == Self.trap)
            #expect(try Self.run(filter, UInt32(SYS_read), nothing, pointer: other) == Self.allow)
            // It would fail, which a report is about too.
            #expect(try Self.run(filter, UInt32(SYS_openat), nothing, pointer: other) == Self.trap)
        }
    }

    @Test func `A filter fits into its buffer, and no jump leaves it`() {
        for bits in 0..<128 as Range<UInt32> { Self.checkJumps(Sandbox.Needs(rawValue: bits)) }
    }

    private static func checkJumps(_ needs: Sandbox.Needs) {
        for threads in Self.threads {
            let machine = csandbox_machine(needs, reports: needs.rawValue & 1 != 0)
            let filter = machine.filter(threads, otherwise: Self.trap)
            #expect(filter.count < 512)
            let strays = filter.enumerated().filter { index, instruction in
                let code = Int32(instruction.code)
                guard code & 7 != BPF_RET else { return false }
                let isJump = code & 7 == BPF_JMP, isAlways = isJump && code & 0xf0 == BPF_JA
                let furthest =
                    isAlways ? Int(instruction.k) : isJump ? Int(max(instruction.jt, instruction.jf)) : 0
                return index + 1 + furthest >= filter.count
            }
            #expect(strays.isEmpty)
        }
    }

    @Test func `A thread of a kind may do less than the process`() {
        let machine = csandbox_machine([])
        for kind in [CSANDBOX_VCPU, CSANDBOX_DEVICE] {
            let own = rules.filter { machine.has($0, kind.rawValue) }
            let all = rules.filter { machine.has($0, everyThread) }
            #expect(own.count < all.count)
        }
        for name in ["accept4", "mincore", "seccomp"] {
            for rule in rules where String(cString: rule.name) == name {
                #expect(!machine.has(rule, CSANDBOX_VCPU.rawValue), "\(name)")
                #expect(!machine.has(rule, CSANDBOX_DEVICE.rawValue), "\(name)")
            }
        }
    }

    @Test func `No list has calls that make rings, other processes or code`() {
        let never = [
            "io_uring_setup", "io_uring_register", "execve", "execveat", "ptrace", "process_vm_writev", "unshare",
            "setns",
            "mount", "bpf", "userfaultfd", "perf_event_open", "memfd_create", "dup2",
        ]
        for rule in rules { #expect(!never.contains(String(cString: rule.name)), "\(String(cString: rule.name))") }
    }

    @Test func `Names are those of the kernel's header, and each rule has a reason`() {
        for rule in rules {
            #expect(csandbox_call_name(Int(rule.call)).map { String(cString: $0) } == String(cString: rule.name))
            #expect(String(cString: rule.reason).count > 5)
            #expect(
                rule.threads != 0
                    && UInt32(rule.threads) & ~(everyThread | CSANDBOX_SOCKETS.rawValue | CSANDBOX_BROKER.rawValue) == 0
            )
        }
        #expect(csandbox_call_name(9999) == nil)
    }
}

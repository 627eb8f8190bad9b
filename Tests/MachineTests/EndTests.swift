// SPDX-License-Identifier: Apache-2.0

import Boot
import DiskImage
import Glibc
import Linux
import Sandbox
import TestSupport
import Testing

@testable import GuestMemory
@testable import KVM
@testable import Machine

/// What a user learns from the way a machine ended.
@Suite(.timed) struct EndTests {
    private static let internalError = InternalError(suberror: 1, data: [], instruction: [0x0f, 0x0b])

    private static let ends: [(MachineEnd, status: Int32, sentence: String?)] = [
        (.powerOff, 0, nil), (.reset, 103, "the guest rebooted (--on-reboot exit)"),
        (.quit, 104, "ended at the console"), (.killed, 105, "ended by the debugger"), (.guestStatus(0), 0, nil),
        (.stopTimeout(seconds: 5), 106, "ended: the guest did not power off within 5 seconds (--stop-timeout)"),
        (.guestStatus(1), 1, "the guest ended with status 1"), (.guestStatus(63), 63, "the guest ended with status 63"),
        (
            .tripleFault(cpu: 3, state: "registers"), 100,
            "vCPU 3 shut down (triple fault): the guest's kernel crashed before it could report, or reset itself that way"
        ),
        (
            .internalError(cpu: 2, internalError, state: "registers"), 101,
            "KVM stopped vCPU 2 with an internal error: it cannot emulate the instruction"
        ),
        (
            .unexpectedExit(cpu: 1, name: "KVM_EXIT_TDX", state: "registers"), 102,
            "vCPU 1 stopped with KVM_EXIT_TDX, which swkvm does not handle"
        ),
        (.hostError("no more threads"), 71, "no more threads"),
        (.signal(SIGTERM), 143, "ended by signal 15 before the guest powered off"),
        (.signal(SIGINT), 130, "ended by signal 2 before the guest powered off"),
        (.cancelled(SIGINT), 130, "ended by signal 2 before the guest started"),
    ]

    @Test func statusesAndSentences() {
        for (end, status, sentence) in Self.ends {
            #expect(end.exitStatus == status)
            #expect(end.sentence == sentence)
        }
    }

    @Test func registersAreShownWhereTheyHelp() {
        for (end, _, _) in Self.ends {
            let wanted =
                switch end {
                case .internalError, .unexpectedExit, .tripleFault: true
                default: false
                }
            #expect((end.details != nil) == wanted)
        }
    }

    /// A fault now and then is reported in full and followed by a boot at once; a loop of them slows down.
    @Test func tripleFaultsInALoop() {
        var faults = TripleFaults()
        #expect(faults.response(at: 1000) == .init(isDetailed: true, pause: 0))
        var time: UInt64 = 1000
        for pause: UInt64 in [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000] {
            time += 50
            #expect(faults.response(at: time) == .init(isDetailed: false, pause: pause))
            time += pause
        }
        // The boot after the last pause was not in the loop.
        time += TripleFaults.calm
        #expect(faults.response(at: time) == .init(isDetailed: true, pause: 0))
        #expect(faults.response(at: time + TripleFaults.calm - 1) == .init(isDetailed: false, pause: 1000))
    }

    /// A guest chooses 0 to 63 and nothing beyond, so swkvm's own statuses cannot be mistaken for a guest's.
    @Test func statusesOfSwkvmsOwnAreNoGuests() {
        let own = [
            ExitStatus.usage, ExitStatus.noInput, ExitStatus.hostError, ExitStatus.tripleFault,
            ExitStatus.internalError,
            ExitStatus.unexpectedExit, ExitStatus.reset, ExitStatus.quit, ExitStatus.killed, ExitStatus.stopTimeout,
            ExitStatus.signalBase + 1,
        ]
        #expect(own.allSatisfy { $0 > 63 } && Set(own).count == own.count)
    }

    /// A script can tell them apart: only a guest that did what it was to do gives 0.
    @Test func noEndButThePowerOffAndTheGuestsOwnIsZero() {
        for (end, status, _) in Self.ends where status == 0 {
            switch end {
            case .powerOff, .guestStatus(0): break
            default: Issue.record("\(end) ends with status 0")
            }
        }
    }

    /// The table in docs/usage.md is the one in the code, and has a line for the status of each end and of each error.
    @Test func theTableInTheDocumentationIsTheCodes() throws {
        let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
        let text = String(decoding: try readFile(root + "/docs/usage.md", limit: 1 << 20), as: UTF8.self)
        let lines = text.split(separator: "\n").drop { $0 != "| exit status | how the machine ended |" }.dropFirst(2)
        let rows = lines.prefix { $0.hasPrefix("| ") }.map {
            $0.split(separator: "|").map { $0.drop { $0 == " " }.reversed().drop { $0 == " " }.reversed() }
        }
        #expect(rows.map { $0.map { String($0) } } == ExitStatus.table.map { [$0.statuses, $0.meaning] })

        let statuses = Self.ends.map(\.status) + Self.errors.map { $0.0.exitStatus }
        for status in statuses {
            let line = ExitStatus.table.contains { line in
                if line.statuses == "1 to 63" { return (1...63).contains(status) }
                if line.statuses == "128 + N" { return status > 128 }
                return line.statuses == "\(status)"
            }
            #expect(line, "status \(status) is in no line")
        }
    }

    private static let errors: [(MachineError, Int32)] = [
        (.noCPUs(0), 64), (.memory(.empty), 64), (.memory(.notPageMultiple(size: 1, pageSize: 4096)), 64),
        (.tooManyDevices(wanted: 20, maximum: 16), 64), (.networks(.sameDescriptor(5)), 64),
        (.boot(.commandLineTooLong(kernel: "vmlinuz", length: 3000, added: 0, limit: 2047)), 64),
        (.boot(.commandLineHasNUL), 64), (.boot(.notAKernel(file: "k")), 66),
        (.boot(.unreadable(file: "k", SystemCallError("open", errno: ENOENT))), 66),
        (.boot(.wrongMachine(file: "k", machine: 183)), 66), (.boot(.truncated(file: "k", wanted: 2, found: 1)), 66),
        (.boot(.doesNotFit(file: "k", start: 0, end: 2, limit: 1)), 64),
        (.disk(.system(path: "d", SystemCallError("open", errno: ENOENT))), 66),
        (.disk(.system(path: "d", SystemCallError("read", errno: EIO))), 71),
        (.disk(.backing(of: "o", .system(path: "d", SystemCallError("open", errno: ENOENT)))), 66),
        (.disk(.key(.file("k"), reason: "open: No such file or directory")), 66),
        (.disk(.notQCOW2(path: "d", found: [1])), 66),
        (.disk(.invalid(path: "d", reason: "an L1 table")), 66),
        (.disk(.backing(of: "o", .truncated(path: "d", what: "x", needed: 2, size: 1))), 66),
        (.disk(.noSnapshot(path: "d", name: "s")), 66), (.disk(.notAFile(path: "d")), 66),
        (.disk(.formatUnknown(path: "d.iso")), 64), (.disk(.sameDisk(path: "d", file: "d", other: "e")), 64),
        (.disk(.formatContradicted(path: "d.img", guess: .raw, contents: .qcow2, option: nil)), 64),
        (.disk(.backing(of: "o", .outside(path: "/etc/shadow"))), 64),
        (.disk(.keyMissing(path: "d", method: "LUKS")), 64),
        (.disk(.locked(path: "d", forWriting: true)), 71), (.disk(.remote(path: "nbd://h", reason: "connect")), 71),
        (.console(.file("/x/y"), SystemCallError("open", errno: ENOENT)), 66),
        (.debugger(.unix("/x/y"), SystemCallError("bind", errno: ENOENT)), 66),
        (.console(.unix("s"), SystemCallError("bind", errno: EADDRINUSE)), 71),
        (.memory(.largerThanHost(size: 2, ram: 1, swap: 0)), 71), (.kvm(.version(found: 11)), 71),
        (.host(purpose: "start a thread", SystemCallError("clone", errno: EAGAIN)), 71),
    ]

    /// As `<sysexits.h>` has them: 64 is the command line, 66 an input that cannot be read, 71 the system.
    @Test func statusesOfErrors() {
        for (error, status) in Self.errors { #expect(error.exitStatus == status, "\(error)") }
    }

    /// Who ends a machine ends it also when the guest resets itself at the same moment; otherwise a reset is the first
    /// reason like any other.
    @Test func anEndFromOutsideOverridesAReset() throws {
        for reset in [MachineEnd.reset, .tripleFault(cpu: 0, state: "")] {
            let ending = try Ending()
            ending.post(reset)
            ending.post(.powerOff)
            #expect(ending.end?.exitStatus == reset.exitStatus)
            ending.post(.quit)
            #expect(ending.end?.exitStatus == ExitStatus.quit)
            let goesOn = ending.clear()
            #expect(!goesOn && ending.isStopping)
        }
        let ending = try Ending()
        ending.post(.reset)
        let goesOn = ending.clear()
        #expect(goesOn && !ending.isStopping && ending.end == nil && ending.event.drain() == 0)
    }

    /// Of several reasons the first counts.
    @Test func theFirstReasonCounts() throws {
        let ending = try Ending()
        #expect(!ending.isStopping && ending.end == nil)
        ending.post(.guestStatus(7))
        ending.post(.quit)
        #expect(ending.isStopping && ending.end?.exitStatus == 7)
        ending.wait()
        // Still rung: each waiter comes through.
        ending.wait()
    }
}

@Suite(.timed) struct StatusTests {
    private func status(
        cpus: Int, memory: (resident: UInt64, huge: UInt64)?, devices: [MachineStatus.Device] = []
    ) -> String {
        MachineStatus(
            name: "vm", cpus: cpus, memorySize: 1 << 30,
            memory: memory.map { .init(resident: $0.resident, transparentHuge: $0.huge) }, devices: devices
        ).description
    }

    @Test func isATableOfDevices() {
        let disk = MachineStatus.Device(
            name: "blk0", requests: 12, bytes: (4096, 123_456_789), kicks: 11, exitKicks: 1, interrupts: 10, errors: 2,
            drops: nil)
        let entropy = MachineStatus.Device(
            name: "rng0", requests: 1, bytes: nil, kicks: 1, exitKicks: 0, interrupts: 1, errors: 0, drops: nil)
        #expect(status(cpus: 1, memory: nil) == "machine vm: 1 vCPU, 1024 MiB of RAM")
        #expect(
            status(cpus: 2, memory: (5 << 20, 0))
                == "machine vm: 2 vCPUs, 1024 MiB of RAM (5 MiB resident, 0 MiB dirty)")
        #expect(
            status(cpus: 2, memory: (6 << 20, 4 << 20), devices: [disk, entropy]) == """
                machine vm: 2 vCPUs, 1024 MiB of RAM (6 MiB resident, 0 MiB dirty, 4 MiB in transparent huge pages)
                device  requests     in   out  kicks  exits  interrupts  errors  drops
                blk0          12  4096B  117M     11      1          10       2      -
                rng0           1      -     -      1      0           1       0      -
                """)
    }

    @Test func showsTheQueuesOfADeviceWithSeveral() {
        var disk = MachineStatus.Device(
            name: "blk0", requests: 12, bytes: (4096, 512), kicks: 11, exitKicks: 1, interrupts: 10, errors: 2,
            drops: nil)
        disk.queues = [.init(requests: 4, bytes: (4096, 0)), .init(requests: 8, bytes: (0, 512))]
        #expect(
            status(cpus: 1, memory: nil, devices: [disk]) == """
                machine vm: 1 vCPU, 1024 MiB of RAM
                device  requests     in   out  kicks  exits  interrupts  errors  drops
                blk0          12  4096B  512B     11      1          10       2      -
                blk0.0         4  4096B    0B      -      -           -       -      -
                blk0.1         8     0B  512B      -      -           -       -      -
                """)
    }

    @Test func saysHowTheProcessIsConfined() {
        var status = MachineStatus(name: "vm", cpus: 1, memorySize: 1 << 30, memory: nil, devices: [])
        for (sandbox, text) in [(nil, ""), ("on (seccomp)", ", sandbox on (seccomp)")] {
            status.sandbox = sandbox
            #expect(status.description == "machine vm: 1 vCPU, 1024 MiB of RAM" + text)
        }
    }

    @Test func saysWhyTheMachineIsPaused() {
        var disk = MachineStatus.Device(
            name: "blk0", requests: 1, bytes: (0, 0), kicks: 1, exitKicks: 0, interrupts: 1, errors: 0, drops: nil)
        var status = MachineStatus(name: "vm", cpus: 1, memorySize: 1 << 30, memory: nil, devices: [disk])
        func line() -> Substring? { status.description.split(separator: "\n").first }
        #expect(line() == "machine vm: 1 vCPU, 1024 MiB of RAM")
        status.isPaused = true
        #expect(line() == "machine vm: 1 vCPU, 1024 MiB of RAM, paused")
        disk.isStopped = true
        status = MachineStatus(
            name: "vm", cpus: 1, memorySize: 1 << 30, memory: nil, devices: [disk, disk], isPaused: true)
        #expect(line() == "machine vm: 1 vCPU, 1024 MiB of RAM, paused after an error of blk0 and blk0")
    }

    /// However large the figures are.
    @Test func fitsIn80Columns() {
        let largest = MachineStatus.Device(
            name: "net15", requests: .max, bytes: (.max, .max), kicks: .max, exitKicks: .max, interrupts: .max,
            errors: .max, drops: .max, queues: Array(repeating: .init(requests: .max, bytes: (.max, .max)), count: 64))
        for line in status(cpus: 1, memory: nil, devices: [largest]).split(separator: "\n") {
            #expect(line.count <= 80, "\(line)")
        }
        #expect(MachineStatus.short(999_999) == "999999" && MachineStatus.short(1_000_000) == "1000k")
        #expect(MachineStatus.size(99_999) == "99999B" && MachineStatus.size(100_000) == "97K")
    }
}

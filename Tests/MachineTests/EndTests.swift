import Glibc
import Testing

@testable import GuestMemory
@testable import KVM
@testable import Machine

/// What a user learns from the way a machine ended.
@Suite struct EndTests {
    private static let internalError = InternalError(suberror: 1, data: [], instruction: [0x0f, 0x0b])

    private static let ends: [(MachineEnd, status: Int32, sentence: String?)] = [
        (.powerOff, 0, nil), (.reset, 0, nil), (.quit, 0, "ended at the console"), (.guestStatus(0), 0, nil),
        (.guestStatus(1), 1, "the guest ended with status 1"), (.guestStatus(63), 63, "the guest ended with status 63"),
        (.tripleFault(cpu: 3), 100, "vCPU 3 shut down (triple fault): the guest's kernel crashed before it could report, or reset itself that way"),
        (
            .internalError(cpu: 2, internalError, state: "registers"), 101,
            "KVM stopped vCPU 2 with an internal error: it cannot emulate the instruction"
        ),
        (.unexpectedExit(cpu: 1, name: "KVM_EXIT_TDX", state: "registers"), 102, "vCPU 1 stopped with KVM_EXIT_TDX, which swkvm has no answer to"),
        (.hostError("no more threads"), 71, "no more threads"), (.signal(SIGTERM), 143, "ended by signal 15 before the guest had powered off"),
        (.signal(SIGINT), 130, "ended by signal 2 before the guest had powered off"),
    ]

    @Test func statusesAndSentences() {
        for (end, status, sentence) in Self.ends {
            #expect(end.exitStatus == status)
            #expect(end.sentence == sentence)
        }
    }

    @Test func registersAreShownWhereTheyHelp() {
        for (end, _, _) in Self.ends {
            let wanted = switch end { case .internalError, .unexpectedExit: true default: false }
            #expect((end.details != nil) == wanted)
        }
    }

    /// A guest chooses 0 to 63 and nothing beyond, so swkvm's own statuses cannot be mistaken for a guest's.
    @Test func statusesOfSwkvmsOwnAreNoGuests() {
        let own = [ExitStatus.hostError, ExitStatus.tripleFault, ExitStatus.internalError, ExitStatus.unexpectedExit, ExitStatus.signalBase + 1, 64]
        #expect(own.allSatisfy { $0 > 63 } && Set(own).count == own.count)
    }

    /// The first reason counts, whoever else has one.
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

@Suite struct StatusLineTests {
    private func status(cpus: Int, memory: (resident: UInt64, huge: UInt64)?, devices: [MachineStatus.Device] = []) -> String {
        MachineStatus(
            name: "vm", cpus: cpus, memorySize: 1 << 30,
            memory: memory.map { .init(resident: $0.resident, transparentHuge: $0.huge) }, devices: devices
        ).description
    }

    @Test func isOneLine() {
        let disk = MachineStatus.Device(name: "blk0", requests: 12, kicks: 11, exitKicks: 1, interrupts: 10, errors: 2)
        #expect(status(cpus: 1, memory: nil) == "vm: 1 vCPU")
        #expect(status(cpus: 2, memory: (5 << 20, 0)) == "vm: 2 vCPUs; 5 of 1024 MiB resident, 0 dirty")
        #expect(
            status(cpus: 2, memory: (6 << 20, 4 << 20), devices: [disk])
                == "vm: 2 vCPUs; 6 of 1024 MiB resident, 0 dirty (4 MiB in transparent huge pages); blk0 12 requests, 11 kicks (1 by exits), 10 interrupts, 2 errors")
    }
}

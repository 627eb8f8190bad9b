// SPDX-License-Identifier: Apache-2.0

import CLinux
import DiskImage
import Devices
import Glibc
import GuestMemory
import KVM
import Linux
import Logging
import PCI
import Platform
import TestSupport
import Testing
import Virtio

@testable import Machine

/// Keeps what a guest prints.
private final class Paper: SerialSink {
    private let bytes = Guarded<[UInt8]>([])
    var text: String { bytes.withLock { String(decoding: $0, as: UTF8.self) } }

    func take(_ more: Span<UInt8>) -> Int {
        bytes.withLock { bytes in for index in more.indices { bytes.append(more[index]) } }
        return more.count
    }
}

/// A device that is never quiet.
private final class BusyDevice: VirtioDevice {
    let name = "busy0"
    let deviceID: UInt32 = 4
    let features: FeatureSet = []
    let maximumQueueSizes: [UInt16] = [16]
    let configuration = ConfigurationSpace([])
    /// Readable when a pause has begun.
    let isPausing: EventFD

    init() throws { isPausing = try EventFD() }

    func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {}
    func activate(_ activation: Activation) {}
    func reset() {}
    func stopQueue(_ index: Int) {}
    func startQueue(_ configuration: QueueConfiguration) {}
    func pause(onQuiet: @escaping @Sendable () -> Void) { isPausing.signal() }
    func resume() {}
}

/// Machines within the test's own process, as another program would use the library.
@Suite(.timed, .enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "needs a /dev/kvm that opens")) struct MachineTests {
    private let log = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

    private func configuration(_ words: String, cpus: Int = 1) -> Configuration {
        Configuration(name: "test", cpus: cpus, memory: .init(size: 64 << 20), commandLine: words)
    }

    /// Waits for the bundled guest's prompt.
    private func waitForPrompt(on paper: Paper) throws {
        for _ in 0..<60_000 {
            if paper.text.hasSuffix("\r\n> ") { return }
            usleep(1_000)
        }
        Issue.record("no prompt came: \(paper.text)")
    }

    @Test func runsAndEnds() throws {
        let paper = Paper()
        let machine = try Machine(configuration("test=none"), output: paper, log: log)
        try machine.start()
        #expect(machine.waitForEnd().exitStatus == 0)
        #expect(paper.text == "swkvm guest\r\n")
        // Asked once more, it says the same.
        #expect(machine.waitForEnd().exitStatus == 0)
    }

    /// Two machines in one process do not know each other.
    @Test func twoAtOnce() throws {
        let papers = [Paper(), Paper()]
        let machines = try papers.map { try Machine(configuration("", cpus: 2), output: $0, log: log) }
        for machine in machines { try machine.start() }
        for paper in papers { try waitForPrompt(on: paper) }
        let words = Array("echo to the first\rpoweroff\r".utf8)
        var taken = 0
        while taken < words.count {
            let rest = Array(words[taken...])
            taken += machines[0].consolePort.receive(rest.span)
            usleep(1_000)
        }
        #expect(machines[0].waitForEnd().exitStatus == 0)
        #expect(papers[0].text.contains("\r\nto the first") && !papers[1].text.contains("first"))
        machines[1].control.post(.powerButton)
        #expect(machines[1].waitForEnd().exitStatus == 0)
    }

    @Test func stopsFromOutside() throws {
        let paper = Paper()
        let machine = try Machine(configuration("", cpus: 4), output: paper, log: log)
        try machine.start()
        try waitForPrompt(on: paper)
        machine.control.end(.signal(SIGTERM))
        machine.control.end(.quit)
        #expect(machine.waitForEnd().exitStatus == 143)
    }

    /// Stopped at once, maybe before its threads have entered the guest: none may miss it.
    @Test func stopsWhileItStarts() throws {
        for _ in 0..<50 {
            let machine = try Machine(configuration("", cpus: 2), output: Paper(), log: log)
            try machine.start()
            machine.control.end(.quit)
            #expect(machine.waitForEnd().exitStatus == ExitStatus.quit)
        }
    }

    // MARK: Pausing

    /// Paused, a machine is the same whenever one looks; resumed, it takes up what has come meanwhile.
    @Test(arguments: [1, 4]) func pausesAndResumes(cpus: Int) throws {
        let paper = Paper()
        var configuration = configuration("", cpus: cpus)
        let disk = try scratchDisk()
        defer { unlink(disk.path) }
        // As long as the largest read.
        try #require(truncate(disk.path, 2 << 30) == 0)
        configuration.disks = [disk]
        configuration.entropy = .init()
        let machine = try Machine(configuration, output: paper, log: log)
        let control = machine.control
        #expect(throws: MachineControlError.notRunning) { try control.perform(.pause) }
        try machine.start()
        try waitForPrompt(on: paper)
        #expect(throws: MachineControlError.notPaused) { try control.perform(.resume) }
        try type("sum vda 0 4194304\r", into: machine)
        for _ in 0..<20 {
            #expect(try control.perform(.pause) == "the machine is paused")
            #expect(control.isPaused && machine.board.cpus.allSatisfy { $0.pausePoint.isStopped })
            #expect(throws: MachineControlError.alreadyPaused) { try control.perform(.pause) }
            let before = try state(of: machine)
            usleep(500)
            #expect(try state(of: machine) == before)
            #expect(try control.perform(.togglePause) == "the machine is running")
            #expect(!control.isPaused)
        }
        // On with it: the guest has gone further than it was.
        let count = try state(of: machine)
        let counters = machine.board.registry.slots[0].function.counters
        for _ in 0..<60_000 where counters.requests.value <= count.requests { usleep(1_000) }
        #expect(counters.requests.value > count.requests)
        machine.control.end(.quit)
        #expect(machine.waitForEnd().exitStatus == ExitStatus.quit)
        #expect(throws: MachineControlError.notRunning) { try control.perform(.pause) }
    }

    private struct Snapshot: Equatable {
        var instructions: [UInt64] = []
        var requests: UInt64
        var interrupts: UInt64
        var sum: UInt64
    }

    /// The vCPUs' instruction pointers, the disk's counters, and all of RAM.
    private func state(of machine: Machine) throws -> Snapshot {
        let counters = machine.board.registry.slots[0].function.counters
        var snapshot = Snapshot(requests: counters.requests.value, interrupts: counters.interrupts.value, sum: 0)
        guard machine.control.isPaused else { return snapshot }
        for cpu in machine.board.cpus { snapshot.instructions.append(try cpu.cpu.registers().rip) }
        for place in stride(from: UInt64(0), to: 64 << 20, by: 65536 + 64) {
            snapshot.sum = snapshot.sum &* 31 &+ (try machine.memory.ram.readUInt64(at: GuestAddress(place)))
        }
        return snapshot
    }

    @Test func endsWhilePaused() throws {
        for isPausing in [false, true] {
            let paper = Paper()
            let machine = try Machine(configuration("", cpus: 2), output: paper, log: log)
            try machine.start()
            if isPausing {
                machine.control.post(.pause)
            } else {
                _ = try machine.control.perform(.pause)
            }
            machine.control.end(.quit)
            #expect(machine.waitForEnd().exitStatus == ExitStatus.quit)
        }
    }

    /// A pause waits for a device with work in flight. The power button and the status are served meanwhile, and the
    /// end does not wait for it.
    @Test(arguments: [false, true]) func requestsWhileAPauseWaits(isResumed: Bool) throws {
        let paper = Paper(), device = try BusyDevice()
        let machine = try Machine(configuration("", cpus: 2), output: paper, log: log)
        let control = machine.control
        try machine.start()
        try waitForPrompt(on: paper)
        try control.attach(device)
        let answers = Guarded<[MachineControl.Answer]>([])
        control.post(.pause) { answer in answers.withLock { $0.append(answer) } }
        device.isPausing.wait()
        if !isResumed {
            // As many as may wait do not keep the urgent ones out.
            for _ in 0..<64 { control.post(.setLink(device: "net0", isUp: true)) }
            #expect(throws: MachineControlError.busy) { try control.perform(.setLink(device: "net0", isUp: true)) }
        }
        #expect(try control.perform(.powerButton) == "the power button was pressed")
        #expect(try control.perform(.status).hasPrefix("machine test: 2 vCPUs"))
        #expect(answers.withLock { $0 }.isEmpty && !control.isPaused)
        if isResumed { #expect(try control.perform(.resume) == "the machine is running") } else { control.end(.quit) }
        #expect(machine.waitForEnd().exitStatus == (isResumed ? 0 : ExitStatus.quit))
        #expect(answers.withLock { $0 } == [.failure(isResumed ? .pauseCancelled : .notRunning)])
    }

    /// The power button waits for the resumed guest, whose next boot is not paused.
    @Test func anEndAfterAPause() throws {
        let paper = Paper()
        let machine = try Machine(configuration("", cpus: 2), output: paper, log: log)
        try machine.start()
        try waitForPrompt(on: paper)
        _ = try machine.control.perform(.pause)
        try type("reboot\r", into: machine)
        #expect(machine.consolePort.pendingOutput == 0)
        _ = try machine.control.perform(.resume)
        guard case .reset = machine.waitForEnd() else { Issue.record("no reset: \(paper.text)"); return }
        #expect(try machine.restart())
        try waitForPrompt(on: paper)
        _ = try machine.control.perform(.pause)
        #expect(
            try machine.control.perform(.powerButton)
                == "the power button was pressed; the guest sees it when it is resumed")
        _ = try machine.control.perform(.resume)
        #expect(machine.waitForEnd().exitStatus == 0)
    }

    /// A reset is followed by a boot like the first one, in the same object: RAM is zero, registers are a new
    /// machine's.
    @Test(arguments: [1, 3]) func bootsAgainAfterAReset(cpus: Int) throws {
        let paper = Paper()
        var configuration = configuration("", cpus: cpus)
        let disk = try scratchDisk()
        defer { unlink(disk.path) }
        configuration.disks = [disk]
        let machine = try Machine(configuration, output: paper, log: log)
        try machine.start()
        for boot in 1...4 {
            try waitForPrompt(on: paper)
            #expect(paper.text.ranges(of: "swkvm guest\r\n").count == boot)
            try type("cpus\rsum vda 0 1\rreboot\r", into: machine)
            let end = machine.waitForEnd()
            guard case .reset = end else { Issue.record("\(end): \(paper.text)"); return }
            #expect(machine.canRestart)
            #expect(machine.waitForEnd().exitStatus == ExitStatus.reset)
            let restarts = try machine.restart()
            #expect(restarts && machine.consolePort.pendingOutput == 0)
        }
        try waitForPrompt(on: paper)
        #expect(paper.text.ranges(of: "CPU 1: works").count == (cpus > 1 ? 4 : 0))
        machine.control.post(.powerButton)
        #expect(machine.waitForEnd().exitStatus == 0)
        let restarts = try machine.restart()
        #expect(!restarts && !machine.canRestart)
    }

    /// Who ends the machine between two boots ends it.
    @Test func aStopBetweenTwoBoots() throws {
        let paper = Paper()
        let machine = try Machine(configuration(""), output: paper, log: log)
        try machine.start()
        try waitForPrompt(on: paper)
        try type("reboot\r", into: machine)
        _ = machine.waitForEnd()
        machine.control.end(.quit)
        let restarts = try machine.restart()
        #expect(!restarts && machine.waitForEnd().exitStatus == ExitStatus.quit)
    }

    /// A triple fault resets a PC. A kernel that does so before it has used a device would do so for ever.
    @Test(arguments: [false, true]) func aTripleFaultIsAResetOnceADeviceWasUsed(hasDisk: Bool) throws {
        let paper = Paper()
        var configuration = configuration("")
        let disk = try scratchDisk()
        defer { unlink(disk.path) }
        if hasDisk { configuration.disks = [disk] }
        let machine = try Machine(configuration, output: paper, log: log)
        try machine.start()
        try waitForPrompt(on: paper)
        try type(hasDisk ? "sum vda 0 1\rcrash triple\r" : "crash triple\r", into: machine)
        #expect(machine.waitForEnd().exitStatus == ExitStatus.tripleFault)
        #expect(machine.canRestart == hasDisk)
        let restarts = try machine.restart()
        #expect(restarts == hasDisk)
        guard restarts else { return }
        for _ in 0..<60_000 where paper.text.ranges(of: "swkvm guest\r\n").count < 2 { usleep(1_000) }
        #expect(paper.text.ranges(of: "swkvm guest\r\n").count == 2)
        machine.control.end(.quit)
        _ = machine.waitForEnd()
    }

    /// Filling RAM with pages may take long, at a restart too.
    @Test func aRestartIsInterrupted() throws {
        let paper = Paper()
        let machine = try Machine(configuration(""), output: paper, log: log)
        try machine.start()
        try waitForPrompt(on: paper)
        try type("reboot\r", into: machine)
        _ = machine.waitForEnd()
        let error = #expect(throws: MachineError.self) { try machine.restart(isInterrupted: { true }) }
        guard case .memory(.interrupted)? = error else { Issue.record("\(String(describing: error))"); return }
        #expect(machine.waitForEnd().exitStatus == ExitStatus.reset)
    }

    private func scratchDisk() throws -> Configuration.Disk {
        var template = Array("/tmp/swkvm-test.XXXXXX".utf8CString)
        let number = mkstemp(&template)
        try #require(number >= 0)
        let path = String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        try #require(ftruncate(number, 1 << 20) == 0)
        close(number)
        return Configuration.Disk(path: path, options: DiskImageOptions(format: .raw))
    }

    private func type(_ text: String, into machine: Machine) throws {
        let words = Array(text.utf8)
        var taken = 0
        for _ in 0..<60_000 where taken < words.count {
            let rest = Array(words[taken...])
            taken += machine.consolePort.receive(rest.span)
            usleep(1_000)
        }
        try #require(taken == words.count)
    }

    @Test func isDroppedWithoutAStartOrAnEnd() throws {
        for starts in [false, true] {
            let machine = try Machine(configuration(""), output: Paper(), log: log)
            if starts { try machine.start() }
        }
    }

    @Test func statusOfARunningMachine() throws {
        let paper = Paper()
        let machine = try Machine(configuration("", cpus: 2), output: paper, log: log)
        try machine.start()
        try waitForPrompt(on: paper)
        let status = machine.status
        #expect(status.name == "test" && status.cpus == 2 && status.memorySize == 64 << 20 && status.devices.isEmpty)
        let resident = try #require(status.memory).resident
        #expect(resident > 0 && resident < 64 << 20)
        machine.control.end(.quit)
        _ = machine.waitForEnd()
    }

    @Test func refusesWhatCannotBe() {
        func error(_ change: (inout Configuration) -> Void) -> String? {
            var configuration = configuration("")
            change(&configuration)
            let error = #expect(throws: MachineError.self) { try Machine(configuration, output: Paper(), log: log) }
            return error?.description
        }
        #expect(error { $0.cpus = 0 }?.hasPrefix("0 vCPUs") == true)
        #expect(error { $0.cpus = -5 }?.hasPrefix("-5 vCPUs") == true)
        #expect(error { $0.cpus = .max }?.contains("this host's KVM allows") == true)
        #expect(error { $0.memory.size = 0 }?.contains("0 bytes") == true)
        #expect(error { $0.memory.size = .max }?.isEmpty == false)
        #expect(error { $0.kernel = .file("/dev/null") }?.isEmpty == false)
        #expect(
            error { $0.disks = (0..<17).map { .init(path: "\($0).raw") } }?.contains("a machine has 16 slots") == true)
        #expect(error { $0.commandLine = "a\u{0}b" }?.contains("NUL") == true)
    }
}

@Suite(.timed, .enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "needs a /dev/kvm that opens")) struct RingZeroTests {
    /// The bundled guest tries another instruction that KVM's interpreter does not know, in its own ring 0.
    @Test func isWhatAGuestFinds() throws {
        let paper = Paper()
        let configuration = Configuration(memory: .init(size: 64 << 20), commandLine: "crash=internal run=help")
        let machine = try Machine(
            configuration, output: paper, log: Logger(label: "test") { _ in SwiftLogNoOpLogHandler() })
        try machine.start()
        let end = machine.waitForEnd()
        let isNative = paper.text.contains("ring 0 runs natively here")
        #expect(isNative || end.exitStatus == 101, "\(paper.text)")
        for _ in 0..<5 { #expect(RingZero.found(on: try System()) == (isNative ? .native : .interpreted)) }
    }
}

@Suite(.timed) struct AddressTests {
    /// docs/platform.md, "Interrupts" and "Physical memory".
    @Test func ofVirtioDevices() {
        #expect(VirtioSlot.address(ofDevice: 0) == 0xd000_0000 && VirtioSlot.address(ofDevice: 15) == 0xd000_f000)
        #expect(GSIs.virtio == [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15])
        // docs/pci.md, "What the guest finds".
        for (slot, address) in [
            (0, "00:01.0"), (30, "00:1f.0"), (31, "00:01.1"), (61, "00:1f.1"), (62, "00:01.2"), (63, "00:02.2"),
        ] {
            #expect(PCIRoot.address(ofSlot: slot).description == address)
            let bar = PCIRoot.barAddress(ofSlot: slot)
            #expect(PhysicalLayout.pciWindow.contains(bar) && bar % PCITransport.barSize == 0)
        }
        for (end, bits, above) in [
            (512 << 20, 46, 4 << 30..<68 << 30), (5 << 30 + 4096, 46, 5 << 30 + 2 << 20..<69 << 30 + 2 << 20),
            (8 << 30, 36, 8 << 30..<64 << 30),
        ] as [(UInt64, Int, Range<UInt64>)] {
            #expect(PCIRoot.windows(endOfMemory: end, addressBits: bits) == [PhysicalLayout.pciWindow, above])
        }
        for (end, bits) in [(64 << 30, 36), (1 << 30, 32), (1 << 30, 0)] as [(UInt64, Int)] {
            #expect(PCIRoot.windows(endOfMemory: end, addressBits: bits) == [PhysicalLayout.pciWindow])
        }
        #expect(Set(GSIs.virtio).count == 16 && !GSIs.virtio.contains(GSIs.serial) && !GSIs.virtio.contains(GSIs.power))
    }

    /// Where firmware puts BARs: docs/firmware.md, "What firmware finds".
    @Test func ofBARsByFirmware() {
        let configuration = PhysicalLayout.pciConfiguration
        let behind = configuration + PhysicalLayout.pciConfigurationSize..<PhysicalLayout.ioapic
        for (end, first) in [
            (64 << 20, 0x8000_0000), (2 << 30, 0x8000_0000), (0x9000_0000, 0x9000_0000), (3 << 30, 0xc000_0000),
            (8 << 30, 0xc000_0000),
        ] as [(UInt64, UInt64)] {
            let windows = PCIRoot.windows(endOfMemory: end, addressBits: 46, isForFirmware: true)
            #expect(windows.prefix(2) == [first..<configuration, behind])
            // The same above RAM as without firmware.
            #expect(windows.dropFirst(2) == PCIRoot.windows(endOfMemory: end, addressBits: 46).dropFirst())
        }
        #expect(PCIRoot.windows(endOfMemory: 1 << 30, addressBits: 32, isForFirmware: true).count == 2)
    }
}

@Suite(.timed) struct UUIDTests {
    @Test(arguments: [
        "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "00000000-0000-0000-0000-000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ])
    func isReadAndWritten(text: String) throws {
        #expect(try #require(UUID(text)).description == text)
        #expect(UUID(text.uppercased()) == UUID(text))
    }

    @Test func itsBytesAreInTheOrderOfTheText() throws {
        #expect(try #require(UUID("00010203-0405-0607-0809-0a0b0c0d0e0f")).bytes == Array(0...15))
    }

    @Test(arguments: [
        "", "none", "6ba7b8109dad11d180b400c04fd430c8", "6ba7b810-9dad-11d1-80b4-00c04fd430c",
        "6ba7b810-9dad-11d1-80b4-00c04fd430c81",
        "{6ba7b810-9dad-11d1-80b4-00c04fd430c8}", "+ba7b810-9dad-11d1-80b4-00c04fd430c8",
        "6ba7b81-09dad-11d1-80b4-00c04fd430c8", "gba7b810-9dad-11d1-80b4-00c04fd430c8",
        "６ba7b8-9dad-11d1-80b4-00c04fd430c8", "6ba7b810-9dad-11d1-80b4-00c04fd430c8-",
    ])
    func nothingElseIsRead(text: String) { #expect(UUID(text) == nil) }

    @Test func aHashHasOne() {
        #expect(UUID(ofHash: 0).description == "00000000-0000-8000-8000-000000000000")
        #expect(UUID(ofHash: .max).description == "ffffffff-ffff-8fff-bfff-ffffffffffff")
    }
}

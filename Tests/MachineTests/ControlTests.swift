// SPDX-License-Identifier: Apache-2.0

import CSystemCallFilter
import Devices
import DiskImage
import Glibc
import GuestMemory
import HostNetwork
import Linux
import Logging
import PCI
import TestSupport
import Testing
import Virtio

@testable import Machine

/// What may change about a machine while its guest runs, and what is there before it runs.
@Suite(.timed, .enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "needs a /dev/kvm that opens")) struct ControlTests {
    private let log = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
    private let directory: String

    init() throws {
        var template = Array("/tmp/swkvm-test.XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        directory = String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    private func removeDirectory() {
        for name in ["kernel", "disk.raw", "disk.qcow2"] { unlink("\(directory)/\(name)") }
        rmdir(directory)
    }

    private func waitUntil(_ condition: () throws -> Bool) rethrows -> Bool {
        for _ in 0..<60_000 {
            if try condition() { return true }
            usleep(1_000)
        }
        return false
    }

    /// Reads the first register of a device, by default the one in the second place, without end, stores it at 3 MiB,
    /// counts behind it, and kicks the device.
    private func makeProbingKernel(address: UInt32 = 0xd000_1000) throws -> String {
        let place = (0..<4).map { UInt8(truncatingIfNeeded: address >> (8 * $0)) }
        let code: [UInt8] = [
            0xbb, place[0], place[1], place[2], place[3],  // mov ebx, address
            0xb9, 0x00, 0x00, 0x30, 0x00,  // mov ecx, 0x300000
            0x8b, 0x03, 0x89, 0x01, 0xff, 0x41, 0x04,  // 1: mov eax, [rbx]; mov [rcx], eax; inc dword [rcx + 4]
            0xc7, 0x43, 0x50, 0x00, 0x00, 0x00, 0x00,  // mov dword [rbx + 0x50], 0
            0xeb, 0xf0,  // jmp 1b
        ]
        var file: [UInt8] = [0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0] + [UInt8](repeating: 0, count: 8)
        func add<Number: FixedWidthInteger>(_ number: Number) {
            withUnsafeBytes(of: number.littleEndian) { file += $0 }
        }
        add(UInt16(2))  // ET_EXEC
        add(UInt16(62))
        add(UInt32(1))
        add(UInt64(0x20_0000))
        add(UInt64(64))
        add(UInt64(0))
        add(UInt32(0))
        for value: UInt16 in [64, 56, 1, 64, 0, 0] { add(value) }
        add(UInt32(1))  // PT_LOAD
        add(UInt32(5))
        for value: UInt64 in [64 + 56, 0x20_0000, 0x20_0000, UInt64(code.count), UInt64(code.count), 16] { add(value) }
        let path = "\(directory)/kernel"
        try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644).writeAll(file + code)
        return path
    }

    /// A device comes and goes while a vCPU uses its registers and its doorbell: the guest sees it, or all ones, and
    /// nothing of it is left.
    @Test func attachesAndDetaches() throws {
        defer { removeDirectory() }
        let kernel = try makeProbingKernel()
        let machine = try Machine(
            Configuration(
                name: "test", cpus: 2, memory: .init(size: 64 << 20), kernel: .file(kernel), entropy: .init()),
            output: Ignored(), log: log)
        let (control, ram) = (machine.control, machine.memory.ram)
        try machine.start()
        func seen() throws -> UInt32 { try ram.readUInt32(at: GuestAddress(0x30_0000)) }
        for round in 0..<60 {
            weak var gone: EntropyDevice?
            do {
                let device = try EntropyDevice(name: "rng9")
                gone = device
                if round == 20 { try control.perform(.pause) }
                try control.attach(device)
                if round == 20 { try control.perform(.resume) }
            }
            #expect(gone != nil && machine.status.devices.map(\.name) == ["rng0", "rng9"])
            #expect(try waitUntil { try seen() == 0x7472_6976 }, "round \(round)")
            // Its doorbell is an ioeventfd: no exit of the vCPU's is a kick.
            #expect(machine.board.registry.slot(named: "rng9")?.function.counters.exitKicks.value == 0)
            if round == 40 { try control.perform(.pause) }
            try control.detach("rng9")
            #expect(gone == nil && machine.status.devices.map(\.name) == ["rng0"])
            if round == 40 { try control.perform(.resume) }
            #expect(try waitUntil { try seen() == 0xffff_ffff }, "round \(round)")
        }
        #expect(throws: MachineControlError.noDevice("rng9", kind: "device", available: ["rng0"])) {
            try control.detach("rng9")
        }
        // The places run out.
        for number in 1..<16 { try control.attach(try EntropyDevice(name: "more\(number)")) }
        #expect(throws: MachineControlError.self) { try control.attach(try EntropyDevice(name: "last")) }
        #expect(machine.status.devices.count == 16)
        machine.control.end(.quit)
        #expect(machine.waitForEnd().exitStatus == ExitStatus.quit)
    }

    /// The same on PCI: the bridge finds the function, or nothing, and its doorbells and routes go with it.
    @Test func attachesAndDetachesPCIFunctions() throws {
        defer { removeDirectory() }
        let kernel = try makeProbingKernel(address: 0xc000_8000)
        var configuration = Configuration(
            name: "test", cpus: 2, memory: .init(size: 64 << 20), kernel: .file(kernel), entropy: .init())
        configuration.bus = .pci
        let machine = try Machine(configuration, output: Ignored(), log: log)
        let (control, ram) = (machine.control, machine.memory.ram),
            bridge = try #require(machine.board.registry.root).bridge
        let address = PCIAddress(device: 2)
        try machine.start()
        func seen() throws -> UInt32 { try ram.readUInt32(at: GuestAddress(0x30_0000)) }
        for round in 0..<30 {
            weak var gone: EntropyDevice?
            do {
                let device = try EntropyDevice(name: "rng9")
                gone = device
                try control.attach(device)
            }
            #expect(gone != nil && bridge.readConfiguration(of: address, at: 0, size: 4) == 0x1044_1af4)
            // As a driver that places its BAR, and moves it there and back.
            for (value, offset) in [(0xc800_0000, 0x10), (6, 4), (0xc000_8000, 0x10)] as [(UInt32, Int)] {
                bridge.writeConfiguration(value, of: address, at: offset, size: 4)
            }
            #expect(try waitUntil { try seen() == 0 }, "round \(round)")
            try control.detach("rng9")
            #expect(gone == nil && bridge.readConfiguration(of: address, at: 0, size: 4) == .max)
            #expect(try waitUntil { try seen() == 0xffff_ffff }, "round \(round)")
        }
        machine.control.end(.quit)
        #expect(machine.waitForEnd().exitStatus == ExitStatus.quit)
    }

    @Test func anAddressMap() {
        let map = AddressMap<String>([.init(10, count: 5, "a"), .init(12, count: 10, "b")])
        let before = map.table
        func find(_ address: UInt64, _ table: AddressMap<String>.Table) -> String? {
            table.index(of: address).map { table.entries[$0].target }
        }
        #expect([9, 10, 14, 15, 21, 22, .max].map { find($0, before) } == [nil, "a", "a", "b", "b", nil, nil])
        map.insert(.init(.max, count: 1, "c"))
        map.remove(at: 10)
        #expect([9, 10, 14, 15, 21, 22, .max].map { find($0, map.table) } == [nil, nil, "b", "b", "b", nil, "c"])
        #expect(find(10, before) == "a")
    }

    /// With threads refused a machine is made; with every new descriptor refused it starts, runs its guest, is paused,
    /// and tells its status.
    @Test(.enabled(if: geteuid() == 0, "needs root, for a TAP")) func opensEverythingBeforeItStarts() throws {
        defer { removeDirectory() }
        for (name, format) in [("disk.raw", ImageFormat.raw), ("disk.qcow2", .qcow2)] {
            try ImageCreation(path: "\(directory)/\(name)", format: format, size: 8 << 20).create()
        }
        var configuration = Configuration(
            name: "test", cpus: 2, memory: .init(size: 64 << 20), commandLine: "test=disk,rng")
        configuration.disks = ["disk.raw", "disk.qcow2"].map { Configuration.Disk(path: "\(directory)/\($0)") }
        configuration.disks[1].queues = 2
        configuration.entropy = .init()
        configuration.networks = [Configuration.Network(.tap(nil))]
        configuration.debugger = .port(0)
        let made = Guarded<Result<Machine, any Error>?>(nil)
        // The filters are for good: each has a thread of its own, and those that it starts.
        try Thread.start(name: "init", stackSize: 1 << 20) { [configuration, log] in
            made.withLock {
                $0 = Result {
                    try NetworkNamespace.enterNew()
                    guard refuse_new_threads() == 0 else { throw SystemCallError.last("seccomp") }
                    return try Machine(configuration, output: Ignored(), log: log)
                }
            }
        }.join()
        let machine = try #require(made.withLock { $0.take() }).get()
        let outcome = Guarded<Result<(Int32, [String]), any Error>?>(nil)
        try Thread.start(name: "start", stackSize: 1 << 20) {
            outcome.withLock {
                $0 = Result {
                    guard refuse_new_descriptors() == 0 else { throw SystemCallError.last("seccomp") }
                    try machine.start()
                    let answers = [try machine.control.perform(.pause), try machine.control.perform(.resume)]
                    guard machine.status.memory != nil else { throw SystemCallError("read", errno: EIO) }
                    // The guest waits for a debugger that does not come.
                    for cpu in machine.board.cpus { cpu.pausePoint.release(.debugger) }
                    return (machine.waitForEnd().exitStatus, answers)
                }
            }
        }.join()
        let (status, answers) = try #require(outcome.withLock { $0.take() }).get()
        #expect(status == 0 && answers == ["the machine is paused", "the machine is running"])
    }

    // MARK: Commands

    @Test func commands() throws {
        func parse(_ line: String) throws -> MachineCommand? { try MachineCommand.parse(line) }
        #expect(try parse("") == nil && parse("  ") == nil)
        #expect(try parse("help") == .help && parse(" pause ") == .request(.pause) && parse("quit") == .quit)
        #expect(try parse("info") == parse("status"))
        #expect(try parse("link net0 down") == .request(.setLink(device: "net0", isUp: false)))
        #expect(try parse("resize blk0") == .request(.resize(device: "blk0", size: nil)))
        #expect(try parse("resize blk0 2G") == .request(.resize(device: "blk0", size: 2 << 30)))
        #expect(try parse("balloon") == .request(.balloon))
        #expect(try parse("balloon 256M") == .request(.setBalloonTarget(256 << 20)))
        #expect(try parse("balloon hints") == .request(.requestBalloonHints(acknowledgesEnd: true)))
        #expect(try parse("balloon end-hints") == .request(.endBalloonHints))
        #expect(try parse("resize blk0 512") == .request(.resize(device: "blk0", size: 512)))
        for line in [
            "link", "link net0", "link net0 sideways", "link net0 up now", "resize", "resize blk0 x", "resize blk0 -1",
            "resize blk0 1 2", "balloon x", "balloon 1M 2M",
            "resize blk0 99999999999999999999", "resize blk0 18446744073709551615G", "pause now", "help me",
        ] {
            let error = #expect(throws: MachineControlError.self) { try parse(line) }
            #expect(error?.description.hasPrefix("usage: \(line.split(separator: " ")[0])") == true)
        }
        let error = #expect(throws: MachineControlError.self) { try parse("nonsense") }
        #expect(error?.description == "unknown command 'nonsense'; `help` lists the commands")
        #expect(MachineCommand.helpLines.count == MachineCommand.table.count)
    }

    @Test func aPromptsKeys() {
        func run(_ keys: String) -> (outcome: CommandPrompt.Outcome, rest: String, echo: String) {
            var prompt = CommandPrompt()
            prompt.open()
            _ = prompt.takeEcho()
            var rest = Array(keys.utf8)[...]
            let outcome = prompt.take(&rest)
            return (outcome, String(decoding: rest, as: UTF8.self), String(decoding: prompt.takeEcho(), as: UTF8.self))
        }
        #expect(run("pause\rx") == (.entered("pause"), "x", "pause\r\n"))
        #expect(run("pause") == (.open, "", "pause"))
        #expect(run("pä\u{7f}ause\r") == (.entered("pause"), "", "pä\u{8} \u{8}ause\r\n"))
        #expect(run("\u{7f}\r").outcome == .entered(""))
        #expect(run("abc\u{15}help\r").outcome == .entered("help"))
        for key in ["\u{3}", "\u{7}", "\u{1b}[A"] {
            #expect(run("abc\(key)").outcome == .cancelled && run("abc\(key)").rest.isEmpty)
        }
        #expect(run("a\u{1}\tb\r").outcome == .entered("ab"))
        #expect(
            run(String(repeating: "x", count: 1000) + "\r").outcome
                == .entered(String(repeating: "x", count: CommandPrompt.limit)))
    }
}

/// Takes what a guest prints.
private final class Ignored: SerialSink {
    func take(_ bytes: Span<UInt8>) -> Int { bytes.count }
}

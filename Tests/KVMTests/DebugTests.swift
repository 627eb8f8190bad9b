// SPDX-License-Identifier: Apache-2.0

import CLinux
import Linux
import TestSupport
import Testing

@testable import KVM

/// What a debugger and a counter of exits ask of KVM.
@Suite(.timed) struct DebugTests {
    @Test func aStepIsOneInstruction() throws {
        // nop; nop; hlt
        let tiny = try TinyMachine(code: [0x90, 0x90, 0xf4])
        var debug = GuestDebug()
        debug.isStepping = true
        for address in 0x1001...0x1002 as ClosedRange<UInt64> {
            try tiny.cpu.setDebug(debug)
            guard case .debug(let event) = try tiny.run() else { Issue.record("no step"); return }
            #expect(event.exception == 1 && event.instruction == address && event.status & 1 << 14 != 0)
        }
        // Undone, it runs on.
        try tiny.cpu.setDebug(GuestDebug())
        guard case .halt = try tiny.run() else { Issue.record("no halt"); return }
        #expect(try tiny.cpu.registers().rflags & 0x100 == 0)
    }

    @Test func aDebugRegisterStopsInFrontOfTheInstruction() throws {
        let tiny = try TinyMachine(code: [0x90, 0x90, 0xf4])
        var debug = GuestDebug()
        debug.debugRegisters = GuestDebug.DebugRegisters(addresses: (0, 0x1001, 0, 0), control: 0x400 | 2 << 2)
        try tiny.cpu.setDebug(debug)
        guard case .debug(let event) = try tiny.run() else { Issue.record("no breakpoint"); return }
        #expect(event.exception == 1 && event.instruction == 0x1001 && event.status & 0xf == 2)
        #expect(try tiny.cpu.registers().rip == 0x1001)
    }

    @Test func vectorRegistersGoInAndOut() throws {
        let tiny = try TinyMachine(code: [0xf4])
        var state = try tiny.cpu.extendedState()
        #expect(state.count == VirtualCPU.extendedStateSize && state[24..<28].elementsEqual([0x80, 0x1f, 0, 0]))
        // XMM1, and the bit that says that there are such registers.
        state.replaceSubrange(176..<192, with: 1...16)
        state[512] |= 3
        try tiny.cpu.setExtendedState(state)
        #expect(try tiny.cpu.extendedState()[176..<192].elementsEqual(1...16))
        #expect(throws: KVMError.self) { try tiny.cpu.setExtendedState([]) }
        // Reserved bits of MXCSR.
        state.replaceSubrange(24..<28, with: [0xff, 0xff, 0xff, 0xff])
        #expect(throws: KVMError.self) { try tiny.cpu.setExtendedState(state) }
    }

    @Test func theKernelCounts() throws {
        guard try System().check(.binaryStatistics) > 0 else { return }
        // out 1,al; out 1,al; hlt
        let tiny = try TinyMachine(code: [0xe6, 1, 0xe6, 1, 0xf4])
        func exits() throws -> UInt64 { try #require(try tiny.cpu.counters().first { $0.name == "exits" }).value }
        let before = try exits()
        for _ in 0..<2 { guard case .port = try tiny.run() else { Issue.record("no port exit"); return } }
        #expect(try exits() > before)
        #expect(try tiny.machine.counters().contains { $0.name == "mmu_cache_miss" })
    }

    // MARK: The file of counters

    /// Header, one descriptor, one value, as Documentation/virt/kvm/api.rst (KVM_GET_STATS_FD) lays them out.
    private func file(
        nameSize: UInt32 = 8, count: UInt32 = 1, descriptors: UInt32 = 24, data: UInt32 = 48, flags: UInt32 = 0,
        items: UInt16 = 1, offset: UInt32 = 0
    ) -> [UInt8] {
        var bytes: [UInt8] = []
        func add<Number: FixedWidthInteger>(_ number: Number) {
            withUnsafeBytes(of: number.littleEndian) { bytes += $0 }
        }
        for number in [0, nameSize, count, 24, descriptors, data] { add(number) }
        add(flags)
        add(UInt16(0))
        add(items)
        add(offset)
        add(UInt32(0))
        bytes += Array("exits\0\0\0".utf8)
        add(UInt64(0x1_0000_0007))
        return bytes
    }

    @Test func aCounterIsItsNameAndValue() {
        #expect(StatisticsFile(file()).counters == [KVMCounter(name: "exits", value: 0x1_0000_0007)])
        // A histogram, and one that does not only grow.
        #expect(StatisticsFile(file(items: 5)).counters.isEmpty && StatisticsFile(file(flags: 1)).counters.isEmpty)
    }

    @Test func whatLiesOutsideTheFileIsLeftOut() {
        #expect(StatisticsFile([UInt8]()).counters.isEmpty)
        for length in 0..<56 { #expect(StatisticsFile(file().prefix(length)).counters.isEmpty) }
        for bytes in [
            file(nameSize: .max), file(descriptors: .max), file(data: .max), file(offset: .max), file(descriptors: 41),
        ] {
            #expect(StatisticsFile(bytes).counters.isEmpty)
        }
        #expect(StatisticsFile(file(count: .max)).counters.count == 1)
    }
}

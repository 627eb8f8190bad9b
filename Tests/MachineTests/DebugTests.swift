// SPDX-License-Identifier: Apache-2.0

import GDBRemote
import GuestMemory
import KVM
import TestSupport
import Testing

@testable import Machine

/// The debugger's parts that need no vCPU.
@Suite(.timed) struct DebugTests {
    // MARK: Debug registers

    private func control(_ breakpoints: [Breakpoint]) throws -> UInt64 {
        var registers = DebugRegisterSet()
        for breakpoint in breakpoints { try registers.insert(breakpoint) }
        return try #require(registers.value).control
    }

    /// Intel SDM volume 3, figure 18-1: Gn are bits 1, 3, 5, 7; from bit 16 on, two bits of kind and two of length for
    /// each register.
    @Test func controlIsAsTheManualHasIt() throws {
        #expect(try control([Breakpoint(kind: .hardware, address: 0x1000, size: 1)]) == 0x402)
        #expect(try control([Breakpoint(kind: .writeWatch, address: 0x1000, size: 4)]) == 0x402 | 0xd << 16)
        #expect(try control([Breakpoint(kind: .accessWatch, address: 0x1000, size: 8)]) == 0x402 | 0xb << 16)
        #expect(try control([Breakpoint(kind: .writeWatch, address: 0x1002, size: 2)]) == 0x402 | 0x5 << 16)
        let two = [
            Breakpoint(kind: .hardware, address: 1, size: 1), Breakpoint(kind: .writeWatch, address: 2, size: 1),
        ]
        #expect(try control(two) == 0x40a | 0x1 << 20)
    }

    @Test func aLongOrCrookedWatchpointTakesSeveral() throws {
        var registers = DebugRegisterSet()
        let watch = Breakpoint(kind: .writeWatch, address: 0x1003, size: 7)
        try registers.insert(watch)
        // 1 at 0x1003, 4 at 0x1004, 2 at 0x1008
        #expect(try #require(registers.value).addresses == (0x1003, 0x1004, 0x1008, 0))
        #expect((0..<4).map { registers.breakpoint(at: $0) } == [watch, watch, watch, nil])
        try registers.insert(Breakpoint(kind: .hardware, address: 0x2000, size: 1))
        #expect(throws: DebugTargetError.noRoom) {
            try registers.insert(Breakpoint(kind: .hardware, address: 0x3000, size: 1))
        }
        registers.remove(watch)
        #expect(try #require(registers.value).addresses == (0, 0, 0, 0x2000))
    }

    @Test func whatTheProcessorLacksIsRefused() throws {
        var registers = DebugRegisterSet()
        #expect(throws: DebugTargetError.unsupported) {
            try registers.insert(Breakpoint(kind: .readWatch, address: 0, size: 1))
        }
        #expect(throws: DebugTargetError.refused) {
            try registers.insert(Breakpoint(kind: .writeWatch, address: 0, size: 0))
        }
        for size in [33, 1 << 40, Int.max] {
            #expect(throws: DebugTargetError.noRoom) {
                try registers.insert(Breakpoint(kind: .writeWatch, address: 8, size: size))
            }
        }
        #expect(throws: DebugTargetError.noRoom) {
            try registers.insert(Breakpoint(kind: .writeWatch, address: 1, size: 32))
        }
        #expect(registers.value == nil)
        // At the end of the address space it wraps, as the processor does.
        try registers.insert(Breakpoint(kind: .writeWatch, address: .max, size: 2))
        #expect(try #require(registers.value).addresses == (.max, 0, 0, 0))
        // Once more is not one more.
        try registers.insert(Breakpoint(kind: .writeWatch, address: .max, size: 2))
        #expect(registers.breakpoint(at: 2) == nil)
    }

    // MARK: Breakpoint instructions

    private func breakpoint(_ address: UInt64) -> Breakpoint { Breakpoint(kind: .software, address: address, size: 1) }

    @Test func instructionsAreNotSeenAndGoAway() throws {
        let memory = try GuestMemory(size: 1 << 20)
        try memory.ram.write([1, 2, 3, 4], at: GuestAddress(0x1000))
        var instructions = BreakpointInstructions(memory.ram)
        try instructions.insert(breakpoint(0xffff_8000_0000_1001), at: GuestAddress(0x1001))
        #expect(try memory.ram.readBytes(at: GuestAddress(0x1000), count: 4) == [1, 0xcc, 3, 4])
        #expect(try instructions.read(at: GuestAddress(0x1000), count: 4) == [1, 2, 3, 4])
        #expect(instructions.contains(GuestAddress(0x1001)) && !instructions.contains(GuestAddress(0x1000)))
        // The debugger writes over it: it stays, with another byte beneath.
        try instructions.write([9, 8, 7][...], at: GuestAddress(0x1000))
        #expect(try memory.ram.readBytes(at: GuestAddress(0x1000), count: 4) == [9, 0xcc, 7, 4])
        #expect(try instructions.read(at: GuestAddress(0x1000), count: 4) == [9, 8, 7, 4])
        instructions.remove(breakpoint(0xffff_8000_0000_1001))
        #expect(try memory.ram.readBytes(at: GuestAddress(0x1000), count: 4) == [9, 8, 7, 4])
        #expect(instructions.isEmpty)
    }

    /// One page at two addresses: the instruction goes with the last of the two.
    @Test func twoAddressesOfOnePlace() throws {
        let memory = try GuestMemory(size: 1 << 20)
        var instructions = BreakpointInstructions(memory.ram)
        try instructions.insert(breakpoint(0x2000), at: GuestAddress(0x2000))
        try instructions.insert(breakpoint(0xffff_8000_0000_2000), at: GuestAddress(0x2000))
        instructions.remove(breakpoint(0x2000))
        #expect(try memory.ram.readUInt8(at: GuestAddress(0x2000)) == 0xcc)
        instructions.remove(breakpoint(0xffff_8000_0000_2000))
        #expect(try memory.ram.readUInt8(at: GuestAddress(0x2000)) == 0)
    }

    @Test func whatTheGuestHasWrittenSinceStays() throws {
        let memory = try GuestMemory(size: 1 << 20)
        var instructions = BreakpointInstructions(memory.ram)
        try instructions.insert(breakpoint(0x2000), at: GuestAddress(0x2000))
        try memory.ram.write(UInt8(0x55), at: GuestAddress(0x2000))
        #expect(try instructions.read(at: GuestAddress(0x2000), count: 1) == [0x55])
        instructions.removeAll()
        #expect(try memory.ram.readUInt8(at: GuestAddress(0x2000)) == 0x55)
    }

    @Test func thereIsNoneOutsideOfRAM() throws {
        let memory = try GuestMemory(size: 1 << 20)
        var instructions = BreakpointInstructions(memory.ram)
        #expect(throws: DebugTargetError.unmapped) {
            try instructions.insert(breakpoint(0xd000_0000), at: GuestAddress(0xd000_0000))
        }
        #expect(throws: DebugTargetError.unmapped) { try instructions.read(at: GuestAddress(.max), count: 2) }
        #expect(throws: DebugTargetError.unmapped) {
            try instructions.write([1, 2][...], at: GuestAddress((1 << 20) - 1))
        }
        for index in 0..<1024 { try instructions.insert(breakpoint(UInt64(index)), at: GuestAddress(UInt64(index))) }
        #expect(throws: DebugTargetError.noRoom) { try instructions.insert(breakpoint(4096), at: GuestAddress(4096)) }
    }

    // MARK: x87

    /// Intel SDM volume 1, §8.1.7: 00 valid, 01 zero, 10 special, 11 empty, by physical register.
    @Test func tagsHaveTwoFormats() {
        let one: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f], zero = [UInt8](repeating: 0, count: 10)
        let infinity: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f],
            denormal: [UInt8] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        let stack = [one, zero, infinity, denormal]
        // TOP is 4: ST0 is physical register 4.
        let full = X87Tags.full(0xf0, status: 4 << 11) { stack[$0][...] }
        #expect(full == 0b10_10_01_00_11_11_11_11)
        #expect(X87Tags.abridged(full) == 0xf0)
        #expect(X87Tags.full(0, status: 0) { _ in zero[...] } == 0xffff && X87Tags.abridged(0xffff) == 0)
    }
}

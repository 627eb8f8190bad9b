// SPDX-License-Identifier: Apache-2.0

import CLinux
import TestSupport
import Testing

@testable import GuestMemory

/// Two small regions with a hole between them, and the top of the address space out of reach.
private let page: UInt64 = 4096
private let high: UInt64 = 4 << 30
private let highStart = GuestAddress(high)

private let inside: [(UInt64, UInt64)] = [
    (0, 0), (0, 1), (0, 2 * page), (page - 1, 2), (2 * page - 1, 1), (2 * page - 1, 0), (high, page),
    (high + page - 1, 1),
]

private let outside: [(UInt64, UInt64)] = [
    (2 * page, 0), (2 * page, 1), (2 * page - 1, 2), (0, 2 * page + 1), (0, high), (0, .max), (1, .max),
    (page, 0xffff_ffff_ffff_f001), (3 << 30, 1), (high - 1, 1), (high - 1, 2), (high + page, 0), (high + page - 1, 2),
    (high, .max), (high, 0xffff_ffff_0000_0001), (.max, 0), (.max, 1), (.max, 2), (0xffff_ffff_ffff_fff8, 8),
    (0xffff_ffff_ffff_fff8, 16), (1 << 63, 1 << 63),
]

private func smallMemory() throws -> GuestMemory {
    try GuestMemory(layout: [(GuestAddress(0), 2 * page), (highStart, page)], backing: .anonymous, shared: false)
}

@Suite(.timed) struct GuestAddressTests {
    @Test func arithmeticIsCheckedOrWraps() {
        #expect(GuestAddress(10).adding(5) == GuestAddress(15))
        #expect(GuestAddress(.max).adding(0) == GuestAddress(.max))
        #expect(GuestAddress(.max).adding(1) == nil)
        #expect(GuestAddress(.max) &+ 1 == GuestAddress(0))
        #expect(GuestAddress(0x1000).isAligned(to: 4096))
        #expect(!GuestAddress(0x1001).isAligned(to: 2))
        #expect(GuestAddress(0xd000_0000).description == "0xd0000000")
        #expect(GuestAddress(1) < GuestAddress(2))
    }
}

@Suite(.timed) struct GuestRAMTests {
    @Test("Ranges that are RAM", arguments: inside)
    func isRAM(start: UInt64, count: UInt64) throws {
        let memory = try smallMemory()
        #expect(memory.ram.contains(GuestAddress(start), count: count))
        #expect(unsafe memory.ram.iovec(for: GuestAddress(start), count: count)?.iov_len == Int(count))
        #expect(memory.ram.slice(at: GuestAddress(start), count: count)?.count == Int(count))
    }

    @Test("Ranges that are not", arguments: outside)
    func isNotRAM(start: UInt64, count: UInt64) throws {
        let memory = try smallMemory()
        let address = GuestAddress(start)
        #expect(!memory.ram.contains(address, count: count))
        #expect(unsafe memory.ram.iovec(for: address, count: count) == nil)
        #expect(memory.ram.slice(at: address, count: count) == nil)
        #expect(throws: GuestMemoryError.outOfRange(address, count: count)) {
            try memory.ram.fill(at: address, count: count, with: 1)
        }
    }

    @Test func valuesOfEveryWidthAtAnyAlignment() throws {
        let memory = try smallMemory(), ram = memory.ram
        for offset in UInt64(0)..<9 {
            let address = GuestAddress(page - 4 + offset)
            try ram.write(UInt64(0x8877_6655_4433_2211), at: address)
            #expect(try ram.readBytes(at: address, count: 8) == [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88])
            #expect(try ram.readUInt8(at: address) == 0x11)
            #expect(try ram.readUInt16(at: address) == 0x2211)
            #expect(try ram.readUInt32(at: address) == 0x4433_2211)
            #expect(try ram.readUInt64(at: address) == 0x8877_6655_4433_2211)
            try ram.write(UInt32(0xddcc_bbaa), at: address)
            try ram.write(UInt16(0x0201), at: address &+ 4)
            try ram.write(UInt8(0x99), at: address &+ 7)
            #expect(try ram.readUInt64(at: address) == 0x9977_0201_ddcc_bbaa)
        }
    }

    @Test func theLastByteAndNoFurther() throws {
        let memory = try smallMemory(), ram = memory.ram
        for last in [2 * page - 1, (4 << 30) + page - 1] {
            let address = GuestAddress(last)
            try ram.write(UInt8(0x5a), at: address)
            #expect(try ram.readUInt8(at: address) == 0x5a)
            #expect(throws: GuestMemoryError.outOfRange(address, count: 2)) { try ram.write(UInt16(0), at: address) }
            #expect(throws: GuestMemoryError.outOfRange(address, count: 4)) { try ram.readUInt32(at: address) }
            #expect(throws: GuestMemoryError.outOfRange(address, count: 8)) { try ram.readUInt64(at: address) }
            #expect(try ram.readUInt8(at: address) == 0x5a, "a refused write wrote")
        }
    }

    @Test func bytesGoInAndOutWholeOrNotAtAll() throws {
        let memory = try smallMemory(), ram = memory.ram
        let bytes = (0..<300).map { UInt8(truncatingIfNeeded: $0 &* 7) }
        try ram.write(bytes, at: GuestAddress(page - 150))
        #expect(try ram.readBytes(at: GuestAddress(page - 150), count: 300) == bytes)
        #expect(throws: GuestMemoryError.self) { try ram.write(bytes, at: GuestAddress(2 * page - 299)) }
        #expect(try ram.readUInt8(at: GuestAddress(2 * page - 299)) == 0)
        try ram.write([], at: GuestAddress(5))
        #expect(try ram.readBytes(at: GuestAddress(5), count: 0) == [])
        try ram.fill(at: GuestAddress(page), count: page, with: 0xee)
        #expect(try ram.readBytes(at: GuestAddress(page), count: Int(page)).allSatisfy { $0 == 0xee })
        #expect(try ram.readUInt8(at: highStart) == 0, "the filled region's neighbour in host memory was touched")
    }

    @Test func slicesReadAndWriteByOffset() throws {
        let memory = try smallMemory()
        let slice = try #require(memory.ram.slice(at: highStart, count: 16))
        slice.store16(0x1234, 0)
        slice.storeRelease16(0x5678, 2)
        slice.store32(0x9abc_def0, 4)
        slice.store64(0x0102_0304_0506_0708, 8)
        #expect(slice.loadAcquire16(0) == 0x1234)
        #expect(slice.load16(2) == 0x5678)
        #expect(slice.load32(4) == 0x9abc_def0)
        #expect(slice.load8(15) == 1)
        #expect(slice.load32(8) == 0x0506_0708)
        #expect(try memory.ram.readUInt64(at: highStart) == 0x9abc_def0_5678_1234)
    }

    @Test func aSliceEndsAProcessThatOverrunsIt() async {
        await #expect(processExitsWith: .failure) {
            let memory = try GuestMemory(size: 4096)
            let slice = try #require(memory.ram.slice(at: GuestAddress(0), count: 16))
            slice.store16(1, 15)
        }
    }
}

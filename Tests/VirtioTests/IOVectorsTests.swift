// SPDX-License-Identifier: Apache-2.0

import CLinux
import TestSupport
import Testing

@testable import GuestMemory
@testable import Virtio

/// Requests whose bytes are cut into buffers in every way.
@Suite(.timed) struct IOVectorsTests {
    private let guest: TestGuest
    private let content = (0..<24).map { UInt8($0 + 1) }

    init() throws { guest = try TestGuest() }

    /// A run of 24 bytes cut as `lengths` say, the pieces apart from each other in RAM.
    private func withRun(_ lengths: [Int], _ body: (inout IOVectors) throws -> Void) throws {
        let pool = IOVectorPool(slots: 1, capacity: 24)
        var offset = 0
        for (index, length) in lengths.enumerated() {
            let address = GuestAddress(0x1000 * UInt64(index + 1))
            try guest.ram.fill(at: GuestAddress(address.rawValue - 8), count: 64, with: 0xcc)
            try guest.ram.write(Array(content[offset..<offset + length]), at: address)
            unsafe pool[0].base[index] = try #require(guest.ram.iovec(for: address, count: UInt64(length)))
            offset += length
        }
        var run = pool[0].prefix(lengths.count)
        try body(&run)
        // Nothing beside the pieces was written.
        for (index, length) in lengths.enumerated() {
            let address = 0x1000 * UInt64(index + 1)
            #expect(
                try guest.ram.readBytes(at: GuestAddress(address - 8), count: 8) == Array(repeating: 0xcc, count: 8))
            #expect(
                try guest.ram.readBytes(at: GuestAddress(address + UInt64(length)), count: 8)
                    == Array(repeating: 0xcc, count: 8))
        }
    }

    static let cuts: [[Int]] = [
        [24], [1, 23], [23, 1], [8, 8, 8], [16, 8], [5, 7, 12], [3, 3, 3, 3, 3, 3, 3, 3],
        Array(repeating: 1, count: 24),
    ]

    @Test("Reading", arguments: cuts)
    func reading(cut: [Int]) throws {
        try withRun(cut) { run in
            #expect(run.byteCount == 24)
            #expect(run.bytes == content)
            for offset in 0...24 {
                let at = UInt64(offset)
                #expect(run.load(UInt8.self, at: at) == (offset < 24 ? content[offset] : nil))
                #expect(
                    run.load(UInt32.self, at: at)
                        == (offset <= 20
                            ? (0..<4).reduce(UInt32(0)) { $0 | UInt32(content[offset + $1]) << (8 * UInt32($1)) } : nil)
                )
                #expect((run.load(UInt64.self, at: at) == nil) == (offset > 16))
                var bytes = [UInt8](repeating: 0, count: 10)
                let count = unsafe bytes.withUnsafeMutableBytes { unsafe run.copy(at: at, to: $0) }
                #expect(Array(bytes.prefix(count)) == Array(content[offset..<min(24, offset + 10)]))
            }
            #expect(run.load(UInt8.self, at: .max) == nil)
            #expect(run.load(UInt64.self, at: .max - 3) == nil)
        }
    }

    @Test("Writing", arguments: cuts)
    func writing(cut: [Int]) throws {
        try withRun(cut) { run in
            var expected = content
            #expect(run.store(UInt32(0xa1a2_a3a4), at: 6))
            expected.replaceSubrange(6..<10, with: [0xa4, 0xa3, 0xa2, 0xa1])
            #expect(run.bytes == expected)
            #expect(!run.store(UInt32(0xb1b2_b3b4), at: 22))
            expected.replaceSubrange(22..<24, with: [0xb4, 0xb3])
            #expect(run.bytes == expected)
            #expect(!run.store(UInt8(1), at: 24))
            #expect(!run.store(UInt64(1), at: .max))
            #expect(run.fill(at: 2, count: 3, with: 0xee) == 3)
            expected.replaceSubrange(2..<5, with: [0xee, 0xee, 0xee])
            #expect(run.fill(at: 23, count: 100, with: 0x77) == 1)
            expected[23] = 0x77
            let text: [UInt8] = [1, 2, 3, 4, 5]
            let copied = unsafe run.copy(at: 11, from: text.span.bytes)
            #expect(copied == 5)
            expected.replaceSubrange(11..<16, with: text)
            #expect(run.bytes == expected)
        }
    }

    @Test("Parts", arguments: cuts)
    func parts(cut: [Int]) throws {
        for first in [0, 1, 4, 8, 13, 23, 24] {
            for last in [0, 1, 3, 8, 11, 16, 24] where first + last <= 24 {
                try withRun(cut) { run in
                    let didRemove = [run.removeFirst(UInt64(first)), run.removeLast(UInt64(last))]
                    let tooMuch = [run.removeFirst(run.byteCount + 1), run.removeLast(.max)]
                    #expect(didRemove == [true, true] && tooMuch == [false, false])
                    #expect(run.bytes == Array(content[first..<24 - last]), "without \(first) and \(last)")
                    #expect(run.lengths.reduce(0, +) == 24 - first - last && run.byteCount == UInt64(24 - first - last))
                    #expect(!run.lengths.contains(0), "the kernel would get empty buffers")
                }
            }
        }
    }

    @Test("The last byte", arguments: cuts)
    func lastByte(cut: [Int]) throws {
        try withRun(cut) { run in
            let removed = run.removeLastByte()
            let status = try #require(removed)
            #expect(run.bytes == Array(content.dropLast()))
            status.store(0xfe)
            let last = cut.count
            #expect(
                try guest.ram.readUInt8(at: GuestAddress(0x1000 * UInt64(last) + UInt64(cut[last - 1]) - 1)) == 0xfe)
            #expect(run.bytes == Array(content.dropLast()))
        }
    }

    @Test func aPoolKeepsItsSlotsApart() {
        let pool = IOVectorPool(slots: 3, capacity: 2)
        #expect(unsafe pool[1].base == pool[0].base + 2)
        #expect(pool[2].capacity == 2)
        #expect(pool[0].prefix(-1).count == 0)
    }
}

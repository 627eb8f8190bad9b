// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import TestSupport
import Testing

/// Elements, tables and pieces of memory whose accesses are checked.
@Suite(.timed) struct MemoryTests {
    @Test func bytesOfSegmentsKeepTheirOrder() {
        var room = [UInt8](repeating: 0xee, count: 128)
        let contents = (0..<16).map { UInt8($0) }
        var back = [UInt8](repeating: 0, count: 9)
        var pieces: [Int] = [], length: UInt64 = 0
        room.withIOMemory { room in
            // 5, 0 and 11 bytes, of which the last ones come first in memory.
            let vectors = [room.piece(100, 5).vector, room.piece(50, 0).vector, room.piece(0, 11).vector]
            vectors.withUnsafeBufferPointer { vectors in
                let segments = IOSegments(vectors.baseAddress!, count: vectors.count)
                length = segments.length
                contents.withReadableIOMemory { segments.copyIn($0, at: 0) }
                back.withIOMemory { segments.copyOut(from: 3, to: $0) }
                segments.forEachPiece(from: 4, length: 3) { pieces.append($0.count) }
                segments.clear(from: 15, length: 1)
            }
        }
        #expect(length == 16 && pieces == [1, 2])
        #expect(Array(room[100..<105]) == [0, 1, 2, 3, 4])
        #expect(Array(room[0..<11]) == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0])
        #expect(room[11] == 0xee && room[99] == 0xee && room[105] == 0xee)
        #expect(back == Array(contents[3..<12]))
    }

    @Test func segmentsThatFollowEachOtherAreOnePiece() {
        var room = [UInt8](repeating: 0, count: 128)
        let (joined, apart) = room.withIOMemory { room in
            let vectors = [room.piece(0, 16).vector, room.piece(16, 8).vector, room.piece(32, 8).vector]
            return vectors.withUnsafeBufferPointer { vectors in
                let all = vectors.baseAddress!
                return (IOSegments(all, count: 2).contiguous?.count, IOSegments(all, count: 3).contiguous?.count)
            }
        }
        #expect(joined == 24 && apart == nil)
    }

    @Test func integersHaveTheirByteOrder() throws {
        var bytes = [UInt8](repeating: 0, count: 16)
        let (native, swapped) = bytes.withIOMemory { memory in
            memory.store(bigEndian: 0x0102_0304_0506_0708 as UInt64, 1)
            memory.store(littleEndian: 0x0a0b_0c0d as UInt32, 12)
            return (memory.load(littleEndian: 12, as: UInt32.self), memory.load(bigEndian: 7, as: UInt16.self))
        }
        #expect(bytes == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a])
        #expect(native == 0x0a0b_0c0d && swapped == 0x0708)
        var table = try BigEndianTable(count: 3, "")
        table[2] = 0x1122
        let (entry, raw, other) = (table[2], table.bytes(2..<3).array, table[1])
        #expect(entry == 0x1122 && raw == [0, 0, 0, 0, 0, 0, 0x11, 0x22] && other == 0)
    }

    @Test func elementsAreMadeAndEndOnce() {
        final class Counter { var count = 0 }
        struct Element: ~Copyable {
            let counter: Counter
            var value = 0
            init(_ counter: Counter) { self.counter = counter; counter.count += 1 }
            deinit { counter.count -= 1 }
        }
        let counter = Counter()
        do {
            var builder = SlabBuilder<Element>(capacity: 4)
            for _ in 0..<3 { builder.append(Element(counter)) }
            let slab = builder.takeSlab()
            slab[1].value = 7
            let (made, left, value) = (counter.count, builder.count, slab[1 as Int32].value)
            #expect(made == 3 && left == 0 && value == 7 && slab.count == 3)
        }
        #expect(counter.count == 0)
        do {
            var builder = SlabBuilder<Element>(capacity: 4)
            builder.append(Element(counter))
            let made = counter.count
            #expect(made == 1)
        }
        #expect(counter.count == 0)
    }

    @Test func listsAreOfTheirOwnSegments() throws {
        var room = [UInt8](repeating: 1, count: 64)
        var lists = try IOSegmentLists(count: 2, capacity: 3, "")
        let lengths = room.withIOMemory { room in
            let first = lists.list(0, repeating: room.prefix(10), length: 25), second = lists.list(1, room.piece(60, 4))
            let part = lists.list(0, of: first, from: 5, length: 7)
            return [second.length, part.length, UInt64(part.count)]
        }
        #expect(lengths == [4, 7, 2])
    }
}

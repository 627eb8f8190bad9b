// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// Page numbers of a driver's request, copied from guest RAM piece by piece and sorted, so that neighbours go to the
/// kernel in one call.
///
/// Storage for one piece is there from the start; nothing is allocated later.
struct PageNumbers: ~Copyable {
    /// Numbers in a piece: four times what Linux' driver puts into a request.
    static let capacity = 1024

    private var numbers: [UInt32]
    private(set) var count = 0
    private var next = 0

    init() { numbers = [UInt32](repeating: 0, count: Self.capacity) }

    /// Bytes of a page number.
    static let width: UInt64 = 4

    /// Copies the numbers from `offset` on, as many as there are, up to the capacity; replaces those of before.
    mutating func load(_ buffer: IOVectors, at offset: UInt64) {
        // The copy is at most as long as the storage, and any bytes are numbers.
        let bytes = unsafe numbers.withUnsafeMutableBytes { unsafe buffer.copy(at: offset, to: $0) }
        count = bytes / Int(Self.width)
        next = 0
        var isSorted = true
        for index in 0..<count {
            numbers[index] = UInt32(littleEndian: numbers[index])
            if index > 0, numbers[index] < numbers[index - 1] { isSorted = false }
        }
        if !isSorted { sort() }
    }

    /// The next run of neighbouring pages, each once; nil when there are none.
    mutating func nextRun() -> (first: UInt32, count: UInt32)? {
        guard next < count else { return nil }
        let first = numbers[next]
        var last = first
        next += 1
        while next < count, numbers[next] &- last <= 1 {
            last = numbers[next]
            next += 1
        }
        return (first, last &- first &+ 1)
    }

    /// Heap sort: in place, and no order of a guest's makes it slow.
    private mutating func sort() {
        for start in (0..<count / 2).reversed() { sink(start, below: count) }
        for end in (1..<max(1, count)).reversed() {
            numbers.swapAt(0, end)
            sink(0, below: end)
        }
    }

    private mutating func sink(_ start: Int, below end: Int) {
        var parent = start
        while 2 * parent + 1 < end {
            var child = 2 * parent + 1
            if child + 1 < end, numbers[child] < numbers[child + 1] { child += 1 }
            guard numbers[parent] < numbers[child] else { return }
            numbers.swapAt(parent, child)
            parent = child
        }
    }
}

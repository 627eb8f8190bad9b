// SPDX-License-Identifier: Apache-2.0

/// Free memory, as a short sorted list of extents: no set-up, no scan, and neighbours are merged.
struct PageAllocator: ~Copyable {
    static let pageSize: UInt64 = 4096

    private struct Extent {
        var start: UInt64 = 0
        var end: UInt64 = 0
    }

    private var gaps = InlineArray<64, Extent>(repeating: Extent())
    private var count = 0

    /// The number of free bytes.
    private(set) var free: UInt64 = 0

    /// Adds the pages that lie wholly within `start ..< end`. Memory beyond the 64th separate extent is lost.
    mutating func add(_ start: UInt64, _ end: UInt64) {
        let mask = Self.pageSize - 1
        guard end <= 1 << 39, start < end else { return }  // the page tables end at 512 GiB
        let start = (start &+ mask) & ~mask
        let end = end & ~mask
        guard start < end else { return }
        free += end - start

        var index = 0
        while index < count && gaps[index].start < start { index += 1 }
        if index > 0 && gaps[index - 1].end == start {
            gaps[index - 1].end = end
            if index < count && gaps[index].start == end {
                gaps[index - 1].end = gaps[index].end
                remove(at: index)
            }
        } else if index < count && gaps[index].start == end {
            gaps[index].start = start
        } else if count < gaps.count {
            for other in stride(from: count, to: index, by: -1) { gaps[other] = gaps[other - 1] }
            gaps[index] = Extent(start: start, end: end)
            count += 1
        } else {
            free -= end - start
        }
    }

    /// Allocates adjacent pages at the lowest address; nil if no extent is large enough. Their contents are undefined.
    mutating func allocate(pages: UInt64 = 1) -> Address? {
        let size = pages &* Self.pageSize
        guard pages > 0, size / Self.pageSize == pages else { return nil }
        for index in 0..<count where gaps[index].end - gaps[index].start >= size {
            let start = gaps[index].start
            gaps[index].start += size
            if gaps[index].start == gaps[index].end { remove(at: index) }
            free -= size
            return Address(start)
        }
        return nil
    }

    /// Frees pages of `allocate`.
    mutating func release(_ address: Address, pages: UInt64) {
        add(address.value, address.value &+ pages &* Self.pageSize)
    }

    /// The size of the largest extent.
    var longest: (start: Address, size: UInt64) {
        var best = Extent()
        for index in 0..<count where gaps[index].end - gaps[index].start > best.end - best.start { best = gaps[index] }
        return (Address(best.start), best.end - best.start)
    }

    /// The free extents, lowest first.
    var extents: [(start: UInt64, end: UInt64)] {
        var list: [(start: UInt64, end: UInt64)] = []
        for index in 0..<count { list.append((gaps[index].start, gaps[index].end)) }
        return list
    }

    private mutating func remove(at index: Int) {
        for other in index..<(count - 1) { gaps[other] = gaps[other + 1] }
        count -= 1
    }
}

/// The free memory. Only the boot processor allocates.
nonisolated(unsafe) var pages = PageAllocator()

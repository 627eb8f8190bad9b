// SPDX-License-Identifier: Apache-2.0

/// The memory of Swift's arrays, classes and closures: blocks of 16 << n bytes, cut from pages, with a list of free
/// ones for each size; beyond 2 KiB, whole pages. A header of 16 bytes contains the size.
private struct Heap: ~Copyable {
    private static let classes = 8
    private static let chunkPages: UInt64 = 16

    private var freeBlocks = InlineArray<8, UInt64>(repeating: 0)
    private var chunk: UInt64 = 0
    private var chunkEnd: UInt64 = 0

    mutating func allocate(_ size: UInt64) -> UInt64? {
        let total = size &+ 16
        guard total > size else { return nil }
        var sizeClass = 0
        while sizeClass < Self.classes && 16 << UInt64(sizeClass + 1) < total { sizeClass += 1 }
        if sizeClass == Self.classes {
            let count = (total + PageAllocator.pageSize - 1) / PageAllocator.pageSize
            guard let block = unsafe pages.allocate(pages: count) else { return nil }
            block.store(UInt64(Self.classes) + count)
            return block.value + 16
        }
        var block = freeBlocks[sizeClass]
        if block != 0 {
            freeBlocks[sizeClass] = Address(block).load(8)
        } else {
            let length: UInt64 = 16 << UInt64(sizeClass + 1)
            if chunkEnd - chunk < length {
                guard let fresh = unsafe pages.allocate(pages: Self.chunkPages) else { return nil }
                chunk = fresh.value
                chunkEnd = chunk + Self.chunkPages * PageAllocator.pageSize
            }
            block = chunk
            chunk += length
        }
        Address(block).store(UInt64(sizeClass))
        return block + 16
    }

    mutating func release(_ payload: UInt64) {
        let block = Address(payload - 16)
        let kind: UInt64 = block.load()
        if kind >= UInt64(Self.classes) {
            unsafe pages.release(block, pages: kind - UInt64(Self.classes))
        } else {
            block.store(freeBlocks[Int(kind)], 8)
            freeBlocks[Int(kind)] = block.value
        }
    }
}

nonisolated(unsafe) private var heap = Heap()

// Called by `posix_memalign` and `free` of Swift's runtime (instructions.S); only on the boot processor: see
// PageAllocator.

@c(heapAllocate)
func allocateAligned(_ result: UInt64, _ alignment: UInt, _ size: UInt) -> Int32 {
    guard alignment <= 16, let block = unsafe heap.allocate(UInt64(size)) else { return 12 /* ENOMEM */ }
    Address(result).store(block)
    return 0
}

@c(heapRelease)
func release(_ payload: UInt64) {
    if payload != 0 { unsafe heap.release(payload) }
}

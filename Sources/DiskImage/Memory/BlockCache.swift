// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A bounded set of equal blocks, each known by a number: pieces of a format's table, or decompressed clusters.
///
/// The cache reads nothing itself. A caller that misses a block takes a slot (``reserve(_:)``), has it filled while
/// others wait, and calls ``complete(_:error:)``. Until ``unpin(_:)`` the block stays, whatever else is wanted
/// meanwhile, so that those who waited for it find it (or its error) and each of them gets on by a step.
///
/// It is set-associative; its memory is given by the kernel as it is touched, so an unused cache costs nothing.
struct BlockCache: ~Copyable {
    enum Result {
        /// The block is in this slot, until the cache is next asked to make room.
        case ready(Int)
        /// A request is reading it.
        case loading
        /// Filling it failed, with this errno value.
        case failed(Int32)
        case missing
    }

    private enum State: UInt8 { case empty, loading, fresh, failed, ready }

    private struct Slot: BitwiseCopyable {
        var key: UInt64
        /// When it was last used, for the choice of a victim.
        var stamp: UInt64
        var error: Int32
        /// Changes under way that will be made to it: it must stay.
        var pins: Int32 = 0
        /// The next dirty slot plus 2, so 1 for the last one; 0: not dirty.
        var nextDirty: Int32 = 0
        /// A `State`; memory fresh from the kernel is `.empty`.
        var state: UInt8
    }

    private static let ways = 8

    /// Bytes of a block.
    let blockSize: Int
    private let setCount: Int
    private let statistics: CacheStatistics
    private let slots: Slab<Slot>
    private let blocks: IOBuffer
    private var clock: UInt64 = 0
    /// The most recent of the list of slots with changes that the file does not have.
    private var firstDirty: Int32 = -1

    /// - Parameters:
    ///   - blockSize: bytes, at least 1.
    ///   - count: blocks, rounded up to a multiple of 8. `blockSize * count` is bounded by the caller.
    init(blockSize: Int, count: Int, statistics: CacheStatistics) throws(SystemCallError) {
        let setCount = max(1, (count + Self.ways - 1) / Self.ways)
        // Zeroes are an empty slot.
        let slots: Slab<Slot> = try unsafe Slab(zeroed: setCount * Self.ways)
        blocks = try IOBuffer(count: setCount * Self.ways * blockSize)
        self.slots = slots
        self.blockSize = blockSize
        self.setCount = setCount
        self.statistics = statistics
        statistics.setCapacity(setCount * Self.ways * blockSize)
    }

    /// - Parameter path: the image's, for the error that there is no memory.
    init(blockSize: Int, count: Int, statistics: CacheStatistics, _ path: String) throws(DiskImageError) {
        do throws(SystemCallError) {
            try self.init(blockSize: blockSize, count: count, statistics: statistics)
        } catch {
            throw .system(path: path, error)
        }
    }

    /// Looks for a block and, if it is there, marks it used.
    mutating func find(_ key: UInt64) -> Result {
        let first = Int(key % UInt64(setCount)) * Self.ways
        for slot in first..<first + Self.ways {
            guard slots[slot].key == key, let state = State(rawValue: slots[slot].state) else { continue }
            switch state {
            case .empty: continue
            case .loading: return .loading
            case .failed: return .failed(slots[slot].error)
            case .fresh, .ready:
                // A fresh one is found by those that waited for it.
                if state == .ready { statistics.noteHit() }
                clock &+= 1
                slots[slot].stamp = clock
                return .ready(slot)
            }
        }
        return .missing
    }

    /// Takes the slot for a missing block, at the cost of the one unused for longest; nil while all are being filled,
    /// pinned or dirty.
    mutating func reserve(_ key: UInt64) -> Int? {
        let first = Int(key % UInt64(setCount)) * Self.ways
        var victim: Int?
        var oldest = UInt64.max
        for slot in first..<first + Self.ways {
            let state = State(rawValue: slots[slot].state)
            if state == .empty {
                victim = slot
                break
            }
            if state == .ready, slots[slot].pins == 0, slots[slot].nextDirty == 0, slots[slot].stamp < oldest {
                victim = slot
                oldest = slots[slot].stamp
            }
        }
        guard let victim else { return nil }
        statistics.noteMiss()
        if State(rawValue: slots[victim].state) == .ready { statistics.noteEviction() }
        slots[victim] = Slot(key: key, stamp: 0, error: 0, state: State.loading.rawValue)
        return victim
    }

    /// The filling of a reserved slot ended; `error` is an errno value or 0.
    mutating func complete(_ slot: Int, error: Int32) {
        slots[slot].error = error
        slots[slot].state = (error == 0 ? State.fresh : .failed).rawValue
    }

    /// Those who waited have looked: from now on the block may be replaced, and what failed may be tried again.
    mutating func unpin(_ slot: Int) {
        slots[slot].state = (slots[slot].error == 0 ? State.ready : .empty).rawValue
    }

    /// A slot's memory, `blockSize` bytes that live as long as the cache.
    @inline(__always) func block(_ slot: Int) -> IOMemory { blocks.piece(slot * blockSize, blockSize) }

    /// One of a block's 64-bit words, in a file's byte order there: most significant byte first.
    @inline(__always) func word(_ index: Int, of slot: Int) -> UInt64 { block(slot).load(bigEndian: index &* 8) }

    @inline(__always) mutating func setWord(_ index: Int, of slot: Int, to value: UInt64) {
        block(slot).store(bigEndian: value, index &* 8)
    }

    // MARK: - Changes

    /// The slot of a block that is there.
    func slot(of key: UInt64) -> Int? {
        let first = Int(key % UInt64(setCount)) * Self.ways
        for slot in first..<first + Self.ways {
            guard slots[slot].key == key, let state = State(rawValue: slots[slot].state) else { continue }
            if state == .fresh || state == .ready { return slot }
        }
        return nil
    }

    /// Indicates whether blocks wait to be written: writing them makes room.
    var isDirty: Bool { firstDirty >= 0 }

    func key(_ slot: Int) -> UInt64 { slots[slot].key }

    /// Keeps a block in its slot until as many calls with -1 as with +1 were made.
    func pin(_ slot: Int, _ change: Int32) { slots[slot].pins &+= change }

    mutating func markDirty(_ slot: Int) {
        guard slots[slot].nextDirty == 0 else { return }
        // -1, the end of the list, becomes 1.
        slots[slot].nextDirty = firstDirty &+ 2
        firstDirty = Int32(slot)
    }

    /// The first of the dirty blocks.
    var dirtySlot: Int? { firstDirty < 0 ? nil : Int(firstDirty) }

    /// The first of the dirty blocks has been written.
    mutating func cleanFirst() {
        guard firstDirty >= 0 else { return }
        let slot = firstDirty
        firstDirty = slots[slot].nextDirty &- 2
        slots[slot].nextDirty = 0
    }
}

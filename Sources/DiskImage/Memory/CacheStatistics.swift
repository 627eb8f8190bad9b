// SPDX-License-Identifier: Apache-2.0

internal import Synchronization

/// The counters of one cache of an image's file. Any thread may read them; the one that uses the cache adds to them.
public final class CacheStatistics: Sendable {
    private let size = Atomic<UInt64>(0)
    private let hit = Atomic<UInt64>(0)
    private let missed = Atomic<UInt64>(0)
    private let evicted = Atomic<UInt64>(0)

    init() {}

    /// Bytes that the cache can hold; 0 while the file has no such cache.
    public var capacity: UInt64 { size.load(ordering: .relaxed) }
    /// Lookups that found their block without a read. One that has waited for its block is none.
    public var hits: UInt64 { hit.load(ordering: .relaxed) }
    /// Blocks that had to be read.
    public var misses: UInt64 { missed.load(ordering: .relaxed) }
    /// Blocks that were replaced by others.
    public var evictions: UInt64 { evicted.load(ordering: .relaxed) }

    func setCapacity(_ bytes: Int) { size.store(UInt64(bytes), ordering: .relaxed) }
    @inline(__always) func noteHit() { Self.increment(hit) }
    func noteMiss() { Self.increment(missed) }
    func noteEviction() { Self.increment(evicted) }

    /// One thread at a time has the cache, so nothing is lost without an atomic addition, which costs more.
    @inline(__always) private static func increment(_ counter: borrowing Atomic<UInt64>) {
        counter.store(counter.load(ordering: .relaxed) &+ 1, ordering: .relaxed)
    }
}

/// The counters of the caches of one file of an image. They outlive the caches, which are new when the metadata is read
/// again.
public final class FileStatistics: Sendable {
    /// Pieces of the tables that map the disk: L2 tables, grain tables, block allocation tables.
    public let mapping = CacheStatistics()
    /// Pieces of refcount blocks, in a qcow2 image that is written.
    public let refcounts = CacheStatistics()
    /// Decompressed clusters or grains.
    public let decompressed = CacheStatistics()

    init() {}

    /// Those that the file has, with the names that metrics give them.
    public var caches: [(name: String, statistics: CacheStatistics)] {
        [("mapping", mapping), ("refcounts", refcounts), ("decompressed", decompressed)].filter { $0.1.capacity > 0 }
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import TestSupport
import Testing

/// What is counted of the caches of an image's files.
@Suite(.timed) struct CacheStatisticsTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// An image of 1 MiB whose table is 32 pieces of 512 bytes, each of which maps 32 KiB.
    private func makeImage() -> String {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
        qemuIO(path, ["write -P 3 0 1M"])
        return path
    }

    /// With room for eight pieces, each of 32 is read once, and only the last eight are found again.
    @Test func hitsMissesAndEvictions() throws {
        let path = makeImage()
        var options = readOnly
        options.metadataCacheSize = 0
        let shared = try SharedImage(DiskImage(path: path, options: options))
        var engine = try DiskEngine(shared)
        let statistics = try #require(shared.cacheStatistics.first)
        #expect(shared.cacheStatistics.count == 1 && statistics.file == 0)
        let mapping = statistics.statistics.mapping
        #expect(statistics.statistics.caches.map(\.name) == ["mapping", "decompressed"])
        #expect(mapping.capacity == 8 * 512)
        for piece: UInt64 in 0..<32 { _ = try engine.read(piece << 15, 512) }
        #expect(mapping.misses == 32 && mapping.evictions == 24 && mapping.hits == 0)
        for piece: UInt64 in 24..<32 { _ = try engine.read(piece << 15, 512) }
        #expect(mapping.misses == 32 && mapping.evictions == 24 && mapping.hits == 8)
        _ = try engine.read(0, 512)
        #expect(mapping.misses == 33 && mapping.evictions == 25 && mapping.hits == 8)
    }

    @Test func compressedClustersAreReadOnce() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuIO(path, ["write -c -P 3 0 64k"])
        let shared = try SharedImage(exclusive: DiskImage(path: path, options: readOnly))
        var engine = try DiskEngine(shared)
        let decompressed = try #require(shared.cacheStatistics.first).statistics.decompressed
        for _ in 0..<3 { _ = try engine.read(4096, 4096) }
        #expect(decompressed.misses == 1 && decompressed.hits == 2 && decompressed.evictions == 0)
    }

    /// A longer L1 table has the metadata read anew, into new caches: what was counted stays.
    @Test func theCountersOutliveTheCaches() throws {
        let path = makeImage()
        let shared = try SharedImage(exclusive: DiskImage(path: path))
        var engine = try DiskEngine(shared)
        let statistics = try #require(shared.cacheStatistics.first).statistics
        #expect(statistics.caches.map(\.name) == ["mapping", "refcounts", "decompressed"])
        for _ in 0..<2 { _ = try engine.read(0, 512) }
        #expect(statistics.mapping.misses == 1 && statistics.mapping.hits == 1)
        try engine.resize(to: 64 << 20)
        let misses = statistics.mapping.misses
        try engine.write(48 << 20, [UInt8](repeating: 4, count: 512))
        #expect(misses >= 1 && statistics.mapping.misses > misses && statistics.mapping.hits >= 1)
        #expect(statistics.refcounts.misses >= 1)
        #expect(try #require(shared.cacheStatistics.first).statistics === statistics)
    }

    /// Each file of a chain has its own, and only for the caches that it uses.
    @Test func filesOfAChain() throws {
        let raw = directory.file("base.raw")
        try directory.write("base.raw", randomBytes(1 << 20, seed: 1))
        let middle = directory.file("middle.vmdk"), top = directory.file("top.qcow2")
        qemuImage("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, middle)
        qemuImage("create", "-q", "-f", "qcow2", "-b", middle, "-F", "vmdk", top)
        let shared = try SharedImage(exclusive: DiskImage(path: top, options: readOnly))
        #expect(shared.cacheStatistics.map(\.file) == [0, 1])
        #expect(
            shared.cacheStatistics.map { $0.statistics.caches.map(\.name) } == [
                ["mapping", "decompressed"], ["mapping", "decompressed"],
            ])
        var engine = try DiskEngine(shared)
        for _ in 0..<2 { _ = try engine.read(0, 4096) }
        let lower = shared.cacheStatistics[1].statistics
        #expect(lower.mapping.misses == 1 && lower.decompressed.misses == 1 && lower.decompressed.hits == 1)
        // The overlay has no table for it.
        #expect(shared.cacheStatistics[0].statistics.mapping.misses == 0)
        let plain = directory.file("plain.vdi")
        qemuImage("create", "-q", "-f", "vdi", plain, "4M")
        #expect(
            try SharedImage(exclusive: DiskImage(path: plain, options: readOnly)).cacheStatistics.map {
                $0.statistics.caches.map(\.name)
            } == [["mapping"]])
        #expect(try SharedImage(exclusive: DiskImage(path: raw, options: readOnly)).cacheStatistics.isEmpty)
    }
}

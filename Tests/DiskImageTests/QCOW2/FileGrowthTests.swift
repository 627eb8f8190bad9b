// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// A qcow2 file is made longer ahead of what is written, and ends where its last cluster ends when it is closed.
@Suite(.timed) struct FileGrowthTests {
    let directory = TemporaryDirectory(inMemory: true)
    private static let cluster = 65536

    private func makeImage(_ options: String = "cluster_size=64k") -> String {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "64M")
        return path
    }

    private func status(_ path: String) -> (size: Int, blocks: Int) {
        var status = stat()
        let result = unsafe stat(path, &status)
        #expect(result == 0)
        return (Int(status.st_size), Int(status.st_blocks) * 512)
    }

    /// Writes into every other cluster, so that each takes a new one.
    private func fill(_ engine: inout DiskEngine, clusters: Int) throws {
        for cluster in 0..<clusters {
            try engine.write(
                UInt64(2 * cluster * Self.cluster + 4096), [UInt8](repeating: UInt8(cluster & 0xff) | 1, count: 4096))
        }
    }

    private func check(_ path: String, clusters: Int) throws {
        qemuImage("check", "-q", "-f", "qcow2", path)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        var contents = [UInt8](repeating: 0, count: 64 << 20)
        for cluster in 0..<clusters {
            let start = 2 * cluster * Self.cluster + 4096
            contents.replaceSubrange(start..<start + 4096, with: repeatElement(UInt8(cluster & 0xff) | 1, count: 4096))
        }
        #expect(try engine.readAll() == contents)
    }

    @Test func theFileIsLongerWhileItIsWrittenAndEndsWithItsLastClusterAfterwards() throws {
        let path = makeImage()
        let before = status(path)
        do {
            var engine = try DiskEngine(DiskImage(path: path))
            try fill(&engine, clusters: 1)
            let first = status(path)
            #expect(first.size >= before.size + 16 * Self.cluster)
            // The blocks are there too, so that a write of a new cluster only has to write.
            #expect(first.blocks >= before.blocks + 16 * Self.cluster)
            try fill(&engine, clusters: 200)
            try engine.perform(.flush)
        }
        let after = status(path)
        // 200 clusters, the table that maps them, and what is left of the cluster in which the file ended.
        #expect(after.size <= before.size + 202 * Self.cluster)
        try check(path, clusters: 200)
    }

    /// A file system without fallocate, one without room for as much, and one where not even a longer file is to be
    /// had.
    @Test(arguments: zip([EOPNOTSUPP, ENOSPC, ENOSPC, EOPNOTSUPP], [Int32(0), 0, EFBIG, EPERM]))
    func itIsAWish(_ reserving: Int32, _ truncating: Int32) throws {
        let path = makeImage()
        let truncates = Atomic<Int>(0)
        let host = FileCalls.host
        let calls = unsafe FileCalls(
            read: host.read, write: host.write, synchronize: host.synchronize,
            allocate: { file, mode, offset, length in
                mode == 0 ? -Int(reserving) : host.allocate(file, mode, offset, length)
            },
            truncate: { file, size in
                truncates.wrappingAdd(1, ordering: .relaxed)
                return truncating == 0 ? host.truncate(file, size) : -Int(truncating)
            })
        do {
            var engine = try DiskEngine(DiskImage(path: path), depth: 4, segments: 4, calls: calls)
            try fill(&engine, clusters: 100)
            try engine.perform(.flush)
        }
        // Where it fails it is not tried again and again.
        #expect(truncates.load(ordering: .relaxed) <= 8)
        try check(path, clusters: 100)
    }

    @Test func whoIsKilledLeavesALongerFileWhoseEndIsUsedNext() throws {
        let path = makeImage()
        let copy = directory.file("copy.qcow2")
        do {
            var engine = try DiskEngine(DiskImage(path: path))
            try fill(&engine, clusters: 10)
            try engine.perform(.flush)
            // As the file is at this moment.
            try directory.write("copy.qcow2", directory.read("disk.qcow2"))
        }
        #expect(status(copy).size > status(path).size)
        try check(copy, clusters: 10)
        do {
            var engine = try DiskEngine(DiskImage(path: copy))
            try fill(&engine, clusters: 14)
            try engine.perform(.flush)
        }
        try check(copy, clusters: 14)
    }

    @Test func snapshotsAndAnotherSizeFindTheFileAsItIs() throws {
        let path = makeImage()
        do {
            var engine = try DiskEngine(DiskImage(path: path))
            try fill(&engine, clusters: 10)
            _ = try engine.createSnapshot(named: "one")
            let size = status(path).size
            // Not beyond what the file was made longer by.
            #expect(size <= 32 * Self.cluster)
            try fill(&engine, clusters: 12)
            try engine.resize(to: 128 << 20)
            try engine.resize(to: 64 << 20, shrinks: true)
        }
        #expect(status(path).size <= 48 * Self.cluster)
        try check(path, clusters: 12)
    }
}

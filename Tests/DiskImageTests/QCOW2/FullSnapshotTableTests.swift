// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@testable import DiskImage

/// Snapshots are deleted from long tables on a file system without a free block.
@Suite(.timed) struct FullSnapshotTableTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// The table of many snapshots, which is longer than a sector, gets another place: where the host has blocks
    /// already.
    @Test(arguments: Share.of(["cluster_size=512", "cluster_size=4k", "cluster_size=64k"]), [true, false])
    func oneOfManySnapshotsIsDeleted(options: String, reuses: Bool) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "10M")
        qemuIO(path, ["write -P 1 0 1M"])
        let names = (0..<12).map { "a snapshot with a long name, number \($0)" }
        let others = Array(names[..<3]) + Array(names[4...])
        for name in names { qemuImage("snapshot", "-c", name, path) }
        let disk = try FullFileSystemTests.contents(path)
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        do {
            var engine = try DiskEngine(
                DiskImage(path: path, options: unlocked), depth: 4, segments: 4,
                calls: FullFileSystemTests.full(log.calls, reuses: reuses))
            try engine.deleteSnapshot(names[3])
            #expect(try engine.snapshots().map(\.name) == others)
        }
        expectSound(path)
        for name in [names[0], names[4], names[11]] {
            #expect(try FullFileSystemTests.contents(path, snapshot: name) == disk)
        }
        try log.replay([start], prefixes: 12, seed: 10) { files, _, comment in
            let path = try directory.write("crashed.qcow2", files[0])
            try expectNoErrors(path, comment)
            let left = try FullFileSystemTests.names(path)
            #expect(left.filter { $0 != names[3] } == others, "\(comment)")
            for name in [names[2], names[11]] {
                #expect(try FullFileSystemTests.contents(path, snapshot: name) == disk, "\(comment)")
            }
            guard left.contains(names[3]) else { return }
            // It is whole, or it is known to be gone and can be deleted.
            do throws(DiskImageError) {
                var engine = try DiskEngine(
                    DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, snapshot: names[3]))
                )
                let all = (try? engine.readAll()) ?? []
                #expect(all == disk, "\(comment)")
            } catch {
                #expect("\(error)".contains("L1 table of 0 entries"), "\(error) \(comment)")
            }
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.deleteSnapshot(names[3])
            #expect(try DiskImage.check(path: path, options: unlocked).errors == 0, "\(comment)")
        }
    }

    /// Names of snapshots whose table is longer than 4 KiB, and has entries that begin in all places before the end of
    /// a sector.
    /// - Parameter extra: bytes of extra data of each.
    private static func longTable(extra: Int) -> [String] {
        var names: [String] = [], place = 0
        var cuts = [8, 40, 48, 56, 16, 24, 32, 64]
        while place < 5 << 10 {
            let left = 512 - cuts[0] - place % 512
            // The last before the end of a sector begins where the next of those is to be.
            let isLast = (80..<240).contains(left)
            let length = isLast ? left : left < 80 ? 136 : 120
            if isLast { cuts.append(cuts.removeFirst()) }
            // Behind fixed fields, extra data and the id.
            let begin = "\(names.count) ", room = length - 40 - extra - String(names.count + 1).utf8.count
            names.append(begin + String(repeating: "x", count: max(0, room - begin.utf8.count)))
            place += length
        }
        return names
    }

    /// A table of snapshots that is longer than what any of them has alone, an L1 table of one cluster.
    /// - Parameter isOurs: whether swkvm made the snapshots; QEMU's entries say more.
    private func makeLongTable(_ names: [String], isOurs: Bool) throws -> String {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
        qemuIO(path, ["write -P 1 0 100k"])
        guard isOurs else {
            for name in names { qemuImage("snapshot", "-c", name, path) }
            // QEMU keeps the blocks of clusters that it frees.
            try withScan(path) { scan in
                for cluster in 0..<scan.counts.end where scan.counts[cluster] == 0 {
                    scan.file.file.punch(cluster << 12, 4096)
                }
            }
            return path
        }
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
        for name in names { try engine.createSnapshot(named: name) }
        return path
    }

    private func withScan<Answer>(_ path: String, _ body: (borrowing QCOW2Scan) throws -> Answer) throws -> Answer {
        let image = try ImageFile(path: path, writable: true, cache: .writeback, locking: false)
        defer { _ = image.descriptor.rawValue }
        let file = TableFile(path: path, file: MetadataFile(calls: .host, number: image.descriptor.rawValue))
        return try body(QCOW2Scan.scan(QCOW2Header(image), file, fileSize: UInt64(directory.read("disk.qcow2").count)))
    }

    /// Bytes from where each snapshot's entry begins to the end of that sector.
    private func cuts(_ path: String) throws -> [Int] {
        var place = 0
        return try withScan(path) { scan in
            scan.snapshots.entries.map { entry in
                let start = place
                place += entry.encoded.count
                return 512 - start % 512
            }
        }
    }

    /// Where nothing can be had for that table, the next entry takes in the one that goes, unless that is cut in its
    /// middle.
    @Test(arguments: [true, false]) func aSnapshotGoesWhereItsTableHasNoOtherPlace(isOurs: Bool) throws {
        let all = Self.longTable(extra: isOurs ? 16 : 24)
        let path = try makeLongTable(all, isOurs: isOurs)
        let start = try directory.read("disk.qcow2"), disk = try FullFileSystemTests.contents(path),
            cuts = try cuts(path)
        let copy = directory.file("start.qcow2")
        #expect(run(["cp", "--sparse=always", path, copy]).status == 0)
        // Each kind of place once with power that fails.
        var kinds: Set<Int> = []
        for (number, cut) in cuts.enumerated().dropLast() {
            #expect(run(["cp", "--sparse=always", copy, path]).status == 0)
            let log = CrashLog([path]), name = all[number]
            var engine = try DiskEngine(
                DiskImage(path: path, options: unlocked), depth: 4, segments: 4,
                calls: FullFileSystemTests.full(log.calls, reuses: false))
            guard ![16, 24, 32].contains(cut) else {
                #expect { try engine.deleteSnapshot(name) } throws: {
                    "\($0)".contains("delete the newest snapshot first")
                }
                #expect(try directory.read("disk.qcow2") == start)
                continue
            }
            try engine.deleteSnapshot(name)
            _ = consume engine
            expectSound(path, "\(number)")
            let others = all.filter { $0 != name }
            #expect(try FullFileSystemTests.names(path) == others)
            #expect(try FullFileSystemTests.contents(path, snapshot: all[number + 1]) == disk, "\(number)")
            guard kinds.insert(min(cut, 64)).inserted else { continue }
            #expect(run(["qemu-img", "snapshot", "-l", path]).output.split(separator: "\n").count == all.count + 1)
            try log.replay([start], prefixes: 12, seed: 11) { files, _, comment in
                let comment = "\(cut) \(comment)"
                let path = try directory.write("crashed.qcow2", files[0])
                try expectNoErrors(path, comment)
                let left = try FullFileSystemTests.names(path)
                #expect(left.filter { $0 != name } == others, "\(comment)")
                for other in [others[0], all[number + 1], others[others.count - 1]] {
                    #expect(try FullFileSystemTests.contents(path, snapshot: other) == disk, "\(other) \(comment)")
                }
                guard left.contains(name) else { return }
                do {
                    #expect(try FullFileSystemTests.contents(path, snapshot: name) == disk, "\(comment)")
                } catch { #expect("\(error)".contains("L1 table of 0 entries"), "\(error) \(comment)") }
                var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
                try engine.deleteSnapshot(name)
                #expect(try engine.snapshots().map(\.name) == others, "\(comment)")
                _ = consume engine
                #expect(try DiskImage.check(path: path, options: unlocked).errors == 0, "\(comment)")
            }
        }
        #expect(kinds.isSuperset(of: [8, 40, 48, 56, 64]), "\(cuts)")
    }

    /// An entry does not take in any number of others. Then the newest snapshots go first.
    @Test func theNewestSnapshotGoesWhereAnotherCannot() throws {
        let all = (0..<20).map { "\($0)\(String(repeating: "y", count: 240))" }
        let path = try makeLongTable(all, isOurs: true)
        let calls = FullFileSystemTests.full(.host, reuses: false)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4, segments: 4, calls: calls)
        for name in all[..<3] { try engine.deleteSnapshot(name) }
        let before = try directory.read("disk.qcow2")
        #expect { try engine.deleteSnapshot(all[3]) } throws: { "\($0)".contains("delete the newest snapshot first") }
        #expect(try directory.read("disk.qcow2") == before)
        try engine.deleteSnapshot(all[19])
        #expect(try engine.snapshots().map(\.name) == Array(all[3..<19]))
        _ = consume engine
        expectSound(path)
    }
}

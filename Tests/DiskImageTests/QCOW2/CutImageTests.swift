// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import DiskImage

/// Images whose files end too early: they are checked, repaired to what is left, and salvaged.
@Suite(.timed) struct CutImageTests {
    let directory = TemporaryDirectory(inMemory: true)

    static let layouts = [
        "cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,refcount_bits=64",
    ]
    private static let size = 1 << 20

    /// An image with data before, between and behind three snapshots, and what its disk shows.
    private func makeImage(_ options: String) throws -> (file: [UInt8], disk: [UInt8]) {
        let path = directory.file("whole.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "\(Self.size)")
        var disk = [UInt8](repeating: 0, count: Self.size)
        for (number, name) in ["one", "two", "three", ""].enumerated() {
            let start = number * 150 << 10
            qemuIO(path, ["write -P \(number + 1) \(start) 200k"])
            disk.replaceSubrange(start..<start + 200 << 10, with: repeatElement(UInt8(number + 1), count: 200 << 10))
            if !name.isEmpty { qemuImage("snapshot", "-c", name, path) }
        }
        return (try directory.read("whole.qcow2"), disk)
    }

    /// Converts with what cannot be read as zeroes.
    private func salvage(_ path: String, _ calls: FileCalls = .host) throws -> (disk: [UInt8], lost: [LostRange]) {
        var conversion = ImageConversion(source: path, target: directory.file("salvaged.raw"), format: .raw)
        conversion.sourceOptions.locking = false
        conversion.salvages = true
        conversion.replacing = true
        conversion.cache = .writeback
        conversion.threads = 2
        conversion.calls = calls
        let lost = try conversion.run()
        return (try directory.read("salvaged.raw"), lost)
    }

    /// What was lost is listed and zeroes, and everything else is there.
    private func expect(_ found: (disk: [UInt8], lost: [LostRange]), from disk: [UInt8], _ comment: String) {
        var position = 0
        for range in found.lost + [LostRange(offset: UInt64(disk.count), length: 0, reason: "")] {
            let start = Int(range.offset)
            #expect(start >= position && range.end <= disk.count, "\(range) \(comment)")
            guard start >= position, range.end <= disk.count else { return }
            #expect(found.disk[position..<start] == disk[position..<start], "\(position)..<\(start) \(comment)")
            #expect(found.disk[start..<Int(range.end)].allSatisfy { $0 == 0 }, "\(range) \(comment)")
            position = Int(range.end)
        }
        #expect(found.disk.count == disk.count, "\(comment)")
    }

    /// Cut anywhere.
    @Test(arguments: layouts) func whatIsLeftIsSalvagedAndRepaired(options: String) throws {
        let (file, disk) = try makeImage(options)
        let l1End = Int(file.bigEndian64(at: 40)) + 8
        var generator = SeededGenerator(seed: 14)
        let cuts =
            (0..<10).map { _ in Int.random(in: 512..<file.count, using: &generator) }
            + (0..<4).map { _ in Int.random(in: 1..<max(2, file.count / 4096), using: &generator) * 4096 } + [
                file.count - 1, l1End, l1End + 3,
            ]
        var repairs = 0
        var losses = 0
        for end in cuts {
            let comment = "cut at \(end) of \(file.count), \(options)"
            let path = try directory.write("cut.qcow2", file.prefix(end))
            guard end >= l1End else {
                // Without the table that leads to everything nothing can be read, and nothing is changed.
                #expect(throws: DiskImageError.self, "\(comment)") { try salvage(path) }
                #expect(throws: DiskImageError.self, "\(comment)") {
                    try DiskImage.check(path: path, options: unlocked, repair: .all)
                }
                #expect(try directory.read("cut.qcow2") == Array(file.prefix(end)), "\(comment)")
                continue
            }
            let salvaged = try salvage(path)
            expect(salvaged, from: disk, comment)
            let before = try DiskImage.check(path: path, options: unlocked)
            let report = try DiskImage.check(path: path, options: unlocked, repair: .all)
            #expect(report.isSound, "\(report.findings.prefix(3)) \(comment)")
            expectSound(path, comment)
            // What could be salvaged is there, and can be written.
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4, usesRing: false)
            #expect(try engine.readAll() == salvaged.disk, "\(comment)")
            try engine.write(0, [UInt8](repeating: 9, count: 4096))
            for snapshot in try engine.snapshots() {
                var reader = try DiskEngine(
                    DiskImage(
                        path: path, options: DiskImageOptions(readOnly: true, locking: false, snapshot: snapshot.id)))
                _ = try reader.readAll()
            }
            repairs += before.errors > 0 ? 1 : 0
            losses += salvaged.lost.isEmpty ? 0 : 1
        }
        #expect(repairs > 2 && losses > 2, "\(repairs) \(losses)")
    }

    /// Of the snapshots those stay whose entries are still there.
    @Test func snapshotsBeyondTheEndAreDropped() throws {
        let (whole, disk) = try makeImage("cluster_size=64k")
        var file = whole
        // Their table is moved behind all else.
        let old = Int(file.bigEndian64(at: 64))
        file += [UInt8](repeating: 0, count: (65536 - file.count % 65536) % 65536)
        let table = file.count
        var length = 0
        for _ in 0..<3 {
            let entry = file[(old + length)...]
            let variable =
                Int(entry.bigEndian16(at: 12)) + Int(entry.bigEndian16(at: 14)) + Int(entry.bigEndian32(at: 36))
            length += (40 + variable + 7) & ~7
        }
        file += file[old..<old + length]
        file.store(UInt64(table), at: 64)
        for (end, left) in [(table, 0), (table + 50, 0), (file.count - 8, 2)] {
            let path = try directory.write("cut.qcow2", file.prefix(end))
            let found = try DiskImage.check(path: path, options: unlocked)
            #expect(
                found.errors > 0 && found.findings.contains { $0.description.contains("table of 3 snapshots") },
                "\(found.findings.prefix(3))")
            // Leaks alone are not freed as long as the clusters of the snapshots are unknown.
            _ = try DiskImage.check(path: path, options: unlocked, repair: .leaks)
            #expect(try directory.read("cut.qcow2") == Array(file.prefix(end)))
            #expect("\(openError(path, unlocked).map { "\($0)" } ?? "")".contains("check --repair all"))
            #expect(try DiskImage.check(path: path, options: unlocked, repair: .all).isSound)
            expectSound(path)
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked), usesRing: false)
            #expect(try engine.snapshots().map(\.name) == Array(["one", "two", "three"].prefix(left)))
            #expect(try engine.readAll() == disk)
        }
    }

    /// A snapshot whose table is gone, before others whose tables are not.
    @Test func aSnapshotWithoutItsTableIsDropped() throws {
        let (whole, disk) = try makeImage("cluster_size=4k")
        var file = whole
        let table = Int(file.bigEndian64(at: 64))
        let place = (file.count + 8191) & ~4095
        file.store(UInt64(place), at: table)
        // It was there, by its count.
        file[Int(file.bigEndian64(at: Int(file.bigEndian64(at: 48)))) + place / 4096 * 2 + 1] = 1
        let path = try directory.write("cut.qcow2", file)
        #expect(try DiskImage.check(path: path, options: unlocked).errors > 0)
        #expect(try DiskImage.check(path: path, options: unlocked, repair: .all).isSound)
        expectSound(path)
        var engine = try DiskEngine(DiskImage(path: path, options: unlocked), usesRing: false)
        #expect(try engine.snapshots().map(\.name) == ["two", "three"])
        #expect(try engine.readAll() == disk)
    }

    /// Power that fails during such a repair: it is made again.
    @Test(arguments: layouts) func theRepairOfACutImageCanBeInterrupted(options: String) throws {
        let (file, _) = try makeImage(options)
        let l1End = Int(file.bigEndian64(at: 40)) + 8
        for end in [file.count - 8, file.count * 3 / 4 - 5, file.count / 2 + 13] where end > l1End {
            let path = try directory.write("cut.qcow2", file.prefix(end))
            let disk = try salvage(path).disk
            let log = CrashLog([path])
            do {
                let image = try ImageFile(path: path, writable: true, cache: .writeback, locking: false)
                #expect(try DiskImage.check(image, .all, calls: log.calls).isSound)
            }
            try log.replay([Array(file.prefix(end))], prefixes: 12, seed: 9) { files, _, comment in
                let crashed = try directory.write("crashed.qcow2", files[0])
                #expect(try DiskImage.check(path: crashed, options: unlocked, repair: .all).isSound, "\(comment)")
                var engine = try DiskEngine(DiskImage(path: crashed, options: readOnly), depth: 4, usesRing: false)
                #expect(try engine.readAll() == disk, "\(comment)")
            }
        }
    }

    /// Bitmaps beyond the end go, and the image is sound again.
    @Test func bitmapsBeyondTheEndAreDropped() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "8M")
        qemuIO(path, ["write -P 1 0 1M"])
        qemuImage("bitmap", "--add", "-g", "512", path, "b0")
        qemuIO(path, ["write -P 2 0 64k"])
        let file = try directory.read("disk.qcow2")
        let place = try #require(
            { () -> QCOW2Header.BitmapDirectory? in
                try QCOW2Header(ImageFile(path: path, writable: false, cache: .writeback, locking: false)).bitmaps
            }())
        try directory.write("disk.qcow2", file.prefix(Int(place.offset)))
        #expect(try DiskImage.check(path: path, options: unlocked).errors > 0)
        #expect(try DiskImage.check(path: path, options: unlocked, repair: .all).isSound)
        expectSound(path)
        #expect(try ImageInformation(path: path).qcow2?.bitmaps == [])
    }

    /// Reads that the host fails cost what is in the pages that it cannot read, and nothing else.
    @Test(arguments: ["raw", "qcow2"]) func whatTheHostCannotReadIsListed(format: String) throws {
        let disk = randomBytes(4 << 20, seed: 3)
        try directory.write("base.raw", disk)
        let path = format == "raw" ? directory.file("base.raw") : directory.file("disk.qcow2")
        if format == "qcow2" { qemuImage("convert", "-O", "qcow2", directory.file("base.raw"), path) }
        // In the file of the qcow2 image the disk's bytes lie somewhere else, but one after the other.
        let file = try readFile(path, limit: 1 << 30)
        let shift =
            try #require((0..<file.count / 4096).first { file[$0 * 4096..<$0 * 4096 + 4096] == disk[..<4096] }) * 4096
        let bad = [5000, 5 * 4096, 1 << 20, 3 << 20 - 1].map { $0 + shift }
        var calls = FileCalls.host
        unsafe calls.read = { number, vectors, count, offset in
            let length = (0..<Int(count)).reduce(0) { unsafe $0 + vectors[$1].iov_len }
            if bad.contains(where: { Int(offset) <= $0 && $0 < Int(offset) + length }) { return -Int(EIO) }
            return unsafe FileCalls.host.read(number, vectors, count, offset)
        }
        let (found, lost) = try salvage(path, calls)
        expect((found, lost), from: disk, format)
        let pages: [UInt64] = [4096, 5 * 4096, 1 << 20, 3 << 20 - 4096]
        #expect(
            lost.map(\.offset) == [4096, 5 * 4096, 1 << 20, 3 << 20 - 4096] && lost.allSatisfy { $0.length == 4096 },
            "\(lost) \(pages)")
        #expect(lost.allSatisfy { $0.reason.contains("Input/output error") })
        // Without it that is the end.
        var conversion = ImageConversion(source: path, target: directory.file("other.raw"), format: .raw)
        conversion.sourceOptions.locking = false
        conversion.cache = .writeback
        conversion.calls = calls
        #expect(throws: DiskImageError.self) { try conversion.run() }
    }

    /// A compressed cluster that does not decompress costs that cluster.
    @Test func aBrokenCompressedClusterIsListed() throws {
        let disk = [UInt8]((0..<32).flatMap { [UInt8](repeating: UInt8($0 + 1), count: 32768) })
        try directory.write("base.raw", disk)
        let path = directory.file("disk.qcow2")
        qemuImage("convert", "-c", "-O", "qcow2", directory.file("base.raw"), path)
        var file = try directory.read("disk.qcow2")
        let table = Int(file.bigEndian64(at: Int(file.bigEndian64(at: 40))) & QCOW2Image.L1Entry.offset)
        let place = Int(file.bigEndian64(at: table + 3 * 8) & ((1 << 54) - 1))
        for index in place..<place + 16 { file[index] = 0xff }
        try directory.write("disk.qcow2", file)
        let found = try salvage(path)
        expect(found, from: disk, "")
        #expect(
            found.lost.map(\.offset) == [3 * 65536] && found.lost.map(\.length) == [65536]
                && found.lost[0].reason.contains("does not decompress"))
    }
}

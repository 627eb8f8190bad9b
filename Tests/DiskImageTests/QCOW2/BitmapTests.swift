// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import DiskImage

/// The persistent bitmaps of qcow2 images: shown while they are true, and gone, with their space, when they no longer
/// are.
@Suite(.timed) struct BitmapTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// An image with a snapshot, a backing file and two bitmaps.
    private func makeImage(_ name: String = "disk.qcow2") throws -> String {
        let path = directory.file(name)
        try directory.write("base.raw", randomBytes(1 << 20, seed: 1))
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", directory.file("base.raw"), "-F", "raw", path)
        qemuIO(path, ["write -P 1 0 64k"])
        qemuImage("snapshot", "-c", "one", path)
        qemuImage("bitmap", "--add", "-g", "512", path, "b0")
        qemuImage("bitmap", "--add", "--disable", "-g", "64k", path, "b1")
        // Bits in it take clusters.
        qemuIO(path, ["write -P 2 100k 300k"])
        return path
    }

    /// qemu-img finds the image sound, with nothing lost and nothing to warn of.
    private func expectClean(_ path: String, sourceLocation: SourceLocation = #_sourceLocation) {
        expectSound(path, sourceLocation: sourceLocation)
        let (status, output) = run(["qemu-img", "check", path])
        #expect(
            status == 0 && !output.contains("warning") && !output.contains("bitmaps"), "\(output)",
            sourceLocation: sourceLocation)
    }

    @Test func bitmapsAreShown() throws {
        let path = try makeImage()
        #expect(
            try ImageInformation(path: path).qcow2?.bitmaps == [
                DiskBitmap(name: "b0", granularity: 512, isInUse: false, isAutomatic: true),
                DiskBitmap(name: "b1", granularity: 65536, isInUse: false, isAutomatic: false),
            ])
    }

    enum Change: String, CaseIterable, CustomTestStringConvertible {
        case write, discard, zero, grow, growByL1, shrink, apply, commit, rebase
        var testDescription: String { rawValue }
    }

    /// A change of the disk reports, once, that its bitmaps are untrue, and frees their clusters.
    @Test(arguments: Change.allCases) func untrueBitmapsAreReportedAndFreed(change: Change) throws {
        let path = try makeImage()
        let said = Guarded<[String]>([])
        var options = unlocked
        options.report = { text in said.withLock { $0.append(text) } }
        switch change {
        case .commit:
            // The backing file of another.
            let overlay = directory.file("overlay.qcow2")
            qemuImage("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", overlay)
            qemuIO(overlay, ["write -P 5 0 8k"])
            var commit = ImageCommit(path: overlay)
            commit.options.report = options.report
            try commit.run()
        case .rebase:
            qemuImage("snapshot", "-d", "one", path)
            var rebase = ImageRebase(path: path)
            rebase.options.report = options.report
            try rebase.run()
        default:
            var engine = try DiskEngine(DiskImage(path: path, options: options))
            #expect(said.withLock { $0 } == [])
            switch change {
            case .write: for place in [0, 8192] { try engine.write(UInt64(place), [UInt8](repeating: 7, count: 4096)) }
            case .discard: try engine.perform(.discard, at: 0, length: 8192)
            case .zero: try engine.perform(.writeZeroes, at: 0, length: 8192)
            case .grow: try engine.resize(to: 2 << 20)
            case .growByL1: try engine.resize(to: 1 << 30)
            case .shrink: try engine.resize(to: 512 << 10, shrinks: true)
            default: try engine.applySnapshot("one")
            }
        }
        let lines = said.withLock { $0 }
        #expect(
            lines.count == 1
                && lines.allSatisfy { $0.contains(path) && $0.contains("\"b0\", \"b1\"") && $0.contains("full") },
            "\(lines)")
        expectClean(path)
        #expect(try ImageInformation(path: path).qcow2?.bitmaps == [])
    }

    /// What leaves the disk as it is leaves its bitmaps true.
    @Test func bitmapsOfADiskThatStaysAreKept() throws {
        let path = try makeImage()
        let before = try ImageInformation(path: path).qcow2?.bitmaps
        let said = Guarded<[String]>([])
        var options = unlocked
        options.report = { text in said.withLock { $0.append(text) } }
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: options))
            try engine.createSnapshot(named: "two")
            try engine.deleteSnapshot("one")
            try engine.perform(.flush)
        }
        #expect(try DiskImage.check(path: path, repair: .all).isSound)
        #expect(said.withLock { $0 } == [])
        #expect(try ImageInformation(path: path).qcow2?.bitmaps == before)
        expectClean(path)
        #expect(run(["qemu-img", "info", path]).output.contains("name: b0"))
    }

    /// Whenever the power fails while bitmaps go, clusters are lost at worst.
    @Test(arguments: [Change.write, .shrink, .apply]) func bitmapsGoInAnOrderThatNoCrashDamages(change: Change) throws {
        let path = try makeImage()
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        do {
            var engine = try DiskEngine(
                DiskImage(path: path, options: unlocked), depth: 4, segments: 4, calls: log.calls)
            switch change {
            case .write:
                try engine.write(0, [UInt8](repeating: 7, count: 4096))
                try engine.perform(.flush)
                // What bitmaps took is the guest's now.
                try engine.write(512 << 10, [UInt8](repeating: 8, count: 256 << 10))
            case .shrink: try engine.resize(to: 512 << 10, shrinks: true)
            default: try engine.applySnapshot("one")
            }
        }
        try log.replay([start], prefixes: .max, seed: 7) { files, _, comment in
            try expectNoErrors(try directory.write("crashed.qcow2", files[0]), comment)
        }
    }

    /// Bitmaps whose tables overlap, or over the disk's clusters, are discarded and nothing is freed for
    /// them.
    @Test func impossibleBitmapsFreeNothing() throws {
        let path = try makeImage()
        var file = try directory.read("disk.qcow2")
        let place = try #require(
            { () -> QCOW2Header.BitmapDirectory? in
                try QCOW2Header(ImageFile(path: path, writable: false, cache: .writeback, locking: false)).bitmaps
            }())
        // The second bitmap has the first one's table, and so often that it does not fit.
        let second = Int(place.offset) + 32
        file.store(UInt32(1 << 20), at: second + 8)
        try directory.write("disk.qcow2", file)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            try engine.write(0, [UInt8](repeating: 7, count: 4096))
        }
        let report = try DiskImage.check(path: path)
        #expect(report.errors == 0 && report.leaks > 0)
        #expect(try DiskImage.check(path: path, repair: .leaks).isSound)
        expectClean(path)
    }
}

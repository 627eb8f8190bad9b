// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// What our check finds, beside what qemu-img finds; and what our repair leaves, judged by qemu-img.
@Suite(.timed) struct CheckTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// A number of the JSON that qemu-img check prints; 0 for one that is left out.
    private func number(_ key: String, _ output: String) -> Int {
        guard let line = output.split(separator: "\n").first(where: { $0.contains("\"\(key)\"") }) else { return 0 }
        return Int(line.filter(\.isNumber)) ?? -1
    }

    /// Compares our report with qemu-img's.
    private func compare(
        _ path: String, _ comment: String = "", sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> CheckReport {
        let (status, output) = run(["qemu-img", "check", "-U", "-f", "qcow2", "--output=json", path])
        let report = try DiskImage.check(path: path, options: unlocked)
        let errors = number("corruptions", output) + number("check-errors", output)
        #expect(
            (report.errors > 0) == (errors > 0),
            "errors \(report.errors) \(report.findings.prefix(5)), qemu-img \(status) \(output) \(comment)",
            sourceLocation: sourceLocation)
        if errors == 0 {
            #expect(report.leaks == number("leaks", output), "\(comment)", sourceLocation: sourceLocation)
            let ours = [
                report.totalClusters, report.allocatedClusters, report.compressedClusters, report.fragmentedClusters,
                report.imageEnd,
            ].map(Int.init)
            let theirs = [
                "total-clusters", "allocated-clusters", "compressed-clusters", "fragmented-clusters",
                "image-end-offset",
            ].map { number($0, output) }
            #expect(ours == theirs, "\(comment)", sourceLocation: sourceLocation)
        }
        return report
    }

    static let images =
        QCOW2WritingTests.kinds.filter { $0.options.contains("512") } + [
            QCOW2WritingTests.Kind(options: "cluster_size=64k"),
            QCOW2WritingTests.Kind(options: "cluster_size=16k,extended_l2=on", start: .compressed),
            QCOW2WritingTests.Kind(options: "cluster_size=4k,compression_type=zstd", start: .compressed),
        ]

    @Test(arguments: images) func agreesWithQEMU(kind: QCOW2WritingTests.Kind) throws {
        let tests = QCOW2WritingTests(directory: directory)
        _ = try tests.make(kind, seed: 3)
        let path = directory.file("disk.qcow2")
        #expect(try compare(path).isSound)
        // In pieces, with snapshots and bitmaps.
        qemuIO(path, (0..<20).map { "write -P 5 \($0 * 30 << 10) 4k" } + ["write -z 64k 64k", "discard 300k 100k"])
        if kind.start == .snapshot, !kind.options.hasSuffix("refcount_bits=8") {
            qemuImage("snapshot", "-c", "one", path)
            qemuIO(path, ["write -P 6 100k 200k"])
            qemuImage("snapshot", "-c", "two", path)
            qemuIO(path, ["write -P 7 0k 50k"])
        }
        if !kind.options.contains("0.10") {
            qemuImage("bitmap", "--add", path, "b0")
            qemuImage("bitmap", "--add", "-g", "512", path, "b1")
            qemuIO(path, ["write -P 8 200k 50k"])
        }
        #expect(try compare(path).isSound)
    }

    /// Clusters that are counted where the file has not come to yet: QEMU finds them when it has, and a repair is for
    /// the time before as well.
    @Test(arguments: [CheckReport.Repair.leaks, .all]) func countsBeyondTheEnd(repair: CheckReport.Repair) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        var bytes = try directory.read("disk.qcow2")
        let block = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 48)))), clusters = (bytes.count + 65535) / 65536
        for cluster in [clusters, clusters + 1, clusters + 7] { bytes[block + 2 * cluster + 1] = 1 }
        try directory.write("disk.qcow2", bytes)
        let report = try DiskImage.check(path: path, options: unlocked)
        #expect(report.errors == 0 && report.leaks == 3, "\(report)")
        // It is no matter of taste: once the file is longer they are lost to QEMU, too.
        let copy = directory.file("grown.qcow2")
        try directory.write("grown.qcow2", bytes + [UInt8](repeating: 0, count: 1 << 20))
        #expect(run(["qemu-img", "check", "-q", copy]).status == 3)
        #expect(try DiskImage.check(path: path, options: unlocked, repair: repair).leaksFixed == 3)
        #expect(try compare(path).isSound)
        qemuIO(path, ["write -P 5 0 1M"])
        #expect(try compare(path).isSound)
    }

    /// Bitmaps that cannot be right are errors, whatever numbers they have, and nothing is read that the file has no
    /// room for.
    @Test func bitmapsMayBeAnything() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuImage("bitmap", "--add", path, "b0")
        #expect(try compare(path).isSound)
        // With all of its last cluster.
        let file = try directory.read("disk.qcow2"),
            good = file + [UInt8](repeating: 0, count: (65536 - file.count % 65536) % 65536)
        let pointer = try #require((0..<65000).first { good.bigEndian32(at: $0) == 0x2385_2875 }) + 8
        let entry = Int(good.bigEndian64(at: pointer + 16)), end = UInt64(good.count + 65536)
        for (name, change, says) in [
            (
                "nothing, beyond the end",
                {
                    $0.store(0 as UInt64, at: pointer + 8); $0.store(end, at: pointer + 16)
                }, "a directory of 1 bitmaps"
            ),
            (
                "nothing, at the end of numbers",
                {
                    $0.store(0 as UInt64, at: pointer + 8); $0.store(UInt64.max & ~65535, at: pointer + 16)
                }, "a directory of 1 bitmaps"
            ),
            ("all numbers", { $0.store(UInt64.max, at: pointer + 8) }, "a directory of 1 bitmaps"),
            ("many", { $0.store(65536 as UInt32, at: pointer) }, "a directory of 65536 bitmaps"),
            ("more than there are", { $0.store(2 as UInt32, at: pointer) }, "ends before the last"),
            ("not aligned", { $0.store(UInt64(entry + 8), at: pointer + 16) }, "a directory of 1 bitmaps"),
            ("a long table", { $0.store(UInt32.max, at: entry + 8) }, "a bitmap's table of 4294967295"),
            ("a table elsewhere", { $0.store(end, at: entry) }, "a bitmap's table of"),
            (
                "an empty table elsewhere",
                {
                    $0.store(UInt64.max & ~65535, at: entry); $0.store(0 as UInt32, at: entry + 8)
                }, "a bitmap's table of 0"
            ),
            (
                "the same table again and again",
                { bytes in
                    bytes.store(8192 as UInt32, at: entry + 8)
                    bytes.store(10 as UInt32, at: pointer)
                    bytes.store(320 as UInt64, at: pointer + 8)
                    for copy in 1..<10 {
                        bytes.replaceSubrange(
                            entry + 32 * copy..<entry + 32 * (copy + 1), with: Array(bytes[entry..<entry + 32]))
                    }
                }, "overlap"
            ),
        ] as [(String, (inout [UInt8]) -> Void, String)] {
            var bytes = good
            change(&bytes)
            try directory.write("disk.qcow2", bytes)
            let report = try DiskImage.check(path: path, options: unlocked)
            #expect(
                report.errors > 0 && report.findings.contains { $0.description.contains(says) },
                "\(name): \(report.findings.prefix(3))")
        }
    }

    /// Clusters counted too often, too seldom and not at all, flags that lie, and entries that cannot be right:
    /// repaired, qemu-img finds nothing, and what was not lost is there.
    @Test(arguments: [
        "cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=4k,refcount_bits=64",
        "cluster_size=16k,extended_l2=on,refcount_bits=2",
    ])
    func repairsWhatWasDamaged(options: String) throws {
        let seed = options.utf8.reduce(UInt64(environment("SWKVM_SEED") ?? 7)) { $0 &* 31 &+ UInt64($1) }
        var generator = SeededGenerator(seed: seed)
        let tests = QCOW2WritingTests(directory: directory)
        let kind = QCOW2WritingTests.Kind(
            options: options, start: options.contains("=2") && !options.contains("0.10") ? .empty : .snapshot)
        var contents = try tests.make(kind, seed: seed)
        if kind.start == .empty {
            qemuIO(directory.file("disk.qcow2"), ["write -P 7 100k 500k"])
            contents.replaceSubrange(100 << 10..<600 << 10, with: repeatElement(7, count: 500 << 10))
        }
        let good = try directory.read("disk.qcow2")
        let path = directory.file("disk.qcow2")
        let clusterSize = 1 << Int(good.bigEndian32(at: 20))
        var repaired = 0
        for round in 0..<(environment("SWKVM_ROUNDS") ?? 16) {
            var bytes = good
            let isHarmless = round % 2 == 0
            let refcounts = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 48))))
            let l1 = Int(bytes.bigEndian64(at: 40))
            let l2 = Int(bytes.bigEndian64(at: l1) & 0x00ff_ffff_ffff_fe00)
            for _ in 0..<Int.random(in: 1...4, using: &generator) {
                switch Int.random(in: 0..<(isHarmless ? 3 : 5), using: &generator) {
                case 0:
                    // A bit of the count of a cluster of the file.
                    let bit = Int.random(
                        in: 0..<min(clusterSize * 8, good.count / clusterSize << Int(good.bigEndian32(at: 96) % 7)),
                        using: &generator)
                    bytes[refcounts + bit / 8] ^= 1 << UInt8(bit % 8)
                case 1: bytes[l1] ^= 0x80
                case 2:
                    let entry = l2 + Int.random(in: 0..<20, using: &generator) * (options.contains("extended") ? 16 : 8)
                    if bytes.bigEndian64(at: entry) & (1 << 62) == 0,
                        bytes.bigEndian64(at: entry) & 0x00ff_ffff_ffff_fe00 != 0
                    {
                        bytes[entry] ^= 0x80
                    }
                case 3:
                    bytes.store(
                        generator.next() & 0x80ff_ffff_ffff_fe00, at: l2 + Int.random(in: 0..<20, using: &generator) * 8
                    )
                default: bytes.store(UInt64(bytes.count + 5 * clusterSize), at: l1)
                }
            }
            try directory.write("disk.qcow2", bytes)
            let comment = "round \(round), seed \(seed)"
            let before = try compare(path, comment)
            if before.errors == 0, before.leaks > 0 {
                let leaks = try DiskImage.check(path: path, options: unlocked, repair: .leaks)
                #expect(leaks.isSound && leaks.leaksFixed == before.leaks, "\(comment)")
                expectSound(path, comment)
                #expect(try tests.contents(path) == contents, "\(comment)")
                try directory.write("disk.qcow2", bytes)
            }
            guard let after = try repairAll(path) else { continue }
            #expect(after.errors == 0 && after.leaks == 0 && after.errorsFixed == before.errors, "\(after) \(comment)")
            expectSound(path, comment)
            if isHarmless { #expect(try tests.contents(path) == contents, "\(comment)") }
            #expect(try compare(path, comment).isSound)
            repaired += 1
        }
        #expect(repaired > 5)
    }

    /// Giving leaks back leaves an image that has errors as well with these, and with its contents: a cluster that is
    /// in use and counted too seldom, or at the end of the file, or taken for reference counts too, is not freed.
    @Test(arguments: ["uncounted", "uncounted at the end", "two uses"])
    func leaksAreGivenBackWithoutHarmToWhatIsDamaged(damage: String) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
        qemuIO(path, ["write -P 9 0 400k"])
        var bytes = try directory.read("disk.qcow2")
        let counts = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 48))))
        let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00)
        func cluster(_ index: Int) -> Int { Int(bytes.bigEndian64(at: l2 + index * 8) & 0x00ff_ffff_ffff_fe00) / 4096 }
        // The last cluster's entry goes: a leak. The one of cluster 50 stays.
        bytes.store(0 as UInt64, at: l2 + 99 * 8)
        switch damage {
        case "uncounted": bytes.store(0 as UInt64, at: counts + cluster(50) * 2 / 8 * 8)
        case "uncounted at the end": bytes.store(0 as UInt64, at: counts + cluster(98) * 2 / 8 * 8)
        default: bytes.store(UInt64(counts) | 1 << 63, at: l2 + 50 * 8)
        }
        try directory.write("disk.qcow2", bytes)
        let before = try compare(path)
        #expect(before.errors > 0 && before.leaks > 0)
        qemuImage("convert", "-f", "qcow2", "-O", "raw", path, directory.file("before.raw"))
        let after = try DiskImage.check(path: path, options: unlocked, repair: .leaks)
        // The counts are new and elsewhere, so that the guest has the cluster alone.
        #expect(after.leaks == 0 && (after.errors == 0) == (damage == "two uses"))
        qemuImage("convert", "-f", "qcow2", "-O", "raw", path, directory.file("after.raw"))
        #expect(try directory.read("after.raw") == directory.read("before.raw"))
        _ = try repairAll(path)
        expectSound(path)
        qemuImage("convert", "-f", "qcow2", "-O", "raw", path, directory.file("after.raw"))
        #expect(try directory.read("after.raw") == directory.read("before.raw"))
    }

    /// Where a snapshot's table is not to be found, what may be the snapshot's is not freed: who knows where it is
    /// can still have it.
    @Test(arguments: [512 as UInt64, 1 << 40]) func whatALostSnapshotUsesStays(shift: UInt64) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuIO(path, ["write -P 9 0 512k"])
        qemuImage("snapshot", "-c", "one", path)
        qemuIO(path, ["write -P 7 0 1M"])
        var bytes = try directory.read("disk.qcow2")
        let table = Int(bytes.bigEndian64(at: 64)), place = bytes.bigEndian64(at: table)
        bytes.store(place + shift, at: table)
        // And a count that is too low.
        let counts = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 48))))
        bytes.store(
            UInt32(0),
            at: counts + Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00) >> 16 * 2
                / 4 * 4)
        try directory.write("disk.qcow2", bytes)
        for repair in [.leaks, .all] as [CheckReport.Repair] {
            let report = try DiskImage.check(path: path, options: unlocked, repair: repair)
            #expect(report.errors > 0 && report.leaks > 0 && (report.errorsFixed > 0) == (repair == .all), "\(report)")
        }
        bytes = try directory.read("disk.qcow2")
        bytes.store(place, at: table)
        try directory.write("disk.qcow2", bytes)
        _ = try repairAll(path)
        expectSound(path)
        let options = DiskImageOptions(readOnly: true, snapshot: "one")
        var snapshot = try DiskEngine(DiskImage(path: path, options: options))
        #expect(
            try snapshot.readAll() == [UInt8](repeating: 9, count: 512 << 10) + [UInt8](repeating: 0, count: 512 << 10))
        var disk = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try disk.readAll() == [UInt8](repeating: 7, count: 1 << 20))
    }

    /// nil for an image whose counts have too few bits for what its tables refer to.
    private func repairAll(_ path: String) throws -> CheckReport? {
        do throws(DiskImageError) { return try DiskImage.check(path: path, options: unlocked, repair: .all) } catch {
            if case .countsTooNarrow = error { return nil }
            throw error
        }
    }

    /// The dirty bit: who opens the image for writing repairs it. QEMU, killed, leaves such an image.
    @Test func anImageThatNobodyClosedIsRepairedWhenItIsWritten() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", path, "1M")
        let killed = run([
            "qemu-io", "-f", "qcow2", "-c", "write -P 9 100k 300k", "-c", "flush", "-c", "sigraise 9", path,
        ])
        #expect(killed.status == -1)
        #expect(run(["qemu-img", "check", "-f", "qcow2", path]).status == 2)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
            #expect(try engine.read(100 << 10, 4096) == [UInt8](repeating: 9, count: 4096))
        }
        // A reader leaves it as it is.
        #expect(run(["qemu-img", "check", "-f", "qcow2", path]).status == 2)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            let repair = engine.image.repair
            #expect(repair?.errors == 0)
            #expect((repair?.errorsFixed ?? 0) >= 75)
            try engine.write(0, [UInt8](repeating: 1, count: 4096))
            #expect(try engine.read(100 << 10, 300 << 10) == [UInt8](repeating: 9, count: 300 << 10))
        }
        expectSound(path)
        #expect(try directory.read("disk.qcow2")[79] == 0)
    }

    /// Entries that cannot be right keep such an image from being written: nothing is thrown away unasked.
    @Test func aDirtyImageThatIsDamagedAsWellIsNotWritten() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        qemuIO(path, ["write 0 64k"])
        var bytes = try directory.read("disk.qcow2")
        bytes[79] = 1
        bytes.store(
            1 << 40 as UInt64, at: Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00))
        try directory.write("disk.qcow2", bytes)
        let error = try #require(openError(path))
        #expect("\(error)".contains("swkvm image check --repair all"))
        #expect(try directory.read("disk.qcow2") == bytes)
        let report = try DiskImage.check(path: path, options: unlocked, repair: .all)
        #expect(report.errorsFixed > 0 && report.errors == 0)
        expectSound(path)
        _ = try DiskImage(path: path, options: unlocked)
    }

    @Test func aRawImageCannotBeChecked() throws {
        let path = try directory.write("disk.raw", [UInt8](repeating: 0, count: 512))
        #expect(throws: DiskImageError.notCheckable(path: path)) { try DiskImage.check(path: path) }
    }
}

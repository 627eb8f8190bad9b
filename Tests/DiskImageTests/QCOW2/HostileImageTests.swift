// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Images that were made to harm the program that opens them. None may do more than fail.
@Suite(.timed) struct HostileImageTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// A small image with data, compressed and zero clusters.
    private func image(_ options: String = "cluster_size=4096") throws -> [UInt8] {
        let contents = QCOW2ImageTests.sparse(300 << 10, seed: 42)
        let raw = try directory.write("in.raw", contents)
        qemuImage("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, directory.file("made.qcow2"))
        qemuIO(directory.file("made.qcow2"), ["write -P 3 20k 30k", "write -z 100k 20k"])
        return try directory.read("made.qcow2")
    }

    /// Opens the bytes as an image and reads all of it in requests of `chunk` bytes. Returns how it failed to open, and
    /// how many requests failed with an I/O error; whatever else goes wrong is recorded.
    private func use(
        _ bytes: [UInt8], chunk: Int = 16384, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> (opening: DiskImageError?, failures: Int) {
        let path = try directory.write("hostile.qcow2", bytes)
        let image: DiskImage
        do throws(DiskImageError) {
            image = try DiskImage(path: path, options: DiskImageOptions(readOnly: true, allowsBacking: false))
        } catch {
            // The sentence is made, too.
            #expect("\(error)".hasPrefix("disk \""), sourceLocation: sourceLocation)
            return (error, 0)
        }
        var failures = 0
        var engine = try DiskEngine(image, depth: 4)
        // A disk may be said to be huge: look at its start and its end.
        let size = engine.image.size
        let windows = size > 4 << 20 ? [0..<UInt64(1 << 20), size - 1 << 20..<size] : [0..<size]
        for window in windows {
            for offset in stride(from: window.lowerBound, to: window.upperBound, by: chunk) {
                do throws(DiskImageError) {
                    var memory = [UInt8](repeating: 0, count: Int(min(UInt64(chunk), window.upperBound - offset)))
                    var failure: DiskImageError?
                    unsafe memory.withUnsafeMutableBytes { memory in
                        do throws(DiskImageError) { try unsafe engine.perform(.read, at: offset, memory: memory) } catch
                        { failure = error }
                    }
                    if let failure { throw failure }
                } catch {
                    #expect(
                        error == .request(path: path, SystemCallError("read", errno: EIO)),
                        sourceLocation: sourceLocation)
                    failures += 1
                }
            }
        }
        if let damage = engine.image.damage { #expect("\(damage)".contains("damaged"), sourceLocation: sourceLocation) }
        return (nil, failures)
    }

    private func put(_ value: UInt64, _ size: Int, at offset: Int, in bytes: inout [UInt8]) {
        for index in 0..<size {
            bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * (size - 1 - index)))
        }
    }

    @Test func theUnchangedImageIsFine() throws {
        let (opening, failures) = try use(image())
        #expect(opening == nil && failures == 0)
    }

    struct Field: CustomTestStringConvertible {
        let name: String, offset: Int, size: Int, value: UInt64
        /// What the refusal says.
        let says: String
        var testDescription: String { "\(name) = \(value)" }
    }

    @Test(arguments: [
        Field(name: "version", offset: 4, size: 4, value: 1, says: "qcow (version 1)"),
        Field(name: "version", offset: 4, size: 4, value: 4, says: "qcow2 version 4"),
        Field(name: "backing_file_size", offset: 8, size: 12, value: 0x0000_0100 << 32 | 1024, says: "1024 bytes"),
        Field(name: "backing_file_offset", offset: 8, size: 8, value: 5000, says: "outside of the header"),
        Field(name: "backing_file_offset", offset: 8, size: 8, value: .max, says: "outside of the header"),
        Field(name: "backing_file_offset", offset: 8, size: 8, value: 8, says: "outside of the header"),
        Field(name: "cluster_bits", offset: 20, size: 4, value: 8, says: "2^8"),
        Field(name: "cluster_bits", offset: 20, size: 4, value: 22, says: "2^22"),
        Field(name: "cluster_bits", offset: 20, size: 4, value: 0xffff_ffff, says: "2^4294967295"),
        Field(name: "size", offset: 24, size: 8, value: .max, says: "a disk of"),
        Field(name: "size", offset: 24, size: 8, value: 1 << 62, says: "L1 table"),
        Field(name: "size", offset: 24, size: 8, value: 1 << 40, says: "L1 table"),
        Field(name: "crypt_method", offset: 32, size: 4, value: 1, says: "AES"),
        Field(name: "crypt_method", offset: 32, size: 4, value: 2, says: "LUKS"),
        Field(name: "crypt_method", offset: 32, size: 4, value: 3, says: "encryption method 3"),
        Field(name: "l1_size", offset: 36, size: 4, value: 0, says: "L1 table of 0"),
        Field(name: "l1_size", offset: 36, size: 4, value: 0xffff_ffff, says: "L1 table of 4294967295"),
        Field(name: "l1_table_offset", offset: 40, size: 8, value: 4097, says: "not cluster-aligned"),
        Field(name: "l1_table_offset", offset: 40, size: 8, value: 1 << 40, says: "truncated"),
        Field(name: "l1_table_offset", offset: 40, size: 8, value: UInt64.max - 4095, says: "truncated"),
        Field(name: "refcount_table_offset", offset: 48, size: 8, value: 1, says: "not cluster-aligned"),
        Field(name: "refcount_table_offset", offset: 48, size: 8, value: UInt64.max - 4095, says: "truncated"),
        Field(name: "refcount_table_clusters", offset: 56, size: 4, value: 0xffff_ffff, says: "refcount table of"),
        Field(name: "refcount_table_clusters", offset: 56, size: 4, value: 2000, says: "truncated"),
        Field(name: "incompatible_features", offset: 72, size: 8, value: 1 << 2, says: "data-file=PATH"),
        Field(name: "incompatible_features", offset: 72, size: 8, value: 1 << 3, says: "the type is zlib"),
        Field(
            name: "incompatible_features", offset: 72, size: 8, value: 1 << 4, says: "subclusters in clusters of 4096"),
        Field(
            name: "incompatible_features", offset: 72, size: 8, value: 1 << 63, says: "unnamed incompatible feature 63"),
        Field(name: "refcount_order", offset: 96, size: 4, value: 7, says: "2^7 bits"),
        Field(name: "header_length", offset: 100, size: 4, value: 103, says: "header of 103"),
        Field(name: "header_length", offset: 100, size: 4, value: 4097, says: "header of 4097"),
        Field(
            name: "the first extension", offset: 112, size: 8, value: 0x1234_5678_ffff_ffff,
            says: "header extension of 4294967295"),
    ]) func aWrongHeaderFieldIsRefusedByName(field: Field) throws {
        var bytes = try image()
        // A field of 12 bytes: an offset of 8 and a length of 4.
        if field.size == 12 {
            put(field.value >> 32, 8, at: field.offset, in: &bytes)
            put(field.value & 0xffff_ffff, 4, at: field.offset + 8, in: &bytes)
        } else {
            put(field.value, field.size, at: field.offset, in: &bytes)
        }
        let opening = try #require(try use(bytes).opening)
        #expect("\(opening)".contains(field.says), "\(opening)")
    }

    @Test func anUnknownFeatureIsRefusedByItsName() throws {
        var bytes = try image()
        bytes[72] = 0x40
        // Behind the header of 112 bytes: a table of one feature name, of bit 62.
        let name = "time\u{1b}travel"
        put(0x6803_f857_0000_0030, 8, at: 112, in: &bytes)
        bytes.replaceSubrange(
            120..<168, with: [0, 62] + Array(name.utf8) + [UInt8](repeating: 0, count: 46 - name.utf8.count))
        put(0, 8, at: 168, in: &bytes)
        let opening = try #require(try use(bytes).opening)
        #expect("\(opening)".contains("the feature \"time?travel\" (incompatible bit 62)"), "\(opening)")
    }

    @Test func anExternalDataFileIsOnlyFollowedWhenItIsAllowed() throws {
        let path = directory.file("external.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(directory.file("data.raw"))", path, "1M")
        #expect(openError(path, readOnly) == .dataFileNotAllowed(path: path, name: directory.file("data.raw")))
    }

    /// Each wrong entry fails the requests that meet it, names itself, and leaves the rest of the disk readable.
    @Test func damagedEntriesFailWhatNeedsThem() throws {
        let good = try image()
        let l1 = Int(good.bigEndian64(at: 40))
        let l2 = Int(good.bigEndian64(at: l1) & 0x00ff_ffff_ffff_fe00)
        func expect(
            _ says: String, all: Bool, _ change: (inout [UInt8]) -> Void,
            sourceLocation: SourceLocation = #_sourceLocation
        ) throws {
            var bytes = good
            change(&bytes)
            let path = try directory.write("damaged.qcow2", bytes)
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
            #expect(
                throws: DiskImageError.request(path: path, SystemCallError("read", errno: EIO)),
                sourceLocation: sourceLocation
            ) {
                try engine.read(0, 512)
            }
            if !all {
                #expect(
                    try engine.read(24 << 10, 4096) == [UInt8](repeating: 3, count: 4096),
                    sourceLocation: sourceLocation)
            }
            let found = engine.image.damage
            let damage = try #require(found, sourceLocation: sourceLocation)
            #expect("\(damage)".contains(says), "\(damage)", sourceLocation: sourceLocation)
        }
        try expect("an L2 table at byte 4608, which is not cluster-aligned", all: true) {
            put(4608, 8, at: l1, in: &$0)
        }
        try expect("an L2 table at byte 1099511627776, beyond", all: true) { put(1 << 40, 8, at: l1, in: &$0) }
        try expect("an L2 table at byte 72057594037923840, beyond", all: true) {
            put(0x00ff_ffff_ffff_f000, 8, at: l1, in: &$0)
        }
        try expect("a data cluster at byte 512, which is not cluster-aligned", all: false) {
            put(512, 8, at: l2, in: &$0)
        }
        try expect("a data cluster at byte 1099511627776, beyond", all: false) { put(1 << 40, 8, at: l2, in: &$0) }
        // A compressed cluster whose data is the header, one beyond the end, and one at the highest of places.
        try expect("a compressed cluster at byte 0 that", all: false) { put(1 << 62, 8, at: l2, in: &$0) }
        try expect("a data cluster at byte 1099511627776, beyond", all: false) {
            put(1 << 62 | 1 << 40, 8, at: l2, in: &$0)
        }
        try expect("a data cluster at byte 288230376151711743, beyond", all: false) {
            put(.max >> 1, 8, at: l2, in: &$0)
        }
    }

    @Test func zeroFlagsInVersion2AreDamage() throws {
        var bytes = try image("cluster_size=4096,compat=0.10")
        let l1 = Int(bytes.bigEndian64(at: 40))
        let l2 = Int(bytes.bigEndian64(at: l1) & 0x00ff_ffff_ffff_fe00)
        put(1, 8, at: l2, in: &bytes)
        #expect(try use(bytes, chunk: 4096).failures == 1)
    }

    /// A cluster that decompresses to more than a cluster is cut there; one that gives less is damage.
    @Test func decompressionIsBoundedByTheCluster() throws {
        let contents = [UInt8](repeating: 0x55, count: 2 << 20)
        let raw = try directory.write("in.raw", contents)
        // Made with clusters of 2 MiB, then read as if they were of 1 MiB: the stream has twice what is wanted.
        qemuImage(
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M", raw, directory.file("bomb.qcow2"))
        let big = try directory.read("bomb.qcow2")
        let entry = big.bigEndian64(at: Int(big.bigEndian64(at: Int(big.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00))
        let place = Int(entry & ((1 << 49) - 1))
        func wrap(clusterSize: Int, options: String) throws -> [UInt8] {
            let small = [UInt8](repeating: 0x55, count: clusterSize)
            try directory.write("small.raw", small)
            qemuImage(
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, directory.file("small.raw"),
                directory.file("small.qcow2"))
            var bytes = try directory.read("small.qcow2")
            let l2 = Int(bytes.bigEndian64(at: Int(bytes.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00)
            let end = (bytes.count + 511) & ~511
            bytes += [UInt8](repeating: 0, count: end - bytes.count) + big[place...]
            let placeBits = 62 - (clusterSize.trailingZeroBitCount - 8)
            put(1 << 62 | 7 << UInt64(placeBits) | UInt64(end), 8, at: l2, in: &bytes)
            return bytes
        }
        let (opening, failures) = try use(wrap(clusterSize: 1 << 20, options: "cluster_size=1M"))
        #expect(opening == nil && failures == 0)
    }

    @Test func everyTruncationFailsOrReads() throws {
        let bytes = try image("cluster_size=512")
        for length in Array(stride(from: 0, to: 1200, by: 7)) + Array(stride(from: 1200, to: bytes.count, by: 977)) {
            let (opening, _) = try use(Array(bytes.prefix(length)), chunk: 65536)
            // The tables are at the front of a fresh image, so that a file without data still opens.
            if length < 1024 { #expect(opening != nil) }
        }
    }

    /// Random changes of random bytes of the header, the tables and everything.
    @Test(arguments: [
        "cluster_size=512", "cluster_size=4096,compat=0.10", "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,compression_type=zstd",
    ])
    func randomChangesFailOrRead(options: String) throws {
        let seed = options.utf8.reduce(0xfade as UInt64) { $0 &* 31 &+ UInt64($1) }
        var generator = SeededGenerator(seed: seed)
        let good = try image(options)
        let cluster = good.bigEndian32(at: 20)
        let l1 = Int(good.bigEndian64(at: 40))
        let l2 = Int(good.bigEndian64(at: l1) & 0x00ff_ffff_ffff_fe00)
        for round in 0..<150 {
            var bytes = good
            for _ in 0..<Int.random(in: 1...8, using: &generator) {
                let range = [0..<128, l1..<l1 + 16, l2..<min(bytes.count, l2 + 1024), 0..<bytes.count].randomElement(
                    using: &generator)!
                let place = Int.random(in: range, using: &generator)
                switch Int.random(in: 0..<3, using: &generator) {
                case 0: bytes[place] = UInt8.random(in: .min ... .max, using: &generator)
                case 1: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
                default:
                    let value = [0, .max, 1 << 62, 1, UInt64(bytes.count), 1 << UInt64(cluster & 63), generator.next()]
                        .randomElement(using: &generator)!
                    put(value, 8, at: min(place & ~7, bytes.count - 8), in: &bytes)
                }
            }
            _ = try use(bytes, chunk: [512, 16384, 1 << 20][round % 3])
        }
    }

    @Test func randomBytesAreNoImage() throws {
        for seed: UInt64 in 0..<50 {
            var bytes = randomBytes(4096, seed: seed)
            bytes.replaceSubrange(0..<8, with: QCOW2Header.magic + [0, 0, 0, UInt8(2 + seed % 2)])
            bytes.replaceSubrange(20..<24, with: [0, 0, 0, UInt8(9 + seed % 13)])
            _ = try use(bytes)
        }
    }

    // MARK: - Opened for writing

    /// A writer that finds an image damaged marks it so, durably, and writes nothing more; a repair lets it be written
    /// again.
    @Test(arguments: ["cluster_size=4096", "cluster_size=4096,compat=0.10"]) func damageIsMarkedByAWriter(
        options: String
    ) throws {
        let isOld = options.contains("0.10")
        let path = directory.file("damaged.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "4M")
        qemuIO(path, ["write -P 3 0 3M"])
        let good = try directory.read("damaged.qcow2")
        let l1 = Int(good.bigEndian64(at: 40))
        let l2 = Int(good.bigEndian64(at: l1) & 0x00ff_ffff_ffff_fe00)
        let l2Next = Int(good.bigEndian64(at: l1 + 8) & 0x00ff_ffff_ffff_fe00)
        let table = Int(good.bigEndian64(at: Int(good.bigEndian64(at: 48))))
        // Where the guest's data cannot be: beyond the end, between clusters, in the L1 table; and an L2 table that is
        // counted as free.
        let damages: [(String, (inout [UInt8]) -> Void)] = [
            ("beyond the end", { $0.store(1 << 63 | 1 << 40 as UInt64, at: l2) }),
            ("not cluster-aligned", { $0.store(1 << 63 | 512 as UInt64, at: l2) }),
            ("which overlaps the L1 table", { $0.store(1 << 63 | UInt64(l1), at: l2) }),
            ("has a refcount of 0", { $0[table + l2Next / 4096 * 2 + 1] = 0 }),
        ]
        for (says, damage) in damages {
            var bytes = good
            damage(&bytes)
            try directory.write("damaged.qcow2", bytes)
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
                try engine.write(8192, [UInt8](repeating: 4, count: 4096))
                try engine.perform(.flush)
                #expect(throws: DiskImageError.request(path: path, SystemCallError("write", errno: EIO))) {
                    // In place, and where something new is needed.
                    try engine.write(0, [UInt8](repeating: 5, count: 4096))
                    try engine.write(3 << 20 | 512 << 10, [UInt8](repeating: 5, count: 4096))
                }
                let found = engine.image.damage
                #expect("\(try #require(found))".contains(says), "\(found!)")
                // From now on nothing is written, and what can be read is read.
                #expect(throws: DiskImageError.self) { try engine.write(8192, [UInt8](repeating: 6, count: 512)) }
                #expect(throws: DiskImageError.self) { try engine.perform(.flush) }
                #expect(try engine.read(8192, 4096) == [UInt8](repeating: 4, count: 4096))
            }
            let after = try directory.read("damaged.qcow2")
            #expect(after[79] == (isOld ? good[79] : 2))
            if !isOld { #expect("\(try #require(openError(path)))".contains("marked as corrupt")) }
            let report = try DiskImage.check(path: path, options: unlocked, repair: .all)
            #expect(report.errors == 0 && report.errorsFixed > 0, "\(report)")
            expectSound(path)
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked))
            #expect(try engine.read(8192, 4096) == [UInt8](repeating: 4, count: 4096))
            try engine.write(0, [UInt8](repeating: 6, count: 4096))
            #expect(try engine.read(1 << 20, 4096) == [UInt8](repeating: 3, count: 4096))
        }
    }

    /// Random changes, then everything that writes: nothing may do more than fail. Another file beside it stays as it
    /// is, and what was reported as written can be read until something fails.
    @Test(arguments: ["cluster_size=512,refcount_bits=8", "cluster_size=4096,compat=0.10", "cluster_size=64k"])
    func randomChangesFailWriters(options: String) throws {
        let seed = options.utf8.reduce(UInt64(environment("SWKVM_SEED") ?? 0xbeef)) { $0 &* 31 &+ UInt64($1) }
        var generator = SeededGenerator(seed: seed)
        let path = directory.file("hostile.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        qemuIO(path, ["write -P 3 20k 300k", "write -z 100k 20k"])
        if !options.contains("=8") { qemuImage("snapshot", "-c", "one", path) }
        qemuIO(path, ["write -P 4 30k 300k"])
        let good = try directory.read("hostile.qcow2")
        let places = [
            0, 24, 40, Int(good.bigEndian64(at: 40)), Int(good.bigEndian64(at: 48)),
            Int(good.bigEndian64(at: Int(good.bigEndian64(at: 48)))),
            Int(good.bigEndian64(at: 64)),
            Int(good.bigEndian64(at: Int(good.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00),
        ]
        var opened = 0
        for round in 0..<(environment("SWKVM_ROUNDS") ?? 60) {
            var bytes = good
            for _ in 0..<Int.random(in: 1...4, using: &generator) {
                let place = min(
                    places.randomElement(using: &generator)! + Int.random(in: 0..<64, using: &generator),
                    bytes.count - 8)
                switch Int.random(in: 0..<3, using: &generator) {
                case 0: bytes[place] = .random(in: .min ... .max, using: &generator)
                case 1: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
                default:
                    bytes.store(
                        [0, .max, 1 << 62, 1 << 63 | 512, UInt64(bytes.count), generator.next()].randomElement(
                            using: &generator)!, at: place & ~7)
                }
            }
            try directory.write("hostile.qcow2", bytes)
            _ = try? DiskImage.check(path: path, options: unlocked)
            let image: DiskImage
            do throws(DiskImageError) {
                image = try DiskImage(path: path, options: DiskImageOptions(locking: false, allowsBacking: false))
            } catch { continue }
            opened += 1
            do {
                var engine = try DiskEngine(image, depth: 4)
                let size = engine.image.size
                for _ in 0..<8 {
                    let offset = UInt64.random(in: 0..<max(1, min(size, 1 << 20) / 512), using: &generator) * 512
                    guard offset + 8192 <= size else { continue }
                    let piece = randomBytes(8192, seed: generator.next())
                    switch Int.random(in: 0..<7, using: &generator) {
                    case 0: try? engine.perform(.flush)
                    case 1: try? engine.perform(.discard, at: offset, length: 8192)
                    case 2: _ = try? engine.createSnapshot(named: "s")
                    case 3: try? engine.applySnapshot("one")
                    case 4: try? engine.deleteSnapshot("1")
                    case 5: try? engine.resize(to: min(size, 2 << 20) / 1024 * 512, shrinks: true)
                    default:
                        guard (try? engine.write(offset, piece)) != nil else { continue }
                        #expect(try engine.read(offset, 8192) == piece, "round \(round), seed \(seed)")
                    }
                }
            }
            _ = try? DiskImage.check(path: path, options: unlocked, repair: round % 2 == 0 ? .all : .leaks)
            #expect(
                try FileDescriptor.open(path, O_RDONLY).status().st_blocks < 64 << 10, "round \(round), seed \(seed)")
        }
        #expect(opened > 10)
    }
}

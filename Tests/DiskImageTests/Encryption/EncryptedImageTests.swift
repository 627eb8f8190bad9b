// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Encrypted images, with QEMU as the peer on both sides.
@Suite(.timed) struct EncryptedImageTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// Ciphers by all the words that QEMU has for AES, and layouts.
    static let ciphers: [String] = {
        var options: [String] = []
        for bits in [128, 192, 256] {
            for vector in ["plain", "plain64", "essiv,encrypt.ivgen-hash-alg=sha256"] {
                // Keys of 192 bits stop qemu-img 7.2 in the other modes.
                for mode in bits == 192 ? ["xts"] : ["xts", "cbc", "ecb", "ctr"] {
                    options.append(
                        "encrypt.cipher-alg=aes-\(bits),encrypt.cipher-mode=\(mode),encrypt.ivgen-alg=\(vector)")
                }
            }
        }
        for hash in ["sha1", "sha224", "sha384", "sha512"] { options.append("encrypt.hash-alg=\(hash)") }
        return options.map { $0 + ",cluster_size=4k" }
    }()

    /// Few, as qemu-img takes seconds to find out how long its key derivation takes; `qemuReadsWhatWeMake` has the
    /// others.
    static let layouts = [
        "cluster_size=512,compat=0.10", "cluster_size=2M", "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,preallocation=metadata", "cluster_size=4k,data_file=DATA",
    ]

    private func isOnlyRead(_ options: String) -> Bool { options.contains("mode=ecb") || options.contains("mode=ctr") }

    @Test(arguments: Share.of(ciphers + layouts)) func whatQEMUMakesIsReadAndWritten(options: String) throws {
        let encrypted = try Encrypted(directory)
        let disk = QCOW2ImageTests.sparse(700 << 10 | 3 << 9, seed: 5)
        let options = options.split(separator: "DATA", omittingEmptySubsequences: false).joined(
            separator: directory.file("data.raw"))
        let path = try encrypted.qemuCreate("disk.qcow2", size: disk.count, options)
        try encrypted.qemuWrite(disk, path)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options(readOnly: true)), depth: 4)
            #expect(try engine.readAll() == disk)
        }
        var conversion = ImageConversion(source: path, target: directory.file("out.raw"), format: .raw)
        conversion.sourceOptions = encrypted.options(readOnly: true)
        if options.contains("data_file") { conversion.sourceOptions.dataFile = directory.file("data.raw") }
        try conversion.run()
        #expect(try directory.read("out.raw") == disk)
        guard !isOnlyRead(options) else {
            let error = openError(path, encrypted.options())
            #expect("\(String(describing: error))".contains("is supported read-only"))
            return
        }
        var workload = Workload(disk, seed: 8, maximum: 80 << 10)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 8)
            for round in 0..<30 {
                try workload.round(&engine)
                if round % 7 == 6 { try engine.perform(.flush) }
            }
            #expect(try engine.readAll() == workload.model)
        }
        encrypted.expectSound(path, options)
        #expect(try DiskImage.check(path: path, options: unlocked).isSound)
        #expect(try encrypted.qemuContents(path) == workload.model)
    }

    @Test(arguments: ["cluster_size=512", "cluster_size=64k", "cluster_size=4k,compat=0.10"])
    func legacyEncryptionIsRead(options: String) throws {
        for password in ["short", "just 16 bytes ok", "more than the 16 bytes that count"] {
            let encrypted = try Encrypted(directory, password: password)
            let disk = QCOW2ImageTests.sparse(500 << 10, seed: 9)
            let path = try encrypted.qemuCreate("old.qcow2", size: disk.count, options, format: "aes")
            try encrypted.qemuWrite(disk, path)
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options(readOnly: true)), depth: 4)
            #expect(try engine.readAll() == disk)
            #expect("\(String(describing: openError(path, encrypted.options())))".contains("legacy AES"))
            #expect("\(String(describing: openError(path, readOnly)))".contains("no key was given"))
            #expect(try ImageInformation(path: path).encryption?.format == "aes")
        }
    }

    @Test(arguments: Share.of([512, 4096, 65536, 2 << 20] as [UInt64]), [QCOW2Compatibility.version2, .version3])
    func qemuReadsWhatWeMake(clusterSize: UInt64, version: QCOW2Compatibility) throws {
        let encrypted = try Encrypted(directory)
        var layout = QCOW2Options()
        layout.clusterSize = clusterSize
        layout.compatibility = version
        let disk = ConversionMatrixTests.disk
        let raw = try directory.write("disk.raw", disk)
        for (isExtended, preallocation) in [(false, Preallocation.off), (false, .full), (true, .off), (true, .full)]
        where !isExtended || (clusterSize >= 16384 && version == .version3) {
            layout.extendedL2 = isExtended
            // Empty, and then written by each of the two.
            let path = try encrypted.create("new.qcow2", size: disk.count, layout, preallocation: preallocation)
            encrypted.expectSound(path)
            #expect(try encrypted.qemuContents(path).allSatisfy { $0 == 0 })
            try encrypted.qemuWrite(disk, path)
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 4)
                #expect(try engine.readAll() == disk)
                try engine.write(1000 * 512, [UInt8](repeating: 0x77, count: 5 * 512))
            }
            var changed = disk
            changed.replaceSubrange(1000 * 512..<1005 * 512, with: repeatElement(0x77, count: 5 * 512))
            #expect(try encrypted.qemuContents(path) == changed)
            unlink(path)
            // Converted.
            var conversion = ImageConversion(source: raw, target: path, format: .qcow2)
            conversion.options = layout
            conversion.options.encryption = ImageEncryption(key: encrypted.key, cost: .milliseconds(10))
            conversion.preallocation = preallocation
            conversion.threads = 2
            try conversion.run()
            encrypted.expectSound(path)
            #expect(try encrypted.qemuContents(path) == disk)
            let layout = try #require(ImageInformation(path: path).encryption?.luks)
            #expect(
                layout.cipher == "aes-256" && layout.mode == "xts"
                    && layout.slots.map(\.isActive) == [true] + [Bool](repeating: false, count: 7))
            unlink(path)
        }
    }

    @Test func allSlotsOpen() throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        let others = try [1, 3, 7].map { slot in
            let other = try Encrypted(directory, password: "slot \(slot)", name: "key\(slot)")
            let outcome = run([
                "qemu-img", "amend", "--object", "secret,id=s,file=\(encrypted.keyFile)", "--object",
                "secret,id=n,file=\(other.keyFile)", "--image-opts",
                "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=\(slot),encrypt.iter-time=10",
                encrypted.image(path),
            ])
            try #require(outcome.status == 0, "\(outcome.output)")
            return other
        }
        for other in others {
            var engine = try DiskEngine(DiskImage(path: path, options: other.options()), depth: 2)
            try engine.write(4096, Array("\(other.keyFile)".utf8.prefix(8)) + [UInt8](repeating: 1, count: 504))
        }
        #expect(
            try ImageInformation(path: path).encryption?.luks?.slots.map(\.isActive) == [
                true, true, false, true, false, false, false, true,
            ])
        let stranger = try Encrypted(directory, password: "slot 2", name: "key2")
        #expect(openError(path, stranger.options()) == .wrongKey(path: path))
        // A newline is a part of a key.
        let trimmed = try Encrypted(directory, password: String(Encrypted.password.dropLast()), name: "trimmed")
        #expect(openError(path, trimmed.options()) == .wrongKey(path: path))
        #expect(openError(path, unlocked) == .keyMissing(path: path, method: "LUKS"))
    }

    /// A chain whose images have keys of their own, or none.
    @Test func chainsTakeTheirKeysInOrder() throws {
        let one = try Encrypted(directory, password: "one", name: "one"),
            two = try Encrypted(directory, password: "two", name: "two")
        let disk = QCOW2ImageTests.sparse(400 << 10, seed: 2)
        let base = try one.create("base.qcow2", size: disk.count)
        try one.qemuWrite(disk, base)
        qemuImage(
            "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", directory.file("plain.qcow2"), "\(disk.count)")
        // Made without the key of what is below.
        let top = try two.create(
            "top.qcow2", size: disk.count, backing: BackingReference(name: "plain.qcow2", format: .qcow2))
        var options = DiskImageOptions(locking: false)
        options.keys = [two.key, one.key]
        var model = disk
        do {
            var engine = try DiskEngine(DiskImage(path: top, options: options), depth: 4)
            #expect(try engine.readAll() == disk)
            // A part of a cluster, with the rest from below.
            try engine.write(512 * 301, [UInt8](repeating: 9, count: 1536))
            model.replaceSubrange(512 * 301..<512 * 304, with: repeatElement(9, count: 1536))
            #expect(try engine.readAll() == model)
        }
        options.keys = [one.key, two.key]
        #expect(openError(top, options) == .wrongKey(path: top))
        options.keys = [two.key, one.key, one.key]
        #expect(openError(top, options) == .keyUnused(path: top, encrypted: 2, keys: 3))
        options.keys = [one.key]
        #expect(openError(directory.file("base.qcow2").replacing("base", with: "none"), options) != nil)
        // What qemu-img makes of it, with both keys.
        let words = [
            "qemu-img", "convert", "--object", "secret,id=s,file=\(two.keyFile)", "--object",
            "secret,id=b,file=\(one.keyFile)", "--image-opts",
            "\(two.image(top)),backing.driver=qcow2,backing.file.filename=\(directory.file("plain.qcow2")),backing.backing.driver=qcow2,backing.backing.encrypt.key-secret=b,backing.backing.file.filename=\(base)",
            "-O", "raw", directory.file("flat.raw"),
        ]
        let (status, output) = run(words)
        try #require(status == 0, "\(output)")
        #expect(try directory.read("flat.raw") == model)

        // A commit into the encrypted base, by way of one that has no key; the image keeps its slots.
        let before = try directory.read("top.qcow2")
        var rebase = ImageRebase(path: top)
        rebase.options.keys = [two.key, one.key]
        rebase.options.locking = false
        rebase.backing = BackingReference(name: "base.qcow2", format: .qcow2)
        rebase.backingKeys = [one.key]
        try rebase.run()
        var commit = ImageCommit(path: top)
        commit.options.keys = [two.key, one.key]
        commit.options.locking = false
        try commit.run()
        var engine = try DiskEngine(DiskImage(path: base, options: one.options(readOnly: true)), depth: 4)
        #expect(try engine.readAll() == model)
        _ = consume engine
        let after = try directory.read("top.qcow2")
        #expect(after[65536..<65536 + 300_000] == before[65536..<65536 + 300_000], "the LUKS header and its key")
        options.keys = [two.key, one.key]
        var again = try DiskEngine(DiskImage(path: top, options: options), depth: 4)
        #expect(try again.readAll() == model)
    }

    /// Requests whose memory is in pieces that do not end with sectors; and what is not whole sectors is refused.
    @Test(arguments: [true, false]) func memoryMayBeInPieces(usesRing: Bool) throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        var engine = try DiskEngine(
            DiskImage(path: path, options: encrypted.options()), depth: 4, segments: 64, usesRing: usesRing)
        let disk = randomBytes(300 << 10, seed: 6)
        let memory = UnsafeMutableRawBufferPointer.allocate(byteCount: disk.count + 64 * 8, alignment: 8)
        defer { memory.deallocate() }
        let vectors = UnsafeMutablePointer<iovec>.allocate(capacity: 64)
        defer { vectors.deallocate() }
        var generator = SeededGenerator(seed: 12)
        for _ in 0..<20 {
            // Sixty pieces of any length, none where the last one ends.
            var sizes = (0..<63).map { _ in Int.random(in: 1...4000, using: &generator) }
            sizes.append(disk.count - sizes.reduce(0, +))
            func lay(_ body: (Int, Range<Int>) -> Void) {
                var place = 0, start = 0
                for (index, size) in sizes.enumerated() {
                    vectors[index] = iovec(iov_base: memory.baseAddress! + place, iov_len: size)
                    body(place, start..<start + size)
                    place += size + 8
                    start += size
                }
            }
            for operation in [DiskOperation.write, .read] {
                lay { place, range in
                    for index in range {
                        memory[place + index - range.lowerBound] = operation == .write ? disk[index] : 0xee
                    }
                }
                let free = engine.acquire()
                let request = try #require(free)
                engine.start(
                    request, operation, offset: 512 * 77, length: UInt64(disk.count), vectors: vectors, count: 64)
                let completion = try engine.waitForCompletion()
                #expect(completion?.error == 0)
                engine.release(request)
                var isSame = true
                lay { place, range in
                    for index in range where memory[place + index - range.lowerBound] != disk[index] { isSame = false }
                }
                #expect(isSame, "\(operation)")
            }
        }
        try engine.perform(.flush)
        #expect(try Array(encrypted.qemuContents(path)[512 * 77..<512 * 77 + disk.count]) == disk)
        for (offset, count) in [(1, 512), (512, 100), (0, 513)] {
            #expect(throws: DiskImageError.self) {
                try engine.write(UInt64(offset), [UInt8](repeating: 1, count: count))
            }
            #expect(throws: DiskImageError.self) { try engine.read(UInt64(offset), count) }
        }
    }

    /// A guest sees no ciphertext, and what it writes into the memory of a read meanwhile is not decrypted.
    @Test(arguments: [true, false]) func theMemoryOfAReadGetsPlaintextAlone(usesRing: Bool) throws {
        /// What the memory has when all has been read and nothing is decrypted yet; then a vCPU writes there.
        final class Guest: @unchecked Sendable {
            var memory: SharedImageTests.Buffer?
            var seen: Set<UInt8> = []

            func hear(_ work: BulkWork) {
                guard work == .decryption, let memory else { return }
                seen.formUnion(memory.contents)
                unsafe memory.bytes.copyBytes(from: repeatElement(0xdd, count: memory.bytes.count))
                seen.remove(0xdd)
                self.memory = nil
            }
        }
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        // Less than a buffer, so that there is one operation.
        let disk = randomBytes(128 << 10, seed: 8)
        let guest = Guest()
        var calls = FileCalls.host
        calls.bulkWork = { guest.hear($0) }
        do {
            let shared = try SharedImage(DiskImage(path: path, options: encrypted.options()), calls: calls)
            var engine = try DiskEngine(shared, depth: 4, usesRing: usesRing)
            try engine.write(0, disk)
            let memory = SharedImageTests.Buffer([UInt8](repeating: 0xee, count: disk.count))
            guest.memory = memory
            #expect(try Self.read(&engine, memory) == 0)
            #expect(guest.memory == nil && guest.seen == [0xee])
            #expect(isSame(memory.contents, disk))
            try engine.perform(.flush)
        }
    }

    /// Reads the start of the disk into memory. Returns the request's error.
    private static func read(_ engine: inout DiskEngine, _ memory: SharedImageTests.Buffer) throws -> Int32? {
        let free = engine.acquire()
        let request = try #require(free)
        unsafe engine.start(
            request, .read, offset: 0, length: UInt64(memory.bytes.count), vectors: memory.vector, count: 1)
        let completion = try engine.waitForCompletion()
        engine.release(request)
        return completion?.error
    }

    /// Nothing of what is written can be found in the file, also not where a cluster is filled up with zeroes or zeroed
    /// in part.
    @Test func theFileHasNoPlainText() throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 4 << 20)
        let mark = Array("this must not be seen by anybody".utf8)
        var expected = [UInt8](repeating: 0, count: 4 << 20)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 4)
            let sector = Array(repeatElement(mark, count: 16).joined())
            for (offset, count) in [(0, 128), (300, 1), (1000, 700), (2000, 3)] {
                let bytes = Array(repeatElement(sector, count: count).joined())
                try engine.write(UInt64(offset * 512), bytes)
                expected.replaceSubrange(offset * 512..<offset * 512 + bytes.count, with: bytes)
            }
            try engine.perform(.writeZeroes, at: 1010 * 512, length: 512 * 9)
            try engine.perform(.discard, at: 1030 * 512, length: 512 * 9)
            expected.replaceSubrange(1010 * 512..<1019 * 512, with: repeatElement(0, count: 512 * 9))
            try engine.perform(.flush)
            #expect(try engine.readAll() == expected)
        }
        let file = try directory.read("disk.qcow2")
        // Wherever it were, it would begin at a sixteenth byte.
        let places = stride(from: 0, to: file.count - mark.count, by: 16).filter { place in
            unsafe file.withUnsafeBytes { file in
                unsafe mark.withUnsafeBytes {
                    unsafe memcmp(file.baseAddress! + place, $0.baseAddress!, mark.count) == 0
                }
            }
        }
        #expect(places.isEmpty)
        // Nor is a data cluster's unwritten part zeroes, by which its use would be seen: all that is zero in the file
        // is outside of data.
        let map = try ImageReaderProbe.dataRanges(path, encrypted.options(readOnly: true))
        for range in map {
            for start in stride(from: range.lowerBound, to: range.upperBound, by: 512) {
                #expect(file[start..<start + 512].contains { $0 != 0 })
            }
        }
        #expect(try encrypted.qemuContents(path) == expected)
    }

    @Test func whatNeedsNoKeyAndWhatDoes() throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        try encrypted.qemuWrite(randomBytes(1 << 20, seed: 1), path)
        var sealed = unlocked
        sealed.opensData = false
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: sealed), depth: 2)
            try engine.createSnapshot(named: "kept")
            #expect(throws: DiskImageError.self) { try engine.read(0, 512) }
            #expect(throws: DiskImageError.self) { try engine.write(0, [UInt8](repeating: 0, count: 512)) }
            #expect(throws: DiskImageError.self) { try engine.resize(to: 2 << 20) }
        }
        encrypted.expectSound(path)
        var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 2)
        for preallocation in [Preallocation.metadata, .falloc] {
            #expect(throws: DiskImageError.self) { try engine.resize(to: 2 << 20, preallocation: preallocation) }
        }
        try engine.resize(to: 2 << 20, preallocation: .full)
        #expect(try engine.readAll() == randomBytes(1 << 20, seed: 1) + [UInt8](repeating: 0, count: 1 << 20))
        _ = consume engine
        encrypted.expectSound(path)
        #expect(
            try encrypted.qemuContents(path) == randomBytes(1 << 20, seed: 1) + [UInt8](repeating: 0, count: 1 << 20))
        // What cannot be made is refused before there is a file.
        for (preallocation, isRaw) in [(Preallocation.metadata, false), (.falloc, false), (.off, true)] {
            var layout = QCOW2Options()
            if isRaw { (layout.dataFile, layout.dataFileIsRaw) = ("data.raw", true) }
            #expect(throws: DiskImageError.self) {
                _ = try encrypted.create("no.qcow2", size: 1 << 20, layout, preallocation: preallocation)
            }
            #expect(access(directory.file("no.qcow2"), F_OK) != 0)
        }
        var conversion = ImageConversion(source: path, target: directory.file("no.qcow2"), format: .qcow2)
        conversion.sourceOptions = encrypted.options(readOnly: true)
        conversion.options.encryption = ImageEncryption(key: encrypted.key, cost: .iterations(1000))
        conversion.compresses = true
        #expect(throws: DiskImageError.self) { try conversion.run() }
        conversion.compresses = false
        conversion.options.encryption?.cost = .iterations(999)
        #expect(throws: DiskImageError.self) { try conversion.run() }
    }

    /// All that can happen to an image, with encryption; see `LifetimeTests`.
    @Test(arguments: Share.of([512, 4096, 65536, 16384] as [UInt64]), [false, true])
    func whateverHappensTheDiskIsAnArray(clusterSize: UInt64, hasBacking: Bool) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 3) &+ clusterSize
        let encrypted = try Encrypted(directory)
        let contents =
            hasBacking ? QCOW2ImageTests.sparse(700 << 10, seed: seed) : [UInt8](repeating: 0, count: 700 << 10)
        try directory.write("base.raw", contents)
        var layout = QCOW2Options()
        layout.clusterSize = clusterSize
        layout.extendedL2 = clusterSize == 16384
        let path = try encrypted.create(
            "disk.qcow2", size: contents.count, layout,
            backing: hasBacking ? BackingReference(name: "base.raw", format: .raw) : nil)
        var life = Lifetime(contents, seed: seed, canKeep: true, canResize: true)
        life.preallocations = [.off, .full]
        life.keys = [encrypted.key]
        for session in 0..<3 {
            var options = encrypted.options()
            options.metadataCacheSize = session == 0 ? 0 : 32 << 20
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 8, usesRing: session != 1)
                for _ in 0..<(environment("SWKVM_ROUNDS") ?? 120) { try life.step(&engine) }
            }
            encrypted.expectSound(path, "seed \(seed), session \(session)")
            try life.expectContents(path)
        }
        #expect(try encrypted.qemuContents(path) == life.workload.model, "seed \(seed)")
    }

    /// Without it nothing could be read any more.
    @Test func theFileOfAKeyIsNotReplaced() throws {
        let keys = try ["source", "target"].map { try directory.write($0, Array("the key of the \($0)".utf8)) }
        let encrypted = directory.file("encrypted.qcow2"), link = directory.file("link")
        #expect(symlink(keys[0], link) == 0)
        var creation = ImageCreation(path: encrypted, format: .qcow2, size: 1 << 20)
        creation.options.encryption = ImageEncryption(key: try DiskKey(.file(keys[0])), cost: .iterations(1000))
        try creation.create()
        func expectRefusal(_ target: String, _ body: () throws(DiskImageError) -> Void) throws {
            let before = try directory.read("source") + directory.read("target")
            let error = #expect(throws: DiskImageError.self) { try body() }
            #expect(
                error?.description.contains("is the file of the key") == true, "\(target): \(error.debugDescription)")
            #expect(try directory.read("source") + directory.read("target") == before)
        }
        for target in keys + [link] {
            var conversion = ImageConversion(source: encrypted, target: target, format: .qcow2)
            conversion.replacing = true
            conversion.sourceOptions.keys = [try DiskKey(.file(keys[0]))]
            conversion.options.encryption = ImageEncryption(key: try DiskKey(.file(keys[1])), cost: .iterations(1000))
            try expectRefusal(target) { () throws(DiskImageError) in try conversion.run() }
            creation.path = target
            creation.replacing = true
            creation.options.encryption = ImageEncryption(
                key: try DiskKey(.file(target == link ? keys[0] : target)), cost: .iterations(1000))
            try expectRefusal(target) { () throws(DiskImageError) in try creation.create() }
        }
    }
}

/// Where an image's own data lies in its file.
enum ImageReaderProbe {
    static func dataRanges(_ path: String, _ options: DiskImageOptions) throws -> [Range<Int>] {
        var map = ImageMap(try DiskImage(path: path, options: options))
        var ranges: [Range<Int>] = []
        while let extent = try map.next() {
            if extent.kind == .data, let place = extent.fileOffset {
                ranges.append(Int(place)..<Int(place + extent.length))
            }
        }
        return ranges
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

extension ImageSubformat {
    /// The format that this is a kind of.
    var format: ImageFormat { self == .dynamic || self == .fixed ? .vdi : .vmdk }
}

/// VDI and VMDK images that we make, judged by qemu-img.
@Suite(.timed) struct FormatMakingTests {
    let directory = TemporaryDirectory(inMemory: true)

    private func names() -> String { run(["ls", "-A", directory.path]).output }

    /// What qemu-img says of an image of ours: nothing is wrong with it, it is of this kind, and has the contents of
    /// `raw`.
    private func expect(
        _ path: String, _ kind: ImageSubformat, isSameAs raw: String, sourceLocation: SourceLocation = #_sourceLocation
    ) {
        let format = kind.format.rawValue
        expectSound(path, kind.format, "\(kind)", sourceLocation: sourceLocation)
        let comparison = run(["qemu-img", "compare", "-s", "-f", format, "-F", "raw", path, raw])
        // A strict comparison also tells what has no data here and zeroes there (1 and "mismatch"); sizes and contents
        // have to be the same.
        #expect(
            !comparison.output.contains("Content mismatch") && !comparison.output.contains("size"),
            "\(kind): \(comparison.output)", sourceLocation: sourceLocation)
        #expect(comparison.status <= 1, "\(kind): \(comparison.output)", sourceLocation: sourceLocation)
        let information = run(["qemu-img", "info", "-f", format, path]).output
        #expect(
            information.contains(kind.format == .vmdk ? "create type: \(kind.rawValue)\n" : "file format: vdi"),
            "\(information)", sourceLocation: sourceLocation)
    }

    @Test(arguments: ImageSubformat.allCases, [512, 1 << 20, 5 << 20 | 3 << 9, 37 << 20]) func qemuReadsWhatWeMake(
        kind: ImageSubformat, size: Int
    ) throws {
        let contents = QCOW2ImageTests.sparse(size, seed: UInt64(size))
        let raw = try directory.write("in.raw", contents)
        for threads in 1...3 {
            let path = directory.file("\(threads).\(kind.format)")
            var conversion = ImageConversion(source: raw, target: path, format: kind.format)
            conversion.subformat = kind
            conversion.threads = threads
            try conversion.run()
            expect(path, kind, isSameAs: raw)
            #expect(try isSame(directory.contents("\(threads).\(kind.format)", kind.format), contents))
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
            #expect(try isSame(engine.readAll(), contents))
        }
        // The same whatever the number of threads, but for random identities in the first KiB.
        let first = try directory.bytes("1.\(kind.format)"), other = try directory.bytes("3.\(kind.format)")
        #expect(first.count == other.count)
        if kind.format == .vdi || first.count > 4096 {
            #expect(isSame(Array(first.dropFirst(1024)), Array(other.dropFirst(1024))))
        }
    }

    /// Ours are written like others' are.
    @Test(arguments: ImageSubformat.allCases.filter { $0 != .streamOptimized }) func whatWeMakeIsWritten(
        kind: ImageSubformat
    ) throws {
        let path = directory.file("disk.\(kind.format)"), size = 5 << 20 | 3 << 9
        var creation = ImageCreation(path: path, format: kind.format, size: UInt64(size))
        creation.subformat = kind
        #expect(try creation.create() == UInt64(size))
        try directory.randomOperations(path, kind.format, [UInt8](repeating: 0, count: size), seed: 21)
    }

    /// More than one file, and more than one piece of a table.
    @Test(arguments: ImageSubformat.allCases) func largeDisksAreMade(kind: ImageSubformat) throws {
        let raw = directory.file("in.raw"), path = directory.file("disk.\(kind.format)")
        qemuImage("create", "-q", "-f", "raw", raw, "5G")
        // Data over the borders of the files.
        let border = Int(VMDKDescriptor.splitSize) / 512 * 512
        qemuIO(
            raw, ["write -P 1 \(border - 300 << 10) 1M", "write -P 2 \(2 * border - 512) 1k", "write -P 3 5119M 1M"],
            format: "raw")
        var conversion = ImageConversion(source: raw, target: path, format: kind.format)
        conversion.subformat = kind
        try conversion.run()
        expect(path, kind, isSameAs: raw)
        let files = try DiskImage(path: path, options: readOnly).files.count
        #expect(
            files
                == (kind == .twoGbMaxExtentFlat || kind == .twoGbMaxExtentSparse ? 4 : kind == .monolithicFlat ? 2 : 1))
        #expect(try ImageComparison(path, with: raw).run() == .identical)
        // Empty ones, too.
        let empty = directory.file("empty.\(kind.format)")
        var creation = ImageCreation(path: empty, format: kind.format, size: 5 << 30)
        creation.subformat = kind
        try creation.create()
        qemuImage("create", "-q", "-f", "raw", directory.file("empty.raw"), "5G")
        expect(empty, kind, isSameAs: directory.file("empty.raw"))
        var status = stat()
        #expect(unsafe stat(empty, &status) == 0 && status.st_blocks < 1 << 11)
    }

    /// A compressed VMDK read as one that has it from a pipe: each part says what follows, and the footer is right.
    @Test func aStreamCanBeReadFromStartToEnd() throws {
        let size = 70 << 20 | 3 << 9
        // Grains that can be compressed and such that cannot, a table without grains, and the last grain, which is cut
        // short.
        var contents = [UInt8](repeating: 0, count: size)
        contents.replaceSubrange(0..<1 << 20, with: QCOW2ImageTests.sparse(1 << 20, seed: 9))
        contents.replaceSubrange(1 << 20..<2 << 20, with: randomBytes(1 << 20, seed: 10))
        contents.replaceSubrange(65 << 20..<65 << 20 + 200_000, with: [UInt8](repeating: 7, count: 200_000))
        contents[size - 1] = 1
        let raw = try directory.write("in.raw", contents), path = directory.file("disk.vmdk")
        var conversion = ImageConversion(source: raw, target: path, format: .vmdk)
        conversion.compresses = true
        try conversion.run()
        expect(path, .streamOptimized, isSameAs: raw)

        let file = try directory.bytes("disk.vmdk")
        let header = Array(file[..<512])
        #expect(
            header.starts(with: "KDMV".utf8) && header.littleEndian32(at: 4) == 3
                && header.littleEndian32(at: 8) == 0x30001)
        #expect(
            header.littleEndian64(at: 12) == UInt64(size / 512) && header.littleEndian64(at: 20) == 128
                && header.littleEndian32(at: 44) == 512)
        #expect(header.littleEndian64(at: 56) == .max && header[72...77].elementsEqual([0, 10, 32, 13, 10, 1]))
        #expect(String(decoding: file[512..<1024], as: UTF8.self).contains("createType=\"streamOptimized\""))
        var place = Int(header.littleEndian64(at: 64)) * 512
        var grains: [UInt32: UInt32] = [:], tables: [Int] = [], tableIndex: [UInt32] = [], directorySector = 0,
            footer: [UInt8] = [], last: UInt64?
        guard let inflater = Inflater(windowBits: 15) else { fatalError("no memory for zlib") }
        var wrong: [UInt64] = []
        parts: while place + 512 <= file.count {
            let value = file.littleEndian64(at: place), length = Int(file.littleEndian32(at: place + 8))
            if length > 0 {
                // A grain, in ascending order of the disk.
                #expect(value % 128 == 0 && last.map { $0 < value } ?? true)
                last = value
                var grain = [UInt8](repeating: 0, count: 64 << 10)
                let got = Array(file[(place + 12)..<(place + 12 + length)]).withReadableIOMemory { input in
                    grain.withIOMemory { inflater.decompress(input, into: $0) }
                }
                #expect(got == 64 << 10)
                let range = Int(value) * 512..<min(size, Int(value) * 512 + 64 << 10)
                if !isSame(Array(contents[range]), Array(grain.prefix(range.count))) { wrong.append(value) }
                grains[UInt32(value / 128)] = UInt32(place / 512)
                place += (12 + length + 511) / 512 * 512
                continue
            }
            switch file.littleEndian32(at: place + 12) {
            case VMDKMarker.table:
                // Of the grains before it.
                #expect(value == 4)
                let number = UInt32(try #require(last) / 128 / 512)
                for entry in 0..<512
                where file.littleEndian32(at: place + 512 + entry * 4) != grains[number * 512 + UInt32(entry)] ?? 0 {
                    wrong.append(UInt64(entry))
                }
                tables.append(place / 512 + 1)
                tableIndex.append(number)
            case VMDKMarker.directory:
                directorySector = place / 512 + 1
                for (number, table) in zip(tableIndex, tables) {
                    #expect(file.littleEndian32(at: place + 512 + Int(number) * 4) == UInt32(table))
                }
                #expect(tableIndex == [0, 2] && file.littleEndian32(at: place + 512 + 4) == 0)
            case VMDKMarker.footer:
                footer = Array(file[(place + 512)..<(place + 1024)])
            case VMDKMarker.endOfStream:
                place += 512
                break parts
            case let kind:
                Issue.record("a marker of the kind \(kind) at byte \(place)")
                return
            }
            place += 512 + Int(value) * 512
        }
        #expect(place == file.count && file.suffix(512).allSatisfy { $0 == 0 } && wrong.isEmpty, "\(wrong.prefix(5))")
        var expected = header
        expected.replaceSubrange(56..<64, with: littleEndian(UInt64(directorySector)))
        #expect(footer == expected && grains.count > 16)
    }

    @Test(
        arguments: [ImageSubformat.fixed, .monolithicFlat, .twoGbMaxExtentFlat], [Preallocation.off, .falloc, .full])
    func spaceIsSetAside(kind: ImageSubformat, preallocation: Preallocation) throws {
        let size: UInt64 = 3 << 20,
            contents =
                [UInt8](repeating: 0, count: 1 << 20) + randomBytes(1 << 20, seed: 1)
                + [UInt8](repeating: 0, count: 1 << 20)
        let raw = try directory.write("in.raw", contents)
        var creation = ImageCreation(path: directory.file("new.\(kind.format)"), format: kind.format, size: size)
        creation.subformat = kind
        creation.preallocation = preallocation
        try creation.create()
        var conversion = ImageConversion(
            source: raw, target: directory.file("copy.\(kind.format)"), format: kind.format)
        conversion.subformat = kind
        conversion.preallocation = preallocation
        try conversion.run()
        expect(conversion.target, kind, isSameAs: raw)
        for (name, least) in [("new", 0), ("copy", 1 << 20)] {
            let files = run(["sh", "-c", "du -c --block-size=1 \(directory.path)/\(name)*.\(kind.format) | tail -n 1"])
                .output
            let blocks = try #require(Int(files.split { $0.isWhitespace }.first ?? ""))
            #expect(
                preallocation == .off ? (least...least + 100 << 10).contains(blocks) : blocks >= size,
                "\(name): \(blocks)")
        }
    }

    // MARK: - What is not made

    private func refusal(
        _ body: () throws(DiskImageError) -> Void, sourceLocation: SourceLocation = #_sourceLocation
    ) -> String {
        let before = names()
        defer { #expect(names() == before, sourceLocation: sourceLocation) }
        do throws(DiskImageError) { try body() } catch { return "\(error)" }
        Issue.record("it was done", sourceLocation: sourceLocation)
        return ""
    }

    @Test func whatContradictsIsRefused() throws {
        let raw = try directory.write("in.raw", [UInt8](repeating: 1, count: 4096))
        let changes: [(String, (inout ImageCreation) -> Void)] = [
            (
                "no subformat streamOptimized",
                {
                    $0.format = .raw; $0.subformat = .streamOptimized
                }
            ),
            (
                "no subformat static",
                {
                    $0.format = .qcow2; $0.subformat = .fixed
                }
            ),
            ("no subformat static", { $0.subformat = .fixed }),
            (
                "no subformat monolithicFlat",
                {
                    $0.format = .vdi; $0.subformat = .monolithicFlat
                }
            ),
            ("image cannot be preallocated", { $0.preallocation = .falloc }),
            (
                "image cannot be preallocated",
                {
                    $0.format = .vdi; $0.preallocation = .metadata
                }
            ),
            (
                "no metadata to preallocate",
                {
                    $0.subformat = .monolithicFlat; $0.preallocation = .metadata
                }
            ),
            ("qcow2 options do not apply", { $0.options.clusterSize = 4096 }),
            ("no backing file", { $0.backing = BackingReference(name: "in.raw", format: .raw) }),
            ("0 bytes", { $0.size = 0 }), ("at most", { $0.size = 1 << 60 }),
            (
                "at most",
                {
                    $0.subformat = .twoGbMaxExtentFlat; $0.size = 2 << 40
                }
            ),
            (
                "at most",
                {
                    $0.format = .vdi; $0.size = 65 << 40
                }
            ),
            (
                "at most",
                {
                    $0.subformat = .streamOptimized; $0.size = 65 << 40
                }
            ),
            (
                "at most",
                {
                    $0.subformat = .monolithicFlat; $0.size = 1 << 52
                }
            ),
            ("quotation mark", { $0.path += "\".vmdk" }), ("control character", { $0.path += "\n.vmdk" }),
        ]
        for (index, (words, change)) in changes.enumerated() {
            var creation = ImageCreation(path: directory.file("new.vmdk"), format: .vmdk, size: 1 << 20)
            change(&creation)
            let text = refusal { () throws(DiskImageError) in try creation.create() }
            #expect(text.contains(words), "\(index): \(text)")
        }
        for (words, change) in [
            (
                "are not compressed",
                {
                    $0.subformat = .monolithicSparse; $0.compresses = true
                }
            ),
            (
                "are not compressed",
                {
                    $0.format = .vdi; $0.compresses = true
                }
            ),
            (
                "level 12",
                {
                    $0.compresses = true; $0.compressionLevel = 12
                }
            ),
        ] as [(String, (inout ImageConversion) -> Void)] {
            var conversion = ImageConversion(source: raw, target: directory.file("new.vmdk"), format: .vmdk)
            change(&conversion)
            let text = refusal { () throws(DiskImageError) in try conversion.run() }
            #expect(text.contains(words), "\(text)")
        }
    }

    /// No file under its final name, and none without one, when the work is cancelled or one of the names is taken.
    @Test(arguments: ImageSubformat.allCases) func whatIsGivenUpLeavesNothing(kind: ImageSubformat) throws {
        let raw = try directory.write("in.raw", randomBytes(8 << 20, seed: 3))
        var conversion = ImageConversion(source: raw, target: directory.file("new.\(kind.format)"), format: kind.format)
        conversion.subformat = kind
        var calls = 0
        #expect(
            refusal { () throws(DiskImageError) in
                try conversion.run { _ in
                    calls += 1; return false
                }
            }.contains("interrupted"))
        #expect(calls > 0)
        guard
            let name = try kind.format == .vmdk
                ? VMDKDescriptor.text(of: kind, conversion.target, size: 8 << 20).names.first : nil
        else { return }
        // One of several files.
        try directory.write(name, [1])
        #expect(
            refusal { () throws(DiskImageError) in try conversion.run() }
                == "\(DiskImageError.exists(path: directory.file(name)))")
        conversion.replacing = true
        try conversion.run()
        expect(conversion.target, kind, isSameAs: raw)
        // The source under the name of an extent.
        unlink(directory.file(name))
        #expect(rename(raw, directory.file(name)) == 0)
        conversion.source = directory.file(name)
        conversion.sourceOptions.format = .raw
        #expect(
            refusal { () throws(DiskImageError) in try conversion.run() }.contains("it is the same file as the source"))
        #expect(try directory.bytes(name).count == 8 << 20)
    }

    /// A sector's number has 32 bits.
    @Test func aSparseFileEndsAtTwoTebibytes() throws {
        let file = try NewFile(path: directory.file("new.vmdk"), replacing: false)
        var builder = BlockMapBuilder(vmdk: 4 << 40, descriptor: [])
        let first = builder.allocate(1 << 25 - 10_000)
        try builder.map(0, count: 1, to: first, subclusters: .max, file)
        let beyond = builder.allocate(10_000)
        #expect(throws: DiskImageError.self) { try builder.map(1, count: 10_000, to: beyond, subclusters: .max, file) }
        let beside = builder.layout.blockCount
        #expect(beside == 1 << 26)
    }
}

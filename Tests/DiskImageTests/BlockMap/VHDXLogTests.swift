// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A VHDX that was not closed, with changes in its log.
@Suite(.timed) struct VHDXLogTests {
    let directory = TemporaryDirectory(inMemory: true)

    private static let id = [UInt8](1...16)

    /// An entry of a log.
    struct Entry {
        var number: UInt64
        var tail: UInt32
        /// Sectors of 4 KiB that are written, or bytes that are made zero.
        var changes: [(place: UInt64, bytes: [UInt8]?, zeroes: UInt64)]
        var flushedSize: UInt64
        var lastSize: UInt64
        var id = VHDXLogTests.id

        var bytes: [UInt8] {
            var head = [UInt8](repeating: 0, count: (64 + 32 * changes.count + 4095) / 4096 * 4096), data: [UInt8] = []
            func put(_ bytes: [UInt8], _ place: Int) { head.replaceSubrange(place..<place + bytes.count, with: bytes) }
            for (index, change) in changes.enumerated() {
                let place = 64 + 32 * index
                put(littleEndian(change.place), place + 16)
                put(littleEndian(number), place + 24)
                guard let bytes = change.bytes else {
                    put(Array("zero".utf8), place)
                    put(littleEndian(change.zeroes), place + 8)
                    continue
                }
                put(Array("desc".utf8) + bytes.suffix(4) + bytes.prefix(8), place)
                data +=
                    Array("data".utf8) + littleEndian(UInt32(number >> 32)) + bytes[8..<4092]
                    + littleEndian(UInt32(truncatingIfNeeded: number))
            }
            put(Array("loge".utf8), 0)
            put(littleEndian(UInt32(head.count + data.count)) + littleEndian(tail), 8)
            put(littleEndian(number) + littleEndian(UInt32(changes.count)), 16)
            put(id + littleEndian(flushedSize) + littleEndian(lastSize), 32)
            var entry = head + data
            Self.seal(&entry)
            return entry
        }

        static func seal(_ entry: inout [UInt8]) {
            entry.replaceSubrange(4..<8, with: littleEndian(CRC32C.checksum(entry, zeroes: 4..<8)))
        }
    }

    /// An image before and after qemu-io wrote to it, and where its table of blocks is.
    struct Pair {
        let before: [UInt8]
        let after: [UInt8]
        let contents: [UInt8]
        let table: Int
        /// Where the log is, and its bytes.
        let log: Int
        let logSize: Int
    }

    private func pair() throws -> Pair {
        let path = directory.file("disk.vhdx")
        qemuImage("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "9M")
        qemuIO(path, ["write -P 1 0 2M"], format: "vhdx")
        let before = try directory.bytes("disk.vhdx")
        qemuIO(path, ["write -P 2 1536k 3M", "write -P 3 8M 512"], format: "vhdx")
        let after = try directory.bytes("disk.vhdx")
        let region = before[192 << 10 | 16] == 0x66 ? 0 : 1
        let header = (after.littleEndian64(at: 64 << 10 | 8) > after.littleEndian64(at: 128 << 10 | 8) ? 64 : 128) << 10
        return Pair(
            before: before, after: after, contents: try directory.contents("disk.vhdx", .vhdx),
            table: Int(before.littleEndian64(at: 192 << 10 | 16 + region * 32 + 16)),
            log: Int(after.littleEndian64(at: header + 72)), logSize: Int(after.littleEndian32(at: header + 68)))
    }

    /// As QEMU's own sample, iotest-dirtylog-10G-4M: QEMU wrote the entry, and ended before it did what the entry says.
    @Test func aLogThatQEMUWrote() throws {
        let path = directory.file("disk.vhdx")
        qemuImage("create", "-q", "-f", "vhdx", "-o", "subformat=dynamic,block_size=4M", path, "10G")
        let before = try directory.bytes("disk.vhdx")
        qemuIO(path, ["write -P 10 0 18M"], format: "vhdx")
        var file = try directory.bytes("disk.vhdx")
        // What is done is taken back: the table, and the log's ID in the header that counts.
        let region = before[192 << 10 | 16] == 0x66 ? 0 : 1
        let table = Int(before.littleEndian64(at: 192 << 10 | 16 + region * 32 + 16))
        file.replaceSubrange(table..<table + 32768, with: before[table..<table + 32768])
        let header = (file.littleEndian64(at: 64 << 10 | 8) > file.littleEndian64(at: 128 << 10 | 8) ? 64 : 128) << 10
        let log = Int(file.littleEndian64(at: header + 72)), size = Int(file.littleEndian32(at: header + 68))
        let entries = stride(from: log, to: log + size, by: 4096).filter {
            file[$0..<$0 + 4].elementsEqual("loge".utf8)
        }
        let last = try #require(entries.max { file.littleEndian64(at: $0 + 16) < file.littleEndian64(at: $1 + 16) })
        file.replaceSubrange(header + 48..<header + 64, with: file[last + 32..<last + 48])
        var sealed = Array(file[header..<header + 4096])
        Entry.seal(&sealed)
        file.replaceSubrange(header..<header + 4096, with: sealed)
        try directory.write("disk.vhdx", file)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try isSame(engine.read(0, 18 << 20), [UInt8](repeating: 10, count: 18 << 20)))
        #expect(try engine.read(18 << 20, 4 << 20).allSatisfy { $0 == 0 })
        _ = consume engine
        // The file is as it was, and QEMU, which changes it, finds the same in it.
        #expect(try isSame(directory.bytes("disk.vhdx"), file))
        let check = run(["qemu-img", "check", "-q", "-r", "all", "-f", "vhdx", path])
        #expect(check.status == 0, "\(check.output)")
        qemuIO(path, ["read -P 10 0 18M", "read -P 0 18M 4M"], format: "vhdx")
        #expect(try !isSame(directory.bytes("disk.vhdx"), file))
    }

    /// The image as it is when the table has not been written and waits in the log, whose entries begin at `start`.
    private func unfinished(
        _ pair: Pair, _ entries: [[UInt8]], start: Int, change: (inout [UInt8]) -> Void = { _ in }
    ) -> [UInt8] {
        var file = pair.after
        // What the table says there is no longer, or not yet.
        file.replaceSubrange(pair.table..<pair.table + 8192, with: [UInt8](repeating: 0xab, count: 8192))
        var place = start
        file.replaceSubrange(pair.log..<pair.log + pair.logSize, with: [UInt8](repeating: 0, count: pair.logSize))
        for entry in entries {
            for sector in 0..<entry.count / 4096 {
                let target = pair.log + (place + sector * 4096) % pair.logSize
                file.replaceSubrange(target..<target + 4096, with: entry[sector * 4096..<(sector + 1) * 4096])
            }
            place += entry.count
        }
        change(&file)
        for header in [64 << 10, 128 << 10] {
            file.replaceSubrange(header + 48..<header + 64, with: Self.id)
            var bytes = Array(file[header..<header + 4096])
            Entry.seal(&bytes)
            file.replaceSubrange(header..<header + 4096, with: bytes)
        }
        return file
    }

    /// Two entries that make the table what it should be: the first with too many zeroes, over which the second writes.
    private func entries(_ pair: Pair, start: Int, number: UInt64 = 7) -> [Entry] {
        let sector = Array(pair.after[pair.table..<pair.table + 4096]), size = UInt64(pair.after.count)
        return [
            Entry(
                number: number, tail: UInt32(start), changes: [(UInt64(pair.table), nil, 8192)], flushedSize: size,
                lastSize: size),
            Entry(
                number: number + 1, tail: UInt32(start), changes: [(UInt64(pair.table), sector, 0)], flushedSize: size,
                lastSize: size),
        ]
    }

    private func expectContents(
        _ file: [UInt8], _ contents: [UInt8], sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let path = try directory.write("dirty.vhdx", file)
        for usesRing in [false, true] {
            var engine = try DiskEngine(
                DiskImage(path: path, options: DiskImageOptions(readOnly: true, metadataCacheSize: 0)),
                usesRing: usesRing)
            #expect(try isSame(engine.readAll(), contents), sourceLocation: sourceLocation)
            let damage = engine.image.damage
            #expect(damage == nil, sourceLocation: sourceLocation)
        }
        #expect(try ImageInformation(path: path).size == UInt64(contents.count), sourceLocation: sourceLocation)
        // Nothing was written.
        #expect(try isSame(directory.bytes("dirty.vhdx"), file), sourceLocation: sourceLocation)
    }

    /// Replayed by us in memory, and by QEMU into the file. Entries are at the log's start, within it, and over its
    /// end.
    @Test(arguments: [0, 40960, -4096]) func changesThatWaitAreSeen(start: Int) throws {
        let pair = try pair(), place = start < 0 ? pair.logSize + start : start
        let file = unfinished(pair, entries(pair, start: place).map(\.bytes), start: place)
        try expectContents(file, pair.contents)
        qemuImage("check", "-q", "-r", "all", "-f", "vhdx", directory.file("dirty.vhdx"))
        #expect(try isSame(directory.contents("dirty.vhdx", .vhdx), pair.contents))
        var conversion = ImageConversion(
            source: try directory.write("dirty.vhdx", file), target: directory.file("out.raw"), format: .raw)
        conversion.replacing = true
        try conversion.run()
        #expect(try isSame(directory.bytes("out.raw"), pair.contents))
    }

    /// Entries of former times, whose sequence is older, and the last one that was torn: neither counts.
    @Test func theLastWholeSequenceCounts() throws {
        let pair = try pair()
        var old = entries(pair, start: 0, number: 3)
        old[1].changes[0].bytes = [UInt8](repeating: 0xcd, count: 4096)
        let place = old.reduce(0) { $0 + $1.bytes.count }
        var torn = Entry(
            number: 9, tail: UInt32(place), changes: [(UInt64(pair.table), nil, 4096)], flushedSize: 0, lastSize: 0
        ).bytes
        torn[64] ^= 1
        try expectContents(
            unfinished(pair, old.map(\.bytes) + entries(pair, start: place).map(\.bytes) + [torn], start: 0),
            pair.contents)
        // Of another log, though newer.
        var other = entries(pair, start: 0, number: 100)
        for index in other.indices { other[index].id = [UInt8](repeating: 9, count: 16) }
        try expectContents(
            unfinished(pair, other.map(\.bytes) + entries(pair, start: place).map(\.bytes), start: 0), pair.contents)
        // The tail has gone on: what is before it has been done, and is not done again.
        var advanced = entries(pair, start: 0)
        advanced[1].tail = UInt32(advanced[0].bytes.count)
        advanced[1].changes.append((UInt64(pair.table) + 4096, nil, 4096))
        try expectContents(unfinished(pair, advanced.map(\.bytes), start: 0), pair.contents)
    }

    /// A file that the crash has left shorter than the log says it has to be: what is missing reads as zeroes.
    @Test func theFileMayHaveToGrow() throws {
        let pair = try pair()
        // Where the last block that was allocated is, the file ends.
        var last = 0, block = 0
        for index in 0..<9 {
            let entry = pair.after.littleEndian64(at: pair.table + index * 8), place = Int(entry & ~0xfffff)
            if entry & 7 == 6, place > last { (last, block) = (place, index) }
        }
        #expect(last > 4 << 20)
        var short = entries(pair, start: 0)
        for index in short.indices { short[index].flushedSize = UInt64(last) }
        var contents = pair.contents
        contents.replaceSubrange(block << 20..<(block + 1) << 20, with: [UInt8](repeating: 0, count: 1 << 20))
        try expectContents(Array(unfinished(pair, short.map(\.bytes), start: 0)[..<last]), contents)
    }

    /// Logs that were made to harm the program that opens the image, or that are incomplete.
    @Test func hostileLogsAreRefused() throws {
        let pair = try pair(), good = entries(pair, start: 0)
        func refusal(_ file: [UInt8], _ words: String, _ comment: String) throws {
            let path = try directory.write("dirty.vhdx", file)
            #expect("\(openError(path, readOnly).map { "\($0)" } ?? "")".contains(words), "\(comment)")
        }
        let none = "no complete sequence", single = good[1].bytes
        try expectContents(
            unfinished(pair, [single], start: 0) {
                $0.replaceSubrange(pair.table + 4096..<pair.table + 8192, with: [UInt8](repeating: 0, count: 4096))
            }, pair.contents)
        try refusal(unfinished(pair, [], start: 0), none, "empty")
        // Each byte of the header, the descriptor and the marks of the data counts.
        for place in Array(0..<96) + [4096, 4100, 5000, 8188] where place != 28 {
            var entry = single
            entry[place] ^= 0x10
            try refusal(unfinished(pair, [entry], start: 0), none, "byte \(place)")
        }
        // With a checksum that is right.
        typealias Field = HostileFormatTests.Field
        for (field, value, words) in [
            (Field("length", 8, 4), 0, none), (Field("length", 8, 4), 4096, none), (Field("length", 8, 4), 8191, none),
            (Field("length", 8, 4), 1 << 31, none),
            (Field("tail", 12, 4), 4096, none), (Field("tail", 12, 4), 1, none),
            (Field("tail", 12, 4), UInt64(UInt32.max), none),
            (Field("number", 16, 8), 0, none), (Field("number", 16, 8), 9, none),
            (Field("descriptors", 24, 4), 2, none),
            (Field("descriptors", 24, 4), UInt64(UInt32.max), none),
            (Field("flushed", 48, 8), UInt64(pair.after.count) + 1, "the file that its log describes"),
            (Field("flushed", 48, 8), .max, "the file that its log describes"),
            (Field("last", 56, 8), .max, "requires a file of"),
            (Field("descriptor", 64, 4), 0, none), (Field("place", 80, 8), 1, none),
            (Field("place", 80, 8), .max & ~4095, none),
            (Field("place", 80, 8), 0, "a change of data, at byte 0"),
            (Field("place", 80, 8), UInt64(pair.log), "a change of data"),
            (Field("place", 80, 8), UInt64(pair.after.count) & ~4095, "a change of data"),
            (Field("descriptor's number", 88, 8), 1, none),
            (Field("mark", 4096, 4), 0, none), (Field("high number", 4100, 4), 1, none),
            (Field("low number", 8188, 4), 1, none),
        ] as [(Field, UInt64, String)] {
            var entry = single
            field.put(value, into: &entry)
            Entry.seal(&entry)
            try refusal(unfinished(pair, [entry], start: 0), words, "\(field.name) \(value)")
        }
        // Zeroes without end.
        var zeroes = good[0]
        zeroes.changes = [(UInt64(pair.table), nil, 1 << 60)]
        try refusal(unfinished(pair, [zeroes.bytes], start: 0), "a change of data", "zeroes")
        // Every sector begins an entry as long as the log.
        var greedy = single
        Field("", 8, 4).put(UInt64(pair.logSize), into: &greedy)
        try refusal(
            unfinished(pair, [[UInt8]](repeating: Array(greedy[..<4096]), count: pair.logSize / 4096), start: 0), none,
            "greedy")
        // What the file's header says of the log.
        for (field, value, words) in [
            (Field("version", 64, 2), 1, "version 1 of its log"), (Field("size", 68, 4), 0, "a log of 0 bytes"),
            (Field("size", 68, 4), 4096, "a log of 4096 bytes"),
            (Field("size", 68, 4), 0xfff0_0000, "the log ends"), (Field("place", 72, 8), 0, "at byte 0"),
            (Field("place", 72, 8), 1 << 19, "at byte"),
            (Field("place", 72, 8), 1 << 62, "the log ends"), (Field("place", 72, 8), .max & ~0xfffff, "the log ends"),
            (Field("place", 72, 8), UInt64(pair.table), none),
        ] as [(Field, UInt64, String)] {
            let file = unfinished(pair, [single], start: 0) { file in
                for header in [64 << 10, 128 << 10] {
                    Field("", header + field.place, field.width).put(value, into: &file)
                }
            }
            try refusal(file, words, "header's \(field.name) \(value)")
        }
        var long = unfinished(pair, [single], start: 0) { file in
            for header in [64 << 10, 128 << 10] { Field("", header + 68, 4).put(17 << 20, into: &file) }
        }
        long += [UInt8](repeating: 0, count: 32 << 20)
        try refusal(long, "a log of 17825792 bytes", "long")
    }
}

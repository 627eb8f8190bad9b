// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct FileRotationTests {
    /// A file and those beside it, in a directory that goes with the object.
    private final class Files {
        let directory: String
        let file: FileDescriptor
        let rotation: FileRotation
        var path: String { directory + "/log" }

        init(limit: UInt64, backups: Int, contents: [UInt8] = []) throws {
            var template = Array("/tmp/swkvm-rotation.XXXXXX".utf8CString)
            try #require(mkdtemp(&template) != nil)
            directory = String(decoding: template.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
            file = try FileDescriptor.open(directory + "/log", O_RDWR | O_APPEND | O_CREAT, mode: 0o600)
            try file.writeAll(contents)
            rotation = FileRotation(limit: limit, size: UInt64(contents.count))
            for index in 0..<backups {
                rotation.add(try FileDescriptor.open(directory + "/log.\(index + 1)", O_RDWR | O_CREAT, mode: 0o600))
            }
        }

        deinit {
            for name in ["", ".1", ".2", ".3"] { unlink(directory + "/log" + name) }
            rmdir(directory)
        }

        func write(_ text: String) throws { try write(Array(text.utf8)) }

        func write(_ bytes: [UInt8]) throws {
            var rest = bytes[...]
            var vain = 0
            while !rest.isEmpty, vain < 2 {
                let count = try rotation.write(rest, to: file)
                rest = rest.dropFirst(count)
                vain = count == 0 ? vain + 1 : 0
            }
            #expect(rest.isEmpty)
        }

        func contents(_ name: String = "") throws -> String {
            String(decoding: try readFile(path + name, limit: 1 << 20), as: UTF8.self)
        }
    }

    @Test func olderOutputMovesOn() throws {
        let files = try Files(limit: 10, backups: 2)
        for line in ["first\n", "second\n", "third\n", "fourth\n"] { try files.write(line) }
        #expect(try files.contents() == "fourth\n")
        #expect(try files.contents(".1") == "third\n")
        #expect(try files.contents(".2") == "second\n")
    }

    /// Lines stay whole where they fit, and a shorter file leaves nothing of a longer one behind.
    @Test func linesStayWhole() throws {
        let files = try Files(limit: 12, backups: 1)
        try files.write("0123456789\nab")
        #expect(try files.contents() == "ab" && files.contents(".1") == "0123456789\n")
        try files.write("c\nde\nfghijklmnop\n")
        #expect(try files.contents() == "fghijklmnop\n" && files.contents(".1") == "abc\nde\n")
    }

    /// Output without lines, in pieces of any length: no file is ever longer, and nothing between is lost.
    @Test(arguments: 0..<20 as Range<UInt64>) func noFileExceedsItsSize(seed: UInt64) throws {
        var generator = SeededGenerator(seed: seed)
        let limit = Int.random(in: 1...300, using: &generator)
        let files = try Files(limit: UInt64(limit), backups: 3)
        var all: [UInt8] = []
        for _ in 0..<40 {
            let piece = (0..<Int.random(in: 0...200, using: &generator)).map { _ in
                UInt8.random(in: 0...20, using: &generator) + (Bool.random(using: &generator) ? 0x61 : 0)
            }
            all += piece
            try files.write(piece)
            for name in ["", ".1", ".2", ".3"] { #expect(try files.contents(name).utf8.count <= limit) }
        }
        let kept = try [".3", ".2", ".1", ""].map { Array(try files.contents($0).utf8) }.joined()
        #expect(Array(kept) == Array(all.suffix(kept.count)))
        #expect(kept.count == all.count || kept.count >= limit)
    }

    /// From an earlier run with a larger size, or without one.
    @Test func aFileThatIsTooLongIsRotatedFirst() throws {
        let files = try Files(limit: 10, backups: 1, contents: Array("0123456789abcdef".utf8))
        try files.write("new\n")
        #expect(try files.contents() == "new\n" && files.contents(".1") == "0123456789")
    }

    /// The file system is full: the file goes on, and does not grow.
    @Test func whatABackupDoesNotTakeIsLost() throws {
        let files = try Files(limit: 4, backups: 0)
        // Writes to it fail with ENOSPC.
        files.rotation.add(try FileDescriptor.open("/dev/full", O_RDWR))
        for text in ["abc\n", "def\n", "ghi\n"] { try files.write(text) }
        #expect(try files.contents() == "ghi\n")
    }
}

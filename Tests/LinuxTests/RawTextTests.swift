// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Text that stands for bytes.
@Suite(.timed) struct RawTextTests {
    /// Whatever the bytes are, they come back, and two are never one.
    @Test func bytesComeBack() {
        var all: Set<[UInt8]> = []
        for first in 0...255 as ClosedRange<UInt8> {
            for rest in [[], [0x80], [0xbf], [0x41], [0x8f, 0x9f, 0xa9], [0xa0, 0x80], [0xcc, 0x81]] as [[UInt8]] {
                for bytes in [[first] + rest, [0x2f, first] + rest + [0x2f], rest + [first]] {
                    #expect(String(raw: bytes).rawBytes == bytes)
                    all.insert(bytes)
                }
            }
        }
        #expect(Set(all.map { Array(String(raw: $0).utf8) }).count == all.count)
        // The scalars that stand for bytes, in a name, are four bytes each.
        let taken = "\u{10f7e9}"
        #expect(
            String(raw: Array(taken.utf8)).unicodeScalars.count == 4
                && String(raw: Array(taken.utf8)).rawBytes == Array(taken.utf8))
        #expect(taken.rawBytes == [0xe9])
    }

    @Test func textIsItself() {
        for text in ["", "disk.qcow2", "h\u{e4}\u{df} \u{6f22} \u{1f642}", "me\u{301}", "\u{10ffff}\u{f8ff}"] {
            #expect(
                String(raw: Array(text.utf8)).utf8.elementsEqual(text.utf8) && text.rawBytes == Array(text.utf8)
                    && !text.hasRawScalars)
            #expect(text.withRawCString { unsafe String(cString: $0) }.utf8.elementsEqual(text.utf8))
        }
        #expect(
            String(raw: [0x6d, 0xe9]).withRawCString { unsafe [$0[0], $0[1], $0[2]] } == [
                0x6d, CChar(bitPattern: 0xe9), 0,
            ])
    }

    /// Nothing moves the cursor, changes colours or the direction, or looks like something else.
    @Test func printable() {
        for (text, printed) in [
            ("h\u{e4}\u{df} \u{6f22} \u{1f642}", "h\u{e4}\u{df} \u{6f22} \u{1f642}"),
            ("a\nb\u{1b}[2J", "a\\nb\\u{1B}[2J"), ("\u{202e}txt\u{9b}", "\\u{202E}txt\\u{009B}"),
            (String(raw: [0x6d, 0xe9, 0x80]), "m\\xe9\\x80"),
        ] { #expect(text.printable == printed) }
    }

    @Test func files() throws {
        let path = String(raw: Array("/tmp/swkvm-raw-\(getpid())-".utf8) + [0xe9])
        _ = try FileDescriptor.open(path, O_WRONLY | O_CREAT, mode: 0o600)
        #expect(
            fileStatus(ofPath: path) != nil && fileStatus(ofPath: path.replacing("\u{10f7e9}", with: "\u{fffd}")) == nil
        )
        removeName(path)
        #expect(fileStatus(ofPath: path) == nil)
    }
}

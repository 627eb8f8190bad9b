// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Linux
@testable import swkvm
import TestSupport
import Testing

/// What `swkvm image` writes: JSON, sizes, and how far a long work is.
@Suite(.timed) struct ImageOutputTests {
    @Test func textInJSONIsEscaped() {
        for (text, quoted) in [
            ("", #""""#), ("plain", #""plain""#), ("a\"b\\c", #""a\"b\\c""#), ("\n\r\t", #""\n\r\t""#),
            ("\0\u{1b}[2J\u{7f}", #""\u0000\u001b[2J\u007f""#),
            ("häß 漢 🙂", #""häß 漢 🙂""#),
        ] {
            #expect(JSON.string(text).line == quoted)
        }
    }

    @Test func numbersInJSON() {
        #expect(JSON.number(.max).line == "18446744073709551615")
        for (number, text) in [
            (0, "0.000"), (1.5, "1.500"), (0.0004, "0.000"), (0.0005, "0.001"), (12.3456, "12.346"), (-3, "0.000"),
            (1e300, "1000000000000000.000"),
        ] as [(Double, String)] {
            #expect(JSON.decimal(number).line == text, "\(number)")
        }
        #expect(JSON.bool(true).line == "true" && (false as JSON).line == "false")
    }

    /// On one line, as `map` has its extents, and over several, as `info` has all.
    @Test func objectsAndArrays() {
        let value = JSON.object([
            ("name", "a"), ("none", nil), ("list", .array([.number(1), .object([("x", false)])])),
            ("empty", .array([])), ("nothing", .object([])),
        ])
        #expect(value.line == #"{ "name": "a", "list": [1, { "x": false}], "empty": [], "nothing": { }}"#)
        #expect(
            value.description == """
                {
                    "name": "a",
                    "list": [
                        1,
                        {
                            "x": false
                        }
                    ],
                    "empty": [],
                    "nothing": {
                    }
                }
                """)
        #expect(JSON.array([]).description == "[]")
    }

    @Test func progressInWords() {
        func text(_ done: UInt64, _ total: UInt64, _ seconds: Double) -> String {
            ProgressLine.text(done: done, total: total, seconds: seconds)
        }
        #expect(text(0, 1 << 30, 0) == "0.0%  0 B of 1 GiB")
        #expect(text(0, 1 << 30, 3) == "0.0%  0 B of 1 GiB")
        #expect(text(1 << 29, 1 << 30, 2) == "50.0%  512 MiB of 1 GiB  256 MiB/s  2 s left")
        #expect(text(1 << 30, 1 << 30, 2) == "100.0%  1 GiB of 1 GiB  512 MiB/s")
        // It is over when it is over, and not before.
        #expect(text(1 << 30 - 1, 1 << 30, 1).hasPrefix("99.9%  "))
        // Nothing to be done; a clock that stands still, and one that is too quick.
        #expect(text(0, 0, 0) == "100.0%  0 B of 0 B")
        #expect(text(5, 10, 0) == "50.0%  5 B of 10 B")
        #expect(text(1 << 60, 1 << 61, 1e-9).hasSuffix("  1 s left"))
        #expect(text(1, 1 << 62, 1e6).hasSuffix("  277777 h 46 min left"))
    }

    @Test func durations() {
        for (seconds, text) in [
            (0, "0 s"), (-5, "0 s"), (0.2, "1 s"), (59, "59 s"), (59.5, "1 min 0 s"), (200, "3 min 20 s"),
            (3599, "59 min 59 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min"),
            (.infinity, "277777 h 46 min"),
        ] as [(Double, String)] {
            #expect(ProgressLine.duration(seconds) == text, "\(seconds)")
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// `swkvm run --metadata`.
@Suite(.timed) struct MetadataOptionTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    private func expectRefusal(_ words: [String], _ status: Int32, _ text: String) throws {
        let machine = try Program.machine(words)
        try machine.expectEnd(status)
        #expect(machine.errors.text.hasPrefix("swkvm: " + text), "\(machine.story)")
    }

    @Test func whatCannotBeServedIsRefused() throws {
        let file = try directory.write(Array("{\"a\":1}".utf8), to: "m.json")
        try expectRefusal(
            ["--metadata", file], 64, "the option --metadata requires a network interface: specify --net")
        try expectRefusal(
            ["--metadata", file, "--net", "tap=swtest0,queues=2"], 64,
            "the option --metadata requires interfaces with one pair of queues; queues=2 was requested")
        for (words, text) in [
            (",version=3", "version=3 is not recognized; expected version=1 or version=2"),
            (",address=10.0.0.1", "address=10.0.0.1 is not a link-local IPv4 address"), (",x", "'x' is not recognized"),
        ] {
            let machine = try Program.machine(["--metadata", file + words, "--net", "user"])
            try machine.expectEnd(64)
            #expect(machine.errors.text.contains(text), "\(machine.story)")
        }
        let missing = directory("none")
        try expectRefusal(
            ["--metadata", missing, "--net", "user"], 66, "metadata \"\(missing)\": open: No such file or directory")
        let broken = try directory.write(Array("{\"a\":}".utf8), to: "broken.json")
        try expectRefusal(
            ["--metadata", broken, "--net", "user"], 66, "metadata \"\(broken)\": not JSON: expected a value at byte 5")
        let long = try directory.write([UInt8](repeating: 0x20, count: 51_201), to: "long.json")
        try expectRefusal(
            ["--metadata", long, "--net", "user"], 66, "metadata \"\(long)\": it is longer than 51200 bytes")
    }
}

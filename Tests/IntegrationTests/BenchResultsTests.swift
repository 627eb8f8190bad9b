// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// `make bench-compare` with files of results.
@Suite(.timed) struct BenchResultsTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    private func file(_ name: String, _ lines: String...) throws -> String {
        try directory.write(Array((lines.joined(separator: "\n") + "\n").utf8), to: name)
    }

    /// Compares two files, and returns the cells of each line of the table, without its titles and the rule below them.
    private func compare(
        _ old: String, _ new: String, limit: String? = nil, status: Int32 = 0
    ) throws -> [[String]] {
        // The build of the tests puts it beside them.
        let tests = try #require(CommandLine.arguments.first)
        let bench = String(tests[..<(tests.lastIndex(of: "/") ?? tests.startIndex)]) + "/swkvm-bench"
        let program = try Program(
            ["env"] + (limit.map { ["BENCH_LIMIT=\($0)"] } ?? []) + [bench, "--compare", old, new])
        #expect(try program.waitForEnd() == .status(status), "\(program.story)")
        return program.output.lines.filter { $0.hasPrefix("| ") }.dropFirst(2).map { line in
            line.split(separator: "|", omittingEmptySubsequences: false).dropFirst().dropLast().map { cell in
                cell.split(separator: " ").joined(separator: " ")
            }
        }
    }

    private static let slow =
        #"{"figure":"start","unit":"ms","values":[10,20,30],"peer":"other","peerValues":[20,40,60]}"#
    private static let fast =
        #"{"figure":"start","unit":"ms","values":[5,10,15],"peer":"other","peerValues":[20,40,60]}"#

    @Test func aShorterTimeIsAGain() throws {
        let old = try file("old", Self.slow), new = try file("new", Self.fast)
        #expect(
            try compare(old, new, limit: "0.97") == [["start", "ms", "20.0", "10.0", "0.50", "other", "0.50", "2.00"]])
        #expect(try compare(new, old, limit: "0.97", status: 1).first?.last == "0.50 WORSE")
        // Without a limit the table only says so.
        #expect(try compare(new, old).first?.last == "0.50 WORSE")
    }

    @Test func aHigherRateIsAGain() throws {
        let old = try file("old", #"{"figure":"reads","unit":"1000/s","values":[100]}"#)
        let new = try file("new", #"{"figure":"reads","unit":"1000/s","values":[150]}"#)
        #expect(try compare(old, new, limit: "1") == [["reads", "1000/s", "100", "150", "1.50", "", "", "1.50"]])
        _ = try compare(new, old, limit: "1", status: 1)
    }

    /// A host that was twice as slow for both programs leaves the ratio beside the peer at one.
    @Test func aSlowerHostIsSeparatedFromASlowerProgram() throws {
        let old = try file("old", Self.fast)
        let new = try file(
            "new", #"{"figure":"start","unit":"ms","values":[10,20,30],"peer":"other","peerValues":[40,80,120]}"#)
        #expect(try compare(old, new).first?[6] == "1.00")
    }

    @Test func runsOfOneFileBelongTogetherAndTablesAreRead() throws {
        let table = """
            | figure | unit | n  | swkvm (middle half) | beside | its figure (middle half) | ratio | target | reached |
            | ------ | ---- | -- | ------------------- | ------ | ------------------------ | ----- | ------ | ------- |
            | start  | ms   | 20 | 10.0 (9.0 – 11.0)   | other  | 40.0 (39.0 – 41.0)       | 0.25  | ≤ 0.25 | yes     |
            """
        let old = try file("old", "some text", table), new = try file("new", Self.slow, Self.slow)
        #expect(
            try compare(old, new) == [["start", "ms", "10.0", "20.0", "2.00", "other", "2.00", "0.50 WORSE"]])
    }

    @Test(arguments: [#"{"figure":1}"#, "no figures", #"{"figure":"other","unit":"ms","values":[1]}"#])
    func resultsThatCannotBeComparedAreAnError(text: String) throws {
        #expect(try compare(try file("old", text), try file("new", Self.slow), status: 2).isEmpty)
    }
}

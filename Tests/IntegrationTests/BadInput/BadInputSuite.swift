// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// What a user can get wrong, and what a host can lack: one sentence on standard error, a status that tells, and
/// nothing left behind.
protocol BadInputSuite {
    var directory: TemporaryDirectory { get }
    /// Where a network would be made.
    var host: Namespace { get }
}

/// The exit statuses that are expected.
enum Status { static let usage: Int32 = 64, input: Int32 = 66, host: Int32 = 71 }

extension BadInputSuite {
    /// Runs a machine that cannot be, with a console's socket, a bridge and a TAP that would be made for it.
    /// - Parameter sentence: how the only line on standard error begins, after the program's name.
    func expectRefused(
        _ arguments: [String], _ sentence: String, status: Int32 = Status.host, withNetwork: Bool = true,
        passing: [(descriptor: Int32, number: Int32)] = [], sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let network = withNetwork ? ["--net", "tap=left0,bridge=left1,create"] : []
        let filesBefore = try directory.contents
        let linksBefore = try host.linkNames()
        let machine = try Program.machine(
            arguments + network + ["--console", "unix:" + directory("left.socket")], in: host, passing: passing)
        try machine.expectEnd(status, sourceLocation: sourceLocation)
        expectSentence(machine, sentence, sourceLocation: sourceLocation)
        #expect(try directory.contents == filesBefore, sourceLocation: sourceLocation)
        #expect(try eventually { try host.linkNames() == linksBefore }, sourceLocation: sourceLocation)
    }

    func expectSentence(_ machine: Program, _ sentence: String, sourceLocation: SourceLocation) {
        #expect(machine.output.bytes.isEmpty, sourceLocation: sourceLocation)
        #expect(
            machine.errors.text.hasPrefix("swkvm: " + sentence), "\(machine.errors.text)",
            sourceLocation: sourceLocation)
        #expect(machine.errors.lines.count == 1, "\(machine.errors.text)", sourceLocation: sourceLocation)
        #expect(machine.errors.text.hasSuffix("\n"), sourceLocation: sourceLocation)
    }
}

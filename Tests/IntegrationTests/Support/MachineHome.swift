// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import Testing

/// Defined machines of a test's own, in a directory that is removed with the object; those that run are ended.
final class MachineHome {
    let directory: TemporaryDirectory
    var path: String { directory("home") }

    init() throws { directory = try TemporaryDirectory() }

    deinit {
        let files = (try? shell("ls '\(path)'/machines/*/pid 2>/dev/null || true").split(separator: "\n")) ?? []
        for file in files {
            guard let text = try? shell("cat '\(file)' 2>/dev/null || true"),
                let number = pid_t(text.filter(\.isNumber))
            else { continue }
            // Of a machine that was killed, the file is still there, and another process may have its number.
            guard let owner = try? ProcessFile.owner(String(file)), owner.number == number else { continue }
            try? owner.send(signal: SIGKILL)
            _ = owner.waitForEnd(milliseconds: 10_000)
        }
    }

    func start(
        _ arguments: [String], environment: [String] = [], input: Program.Stream = .null,
        terminal: PseudoTerminal? = nil
    ) throws -> Program {
        try Program(
            ["env", "SWKVM_HOME=\(path)", "HOME=\(directory.path)"] + environment + [Host.swkvm] + arguments,
            input: input,
            terminal: terminal)
    }

    /// Runs a verb to its end.
    @discardableResult func swkvm(
        _ arguments: String..., status: Int32 = 0, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> Program {
        let program = try start(arguments)
        #expect(try program.waitForEnd() == .status(status), "\(program.story)", sourceLocation: sourceLocation)
        return program
    }

    /// The machines as `list` shows them: name and state.
    var states: [String] {
        get throws {
            try swkvm("list").output.lines.dropFirst().map { line in
                line.split(separator: " ").prefix(2).joined(separator: " ")
            }
        }
    }

    /// A machine's definition.
    func definition(of name: String) throws -> String { try shell("cat '\(path)/definitions/\(name).toml'") }

    /// What is in a machine's directory.
    func files(of name: String) throws -> [String] {
        try shell("ls -A '\(path)/machines/\(name)' 2>/dev/null || true").split(separator: "\n").map(String.init)
    }
}

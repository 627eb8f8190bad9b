// SPDX-License-Identifier: Apache-2.0

import Foundation

@testable import swkvm

/// The commands and their options, as the parser describes them.
struct CommandTree: Decodable {
    struct Name: Decodable {
        let kind: String
        let name: String
        var spelling: String { (kind == "long" ? "--" : "-") + name }
    }

    /// How a shell completes a value: `file`, `list`, `shellCommand` …
    struct Completion: Decodable {
        let kind: String

        private struct Key: CodingKey {
            let stringValue: String
            var intValue: Int? { nil }
            init(stringValue: String) { self.stringValue = stringValue }
            init?(intValue: Int) { nil }
        }

        init(from decoder: any Decoder) throws {
            kind = try decoder.container(keyedBy: Key.self).allKeys.first?.stringValue ?? ""
        }
    }

    struct Argument: Decodable {
        /// `positional`, `option` or `flag`.
        let kind: String
        let names: [Name]?
        let shouldDisplay: Bool
        let valueName: String?
        let abstract: String?
        let defaultValue: String?
        let completionKind: Completion?
    }

    let commandName: String
    let abstract: String?
    let discussion: String?
    let shouldDisplay: Bool
    let subcommands: [CommandTree]?
    let arguments: [Argument]?

    private struct Dump: Decodable { let command: CommandTree }

    static func whole() throws -> CommandTree {
        try JSONDecoder().decode(Dump.self, from: Data(Command._dumpHelp().utf8)).command
    }

    /// This command and all below it, each with the words that lead to it, without the program's name; `help` is the
    /// parser's.
    func all(_ path: [String] = []) -> [(path: [String], command: CommandTree)] {
        [(path, self)]
            + (subcommands ?? []).filter { $0.commandName != "help" }.flatMap { $0.all(path + [$0.commandName]) }
    }
}

// SPDX-License-Identifier: Apache-2.0

/// A command as `swkvm --experimental-dump-help` describes it (swift-argument-parser's ToolInfo, version 0).
struct CommandDescription: Decodable {
    struct Name: Decodable {
        let kind: String
        let name: String
    }

    struct Argument: Decodable {
        let kind: String
        let shouldDisplay: Bool
        let isOptional: Bool
        let isRepeating: Bool
        let names: [Name]?
        let valueName: String?
        let defaultValue: String?
        let allValues: [String]?
        let abstract: String?
        let discussion: String?
    }

    struct Dump: Decodable { let command: CommandDescription }

    let commandName: String
    let shouldDisplay: Bool
    let abstract: String?
    let discussion: String?
    let subcommands: [CommandDescription]?
    let arguments: [Argument]?

    /// The commands below this one that have pages; `help` is the parser's and says no more than `--help`.
    var pages: [CommandDescription] { (subcommands ?? []).filter { $0.shouldDisplay && $0.commandName != "help" } }
}

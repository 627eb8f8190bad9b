// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import TestSupport
import Testing

@testable import swkvm

@Suite(.timed) struct CompletionScriptTests {
    @Test(arguments: [["--generate-completion-script", "bash"], ["--generate-completion-script=bash"]]) func isAskedFor(
        words: [String]
    ) {
        #expect(CompletionScript.asked(for: words) == CompletionScript.text(for: .bash))
    }

    @Test(arguments: [
        [], ["run"], ["--generate-completion-script", "tcsh"], ["--generate-completion-scripts", "bash"],
        ["--generate-completion-script", "bash", "zsh"],
    ])
    func othersAreTheParsersAffair(words: [String]) { #expect(CompletionScript.asked(for: words) == nil) }

    /// The parser's calls of shell commands are calls of the script's own functions, all of them; a newer parser may
    /// write them otherwise.
    @Test(arguments: ["bash", "zsh", "fish"]) func noCallIsLeftAsTheParserWritesIt(name: String) throws {
        let script = CompletionScript.text(for: try #require(CompletionShell(rawValue: name)))
        #expect(
            !script.contains("eval '__swkvm") && !script.contains("$(__swkvm_list") && !script.contains("(__swkvm_word")
        )
        #expect(!script.contains("(__swkvm_list"))
        let calls = script.split(separator: "\n").filter {
            $0.contains("__swkvm_list ") || $0.contains("__swkvm_word ")
        }
        if name != "fish" { #expect(calls.count >= 7, "\(calls)") }
    }

    /// Every option and argument with a path completes files; and the values that a help lists are completed.
    @Test func everyPathAndEveryListHasACompletion() throws {
        var paths = 0
        for (path, command) in try CommandTree.whole().all() {
            for argument in command.arguments ?? [] where argument.kind != "flag" {
                let name = argument.names?.last?.spelling ?? argument.valueName ?? ""
                let isPath =
                    argument.kind == "positional"
                    ? ["file", "first", "second", "source", "target"].contains(name) : argument.valueName == "file"
                if isPath { #expect(argument.completionKind?.kind == "file", "\(path) \(name)") }
                if argument.valueName == "format" {
                    #expect(argument.completionKind?.kind == "list", "\(path) \(name)")
                }
                paths += isPath ? 1 : 0
            }
        }
        #expect(paths > 35)
    }

    /// What is offered in a list is known to it, and what it knows is offered.
    @Test(arguments: ["disk", "net", "numa", "rng"]) func whatIsOfferedIsTaken(option: String) throws {
        let script = CompletionScript.text(for: .bash)
        let lines = script.split(separator: "\n")
        let start = try #require(lines.firstIndex { $0 == "_swkvm_run() {" })
        let place = try #require(lines[start...].firstIndex { $0.hasSuffix("'--\(option)')") })
        let call = lines[place + 1].split(separator: " ")
        #expect(call.first == "__swkvm_list")
        var offered: Set<Substring> = []
        for token in call.dropFirst(2) {
            let key = token.drop { $0 == "+" }.prefix { $0 != "%" }
            let name = key.prefix { $0 != "=" }
            offered.insert(name)
            let values =
                key.contains("=")
                ? key.dropFirst(name.count + 1).split(separator: "/", omittingEmptySubsequences: false) : []
            for value in values.isEmpty ? [nil] : values.map(Optional.some) {
                let part = value.map { "\(name)=" + ($0.isEmpty || $0.hasPrefix("@") ? "1" : $0) } ?? "\(name)"
                #expect(!problem(option, part).contains("is not recognized"), "\(part): \(problem(option, part))")
            }
        }
        let wanted =
            problem(option, "no-such-word").split(separator: "expected ").last?.split { $0 == " " || $0 == "," } ?? []
        for word in wanted where word != "or" { #expect(offered.contains(word.prefix { $0 != "=" }), "\(word)") }
    }

    private func problem(_ option: String, _ part: String) -> String {
        let value = option == "disk" ? "d.raw,\(part)" : option == "numa" ? "mem=1G,\(part)" : part
        do { _ = try Command.parseAsRoot(["run", "--\(option)=\(value)"]) } catch { return Command.message(for: error) }
        return ""
    }
}

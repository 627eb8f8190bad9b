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

    /// fish has no function for lists: it offers files, or words.
    @Test func listsInFish() throws {
        let lines = CompletionScript.text(for: .fish).split(separator: "\n").filter { $0.contains("\"swkvm run") }
        func end(of option: String) throws -> Substring {
            try #require(lines.first { $0.contains(" -l '\(option)' ") }).suffix(80)
        }
        for option in ["disk", "console", "kernel"] { #expect(try end(of: option).hasSuffix("' -rF"), "\(option)") }
        #expect(try end(of: "net").hasSuffix("' -rf"))
        #expect(
            try end(of: "sandbox").hasSuffix(" -rfka 'off report on namespaces user capabilities landlock seccomp'"))
        #expect(lines.contains { $0.contains("should_offer_completions_for_positional") && $0.hasSuffix(" -F") })
    }

    /// Every option and argument with a path completes files; and every value is completed in some way but those that a
    /// user makes up.
    @Test func everyPathAndEveryListHasACompletion() throws {
        var paths = 0
        let free: Set = [
            "name", "n", "size", "words", "seconds", "ms", "user", "address/bits", "new-name", "tag", "count",
        ]
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
                // The path of `image ls` is one within the image.
                let isInImage = argument.kind == "positional" && name == "path"
                if !free.contains(argument.valueName ?? ""), !isInImage {
                    #expect(argument.completionKind?.kind.isEmpty == false, "\(path) \(name)")
                }
                if argument.valueName?.split(separator: "|").contains("file") == true {
                    #expect(["file", "shellCommand"].contains(argument.completionKind?.kind), "\(path) \(name)")
                }
                paths += isPath ? 1 : 0
            }
        }
        #expect(paths > 35)
    }

    /// The words of the call that completes an option of `swkvm run` in bash.
    private func call(for option: String) throws -> [Substring] {
        let lines = CompletionScript.text(for: .bash).split(separator: "\n")
        let start = try #require(lines.firstIndex { $0 == "_swkvm_run() {" })
        let place = try #require(lines[start...].firstIndex { $0.hasSuffix("'--\(option)')") })
        return lines[place + 1].split(separator: " ")
    }

    /// IMAGE takes the options of `--disk`.
    @Test func theImageIsCompletedAsADisk() throws {
        let arguments = try #require(try CommandTree.whole().all().first { $0.path == ["run"] }?.command.arguments)
        #expect(arguments.first { $0.kind == "positional" }?.completionKind?.kind == "shellCommand")
        let script = CompletionScript.text(for: .bash)
        let call = try call(for: "disk").joined(separator: " ")
        // Also behind the name of a machine that is created.
        #expect(script.ranges(of: call).count == 4)
    }

    @Test func partsOfTheSandboxAreTaken() throws {
        let parts = try call(for: "sandbox").dropFirst(2).map { $0.prefix { $0 != "%" } }
        #expect(parts.sorted() == ["capabilities", "landlock", "namespaces", "off", "on", "report", "seccomp", "user"])
        for part in parts {
            _ = try Command.parseAsRoot(["run", "--sandbox", String(part)])
            guard !["off", "report", "on"].contains(part) else { continue }
            _ = try Command.parseAsRoot(["run", "--sandbox", "on,\(part)"])
        }
    }

    /// What is offered in a list is known to it, and what it knows is offered. A value that it refuses it answers with
    /// what is wanted.
    @Test(arguments: ["disk", "net", "numa", "rng", "balloon", "console", "cgroup"]) func whatIsOfferedIsTaken(
        option: String
    ) throws {
        let call = try call(for: option)
        #expect(call.first == (option == "console" ? "__swkvm_word" : "__swkvm_list"))
        var offered: Set<Substring> = []
        let first = option == "console" ? try #require(call.firstIndex(of: "--")) + 1 : 2
        for token in call[first...] {
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
            guard key.contains("=") else { continue }
            let refusal = problem(option, "\(name)=no?such?value")
            #expect(
                refusal.isEmpty || ["expected", "such as", ": use ", ": give "].contains { refusal.contains($0) },
                "\(refusal)")
        }
        let wanted =
            problem(option, "no-such-word").split(separator: "expected ").last?.prefix { $0 != "(" }.split {
                $0 == " " || $0 == ","
            } ?? []
        for word in wanted where word != "or" { #expect(offered.contains(word.prefix { $0 != "=" }), "\(word)") }
    }

    private func problem(_ option: String, _ part: String) -> String {
        let name = part.prefix { $0 != "=" }
        let value =
            switch option {
            case "disk", "cgroup": "d.raw,\(part)"
            case "console": "file:a,\(part)"
            case "numa" where name != "mem": "mem=1G,\(part)"
            case "net" where name != "tap" && name != "fd" && name != "no-such-word": "tap=a,\(part)"
            default: part
            }
        do { _ = try Command.parseAsRoot(["run", "--\(option)=\(value)"]) } catch { return Command.message(for: error) }
        return ""
    }
}

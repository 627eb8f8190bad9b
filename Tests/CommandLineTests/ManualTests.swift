// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import Foundation
import Machine
import TestSupport
import Testing

@testable import swkvm
@testable import swkvm_manual

/// The manual pages, as `make man` makes them.
@Suite(.timed) struct ManualTests {
    private static let date = "November 5, 2026"
    private static let pages: [Page] = (try? Manual.pages(from: Data(Command._dumpHelp().utf8), date: date)) ?? []

    private func page(_ name: String) throws -> Page { try #require(Self.pages.first { $0.name == name }) }

    /// One for each command that the help shows, named so that `man swkvm run` finds `swkvm-run`.
    @Test func everyCommandThatIsShownHasAPage() throws {
        let shown = try CommandTree.whole().all().filter(\.command.shouldDisplay).map {
            (["swkvm"] + $0.path).joined(separator: "-")
        }
        #expect(
            Self.pages.map(\.name).sorted() == shown.sorted() && shown.contains("swkvm-image-convert")
                && shown.contains("swkvm-run"))
        for page in Self.pages {
            #expect(!page.text.contains("by-option") && !page.text.contains("swkvm-help"), "\(page.name)")
        }
    }

    @Test func oneSectionOfExitStatusesEach() {
        for page in Self.pages {
            let headings = page.text.split(separator: "\n").filter { $0.hasPrefix(".Sh ") }.map { $0.dropFirst(4) }
            #expect(headings.filter { $0 == "EXIT STATUS" }.count == 1, "\(page.name)")
            #expect(Set(headings).count == headings.count && headings.first == "NAME", "\(page.name)")
            #expect(!page.statuses.isEmpty && page.statuses.contains { $0.status == "64" }, "\(page.name)")
        }
    }

    /// Commands end with what their pages say.
    @Test(
        arguments: [
            (["image", "info", "/nowhere/a.qcow2"], 1), (["image", "info"], 64),
            (["image", "compare", "/nowhere/a.raw", "/nowhere/b.raw"], 2),
            (["image", "compare", "a.raw"], 64), (["image", "check", "--format", "raw", "/dev/null"], 63),
            (["image", "check", "/nowhere/a.qcow2"], 1),
            (["image", "check"], 64), (["image", "snapshot", "list", "/nowhere/a.qcow2"], 1),
            (["image", "resize", "a.raw", "big"], 64), (["doctor", "word"], 64),
            (["run", "word"], 64), (["run", "--mem", "0"], 64), (["--frob"], 64), (["--version"], 0),
        ] as [([String], Int32)])
    func statusesAreTrue(words: [String], status: Int32) throws {
        var ended: Int32 = 0
        do {
            var command = try Command.parseAsRoot(words)
            try command.run()
        } catch { ended = Command.exitCode(for: error).rawValue }
        let names = ["swkvm"] + words.prefix { $0.allSatisfy { $0.isLetter } }
        let page = try #require(
            Self.pages.filter { names.starts(with: $0.words) }.max { $0.words.count < $1.words.count })
        #expect(page.statuses.contains { $0.status == "\(ended)" }, "\(words) ended with \(ended)")
        // Another part of the program may choose a better one meanwhile; the page has it then.
        if status != ExitStatus.hostError { #expect(ended == status) }
    }

    @Test func theStatusesOfRunAreTheMachines() throws {
        let statuses = try page("swkvm-run").statuses.map(\.status)
        for status in [
            ExitStatus.hostError, ExitStatus.tripleFault, ExitStatus.internalError, ExitStatus.unexpectedExit,
        ] {
            #expect(statuses.contains("\(status)"))
        }
    }

    /// A default that the parser knows, or that the help names, is in the page.
    @Test func defaultsAreShown() throws {
        for (path, command) in try CommandTree.whole().all() where command.shouldDisplay {
            let text = try page((["swkvm"] + path).joined(separator: "-")).text
            for argument in command.arguments ?? [] where argument.kind == "option" && argument.shouldDisplay {
                guard let value = argument.defaultValue, !value.isEmpty else { continue }
                let name = try #require(argument.names?.last)
                let item = try #require(
                    text.split(separator: ".It ").dropFirst().first {
                        $0.contains("Fl \(name.kind == "long" ? "-" : "")\(name.name)")
                    })
                #expect(item.lowercased().contains("default") && item.contains(value), "\(path) \(name.spelling)")
            }
        }
        #expect(try page("swkvm-run").text.contains("512M"))
    }

    /// As in the help.
    @Test func valuesThatCanBeLeftOutAreInBrackets() throws {
        let names = RunCommand.rules.filter { $0.kind == .optionalValue }.map(\.name)
        #expect(Page.withOptionalValue == Set(names))
        let text = try page("swkvm-run").text
        for line in [
            ".Op Fl \\-hugepages Op Ar kind", ".It Fl \\-hugepages Op Ar kind", ".Op Fl \\-rng Op Ar limit",
            ".Op Fl \\-mem Ar size",
        ] {
            #expect(text.contains(line.replacing("\\", with: "") + "\n"), "\(line)")
        }
    }

    /// A verb's page does not refer to the help of verbs.
    @Test func theStatusesOfAVerbAreItsOwn() throws {
        for page in Self.pages where page.words.count > 2 {
            #expect(page.statuses.allSatisfy { !$0.meaning.contains("verb") }, "\(page.name)")
        }
        #expect(try page("swkvm-image").text.contains("Some verbs have more exit statuses"))
    }

    @Test func helpTextsAreTakenApart() {
        let discussion = Discussion(
            """
            First line,
            going on. It's \\ here.

                a command

            EXAMPLES
              one \\
                 two

            EXIT STATUS
              0        fine
              1 to 63  the guest's,
                       or so
            """)
        #expect(
            discussion.description == [.paragraph("First line, going on. It's \\ here."), .literal(["    a command"])])
        #expect(discussion.examples == [.literal(["  one \\", "     two"])])
        #expect(
            discussion.statuses.map(\.status) == ["0", "1 to 63"]
                && discussion.statuses[1].meaning == "the guest's, or so")
    }

    // MARK: By the tools that show them

    private struct Output {
        let text: String
        let status: Int32
    }

    private func run(_ script: String, _ arguments: String...) throws -> Output {
        let process = Process(), pipe = Pipe()
        process.executableURL = URL(fileURLWithPath: "/bin/sh")
        process.arguments = ["-c", script, "sh"] + arguments
        process.standardOutput = pipe
        process.standardError = pipe
        try process.run()
        let text = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        return Output(text: text, status: process.terminationStatus)
    }

    /// Runs a script in a manual's directory that has all pages, unless a program for it is missing here.
    private func withPages(_ program: String, _ body: (_ root: String) throws -> Void) throws {
        guard try run("command -v \(program)").status == 0 else {
            return print("not tried: \(program) is not installed here")
        }
        let root = FileManager.default.temporaryDirectory.appendingPathComponent("swkvm-manual-\(UUID().uuidString)")
        defer { try? FileManager.default.removeItem(at: root) }
        let directory = root.appendingPathComponent("man1")
        try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
        for page in Self.pages {
            try Data(page.text.utf8).write(to: directory.appendingPathComponent(page.name + ".1"))
        }
        try body(root.path)
    }

    @Test func mandocHasNothingToSay() throws {
        try withPages("mandoc") { root in
            let lint = try run("cd \"$1/man1\" && mandoc -T lint -W all *.1", root)
            #expect(lint.text == "" && lint.status == 0)
        }
    }

    @Test func groffHasNothingToSay() throws {
        try withPages("groff") { root in
            let lint = try run(
                "for page in \"$1\"/man1/*.1; do groff -mandoc -ww -z -K utf8 -T utf8 \"$page\"; done", root)
            #expect(lint.text == "" && lint.status == 0)
        }
    }

    @Test(arguments: [
        ("swkvm-run", "swkvm-run"), ("swkvm run", "swkvm-run"), ("swkvm", "swkvm"), ("swkvm image", "swkvm-image"),
        ("swkvm-image-convert", "swkvm-image-convert"),
    ])
    func manFindsThem(words: String, name: String) throws {
        try withPages("man") { root in
            let shown = try run("MANPATH=\"$1\" MANWIDTH=100 LC_ALL=C.UTF-8 man -P cat \(words)", root)
            #expect(shown.status == 0 && shown.text.contains("\(name.uppercased())(1)"), "\(shown.text.prefix(500))")
            #expect(shown.text.contains("EXIT STATUS"))
        }
    }

    /// What is copied from a page works in a shell.
    @Test func optionsAndExamplesCanBeCopied() throws {
        try withPages("man") { root in
            let shown = try run("MANPATH=\"$1\" MANWIDTH=200 LC_ALL=C.UTF-8 man -P cat swkvm-run | col -b", root)
            #expect(
                shown.text.contains("swkvm run --mem 2G\n")
                    && shown.text.contains("--cmdline 'test=all'"), "\(shown.text)")
            #expect(!shown.text.contains("\u{2010}") || !shown.text.contains("\u{2010}\u{2010}"))
        }
    }
}

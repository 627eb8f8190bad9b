// SPDX-License-Identifier: Apache-2.0

import Foundation
import TestSupport
import Testing

/// What is handed out besides the program: the list of packages in it, what `make install` does, and what is said where
/// something is missing.
@Suite(.timed) struct DistributionTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    /// A release writes its list of packages beside the binary; other binaries have none.
    private static let list = URL(fileURLWithPath: Host.swkvm).deletingLastPathComponent()
        .appendingPathComponent("swkvm.spdx.json")
    private static var hasList: Bool { FileManager.default.fileExists(atPath: list.path) }
    private static let needsRelease: Comment = "needs a binary of `make release`"

    private static func document() throws -> [String: Any] {
        try #require(JSONSerialization.jsonObject(with: Data(contentsOf: list)) as? [String: Any])
    }

    // MARK: The list of packages

    /// The fields that SPDX 2.3 requires, in their forms, and references to what is there.
    @Test(.enabled(if: hasList, needsRelease)) func theListIsSPDX() throws {
        let document = try Self.document()
        #expect(document["spdxVersion"] as? String == "SPDX-2.3" && document["dataLicense"] as? String == "CC0-1.0")
        #expect(document["SPDXID"] as? String == "SPDXRef-DOCUMENT" && document["name"] as? String != "")
        #expect(URL(string: try #require(document["documentNamespace"] as? String))?.scheme == "https")
        let creation = try #require(document["creationInfo"] as? [String: Any])
        #expect(try #require(creation["created"] as? String).wholeMatch(of: /\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ/) != nil)
        #expect(try #require(creation["creators"] as? [String]).allSatisfy { $0.hasPrefix("Tool: ") })
        let packages = try #require(document["packages"] as? [[String: Any]])
        var names: Set = ["SPDXRef-DOCUMENT"]
        for package in packages {
            let id = try #require(package["SPDXID"] as? String)
            #expect(id.wholeMatch(of: /SPDXRef-[A-Za-z0-9.-]+/) != nil && names.insert(id).inserted, "\(id)")
            for field in ["name", "versionInfo", "downloadLocation", "licenseDeclared", "licenseConcluded"] {
                #expect((package[field] as? String)?.isEmpty == false, "\(id): \(field)")
            }
            #expect(package["filesAnalyzed"] as? Bool == false, "\(id)")
            for reference in package["externalRefs"] as? [[String: String]] ?? [] {
                #expect(reference["referenceCategory"] == "PACKAGE-MANAGER" && reference["referenceType"] == "purl")
                #expect(reference["referenceLocator"]?.wholeMatch(of: /pkg:(deb|swift)\/[^@ ]+@[^@ ]+/) != nil, "\(id)")
            }
        }
        let relations = try #require(document["relationships"] as? [[String: String]])
        for relation in relations {
            #expect(
                names.contains(relation["spdxElementId"] ?? "") && names.contains(relation["relatedSpdxElement"] ?? ""))
        }
        // The program, and everything that is linked into it.
        #expect(relations.filter { $0["relationshipType"] == "DESCRIBES" }.count == 1)
        #expect(relations.filter { $0["relationshipType"] == "STATIC_LINK" }.count == packages.count - 1)
        #expect(packages.count > 10)
    }

    @Test(.enabled(if: hasList, needsRelease)) func theListIsOfThisBinary() throws {
        let program = try #require((try Self.document()["packages"] as? [[String: Any]])?.first)
        let sum = try #require((program["checksums"] as? [[String: String]])?.first?["checksumValue"])
        #expect(try shell("sha256sum '\(Host.swkvm)'").hasPrefix(sum))
    }

    @Test(.enabled(if: hasList, needsRelease)) func theVersionNamesWhatIsLinked() throws {
        let short = try shell("'\(Host.swkvm)' --version"), text = try shell("'\(Host.swkvm)' --version --verbose")
        #expect(text.hasPrefix(short) && !text.contains("://"))
        let packages = try #require(try Self.document()["packages"] as? [[String: Any]])
        for package in packages.dropFirst() {
            let words = ["name", "versionInfo", "licenseDeclared"].compactMap { package[$0] as? String }
            let line = text.split(separator: "\n").first { $0.contains(" \(words[0]) ") }
            #expect(words.count == 3 && words.allSatisfy { line?.contains($0) == true }, "\(words): \(text)")
        }
    }

    /// The linker wrote down every archive from which it took something: each is of a package in the list.
    @Test(.enabled(if: hasList, needsRelease)) func everyArchiveIsOfAPackageInTheList() throws {
        let extracted = Self.list.deletingLastPathComponent().appendingPathComponent("generated/extracted.txt")
        let names = Set(
            try #require(try Self.document()["packages"] as? [[String: Any]]).compactMap { $0["name"] as? String })
        let archives = Set(
            try String(contentsOf: extracted, encoding: .utf8).split(separator: "\n").dropFirst().compactMap { line in
                line.split(separator: "\t").dropFirst().first?.prefix { $0 != "(" }
            })
        #expect(archives.count > 10)
        for archive in archives {
            if archive.contains("/swift_static/") {
                #expect(names.contains("swift-runtime"))
            } else {
                // Debian's directories are links to each other: a package's file has either name.
                let owner = try shell(
                    "dpkg-query -S '\(archive)' 2>/dev/null || dpkg-query -S \"$(realpath '\(archive)')\"")
                #expect(names.contains(String(owner.prefix { $0 != ":" })), "\(archive): \(owner)")
            }
        }
    }

    /// Foundation and regular expressions are several megabytes, which the runtime also searches at a start.
    @Test(.enabled(if: hasList, needsRelease)) func largeLibrariesAreNotLinked() throws {
        let extracted = Self.list.deletingLastPathComponent().appendingPathComponent("generated/extracted.txt")
        let text = try String(contentsOf: extracted, encoding: .utf8)
        #expect(text.contains("/libswiftCore.a("))
        for library in ["Foundation", "_FoundationCollections", "swift_StringProcessing", "swift_RegexParser"] {
            #expect(!text.contains("/lib\(library)"), "\(library)")
        }
    }

    /// `make man` reads it.
    @Test(.enabled(if: hasList, needsRelease)) func theCommandsDescribeThemselves() throws {
        let text = try shell("'\(Host.swkvm)' --experimental-dump-help")
        let document = try #require(JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any])
        let command = try #require(document["command"] as? [String: Any])
        let names = (command["subcommands"] as? [[String: Any]])?.compactMap { $0["commandName"] as? String }
        #expect(command["commandName"] as? String == "swkvm" && names?.contains("run") == true)
    }

    // MARK: make install, make uninstall

    /// A tree as `make` leaves it, with empty files.
    private func builtTree() throws -> String {
        try shell(
            """
            cd '\(directory.path)'; mkdir -p tree/.ci tree/build/man tree/build/completions tree/packaging
            cp '\(Host.package)/.ci/install' tree/.ci; cp -r '\(Host.package)/packaging/ocf' tree/packaging
            """)
        return directory("tree")
    }

    @Test func installBuildsNothing() throws {
        let tree = try builtTree()
        let program = try Program([tree + "/.ci/install", directory("prefix")])
        try program.expectEnd(1)
        #expect(program.errors.text.hasPrefix("make install: there is no build/swkvm: run `make` first"))
        #expect(access(directory("prefix"), F_OK) != 0)
    }

    @Test func installAndUninstall() throws {
        let tree = try builtTree()
        try shell(
            """
            cd '\(tree)/build'
            touch swkvm man/swkvm.1 man/swkvm-run.1 completions/swkvm.bash completions/swkvm.zsh completions/swkvm.fish
            ../.ci/install '\(directory("prefix"))'
            """)
        let found = try shell("cd '\(directory("prefix"))'; find . -type f -printf '%m %P\\n' | sort -k 2")
        #expect(
            found == """
                755 bin/swkvm
                755 lib/ocf/resource.d/swkvm/Machine
                644 share/bash-completion/completions/swkvm
                644 share/fish/vendor_completions.d/swkvm.fish
                644 share/man/man1/swkvm-run.1
                644 share/man/man1/swkvm.1
                644 share/zsh/site-functions/_swkvm

                """)
        // Somebody else's file stays, and what is swkvm's goes, also without anything built.
        try shell(
            "touch '\(directory("prefix"))/bin/other'; rm -r '\(tree)/build'; '\(tree)/.ci/install' --remove '\(directory("prefix"))'"
        )
        #expect(try shell("cd '\(directory("prefix"))'; find . -type f -printf '%P\\n'") == "bin/other\n")
    }

    /// One that is relative would be joined with DESTDIR, or be below the sources.
    @Test func thePrefixIsAbsolute() throws {
        let makefile = Host.package + "/Makefile", stage = directory("stage")
        for target in ["install", "uninstall"] {
            let text = try shell("make -f '\(makefile)' -n \(target) PREFIX=relative DESTDIR='\(stage)'")
            #expect(text.contains(#""relative" "\#(stage)""#), "\(text)")
        }
        let tree = try builtTree()
        try shell(
            """
            cd '\(tree)/build'
            touch swkvm man/swkvm.1 completions/swkvm.bash completions/swkvm.zsh completions/swkvm.fish
            ../.ci/install /opt '\(stage)'
            """)
        #expect(access(stage + "/opt/bin/swkvm", F_OK) == 0)
        let program = try Program([tree + "/.ci/install", "relative", stage])
        try program.expectEnd(64)
        #expect(try shell("ls -A '\(stage)'; ls -d '\(stage)relative' '\(tree)/relative' || true") == "opt\n")
    }

    // MARK: What is missing

    /// `swift build` before `make guest`.
    @Test func withoutTheBundledGuestTheBuildSaysWhatToDo() throws {
        let program = try Program([
            "sh", "-c", "\"$(dirname \"$(readlink -f \"$(command -v swift)\")\")/clang\" -c -o /dev/null \"$0\"",
            Host.package + "/Sources/BundledGuest/guest.S",
        ])
        #expect(try program.waitForEnd() != .status(0))
        #expect(
            program.errors.text.contains("the bundled guest is not built yet: run `make guest`"), "\(program.story)")
    }

    // MARK: unsafe

    /// Each line with it is one to read with care: what reads images is to have no more than can be read.
    @Test func diskImagesHaveFewUnsafeLines() throws {
        let count = try shell(
            "grep -rhw --include='*.swift' unsafe '\(Host.package)/Sources/DiskImage' | grep -cvE '^ *//'")
        #expect((1...400).contains(Int(count.dropLast()) ?? 0), "\(count)")
    }

    // MARK: make lint

    /// `lint PART` in a repository with this one file.
    private func lint(_ part: String, _ name: String, _ text: String) throws -> Program {
        try directory.write(Array(text.utf8), to: name)
        try shell(
            """
            cd '\(directory.path)'; mkdir -p .ci; cp '\(Host.package)'/.ci/lint .ci; cp '\(Host.package)/.swift-format' .
            echo '# none' > .ci/unformatted; git init -q .; git add '\(name)'
            """)
        let program = try Program([directory(".ci/lint"), part])
        _ = try program.waitForEnd()
        return program
    }

    @Test(arguments: [
        ("a.swift", "// SPDX-License-Identifier: Apache-2.0\n", true),
        ("a.swift", "import Glibc\n\n// SPDX-License-Identifier: Apache-2.0\n", false),
        ("Package.swift", "// swift-tools-version: 6.2\n// SPDX-License-Identifier: Apache-2.0\n", true),
        ("Package.swift", "// swift-tools-version: 6.2\n\nimport PackageDescription\n", false),
        ("a", "#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0\n", true), ("a", "#!/bin/sh\n# A script.\n", false),
        ("a.h", "", false),
    ])
    func lintFindsAFileWithoutLicence(name: String, text: String, passes: Bool) throws {
        let program = try lint("licences", name, text)
        #expect(
            program.output.text == (passes ? "ok - lint licences\n" : "not ok - lint licences\n"), "\(program.story)")
        #expect(program.errors.text.hasPrefix("\(name): ") != passes)
    }

    @Test(arguments: [
        ("let a = 1\n", true), ("let a  = 1\n", false),
        // Columns are characters.
        ("// " + String(repeating: "ä", count: 117) + "\n", true),
        ("// " + String(repeating: "ä", count: 118) + "\n", false),
        // What cannot be broken is not a comment's.
        ("let a = \"" + String(repeating: "x", count: 120) + "\"\n", true),
    ])
    func lintFindsWhatTheFormatterWouldChange(text: String, passes: Bool) throws {
        let program = try lint("format", "a.swift", text)
        #expect(
            program.output.text.hasSuffix(passes ? "ok - lint format\n" : "not ok - lint format\n"), "\(program.story)")
    }
}

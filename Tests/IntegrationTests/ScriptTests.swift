// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// The scripts behind `make`: what they do not know they refuse, and do nothing.
@Suite(.timed) struct ScriptTests {
    @Test(
        arguments: [
            (".ci/test", "--nosuch", "ARGS='--filter NAME' selects tests"),
            (".ci/test", "Virtqueue", "unexpected argument 'Virtqueue'"),
            (".ci/tsan", "--nosuch", "unexpected argument '--nosuch'"),
            (".ci/lint", "nosuch", "there is no part 'nosuch'; expected licences, format, shell or rewrite"),
            (".ci/lint", "licences ls", "there is no part 'ls'"),
            (".ci/lint", "rewrite nosuch", "there is no 'nosuch'"),
            (".ci/fuzz", "--nosuch", "unexpected option '--nosuch'"),
            (".ci/components", "nosuch", "unexpected argument 'nosuch'"),
            (".ci/components", "yes no", "unexpected argument 'no'"),
            (".ci/check-updates", "--nosuch", "unexpected option '--nosuch'"),
            (".ci/check-updates", "a b", "unexpected argument 'b'"),
            (".ci/packages", "--nosuch", "unexpected option '--nosuch'"),
            (".ci/install", "", "usage: "), (".ci/install", "/a /b /c", "usage: "),
            (".ci/install", "build /nowhere", "PREFIX has to be an absolute path, such as /usr/local: 'build' is none"),
            (".ci/install", "--remove build", "PREFIX has to be an absolute path"),
            (".ci/install", "--remove", "usage: "), (".ci/install", "--nosuch", "usage: "),
            (".ci/run", "--nosuch", "unexpected argument '--nosuch'"),
            (".ci/deb", "--nosuch", "unexpected argument '--nosuch'"),
            (".ci/deb-trial", "inside out", "unexpected argument 'inside'"),
            (".ci/man", "--nosuch", "unexpected argument '--nosuch'"),
            (".ci/sbom", "--nosuch", "unexpected argument '--nosuch'"),
            (".ci/reproducible", "--nosuch", "unexpected argument '--nosuch'"),
            ("guests/run", "--nosuch", "unexpected argument '--nosuch'"),
            ("Tests/Bench/run", "", "usage: "), ("Tests/Bench/run", "a b", "usage: "),
            ("Tests/Bench/compare", "a b", "usage: "), ("Tests/Bench/compare", "a b c d", "usage: "),
            ("Tests/Bench/guest/prepare", "--nosuch", "unexpected argument '--nosuch'"),
            ("Tests/Lab/run", "", "no leg"), ("Tests/Lab/run", "nosuch", "there is no leg 'nosuch'"),
            ("Tests/Lab/run", "amdv quick,nosuch", "there is no case 'nosuch'"),
            ("Tests/Lab/run", "vtx shell quick", "shell comes without cases"),
            ("Tests/Lab/prepare", "host nosuch", "there is no part 'nosuch'"),
        ])
    func argumentsThatAreNotKnown(script: String, arguments: String, sentence: String) throws {
        // What is not refused is not run to its end either.
        let words = ["timeout", "-s", "KILL", "60", Host.package + "/" + script]
        let program = try Program(words + arguments.split(separator: " ").map(String.init))
        try program.expectEnd(64)
        #expect(program.errors.lines.count == 1 && program.errors.text.contains(sentence), "\(program.errors.text)")
        #expect(program.output.text.isEmpty, "\(program.output.text)")
    }

    /// What the archive says of a library that the binary has in version 1:2.0-1.
    @Test(arguments: [
        ("1:2.0-1", "1:2.0-1", "bookworm", 0, "the binary has the newest of all"),
        ("1:2.0-1", "1:1.0-1", "bookworm", 0, "libone-dev: 1:2.0-1"),
        (
            "1:2.0-1", "1:2.0-2", "bookworm", 1,
            "the archive has 1:2.0-2; the binary has 1:2.0-1, and 1:2.0-1 is installed"
        ),
        ("1:2.0-1", "1:2.0-2", "bookworm-security", 1, "the archive has 1:2.0-2, a security update;"),
        ("1:2.0-1", "1:2.0-2", "bookworm", 1, "run as root: apt-get install --only-upgrade libone-dev"),
        ("1:2.0-2", "1:2.0-2", "bookworm", 1, "build again: make"),
        ("1:2.0-1", "(none)", "bookworm", 2, "the archive has none; the binary has 1:2.0-1"),
    ])
    func updatesOfLibraries(installed: String, candidate: String, suite: String, status: Int32, sentence: String) throws
    {
        let directory = try TemporaryDirectory()
        // As the scripts write it.
        let sbom = try directory.write(
            """
              "packages": [
                {
                  "name": "swkvm",
                  "versionInfo": "0.1.0",
                },
                {
                  "name": "libone-dev",
                  "versionInfo": "1:2.0-1",
                  "externalRefs": [{ "referenceLocator": "pkg:deb/debian/libone-dev@1%3A2.0-1" }]
                }
            """.utf8, to: "sbom.json")
        try directory.write("#!/bin/sh\n".utf8, to: "apt-get")
        try directory.write(
            """
            #!/bin/sh
            cat <<END
            $2:
              Installed: \(installed)
              Candidate: \(candidate)
              Version table:
                 \(candidate) 500
                    500 http://example.org/debian \(suite)/main amd64 Packages
             *** \(installed) 100
                    100 /var/lib/dpkg/status
            END
            """.utf8, to: "apt-cache")
        let program = try Program([
            "sh", "-euc", "chmod +x $1/apt-get $1/apt-cache; PATH=$1:$PATH exec $2 $3", "sh", directory.path,
            Host.package + "/.ci/check-updates", sbom,
        ])
        try program.expectEnd(status)
        #expect(program.output.text.contains(sentence), "\(program.output.text)")
    }
}

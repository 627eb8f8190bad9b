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
            (".ci/packages", "--nosuch", "unexpected option '--nosuch'"),
            (".ci/install", "", "usage: "), (".ci/install", "build /nowhere", "usage: "),
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
}

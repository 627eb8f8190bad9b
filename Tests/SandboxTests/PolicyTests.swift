// SPDX-License-Identifier: Apache-2.0

import Sandbox
import TestSupport
import Testing

/// What `--sandbox` says.
@Suite(.timed) struct PolicyTests {
    @Test(arguments: ["off", "report", "on", "on,namespaces", "seccomp", "landlock,seccomp", "on,user,seccomp"])
    func `A policy is written as it was read`(_ text: String) throws {
        #expect(try #require(Sandbox.Policy(rawValue: text)).rawValue == text)
    }

    @Test(arguments: [
        "", ",", "on,", "yes", "ON", "on,on", "seccomp,seccomp", "off,seccomp", "report,on", "seccomp,off",
    ])
    func `Other words are none`(_ text: String) {
        #expect(Sandbox.Policy(rawValue: text) == nil)
    }

    private func parts(_ text: String) throws -> (wanted: [Sandbox.Part], required: [Sandbox.Part]) {
        let policy = try #require(Sandbox.Policy(rawValue: text))
        return (Sandbox.Part.allCases.filter(policy.wants), Sandbox.Part.allCases.filter(policy.requires))
    }

    @Test func `Parts by name have to be, those of on need not`() throws {
        #expect(try parts("off").wanted.isEmpty)
        #expect(try parts("on").wanted == Sandbox.Part.standard)
        #expect(try parts("on").required.isEmpty)
        #expect(try parts("on,namespaces").wanted == Sandbox.Part.allCases)
        #expect(try parts("on,namespaces").required == [.namespaces])
        #expect(try parts("landlock,seccomp").wanted == [.landlock, .seccomp])
        #expect(try parts("landlock,seccomp").required == [.landlock, .seccomp])
        #expect(try parts("report").wanted == [.seccomp])
        #expect(Sandbox.Policy.on.requiring(.user).rawValue == "on,user")
        #expect(Sandbox.Policy.on.requiring(.user).requiring(.user).rawValue == "on,user")
    }
}

// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@testable import CloudInit

/// The disk that tells a guest's cloud-init what to do.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct SeedTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace
    private static let uuid = "6ba7b810-9dad-81d1-80b4-00c04fd430c8"

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    /// The guest reads it, behind the disks, and cannot change it; also after a reset.
    @Test(arguments: [["--bus", "mmio"], ["--bus", "pci", "--sandbox", "on"]]) func theGuestReadsIt(
        arguments: [String]
    ) throws {
        try directory.write([UInt8](repeating: 1, count: 1 << 20), to: "disk.raw")
        let data = try directory.write(Array("#!/bin/sh\n".utf8), to: "data")
        var options = Seed.Options()
        options.user = "alice"
        options.userDataFile = data
        let expected = try Seed(options, instance: Self.uuid, defaultHostName: "web1").image
        let machine = try Program.machineAtPrompt(
            ["--kernel", "bundled", "--uuid", Self.uuid, "--name", "web1", "--user", "alice", "--user-data", data]
                + ["--disk", directory("disk.raw")] + arguments)
        for boot in 1...2 {
            let lines = try machine.ask("disks")
            #expect(lines.count == 2 && lines[1].hasPrefix("vdb: \(expected.count / 512) sectors, read-only"))
            #expect(lines.last?.contains("id 'cidata'") == true)
            #expect(
                try machine.ask("sum vdb 0 \(expected.count / 512)") == [
                    "crc32 vdb 0 \(expected.count / 512) \(hexadecimal(crc32(expected)))"
                ])
            if boot == 1 {
                try machine.type("reboot\n")
                try machine.wait(for: Program.prompt)
            }
        }
        try machine.powerOff()
        #expect(machine.errors.bytes.isEmpty, "\(machine.errors.text)")
    }

    /// The self-test of a read-only disk.
    @Test func theGuestCannotChangeIt() throws {
        let machine = try Program.machine(["--mem", "64M", "--hostname", "web1", "--cmdline", "test=disk"])
        try machine.expectSelfTestsPassed()
        #expect(machine.errors.bytes.isEmpty, "\(machine.errors.text)")
    }

    /// Where it is not from the options, the identity is the same at each start, and another one for another machine.
    @Test func identities() throws {
        func sum(_ arguments: [String]) throws -> String {
            let disk = arguments.contains("--disk") ? "vdb" : "vda"
            let machine = try Program.machine(
                ["--mem", "64M", "--hostname", "a", "--cmdline", "quiet run='sum \(disk) 0 32'"] + arguments)
            try machine.expectEnd(0)
            return machine.output.lines.first { $0.hasPrefix("crc32") }?.split(separator: " ").last.map(String.init)
                ?? ""
        }
        for name in ["one.raw", "two.raw"] { try directory.write([UInt8](repeating: 0, count: 4096), to: name) }
        let sums = try [
            ["--name", "a"], ["--name", "b"], ["--disk", directory("one.raw")], ["--disk", directory("two.raw")],
        ]
        .map { try sum($0) }
        #expect(Set(sums).count == 4 && !sums.contains(""))
        #expect(try sum(["--name", "a", "--uuid", "none"]) == sums[0])
        #expect(try sum(["--disk", directory("./one.raw")]) == sums[2])
    }

    @Test func files() throws {
        let key = try directory.write(Array("-----BEGIN OPENSSH PRIVATE KEY-----\n".utf8), to: "key")
        let text = try directory.write(Array("hello\n".utf8), to: "text")
        let large = try directory.write([UInt8](repeating: 0x23, count: 1 << 20 + 1), to: "large")
        for option in ["ssh-key", "password-file", "user-data", "meta-data", "network-config"] {
            try expectRefused(
                ["--\(option)", directory("none")],
                "the file of --\(option), \(directory("none")), cannot be read: No such file or directory",
                status: Status.input)
            try expectRefused(
                ["--\(option)", directory.path],
                "the file of --\(option), \(directory.path), cannot be read: Is a directory", status: Status.input)
            try expectRefused(
                ["--\(option)", large], "the file of --\(option), \(large), has more than ", status: Status.input)
            try expectRefused(
                ["--\(option)", ""], "the option --\(option) requires a non-empty path", status: Status.usage)
        }
        try expectRefused(["--ssh-key", key], "\(key) is a private key, which no guest may see", status: Status.input)
        try expectRefused(
            ["--ssh-key", text], "\(text), line 1, is not a public key of OpenSSH: ", status: Status.input)
    }

    @Test func names() throws {
        for value in ["", "Alice", "a\nb", "a:b", "1"] {
            try expectRefused(["--user", value], "", status: Status.usage)
        }
        for value in ["", "-a", "a_b", "a b", "a..b", String(repeating: "a", count: 64)] {
            try expectRefused(["--hostname=\(value)"], "", status: Status.usage)
        }
        let data = try directory.write(Array("instance-id: a\n".utf8), to: "data")
        try expectRefused(
            ["--meta-data", data, "--hostname", "a"],
            "the options --meta-data and --hostname cannot be combined: set local-hostname in \(data)",
            status: Status.usage)
        try expectRefused(
            ["--meta-data", data, "--ssh-key", data],
            "the options --meta-data and --ssh-key cannot be combined: set public-keys in \(data)",
            status: Status.usage)
    }

    /// A limit on the size of files holds for those in memory, too.
    @Test func noRoomForIt() throws {
        let machine = try Program(
            ["bash", "-c", "ulimit -f 4; exec \"$@\"", "-", Host.swkvm, "run", "--hostname", "a", "--console", "none"])
        try machine.expectEnd(Status.host)
        expectSentence(
            machine, "could not keep the seed for cloud-init in memory: File too large",
            sourceLocation: #_sourceLocation
        )
    }

    @Test func aWarning() throws {
        let data = try directory.write(Array("users: []\n".utf8), to: "data")
        let machine = try Program.machine(
            ["--mem", "64M", "--user-data", data, "--cmdline", "quiet run=help", "--log-level", "warning"])
        try machine.expectEnd(0)
        #expect(machine.errors.lines.count == 1 && machine.errors.text.contains("cloud-init will ignore \(data): "))
    }
}

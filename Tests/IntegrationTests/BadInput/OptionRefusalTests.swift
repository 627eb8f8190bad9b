// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

/// Options with wrong values, and options of other programs.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct OptionRefusalTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    @Test(arguments: [
        ["--unknown"], ["argument"], ["--console", "printer"], ["--console", "unix:"], ["--hugepages=4M"],
        ["--log-level", "loud"],
        ["--disk", ""], ["--disk", "a.raw,rw"], ["--disk", "a.raw,queues=0"], ["--disk", "a.raw,queues=65"],
        ["--disk", "a.raw,queues=two"], ["--disk", "a.raw,serial=123456789012345678901"], ["--net", ""],
        ["--net", "tap=tap0,create"], ["--net", "tap=tap0,mtu=67"], ["--net", "tap=tap0,mtu=many"], ["--mem"],
        // To the parser of single letters these are requests for help; and what other programs have.
        ["-nographic"], ["-machine", "q35"], ["-hda", "disk.raw"], ["-m", "2G", "-smp", "2", "-kernel", "bzImage"],
        ["--ram", "1G"], ["--vcpus=2"],
    ])
    func options(arguments: [String]) throws {
        let machine = try Program([Host.swkvm, "run"] + arguments, in: host)
        try machine.expectEnd(Status.usage)
        #expect(machine.errors.lines.count == 1 && machine.errors.text.hasPrefix("swkvm: "), "\(machine.errors.text)")
        #expect(machine.output.bytes.isEmpty)
    }

    /// As QEMU is called.
    @Test func withoutACommand() throws {
        let machine = try Program([Host.swkvm, "-m", "2G", "-nographic"], in: host)
        try machine.expectEnd(Status.usage)
        #expect(machine.errors.lines.count == 1 && machine.output.bytes.isEmpty)
        #expect(
            machine.errors.text.hasPrefix("swkvm: a machine's options come after `swkvm run`; '-m' is --mem SIZE here"))
    }

    @Test func consoles() throws {
        let taken = try directory.write([1], to: "taken")
        let machines: [([String], String)] = [
            (
                ["--console", "unix:" + taken],
                "the console's socket cannot be \(taken): a file that is not a socket has that name"
            ),
            (
                ["--console", "unix:" + directory("none/socket")],
                "the console \(directory("none/socket")) cannot be opened: No such file"
            ),
            (
                ["--console", "unix:/" + String(repeating: "x", count: 107)],
                "the console's socket has a path of 108 bytes, the limit is 107"
            ),
            (
                ["--console", "file:" + directory.path],
                "the console \(directory.path) cannot be opened: Is a directory"
            ),
        ]
        for (arguments, sentence) in machines {
            let machine = try Program.machine(arguments)
            try machine.expectEnd(arguments[1].contains(taken) ? Status.host : Status.input)
            expectSentence(machine, sentence, sourceLocation: #_sourceLocation)
        }
        #expect(try readFile(taken, limit: 10) == [1])
        #expect(try directory.contents == ["taken"])
    }

    /// A file for the console's output is left as it was by a machine that does not start: absent, or with its
    /// contents.
    @Test func aConsolesFileOfAMachineThatDoesNotStart() throws {
        for (name, before) in [("new.log", nil as [UInt8]?), ("old.log", [1, 2])] {
            if let before { try directory.write(before, to: name) }
            for arguments in [
                ["--kernel", directory("none")], ["--disk", directory("none.raw")], ["--mem", "1000G"],
            ] {
                let machine = try Program.machine(arguments + ["--console", "file:" + directory(name)])
                try machine.expectEnd(arguments[0] == "--mem" ? Status.host : Status.input)
            }
            #expect(try directory.contents.contains(name) == (before != nil))
            if let before { #expect(try readFile(directory(name), limit: 10) == before) }
        }
    }

    /// Also where no image names a file that it would be about.
    @Test func aDirectoryForBackingFilesThatIsMissing() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 4096), to: "disk.raw")
        try expectRefused(
            ["--disk", "\(disk),backing-dir=\(directory("nowhere"))"],
            "disk \"\(directory("nowhere"))\": open: No such file or directory", status: Status.input)
    }
}

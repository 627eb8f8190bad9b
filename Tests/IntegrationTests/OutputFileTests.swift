// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Files that a machine's output must not go to, since they are something else.
@Suite(.timed) struct OutputFileTests {
    private let directory: TemporaryDirectory
    private let contents = [UInt8](repeating: 7, count: 64 << 10)

    init() throws { directory = try TemporaryDirectory() }

    /// A machine that does not start, and leaves all files as they are.
    private func expectRefusal(
        _ arguments: [String], _ sentence: String, status: Int32 = 64,
        sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let before = try shell("cd '\(directory.path)' && ls -A && cksum *")
        let machine = try Program.machine(arguments)
        try machine.expectEnd(status, sourceLocation: sourceLocation)
        #expect(machine.errors.text.contains(sentence), "\(machine.errors.text)", sourceLocation: sourceLocation)
        #expect(try shell("cd '\(directory.path)' && ls -A && cksum *") == before, sourceLocation: sourceLocation)
    }

    private func same(_ option: String, _ path: String, _ other: String) -> String {
        "\(option) \(path) and \(other) use the same file: specify another one for \(option)"
    }

    @Test(arguments: ["json", "prometheus"]) func metricsAreNoOtherFileOfTheMachine(format: String) throws {
        // Contents that are metrics of either kind, as far as their beginning goes.
        let start = Array((format == "json" ? "{" : "# HELP swkvm_").utf8)
        let file = try directory.write(start + contents, to: "file"), link = directory("link")
        try directory.write(contents, to: "disk.raw")
        try shell("ln '\(file)' '\(link)'")
        let disk = directory("disk.raw")
        for (arguments, other) in [
            (["--disk", "\(file),format=raw"], "the disk \(file)"),
            (["--disk", "\(disk),key-file=\(file)"], "the key file \(file)"),
            (["--kernel", file], "--kernel \(file)"),
            (["--kernel", disk, "--initrd", file], "--initrd \(file)"),
            (["--user-data", file], "--user-data \(file)"),
        ] {
            let options = ["--metrics-format", format] + arguments
            try expectRefusal(["--metrics", file] + options, same("--metrics", file, other))
            // By its second name.
            try expectRefusal(["--metrics", link] + options, same("--metrics", link, other))
        }
    }

    @Test func theConsoleIsNoOtherFileOfTheMachine() throws {
        let disk = try directory.write(contents, to: "disk.raw"), backup = directory("console.log.1")
        try shell("cp '\(disk)' '\(backup)'")
        for limit in ["", ",size=64K"] {
            try expectRefusal(
                ["--disk", disk, "--console", "file:\(disk)\(limit)"], same("--console", disk, "the disk \(disk)"))
        }
        try expectRefusal(
            ["--disk", "\(backup),format=raw", "--console", "file:\(directory("console.log")),size=64K"],
            same("--console", backup, "the disk \(backup)"))
    }

    /// None of the files is there yet.
    @Test func twoOutputsHaveTwoFiles() throws {
        try directory.write(contents, to: "disk.raw")
        let file = directory("new.log"), other = "\(directory.path)/./new.log"
        for format in ["json", "prometheus"] {
            try expectRefusal(
                ["--metrics", file, "--metrics-format", format, "--console", "file:\(other)"],
                same("--metrics", file, "--console \(other)"))
            try expectRefusal(
                ["--metrics", file, "--metrics-format", format, "--gdb", "unix:\(other)"],
                same("--metrics", file, "--gdb \(other)"))
        }
        try expectRefusal(
            ["--console", "unix:\(file)", "--gdb", "unix:\(other)"], same("--console", file, "--gdb \(other)"))
        // What is renamed to the file of metrics.
        let temporary = directory(".new.log.swkvm")
        try expectRefusal(
            ["--metrics", file, "--metrics-format", "prometheus", "--console", "file:\(temporary)"],
            same("--metrics", temporary, "--console \(temporary)"))
    }

    @Test func aBackingFileIsNoOutput() throws {
        let base = try directory.write(contents, to: "base.raw"), top = directory("top.qcow2")
        try shell("'\(Host.swkvm)' image create -f qcow2 -b base.raw -F raw '\(top)'")
        try expectRefusal(
            ["--disk", top, "--console", "file:\(base)"], same("--console", base, "the disk \(top)"))
    }

    /// A device takes what several write to it.
    @Test func twoOutputsHaveOneDevice() throws {
        let machine = try Program.machine([
            "--mem", "64M", "--metrics", "/dev/null", "--console", "file:/dev/null", "--cmdline", "test=none",
        ])
        try machine.expectEnd(0)
    }

    @Test func anotherMachinesDiskIsNoOutput() throws {
        let disk = try directory.write([], to: "disk.raw")
        try shell("truncate -s 1M '\(disk)'")
        let machine = try Program.machineAtPrompt(["--disk", disk])
        for limit in ["", ",size=64K"] {
            try expectRefusal(
                ["--console", "file:\(disk)\(limit)"],
                "the console cannot be \(disk): another process uses this file as a disk; choose another path",
                status: 71)
        }
        for format in ["json", "prometheus"] {
            try expectRefusal(
                ["--metrics", disk, "--metrics-format", format],
                "the file for metrics cannot be \(disk): another process uses this file as a disk", status: 71)
        }
        try machine.powerOff()
    }

    @Test(arguments: ["json", "prometheus"]) func otherContentsAreKept(format: String) throws {
        let file = try directory.write(contents, to: "file")
        try expectRefusal(
            ["--metrics", file, "--metrics-format", format],
            "the file for metrics cannot be \(file): it has other contents than metrics in the format of --metrics-format",
            status: 66)
    }

    /// `--force` is about the image, not about its key.
    @Test func aKeyIsNoNewImage() throws {
        let key = try directory.write(Array("secret".utf8), to: "key")
        let disk = try directory.write(contents, to: "disk.raw")
        for arguments in [
            [
                "create", "--force", "--encrypt", "--key-file", key, "--iterations", "1000", "--format", "qcow2", key,
                "1M",
            ],
            [
                "convert", "--force", "--encrypt", "--target-key-file", key, "--target-format", "qcow2", disk, key,
            ], ["convert", "--force", "--key-file", key, "--target-format", "raw", disk, key],
        ] {
            let program = try Program([Host.swkvm, "image"] + arguments)
            _ = try program.waitForEnd()
            #expect(
                program.errors.text.contains("it is the file of the key \"\(key)\""), "\(program.errors.text)")
            #expect(try readFile(key, limit: 100) == Array("secret".utf8))
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// Limits of the console's file, and `--cgroup`.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct LimitTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    private func size(_ path: String) -> Int {
        var status = stat()
        return stat(path, &status) == 0 ? Int(status.st_size) : -1
    }

    private func end(_ machine: Program) throws {
        machine.send(signal: SIGTERM)
        machine.sendOneMore(signal: SIGTERM)
        _ = try machine.waitForEnd()
    }

    // MARK: The console's file

    /// A guest that prints without end, in a sandbox.
    @Test func aGuestCannotFillTheDisk() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.talking), to: "kernel"), log = directory("log")
        let machine = try Program.machine([
            "--kernel", kernel, "--sandbox", "on", "--console", "file:\(log),size=64K,keep=2",
        ])
        #expect(try eventually { size(log + ".2") == 64 << 10 })
        let other = try Program.machine(["--console", "file:\(log),size=1M"])
        try other.expectEnd(71)
        #expect(other.errors.text.contains("is in use: another machine rotates it"))
        try end(machine)
        #expect(size(log) <= 64 << 10 && size(log + ".1") == 64 << 10 && size(log + ".2") == 64 << 10)
        #expect(try directory.contents.sorted() == ["kernel", "log", "log.1", "log.2"])
    }

    /// Nothing that somebody has put beside the file is followed, or changed.
    @Test(arguments: ["ln -s kept log.1", "mkfifo log.1", "mkdir log.1", "mkfifo log", "mkdir log"])
    func onlyFilesAreRotated(preparation: String) throws {
        try shell("cd '\(directory(""))' && echo kept > kept && \(preparation)")
        let before = try directory.contents
        let machine = try Program.machine(["--console", "file:\(directory("log")),size=64K"])
        _ = try machine.waitForEnd()
        #expect(machine.errors.lines.count == 1 && machine.errors.text.contains("console"), "\(machine.errors.text)")
        #expect(try directory.contents == before)
        #expect(try shell("cat '\(directory("kept"))'") == "kept\n")
    }

    /// The guest's 13 bytes come, all of them, though eight is all that comes at once.
    @Test func outputWaits() throws {
        let machine = try Program.machine(["--cmdline", "test=none", "--console", "stdio,bps=1K,bps-burst=8"])
        try machine.expectEnd(0)
        #expect(machine.output.text == "swkvm guest\r\n")
    }

    // MARK: Control groups

    /// Where a cgroup2 file system is; nil where there is none that this user may change.
    private static let groups: String? = {
        guard let mounts = try? shell("cat /proc/self/mounts") else { return nil }
        let places = mounts.split(separator: "\n").map { $0.split(separator: " ") }.filter { $0[2] == "cgroup2" }
        return places.map { String($0[1]) }.first { access($0, W_OK) == 0 }
    }()
    private static let needed: Comment = "no cgroup2 file system is mounted here, or it is not writable"

    private func group() throws -> String {
        try #require(Self.groups) + "/swkvm-test-\(getpid())-\(directory.path.hashValue)"
    }

    @Test(.enabled(if: groups != nil, needed), arguments: ["on", "off"])
    func aMachineHasAGroupOfItsOwn(sandbox: String) throws {
        let group = try group()
        let machine = try Program.machineAtPrompt(["--cgroup", group, "--sandbox", sandbox])
        let members = try shell("cat '\(group)/cgroup.procs'")
        #expect(members.split(separator: "\n").contains("\(machine.pid)"))
        try machine.powerOff()
        #expect(access(group, F_OK) != 0, "the group is still there")
    }

    @Test(.enabled(if: groups != nil, needed)) func aGroupThatWasThereStays() throws {
        let group = try group()
        try #require(mkdir(group, 0o755) == 0)
        defer { rmdir(group) }
        let machine = try Program.machineAtPrompt(["--cgroup", group + "/"])
        #expect(try shell("cat '\(group)/cgroup.procs'").contains("\(machine.pid)"))
        try machine.powerOff()
        #expect(access(group, F_OK) == 0)
    }

    /// With the limits that the host's controllers allow; without, an error that says so, and nothing is left behind.
    @Test(.enabled(if: groups != nil, needed), arguments: [("memory", "memory=256M"), ("cpu", "cpu=1.5")])
    func limits(controller: String, limit: String) throws {
        let group = try group()
        let controllers = try shell("cat '\(Self.groups ?? "")/cgroup.controllers'")
        let machine = try Program.machine(["--cgroup", "\(group),\(limit)", "--mem", "64M", "--cmdline", "test=none"])
        if controllers.split(whereSeparator: { " \n".contains($0) }).contains(Substring(controller)) {
            try machine.expectEnd(0)
        } else {
            try machine.expectEnd(71)
            #expect(machine.errors.text.contains("cannot have a limit of the controller \(controller)"))
        }
        #expect(access(group, F_OK) != 0, "the group is still there")
    }

    @Test func placesThatAreNoGroups() throws {
        func expectRefused(_ path: String, _ sentence: String, status: Int32 = 71) throws {
            let machine = try Program.machine(["--cgroup", path])
            try machine.expectEnd(status)
            #expect(
                machine.errors.lines.count == 1 && machine.errors.text.contains(sentence), "\(machine.errors.text)")
        }
        try expectRefused(directory("group"), "is not in a cgroup2 file system")
        try expectRefused("/nonexistent/group", "No such file or directory")
        try expectRefused("/", "is not a valid control group path", status: 64)
        if access("/sys/fs/cgroup/cpu/cgroup.procs", F_OK) == 0 {
            try expectRefused("/sys/fs/cgroup/cpu/group", "version 1")
        }
        #expect(try directory.contents.isEmpty)
    }
}

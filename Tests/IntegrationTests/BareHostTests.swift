// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Hosts that lack what most have: no /proc, little memory for this process.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct BareHostTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    /// Runs a script where /proc is not mounted, with swkvm's path as $0.
    private func withoutProc(_ script: String, input: Program.Stream = .null) throws -> Program {
        try Program(
            [
                "unshare", "-m", "--propagation", "private", "sh", "-c",
                "umount -l /proc; cd '\(directory.path)'; " + script, Host.swkvm,
            ], input: input)
    }

    @Test func versionAndHelpWithoutProc() throws {
        let version = try withoutProc("exec \"$0\" --version")
        try version.expectEnd(0)
        #expect(version.output.lines.count == 1 && version.output.text.hasPrefix("swkvm "), "\(version.story)")
        let help = try withoutProc("exec \"$0\" run --help")
        try help.expectEnd(0)
        #expect(help.output.text.contains("--cpus"), "\(help.story)")
        let wrong = try withoutProc("exec \"$0\" run --cpus two")
        try wrong.expectEnd(64)
    }

    @Test func aMachineWithoutProc() throws {
        try directory.write([UInt8](repeating: 7, count: 1 << 20), to: "disk.raw")
        let machine = try withoutProc(
            "exec \"$0\" run --kernel bundled --mem 64M --cpus 2 --disk disk.raw", input: .pipe)
        try machine.wait(for: Program.prompt)
        #expect(try machine.ask("echo without proc") == ["without proc"])
        #expect(try machine.ask("sum vda 0 8").count == 1)
        try machine.powerOff()
        #expect(machine.errors.bytes.isEmpty, "\(machine.story)")
        // The network namespace is found there: it is said.
        let network = try withoutProc("exec \"$0\" run --net tap=swproc0")
        try network.expectEnd(71)
        #expect(network.errors.text.contains("/proc"), "\(network.story)")
    }

    @Test func imagesWithoutProc() throws {
        let machine = try withoutProc(
            """
            set -e
            "$0" image create a.qcow2 4M; "$0" image create --backing a.qcow2 b.qcow2; "$0" image convert b.qcow2 c.raw
            "$0" image check a.qcow2; "$0" image info c.raw; "$0" image compare a.qcow2 c.raw
            "$0" image create --force a.qcow2 8M; "$0" image resize a.qcow2 16M
            """)
        try machine.expectEnd(0)
        #expect(machine.errors.bytes.isEmpty && machine.output.text.contains("identical"), "\(machine.story)")
        #expect(try directory.contents.sorted() == ["a.qcow2", "b.qcow2", "c.raw"])
    }

    /// Below `/` is everything: an image there may not name any file for that reason.
    @Test func anImageInTheRoot() throws {
        let host = try Program(
            [
                "sh", "-c",
                """
                set -e; cd "$1"; mkdir -p root/etc; cp "$0" root/swkvm; head -c 65536 /dev/zero > root/etc/secret
                "$0" image create --unsafe --backing /etc/secret --backing-format raw root/disk.qcow2 64K
                chroot root /swkvm image map --backing-dir /etc /disk.qcow2 > wide; chroot root /swkvm image map /disk.qcow2
                """,
                Host.swkvm, directory.path,
            ])
        #expect(try host.waitForEnd() == .status(1))
        #expect(host.errors.text.contains("neither below that image's directory nor named"), "\(host.story)")
        #expect(try shell("grep -c secret '\(directory.path)/wide'") == "1\n")
    }

    @Test func doctorWithoutProc() throws {
        let doctor = try withoutProc("exec \"$0\" doctor")
        try doctor.expectEnd(0)
        #expect(doctor.output.lines.contains { $0.hasPrefix("note     /proc") }, "\(doctor.story)")
        #expect(doctor.output.lines.contains { $0.hasPrefix("ok       CAP_NET_ADMIN") }, "\(doctor.story)")
    }

    /// The kernel would end the process without a word when the last page that it may have is taken.
    @Test func moreMemoryThanTheControlGroupAllows() throws {
        guard let group = ControlGroup(limit: 64 << 20) else {
            print("skipped: no control group with a memory limit can be made here")
            return
        }
        let machine = try group.run(["--mem", "256M", "--prealloc", "--cmdline", "test=none"])
        try machine.expectEnd(71)
        #expect(machine.errors.lines.count == 1)
        #expect(
            machine.errors.text.hasPrefix(
                "swkvm: 256 MiB of preallocated guest memory and about 9 MiB of overhead exceed the limit of the control group \(group.path) (64 MiB): "
            ),
            "\(machine.story)")
        try group.run(["--mem", "32M", "--prealloc", "--cmdline", "test=none"]).expectEnd(0)
    }
}

/// A control group of a test's own with a memory limit, of either version.
private final class ControlGroup {
    let path: String

    init?(limit: Int) {
        let name = "swkvm-test-\(getpid())-\(UInt32.random(in: 0 ... .max))"
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let path = root + "/" + name
            guard mkdir(path, 0o755) == 0 else { continue }
            if let figure = try? FileDescriptor.open(path + "/" + file, O_WRONLY),
                (try? figure.writeAll("\(limit)".utf8)) != nil
            {
                self.path = path
                return
            }
            rmdir(path)
        }
        return nil
    }

    func run(_ arguments: [String]) throws -> Program {
        try Program(["sh", "-c", "echo $$ > '\(path)/cgroup.procs'; exec \"$@\"", "sh", Host.swkvm, "run"] + arguments)
    }

    deinit {
        for _ in 0..<100 where rmdir(path) != 0 && errno == EBUSY { usleep(10_000) }
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Remote disks as a machine and the tools meet them: over NBD, from a server that comes and goes.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct RemoteDiskTests {
    private let directory: TemporaryDirectory

    init() throws {
        directory = try TemporaryDirectory()
        try shell("cd '\(directory.path)'; head -c 3145728 /dev/urandom >disk.raw; truncate -s 64M scratch.raw")
    }

    private func address(_ options: String = "") -> String {
        "nbd+unix:///disk?socket=\(directory("socket"))\(options)"
    }

    /// Starts a server, which listens when this returns.
    private func serve(_ file: String, _ options: [String] = []) throws -> Program {
        let server = try Program(
            ["qemu-nbd", "-t", "-f", "raw", "-x", "disk", "-k", directory("socket")] + options + [directory(file)])
        #expect(try eventually { (try? connect(toSocket: directory("socket"))) != nil })
        return server
    }

    private func kill(_ server: Program) throws {
        server.send(signal: SIGKILL)
        _ = try server.waitForEnd()
    }

    @Test func theGuestUsesARemoteDisk() throws {
        let server = try serve("disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", address() + ",serial=far"])
        #expect(try machine.ask("disks")[0].hasPrefix("vda: 6144 sectors, read-write"))
        let sum = crc32(try readFile(directory("disk.raw"), limit: 8 << 20))
        #expect(try machine.ask("sum vda 0 6144") == ["crc32 vda 0 6144 \(hexadecimal(sum))"])
        #expect(try machine.ask("write vda 3 written by the guest") == ["written"])
        let file = try readFile(directory("disk.raw"), limit: 8 << 20)
        #expect(file[3 * 512..<3 * 512 + 20] == Array("written by the guest".utf8)[...])
        try machine.powerOff()
        try kill(server)
    }

    @Test func aReadOnlyExportIsReadOnly() throws {
        let server = try serve("disk.raw", ["-r"])
        let refused = try Program.machine(["--disk", address()])
        try refused.expectEnd(66)
        #expect(refused.errors.text.contains("the server exports it read-only; or add ,ro"))
        let machine = try Program.machineAtPrompt(["--disk", address() + ",ro"])
        #expect(try machine.ask("write vda 5 no") != ["written"])
        try machine.powerOff()
        try kill(server)
    }

    /// The guest's own test of its disk, while the server is killed and comes again: the guest notices nothing.
    @Test func theServerIsKilledUnderAWorkload() throws {
        var server = try serve("scratch.raw")
        let machine = try Program.machine(["--cmdline", "test=disk", "--disk", address("&reconnect=60")])
        try machine.waitUntilRunning()
        for _ in 0..<5 {
            try kill(server)
            server = try serve("scratch.raw")
        }
        try machine.expectSelfTestsPassed()
        try kill(server)
    }

    @Test func aServerThatIsGone() throws {
        let server = try serve("disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", address() + ",reconnect=0"])
        try kill(server)
        try machine.waitForError("connection lost")
        // The guest gets its error, and its machine ends as it should.
        #expect(try machine.ask("write vda 5 lost") != ["written"])
        try machine.waitForError("no connection to the server (at byte")
        let again = try serve("disk.raw")
        try machine.waitForError("reconnected after")
        #expect(try machine.ask("write vda 5 there") == ["written"])
        // With a server that says nothing the machine ends too.
        again.send(signal: SIGSTOP)
        try machine.type("write vda 6 nowhere\n")
        try machine.wait(for: "write vda 6")
        #expect(
            try eventually {
                machine.send(signal: SIGTERM)
                return !machine.isRunning
            })
        again.send(signal: SIGCONT)
        try kill(again)
    }

    /// What was only counted in the minute after a line is reported when the machine ends.
    @Test func theLogEndsWithTheStateOfTheConnection() throws {
        var server = try serve("disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", address()])
        try kill(server)
        try machine.waitForError("disk \"\(address())\": connection lost: ")
        server = try serve("disk.raw")
        try machine.waitForError("reconnected after")
        try kill(server)
        try machine.powerOff()
        let last = machine.errors.lines.last { $0.firstRange(of: "connect") != nil }
        #expect(last?.firstRange(of: "\": connection lost: ") != nil, "\(machine.story)")
    }

    /// A server that never answers holds no tool up whose user ends it.
    @Test func anInterruptedConversionLeavesNothing() throws {
        let server = try Program([
            "nbdkit", "-f", "-U", directory("socket"), "--filter=delay", "file", directory("disk.raw"),
            "delay-read=3600",
        ])
        #expect(try eventually { (try? connect(toSocket: directory("socket"))) != nil })
        let before = try directory.contents
        let tool = try Program([
            Host.swkvm, "image", "convert", "--progress", "--format", "raw",
            "nbd+unix:///?socket=\(directory("socket"))", directory("new.qcow2"),
        ])
        try tool.waitForError("%")
        tool.send(signal: SIGTERM)
        try tool.expectEnd(1)
        #expect(tool.errors.text.contains("interrupted; nothing was created"))
        #expect(try directory.contents == before)
        try kill(server)
    }

    /// An image on a remote disk: what the guest writes goes into the image, also while the server is away, and the
    /// remote disk stays as it is.
    @Test func theGuestUsesAnImageOnARemoteDisk() throws {
        let server = try serve("disk.raw", ["-r"])
        try shell("'\(Host.swkvm)' image create -q --backing '\(address())' '\(directory("over.qcow2"))'")
        let machine = try Program.machineAtPrompt([
            "--disk", directory("over.qcow2") + ",backing=anywhere,reconnect=60",
        ])
        #expect(try machine.ask("disks")[0].hasPrefix("vda: 6144 sectors, read-write"))
        let base = try readFile(directory("disk.raw"), limit: 8 << 20)
        #expect(try machine.ask("sum vda 0 6144") == ["crc32 vda 0 6144 \(hexadecimal(crc32(base)))"])
        #expect(try machine.ask("write vda 3 written by the guest") == ["written"])
        try kill(server)
        try machine.waitForError("connection lost")
        // The cluster is the image's by now; what is not comes when the server does.
        #expect(try machine.ask("write vda 4 without the server") == ["written"])
        try machine.type("sum vda 1024 1024\n")
        try machine.wait(for: "sum vda 1024 1024")
        let again = try serve("disk.raw", ["-r"])
        try machine.wait(for: "crc32 vda 1024 1024 \(hexadecimal(crc32(Array(base[1024 * 512..<2048 * 512]))))")
        try machine.powerOff()
        #expect(try readFile(directory("disk.raw"), limit: 8 << 20) == base)
        // QEMU sees what the guest saw.
        try shell("qemu-img convert -O raw '\(directory("over.qcow2"))' '\(directory("seen.raw"))'")
        var seen = try readFile(directory("seen.raw"), limit: 8 << 20)
        #expect(seen[3 * 512..<3 * 512 + 20] == Array("written by the guest".utf8)[...])
        seen.replaceSubrange(3 * 512..<5 * 512, with: base[3 * 512..<5 * 512])
        #expect(seen == base)
        try kill(again)
    }

    @Test func queuesOfAnImageOnARemoteDisk() throws {
        let server = try serve("disk.raw", ["-r"])
        try shell("'\(Host.swkvm)' image create -q --backing '\(address())' '\(directory("over.qcow2"))'")
        let refused = try Program.machine(["--disk", directory("over.qcow2") + ",backing=anywhere,queues=2"])
        try refused.expectEnd(64)
        #expect(
            refused.errors.text.contains("a remote disk, or an image on one, has one queue; queues=2 was requested"))
        try kill(server)
    }

    /// A target that cannot be restored: the message states its condition.
    @Test func aConversionOntoARemoteDisk() throws {
        let server = try serve("scratch.raw")
        let convert = [Host.swkvm, "image", "convert", directory("disk.raw"), address()]
        var tool = try Program(convert)
        try tool.expectEnd(1)
        #expect(tool.errors.text.contains("it already exists; --force overwrites it"))
        tool = try Program(convert + ["--force"])
        try tool.expectEnd(0)
        try shell("cmp -n 3145728 '\(directory("disk.raw"))' '\(directory("scratch.raw"))'")
        try kill(server)
        let slow = try Program([
            "nbdkit", "-f", "-U", directory("slow"), "--filter=log", "--filter=delay", "file", directory("scratch.raw"),
            "delay-write=3600", "delay-read=3600",
            "logfile=\(directory("log"))",
        ])
        #expect(try eventually { (try? connect(toSocket: directory("slow"))) != nil })
        tool = try Program([
            Host.swkvm, "image", "convert", "--progress", "--force", directory("disk.raw"),
            "nbd+unix:///?socket=\(directory("slow"))",
        ])
        try tool.waitForError("%")
        tool.send(signal: SIGTERM)
        try tool.expectEnd(1)
        #expect(tool.errors.text.contains("interrupted; it is partly overwritten"))
        // What only reads need not say good-bye.
        tool = try Program([
            Host.swkvm, "image", "compare", directory("disk.raw"), "nbd+unix:///?socket=\(directory("slow"))",
        ])
        #expect(
            try eventually {
                String(decoding: try readFile(directory("log"), limit: 1 << 20), as: UTF8.self).contains(" Read ")
            })
        tool.send(signal: SIGTERM)
        #expect(try tool.waitForEnd() == .signal(SIGTERM))
        try kill(slow)
    }

    /// The static binary where there is no shared library at all: it looks names up by itself, whatever nsswitch.conf
    /// wants.
    @Test func aHostByItsName() throws {
        try shell(
            """
            cd '\(directory.path)'; mkdir -p root/etc root/proc; cp '\(Host.swkvm)' root/swkvm
            printf '127.0.0.1 localhost storage\\n' >root/etc/hosts
            printf 'hosts: resolve [UNAVAIL=return] mymachines files\\n' >root/etc/nsswitch.conf
            """)
        for (name, port) in [("localhost", 10809), ("storage", 10810)] {
            // It listens when it has forked, and ends with its first client.
            let output = try shell(
                """
                cd '\(directory.path)'; unshare --net --mount sh -ec 'ip link set lo up; mount --bind /proc root/proc
                qemu-nbd --fork --pid-file=pid --read-only -f raw -x disk -b 127.0.0.1 -p \(port) disk.raw
                trap "kill $(cat pid) 2>/dev/null || true" EXIT
                chroot root /swkvm image info nbd://\(name):\(port)/disk'
                """)
            #expect(output.contains("virtual size: 3 MiB"), "\(output)")
        }
        let refused = try Program(["unshare", "--net", Host.swkvm, "image", "info", "nbd://nowhere.invalid/"])
        try refused.expectEnd(1)
        #expect(refused.errors.text.contains("its host name cannot be resolved: "))
    }
}

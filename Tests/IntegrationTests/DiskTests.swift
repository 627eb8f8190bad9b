// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Disks: what the guest reads and writes is what the host has in its files.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct DiskTests {
    private let directory: TemporaryDirectory
    private let content: [UInt8]
    private static let sectors = 3 << 11

    /// 3 MiB that look like nothing else, with a hole in the middle.
    private static let pattern: [UInt8] = {
        var state: UInt64 = 0x9e37_79b9_7f4a_7c15
        return [UInt8](unsafeUninitializedCapacity: sectors * 512) { bytes, count in
            bytes.withMemoryRebound(to: UInt64.self) { words in
                for index in words.indices {
                    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
                    words[index] = words.count / 3 <= index && index < words.count / 3 * 2 ? 0 : state ^ state >> 32
                }
            }
            count = bytes.count
        }
    }()

    init() throws {
        directory = try TemporaryDirectory()
        content = Self.pattern
        try directory.write(content, to: "disk.raw")
    }

    // MARK: Reading

    private static let images: [(name: String, script: String)] = [
        ("disk.raw", "true"),
        ("plain.qcow2", "qemu-img convert -O qcow2 disk.raw plain.qcow2"),
        ("old.qcow2", "qemu-img convert -O qcow2 -o compat=0.10 disk.raw old.qcow2"),
        ("small.qcow2", "qemu-img convert -O qcow2 -o cluster_size=512 disk.raw small.qcow2"),
        ("large.qcow2", "qemu-img convert -O qcow2 -o cluster_size=2M disk.raw large.qcow2"),
        ("compressed.qcow2", "qemu-img convert -c -O qcow2 disk.raw compressed.qcow2"),
        (
            "over.qcow2",
            """
            qemu-img create -q -f qcow2 -b disk.raw -F raw over.qcow2
            """
        ),
        (
            "top.qcow2",
            """
            qemu-img convert -c -O qcow2 disk.raw base.qcow2
            qemu-io -f qcow2 -c 'write -P 1 1M 256k' base.qcow2 >base.log
            qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2
            qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2
            qemu-io -f qcow2 -c 'write -P 0x5a 1M 64k' -c 'write -z 1088k 192k' top.qcow2 >top.log
            qemu-img convert -O raw top.qcow2 expected
            """
        ),
    ]

    @Test(arguments: images.map(\.name)) func theGuestReadsWhatTheHostWrote(name: String) throws {
        let script = try #require(Self.images.first { $0.name == name }).script
        try shell("cd '\(directory.path)'; \(script)")
        let expected =
            try directory.contents.contains("expected") ? readFile(directory("expected"), limit: 8 << 20) : content
        let machine = try Program.machineAtPrompt(["--disk", directory(name) + ",ro"])
        try expectContent(expected, of: "vda", machine)
        try machine.powerOff()
    }

    /// Sectors from everywhere, alone and many at once.
    private func expectContent(
        _ expected: [UInt8], of disk: String, _ machine: Program, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        for (start, count) in [(0, 1), (1, 7), (2047, 2), (2560, 200), (Self.sectors - 1, 1), (0, Self.sectors)] {
            let sum = crc32(expected[start * 512..<(start + count) * 512])
            #expect(
                try machine.ask("sum \(disk) \(start) \(count)") == [
                    "crc32 \(disk) \(start) \(count) \(hexadecimal(sum))"
                ],
                sourceLocation: sourceLocation)
        }
    }

    @Test func theGuestSeesWhatItsDisksAre() throws {
        try shell("cd '\(directory.path)'; qemu-img create -q -f qcow2 second.qcow2 5G; truncate -s 7M third")
        let machine = try Program.machineAtPrompt([
            "--disk", directory("disk.raw") + ",serial=first of all", "--disk", directory("second.qcow2") + ",ro",
            "--disk", directory("third") + ",format=raw,cache=none",
        ])
        let lines = try machine.ask("disks")
        #expect(lines.count == 3)
        #expect(
            lines[0].hasPrefix("vda: \(Self.sectors) sectors, read-write") && lines[0].contains("id 'first of all'"))
        #expect(lines[1].hasPrefix("vdb: \(5 << 21) sectors, read-only") && lines[1].contains("id 'swkvm-1'"))
        #expect(lines[2].hasPrefix("vdc: \(7 << 11) sectors, read-write"))
        try machine.powerOff()
    }

    /// One queue, unless the user says how many.
    @Test func aDiskHasTheQueuesThatItIsGiven() throws {
        for (arguments, queues) in [
            (["--cpus", "2", "--disk", directory("disk.raw")], 1),
            (["--cpus", "2", "--disk", directory("disk.raw") + ",queues=2"], 2),
            (["--disk", directory("disk.raw") + ",queues=3"], 3),
            (["--disk", directory("disk.raw") + ",queues=64"], 8),
        ] {
            let machine = try Program.machineAtPrompt(arguments)
            let line = try machine.ask("disks")
            #expect(line.count == 1 && line[0].contains("queues \(queues),"), "\(arguments): \(line)")
            try expectContent(content, of: "vda", machine)
            try machine.powerOff()
        }
    }

    // MARK: Writing

    @Test(arguments: ["", ",cache=none"]) func theHostReadsWhatTheGuestWrote(options: String) throws {
        let machine = try Program.machineAtPrompt(["--disk", directory("disk.raw") + options])
        #expect(try machine.ask("write vda 3 written by the guest") == ["written"])
        #expect(try machine.ask("write vda \(Self.sectors - 1) last") == ["written"])
        #expect(try machine.ask("write vda 2048 pattern 100") == ["written"])
        // It is in the file before the machine ends: the guest has flushed.
        let file = try readFile(directory("disk.raw"), limit: 8 << 20)
        var expected = content
        for (sector, text) in [(3, "written by the guest"), (Self.sectors - 1, "last")] {
            expected.replaceSubrange(
                sector * 512..<(sector + 1) * 512,
                with: Array(text.utf8) + [UInt8](repeating: 0, count: 512 - text.utf8.count))
        }
        let pattern = 2048 * 512..<2148 * 512
        #expect(file[pattern] != expected[pattern])
        expected.replaceSubrange(pattern, with: file[pattern])
        #expect(file == expected)
        try expectContent(expected, of: "vda", machine)
        try machine.powerOff()
        #expect(try readFile(directory("disk.raw"), limit: 8 << 20) == expected)
    }

    @Test func aReadOnlyDiskIsNotWritten() throws {
        try shell("cd '\(directory.path)'; cp disk.raw other.raw; chmod 444 disk.raw")
        let machine = try Program.machineAtPrompt([
            "--disk", directory("disk.raw") + ",ro", "--disk", directory("other.raw"),
        ])
        #expect(try machine.ask("write vda 5 no") != ["written"])
        #expect(try machine.ask("write vdb 5 yes") == ["written"])
        try expectContent(content, of: "vda", machine)
        try machine.powerOff()
        #expect(try readFile(directory("disk.raw"), limit: 8 << 20) == content)
    }

    @Test func theGuestsOwnDiskTests() throws {
        try shell(
            "cd '\(directory.path)'; qemu-img convert -c -O qcow2 disk.raw second.qcow2; truncate -s 64M third.raw")
        let machine = try Program.machine([
            "--cpus", "2", "--cmdline", "test=disk,hostile", "--disk", directory("disk.raw"), "--disk",
            directory("second.qcow2") + ",ro",
            "--disk", directory("third.raw") + ",cache=none",
        ])
        try machine.expectSelfTestsPassed()
        #expect(try shell("qemu-img check -q '\(directory("second.qcow2"))' && echo good") == "good\n")
    }

    // MARK: Locks

    /// The guest's own tests write to a qcow2 image over a backing file, and attack its device; qemu-img finds nothing
    /// wrong with it.
    @Test(arguments: [1, 4]) func aQCOW2ImageIsSoundAfterTheGuestsTests(queues: Int) throws {
        try shell(
            "cd '\(directory.path)'; qemu-img create -q -f qcow2 -b disk.raw -F raw -o cluster_size=4k top.qcow2 16M")
        let machine = try Program.machine([
            "--disk", directory("top.qcow2") + ",queues=\(queues)", "--cmdline", "test=disk,hostile",
        ])
        try machine.expectSelfTestsPassed()
        #expect(try shell("qemu-img check '\(directory("top.qcow2"))'").contains("No errors were found"))
        // The tests keep to the last MiB, and the backing file is not written at all.
        try shell("cd '\(directory.path)'; qemu-img convert -O raw top.qcow2 whole")
        #expect(Array(try readFile(directory("whole"), limit: 32 << 20).prefix(content.count)) == content)
        #expect(try readFile(directory("disk.raw"), limit: 32 << 20) == content)
    }

    @Test func aWrittenImageIsNobodyElses() throws {
        let disk = directory("disk.raw")
        let machine = try Program.machineAtPrompt(["--disk", disk])
        for options in ["", ",ro"] {
            let second = try Program.machine(["--disk", disk + options])
            try second.expectEnd(71)
            #expect(second.errors.text == "swkvm: disk \"\(disk)\": another process has it open for writing\n")
        }
        let tool = try Program(["qemu-img", "resize", "-f", "raw", disk, "4M"])
        #expect(try tool.waitForEnd() == .status(1))
        #expect(tool.errors.text.contains("lock"))
        let writer = try Program(["qemu-io", "-f", "raw", "-c", "write 0 512", disk])
        #expect(try writer.waitForEnd() == .status(1))
        try machine.powerOff()
        try shell("qemu-io -f raw -c 'write 0 512' '\(disk)'")
    }

    @Test func readersShareAnImage() throws {
        let disk = directory("disk.raw")
        let machines = try (0..<2).map { _ in try Program.machineAtPrompt(["--disk", disk + ",ro"]) }
        try shell("qemu-img info '\(disk)'")
        let writer = try Program.machine(["--disk", disk])
        try writer.expectEnd(71)
        #expect(
            writer.errors.text.hasPrefix(
                "swkvm: disk \"\(disk)\": another process has it open and requires that its contents do not change"))
        for machine in machines { try machine.powerOff() }
    }

    @Test func anImageThatQEMUWritesIsRefused() throws {
        let disk = directory("disk.raw")
        // qemu-io holds it for as long as it has input.
        let tool = try Program(["qemu-io", "-f", "raw", disk], input: .pipe)
        try tool.type("read 0 512\n")
        try tool.wait(for: "read 512/512")
        let machine = try Program.machine(["--disk", disk])
        try machine.expectEnd(71)
        #expect(machine.errors.text == "swkvm: disk \"\(disk)\": another process has it open for writing\n")
        tool.closeInput()
        try tool.waitForEnd()
        try Program.machine(["--disk", disk, "--cmdline", "test=none"]).expectEnd(0)
    }

    @Test func killLeavesNoLock() throws {
        let disk = directory("disk.raw")
        let terminal = try PseudoTerminal()
        let machine = try Program.machineAtPrompt(["--disk", disk], terminal: terminal)
        machine.send(signal: SIGKILL)
        #expect(try machine.waitForExit() == .signal(SIGKILL))
        #expect(
            try eventually {
                try Program.machine(["--disk", disk, "--cmdline", "test=none"]).waitForEnd() == .status(0)
            })
    }

    /// The file is replaced, cut or taken away under the machine: an error of the guest's, not of the process.
    @Test func aFileThatBecomesTooShortIsAnErrorForTheGuest() throws {
        let machine = try Program.machineAtPrompt(["--disk", directory("disk.raw")])
        try shell("truncate -s 1M '\(directory("disk.raw"))'")
        let answer = try machine.ask("sum vda 4000 8")
        #expect(answer.count == 1)
        try machine.waitForError(
            "error: blk0: disk \"\(directory("disk.raw"))\": read: Input/output error (at byte 2048000 of the file)")
        let sum = crc32(content[..<512])
        #expect(try machine.ask("sum vda 0 1") == ["crc32 vda 0 1 \(hexadecimal(sum))"])
        try machine.powerOff()
    }

    @Test func aFullFileSystemIsAnErrorForTheGuest() throws {
        let mount = directory("mount")
        let script = """
            mkdir -p '\(mount)'
            mount -t tmpfs -o size=1M none '\(mount)'
            truncate -s 4M '\(mount)/disk.raw'
            exec '\(Host.swkvm)' run --mem 64M --on-disk-error report --disk '\(mount)/disk.raw'
            """
        let machine = try Program(["unshare", "-m", "sh", "-euc", script], input: .pipe)
        try machine.wait(for: Program.prompt)
        #expect(try machine.ask("write vda 0 pattern 100") == ["written"])
        let answer = try machine.ask("write vda 1000 pattern 4000")
        #expect(answer.count == 1 && answer != ["written"], "\(answer)")
        try machine.waitForError("error: blk0: disk \"\(mount)/disk.raw\": write: No space left on device (at byte ")
        #expect(try machine.ask("echo alive") == ["alive"])
        try machine.powerOff()
    }

    /// For disks whose contents do not matter. The host's log and the metrics have it.
    @Test(arguments: ["raw", "qcow2"]) func anIgnoredErrorIsASuccessForTheGuest(format: String) throws {
        let mount = directory("mount"), metrics = directory("metrics.prom")
        let script = """
            mkdir -p '\(mount)'
            mount -t tmpfs -o size=1M none '\(mount)'
            qemu-img create -q -f \(format) '\(mount)/disk.\(format)' 4M
            exec '\(Host.swkvm)' run --mem 64M --on-disk-error ignore --disk '\(mount)/disk.\(format)' \
                --metrics '\(metrics)' --metrics-format prometheus
            """
        let machine = try Program(["unshare", "-m", "sh", "-euc", script], input: .pipe)
        try machine.wait(for: Program.prompt)
        #expect(try machine.ask("write vda 1000 pattern 4000") == ["written"])
        try machine.waitForError("No space left on device")
        try machine.waitForError("; ignored: success is reported to the guest")
        try machine.powerOff()
        #expect(try shell("grep -c '^swkvm_block_ignored_errors_total{.*} [1-9]' '\(metrics)'") == "1\n")
    }

    /// The host learns what is wrong with an image, once, and not only the guest.
    @Test func aDamagedImageIsReported() throws {
        // Where qemu-img puts the first L2 table: its first entry then names a byte that no cluster begins at.
        try shell(
            """
            cd '\(directory.path)'; qemu-img convert -O qcow2 disk.raw plain.qcow2
            printf '\\200\\0\\0\\0\\0\\005\\002\\0' | dd of=plain.qcow2 bs=1 seek=262144 conv=notrunc 2>dd.log
            """)
        let machine = try Program.machineAtPrompt(["--disk", directory("plain.qcow2") + ",ro"])
        for _ in 0..<3 {
            #expect(try machine.ask("sum vda 0 8") != ["crc32 vda 0 8 \(hexadecimal(crc32(content[..<4096])))"])
        }
        try machine.waitForError(
            "error: blk0: disk \"\(directory("plain.qcow2"))\": damaged or invalid: L2 table at byte 262144, "
                + "entry at byte 262144: a data cluster at byte 328192, which is not cluster-aligned")
        try machine.powerOff()
        #expect(machine.errors.lines.count { $0.contains("damaged") } == 2, "\(machine.errors.text)")
        #expect(machine.errors.lines.last?.contains("blk0: 2 more: disk") == true, "\(machine.errors.text)")
    }
}

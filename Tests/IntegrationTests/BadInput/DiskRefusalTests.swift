// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// Disks that are missing, damaged, in use or too many.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct DiskRefusalTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    @Test func diskMissing() throws {
        try expectRefused(
            ["--disk", directory("none.raw")], "disk \"\(directory("none.raw"))\": open: No such file or directory",
            status: Status.input)
    }

    @Test func diskThatIsADirectory() throws {
        try expectRefused(
            ["--disk", directory.path + ",format=raw"], "disk \"\(directory.path)\": ", status: Status.input)
    }

    @Test func diskOfUnknownFormat() throws {
        let disk = try directory.write([0], to: "disk")
        try expectRefused(
            ["--disk", disk], "disk \"\(disk)\": its file name does not determine the format", status: Status.usage)
        try expectRefused(["--disk", disk + ",format=qed"], "", status: Status.usage)
    }

    @Test func diskThatIsNotQCOW2() throws {
        let disk = try directory.write([UInt8](repeating: 0x41, count: 70_000), to: "disk.qcow2")
        try expectRefused(
            ["--disk", disk + ",ro"], "disk \"\(disk)\": not a qcow2 image: starts with \"AAAA\"", status: Status.input)
        try directory.write([], to: "disk.qcow2")
        try expectRefused(
            ["--disk", disk + ",ro"], "disk \"\(disk)\": not a qcow2 image: starts with nothing (an empty file)",
            status: Status.input)
    }

    /// Wherever it is cut.
    @Test func diskTruncated() throws {
        let disk = directory("disk.qcow2")
        try shell("qemu-img create -q -f qcow2 '\(disk)' 64M; qemu-io -f qcow2 -c 'write -P 7 0 1M' '\(disk)'")
        let whole = try readFile(disk, limit: 16 << 20)
        for size in [50, 71, 104, 4096, 65536, 196_608] {
            try directory.write(whole[..<size], to: "disk.qcow2")
            try expectRefused(["--disk", disk + ",ro"], "disk \"\(disk)\": ", status: Status.input)
        }
    }

    @Test func diskThatMayNotBeWritten() throws {
        let disk = directory("disk.qcow2")
        // Marked as corrupt: incompatible feature bit 1, in the last byte of the field at 72.
        try shell(
            "qemu-img create -q -f qcow2 '\(disk)' 64M; printf '\\002' | dd of='\(disk)' bs=1 seek=79 conv=notrunc 2>/dev/null"
        )
        try expectRefused(
            ["--disk", disk], "disk \"\(disk)\": it cannot be opened for writing: it is marked as corrupt",
            status: Status.input)
    }

    @Test func diskWhoseBackingFileIsMissing() throws {
        let disk = directory("disk.qcow2")
        try shell(
            "cd '\(directory.path)'; truncate -s 1M base.raw; qemu-img create -q -f qcow2 -b base.raw -F raw disk.qcow2; rm base.raw"
        )
        try expectRefused(["--disk", disk + ",ro"], "disk \"\(disk)\", backing file: disk ", status: Status.input)
    }

    @Test func diskLocked() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let holder = try Program.machineAtPrompt(["--disk", disk])
        try expectRefused(["--disk", disk], "disk \"\(disk)\": another process has it open for writing")
        try holder.powerOff()
    }

    @Test func theSameDiskTwice() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let other = directory("other.raw")
        #expect(link(disk, other) == 0)
        for (second, options) in [(other, ",ro"), (disk, "")] {
            try expectRefused(
                ["--disk", disk, "--disk", second + options],
                "disk \"\(second)\": \"\(second)\" is also used by the disk \"\(disk)\" of the same machine",
                status: Status.usage)
        }
        // The overlay over IMAGE is not the user's.
        try expectRefused(
            [disk, "--kernel", "bundled", "--disk", disk],
            "disk \"\(disk)\": \"\(disk)\" is also used by the disk \"\(disk)\" of the same machine",
            status: Status.usage)
    }

    @Test func tooManyDevices() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let disks = (0..<17).flatMap { _ in ["--disk", disk + ",ro"] }
        try expectRefused(
            disks, "17 disks and other virtio devices were requested, but a machine has 16 slots", status: Status.usage,
            withNetwork: false)
        try expectRefused(
            Array(disks[..<32]), "17 disks and other virtio devices were requested, but a machine has 16 slots",
            status: Status.usage)
        // Sixteen are fine.
        let machine = try Program.machineAtPrompt(Array(disks[..<32]))
        #expect(try machine.ask("disks").count == 16)
        try machine.powerOff()
    }
}

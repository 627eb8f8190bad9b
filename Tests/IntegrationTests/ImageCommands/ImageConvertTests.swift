// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// `swkvm image convert` and `compare`.
@Suite(.timed) struct ImageConvertTests: ImageCommandSuite {
    let directory: TemporaryDirectory

    init() throws { directory = try Self.makeDirectory() }

    @Test func convertsAndCompares() throws {
        for (options, name) in [
            ("", "a"), ("--compress", "b"), ("--compress --compression-type zstd --cluster-size 4K", "c"),
            ("--sync -m 1", "d"), ("--cache none", "e"),
        ] {
            #expect(try image("convert \(options) disk.raw \(name).qcow2").status == .status(0), "\(options)")
            try shell(
                "cd '\(directory.path)' && qemu-img check -q \(name).qcow2 && qemu-img compare -q disk.raw \(name).qcow2"
            )
            #expect(try image("compare disk.raw \(name).qcow2").output == "Images are identical.\n")
            #expect(try image("convert \(name).qcow2 \(name).raw").status == .status(0))
            try shell("cd '\(directory.path)' && cmp disk.raw \(name).raw && [ $(stat -c %b \(name).raw) -lt 6200 ]")
        }
    }

    /// The number of threads does not change the image.
    @Test func theSameImageEveryTime() throws {
        for options in ["", "--compress", "--cluster-size 512"] {
            for threads in [1, 2, 8] {
                #expect(
                    try image("convert -m \(threads) \(options) --force disk.raw \(threads).qcow2").status == .status(0)
                )
            }
            try shell("cd '\(directory.path)' && cmp 1.qcow2 2.qcow2 && cmp 1.qcow2 8.qcow2")
        }
    }

    /// A VHD has two sizes: the size that was used is reported, and the user can choose.
    @Test func theSizeOfAVHDIsSaid() throws {
        try shell(
            """
            cd '\(directory.path)'
            qemu-img convert -f raw -O vpc -o subformat=fixed,force_size=on disk.raw disk.vhd
            printf 'vbox' | dd of=disk.vhd bs=1 seek=8388636 conv=notrunc status=none
            printf '\\0\\360\\004\\021' | dd of=disk.vhd bs=1 seek=8388664 conv=notrunc status=none
            """)
        // The checksum of what was changed.
        var bytes = try readFile(directory("disk.vhd"), limit: 16 << 20)
        let place = bytes.count - 512
        bytes.replaceSubrange(place + 64..<place + 68, with: [0, 0, 0, 0])
        let sum = ~bytes[place...].reduce(0 as UInt32) { $0 &+ UInt32($1) }
        bytes.replaceSubrange(
            place + 64..<place + 68, with: (0..<4).map { UInt8(truncatingIfNeeded: sum >> (24 - 8 * $0)) })
        let file = try FileDescriptor.open(directory("disk.vhd"), O_WRONLY)
        try file.writeAll(bytes)
        let info = try image("info disk.vhd")
        #expect(
            info.status == .status(0) && info.output.contains("(8388608 bytes)")
                && info.output.contains("size taken: current"), "\(info)")
        let all = try image("convert disk.vhd all.raw"), part = try image("convert --vhd-size chs disk.vhd part.raw")
        #expect(
            all.status == .status(0)
                && all.errors.contains("8388608 bytes (current) and 8355840 by its geometry (chs); current is used"),
            "\(all)")
        #expect(all.errors.split(separator: "\n").count == 1, "\(all)")
        #expect(part.status == .status(0) && part.errors.isEmpty, "\(part)")
        try shell(
            "cd '\(directory.path)' && cmp disk.raw all.raw && [ $(stat -c %s part.raw) = 8355840 ] && cmp -n 8355840 disk.raw part.raw"
        )
    }

    @Test func compareTellsByItsStatus() throws {
        try shell(
            "cd '\(directory.path)' && cp disk.raw other.raw && printf x | dd of=other.raw bs=1 seek=2000000 conv=notrunc status=none"
        )
        let different = try image("compare disk.raw other.raw")
        #expect(different.status == .status(1) && different.output.hasPrefix("Content mismatch at offset "))
        try expectRefused("compare disk.raw none.raw", "none.raw\": open: No such file or directory", status: 2)
    }

    // MARK: - Interruption

    /// A conversion that takes several seconds.
    private func longConversion() throws -> Program {
        try shell("cd '\(directory.path)' && [ -e long.raw ] || head -c 200M /dev/urandom >long.raw")
        let program = try Program([
            "sh", "-c",
            "cd '\(directory.path)' && exec '\(Host.swkvm)' image convert --progress -m 1 --compress --compression-level 9 long.raw long.qcow2",
        ])
        try program.waitForError("% ")
        return program
    }

    @Test func signalsLeaveNothing() throws {
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let program = try longConversion()
            program.send(signal: signal)
            #expect(try program.waitForEnd() == .status(1))
            #expect(program.errors.text.contains("interrupted; nothing was created"))
            #expect(try directory.contents.sorted() == ["disk.raw", "long.raw"])
        }
    }

    @Test func killedLeavesNothingInTheWay() throws {
        let program = try longConversion()
        program.send(signal: SIGKILL)
        _ = try program.waitForEnd()
        #expect(try !directory.contents.contains("long.qcow2"))
        let again = try image("convert --cluster-size 2M long.raw long.qcow2")
        #expect(again.status == .status(0), "\(again)")
        try shell("cd '\(directory.path)' && qemu-img compare -q long.raw long.qcow2")
    }
}

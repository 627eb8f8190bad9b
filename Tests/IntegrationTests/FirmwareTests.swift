// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// Machines that start with firmware: a few bytes of real-mode code, and Debian's SeaBIOS.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct FirmwareTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    private static let seaBIOS = "/usr/share/seabios"

    /// 64 KiB with code at their begin, which the reset vector jumps to in the copy below 1 MiB.
    private func firmware(_ code: [UInt8]) throws -> String {
        var rom = code + [UInt8](repeating: 0xff, count: 0x1_0000 - code.count)
        rom.replaceSubrange(0xfff0..<0xfff5, with: [0xea, 0x00, 0x00, 0x00, 0xf0])  // ljmp $0xf000, $0
        return try directory.write(rom, to: "firmware")
    }

    /// Ends with status AL.
    private static let exit: [UInt8] = [0xba, 0x01, 0x05, 0xee, 0xf4]  // mov $0x501, %dx; out %al, %dx; hlt

    /// The number of CPUs, which is item 5, by ports; its status is one more.
    @Test func realModeCodeReadsTheConfigurationByPorts() throws {
        let code: [UInt8] =
            [
                0xba, 0x10, 0x05, 0xb8, 0x05, 0x00, 0xef,  // mov $0x510, %dx; mov $5, %ax; out %ax, %dx
                0x42, 0xec, 0xfe, 0xc0,  // inc %dx; in (%dx), %al; inc %al
            ] + Self.exit
        let machine = try Program.machine(
            ["--firmware", try firmware(code), "--mem", "16M", "--cpus", "2", "--console", "none"])
        try machine.expectEnd(3)
    }

    /// The same by DMA, from a command that the code writes to 0x1000. The code at the end of the first 4 GiB is
    /// read-only; the copy below 1 MiB is not.
    @Test func realModeCodeReadsTheConfigurationByDMA() throws {
        let code: [UInt8] =
            [
                0x31, 0xc0, 0x8e, 0xd8,  // xor %ax, %ax; mov %ax, %ds
                0x66, 0xc7, 0x06, 0x00, 0x10, 0x00, 0x05, 0x00, 0x0a,  // movl, (0x1000): select 5, read
                0x66, 0xc7, 0x06, 0x04, 0x10, 0x00, 0x00, 0x00, 0x02,  // movl, (0x1004): 2 bytes
                0x66, 0xc7, 0x06, 0x08, 0x10, 0x00, 0x00, 0x00, 0x00,
                0x66, 0xc7, 0x06, 0x0c, 0x10, 0x00, 0x00, 0x20, 0x00,  // movl, (0x1008): to 0x2000
                0xba, 0x18, 0x05, 0x66, 0xb8, 0x00, 0x00, 0x10, 0x00, 0x66, 0xef,  // outl 0x1000, swapped, to 0x518
                0xa0, 0x00, 0x20,  // mov 0x2000, %al
                0x02, 0x06, 0x03, 0x10,  // add 0x1003, %al: control, which is 0
            ] + Self.exit
        let machine = try Program.machine(
            ["--firmware", try firmware(code), "--mem", "16M", "--cpus", "3", "--console", "none"])
        try machine.expectEnd(3)
    }

    /// A reset by port 0xcf9 starts at the reset vector again. The boots are counted in CMOS RAM; the first changes the
    /// copy of the code, which the second has as it was.
    @Test(arguments: ["mmio", "pci"]) func aResetStartsItAgain(bus: String) throws {
        let code: [UInt8] =
            [
                0xb0, 0x50, 0xe6, 0x70, 0xe4, 0x71,  // mov $0x50, %al; out %al, $0x70; in $0x71, %al
                0x3c, 0x02, 0x74, 0x13,  // cmp $2, %al; je done
                0xfe, 0xc0, 0xe6, 0x71,  // inc %al; out %al, $0x71
                0x2e, 0xc6, 0x06, 0x1e, 0x00, 0x09,  // movb $9, %cs:(status)
                0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee,  // mov $0xcf9, %dx; mov $6, %al; out %al, %dx
                0xf4, 0xeb, 0xfd,  // 1: hlt; jmp 1b
                0xb0, 0x07,  // done: mov $7, %al
            ] + Self.exit
        let machine = try Program.machine(
            ["--firmware", try firmware(code), "--mem", "16M", "--bus", bus, "--console", "none"])
        try machine.expectEnd(7)
    }

    /// A boot sector that prints by the BIOS what the disk's second sector has, and ends with status 7.
    private func bootDisk() throws -> String {
        let code: [UInt8] = [
            0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c,  // DS, ES, SS = 0; SP = 0x7c00
            0xb8, 0x01, 0x02, 0xbb, 0x00, 0x80, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0xcd, 0x13,  // read sector 2 to 0x8000
            0x72, 0x12, 0xbe, 0x00, 0x80, 0xfc,  // jc 2f; mov $0x8000, %si; cld
            0xac, 0x84, 0xc0, 0x74, 0x09,  // 1: lodsb; test %al, %al; jz 2f
            0xb4, 0x0e, 0xbb, 0x07, 0x00, 0xcd, 0x10, 0xeb, 0xf2,  // print %al; jmp 1b
            0xba, 0x01, 0x05, 0xb0, 0x07, 0xee, 0xf4, 0xeb, 0xfd,  // 2: status 7
        ]
        var disk = [UInt8](repeating: 0, count: 1 << 20)
        disk.replaceSubrange(0..<code.count, with: code)
        (disk[510], disk[511]) = (0x55, 0xaa)
        let text = Array("read by the BIOS\r\n".utf8)
        disk.replaceSubrange(512..<512 + text.count, with: text)
        return try directory.write(disk, to: "disk.raw")
    }

    @Test(
        .enabled(if: access(seaBIOS + "/bios-microvm.bin", R_OK) == 0, "seabios is not installed"),
        arguments: [("mmio", "bios-microvm.bin"), ("pci", "bios-256k.bin")])
    func seaBIOSBootsADisk(bus: String, file: String) throws {
        let machine = try Program.machine([
            "--firmware", "\(Self.seaBIOS)/\(file)", "--bus", bus, "--mem", "64M", "--cpus", "2", "--disk",
            try bootDisk(), "--log-level", "debug",
        ])
        try machine.expectEnd(7)
        #expect(machine.output.text.contains("read by the B"), "\(machine.story)")
        #expect(machine.errors.text.contains("firmware: SeaBIOS"), "\(machine.story)")
        #expect(machine.errors.text.contains("Found 2 cpu(s)"), "\(machine.story)")
    }

    @Test func whatIsWrongIsSaid() throws {
        let rom = try firmware(Self.exit)
        let missing = try Program.machine(["--firmware", directory("none"), "--console", "none"])
        try missing.expectEnd(66)
        #expect(missing.errors.text == "swkvm: cannot read \(directory("none")): No such file or directory\n")
        for (words, sentence) in [
            (["--boot", "default", "--disk", "d.raw"], "firmware finds what boots on a disk by itself"),
            (["--kernel", "k"], "firmware boots from a disk"),
            (["--cmdline", "quiet"], "gets the command line of its boot loader"),
            (["--discovery", "cmdline"], "nothing is added to the command line"),
        ] {
            let machine = try Program.machine(["--firmware", rom] + words)
            try machine.expectEnd(64)
            #expect(machine.errors.text.contains(sentence), "\(machine.story)")
        }
        for (size, change, sentence) in [
            (4096, nil, "it has 4096 bytes, expected a multiple of 4096 from 64 KiB to 16 MiB"),
            (0x1_0200, nil, "it has 66048 bytes"), (0x100_1000, nil, "it has 16781312 bytes"),
            (0x1_0000, nil, "there is no code at the reset vector"), (0x1_0000, 40, "it is UEFI firmware"),
        ] as [(Int, Int?, String)] {
            var bytes = [UInt8](repeating: 0, count: size)
            if let change { bytes.replaceSubrange(change..<change + 4, with: "_FVH".utf8) }
            let machine = try Program.machine(
                ["--firmware", try directory.write(bytes, to: "wrong"), "--console", "none"])
            try machine.expectEnd(66)
            #expect(machine.errors.text.contains("wrong is not usable as firmware: \(sentence)"), "\(machine.story)")
        }
    }
}

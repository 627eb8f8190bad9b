// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// Machines that start firmware: a few bytes of real-mode code, and Debian's SeaBIOS.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct FirmwareTests {
    private let directory: TemporaryDirectory

    init() throws { directory = try TemporaryDirectory() }

    private static let seaBIOS = "/usr/share/seabios"

    /// 64 KiB that begin with code, to whose copy below 1 MiB the reset vector jumps.
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

    /// A disk of 1 MiB with this code in its first sector.
    private func bootSector(_ code: [UInt8]) -> [UInt8] {
        var disk = [UInt8](repeating: 0, count: 1 << 20)
        disk.replaceSubrange(0..<code.count, with: code)
        (disk[510], disk[511]) = (0x55, 0xaa)
        return disk
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
        var disk = bootSector(code)
        let text = Array("read by the BIOS\r\n".utf8)
        disk.replaceSubrange(512..<512 + text.count, with: text)
        return try directory.write(disk, to: "disk.raw")
    }

    /// SeaBIOS on both buses.
    private enum Variant: String, CaseIterable {
        case mmio = "bios-microvm.bin", pci = "bios-256k.bin"

        static let areInstalled = allCases.allSatisfy { access(seaBIOS + "/" + $0.rawValue, R_OK) == 0 }

        var options: [String] { ["--firmware", seaBIOS + "/" + rawValue, "--bus", self == .pci ? "pci" : "mmio"] }
    }

    @Test(
        .enabled(if: Variant.areInstalled, "seabios is not installed"), arguments: Variant.allCases, [1, 2])
    private func seaBIOSBootsADisk(variant: Variant, cpus: Int) throws {
        let machine = try Program.machine(
            variant.options + [
                "--mem", "64M", "--cpus", "\(cpus)", "--disk", try bootDisk(), "--log-level", "debug",
            ])
        try machine.expectEnd(7)
        #expect(machine.output.text.contains("read by the B"), "\(machine.story)")
        #expect(machine.errors.text.contains("firmware: SeaBIOS"), "\(machine.story)")
        #expect(machine.errors.text.contains("Found \(cpus) cpu(s)"), "\(machine.story)")
    }

    /// The boot sector resets the machine twice, by the reset control register and by the keyboard controller; SeaBIOS
    /// boots the disk again each time.
    @Test(.enabled(if: Variant.areInstalled, "seabios is not installed"), arguments: Variant.allCases)
    private func aResetStartsSeaBIOSAgain(variant: Variant) throws {
        let code: [UInt8] =
            [
                0xfa, 0xb0, 0x50, 0xe6, 0x70, 0xe4, 0x71,  // cli; mov $0x50, %al; out %al, $0x70; in $0x71, %al
                0x3c, 0x02, 0x74, 0x15, 0xfe, 0xc0, 0xe6, 0x71,  // cmp $2, %al; je 3f; inc %al; out %al, $0x71
                0x3c, 0x01, 0x75, 0x06,  // cmp $1, %al; jne 1f
                0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee,  // mov $0xcf9, %dx; mov $6, %al; out %al, %dx
                0xb0, 0xfe, 0xe6, 0x64,  // 1: mov $0xfe, %al; out %al, $0x64
                0xf4, 0xeb, 0xfd,  // 2: hlt; jmp 2b
                0xb0, 0x07,  // 3: mov $7, %al
            ] + Self.exit
        let machine = try Program.machine(
            variant.options + ["--mem", "64M", "--disk", try directory.write(bootSector(code), to: "disk.raw")])
        try machine.expectEnd(7)
        let boots = machine.output.lines.filter { $0.contains("Booting from Hard Disk") }
        #expect(boots.count == 3, "\(machine.story)")
    }

    private static let loaderFiles = [
        "/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/ISOLINUX/isohdpfx.bin",
        "/usr/lib/syslinux/modules/bios/ldlinux.c32",
        "/usr/bin/xorriso",
    ]

    /// Debian's ISOLINUX, on an ISO image that is a disk too, reads its configuration, uses the serial console, and
    /// loads a kernel, whose setup code ends with status 7.
    @Test(
        .enabled(if: Variant.areInstalled, "seabios is not installed"),
        .enabled(
            if: loaderFiles.allSatisfy { access($0, R_OK) == 0 },
            "isolinux, syslinux-common or xorriso is not installed"))
    func aBootLoaderStartsAKernel() throws {
        // Linux' boot protocol 2.6: setup code of one sector behind the boot sector.
        var kernel = [UInt8](repeating: 0, count: 1040)
        kernel[0x1f1] = 1  // setup_sects
        kernel[0x1f4] = 1  // syssize
        kernel.replaceSubrange(0x1fe..<0x208, with: [0x55, 0xaa, 0xeb, 0x66] + "HdrS".utf8 + [6, 2])
        kernel[0x211] = 1  // LOADED_HIGH
        kernel[0x216] = 0x10  // code32_start: 0x100000
        kernel.replaceSubrange(0x22c..<0x230, with: [0xff, 0xff, 0xff, 0x37])  // initrd_addr_max
        kernel[0x238] = 0xff  // cmdline_size
        let code: [UInt8] = [0xb0, 0x07] + Self.exit
        kernel.replaceSubrange(0x268..<0x268 + code.count, with: code)
        _ = try shell("mkdir '\(directory("tree"))'")
        try directory.write(kernel, to: "tree/kernel")
        try directory.write(
            Array(
                "serial 0 115200\nprompt 0\ntimeout 1\nsay Configuration read\ndefault k\nlabel k\nlinux /kernel\n".utf8
            ),
            to: "tree/isolinux.cfg")
        let image = directory("disk.iso")
        _ = try shell(
            """
            cp \(Self.loaderFiles[0]) \(Self.loaderFiles[2]) '\(directory("tree"))'
            xorriso -as mkisofs -quiet -o '\(image)' -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
                -boot-info-table -isohybrid-mbr \(Self.loaderFiles[1]) '\(directory("tree"))' 2>&1
            """)
        let machine = try Program.machine(
            Variant.mmio.options + ["--mem", "64M", "--disk", "\(image),format=raw,ro"])
        try machine.expectEnd(7)
        #expect(machine.output.text.contains("Configuration read"), "\(machine.story)")
        #expect(machine.output.text.contains("Loading /kernel..."), "\(machine.story)")
    }

    /// A debugger gets the machine at the reset vector. Its addresses are physical ones; RIP is an offset in CS.
    @Test func aDebuggerStopsAtTheResetVector() throws {
        let machine = try Program.machine([
            "--firmware", try firmware([0xb0, 0x07] + Self.exit), "--mem", "16M", "--console", "none", "--gdb",
            "unix:" + directory("gdb"),
        ])
        try machine.waitForError("the guest waits at its first instruction")
        let debugger = DebugConnection(try connect(toSocket: directory("gdb")))
        func instructionPointer() throws -> Substring {
            // The 17th register of 8 bytes.
            try debugger.ask("g").dropFirst(256).prefix(16)
        }
        #expect(try debugger.ask("?") == "T02thread:1;")
        #expect(try instructionPointer() == "f0ff000000000000")
        #expect(try debugger.ask("mffff0,5") == "ea000000f0")
        #expect(try debugger.ask("vCont;s:1").hasPrefix("T05"))
        #expect(try instructionPointer() == "0000000000000000")
        #expect(try debugger.ask("mf0000,4") == "b007ba01")
        #expect(try debugger.ask("vCont;c") == "W07")
        try machine.expectEnd(7)
    }

    /// `create` neither looks for a kernel in an image nor defines one. The machines run in the background.
    @Test func aDefinedMachineStartsIt() throws {
        let home = try MachineHome()
        let rom = try firmware([0xfa, 0xf4, 0xeb, 0xfd])  // cli; 1: hlt; jmp 1b
        let image = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "disk.raw")
        for (name, words) in [("bare", []), ("disk", [image, "--net", "none"])] as [(String, [String])] {
            let created = try home.start(["create", name] + words + ["--firmware", rom, "--mem", "16M", "--start"])
            #expect(try created.waitForEnd() == .status(0), "\(created.story)")
            let definition = try home.definition(of: name)
            #expect(definition.contains("firmware = \"\(rom)\""), "\(definition)")
            #expect(!definition.contains("kernel =") && !definition.contains("boot ="), "\(definition)")
        }
        #expect(try home.states == ["bare running", "disk running"])
        for name in ["bare", "disk"] { try home.swkvm("stop", "--force", name) }
        try home.swkvm("start", "disk")
        #expect(try home.states == ["bare stopped", "disk running"])
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

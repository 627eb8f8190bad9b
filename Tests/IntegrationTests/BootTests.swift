// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

/// What boots, what its command line is, and the errors for users who expected something else.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct BootTests {
    private let directory: TemporaryDirectory
    private let disk: String
    private let kernel: String

    init() throws {
        directory = try TemporaryDirectory()
        disk = try directory.write([UInt8](repeating: 1, count: 4096), to: "disk.raw")
        kernel = try directory.write(TinyKernel.elf(TinyKernel.commandLinePrinter), to: "vmlinux")
    }

    // MARK: A disk, an initrd, no kernel

    @Test func aDiskThatDoesNotBootIsNoSilentSurprise() throws {
        let note =
            "swkvm: no kernel was specified: the bundled guest boots, with \(disk) as a disk. To boot the system on a disk, add `--boot default`, or specify its kernel: "
        let machine = try Program.machineAtPrompt(["--disk", disk])
        try machine.powerOff()
        #expect(machine.errors.lines.count == 1 && machine.errors.text.hasPrefix(note), "\(machine.errors.text)")
        let linuxWords = try Program.machineAtPrompt(["--disk", disk], words: "root=/dev/vda1 ro")
        try linuxWords.powerOff()
        #expect(linuxWords.errors.text.hasPrefix(note), "\(linuxWords.errors.text)")
        // There is no note where the bundled guest is asked for, or addressed.
        for arguments in [
            ["--kernel", "bundled"], ["--cmdline", "test=none"], ["--cmdline", "run=disks"],
            ["--kernel", Host.guestKernel],
        ] {
            let machine = try Program.machine(arguments + ["--disk", disk])
            if !arguments.contains("--cmdline") {
                try machine.wait(for: Program.prompt)
                machine.send(signal: SIGKILL)
                try machine.waitForEnd()
            } else {
                try machine.expectEnd(0)
            }
            #expect(machine.errors.bytes.isEmpty, "\(machine.errors.text)")
        }
    }

    @Test func anInitialRAMDiskWithoutAKernelIsRefused() throws {
        for arguments in [[], ["--kernel", "bundled"]] {
            let machine = try Program.machine(arguments + ["--initrd", disk])
            try machine.expectEnd(64)
            #expect(
                machine.errors.lines.count == 1 && machine.errors.text.contains("--initrd requires --kernel"),
                "\(machine.errors.text)")
            #expect(machine.errors.text.contains("--kernel vmlinuz --initrd \(disk)"))
        }
        // Of a disk that boots there is one.
        for arguments in [[disk], ["--disk", disk, "--boot", "default"]] {
            let machine = try Program.machine(arguments + ["--initrd", disk])
            try machine.expectEnd(64)
            #expect(
                machine.errors.text
                    == "swkvm: the option --initrd requires --kernel: the initial RAM disk is that of the boot entry; to use another one, specify --kernel too\n"
            )
        }
    }

    /// A file of that name is meant by a path.
    @Test func aFileThatIsCalledBundled() throws {
        try shell("cp '\(kernel)' '\(directory("bundled"))'")
        let machine = try Program([
            "sh", "-euc",
            "cd '\(directory.path)'; exec '\(Host.swkvm)' run --kernel ./bundled --cmdline 'from the file'",
        ])
        try machine.expectEnd(0)
        #expect(machine.output.text == "console=ttyS0 from the file")
    }

    // MARK: The command line

    /// The command line that a Linux kernel is started with.
    private func commandLine(_ arguments: [String]) throws -> String {
        let machine = try Program.machine(["--kernel", kernel] + arguments)
        try machine.expectEnd(0)
        #expect(machine.errors.bytes.isEmpty, "\(machine.errors.text)")
        return machine.output.text
    }

    @Test func linuxGetsAConsole() throws {
        #expect(try commandLine([]) == "console=ttyS0")
        #expect(try commandLine(["--cmdline", "quiet -- console=x"]) == "console=ttyS0 quiet -- console=x")
        #expect(try commandLine(["--cmdline", "quiet console=tty0"]) == "quiet console=tty0")
        for words in ["", "quiet", " as it  is "] { #expect(try commandLine(["--cmdline-raw", words]) == words) }
        let image = try directory.write(TinyKernel.bzImage(TinyKernel.commandLinePrinter), to: "bzImage")
        let machine = try Program.machine(["--kernel", image, "--cmdline", "root=/dev/vda"])
        try machine.expectEnd(0)
        #expect(machine.output.text == "console=ttyS0 root=/dev/vda")
        // Nobody would see it, and each of its bytes is an exit. mov edx, [rsi + 0x228]; mov al, [rdx]; out 0x501: the
        // first byte is the status.
        let first: [UInt8] = [0x8b, 0x96, 0x28, 0x02, 0x00, 0x00, 0x8a, 0x02, 0x66, 0xba, 0x01, 0x05, 0xee, 0xeb, 0xfe]
        let teller = try directory.write(TinyKernel.elf(first), to: "teller")
        try Program.machine(["--kernel", teller, "--console", "none", "--cmdline", "!"]).expectEnd(0x21)
    }

    @Test func bothKindsOfCommandLineAtOnce() throws {
        let machine = try Program.machine(["--cmdline", "a", "--cmdline-raw", "b"])
        try machine.expectEnd(64)
        #expect(machine.errors.text.contains("--cmdline and --cmdline-raw cannot be combined"))
    }

    /// In the DSDT alone, or on the command line alone: Linux complains of a device that is in both, and of words that
    /// it does not know.
    @Test func devicesAreInOnePlace() throws {
        let word = "virtio_mmio.device=4K@0xd0000000:16"
        #expect(try commandLine(["--disk", disk]) == "console=ttyS0")
        #expect(
            try commandLine(["--disk", disk, "--discovery", "cmdline", "--cmdline", "a -- b"])
                == "console=ttyS0 a \(word) -- b")
        // A Linux with acpi=off would find none.
        #expect(try commandLine(["--disk", disk, "--cmdline", "acpi=off"]) == "console=ttyS0 acpi=off \(word)")
        #expect(
            try commandLine(["--disk", disk, "--cmdline-raw", "acpi=off \(word)"]) == "acpi=off \(word)")
        #expect(try commandLine(["--cmdline-raw", "acpi=off"]) == "acpi=off")
        // Where neither is so, that is said.
        for (arguments, text, advice) in [
            (["--cmdline-raw", "acpi=off"], "acpi=off", "--cmdline instead of --cmdline-raw"),
            (["--discovery", "acpi", "--cmdline", "acpi=off"], "console=ttyS0 acpi=off", "--discovery cmdline"),
        ] {
            let machine = try Program.machine(["--kernel", kernel, "--disk", disk] + arguments)
            try machine.expectEnd(0)
            #expect(machine.output.text == text)
            #expect(
                machine.errors.text
                    == "swkvm: warning: the kernel's command line has acpi=off and no virtio_mmio.device=, so Linux does not find the machine's device. \(advice) adds the words for each device\n"
            )
        }

        func disks(_ arguments: [String]) throws -> Int {
            let machine = try Program.machine(arguments + ["--disk", disk])
            try machine.expectEnd(0)
            return machine.output.lines.filter { $0.hasPrefix("vda: 8 sectors") }.count
        }
        #expect(try disks(["--cmdline", "run=disks"]) == 1)
        #expect(try disks(["--cmdline", "run=disks", "--discovery", "cmdline"]) == 1)
        #expect(try disks(["--cmdline-raw", "run=disks \(word)", "--discovery", "cmdline"]) == 1)
        // The DSDT has none then, and nobody else would name them.
        let nameless = try Program.machine(
            ["--cmdline-raw", "run=disks", "--discovery", "cmdline", "--disk", disk])
        try nameless.expectEnd(64)
        #expect(
            nameless.errors.text.hasPrefix(
                "swkvm: the options --discovery cmdline and --cmdline-raw cannot be combined unless"))
    }

    @Test func wordsThatLinuxWouldCutOffAreRefused() throws {
        let words = String(repeating: "x", count: 2047 - 14)
        #expect(try commandLine(["--cmdline", words]) == "console=ttyS0 " + words)
        for (arguments, length) in [
            (["--cmdline", words + "x"], "2048 bytes, 14 of them added by swkvm"),
            (["--cmdline-raw", words + "123456789012345"], "2048 bytes"),
        ] {
            let machine = try Program.machine(["--kernel", kernel] + arguments)
            try machine.expectEnd(64)
            #expect(
                machine.errors.text.contains("the kernel's command line has \(length); \(kernel) "),
                "\(machine.errors.text)")
            #expect(machine.errors.text.contains("accepts at most 2047: shorten --cmdline"))
        }
    }

    // MARK: Hosts that interpret ring 0

    /// `crash=internal` shows which kind of host this is: an instruction that the interpreter does not know.
    @Test func aLinuxWhereRingZeroIsInterpretedGetsAWarning() throws {
        let probe = try Program.machine(["--cmdline", "crash=internal run=help"])
        let isInterpreted = try probe.waitForEnd() == .status(101)
        let image = try directory.write(TinyKernel.bzImage(TinyKernel.commandLinePrinter), to: "bzImage")
        let linux = try directory.write(TinyKernel.elf(TinyKernel.commandLinePrinter, namesLinux: true), to: "linux")
        _ = try shell("gzip -k '\(linux)'")
        for kernel in [image, linux, linux + ".gz"] {
            let machine = try Program.machine(["--kernel", kernel])
            try machine.expectEnd(0)
            if isInterpreted {
                #expect(machine.errors.lines.count == 1, "\(machine.errors.text)")
                #expect(
                    machine.errors.text.hasPrefix("swkvm: warning: KVM on this host emulates guest ring 0"),
                    "\(machine.errors.text)")
            } else {
                #expect(machine.errors.bytes.isEmpty, "\(machine.errors.text)")
            }
        }
        let doctor = try Program([Host.swkvm, "doctor"])
        try doctor.expectEnd(0)
        let line = doctor.output.lines.first { $0.dropFirst(9).hasPrefix("back-end") } ?? ""
        #expect(
            line.contains("ring 0 is emulated") == isInterpreted
                && line.contains("ring 0 runs natively") != isInterpreted, "\(line)")
    }
}

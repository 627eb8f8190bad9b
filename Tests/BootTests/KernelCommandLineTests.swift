// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import GuestMemory
import TestSupport
import Testing

@Suite(.timed) struct KernelCommandLineTests {
    private let devices = [
        VirtioMMIOSlot(address: 0xd000_0000, gsi: 16), VirtioMMIOSlot(address: 0xd000_1000, size: 512, gsi: 5),
    ]

    private func withDevices(_ words: String) -> String {
        var line = KernelCommandLine(words)
        line.add(devices)
        return line.text
    }

    private func withConsole(_ words: String) -> String {
        var line = KernelCommandLine(words)
        line.addConsole("ttyS0")
        return line.text
    }

    @Test func appendsTheDevices() throws {
        let parameters = "virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=512@0xd0001000:5"
        #expect(withDevices("quiet test=all") == "quiet test=all \(parameters)")
        #expect(withDevices("") == parameters)
        // Words after a lone -- are init's.
        #expect(withDevices("quiet -- single") == "quiet \(parameters) -- single")
        #expect(withDevices("--") == "\(parameters) --")
        #expect(withDevices("a=\"b -- c\" d--") == "a=\"b -- c\" d-- \(parameters)")
        #expect(withDevices("a=\"b") == "a=\"b \(parameters)")
        var none = KernelCommandLine("  as it is  ")
        none.add([])
        #expect(none.text == "  as it is  " && none.addedLength == 0)
    }

    @Test func aConsoleIsAddedWhereNoneIsNamed() {
        #expect(withConsole("") == "console=ttyS0")
        #expect(withConsole("quiet root=/dev/vda1") == "console=ttyS0 quiet root=/dev/vda1")
        for words in [
            "console=ttyS0,115200", "quiet console=hvc0", "console=tty0\tquiet", "\"console=ttyS1\"", "console=",
            "root=x\nconsole=null",
        ] {
            #expect(withConsole(words) == words)
        }
        // None of the kernel's: init's, another word's, a part of a word.
        for words in [
            "quiet -- console=tty0", "a=\"console=tty0 console=x\"", "netconsole=@/,@192.0.2.1/",
            "earlyconsole console",
        ] {
            #expect(withConsole(words) == "console=ttyS0 " + words)
        }
    }

    @Test func linuxWithoutACPIIsRecognized() {
        for words in ["acpi=off", "quiet acpi=off -- x", "acpi=force acpi=off acpi=noirq"] {
            #expect(KernelCommandLine(words).turnsACPIOff)
        }
        for words in ["", "acpi=force", "acpi=noirq", "-- acpi=off", "noacpi=off", "acpi=off acpi=force"] {
            #expect(!KernelCommandLine(words).turnsACPIOff)
        }
    }

    private func loader(_ builder: ELFBuilder, _ line: KernelCommandLine) -> BootError? {
        withFile(builder.bytes, name: "vmlinux") { file in
            bootError { _ = try KernelLoader(KernelImage(file), commandLine: line) }
        }
    }

    private func refusal(_ builder: ELFBuilder, length: Int) -> BootError? {
        loader(builder, KernelCommandLine(String(repeating: "x", count: length)))
    }

    /// Linux's `COMMAND_LINE_SIZE`: it cuts off what is longer, and an ELF file does not say so as a bzImage does.
    @Test func wordsThatALinuxELFWouldCutOffAreRefused() {
        var byPVH = ELFBuilder.kernel()
        byPVH.addNote("Xen", 18, ELFBuilder.word(UInt32(0x10_0000)))
        var salted = byPVH, guestOS = byPVH
        salted.addNote("Linux", 0x100, ELFBuilder.word(UInt32(0)))
        guestOS.addNote("Xen", 6, Array("linux\0".utf8))
        for (builder, kind) in [
            (ELFBuilder.kernel(), "a 64-bit ELF file, entered as Linux is"),
            (salted, "a Linux ELF file, entered by PVH"),
            (guestOS, "a Linux ELF file, entered by PVH"),
        ] {
            // One without a note is only entered as Linux is.
            let names = withFile(builder.bytes, name: "vmlinux") { try? KernelImage($0).namesLinux }
            #expect(names == (kind == "a Linux ELF file, entered by PVH"))
            #expect(refusal(builder, length: 2047) == nil)
            #expect(
                refusal(builder, length: 2048)
                    == .commandLineTooLong(kernel: "vmlinux (\(kind))", length: 2048, added: 0, limit: 2047))
        }
        // Kernels of other kinds have all the room that there is.
        var another = byPVH, own = byPVH
        another.addNote("Xen", 6, Array("FreeBSD\0".utf8))
        own.addNote("swkvm", 1, ELFBuilder.word(UInt64(0x10_0000)))
        for builder in [byPVH, another, own] {
            #expect(refusal(builder, length: 65535) == nil)
            guard case .commandLineTooLong(_, 65536, 0, 65535) = refusal(builder, length: 65536) else {
                Issue.record("a command line of 65536 bytes was accepted")
                continue
            }
        }
    }

    @Test func whatIsAddedCountsAndIsNamed() {
        var line = KernelCommandLine(String(repeating: "x", count: 2040))
        line.addConsole("ttyS0")
        #expect(
            loader(ELFBuilder.kernel(), line)?.description
                == "the kernel's command line has 2054 bytes, 14 of them added by swkvm; vmlinux (a 64-bit ELF file, entered as Linux is) accepts at most 2047: "
                + "shorten --cmdline")
    }

    @Test func refusesANUL() {
        #expect(loader(ELFBuilder.kernel(), KernelCommandLine("a\0b")) == .commandLineHasNUL)
        #expect(refusal(ELFBuilder.kernel(), length: 0) == nil)
    }
}

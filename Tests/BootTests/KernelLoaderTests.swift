// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import Glibc
import GuestMemory
import Linux
import Platform
import TestSupport
import Testing

@Suite(.timed) struct KernelLoaderTests {
    private let size: UInt64 = 64 << 20

    private func word(_ memory: GuestMemory, _ address: UInt64) throws -> UInt64 {
        try memory.ram.readUInt64(at: GuestAddress(address))
    }

    private func text(_ memory: GuestMemory, _ address: UInt64, _ count: Int) throws -> String {
        String(decoding: try memory.ram.readBytes(at: GuestAddress(address), count: count), as: UTF8.self)
    }

    @Test func entersLongModeByTheNote() throws {
        var builder = ELFBuilder.kernel(Array("kernel text".utf8))
        builder.addNote("swkvm", 1, ELFBuilder.word(UInt64(0x10_0004)))
        builder.addNote("Xen", 18, ELFBuilder.word(UInt32(0x10_0000)))
        let memory = try GuestMemory(size: size)
        let tables = try ACPITables(ACPIDescription(localAPICIDs: Array(0..<1)))
        let state = try withFile(builder.bytes) { file in
            let loader = try KernelLoader(kernel: file, commandLine: "test=all", tables: tables)
            #expect(try KernelImage(file).entry == .longMode(0x10_0004))
            return try loader.load(into: memory, isFresh: true)
        }
        #expect(try text(memory, 0x10_0000, 11) == "kernel text")
        #expect(state.rip == 0x10_0004 && state.rdi == 0x600 && state.rsi == 0 && state.rbx == 0 && state.rflags == 2)
        #expect(state.cr0 == 0x8001_0033 && state.cr4 == 0x20 && state.efer == 0x500 && state.cr3 == 0x9000)
        #expect(state.code.selector == 0x10 && state.code.isLong && !state.code.is32Bit && state.data.selector == 0x18)
        // The descriptors that CS and DS name.
        #expect(try word(memory, state.gdt.base + 0x10) == 0x00af_9b00_0000_ffff)
        #expect(try word(memory, state.gdt.base + 0x18) == 0x00cf_9300_0000_ffff)
        #expect(state.gdt.limit == 31)
        // hvm_start_info
        #expect(try word(memory, 0x600) == 0x1_336e_c578)
        #expect(try word(memory, 0x608) == 0)
        let commandLine = try word(memory, 0x618)
        #expect(commandLine == 0x20000)
        #expect(try text(memory, commandLine, 9) == "test=all\0")
        #expect(try word(memory, 0x620) == tables.rsdp)
        #expect(try text(memory, tables.rsdp, 8) == "RSD PTR ")
    }

    @Test func mapsFourGigabytesToThemselves() throws {
        var builder = ELFBuilder.kernel()
        builder.addNote("swkvm", 1, ELFBuilder.word(UInt64(0x10_0000)))
        let memory = try GuestMemory(size: size)
        let state = try withFile(builder.bytes) { try KernelLoader(kernel: $0).load(into: memory, isFresh: true) }
        /// Walks the tables as the processor does.
        func translate(_ address: UInt64) throws -> UInt64? {
            var table = state.cr3
            for shift in [39, 30, 21] as [UInt64] {
                let entry = try word(memory, table + (address >> shift & 511) * 8)
                guard entry & 3 == 3 else { return nil }
                if shift == 21 { return entry & 0x80 != 0 ? entry & ~0x1f_ffff | address & 0x1f_ffff : nil }
                table = entry & ~0xfff
            }
            return nil
        }
        for address in [
            0, 0x1234, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xbfff_f000, 0xd000_0000, 0xfee0_0000, 0xffff_ffff,
        ] as [UInt64] {
            #expect(try translate(address) == address)
        }
        #expect(try translate(0x1_0000_0000) == nil)
    }

    @Test func leavesAWayToResetWhereABIOSWouldBe() throws {
        let memory = try GuestMemory(size: size)
        _ = try withFile(ELFBuilder.kernel().bytes) { try KernelLoader(kernel: $0).load(into: memory, isFresh: true) }
        // mov $0xfe, %al; out %al, $0x64, and then nothing else: a 16-bit segment at 0xf0000 ends behind these.
        #expect(try memory.ram.readBytes(at: GuestAddress(0xf_fff0), count: 4) == [0xb0, 0xfe, 0xe6, 0x64])
        #expect(PhysicalLayout.resetVector + UInt64(ResetVector.code.count) <= PhysicalLayout.highRAM)
        #expect(PhysicalLayout.acpi + UInt64(PhysicalLayout.acpiSize) <= PhysicalLayout.resetVector)
        // No RAM for a guest to put something else there.
        let ram = MemoryMapEntry.map(memorySize: size).filter { $0.kind == .ram }
        #expect(
            !ram.contains { $0.start <= PhysicalLayout.resetVector && PhysicalLayout.resetVector < $0.start + $0.size })
    }

    @Test func entersByPVH() throws {
        var builder = ELFBuilder.kernel()
        builder.is64Bit = false
        builder.machine = 3
        builder.addNote("Xen", 18, ELFBuilder.word(UInt32(0x10_0020)))
        let memory = try GuestMemory(size: size)
        let state = try withFile(builder.bytes) { try KernelLoader(kernel: $0).load(into: memory, isFresh: true) }
        #expect(state.rip == 0x10_0020 && state.rbx == 0x600 && state.cr0 == 0x11 && state.cr4 == 0 && state.efer == 0)
        #expect(state.code.is32Bit && !state.code.isLong && state.task.type == 0xb && !state.task.isCodeOrData)
        // No page tables are written for it.
        #expect(try word(memory, 0x9000) == 0)
    }

    @Test func entersAPlainELFTheLinuxWay() throws {
        let memory = try GuestMemory(size: size)
        let state = try withFile(ELFBuilder.kernel().bytes) { file in
            try KernelLoader(kernel: file, commandLine: "quiet").load(into: memory, isFresh: true)
        }
        #expect(state.rip == 0x10_0000 && state.rsi == 0x7000 && state.rdi == 0x600 && state.efer == 0x500)
        #expect(try memory.ram.readUInt32(at: GuestAddress(0x7202)) == 0x5372_6448)
        #expect(try memory.ram.readUInt32(at: GuestAddress(0x7228)) == 0x20000)
        // A seed that differs from start to start.
        let data = try word(memory, 0x7250)
        #expect(try word(memory, data) == 0)
        #expect(try word(memory, data + 8) == 32 << 32 | 9)
        #expect(try word(memory, data + 16) != 0)
    }

    @Test func tellsOfMemoryOnBothSidesOfTheHole() throws {
        let map = MemoryMapEntry.map(memorySize: 8 << 30)
        #expect(
            map.filter { $0.kind == .ram } == [
                .init(start: 0x1_0000, size: 0x8_fc00, kind: .ram),
                .init(start: 0x10_0000, size: 0xbff0_0000, kind: .ram),
                .init(start: 0x1_0000_0000, size: 0x1_4000_0000, kind: .ram),
            ])
        // Nothing overlaps, and only RAM, ACPI and reserved ranges below 1 MiB are named.
        for (lower, upper) in zip(map, map.dropFirst()) { #expect(lower.start + lower.size <= upper.start) }
        #expect(MemoryMapEntry.map(memorySize: 3 << 30).last == .init(start: 0x10_0000, size: 0xbff0_0000, kind: .ram))

        let memory = try GuestMemory(size: 4 << 30)
        _ = try withFile(ELFBuilder.kernel().bytes) { try KernelLoader(kernel: $0).load(into: memory, isFresh: true) }
        let address = try word(memory, 0x600 + 40)
        let count = Int(try memory.ram.readUInt32(at: GuestAddress(0x600 + 48)))
        let last = address + UInt64(count - 1) * 24
        #expect(
            try word(memory, last) == 0x1_0000_0000 && word(memory, last + 8) == 1 << 30 && word(memory, last + 16) == 1
        )
        // The zero page has the same.
        #expect(try memory.ram.readUInt8(at: GuestAddress(0x71e8)) == UInt8(count))
        #expect(try word(memory, 0x72d0 + UInt64(count - 1) * 20) == 0x1_0000_0000)
    }

    @Test func clearsWhatTheFileLacksOnlyInUsedMemory() throws {
        let memory = try GuestMemory(size: size)
        try withFile(ELFBuilder.kernel().bytes) { file in
            let loader = try KernelLoader(kernel: file)
            try memory.ram.fill(at: GuestAddress(0x10_0000), count: 512, with: 0xee)
            _ = try loader.load(into: memory, isFresh: false)
            #expect(
                try memory.ram.readBytes(at: GuestAddress(0x10_0000), count: 512)
                    == Array(repeating: 0x90, count: 256) + Array(repeating: 0, count: 64)
                    + Array(repeating: 0xee, count: 192))
        }
    }

    @Test func placesTheInitrdAtTheTop() throws {
        let memory = try GuestMemory(size: size)
        let contents = (0..<10_000).map { UInt8(truncatingIfNeeded: $0) }
        try withFile(ELFBuilder.kernel().bytes) { kernel in
            try withFile(contents, name: "initrd") { initrd in
                _ = try KernelLoader(kernel: kernel, initrd: initrd).load(into: memory, isFresh: true)
            }
        }
        let module = try word(memory, 0x610)
        #expect(try word(memory, 0x608) >> 32 == 1)
        let address = try word(memory, module)
        #expect(try word(memory, module + 8) == 10_000)
        #expect(address % 4096 == 0 && address + 10_000 <= size && address + 10_000 > size - 4096)
        #expect(try memory.ram.readBytes(at: GuestAddress(address), count: contents.count) == contents)
        #expect(try memory.ram.readUInt32(at: GuestAddress(0x7218)) == UInt32(address))
        #expect(try memory.ram.readUInt32(at: GuestAddress(0x721c)) == 10_000)
    }

    @Test func refusesAnInitrdWithoutRoom() throws {
        let memory = try GuestMemory(size: 2 << 20)
        var builder = ELFBuilder.kernel()
        builder.segments[0].memorySize = 0xf_0000
        let error = withFile(builder.bytes) { kernel in
            withFile(Array(repeating: 1, count: 0x1_0001), name: "initrd") { initrd in
                bootError { _ = try KernelLoader(kernel: kernel, initrd: initrd).load(into: memory, isFresh: true) }
            }
        }
        #expect(error == .initrdDoesNotFit(file: "initrd", size: 0x1_0001, free: 0x1_0000, limit: 2 << 20))
        #expect(
            withFile(builder.bytes) { kernel in
                withFile([], name: "initrd") { initrd in
                    bootError { _ = try KernelLoader(kernel: kernel, initrd: initrd) }
                }
            }?.description == "initrd is malformed: the initrd is empty")
    }

    @Test(arguments: [0x500, 0xff00, 0x1_ff80, 0x2_0000, 0x2_ff00, 0x9_ff80, 0xa_0000, 0xe_0000, 0xf_ffff] as [UInt64])
    func refusesKernelsOverThePlatformsMemory(address: UInt64) throws {
        let memory = try GuestMemory(size: size)
        var builder = ELFBuilder.kernel()
        builder.segments.append(.init(address: address, contents: Array(repeating: 1, count: 256)))
        builder.segments[0].address = 0x20_0000
        builder.entry = 0x20_0000
        let error = withFile(builder.bytes) { file in
            bootError { _ = try KernelLoader(kernel: file).load(into: memory, isFresh: true) }
        }
        #expect(error == .reservedMemory(file: "kernel.elf", start: address, end: address + 256))
    }

    @Test(arguments: [0x1_0000, 0x1_ff00, 0x3_0000, 0x9_fb00] as [UInt64])
    func acceptsFreeConventionalMemory(address: UInt64) throws {
        let memory = try GuestMemory(size: size)
        var builder = ELFBuilder.kernel()
        builder.segments.append(.init(address: address, contents: Array(repeating: 7, count: 256)))
        _ = try withFile(builder.bytes) { try KernelLoader(kernel: $0).load(into: memory, isFresh: true) }
        #expect(try memory.ram.readUInt8(at: GuestAddress(address + 255)) == 7)
    }

    @Test(arguments: [64 << 20 - 255, 0xc000_0000, 0x1_0000_0000, 1 << 63] as [UInt64])
    func refusesKernelsOutsideRAM(address: UInt64) throws {
        let memory = try GuestMemory(size: size)
        var builder = ELFBuilder.kernel()
        builder.segments.append(.init(address: address, contents: Array(repeating: 1, count: 256)))
        let error = withFile(builder.bytes) { file in
            bootError { _ = try KernelLoader(kernel: file).load(into: memory, isFresh: true) }
        }
        #expect(error == .doesNotFit(file: "kernel.elf", start: address, end: address + 256, limit: size))
        // Nothing was written before the refusal.
        #expect(try word(memory, 0x10_0000) == 0)
    }

    @Test func refusesKernelsWithoutAnEntry() {
        var builder = ELFBuilder.kernel()
        builder.entry = 0x42
        #expect(
            withFile(builder.bytes) { file in bootError { _ = try KernelLoader(kernel: file) } }?.description
                == "kernel.elf cannot be entered: its e_entry lies in none of its segments and it has no PVH note")
        builder.is64Bit = false
        builder.machine = 3
        #expect(
            withFile(builder.bytes) { file in bootError { _ = try KernelLoader(kernel: file) } }?.description
                == "kernel.elf cannot be entered: it is a 32-bit ELF without a PVH note; expected the note or a 64-bit ELF"
        )
        #expect(
            withFile(Array("no kernel".utf8), name: "notes.txt") { file in
                bootError { _ = try KernelLoader(kernel: file) }
            }
                == .notAKernel(file: "notes.txt"))
    }

    @Test func loadsFromAFile() throws {
        let path = "\(P_tmpdir)/swkvm-boot-test-\(UInt64.random(in: 0 ... .max))"
        #expect(
            bootError { _ = try BootFile(path: path) } == .unreadable(file: path, SystemCallError("open", errno: 2)))
        #expect(
            bootError { _ = try BootFile(path: path) }?.description == "cannot read \(path): No such file or directory")
        #expect(bootError { _ = try BootFile(path: "/") }?.description == "cannot read /: Is a directory")
        let pipe = "\(path)-pipe"
        #expect(mkfifo(pipe, 0o600) == 0)
        defer { unlink(pipe) }
        for path in ["/dev/null", pipe] {
            #expect(
                bootError { _ = try BootFile(path: path) }?.description
                    == "cannot read \(path): it is not a regular file; write to one what a pipe or device provides")
        }
        let contents = (0..<300_000).map { UInt8(truncatingIfNeeded: $0 ^ $0 >> 8) }
        try TemporaryFile.with(ELFBuilder.kernel(contents).bytes) { path in
            let memory = try GuestMemory(size: size)
            let loader = try KernelLoader(kernel: try BootFile(path: path))
            _ = try loader.load(into: memory, isFresh: true)
            #expect(try memory.ram.readBytes(at: GuestAddress(0x10_0000), count: contents.count) == contents)
            // The file may shrink between one start and the next.
            try FileDescriptor.open(path, O_WRONLY | O_TRUNC).writeAll([0x7f])
            guard case .truncated(path, _, _) = bootError({ _ = try loader.load(into: memory, isFresh: false) }) else {
                Issue.record("a shrunken file was loaded")
                return
            }
        }
    }
}

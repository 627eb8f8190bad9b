// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import GuestMemory
import TestSupport
import Testing

/// A bzImage put together field by field.
private struct BzImageBuilder {
    var setupSectors: UInt8 = 4
    var version: UInt16 = 0x020f
    var loadFlags: UInt8 = 1
    var extendedFlags: UInt16 = 0x3f
    var headerEnd: UInt8 = 0x6a
    var alignment: UInt32 = 0x20_0000
    var relocatable: UInt8 = 1
    var preferred: UInt64 = 0x100_0000
    var initialSize: UInt32 = 0x40_0000
    var commandLineSize: UInt32 = 2047
    var initrdLimit: UInt32 = 0x7fff_ffff
    var payload = (0..<4096).map { UInt8(truncatingIfNeeded: $0 ^ $0 >> 8) }
    var systemSize: UInt32?

    var bytes: [UInt8] {
        var bytes = [UInt8](repeating: 0, count: (Int(setupSectors == 0 ? 4 : setupSectors) + 1) * 512)
        bytes.store(setupSectors, at: 0x1f1)
        bytes.store(systemSize ?? UInt32((payload.count + 15) / 16), at: 0x1f4)
        bytes.store(UInt16(0xaa55), at: 0x1fe)
        bytes.store(UInt8(0xeb), at: 0x200)
        bytes.store(headerEnd, at: 0x201)
        bytes.store(UInt32(0x5372_6448), at: 0x202)
        bytes.store(version, at: 0x206)
        bytes.store(loadFlags, at: 0x211)
        bytes.store(initrdLimit, at: 0x22c)
        bytes.store(alignment, at: 0x230)
        bytes.store(relocatable, at: 0x234)
        bytes.store(extendedFlags, at: 0x236)
        bytes.store(commandLineSize, at: 0x238)
        bytes.store(preferred, at: 0x258)
        bytes.store(initialSize, at: 0x260)
        return bytes + payload
    }
}

@Suite(.timed) struct LinuxImageTests {
    private func error(_ change: (inout BzImageBuilder) -> Void) -> BootError? {
        var builder = BzImageBuilder()
        change(&builder)
        return withFile(builder.bytes, name: "bzImage") { file in bootError { _ = try LinuxImage(file) } }
    }

    private func boot(
        _ builder: BzImageBuilder, memory: GuestMemory, initrd: [UInt8] = [1], commandLine: String = "console=ttyS0"
    ) throws -> BootState {
        try withFile(builder.bytes, name: "bzImage") { kernel in
            try withFile(initrd, name: "initrd") { initrd in
                let tables = try ACPITables(ACPIDescription(localAPICIDs: [0]))
                return try KernelLoader(kernel: kernel, initrd: initrd, commandLine: commandLine, tables: tables)
                    .load(into: memory, isFresh: true)
            }
        }
    }

    @Test func startsWhereTheKernelPrefersToBe() throws {
        let memory = try GuestMemory(size: 64 << 20)
        let builder = BzImageBuilder()
        let state = try boot(builder, memory: memory, initrd: Array(repeating: 9, count: 5000))
        #expect(state.rip == 0x100_0200 && state.rsi == 0x7000 && state.code.isLong && state.code.selector == 0x10)
        #expect(try memory.ram.readBytes(at: GuestAddress(0x100_0000), count: builder.payload.count) == builder.payload)
        let page = try memory.ram.readBytes(at: GuestAddress(0x7000), count: 4096)
        // The kernel's header is kept, the loader's fields are filled in, and the rest is zero.
        #expect(Array(page[0x1f1..<0x1fa]) == Array(builder.bytes[0x1f1..<0x1fa]))
        #expect(Array(page[0x1fe..<0x210]) == Array(builder.bytes[0x1fe..<0x210]))
        #expect(page[0x210] == 0xff && page.load(UInt32.self, at: 0x228) == 0x20000)
        #expect(page.load(UInt64.self, at: 0x258) == 0x100_0000 && page.load(UInt32.self, at: 0x260) == 0x40_0000)
        #expect(page.load(UInt64.self, at: 0x70) == 0xe_0000)
        #expect(page[0x1ef] == 0, "the sentinel: the page was cleared")
        #expect(page.load(UInt32.self, at: 0x21c) == 5000)
        let initrd: UInt32 = try #require(page.load(at: 0x218))
        #expect(
            try memory.ram.readBytes(at: GuestAddress(UInt64(initrd)), count: 5000) == Array(repeating: 9, count: 5000))
        #expect(
            page[0x1e8] == 5 && page.load(UInt32.self, at: 0x2d0 + 16) == 2
                && page.load(UInt32.self, at: 0x2d0 + 36) == 1)
        let data: UInt64 = try #require(page.load(at: 0x250))
        #expect(try memory.ram.readUInt32(at: GuestAddress(data + 8)) == 9)
    }

    @Test func loadsAKernelWhereItPrefersToBe() throws {
        let memory = try GuestMemory(size: 16 << 20)
        var builder = BzImageBuilder()
        // A relocatable kernel too would move to the address that it prefers, and overrun the RAM there.
        let tooSmall = BootError.doesNotFit(file: "bzImage", start: 0x100_0000, end: 0x140_0000, limit: 16 << 20)
        #expect(bootError { _ = try boot(builder, memory: memory) } == tooSmall)
        builder.relocatable = 0
        #expect(bootError { _ = try boot(builder, memory: memory) } == tooSmall)
        builder.preferred = 0x60_0000
        #expect(try boot(builder, memory: memory).rip == 0x60_0200)
        builder.relocatable = 1
        #expect(try boot(builder, memory: memory).rip == 0x60_0200)
        // Below 1 MiB there is no room: only a relocatable kernel goes elsewhere, by its alignment.
        builder.preferred = 0x8_0000
        #expect(try boot(builder, memory: memory).rip == 0x20_0200)
        builder.alignment = 0x40_0000
        #expect(try boot(builder, memory: memory).rip == 0x40_0200)
        builder.relocatable = 0
        #expect(
            bootError { _ = try boot(builder, memory: memory) }
                == .reservedMemory(file: "bzImage", start: 0x8_0000, end: 0x48_0000))
        builder.relocatable = 1
        builder.preferred = .max
        builder.initialSize = .max
        #expect(
            bootError { _ = try boot(builder, memory: memory) }
                == .doesNotFit(file: "bzImage", start: .max, end: .max, limit: 16 << 20))
    }

    @Test func keepsTheInitrdWhereTheKernelCanSeeIt() throws {
        let memory = try GuestMemory(size: 64 << 20)
        var builder = BzImageBuilder()
        builder.initrdLimit = 0x1ff_ffff
        _ = try boot(builder, memory: memory, initrd: Array(repeating: 1, count: 4097))
        #expect(try memory.ram.readUInt32(at: GuestAddress(0x7218)) == 0x1ff_e000)
        builder.initrdLimit = 0x140_0fff
        #expect(
            bootError { _ = try boot(builder, memory: memory, initrd: Array(repeating: 1, count: 4097)) }
                == .initrdDoesNotFit(file: "initrd", size: 4097, free: 4096, limit: 0x140_1000))
        builder.initrdLimit = 0
        #expect(
            bootError { _ = try boot(builder, memory: memory) }
                == .initrdDoesNotFit(file: "initrd", size: 1, free: 0, limit: 1))
    }

    @Test func limitsTheCommandLineAsTheKernelSays() throws {
        let memory = try GuestMemory(size: 64 << 20)
        let builder = BzImageBuilder()
        _ = try boot(builder, memory: memory, commandLine: String(repeating: "x", count: 2047))
        #expect(
            bootError { _ = try boot(builder, memory: memory, commandLine: String(repeating: "x", count: 2048)) }
                == .commandLineTooLong(kernel: "bzImage (a Linux bzImage)", length: 2048, added: 0, limit: 2047))
    }

    @Test func refusesKernelsThatCannotBeEntered() {
        #expect(
            error { $0.version = 0x0209 }?.description
                == "bzImage cannot be entered: it uses boot protocol 2.9; expected 2.12 or later (Linux 3.8 and later)")
        #expect(
            error { $0.extendedFlags = 0x3e }?.description
                == "bzImage cannot be entered: it has no 64-bit entry (a 32-bit kernel); expected a kernel for x86-64")
        func malformed(_ change: (inout BzImageBuilder) -> Void) -> Bool {
            if case .malformed = error(change) { true } else { false }
        }
        #expect(malformed { $0.loadFlags = 0 })
        #expect(malformed { $0.headerEnd = 0x10 })
        #expect(malformed { $0.alignment = 0 })
        #expect(malformed { $0.alignment = 0x30_0000 })
        #expect(malformed { $0.alignment = 16 })
        #expect(malformed { $0.systemSize = 0 })
        #expect(error { _ in } == nil)
        #expect(error { $0.headerEnd = 0xff } == nil)
        #expect(error { $0.setupSectors = 0 } == nil)
    }

    @Test func refusesATruncatedFile() {
        let whole = BzImageBuilder().bytes
        for length in stride(from: 0, to: whole.count, by: 7) {
            let error = withFile(Array(whole[..<length]), name: "bzImage") { file in
                bootError { _ = try KernelLoader(kernel: file) }
            }
            if length < 0x206 {
                #expect(error == .notAKernel(file: "bzImage"))
            } else if length <= whole.count - 16 {
                guard case .truncated = error else {
                    Issue.record("\(length) bytes: \(String(describing: error))")
                    continue
                }
            }
        }
        guard case .truncated = error({ $0.systemSize = .max }) else {
            Issue.record("an oversized syssize was accepted")
            return
        }
        guard case .truncated = error({ $0.payload = Array(repeating: 0, count: 512) }) else {
            Issue.record("a payload without its entry was accepted")
            return
        }
    }

    /// Whatever a header says, the answer is registers or an error.
    @Test(arguments: 0..<4) func survivesChangedHeaders(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let good = BzImageBuilder().bytes
        let memory = try GuestMemory(size: 32 << 20)
        var accepted = 0
        for _ in 0..<1500 {
            var bytes = good
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                bytes[Int.random(in: 0x1f1..<0x270, using: &random)] = UInt8.random(in: 0...255, using: &random)
            }
            withFile(bytes) { kernel in
                withFile([1, 2, 3]) { initrd in
                    guard let loader = try? KernelLoader(kernel: kernel, initrd: initrd),
                        let state = try? loader.load(into: memory, isFresh: true)
                    else { return }
                    accepted += 1
                    #expect(state.rip >= 0x10_0000 && state.rip < 32 << 20)
                }
            }
        }
        #expect(accepted > 0 && accepted < 1500)
    }
}

// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import Platform

/// The registers that the boot processor starts with. Values as the CPU's manuals name them; KVM-free, so that
/// `Machine` alone translates them.
public struct BootState: Sendable, Equatable {
    /// A segment register with its hidden part (AMD64 manual, volume 2, §4.8).
    public struct Segment: Sendable, Equatable {
        public var selector: UInt16
        public var base: UInt64
        /// The inclusive limit in bytes, with granularity applied.
        public var limit: UInt32
        /// The four type bits of the descriptor.
        public var type: UInt8
        /// 1 for code and data, 0 for system segments such as a TSS.
        public var isCodeOrData: Bool
        /// L: 64-bit code.
        public var isLong: Bool
        /// D/B: 32-bit operands.
        public var is32Bit: Bool
        /// G: the descriptor's limit counts 4 KiB units.
        public var inPages: Bool
    }

    /// Base and inclusive limit of GDT or IDT.
    public struct Table: Sendable, Equatable {
        public var base: UInt64
        public var limit: UInt16
    }

    public var code: Segment
    /// DS, ES and SS.
    public var data: Segment
    /// FS and GS.
    public var extra: Segment
    /// TR: VMX requires a busy TSS, although it is never used.
    public var task: Segment
    public var gdt: Table
    public var idt = Table(base: 0, limit: 0)
    public var cr0: UInt64
    public var cr3: UInt64
    public var cr4: UInt64
    public var efer: UInt64
    public var rip: UInt64
    public var rbx: UInt64 = 0
    public var rsi: UInt64 = 0
    public var rdi: UInt64 = 0
    /// The flags: only bit 1, which is always set. Interrupts are disabled.
    public var rflags: UInt64 = 2
    // All other registers are 0.
}

extension BootState {
    enum Control {
        static let cr0PE: UInt64 = 1 << 0, cr0MP: UInt64 = 1 << 1, cr0ET: UInt64 = 1 << 4, cr0NE: UInt64 = 1 << 5
        static let cr0WP: UInt64 = 1 << 16, cr0PG: UInt64 = 1 << 31
        static let cr4PAE: UInt64 = 1 << 5
        static let eferLME: UInt64 = 1 << 8, eferLMA: UInt64 = 1 << 10
    }

    /// Long mode with the page tables and GDT of ``LongMode``.
    static func longMode(at entry: UInt64) -> BootState {
        BootState(
            code: Segment(
                selector: LongMode.codeSelector, base: 0, limit: .max, type: 0xb, isCodeOrData: true, isLong: true,
                is32Bit: false,
                inPages: true),
            data: .flatData, extra: .flatDataNull, task: .busyTask,
            gdt: LongMode.gdtRegister,
            cr0: Control.cr0PE | Control.cr0MP | Control.cr0ET | Control.cr0NE | Control.cr0WP | Control.cr0PG,
            cr3: LongMode.pageTables, cr4: Control.cr4PAE, efer: Control.eferLME | Control.eferLMA, rip: entry)
    }

    /// Puts code into RAM that has nothing else in it, with what it takes to run it in ring 0 of long mode.
    /// - Returns: the registers to start it with.
    public static func longMode(running code: [UInt8], in guest: GuestMemory) throws(BootError) -> BootState {
        let memory = BootMemory(guest)
        try memory.write(LongMode.gdt, at: PhysicalLayout.gdt)
        try memory.write(LongMode.makePageTables(), at: PhysicalLayout.pageTables)
        try memory.write(code, at: PhysicalLayout.endOfBootData)
        return longMode(at: PhysicalLayout.endOfBootData)
    }

    /// 32-bit protected mode without paging, as PVH wants it (Xen's `docs/misc/pvh.pandoc`).
    static func protectedMode(at entry: UInt64, startInfo: UInt64) -> BootState {
        BootState(
            code: Segment(
                selector: LongMode.code32Selector, base: 0, limit: .max, type: 0xb, isCodeOrData: true, isLong: false,
                is32Bit: true,
                inPages: true),
            data: .flatData, extra: .flatDataNull, task: .busyTask,
            gdt: LongMode.gdtRegister,
            cr0: Control.cr0PE | Control.cr0ET, cr3: 0, cr4: 0, efer: 0, rip: entry, rbx: startInfo)
    }
}

extension BootState.Segment {
    /// Present, writable, accessed, 4 GiB from 0.
    static let flatData = Self(
        selector: LongMode.dataSelector, base: 0, limit: .max, type: 0x3, isCodeOrData: true, isLong: false,
        is32Bit: true, inPages: true)

    /// What FS and GS hold: selector 0 as docs/platform.md says, with a usable hidden part.
    static let flatDataNull = Self(
        selector: 0, base: 0, limit: .max, type: 0x3, isCodeOrData: true, isLong: false, is32Bit: true, inPages: true)

    static let busyTask = Self(
        selector: 0, base: 0, limit: 0x67, type: 0xb, isCodeOrData: false, isLong: false, is32Bit: false, inPages: false
    )
}

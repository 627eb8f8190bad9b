// SPDX-License-Identifier: Apache-2.0

/// The layout of guest-physical memory (docs/platform.md, "Physical memory").
public enum PhysicalLayout {
    /// GDT, start information and `boot_params`; then page tables: all that Boot itself writes below the kernel
    /// apart from the command line.
    static let gdt: UInt64 = 0x500
    static let startInfo: UInt64 = 0x600
    static let modules: UInt64 = 0x680
    static let memoryMap: UInt64 = 0x700
    static let setupData: UInt64 = 0x6f00
    static let bootParameters: UInt64 = 0x7000
    static let pageTables: UInt64 = 0x9000
    static let endOfBootData: UInt64 = 0x1_0000
    /// The address of the kernel command line.
    public static let commandLine: UInt64 = 0x2_0000
    /// Bytes for it, the closing NUL included.
    public static let commandLineSize = 0x1_0000
    static let endOfCommandLine = commandLine + UInt64(commandLineSize)
    /// The end of conventional memory.
    static let endOfLowRAM = MPTable.address
    /// The end of base memory, below which the MultiProcessor table is.
    static let endOfBaseMemory: UInt64 = 0xa_0000
    /// The address of the ACPI tables, which begin with the RSDP.
    public static let acpi: UInt64 = 0xe_0000
    /// Bytes for the ACPI tables.
    public static let acpiSize = 0x1_8000
    /// The address of the SMBIOS tables, which begin with the entry point: in 0xf0000 – 0xfffff, where guests search
    /// for it.
    public static let smbios: UInt64 = 0xf_8000
    /// Bytes for the SMBIOS tables, up to ``resetVector``.
    public static let smbiosSize = 0x7ff0
    /// Where a PC's processors start after a reset as real mode sees it, F000:FFF0: ``ResetVector``.
    static let resetVector: UInt64 = 0xf_fff0
    /// The start of RAM for kernels.
    public static let highRAM: UInt64 = 0x10_0000
    /// The start of the hole in RAM, which ends at 4 GiB.
    public static let hole: UInt64 = 0xc000_0000
    /// The address of the RAM that does not fit below the hole.
    public static let aboveHole: UInt64 = 0x1_0000_0000
}

/// One range of the map that a guest gets of its memory; the types are those of ACPI 6.5 §15.1 ("e820").
public struct MemoryMapEntry: Sendable, Equatable {
    public enum Kind: UInt32, Sendable {
        case ram = 1
        case reserved = 2
    }

    public let start: UInt64
    public let size: UInt64
    public let kind: Kind

    public init(start: UInt64, size: UInt64, kind: Kind) {
        (self.start, self.size, self.kind) = (start, size, kind)
    }

    /// The map of a guest with `memorySize` bytes of RAM, in the order of addresses.
    public static func map(memorySize: UInt64) -> [MemoryMapEntry] {
        typealias Layout = PhysicalLayout
        func range(_ start: UInt64, _ end: UInt64, _ kind: Kind) -> MemoryMapEntry {
            MemoryMapEntry(start: start, size: end - start, kind: kind)
        }
        var map = [
            // The GDT and the page tables are in use from the first instruction on.
            range(0, Layout.endOfBootData, .reserved),
            range(Layout.endOfBootData, Layout.endOfLowRAM, .ram),
            range(Layout.endOfLowRAM, Layout.endOfBaseMemory, .reserved),
            // ACPI and SMBIOS tables, as one: what little RAM an ACPI range would give back is not worth what a kernel
            // says of each range on its console, a byte an exit.
            range(Layout.acpi, Layout.highRAM, .reserved),
        ]
        let low = min(memorySize, Layout.hole)
        if low > Layout.highRAM { map.append(range(Layout.highRAM, low, .ram)) }
        if memorySize > low { map.append(MemoryMapEntry(start: Layout.aboveHole, size: memorySize - low, kind: .ram)) }
        return map
    }
}

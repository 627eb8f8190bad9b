// SPDX-License-Identifier: Apache-2.0

/// The layout of guest-physical memory (docs/platform.md, "Physical memory").
public enum PhysicalLayout {
    // MARK: Below 1 MiB

    /// GDT, start information, and what belongs to them; then `boot_params` and page tables: all that is written below
    /// the kernel apart from the command line.
    public static let gdt: UInt64 = 0x500
    public static let startInfo: UInt64 = 0x600
    public static let modules: UInt64 = 0x680
    public static let memoryMap: UInt64 = 0x700
    public static let setupData: UInt64 = 0x6f00
    public static let bootParameters: UInt64 = 0x7000
    public static let pageTables: UInt64 = 0x9000
    /// Bytes for the page tables.
    public static let pageTablesSize: UInt64 = 0x6000
    public static let endOfBootData: UInt64 = 0x1_0000
    /// The address of the kernel command line.
    public static let commandLine: UInt64 = 0x2_0000
    /// Bytes for it, the closing NUL included.
    public static let commandLineSize = 0x1_0000
    public static let endOfCommandLine = commandLine + UInt64(commandLineSize)
    /// Where the MultiProcessor table is: in the last KiB of base memory, where it is searched.
    public static let multiProcessorTable: UInt64 = 0x9_fc00
    /// The end of conventional memory.
    public static let endOfLowRAM = multiProcessorTable
    /// The end of base memory.
    public static let endOfBaseMemory: UInt64 = 0xa_0000
    /// The address of the ACPI tables, which begin with the RSDP.
    public static let acpi: UInt64 = 0xe_0000
    /// Bytes for the ACPI tables.
    public static let acpiSize = 0x1_8000
    /// Where the SMBIOS tables are, the entry point first: in 0xf0000 – 0xfffff, where it is searched.
    public static let smbios: UInt64 = 0xf_8000
    /// Bytes for the SMBIOS tables, up to ``resetVector``.
    public static let smbiosSize = 0x7ff0
    /// Where a PC's processors start after a reset as real mode sees it, F000:FFF0.
    public static let resetVector: UInt64 = 0xf_fff0

    // MARK: From 1 MiB on

    /// The start of RAM for kernels.
    public static let highRAM: UInt64 = 0x10_0000
    /// Devices, no RAM. RAM that does not fit below continues above 4 GiB.
    public static let hole: Range<UInt64> = 0xc000_0000..<0x1_0000_0000
    /// The window of the first virtio-mmio device; the others follow.
    public static let virtioMMIO: UInt64 = 0xd000_0000
    /// Bytes of each window.
    public static let virtioMMIOSpan: UInt64 = 0x1000
    /// The window below 4 GiB for BARs of PCI functions: what is of the hole before the virtio-mmio devices.
    public static let pciWindow: Range<UInt64> = hole.lowerBound..<virtioMMIO
    /// Configuration space of PCI functions (ECAM), 1 MiB for each bus. There is room for 256 buses.
    public static let pciConfiguration: UInt64 = 0xe000_0000
    /// Bytes of it: bus 0 is the only one.
    public static let pciConfigurationSize: UInt64 = 1 << 20
    public static let ioapic: UInt64 = 0xfec0_0000
    public static let localAPIC: UInt64 = 0xfee0_0000
    /// A page in which KVM keeps an identity map, on CPUs without unrestricted guest mode.
    public static let identityMap: UInt64 = 0xfeff_c000
    /// Three pages behind it, below the place of firmware, for its task state segment.
    public static let taskStateSegment: UInt64 = 0xfeff_d000
    /// Where firmware may be: it ends with this range, which begins behind those pages.
    public static let firmware: Range<UInt64> = 0xff00_0000..<0x1_0000_0000
    /// Bytes at the firmware's end that are copied to the end of the first MiB, where a PC has them too.
    public static let firmwareCopySize: UInt64 = 0x2_0000
}

// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// The GDT and page tables of a start in long mode: the first 4 GiB, each address mapped to itself.
enum LongMode {
    static let code32Selector: UInt16 = 0x08
    static let codeSelector: UInt16 = 0x10
    static let dataSelector: UInt16 = 0x18
    static let pageTables = PhysicalLayout.pageTables

    /// Null, 32-bit code, 64-bit code, data: all flat, ring 0, accessed.
    static let gdt: [UInt64] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]

    static var gdtRegister: BootState.Table {
        BootState.Table(base: PhysicalLayout.gdt, limit: UInt16(gdt.count * 8 - 1))
    }

    /// The page-map level-4 table, a page-directory-pointer table and four page directories of 2 MiB pages, in this
    /// order and one page each (AMD64 manual, volume 2, §5.3).
    static func makePageTables() -> [UInt64] {
        let page: UInt64 = 4096
        let present: UInt64 = 1 << 0, writable: UInt64 = 1 << 1, large: UInt64 = 1 << 7
        let pointers = pageTables + page
        let directories = pointers + page
        var entries = [UInt64](repeating: 0, count: 6 * 512)
        entries[0] = pointers | present | writable
        for gigabyte in 0..<4 { entries[512 + gigabyte] = (directories + UInt64(gigabyte) * page) | present | writable }
        for largePage in 0..<4 * 512 {
            entries[2 * 512 + largePage] = UInt64(largePage) << 21 | present | writable | large
        }
        return entries
    }
}

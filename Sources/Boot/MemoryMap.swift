// SPDX-License-Identifier: Apache-2.0

internal import Platform

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
    /// - Parameter reserved: further reserved ranges in the hole, for the memory map.
    public static func map(memorySize: UInt64, reserved: [Range<UInt64>] = []) -> [MemoryMapEntry] {
        typealias Layout = PhysicalLayout
        func range(_ start: UInt64, _ end: UInt64, _ kind: Kind) -> MemoryMapEntry {
            MemoryMapEntry(start: start, size: end - start, kind: kind)
        }
        var map = [
            // The GDT and the page tables are in use from the first instruction on.
            range(0, Layout.endOfBootData, .reserved),
            range(Layout.endOfBootData, Layout.endOfLowRAM, .ram),
            range(Layout.endOfLowRAM, Layout.endOfBaseMemory, .reserved),
            // ACPI and SMBIOS tables, as one: the little RAM that an ACPI range would free is not worth what a kernel
            // says of each range on its console, a byte an exit.
            range(Layout.acpi, Layout.highRAM, .reserved),
        ]
        let low = min(memorySize, Layout.hole.lowerBound)
        if low > Layout.highRAM { map.append(range(Layout.highRAM, low, .ram)) }
        for hidden in reserved { map.append(range(hidden.lowerBound, hidden.upperBound, .reserved)) }
        if memorySize > low {
            map.append(MemoryMapEntry(start: Layout.hole.upperBound, size: memorySize - low, kind: .ram))
        }
        return map
    }
}

// SPDX-License-Identifier: Apache-2.0

public import Platform

/// The MultiProcessor table (Intel MultiProcessor Specification 1.4, §4), for kernels that do not read ACPI tables.
///
/// It also spares guests that search for both tables a scan of the whole BIOS area, page by page.
public struct MPTable: Sendable, Equatable {
    /// The most CPUs that fit; a machine with more needs ACPI to show them.
    public static let maximumCPUs = 32

    /// Floating pointer and configuration table.
    public let bytes: [UInt8]

    private enum EntryType {
        static let processor: UInt8 = 0, bus: UInt8 = 1, ioapic: UInt8 = 2, interrupt: UInt8 = 3,
            localInterrupt: UInt8 = 4
    }
    private enum InterruptType { static let vectored: UInt8 = 0, nmi: UInt8 = 1, external: UInt8 = 3 }

    /// - Parameters:
    ///   - localAPICIDs: one for each CPU, the boot processor's first. Those that do not fit, by number or by value,
    ///     are left out.
    ///   - pins: pins of the IOAPIC.
    public init(localAPICIDs: [UInt32], pins: UInt8 = UInt8(GSIs.pins)) {
        let processors = localAPICIDs.prefix(Self.maximumCPUs).filter { $0 < 254 }.map { UInt8($0) }
        // An ID of its own, as the specification wants for all APICs.
        let ioapic = (processors.max() ?? 0) + 1
        var entries: [UInt8] = []
        var count: UInt16 = 0
        func add(_ entry: [UInt8]) {
            entries += entry
            count += 1
        }
        for id in processors {
            // Usable (bit 0), the boot processor (bit 1); a Pentium Pro or later with APIC and FPU.
            add(
                [
                    EntryType.processor, id, 0x14,
                    id == localAPICIDs.first.map(UInt8.init(truncatingIfNeeded:)) ? 3 : 1, 0, 6, 0, 0,
                ] + [1, 2, 0, 0] + [UInt8](repeating: 0, count: 8))
        }
        add([EntryType.bus, 0] + "ISA   ".utf8)
        var controller: [UInt8] = [EntryType.ioapic, ioapic, 0x11, 1]
        controller.append(littleEndian: UInt32(truncatingIfNeeded: PhysicalLayout.ioapic))
        add(controller)
        // Each line on the pin of its number, but the timer, which KVM routes to pin 2. Polarity and trigger as ISA has
        // them: active high, edge.
        for line in 0..<pins where line != 2 {
            add([EntryType.interrupt, InterruptType.vectored, 0, 0, 0, line, ioapic, line == 0 ? 2 : line])
        }
        add([EntryType.localInterrupt, InterruptType.external, 0, 0, 0, 0, 0xff, 0])
        add([EntryType.localInterrupt, InterruptType.nmi, 0, 0, 0, 0, 0xff, 1])
        bytes = Self.pointer + Self.header(entries: entries, count: count) + entries
    }

    /// MP Floating Pointer Structure (§4.1): a configuration table follows, revision 1.4.
    private static var pointer: [UInt8] {
        var bytes: [UInt8] = Array("_MP_".utf8)
        bytes.append(littleEndian: UInt32(PhysicalLayout.multiProcessorTable) + 16)
        bytes += [1, 4, 0, 0, 0, 0, 0, 0]
        bytes[10] = 0 &- bytes.reduce(0, &+)
        return bytes
    }

    /// MP Configuration Table Header (§4.2).
    private static func header(entries: [UInt8], count: UInt16) -> [UInt8] {
        let size = 44
        var bytes: [UInt8] = Array("PCMP".utf8)
        bytes.append(littleEndian: UInt16(size + entries.count))
        bytes += [4, 0]
        bytes += "SWKVM   ".utf8
        bytes += "SWKVM       ".utf8
        bytes.append(littleEndian: UInt32(0))
        bytes.append(littleEndian: UInt16(0))
        bytes.append(littleEndian: count)
        bytes.append(littleEndian: UInt32(truncatingIfNeeded: PhysicalLayout.localAPIC))
        bytes.append(littleEndian: UInt32(0))
        bytes[7] = 0 &- (bytes + entries).reduce(0, &+)
        return bytes
    }
}

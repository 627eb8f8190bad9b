// SPDX-License-Identifier: Apache-2.0

/// Processors, interrupt controllers and the power switch, from the firmware's tables (ACPI 6.5 §5.2).
final class ACPI: @unchecked Sendable {
    struct IOAPICEntry {
        var address: UInt64
        var base: UInt32
    }

    /// A register in memory or port space.
    struct Register {
        var isPort: Bool
        var address: UInt64

        func write(_ value: UInt8) {
            if isPort { writePort8(UInt16(truncatingIfNeeded: address), value) } else { Address(address).store(value) }
        }
    }

    private(set) var found = false
    /// APIC IDs of the processors that may be used.
    private(set) var processors: [UInt32] = []
    private(set) var ioapics: [IOAPICEntry] = []
    private(set) var localAPIC: UInt64 = 0xfee0_0000
    /// The global interrupt of each ISA interrupt.
    private(set) var isaInterrupts: [UInt32] = []
    /// virtio-mmio devices in the DSDT: the addresses of their registers, and their global interrupts.
    private(set) var virtioDevices: [(address: UInt64, gsi: UInt32)] = []

    /// Configuration space of PCI functions on bus 0 (ECAM); nil where there is none.
    private(set) var pciConfiguration: UInt64?

    private static let longest: UInt32 = 1 << 20

    /// Reads the tables. Without any, the machine has one CPU and an IOAPIC at the usual place.
    func start(rootPointer: UInt64) {
        for line in 0..<UInt32(16) { isaInterrupts.append(line) }
        if let root = valid(rootPointer) ?? search() { readRoot(root) }
        if ioapics.isEmpty { ioapics = [IOAPICEntry(address: 0xfec0_0000, base: 0)] }
    }

    private func valid(_ pointer: UInt64) -> Address? {
        guard pointer != 0, pointer < 1 << 32 else { return nil }
        let root = Address(physical: pointer)
        guard root.load() as UInt64 == 0x2052_5450_2044_5352 /* "RSD PTR " */, sum(root, 20) == 0 else { return nil }
        return root
    }

    private func search() -> Address? {
        for pointer in stride(from: UInt64(0xe0000), to: 0xffff0, by: 16) {
            if let root = valid(pointer) { return root }
        }
        return nil
    }

    private func readRoot(_ root: Address) {
        let isExtended = root.load(15) as UInt8 >= 2
        let rootTable: UInt64 = isExtended ? root.load(24) : UInt64(root.load(16) as UInt32)
        let entrySize: UInt64 = isExtended ? 8 : 4
        guard let (table, length) = table(at: rootTable) else { return }
        found = true
        for offset in stride(from: UInt64(36), to: UInt64(length) &- entrySize &+ 1, by: Int(entrySize)) {
            let address: UInt64 =
                isExtended
                ? UInt64(table.load(offset) as UInt32) | UInt64(table.load(offset + 4) as UInt32) << 32
                : UInt64(table.load(offset) as UInt32)
            guard let (entry, size) = self.table(at: address) else { continue }
            switch entry.load() as UInt32 {
            case 0x4349_5041: readMADT(entry, UInt64(size))  // "APIC"
            case 0x5043_4146: readFADT(entry, UInt64(size))  // "FACP"
            case 0x4746_434d: readMCFG(entry, UInt64(size))  // "MCFG"
            default: break
            }
        }
    }

    /// Where configuration space is (PCI Firmware Specification 3.3 §4.1.2): of segment 0 and bus 0, below 4 GiB, where
    /// it is mapped.
    private func readMCFG(_ table: Address, _ length: UInt64) {
        guard length >= 60, table.load(54) as UInt8 == 0, table.load(52) as UInt16 == 0, table.load(48) as UInt32 == 0
        else { return }
        pciConfiguration = UInt64(table.load(44) as UInt32)
    }

    /// A table whose length is plausible and whose bytes sum to zero.
    private func table(at pointer: UInt64) -> (Address, UInt32)? {
        guard pointer != 0, pointer < 1 << 32 else { return nil }
        let table = Address(physical: pointer)
        let length: UInt32 = table.load(4)
        guard length >= 36, length <= Self.longest, sum(table, UInt64(length)) == 0 else { return nil }
        return (table, length)
    }

    private func sum(_ start: Address, _ count: UInt64) -> UInt8 {
        var sum: UInt8 = 0
        for offset in 0..<count { sum &+= start.load(offset) as UInt8 }
        return sum
    }

    private func readMADT(_ table: Address, _ length: UInt64) {
        guard length >= 44 else { return }
        localAPIC = UInt64(table.load(36) as UInt32)
        var offset: UInt64 = 44
        while offset + 2 <= length {
            let kind: UInt8 = table.load(offset)
            let size = UInt64(table.load(offset + 1) as UInt8)
            guard size >= 2, offset + size <= length else { break }
            let entry = table + offset
            switch (kind, size) {
            case (0, 8...): add(processor: UInt32(entry.load(3) as UInt8), flags: entry.load(4))
            case (9, 16...): add(processor: entry.load(4), flags: entry.load(8))
            case (1, 12...): ioapics.append(IOAPICEntry(address: UInt64(entry.load(4) as UInt32), base: entry.load(8)))
            case (2, 10...):
                let line = Int(entry.load(3) as UInt8)
                if line < isaInterrupts.count { isaInterrupts[line] = entry.load(4) }
            default: break
            }
            offset += size
        }
    }

    private func add(processor: UInt32, flags: UInt32) {
        let enabledOrOnlineCapable: UInt32 = 3
        guard flags & enabledOrOnlineCapable != 0, processor < 255, !processors.contains(processor) else { return }
        processors.append(processor)
    }

    private func readFADT(_ table: Address, _ length: UInt64) {
        guard length >= 44 else { return }
        // X_DSDT, or the older 32-bit field for firmware that fills in only that (§5.2.9).
        let wide: UInt64 =
            length >= 148 ? UInt64(table.load(140) as UInt32) | UInt64(table.load(144) as UInt32) << 32 : 0
        if let (definition, size) = self.table(at: wide != 0 ? wide : UInt64(table.load(40) as UInt32)) {
            scanDSDT(definition, UInt64(size))
        }
        guard length >= 256 else { return }
        let space: UInt8 = table.load(244)
        let address: UInt64 = UInt64(table.load(248) as UInt32) | UInt64(table.load(252) as UInt32) << 32
        guard address != 0, address < 1 << 32, space <= 1 else { return }
        unsafe Power.firmwareSleepControl = Register(isPort: space == 1, address: address)
    }

    /// Searches for virtio-mmio devices without interpreting AML: behind each name LNRO0005, up to the next one, are a
    /// 32-bit fixed memory range and an extended interrupt (ACPI 6.5 §6.4.3.4, §6.4.3.6), as every firmware writes
    /// them.
    private func scanDSDT(_ table: Address, _ length: UInt64) {
        var isDevice = false
        var address: UInt64?
        var offset: UInt64 = 36
        while offset + 12 <= length {
            let here = table + offset
            if here.load() as UInt32 == 0x4f52_4e4c && here.load(4) as UInt32 == 0x3530_3030 {  // "LNRO", "0005"
                (isDevice, address) = (true, nil)
                offset += 8
            } else if isDevice, here.load() as UInt8 == 0x86, here.load(1) as UInt16 == 9 {
                address = UInt64(here.load(4) as UInt32)
                offset += 12
            } else if isDevice, let base = address, here.load() as UInt8 == 0x89, here.load(1) as UInt16 >= 6,
                here.load(4) as UInt8 == 1,
                offset + 9 <= length
            {
                virtioDevices.append((base, here.load(5)))
                isDevice = false
                offset += 9
            } else {
                offset += 1
            }
        }
    }
}

let acpi = ACPI()

// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// Tables for firmware, which puts them into RAM itself: files of its configuration device, and for ACPI the commands
/// that link them there (QEMU's `include/hw/acpi/bios-linker-loader.h`: entries of 128 bytes).
public struct FirmwareTables: Sendable {
    /// The names and contents of the files.
    public let files: [(name: String, bytes: [UInt8])]

    /// - Throws: ``BootError/tablesTooLarge(size:limit:)`` and ``BootError/firmwareTablesTooLarge(size:limit:)``.
    public init(
        _ machine: ACPIDescription, _ identity: SMBIOSDescription, memoryMap: [MemoryMapEntry]
    ) throws(BootError) {
        var map: [UInt8] = []
        for entry in memoryMap {
            map.append(littleEndian: entry.start)
            map.append(littleEndian: entry.size)
            map.append(littleEndian: entry.kind.rawValue)
        }
        let structures = try SMBIOSTables(identity, at: 0, limit: 0xffff).structures
        files =
            Self.acpi(try ACPITables(machine, at: 0, limit: 1 << 20).bytes) + [
                ("etc/e820", map),
                ("etc/smbios/smbios-anchor", Self.smbiosAnchor(structures)),
                ("etc/smbios/smbios-tables", structures),
            ]
    }

    // MARK: ACPI

    private static let pointers = "etc/acpi/rsdp", tables = "etc/acpi/tables"

    /// The tables, in which pointers are offsets, and the commands that make them addresses.
    private static func acpi(_ all: [UInt8]) -> [(name: String, bytes: [UInt8])] {
        var rsdp = Array(all[..<ACPITables.rsdpSize])
        var tables = all
        // What points to the tables is in a file of its own, in low memory, where it is searched.
        for index in 0..<ACPITables.rsdpSize { tables[index] = 0 }
        func offset(_ bytes: [UInt8], _ position: Int) -> Int { Int(bytes.load(UInt64.self, at: position) ?? 0) }
        func length(_ table: Int) -> Int { Int(tables.load(UInt32.self, at: table + 4) ?? 0) }
        let xsdt = offset(rsdp, 24)
        var commands = allocate(Self.pointers, alignment: 16, isLow: true) + allocate(Self.tables, alignment: 64)
        var changed = [xsdt]
        for entry in stride(from: xsdt + ACPITables.headerSize, to: xsdt + length(xsdt), by: 8) {
            commands += addPointer(in: Self.tables, at: entry, size: 8)
            let table = offset(tables, entry)
            guard Array(tables[table..<table + 4]) == Array("FACP".utf8) else { continue }
            // Firmware that reads tables follows the FADT's older pointer to the DSDT.
            tables.store(UInt32(truncatingIfNeeded: offset(tables, table + 140)), at: table + 40)
            commands += addPointer(in: Self.tables, at: table + 40, size: 4)
            commands += addPointer(in: Self.tables, at: table + 140, size: 8)
            changed.append(table)
        }
        // Sums are computed with their own byte as it is, and some firmware only stores them: they have to be 0.
        for table in changed {
            tables[table + 9] = 0
            commands += addChecksum(in: Self.tables, at: table + 9, of: table, count: length(table))
        }
        rsdp[8] = 0
        rsdp[32] = 0
        commands += addPointer(in: Self.pointers, at: 24, size: 8)
        commands += addChecksum(in: Self.pointers, at: 8, of: 0, count: 20)
        commands += addChecksum(in: Self.pointers, at: 32, of: 0, count: ACPITables.rsdpSize)
        return [(Self.pointers, rsdp), (Self.tables, tables), ("etc/table-loader", commands)]
    }

    private static func command(_ number: UInt32, _ parameters: [UInt8]) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: number)
        bytes += parameters
        return bytes + [UInt8](repeating: 0, count: 128 - bytes.count)
    }

    private static func name(_ text: String) -> [UInt8] {
        Array(text.utf8) + [UInt8](repeating: 0, count: 56 - text.utf8.count)
    }

    /// Puts a file into RAM: anywhere below 4 GiB, or from 0xf0000 to 0xfffff.
    private static func allocate(_ file: String, alignment: UInt32, isLow: Bool = false) -> [UInt8] {
        var parameters = name(file)
        parameters.append(littleEndian: alignment)
        return command(1, parameters + [isLow ? 2 : 1])
    }

    /// Adds the address of the tables to a number.
    private static func addPointer(in file: String, at offset: Int, size: UInt8) -> [UInt8] {
        var parameters = name(file) + name(Self.tables)
        parameters.append(littleEndian: UInt32(offset))
        return command(2, parameters + [size])
    }

    /// Makes the sum of some bytes 0.
    private static func addChecksum(in file: String, at offset: Int, of start: Int, count: Int) -> [UInt8] {
        var parameters = name(file)
        for number in [offset, start, count] { parameters.append(littleEndian: UInt32(number)) }
        return command(3, parameters)
    }

    // MARK: SMBIOS

    /// The 32-bit entry point (DSP0134 §5.2.1), which older firmware expects too, for version 2.8; firmware fills in
    /// the address and both sums.
    private static func smbiosAnchor(_ structures: [UInt8]) -> [UInt8] {
        var (position, count, longest) = (0, 0, 0)
        while position + 4 <= structures.count {
            var end = position + Int(structures[position + 1])
            while end + 2 <= structures.count, structures[end] != 0 || structures[end + 1] != 0 { end += 1 }
            longest = max(longest, end + 2 - position)
            count += 1
            position = end + 2
        }
        var bytes: [UInt8] = "_SM_".utf8 + [0, 0x1f, 2, 8]
        bytes.append(littleEndian: UInt16(longest))
        bytes += [0, 0, 0, 0, 0, 0] + "_DMI_".utf8 + [0]
        bytes.append(littleEndian: UInt16(structures.count))
        bytes.append(littleEndian: UInt32(0))
        bytes.append(littleEndian: UInt16(count))
        return bytes + [0x28]
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import Glibc
import Linux
import TestSupport
import Testing

@Suite(.timed) struct ACPITests {
    private var machine: ACPIDescription {
        var machine = ACPIDescription(
            localAPICIDs: Array(0..<4),
            virtioDevices: [
                VirtioMMIOSlot(address: 0xd000_0000, gsi: 16), VirtioMMIOSlot(address: 0xd000_1000, gsi: 5),
            ])
        machine.nodes = [
            .init(cpus: [0, 1], memory: [0..<0xa0000, 0x10_0000..<0x4000_0000]),
            .init(cpus: [2, 3], memory: [0x4000_0000..<0x8000_0000]),
        ]
        return machine
    }

    private var machineWithPCI: ACPIDescription {
        var machine = ACPIDescription(localAPICIDs: [0])
        machine.pci = PCIRootDescription(
            configuration: 0xe000_0000, lastBus: 0,
            windows: [0xc000_0000..<0xd000_0000, 0x1_0000_0000..<0x11_0000_0000],
            interrupts: (1..<32).map { 16 + $0 % 8 })
        return machine
    }

    /// The table with this signature, found as a guest finds it: from the RSDP over the XSDT.
    private func table(_ signature: String, in tables: ACPITables) throws -> [UInt8] {
        func table(at address: UInt64) throws -> [UInt8] {
            let offset = Int(address - tables.address)
            let length: UInt32 = try #require(tables.bytes.load(at: offset + 4))
            return Array(tables.bytes[offset..<offset + Int(length)])
        }
        let xsdt = try table(at: try #require(tables.bytes.load(at: 24)))
        if signature == "XSDT" { return xsdt }
        if signature == "DSDT" {
            return try table(at: try #require(try self.table("FACP", in: tables).load(at: 140)))
        }
        for offset in stride(from: 36, to: xsdt.count, by: 8) {
            let found = try table(at: try #require(xsdt.load(at: offset)))
            if found.starts(with: signature.utf8) { return found }
        }
        throw Missing(signature: signature)
    }

    private struct Missing: Error { let signature: String }

    @Test func linksAndSumsEveryTable() throws {
        let tables = try ACPITables(machine)
        #expect(tables.rsdp == 0xe_0000)
        #expect(tables.bytes.prefix(20).reduce(0, &+) == 0 && tables.bytes.prefix(36).reduce(0, &+) == 0)
        for signature in ["XSDT", "FACP", "DSDT", "APIC", "SRAT", "SLIT"] {
            #expect(try table(signature, in: tables).reduce(0, &+) == 0, "checksum of \(signature)")
        }
        let flat = try ACPITables(ACPIDescription(localAPICIDs: Array(0..<1)))
        #expect(throws: Missing.self) { try table("SRAT", in: flat) }
        // An RSDP can be found by its signature only on a 16-byte boundary.
        #expect(tables.rsdp % 16 == 0)
    }

    @Test func namesTheRegistersOfPowerAndReset() throws {
        let fadt = try table("FACP", in: try ACPITables(machine))
        #expect(fadt.count == 276 && fadt[8] == 6)
        let register: [UInt8] = [1, 8, 0, 1]
        #expect(Array(fadt[116..<129]) == register + [0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe])
        #expect(Array(fadt[244..<256]) == register + [0x00, 6, 0, 0, 0, 0, 0, 0])
        #expect(Array(fadt[256..<268]) == register + [0x01, 6, 0, 0, 0, 0, 0, 0])
        let flags: UInt32 = try #require(fadt.load(at: 112))
        #expect(flags & 1 << 20 != 0, "hardware-reduced")
        #expect(flags & 1 << 10 != 0, "reset register")
    }

    @Test func listsTheCPUs() throws {
        let madt = try table("APIC", in: try ACPITables(machine))
        #expect(Array(madt[36..<44]) == [0, 0, 0xe0, 0xfe, 1, 0, 0, 0])
        #expect(Array(madt[44..<60]) == [0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0])
        #expect(Array(madt[76..<88]) == [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0])
        // IRQ 9 and the device on 5: edge, active high.
        #expect(Array(madt[88..<108]) == [2, 10, 0, 9, 9, 0, 0, 0, 5, 0, 2, 10, 0, 5, 5, 0, 0, 0, 5, 0])
    }

    @Test func hasRoomForEveryCPUOfKVM() throws {
        let tables = try ACPITables(ACPIDescription(localAPICIDs: Array(0..<1024)))
        let madt = try table("APIC", in: tables)
        // The last of the wide entries, before IOAPIC, one override and two NMIs.
        let last = madt.count - 12 - 6 - 10 - 12 - 16
        #expect(Array(madt[last..<last + 16]) == [9, 16, 0, 0, 0xff, 3, 0, 0, 1, 0, 0, 0, 0xff, 3, 0, 0])
        #expect(throws: BootError.self) { try ACPITables(ACPIDescription(localAPICIDs: Array(0..<4096))) }
    }

    @Test func encodesAML() {
        #expect(AML.eisaID("PNP0501").bytes == [0x0c, 0x41, 0xd0, 0x05, 0x01])
        #expect(AML.integer(0x1_0000_0000).bytes == [0x0e, 0, 0, 0, 0, 1, 0, 0, 0])
        #expect(AML.name("\\_SB.PWRB") == [0x5c, 0x2e] + Array("_SB_PWRB".utf8))
        #expect(AML.name("\\") == [0x5c, 0x00])
        #expect(AML.name("_SB.PCI0.GED") == [0x2f, 3] + Array("_SB_PCI0GED_".utf8))
        // The length counts itself: 62 bytes of content are the last that one byte serves.
        for (content, length) in [
            (58, [0x3f]), (59, [0x41, 0x04]), (4089, [0x4f, 0xff]), (4090, [0x81, 0x00, 0x01]),
            (1 << 20, [0xc8, 0x00, 0x00, 0x01]),
        ] as [(Int, [UInt8])] {
            let scope = AML.scope("_SB", [AML(Array(repeating: 0xa3, count: content))]).bytes
            #expect(scope[0] == 0x10 && Array(scope[1..<1 + length.count]) == length, "\(content) bytes")
            #expect(Array(scope[(1 + length.count)...].prefix(4)) == Array("_SB_".utf8))
        }
    }

    @Test func saysWhereConfigurationSpaceIs() throws {
        let mcfg = try table("MCFG", in: try ACPITables(machineWithPCI))
        #expect(mcfg.count == 60 && mcfg.reduce(0, &+) == 0)
        // Base, segment, first and last bus.
        #expect(Array(mcfg[44..<56]) == [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0])
        #expect(throws: Missing.self) { try table("MCFG", in: try ACPITables(machine)) }
    }

    @Test func encodesWindowsOfABridge() {
        #expect(
            Resource.buses(0...255).bytes == [0x88, 13, 0, 2, 0x0c, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 1])
        #expect(
            Resource.memoryWindow32(0xc000_0000..<0xd000_0000).bytes
                == [0x87, 23, 0, 0, 0x0c, 1] + [0, 0, 0, 0] + [0, 0, 0, 0xc0] + [0xff, 0xff, 0xff, 0xcf] + [0, 0, 0, 0]
                + [0, 0, 0, 0x10])
        #expect(Resource.memoryWindow64(0x1_0000_0000..<0x11_0000_0000).bytes.count == 46)
        #expect(
            AML.uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766").bytes.suffix(16)
                == [0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40, 0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d, 0xd7, 0x66])
    }

    @Test(.enabled(if: Tool.iasl != nil, "iasl is not installed (Debian's acpica-tools)"))
    func isValidByACPICA() throws {
        try checkByACPICA(
            machine, ["XSDT", "FACP", "DSDT", "APIC", "SRAT", "SLIT"],
            devices: [
                "LNRO0005", "ACPI0007", "ACPI0013", "PNP0501", "PNP0B00", "PNP0C0C", "Notify (\\_SB.PWRB, 0x80)",
                "0xD0001000", "_S5",
            ])
        try checkByACPICA(
            machineWithPCI, ["XSDT", "FACP", "DSDT", "APIC", "MCFG"],
            devices: [
                "PNP0A08", "PNP0A03", "PNP0C02", "_PRT", "_OSC", "0xC0000000", "0x00000010FFFFFFFF", "0xE0000000",
                "0x001FFFFF",
                "ToUUID (\"33db4d5b-1ff7-401c-9657-7441c03dd766\")",
            ])
    }

    private func checkByACPICA(_ machine: ACPIDescription, _ signatures: [String], devices: [String]) throws {
        let directory = "\(P_tmpdir)/swkvm-acpi-test-\(UInt64.random(in: 0 ... .max))"
        try #require(unsafe mkdir(directory, 0o700) == 0)
        defer { Tool.removeDirectory(directory) }
        let tables = try ACPITables(machine)
        let iasl = try #require(Tool.iasl)
        for signature in signatures {
            let path = "\(directory)/\(signature)"
            try FileDescriptor.open("\(path).aml", O_CREAT | O_RDWR, mode: 0o600).writeAll(
                try table(signature, in: tables))
            let (disassembly, status) = try Tool.run(iasl, ["-p", path, "-d", "\(path).aml"])
            #expect(status == 0, "\(disassembly)")
            #expect(!disassembly.contains("Warning") && !disassembly.contains("rror"), "\(disassembly)")
            let source = String(decoding: try readFile("\(path).dsl", limit: 1 << 20), as: UTF8.self)
            #expect(!source.contains("Unknown") && !source.contains("Invalid"), "\(source)")
            let (compilation, result) = try Tool.run(iasl, ["-p", "\(path)-again", "\(path).dsl"])
            #expect(result == 0, "\(compilation)")
            #expect(
                compilation.contains("0 Errors") || compilation.contains("Compilation successful"), "\(compilation)")
            #expect(
                compilation.contains(" 0 Warnings") || !compilation.contains("Warning"), "\(compilation)\n\(source)")
            if signature == "DSDT" {
                for text in devices { #expect(source.contains(text), "\(text) in \(source)") }
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import Glibc
import Linux
import Platform
import TestSupport
import Testing

@Suite(.timed) struct SMBIOSTests {
    private func machine(
        name: String = "web 1", sockets: [Int] = [4], memory: [Range<UInt64>] = [0..<1 << 30]
    ) -> SMBIOSDescription {
        SMBIOSDescription(
            name: name, uuid: Array(0x10...0x1f), sockets: sockets,
            processor: .init(manufacturer: "GenuineTest", version: "Test CPU", id: 0x178b_fbff_0005_0654),
            memory: memory)
    }

    /// A structure as a reader takes it from the table: type, handle, fields with the header, strings.
    private struct Found {
        let type: UInt8, handle: UInt16, fields: [UInt8], strings: [String]

        /// The string that the field at `offset` names.
        func string(at offset: Int) -> String? {
            let number = Int(fields[offset])
            return number == 0 ? nil : strings[number - 1]
        }
    }

    /// Walks the table from its entry point, as a guest does (DSP0134 §6.1).
    private func structures(in tables: SMBIOSTables) throws -> [Found] {
        let bytes = tables.bytes
        let size: UInt32 = try #require(bytes.load(at: 12))
        let address: UInt64 = try #require(bytes.load(at: 16))
        var offset = Int(address - tables.address)
        let end = offset + Int(size)
        #expect(end == bytes.count)
        var found: [Found] = []
        while offset < end {
            let length = Int(bytes[offset + 1])
            let handle: UInt16 = try #require(bytes.load(at: offset + 2))
            let fields = Array(bytes[offset..<offset + length])
            var strings: [String] = []
            var next = offset + length
            while bytes[next] != 0 {
                let string = bytes[next...].prefix { $0 != 0 }
                strings.append(String(decoding: string, as: UTF8.self))
                next += string.count + 1
            }
            found.append(Found(type: bytes[offset], handle: handle, fields: fields, strings: strings))
            offset = next + (strings.isEmpty ? 2 : 1)
        }
        return found
    }

    private func structure(_ type: UInt8, in tables: SMBIOSTables) throws -> Found {
        try #require(try structures(in: tables).first { $0.type == type })
    }

    @Test func theEntryPointIsWhereGuestsLook() throws {
        let tables = try SMBIOSTables(machine())
        #expect(tables.address == 0xf_8000 && tables.address % 16 == 0)
        #expect(Array(tables.bytes[0..<5]) == Array("_SM3_".utf8) && tables.bytes[6] == 24)
        #expect(tables.bytes[0..<24].reduce(0, &+) == 0)
        #expect(Array(tables.bytes[7..<11]) == [3, 3, 0, 1])
        // Behind the ACPI tables, before the reset vector.
        #expect(PhysicalLayout.acpi + UInt64(PhysicalLayout.acpiSize) <= PhysicalLayout.smbios)
        #expect(PhysicalLayout.smbios + UInt64(PhysicalLayout.smbiosSize) <= PhysicalLayout.resetVector)
    }

    @Test func hasTheStructuresThatAreRequired() throws {
        let found = try structures(in: try SMBIOSTables(machine()))
        #expect(found.map(\.type) == [0, 1, 3, 4, 16, 17, 19, 32, 127])
        // The lengths of version 3.3, or of the version whose fields are all there.
        #expect(found.map(\.fields.count) == [0x1a, 0x1b, 0x16, 0x30, 0x17, 0x28, 0x1f, 0x0b, 4])
        #expect(found.map(\.handle) == Array(0..<UInt16(found.count)))
        // Each string that a field names is there: number of strings and largest number agree.
        #expect(found[0].strings == ["swkvm", "1", "01/01/2026"])
    }

    @Test func saysWhoTheMachineIs() throws {
        let tables = try SMBIOSTables(machine())
        let system = try structure(1, in: tables)
        #expect(
            system.string(at: 4) == "swkvm" && system.string(at: 5) == "swkvm virtual machine"
                && system.string(at: 7) == "web 1")
        // 10111213-1415-1617-1819-1a1b1c1d1e1f: three little-endian fields, then bytes.
        #expect(Array(system.fields[8..<24]) == [0x13, 0x12, 0x11, 0x10, 0x15, 0x14, 0x17, 0x16] + Array(0x18...0x1f))
        #expect(try structure(3, in: tables).string(at: 8) == "web 1")
        var nobody = machine()
        nobody.uuid = []
        #expect(try structure(1, in: try SMBIOSTables(nobody)).fields[8..<24].allSatisfy { $0 == 0 })
    }

    @Test func aNameIsCutWhereACharacterEnds() throws {
        let long = String(repeating: "a", count: 63) + "ü" + "b"
        let name = try structure(1, in: try SMBIOSTables(machine(name: long))).string(at: 7)
        #expect(name == String(repeating: "a", count: 63))
        // A NUL would end the table of strings too early; no name at all is no string.
        #expect(try structure(1, in: try SMBIOSTables(machine(name: "a\0b"))).string(at: 7) == "ab")
        #expect(try structure(1, in: try SMBIOSTables(machine(name: ""))).string(at: 7) == nil)
    }

    @Test func countsTheProcessors() throws {
        let few = try structure(4, in: try SMBIOSTables(machine(sockets: [4])))
        #expect(Array(few.fields[0x23..<0x26]) == [4, 4, 4] && few.fields.load(at: 0x2a) == UInt16(4))
        #expect(few.string(at: 7) == "GenuineTest" && few.string(at: 0x10) == "Test CPU")
        #expect(few.fields.load(at: 8) == 0x178b_fbff_0005_0654 as UInt64)
        // A byte that is all ones refers to the wider field.
        let many = try structure(4, in: try SMBIOSTables(machine(sockets: [1024])))
        #expect(
            many.fields[0x23] == 0xff && many.fields.load(at: 0x2a) == UInt16(1024)
                && many.fields.load(at: 0x2e) == UInt16(1024))
        let two = try structures(in: try SMBIOSTables(machine(sockets: [2, 3]))).filter { $0.type == 4 }
        #expect(two.map { $0.string(at: 4) } == ["CPU 0", "CPU 1"] && two.map { $0.fields[0x23] } == [2, 3])
    }

    @Test(
        arguments: [
            ([0..<1 << 30], 1024, 0), ([0..<3 << 20], 3, 0), ([0..<(3 << 20) + 4096], 0x8000 | 3076, 0),
            ([0..<3 << 30, 4 << 30..<9 << 30], 8192, 0), ([0..<3 << 30, 4 << 30..<65 << 30], 0x7fff, 65536),
            ([0..<3 << 30, 4 << 30..<5 << 40], 0x7fff, 5 << 20 - 1024),
        ] as [([Range<UInt64>], UInt16, UInt32)])
    func describesTheMemory(ranges: [Range<UInt64>], size: UInt16, extended: UInt32) throws {
        let tables = try SMBIOSTables(machine(memory: ranges))
        let device = try structure(17, in: tables)
        #expect(device.fields.load(at: 0x0c) == size && device.fields.load(at: 0x1c) == extended)
        let array = try structure(16, in: tables)
        #expect(array.fields.load(at: 0x0f) == ranges.reduce(0) { $0 + UInt64($1.count) })
        #expect(device.fields.load(at: 4) == array.handle)
        let mapped = try structures(in: tables).filter { $0.type == 19 }
        #expect(mapped.count == ranges.count)
        for (found, range) in zip(mapped, ranges) {
            let start: UInt32 = try #require(found.fields.load(at: 4)),
                end: UInt32 = try #require(found.fields.load(at: 8))
            if range.upperBound > 4 << 40 {
                #expect(start == .max && end == .max)
                #expect(
                    found.fields.load(at: 0x0f) == range.lowerBound
                        && found.fields.load(at: 0x17) == range.upperBound - 1)
            } else {
                #expect(UInt64(start) << 10 == range.lowerBound && (UInt64(end) + 1) << 10 == range.upperBound)
            }
            #expect(found.fields.load(at: 0x0c) == array.handle)
        }
    }

    @Test func aTableWithoutRoomIsAnError() {
        #expect(throws: BootError.self) { try SMBIOSTables(machine(), limit: 100) }
        let ranges = (0..<4096).map { UInt64($0) << 30..<UInt64($0) << 30 + 4096 }
        #expect(throws: BootError.self) { try SMBIOSTables(machine(memory: ranges)) }
    }

    @Test(.enabled(if: Tool.dmidecode != nil, "dmidecode is not installed (Debian's dmidecode)"))
    func isReadByDmidecode() throws {
        // A dump is the entry point with the table's offset in the file, and the table there: what is built for address
        // 0.
        let tables = try SMBIOSTables(machine(memory: [0..<3 << 30, 4 << 30..<6 << 30]), at: 0)
        try TemporaryFile.with(tables.bytes) { path in
            let (text, status) = try Tool.run(try #require(Tool.dmidecode), ["--from-dump", path])
            #expect(status == 0, "\(text)")
            for line in [
                "SMBIOS 3.3.0 present.", "Vendor: swkvm", "Release Date: 01/01/2026", "System is a virtual machine",
                "Product Name: swkvm virtual machine",
                "Serial Number: web 1", "UUID: 10111213-1415-1617-1819-1a1b1c1d1e1f", "Wake-up Type: Power Switch",
                "Asset Tag: web 1",
                "Manufacturer: GenuineTest", "Version: Test CPU", "Core Count: 4", "Status: Populated, Enabled",
                "Multi-Core", "Maximum Capacity: 5 GB", "Size: 5 GB",
                "Starting Address: 0x00100000000", "Range Size: 3 GB", "Range Size: 2 GB", "Status: No errors detected",
                "End Of Table",
            ] { #expect(text.contains(line), "\(line) in \(text)") }
            for word in ["OUT OF SPEC", "BAD INDEX", "TRUNCATED", "Wrong", "broken", "Invalid"] {
                #expect(!text.contains(word), "\(text)")
            }
        }
    }
}

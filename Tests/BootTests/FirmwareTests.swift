// SPDX-License-Identifier: Apache-2.0

@testable import Boot
import GuestMemory
import TestSupport
import Testing

/// What firmware gets of a machine: it links the tables as a loader does, and they are those of a machine without
/// firmware.
@Suite(.timed) struct FirmwareTests {
    private func files() throws -> [String: [UInt8]] {
        let machine = ACPIDescription(
            localAPICIDs: [0, 1], virtioDevices: [VirtioMMIOSlot(address: 0xd000_0000, gsi: 16)])
        let identity = SMBIOSDescription(
            name: "vm", uuid: [], sockets: [2], processor: .init(manufacturer: "m", version: "v", id: 1),
            memory: [0..<1 << 30])
        let map = [MemoryMapEntry(start: 0, size: 1 << 30, kind: .ram)]
        let tables = try FirmwareTables(machine, identity, memoryMap: map)
        return Dictionary(uniqueKeysWithValues: tables.files.map { ($0.name, $0.bytes) })
    }

    /// Does what a firmware's loader does, with each file at an address of its own.
    @Test func theLoaderLinksTheTables() throws {
        var files = try files()
        let commands = try #require(files["etc/table-loader"])
        #expect(commands.count % 128 == 0)
        var addresses: [String: UInt64] = [:]
        func name(_ offset: Int) -> String {
            String(decoding: commands[offset..<offset + 56].prefix { $0 != 0 }, as: UTF8.self)
        }
        for start in stride(from: 0, to: commands.count, by: 128) {
            let file = name(start + 4)
            switch commands[start] {
            case 1: addresses[file] = file == "etc/acpi/rsdp" ? 0xf_5000 : 0x3fff_0000
            case 2:
                let target = try #require(addresses[name(start + 60)])
                let offset = Int(try #require(commands.load(UInt32.self, at: start + 116)))
                if commands[start + 120] == 8 {
                    let value = try #require(files[file]?.load(UInt64.self, at: offset))
                    files[file]?.store(value + target, at: offset)
                } else {
                    let value = try #require(files[file]?.load(UInt32.self, at: offset))
                    files[file]?.store(value + UInt32(target), at: offset)
                }
            case 3:
                let numbers = try (0..<3).map {
                    Int(try #require(commands.load(UInt32.self, at: start + 60 + 4 * $0)))
                }
                let bytes = try #require(files[file])
                let sum = bytes[numbers[1]..<numbers[1] + numbers[2]].reduce(0, &+)
                // One that only stores the sum, and one that takes what is there off it, do the same.
                #expect(bytes[numbers[0]] == 0)
                files[file]?[numbers[0]] = 0 &- sum
            default: Issue.record("command \(commands[start])")
            }
        }
        let rsdp = try #require(files["etc/acpi/rsdp"]), tables = try #require(files["etc/acpi/tables"])
        #expect(rsdp.prefix(20).reduce(0, &+) == 0 && rsdp.reduce(0, &+) == 0)
        func table(at address: UInt64) throws -> [UInt8] {
            let offset = Int(address - 0x3fff_0000)
            let length = Int(try #require(tables.load(UInt32.self, at: offset + 4)))
            let bytes = Array(tables[offset..<offset + length])
            #expect(bytes.reduce(0, &+) == 0, "\(String(decoding: bytes[..<4], as: UTF8.self))")
            return bytes
        }
        let xsdt = try table(at: try #require(rsdp.load(at: 24)))
        var names: [String] = []
        for offset in stride(from: 36, to: xsdt.count, by: 8) {
            let found = try table(at: try #require(xsdt.load(at: offset)))
            names.append(String(decoding: found[..<4], as: UTF8.self))
            guard names.last == "FACP" else { continue }
            let dsdt: UInt64 = try #require(found.load(at: 140))
            #expect(UInt64(try #require(found.load(UInt32.self, at: 40))) == dsdt)
            #expect(try table(at: dsdt).starts(with: "DSDT".utf8))
        }
        #expect(names == ["FACP", "APIC"])
    }

    @Test func mapAndIdentity() throws {
        let files = try files()
        #expect(files["etc/e820"] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 1, 0, 0, 0])
        let anchor = try #require(files["etc/smbios/smbios-anchor"])
        let tables = try #require(files["etc/smbios/smbios-tables"])
        #expect(anchor.count == 31 && anchor.starts(with: "_SM_".utf8))
        #expect(anchor.load(UInt16.self, at: 22) == UInt16(tables.count))
        // The number of structures: each has a handle, from 0 on, and the last one ends the table.
        let count = try #require(anchor.load(UInt16.self, at: 28))
        #expect(count > 5 && tables.suffix(2) == [0, 0])
    }
}

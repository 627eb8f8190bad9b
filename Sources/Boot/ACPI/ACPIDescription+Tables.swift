// SPDX-License-Identifier: Apache-2.0

// The content of each table, without its header. Offsets in comments count from the header's start, as in the
// specification.
extension ACPIDescription {
    /// Fixed ACPI Description Table (§5.2.9), hardware-reduced: nearly all of it is zero.
    func fadt(dsdt: UInt64) -> [UInt8] {
        var table = [UInt8](repeating: 0, count: 276)
        // Legacy devices (the UART, the clock) are there, VGA is not.
        let bootArchitecture: UInt16 = 1 << 0 | 1 << 2
        // WBINVD works, C1 works, power and sleep button are not fixed hardware, reset register, hardware-reduced.
        let flags: UInt32 = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20
        table.store(bootArchitecture, at: 109)
        table.store(flags, at: 112)
        table.replaceSubrange(116..<128, with: Self.portRegister(resetPort))
        table.store(resetValue, at: 128)
        table.store(UInt8(5), at: 131)  // minor version: 6.5
        table.store(dsdt, at: 140)
        table.replaceSubrange(244..<256, with: Self.portRegister(sleepControlPort))
        table.replaceSubrange(256..<268, with: Self.portRegister(sleepStatusPort))
        table.replaceSubrange(268..<276, with: "swkvm\0\0\0".utf8)
        return Array(table.dropFirst(ACPITables.headerSize))
    }

    /// A byte-wide register among the ports as a generic address structure (§5.2.3.2).
    private static func portRegister(_ port: UInt16) -> [UInt8] {
        var bytes: [UInt8] = [1, 8, 0, 1]
        bytes.append(littleEndian: UInt64(port))
        return bytes
    }

    /// Multiple APIC Description Table (§5.2.12).
    var madt: [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: localAPICAddress)
        bytes.append(littleEndian: UInt32(1))  // there are two 8259s as well
        for (uid, id) in localAPICIDs.enumerated() {
            if id < 255, uid < 255 {
                bytes += [0, 8, UInt8(uid), UInt8(id)]
            } else {
                bytes += [9, 16, 0, 0]
                bytes.append(littleEndian: id)
            }
            bytes.append(littleEndian: UInt32(1))  // enabled
            if id >= 255 || uid >= 255 { bytes.append(littleEndian: UInt32(uid)) }
        }
        bytes += [1, 12, ioapicID, 0]
        bytes.append(littleEndian: ioapicAddress)
        bytes.append(littleEndian: UInt32(0))  // its first GSI
        for override in interruptOverrides {
            bytes += [2, 10, 0, override.source]
            bytes.append(littleEndian: override.gsi)
            bytes.append(littleEndian: UInt16(override.isLevel ? 0xf : 0x5))
        }
        // LINT1 of every CPU is the NMI.
        bytes += [4, 6, 0xff, 0, 0, 1]
        if localAPICIDs.contains(where: { $0 >= 255 }) { bytes += [10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0] }
        return bytes
    }

    /// System Resource Affinity Table (§5.2.16).
    var srat: [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: UInt32(1))
        bytes.append(littleEndian: UInt64(0))
        for (domain, node) in nodes.enumerated() {
            for cpu in node.cpus where localAPICIDs.indices.contains(cpu) {
                // The x2APIC form holds IDs of every size.
                bytes += [2, 24, 0, 0]
                bytes.append(littleEndian: UInt32(domain))
                bytes.append(littleEndian: localAPICIDs[cpu])
                bytes.append(littleEndian: UInt32(1))  // enabled
                bytes.append(littleEndian: UInt32(0))  // clock domain
                bytes.append(littleEndian: UInt32(0))
            }
            for range in node.memory {
                bytes += [1, 40]
                bytes.append(littleEndian: UInt32(domain))
                bytes.append(littleEndian: UInt16(0))
                bytes.append(littleEndian: range.lowerBound)
                bytes.append(littleEndian: range.upperBound - range.lowerBound)
                bytes.append(littleEndian: UInt32(0))
                bytes.append(littleEndian: UInt32(1))  // enabled
                bytes.append(littleEndian: UInt64(0))
            }
        }
        return bytes
    }

    /// System Locality Information Table (§5.2.17).
    var slit: [UInt8] {
        var bytes: [UInt8] = []
        bytes.append(littleEndian: UInt64(nodes.count))
        for row in nodes.indices {
            for column in nodes.indices {
                let given = distances.indices.contains(row) && distances[row].indices.contains(column)
                bytes.append(given ? distances[row][column] : row == column ? 10 : 20)
            }
        }
        return bytes
    }

    /// The definition block of the Differentiated System Description Table: the devices.
    var dsdt: [UInt8] {
        var devices: [AML] = []
        for uid in localAPICIDs.indices {
            devices.append(
                .device(
                    Self.numbered("C", uid), [.name("_HID", .string("ACPI0007")), .name("_UID", .integer(UInt64(uid)))])
            )
        }
        for (index, serial) in serialPorts.enumerated() {
            devices.append(
                .device(
                    Self.numbered("U", index),
                    [
                        .name("_HID", .eisaID("PNP0501")),
                        .name("_UID", .integer(UInt64(index))),
                        .name("_CRS", .resources([.ports(serial.port, count: 8), .interrupt(serial.irq)])),
                    ]))
        }
        if let port = realTimeClockPort {
            // Without an interrupt: Linux would claim IRQ 8 for a clock that no table names, and fail.
            devices.append(
                .device(
                    "RTC", [.name("_HID", .eisaID("PNP0B00")), .name("_CRS", .resources([.ports(port, count: 2)]))]))
        }
        for (index, device) in virtioDevices.enumerated() {
            devices.append(
                .device(
                    Self.numbered("V", index),
                    [
                        .name("_HID", .string("LNRO0005")),
                        .name("_UID", .integer(UInt64(index))),
                        .name("_CCA", .integer(1)),
                        .name(
                            "_CRS",
                            .resources([
                                .memory(UInt32(truncatingIfNeeded: device.address), size: device.size),
                                .interrupt(device.gsi),
                            ])),
                    ]))
        }
        devices += pci?.devices ?? []
        devices.append(.device("PWRB", [.name("_HID", .eisaID("PNP0C0C")), .name("_UID", .integer(0))]))
        devices.append(eventDevice)
        // SLP_TYP of S5 is what the guest writes to the sleep control register to power off (§7.4.2).
        let powerOff = AML.name("_S5", .package([.integer(5), .integer(0), .integer(0), .integer(0)]))
        return AML.scope("\\_SB", devices).bytes + powerOff.bytes
    }

    /// The generic event device (§5.6.9): its interrupt says that bits came into the event register, and a read takes
    /// them.
    private var eventDevice: AML {
        .device(
            "GED",
            [
                .name("_HID", .string("ACPI0013")),
                .name("_UID", .integer(0)),
                .name("_CRS", .resources([.interrupt(eventGSI)])),
                .portRegion("EVNT", start: UInt64(eventPort), length: 1),
                .byteField(of: "EVNT", [("EVTS", 8)]),
                .method(
                    "_EVT", arguments: 1, isSerialized: true,
                    [
                        .store(.reference("EVTS"), in: .local(0)),
                        .when(.and(.local(0), .integer(1)), [.notify("\\_SB.PWRB", 0x80)]),
                    ]),
            ])
    }

    /// A name of four characters: a letter and three hexadecimal digits.
    private static func numbered(_ letter: String, _ number: Int) -> String {
        let digits = String(number, radix: 16, uppercase: true)
        return letter + String(repeating: "0", count: max(0, 3 - digits.count)) + digits
    }
}

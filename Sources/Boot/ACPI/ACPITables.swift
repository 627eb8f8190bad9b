// SPDX-License-Identifier: Apache-2.0

public import Platform

/// The ACPI tables of a machine: RSDP, XSDT, FADT, DSDT, MADT, MCFG for one with PCI, and SRAT and SLIT for one with
/// NUMA nodes (ACPI 6.5 §5.2).
///
/// The layout is one run of bytes: the RSDP at ``address``, then each table on a 16-byte boundary, the XSDT last, since
/// it names the others. The machine is hardware-reduced (§4.1): no fixed registers but sleep control, sleep status and
/// reset; events come through a generic event device (§5.6.9).
public struct ACPITables: Sendable, Equatable {
    /// The guest-physical address of the bytes.
    public let address: UInt64
    /// Address of the RSDP.
    public var rsdp: UInt64 { address }
    public let bytes: [UInt8]

    /// Builds the tables.
    /// - Parameters:
    ///   - address: on a 16-byte boundary.
    ///   - limit: bytes that may be used.
    /// - Throws: ``BootError/tablesTooLarge(size:limit:)``.
    public init(
        _ machine: ACPIDescription, at address: UInt64 = PhysicalLayout.acpi, limit: Int = PhysicalLayout.acpiSize
    ) throws(BootError) {
        self.address = address
        var bytes = [UInt8](repeating: 0, count: Self.rsdpSize)
        func place(_ table: [UInt8]) -> UInt64 {
            bytes.append(contentsOf: repeatElement(0, count: -bytes.count & 15))
            defer { bytes.append(contentsOf: table) }
            return address + UInt64(bytes.count)
        }
        let dsdt = place(Self.table("DSDT", revision: 2, machine.dsdt))
        var listed = [
            place(Self.table("FACP", revision: 6, machine.fadt(dsdt: dsdt))),
            place(Self.table("APIC", revision: 5, machine.madt)),
        ]
        if let pci = machine.pci { listed.append(place(Self.table("MCFG", revision: 1, pci.mcfg))) }
        if !machine.nodes.isEmpty {
            listed.append(place(Self.table("SRAT", revision: 3, machine.srat)))
            listed.append(place(Self.table("SLIT", revision: 1, machine.slit)))
        }
        var pointers: [UInt8] = []
        for table in listed { pointers.append(littleEndian: table) }
        let xsdt = place(Self.table("XSDT", revision: 1, pointers))
        bytes.replaceSubrange(0..<Self.rsdpSize, with: Self.rsdp(xsdt: xsdt))
        guard bytes.count <= limit else { throw .tablesTooLarge(size: bytes.count, limit: limit) }
        self.bytes = bytes
    }

    static let rsdpSize = 36
    static let headerSize = 36
    private static let vendor = "SWKVM "

    /// Root System Description Pointer, revision 2 (§5.2.5.3).
    private static func rsdp(xsdt: UInt64) -> [UInt8] {
        var bytes: [UInt8] = "RSD PTR ".utf8 + [0] + vendor.utf8 + [2]
        bytes.append(littleEndian: UInt32(0))  // no RSDT
        bytes.append(littleEndian: UInt32(rsdpSize))
        bytes.append(littleEndian: xsdt)
        bytes += [0, 0, 0, 0]
        bytes[8] = checksum(bytes[..<20])
        bytes[32] = checksum(bytes[...])
        return bytes
    }

    /// The header that all other tables have (§5.2.6), then the content.
    private static func table(_ signature: String, revision: UInt8, _ content: [UInt8]) -> [UInt8] {
        var bytes = Array(signature.utf8)
        bytes.append(littleEndian: UInt32(headerSize + content.count))
        bytes += [revision, 0] + vendor.utf8 + "SWKVM   ".utf8
        bytes.append(littleEndian: UInt32(1))  // OEM revision
        bytes += "SWKV".utf8
        bytes.append(littleEndian: UInt32(1))
        bytes += content
        bytes[9] = checksum(bytes[...])
        return bytes
    }

    /// What makes the sum of all bytes 0.
    private static func checksum(_ bytes: ArraySlice<UInt8>) -> UInt8 {
        0 &- bytes.reduce(0, &+)
    }
}

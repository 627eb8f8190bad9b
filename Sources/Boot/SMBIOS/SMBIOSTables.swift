// SPDX-License-Identifier: Apache-2.0

public import Platform

/// The SMBIOS tables of a machine (DMTF DSP0134, version 3.3): the 64-bit entry point, then the structures.
///
/// Guests without EFI look for the entry point on 16-byte boundaries of 0xf0000 – 0xfffff (§5.2).
public struct SMBIOSTables: Sendable, Equatable {
    /// The guest-physical address of the bytes.
    public let address: UInt64
    public let bytes: [UInt8]
    /// The structures alone.
    var structures: [UInt8] { Array(bytes.dropFirst(Self.entryPointSpace)) }

    /// Builds the tables.
    /// - Parameters:
    ///   - address: on a 16-byte boundary.
    ///   - limit: bytes that may be used.
    /// - Throws: ``BootError/firmwareTablesTooLarge(size:limit:)``.
    public init(
        _ machine: SMBIOSDescription, at address: UInt64 = PhysicalLayout.smbios, limit: Int = PhysicalLayout.smbiosSize
    ) throws(BootError) {
        self.address = address
        var structures: [UInt8] = []
        for (handle, structure) in machine.structures.enumerated() {
            structures += structure.encoded(handle: UInt16(truncatingIfNeeded: handle))
        }
        bytes =
            Self.entryPoint(structures: address + UInt64(Self.entryPointSpace), size: UInt32(structures.count))
            + [UInt8](repeating: 0, count: Self.entryPointSpace - Self.entryPointSize) + structures
        guard bytes.count <= limit else { throw .firmwareTablesTooLarge(size: bytes.count, limit: limit) }
    }

    static let entryPointSize = 24
    /// The structures begin on the next 16-byte boundary.
    static let entryPointSpace = 32

    /// SMBIOS 3.0 (64-bit) Entry Point (§5.2.2).
    private static func entryPoint(structures: UInt64, size: UInt32) -> [UInt8] {
        var bytes: [UInt8] = "_SM3_".utf8 + [0, UInt8(entryPointSize)]
        bytes += [3, 3, 0]  // version 3.3.0
        bytes += [1, 0]  // revision of this structure
        bytes.append(littleEndian: size)
        bytes.append(littleEndian: structures)
        bytes[5] = 0 &- bytes.reduce(0, &+)
        return bytes
    }
}

/// One structure: a type, fields, and the strings that fields name by number (§6.1).
struct SMBIOSStructure {
    private let type: UInt8
    private var fields: [UInt8] = []
    private var strings: [[UInt8]] = []

    init(type: UInt8) { self.type = type }

    mutating func add<Value: FixedWidthInteger>(_ value: Value) { fields.append(littleEndian: value) }
    mutating func add(bytes: [UInt8]) { fields += bytes }

    /// Longer texts are cut, as §6.1.3 once had it and readers still expect.
    static let longestString = 64

    /// A field that names a string: its number, or 0 for an empty one.
    mutating func add(_ text: String) {
        var bytes: [UInt8] = []
        for scalar in text.unicodeScalars where scalar != "\0" {
            let encoded = Array(String(scalar).utf8)
            if bytes.count + encoded.count > Self.longestString { break }
            bytes += encoded
        }
        if bytes.isEmpty { return fields.append(0) }
        if let known = strings.firstIndex(of: bytes) { return fields.append(UInt8(known + 1)) }
        strings.append(bytes)
        fields.append(UInt8(strings.count))
    }

    /// Header, fields, and the strings, whose end is an empty one.
    func encoded(handle: UInt16) -> [UInt8] {
        var bytes = [type, UInt8(4 + fields.count)]
        bytes.append(littleEndian: handle)
        bytes += fields
        for string in strings { bytes += string + [0] }
        return bytes + (strings.isEmpty ? [0, 0] : [0])
    }
}

// SPDX-License-Identifier: Apache-2.0

/// A piece of AML, the byte code of ACPI's DSDT (ACPI 6.5 §20), built from the inside out:
/// each function encodes one term around terms that are encoded already.
struct AML: Sendable, Equatable {
    var bytes: [UInt8]

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    // MARK: Named objects (§20.2.5)

    /// Opens an existing namespace: `Scope (path) { … }`.
    static func scope(_ path: String, _ body: [AML]) -> AML { package([0x10], name(path) + joined(body)) }

    static func device(_ name: String, _ body: [AML]) -> AML { package([0x5b, 0x82], self.name(name) + joined(body)) }

    /// `Name (name, value)`.
    static func name(_ name: String, _ value: AML) -> AML { AML([0x08] + self.name(name) + value.bytes) }

    static func method(_ name: String, arguments: UInt8, isSerialized: Bool = false, _ body: [AML]) -> AML {
        package([0x14], self.name(name) + [arguments & 7 | (isSerialized ? 8 : 0)] + joined(body))
    }

    /// A window onto I/O ports: `OperationRegion (name, SystemIO, start, length)`.
    static func portRegion(_ name: String, start: UInt64, length: UInt64) -> AML {
        AML([0x5b, 0x80] + self.name(name) + [0x01] + integer(start).bytes + integer(length).bytes)
    }

    /// `Field (region, ByteAcc, NoLock, WriteAsZeros) { … }` of named runs of bits, from bit 0 on.
    static func byteField(of region: String, _ fields: [(name: String, bits: UInt32)]) -> AML {
        let units = fields.flatMap { name($0.name) + packageLength($0.bits) }
        return package([0x5b, 0x81], name(region) + [0x41] + units)
    }

    // MARK: Data (§20.2.3)

    /// An integer in its shortest encoding.
    static func integer(_ value: UInt64) -> AML {
        var bytes: [UInt8]
        switch value {
        case 0: bytes = [0x00]
        case 1: bytes = [0x01]
        case ...0xff: bytes = [0x0a, UInt8(value)]
        case ...0xffff:
            bytes = [0x0b]
            bytes.append(littleEndian: UInt16(value))
        case ...0xffff_ffff:
            bytes = [0x0c]
            bytes.append(littleEndian: UInt32(value))
        default:
            bytes = [0x0e]
            bytes.append(littleEndian: value)
        }
        return AML(bytes)
    }

    /// A string of ASCII characters.
    static func string(_ text: String) -> AML { AML([0x0d] + text.utf8 + [0]) }

    /// A PNP identifier such as `PNP0501` in its compressed form (§19.3.4): three letters and four hexadecimal digits.
    static func eisaID(_ id: String) -> AML {
        let characters = Array(id.utf8)
        let letters = characters.prefix(3).reduce(UInt32(0)) { $0 << 5 | (UInt32($1) - 0x40) & 0x1f }
        let number = UInt32(id.dropFirst(3), radix: 16) ?? 0
        // Unlike all other integers this one is stored with the most significant byte first.
        return integer(UInt64((letters << 16 | number & 0xffff).byteSwapped))
    }

    /// `ToUUID (text)`: a buffer, in which the first three fields have their least significant byte first.
    static func uuid(_ text: String) -> AML {
        let digits = text.utf8.filter { $0 != UInt8(ascii: "-") }.map { UInt8($0) }
        let bytes = stride(from: 0, to: digits.count, by: 2).map { index in
            UInt8(String(decoding: digits[index..<index + 2], as: UTF8.self), radix: 16) ?? 0
        }
        let ordered = Array(bytes[0..<4].reversed() + bytes[4..<6].reversed() + bytes[6..<8].reversed() + bytes[8...])
        return package([0x11], integer(UInt64(ordered.count)).bytes + ordered)
    }

    static func package(_ elements: [AML]) -> AML { package([0x12], [UInt8(elements.count)] + joined(elements)) }

    /// The buffer of a resource template, closed by its end tag (§6.4).
    static func resources(_ descriptors: [Resource]) -> AML {
        // The end tag's second byte is a checksum; 0 means that there is none.
        let content = descriptors.flatMap(\.bytes) + [0x79, 0x00]
        return package([0x11], integer(UInt64(content.count)).bytes + content)
    }

    // MARK: Statements and expressions (§20.2.5.3, §20.2.5.4)

    static func local(_ index: UInt8) -> AML { AML([0x60 + index & 7]) }

    static func argument(_ index: UInt8) -> AML { AML([0x68 + index & 7]) }

    /// What a named object holds.
    static func reference(_ path: String) -> AML { AML(name(path)) }

    /// `target = source`.
    static func store(_ source: AML, in target: AML) -> AML { AML([0x70] + source.bytes + target.bytes) }

    /// `left & right`, for use as a value.
    static func and(_ left: AML, _ right: AML) -> AML { AML([0x7b] + left.bytes + right.bytes + [0x00]) }

    /// `target = left & right`.
    static func and(_ left: AML, _ right: AML, in target: AML) -> AML {
        AML([0x7b] + left.bytes + right.bytes + target.bytes)
    }

    /// `target = left | right`.
    static func or(_ left: AML, _ right: AML, in target: AML) -> AML {
        AML([0x7d] + left.bytes + right.bytes + target.bytes)
    }

    /// `left == right`, of integers, strings or buffers.
    static func equal(_ left: AML, _ right: AML) -> AML { AML([0x93] + left.bytes + right.bytes) }

    static func not(_ condition: AML) -> AML { AML([0x92] + condition.bytes) }

    /// `Return (value)`.
    static func giveBack(_ value: AML) -> AML { AML([0xa4] + value.bytes) }

    /// `CreateDWordField (buffer, offset, name)`.
    static func doubleWordField(_ name: String, of buffer: AML, at offset: UInt64) -> AML {
        AML([0x8a] + buffer.bytes + integer(offset).bytes + self.name(name))
    }

    static func when(_ condition: AML, _ body: [AML]) -> AML { package([0xa0], condition.bytes + joined(body)) }

    static func notify(_ object: String, _ value: UInt64) -> AML { AML([0x86] + name(object) + integer(value).bytes) }

    // MARK: Encoding

    /// A name or path (§20.2.2): `\` for the root, segments of up to four characters with dots between them.
    static func name(_ path: String) -> [UInt8] {
        let isAbsolute = path.hasPrefix("\\")
        let segments = path.drop { $0 == "\\" }.split(separator: ".").map { segment in
            Array(segment.utf8.prefix(4)) + Array(repeating: UInt8(ascii: "_"), count: max(0, 4 - segment.utf8.count))
        }
        let prefix: [UInt8] =
            switch segments.count {
            case 0: [0x00]
            case 1: []
            case 2: [0x2e]
            default: [0x2f, UInt8(segments.count)]
            }
        return (isAbsolute ? [0x5c] : []) + prefix + segments.flatMap { $0 }
    }

    private static func joined(_ terms: [AML]) -> [UInt8] { terms.flatMap(\.bytes) }

    /// An opcode, the length of what follows and what follows.
    private static func package(_ opcode: [UInt8], _ content: [UInt8]) -> AML {
        // The length counts its own bytes: one of them holds up to 63, each further one adds 8 bits to 4 of the first.
        let limits = [0x3f, 0xfff, 0xf_ffff]
        let own = (1...3).first { content.count + $0 <= limits[$0 - 1] } ?? 4
        return AML(opcode + packageLength(UInt32(content.count + own), bytes: own) + content)
    }

    private static func packageLength(_ length: UInt32) -> [UInt8] {
        packageLength(length, bytes: length < 0x40 ? 1 : length < 0x1000 ? 2 : length < 0x10_0000 ? 3 : 4)
    }

    /// §20.2.4
    private static func packageLength(_ length: UInt32, bytes count: Int) -> [UInt8] {
        if count == 1 { return [UInt8(length & 0x3f)] }
        var bytes = [UInt8(count - 1) << 6 | UInt8(length & 0xf)]
        for index in 0..<count - 1 { bytes.append(UInt8(truncatingIfNeeded: length >> UInt32(4 + 8 * index))) }
        return bytes
    }
}

/// One descriptor of a resource template (ACPI 6.5 §6.4).
struct Resource: Sendable, Equatable {
    let bytes: [UInt8]

    /// A fixed range of ports, 16 bits decoded.
    static func ports(_ start: UInt16, count: UInt8) -> Resource {
        var bytes: [UInt8] = [0x47, 0x01]
        bytes.append(littleEndian: start)
        bytes.append(littleEndian: start)
        return Resource(bytes: bytes + [1, count])
    }

    /// A fixed range of memory below 4 GiB, writable.
    static func memory(_ start: UInt32, size: UInt32) -> Resource {
        var bytes: [UInt8] = [0x86, 0x09, 0x00, 0x01]
        bytes.append(littleEndian: start)
        bytes.append(littleEndian: size)
        return Resource(bytes: bytes)
    }

    /// The buses behind a bridge, which produces them (§6.4.3.5.3).
    static func buses(_ range: ClosedRange<UInt8>) -> Resource {
        addressSpace(
            0x88, type: 2, specific: 0, [0, UInt16(range.lowerBound), UInt16(range.upperBound), 0, UInt16(range.count)])
    }

    /// Memory below 4 GiB that a bridge produces, writable (§6.4.3.5.2).
    static func memoryWindow32(_ range: Range<UInt64>) -> Resource {
        addressSpace(
            0x87, type: 0, specific: 1,
            [0, range.lowerBound, range.upperBound - 1, 0, range.upperBound - range.lowerBound]
                .map { UInt32(truncatingIfNeeded: $0) })
    }

    /// The same at any address (§6.4.3.5.1).
    static func memoryWindow64(_ range: Range<UInt64>) -> Resource {
        addressSpace(
            0x8a, type: 0, specific: 1,
            [0, range.lowerBound, range.upperBound - 1, 0, range.upperBound - range.lowerBound])
    }

    /// - Parameter fields: granularity, minimum, maximum, translation and length.
    private static func addressSpace<Field: FixedWidthInteger>(
        _ tag: UInt8, type: UInt8, specific: UInt8, _ fields: [Field]
    ) -> Resource {
        let content = fields.flatMap { field in
            (0..<Field.bitWidth / 8).map { UInt8(truncatingIfNeeded: field >> Field(8 * $0)) }
        }
        // Both ends are fixed; decoded by addition, produced.
        return Resource(bytes: [tag, UInt8(3 + content.count), 0, type, 0x0c, specific] + content)
    }

    /// An interrupt line, edge-triggered, active high, not shared.
    static func interrupt(_ gsi: UInt32) -> Resource {
        // Flags: consumer, edge.
        var bytes: [UInt8] = [0x89, 0x06, 0x00, 0x03, 0x01]
        bytes.append(littleEndian: gsi)
        return Resource(bytes: bytes)
    }
}

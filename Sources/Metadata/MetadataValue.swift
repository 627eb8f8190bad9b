// SPDX-License-Identifier: Apache-2.0

/// A JSON value of the metadata (RFC 8259).
public indirect enum MetadataValue: Equatable, Sendable {
    case null
    case bool(Bool)
    /// As it was written.
    case number(String)
    case string(String)
    case array([MetadataValue])
    case object([String: MetadataValue])

    /// Merges a patch into the value: an object's members replace those of the same name, null removes one, and
    /// anything else replaces the value as a whole (RFC 7396).
    public mutating func merge(_ patch: MetadataValue) {
        guard case .object(let changes) = patch else {
            self = patch
            return
        }
        var members: [String: MetadataValue] = [:]
        if case .object(let present) = self { members = present }
        for (name, change) in changes {
            guard change != .null else {
                members[name] = nil
                continue
            }
            var member = members[name] ?? .null
            member.merge(change)
            members[name] = member
        }
        self = .object(members)
    }

    /// The value that a path leads to, whose parts are names of members, or indices of arrays in decimal; in a name
    /// `~1` stands for a slash and `~0` for a tilde (RFC 6901). A slash at the end is of no account; nil where there is
    /// nothing.
    func value(at path: String) -> MetadataValue? {
        var current = self
        for part in path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: true) {
            switch current {
            case .object(let members):
                guard let next = members[Self.name(part)] else { return nil }
                current = next
            case .array(let values):
                guard part.count <= 9, part.first != UInt8(ascii: "0") || part.count == 1,
                    let index = Int(String(decoding: part, as: UTF8.self)), part.first != UInt8(ascii: "+"),
                    values.indices.contains(index)
                else { return nil }
                current = values[index]
            default: return nil
            }
        }
        return current
    }

    private static func name(_ part: Substring.UTF8View) -> String {
        var bytes: [UInt8] = [], isEscaped = false
        for byte in part {
            if isEscaped, byte == UInt8(ascii: "1") {
                bytes.append(UInt8(ascii: "/"))
            } else if isEscaped, byte == UInt8(ascii: "0") {
                bytes.append(UInt8(ascii: "~"))
            } else {
                if isEscaped { bytes.append(UInt8(ascii: "~")) }
                if byte != UInt8(ascii: "~") { bytes.append(byte) }
            }
            isEscaped = byte == UInt8(ascii: "~")
        }
        if isEscaped { bytes.append(UInt8(ascii: "~")) }
        return String(decoding: bytes, as: UTF8.self)
    }

    /// The text that the instance metadata services of clouds answer with: a string as it is, and the names of an
    /// object's members, one in a line, with a slash behind those that are objects; nil for other values.
    var text: String? {
        switch self {
        case .string(let text): text
        case .object(let members):
            Self.sorted(members).map { name, value in
                if case .object = value { name + "/" } else { name }
            }.joined(separator: "\n")
        default: nil
        }
    }

    /// The shortest JSON text; members in the order of their names' bytes.
    public var json: [UInt8] {
        var bytes: [UInt8] = []
        write(to: &bytes)
        return bytes
    }

    private func write(to bytes: inout [UInt8]) {
        switch self {
        case .null: bytes += "null".utf8
        case .bool(let value): bytes += value ? "true".utf8 : "false".utf8
        case .number(let text): bytes += text.utf8
        case .string(let text): Self.write(text, to: &bytes)
        case .array(let values):
            bytes.append(UInt8(ascii: "["))
            for (index, value) in values.enumerated() {
                if index > 0 { bytes.append(UInt8(ascii: ",")) }
                value.write(to: &bytes)
            }
            bytes.append(UInt8(ascii: "]"))
        case .object(let members):
            bytes.append(UInt8(ascii: "{"))
            for (index, member) in Self.sorted(members).enumerated() {
                if index > 0 { bytes.append(UInt8(ascii: ",")) }
                Self.write(member.key, to: &bytes)
                bytes.append(UInt8(ascii: ":"))
                member.value.write(to: &bytes)
            }
            bytes.append(UInt8(ascii: "}"))
        }
    }

    private static func sorted(_ members: [String: MetadataValue]) -> [(key: String, value: MetadataValue)] {
        members.sorted { $0.key.utf8.lexicographicallyPrecedes($1.key.utf8) }
    }

    private static func write(_ text: String, to bytes: inout [UInt8]) {
        bytes.append(UInt8(ascii: "\""))
        for byte in text.utf8 {
            switch byte {
            case UInt8(ascii: "\""), UInt8(ascii: "\\"): bytes += [UInt8(ascii: "\\"), byte]
            case 8: bytes += "\\b".utf8
            case 9: bytes += "\\t".utf8
            case 10: bytes += "\\n".utf8
            case 12: bytes += "\\f".utf8
            case 13: bytes += "\\r".utf8
            case 0..<0x20:
                let digits = Array("0123456789abcdef".utf8)
                bytes += "\\u00".utf8
                bytes += [digits[Int(byte >> 4)], digits[Int(byte & 15)]]
            default: bytes.append(byte)
            }
        }
        bytes.append(UInt8(ascii: "\""))
    }
}

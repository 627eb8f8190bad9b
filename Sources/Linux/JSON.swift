// SPDX-License-Identifier: Apache-2.0

/// A JSON value: the order of an object's members is that in which they are given.
package enum JSON: Sendable, CustomStringConvertible, ExpressibleByStringLiteral, ExpressibleByBooleanLiteral {
    case string(String)
    case number(UInt64)
    case negative(Int64)
    /// Seconds, rates and the like, with three digits after the point.
    case decimal(Double)
    case bool(Bool)
    case null
    case array([JSON])
    /// A member whose value is nil is left out.
    case object([(String, JSON?)])

    package init(stringLiteral value: String) { self = .string(value) }
    package init(booleanLiteral value: Bool) { self = .bool(value) }

    /// Several lines, indented by four spaces, as qemu-img prints JSON.
    package var description: String { text(indent: "") }

    /// One line, as qemu-img prints it.
    package var line: String {
        switch self {
        case .string(let text): Self.quoted(text)
        case .number(let number): "\(number)"
        case .negative(let number): "\(number)"
        case .null: "null"
        case .decimal(let number): Self.decimal(number)
        case .bool(let value): "\(value)"
        case .array(let values): "[" + values.map(\.line).joined(separator: ", ") + "]"
        case .object(let members):
            "{ " + Self.present(members).map { "\(Self.quoted($0)): \($1.line)" }.joined(separator: ", ") + "}"
        }
    }

    /// One line without superfluous spaces, for logs and metrics.
    package var compact: String {
        switch self {
        case .array(let values): "[" + values.map(\.compact).joined(separator: ",") + "]"
        case .object(let members):
            "{" + Self.present(members).map { "\(Self.quoted($0)):\($1.compact)" }.joined(separator: ",") + "}"
        default: line
        }
    }

    private func text(indent: String) -> String {
        let inner = indent + "    "
        switch self {
        case .array(let values) where !values.isEmpty:
            return "[\n" + values.map { inner + $0.text(indent: inner) }.joined(separator: ",\n") + "\n\(indent)]"
        case .object(let members):
            let lines = Self.present(members).map { "\(inner)\(Self.quoted($0)): \($1.text(indent: inner))" }
            return lines.isEmpty ? "{\n\(indent)}" : "{\n" + lines.joined(separator: ",\n") + "\n\(indent)}"
        default:
            return line
        }
    }

    private static func present(_ members: [(String, JSON?)]) -> [(String, JSON)] {
        members.compactMap { name, value in value.map { (name, $0) } }
    }

    private static func decimal(_ number: Double) -> String {
        let thousandths = UInt64(max(0, min(number, 1e15)) * 1000 + 0.5)
        let rest = String(thousandths % 1000)
        return "\(thousandths / 1000).\(String(repeating: "0", count: 3 - rest.count))\(rest)"
    }

    /// RFC 8259 §7.
    private static func quoted(_ text: String) -> String {
        var quoted = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": quoted += "\\\""
            case "\\": quoted += "\\\\"
            case "\n": quoted += "\\n"
            case "\t": quoted += "\\t"
            case "\r": quoted += "\\r"
            case _ where scalar.value < 0x20 || scalar.value == 0x7f:
                let digits = String(scalar.value, radix: 16)
                quoted += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            // As Python's `surrogateescape` has a byte that is no UTF-8, so that scripts get the name as it is.
            case _ where scalar.rawByte != nil: quoted += "\\udc" + String(scalar.rawByte ?? 0, radix: 16)
            default: quoted.unicodeScalars.append(scalar)
            }
        }
        return quoted + "\""
    }
}

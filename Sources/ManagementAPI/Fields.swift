// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Why a request is refused: the text of its answer's `fault_message`.
package struct Fault: Error, Equatable {
    package let message: String

    package init(_ message: String) { self.message = message }

    /// A body that is no JSON, or not of the shape that the request needs.
    static func body(_ reason: String) -> Fault {
        Fault("An error occurred when deserializing the json body of a request: \(reason).")
    }
}

/// The members of a JSON object, each of which may be taken as a value of one type.
struct Fields {
    private let members: [String: JSON]

    /// - Parameters:
    ///   - name: of the structure, for messages.
    ///   - expected: the names that there may be.
    init(_ value: JSON, of name: String, _ expected: [String]) throws(Fault) {
        guard case .object(let pairs) = value else {
            throw .body("invalid type: \(value.kind), expected struct \(name)")
        }
        var members: [String: JSON] = [:]
        for (key, value) in pairs {
            guard expected.contains(key) else {
                let names = expected.map { "`\($0)`" }.joined(separator: ", ")
                throw .body(
                    "unknown field `\(key)`, expected " + (expected.count > 1 ? "one of \(names)" : names))
            }
            members[key] = value
        }
        self.members = members
    }

    /// A member that is there and not null.
    func value(_ name: String) -> JSON? {
        guard let value = members[name] else { return nil }
        if case .null = value { return nil }
        return value
    }

    private func required<Value>(_ name: String, _ value: Value?) throws(Fault) -> Value {
        if let value { return value }
        if members[name] != nil { throw .body("invalid type: null for `\(name)`") }
        throw .body("missing field `\(name)`")
    }

    func text(_ name: String) throws(Fault) -> String? {
        guard let value = value(name) else { return nil }
        guard case .string(let text) = value else { throw .body("invalid type: \(value.kind), expected a string") }
        return text
    }

    func requiredText(_ name: String) throws(Fault) -> String { try required(name, text(name)) }

    func number(_ name: String, maximum: UInt64 = .max) throws(Fault) -> UInt64? {
        guard let value = value(name) else { return nil }
        let width = maximum == .max ? "u64" : maximum == UInt64(UInt32.max) ? "u32" : maximum == 65_535 ? "u16" : "u8"
        if case .negative(let number) = value {
            throw .body("invalid value: integer `\(number)`, expected \(width)")
        }
        guard case .number(let number) = value else { throw .body("invalid type: \(value.kind), expected \(width)") }
        guard number <= maximum else { throw .body("invalid value: integer `\(number)`, expected \(width)") }
        return number
    }

    func requiredNumber(_ name: String, maximum: UInt64 = .max) throws(Fault) -> UInt64 {
        try required(name, number(name, maximum: maximum))
    }

    /// - Parameter isNullRefused: the member may be left out, but not be null.
    func flag(_ name: String, isNullRefused: Bool = false) throws(Fault) -> Bool? {
        guard let value = isNullRefused ? members[name] : value(name) else { return nil }
        guard case .bool(let flag) = value else { throw .body("invalid type: \(value.kind), expected a boolean") }
        return flag
    }

    func requiredFlag(_ name: String) throws(Fault) -> Bool { try required(name, flag(name)) }

    /// One of a type's words.
    func word<Word: RawRepresentable<String> & CaseIterable>(
        _ name: String, _ type: Word.Type, isNullRefused: Bool = false
    ) throws(Fault) -> Word? {
        guard let value = isNullRefused ? members[name] : value(name) else { return nil }
        guard case .string(let text) = value else { throw .body("invalid type: \(value.kind), expected a string") }
        guard let word = Word(rawValue: text) else {
            let words = Word.allCases.map { "`\($0.rawValue)`" }
            let list = words.count == 2 ? words.joined(separator: " or ") : "one of " + words.joined(separator: ", ")
            throw .body("unknown variant `\(text)`, expected \(list)")
        }
        return word
    }

    func requiredWord<Word: RawRepresentable<String> & CaseIterable>(
        _ name: String, _ type: Word.Type
    ) throws(Fault) -> Word { try required(name, word(name, type)) }
}

extension JSON {
    /// What it is, for a message about a value of the wrong type.
    var kind: String {
        switch self {
        case .string(let text): "string \"\(text)\""
        case .number(let number): "integer `\(number)`"
        case .negative(let number): "integer `\(number)`"
        case .decimal: "floating point number"
        case .bool(let value): "boolean `\(value)`"
        case .null: "null"
        case .array: "sequence"
        case .object: "map"
        }
    }
}

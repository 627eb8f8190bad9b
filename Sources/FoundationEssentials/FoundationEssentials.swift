// SPDX-License-Identifier: Apache-2.0
// What swift-argument-parser uses of the toolchain's FoundationEssentials, for the release binary.
//
// The parser imports that module for a protocol of errors, and for the JSON that describes all commands (the manual
// pages are made from it). The toolchain's own brings 5 MB of code and tables, which the runtime also searches for
// conformances when a machine starts. `make release` compiles this file as a module of the same name, which the
// compiler finds first; other builds use the toolchain's.

/// An error that has a description for users.
public protocol LocalizedError: Error {
    var errorDescription: String? { get }
}

extension LocalizedError {
    public var errorDescription: String? { nil }
}

/// Bytes of a text.
public struct Data {
    let bytes: [UInt8]
}

extension String {
    public struct Encoding: Sendable {
        public static let utf8 = Encoding()
    }

    public init?(data: Data, encoding: Encoding) {
        self.init(validating: data.bytes, as: UTF8.self)
    }
}

/// Encodes a value as JSON.
public final class JSONEncoder {
    public struct OutputFormatting: OptionSet, Sendable {
        public let rawValue: UInt
        public init(rawValue: UInt) { self.rawValue = rawValue }
        /// Each member of an object or array has a line of its own.
        public static let prettyPrinted = OutputFormatting(rawValue: 1)
        /// Without it too, members of objects are in the order of their names.
        public static let sortedKeys = OutputFormatting(rawValue: 2)
    }

    public var outputFormatting: OutputFormatting = []

    public init() {}

    public func encode<T: Encodable>(_ value: T) throws -> Data {
        let root = Node()
        try Target(node: root, codingPath: []).encode(value)
        var text = ""
        root.write(to: &text, indentation: outputFormatting.contains(.prettyPrinted) ? 0 : nil)
        return Data(bytes: Array(text.utf8))
    }
}

/// A value of the document, which its container fills.
private final class Node {
    enum Value {
        /// As it is written.
        case scalar(String)
        case array([Node])
        case object([String: Node])
    }

    /// nil if the encoded value wrote nothing: an empty object.
    var value: Value?

    func member(_ name: String) -> Node {
        let node = Node()
        guard case .object(var members)? = value else {
            value = .object([name: node])
            return node
        }
        // The only reference to the members, so that adding one copies none.
        value = nil
        members[name] = node
        value = .object(members)
        return node
    }

    func element() -> Node {
        let node = Node()
        guard case .array(var elements)? = value else {
            value = .array([node])
            return node
        }
        value = nil
        elements.append(node)
        value = .array(elements)
        return node
    }

    var count: Int { if case .array(let elements)? = value { elements.count } else { 0 } }

    /// - Parameter indentation: of the line in which the value begins; nil for no lines of its own.
    func write(to text: inout String, indentation: Int?) {
        switch value {
        case .scalar(let scalar)?: text += scalar
        case .array(let elements)?:
            Self.write(elements, between: "[", "]", to: &text, indentation) { $1.write(to: &$0, indentation: $2) }
        case .object(let members)?:
            Self.write(members.sorted { $0.key < $1.key }, between: "{", "}", to: &text, indentation) {
                $0 += Self.quoted($1.key) + (indentation == nil ? ":" : " : ")
                $1.value.write(to: &$0, indentation: $2)
            }
        case nil: text += "{}"
        }
    }

    private static func write<Members: Collection>(
        _ members: Members, between open: String, _ close: String, to text: inout String, _ indentation: Int?,
        _ write: (inout String, Members.Element, Int?) -> Void
    ) {
        text += open
        var separator = ""
        let inner = indentation.map { $0 + 2 }
        for member in members {
            text += separator
            separator = ","
            newLine(&text, inner)
            write(&text, member, inner)
        }
        if !members.isEmpty { newLine(&text, indentation) }
        text += close
    }

    private static func newLine(_ text: inout String, _ indentation: Int?) {
        guard let indentation else { return }
        text += "\n" + String(repeating: " ", count: indentation)
    }

    static func quoted(_ string: String) -> String {
        var text = "\""
        for scalar in string.unicodeScalars {
            switch scalar {
            case "\"": text += "\\\""
            case "\\": text += "\\\\"
            case "\n": text += "\\n"
            case "\t": text += "\\t"
            case "\r": text += "\\r"
            case _ where scalar.value < 0x20:
                let digits = String(scalar.value, radix: 16)
                text += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: text.unicodeScalars.append(scalar)
            }
        }
        return text + "\""
    }
}

/// Writes one value into its node: an encoder, and a container of a single value.
private struct Target: Encoder, SingleValueEncodingContainer {
    let node: Node
    let codingPath: [any CodingKey]
    var userInfo: [CodingUserInfoKey: Any] { [:] }

    func container<Key: CodingKey>(keyedBy type: Key.Type) -> KeyedEncodingContainer<Key> {
        if node.value == nil { node.value = .object([:]) }
        return KeyedEncodingContainer(Members(node: node, codingPath: codingPath))
    }

    func unkeyedContainer() -> any UnkeyedEncodingContainer {
        if node.value == nil { node.value = .array([]) }
        return Elements(node: node, codingPath: codingPath)
    }

    func singleValueContainer() -> any SingleValueEncodingContainer { self }

    private func write(_ scalar: String) { node.value = .scalar(scalar) }

    private func write(_ number: Double, of value: Any) throws {
        guard number.isFinite else {
            throw EncodingError.invalidValue(
                value, EncodingError.Context(codingPath: codingPath, debugDescription: "JSON has no such number"))
        }
        write("\(value)")
    }

    func encodeNil() { write("null") }
    func encode(_ value: Bool) { write("\(value)") }
    func encode(_ value: String) { write(Node.quoted(value)) }
    func encode(_ value: Double) throws { try write(value, of: value) }
    func encode(_ value: Float) throws { try write(Double(value), of: value) }
    func encode(_ value: Int) { write("\(value)") }
    func encode(_ value: Int8) { write("\(value)") }
    func encode(_ value: Int16) { write("\(value)") }
    func encode(_ value: Int32) { write("\(value)") }
    func encode(_ value: Int64) { write("\(value)") }
    func encode(_ value: UInt) { write("\(value)") }
    func encode(_ value: UInt8) { write("\(value)") }
    func encode(_ value: UInt16) { write("\(value)") }
    func encode(_ value: UInt32) { write("\(value)") }
    func encode(_ value: UInt64) { write("\(value)") }
    func encode<T: Encodable>(_ value: T) throws { try value.encode(to: self) }
}

/// The members of an object.
private struct Members<Key: CodingKey>: KeyedEncodingContainerProtocol {
    let node: Node
    let codingPath: [any CodingKey]

    private func target(_ key: any CodingKey) -> Target {
        Target(node: node.member(key.stringValue), codingPath: codingPath + [key])
    }

    func encodeNil(forKey key: Key) { target(key).encodeNil() }
    func encode(_ value: Bool, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: String, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: Double, forKey key: Key) throws { try target(key).encode(value) }
    func encode(_ value: Float, forKey key: Key) throws { try target(key).encode(value) }
    func encode(_ value: Int, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: Int8, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: Int16, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: Int32, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: Int64, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: UInt, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: UInt8, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: UInt16, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: UInt32, forKey key: Key) { target(key).encode(value) }
    func encode(_ value: UInt64, forKey key: Key) { target(key).encode(value) }
    func encode<T: Encodable>(_ value: T, forKey key: Key) throws { try target(key).encode(value) }

    func nestedContainer<Nested: CodingKey>(
        keyedBy type: Nested.Type, forKey key: Key
    ) -> KeyedEncodingContainer<Nested> { target(key).container(keyedBy: type) }

    func nestedUnkeyedContainer(forKey key: Key) -> any UnkeyedEncodingContainer { target(key).unkeyedContainer() }
    func superEncoder() -> any Encoder { Target(node: node.member("super"), codingPath: codingPath) }
    func superEncoder(forKey key: Key) -> any Encoder { target(key) }
}

/// The elements of an array.
private struct Elements: UnkeyedEncodingContainer {
    let node: Node
    let codingPath: [any CodingKey]
    var count: Int { node.count }

    private func target() -> Target { Target(node: node.element(), codingPath: codingPath) }

    func encodeNil() { target().encodeNil() }
    func encode(_ value: Bool) { target().encode(value) }
    func encode(_ value: String) { target().encode(value) }
    func encode(_ value: Double) throws { try target().encode(value) }
    func encode(_ value: Float) throws { try target().encode(value) }
    func encode(_ value: Int) { target().encode(value) }
    func encode(_ value: Int8) { target().encode(value) }
    func encode(_ value: Int16) { target().encode(value) }
    func encode(_ value: Int32) { target().encode(value) }
    func encode(_ value: Int64) { target().encode(value) }
    func encode(_ value: UInt) { target().encode(value) }
    func encode(_ value: UInt8) { target().encode(value) }
    func encode(_ value: UInt16) { target().encode(value) }
    func encode(_ value: UInt32) { target().encode(value) }
    func encode(_ value: UInt64) { target().encode(value) }
    func encode<T: Encodable>(_ value: T) throws { try target().encode(value) }

    func nestedContainer<Nested: CodingKey>(keyedBy type: Nested.Type) -> KeyedEncodingContainer<Nested> {
        target().container(keyedBy: type)
    }

    func nestedUnkeyedContainer() -> any UnkeyedEncodingContainer { target().unkeyedContainer() }
    func superEncoder() -> any Encoder { target() }
}

// SPDX-License-Identifier: Apache-2.0

/// An element of an XML document. Who reads a document marks what was used of it, so that the rest can be named.
public final class Element {
    struct Attribute {
        let name: String
        let value: String
        var isUsed = false
    }

    /// Without prefix.
    public let name: String
    /// What the document calls the namespace; empty without one.
    let prefix: String
    /// The namespace's URI; empty without one.
    let namespace: String
    private(set) var attributes: [Attribute]
    private(set) var children: [Element] = []
    /// All text directly in the element.
    private(set) var text: String
    /// The element that this one is in, which owns it.
    private(set) weak var parent: Element?
    /// The position among the parent's children of this name, from 1.
    private var number = 1
    /// How many children of a name there are.
    private var counts: [String: Int] = [:]
    var isUsed = false

    init(
        _ name: String, _ attributes: [(String, String?)], text: String = "", prefix: String = "",
        namespace: String = "", _ children: [Element] = []
    ) {
        (self.name, self.prefix, self.namespace, self.text) = (name, prefix, namespace, text)
        self.attributes = attributes.compactMap { name, value in value.map { Attribute(name: name, value: $0) } }
        for child in children { add(child) }
    }

    convenience init(_ name: String, _ children: [Element]) { self.init(name, [], children) }

    convenience init(_ name: String, text: String = "") { self.init(name, [], text: text) }

    func add(_ child: Element) {
        child.parent = self
        child.number = counts[child.qualifiedName, default: 0] + 1
        counts[child.qualifiedName] = child.number
        children.append(child)
    }

    func add(text more: String) { text += more }

    /// The name as the document has it.
    var qualifiedName: String { prefix.isEmpty ? name : prefix + ":" + name }

    // MARK: Reading

    /// The children of a name that have no namespace, marked as used.
    func all(_ name: String) -> [Element] {
        let found = children.filter { $0.name == name && $0.namespace.isEmpty }
        for element in found { element.isUsed = true }
        return found
    }

    /// The first child of a name, marked as used; further ones are not.
    func first(_ name: String) -> Element? {
        let found = children.first { $0.name == name && $0.namespace.isEmpty }
        found?.isUsed = true
        return found
    }

    /// An attribute's value, marked as used.
    func take(_ name: String) -> String? {
        guard let index = attributes.firstIndex(where: { $0.name == name }) else { return nil }
        attributes[index].isUsed = true
        return attributes[index].value
    }

    /// Marks an attribute as used if it has one of these values, with which a machine here is the same.
    func take(_ name: String, _ values: String...) {
        guard let index = attributes.firstIndex(where: { $0.name == name }) else { return }
        if values.contains(attributes[index].value) { attributes[index].isUsed = true }
    }

    /// The value of an attribute as it is, used or not.
    func value(_ name: String) -> String? { attributes.first { $0.name == name }?.value }

    /// Takes an attribute's use back: its value is of no use here.
    func leave(_ name: String) {
        guard let index = attributes.firstIndex(where: { $0.name == name }) else { return }
        attributes[index].isUsed = false
    }

    /// The text without blanks around it.
    var word: String {
        let isBlank: (UnicodeScalar) -> Bool = { " \t\r\n".unicodeScalars.contains($0) }
        let rest = text.unicodeScalars.drop(while: isBlank)
        guard let last = rest.lastIndex(where: { !isBlank($0) }) else { return "" }
        return String(Substring(rest[...last]))
    }

    /// Names from the root's child down, such as `devices/disk[2]/driver`.
    public var path: String {
        var names: [String] = []
        var element: Element? = self
        while let current = element, let parent = current.parent {
            let name = current.qualifiedName
            names.append(parent.counts[name] ?? 1 > 1 ? "\(name)[\(current.number)]" : name)
            element = parent
        }
        return names.reversed().joined(separator: "/")
    }

    // MARK: Writing

    /// The element as text, with two spaces for each level.
    /// - Throws: `unwritable` for characters that XML does not have.
    public func xml() throws(DomainError) -> String {
        var lines: [String] = []
        try write("", &lines)
        return lines.joined(separator: "\n") + "\n"
    }

    private func write(_ indentation: String, _ lines: inout [String]) throws(DomainError) {
        var head = indentation + "<" + qualifiedName
        for attribute in attributes { head += " \(attribute.name)='\(try Self.escaped(attribute.value))'" }
        guard !children.isEmpty else {
            lines.append(
                text.isEmpty ? head + "/>" : head + ">" + (try Self.escaped(text)) + "</\(qualifiedName)>")
            return
        }
        lines.append(head + ">")
        for child in children { try child.write(indentation + "  ", &lines) }
        lines.append(indentation + "</\(qualifiedName)>")
    }

    private static func escaped(_ text: String) throws(DomainError) -> String {
        var escaped = String.UnicodeScalarView()
        for scalar in text.unicodeScalars {
            switch scalar {
            case "&": escaped.append(contentsOf: "&amp;".unicodeScalars)
            case "<": escaped.append(contentsOf: "&lt;".unicodeScalars)
            case ">": escaped.append(contentsOf: "&gt;".unicodeScalars)
            case "'": escaped.append(contentsOf: "&apos;".unicodeScalars)
            // A reader would make blanks of them.
            case "\t", "\n", "\r": escaped.append(contentsOf: "&#\(scalar.value);".unicodeScalars)
            // XML 1.0, section 2.2.
            case _ where scalar.value < 0x20 || scalar.value == 0xfffe || scalar.value == 0xffff:
                throw .unwritable(text)
            default: escaped.append(scalar)
            }
        }
        return String(escaped)
    }
}

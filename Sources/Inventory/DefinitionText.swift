// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// A definition's file: a part of TOML 1.0, with one key for each option.
///
///     cpus = 2
///     mem = "2G"
///     prealloc = true
///     disk = ["disk.qcow2,backing-dir=/srv/images", "data.raw"]
///
/// Values are strings of one line, basic or literal, decimal integers, `true`, and arrays of strings. Everything else
/// of TOML is refused with its line: tables, other kinds of values, keys with dots or quotes.
enum DefinitionText {
    /// Bytes; a longer file is no definition.
    static let limit = 1 << 20

    /// Writes a definition; an option that is there several times becomes an array.
    static func text(of definition: Definition) -> String {
        var lines = [
            "# A machine of swkvm. Each key is an option of `swkvm run`, without its hyphens (man swkvm-run).",
            "# Relative paths are relative to the machine's own directory.",
        ]
        var written: Set<String> = []
        for option in definition.options where written.insert(option.name).inserted {
            let all = definition.options.filter { $0.name == option.name }
            guard all.count == 1 else {
                let values = all.map { quoted($0.value ?? "") }
                lines.append("\(option.name) = [\(values.joined(separator: ", "))]")
                continue
            }
            lines.append("\(option.name) = \(option.value.map(value) ?? "true")")
        }
        return lines.joined(separator: "\n") + "\n"
    }

    private static func value(_ text: String) -> String {
        // As the reader has them: a number that TOML writes otherwise stays a string.
        text == "0" || text.utf8.first != UInt8(ascii: "0") && isNumber(text) ? text : quoted(text)
    }

    private static func isNumber(_ text: String) -> Bool {
        (1...18).contains(text.utf8.count) && text.utf8.allSatisfy { (0x30...0x39).contains($0) }
    }

    private static func quoted(_ text: String) -> String {
        var quoted = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": quoted += "\\\""
            case "\\": quoted += "\\\\"
            case "\n": quoted += "\\n"
            case "\t": quoted += "\\t"
            case _ where scalar.value < 0x20 || scalar.value == 0x7f:
                let digits = String(scalar.value, radix: 16)
                quoted += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: quoted.unicodeScalars.append(scalar)
            }
        }
        return quoted + "\""
    }

    /// Why a file is no definition.
    struct Problem: Error, Equatable {
        /// From 1.
        let line: Int
        let sentence: String
    }

    /// Reads a definition.
    static func parse(_ text: String) throws(Problem) -> Definition {
        var parser = Parser(text)
        return try parser.definition()
    }

    /// Reads from the front of the text.
    private struct Parser {
        private var rest: Substring.UnicodeScalarView
        private var line = 1

        init(_ text: String) { rest = text.unicodeScalars[...] }

        mutating func definition() throws(Problem) -> Definition {
            var definition = Definition()
            while true {
                skipLines()
                guard !rest.isEmpty else { return definition }
                let key = try key()
                guard !definition.has(key) else { throw problem("'\(key)' is there twice; use an array of its values") }
                skipBlanks()
                try take("=", "expected '=' after '\(key)'")
                skipBlanks()
                definition.options += try options(key)
                skipBlanks()
                skipComment()
                guard rest.isEmpty || isNewline else { throw problem("unexpected text after the value of '\(key)'") }
            }
        }

        private mutating func key() throws(Problem) -> String {
            if rest.first == "[" {
                throw problem("tables are not used here; each line is an option of `swkvm run`, such as mem = \"2G\"")
            }
            let name = prefix {
                $0.isASCII && ($0.properties.isAlphabetic || $0 == "-" || $0 == "_" || ("0"..."9") ~= $0)
            }
            guard !name.isEmpty else { throw problem("expected the name of an option of `swkvm run`, such as cpus") }
            return name
        }

        /// The value of a key: one option, or one for each element of an array.
        private mutating func options(_ key: String) throws(Problem) -> [Definition.Option] {
            switch rest.first {
            case "\"", "'": return [Definition.Option(key, try string())]
            case "[": return try array().map { Definition.Option(key, $0) }
            default: break
            }
            let word = prefix { !$0.properties.isWhitespace && $0 != "#" }
            switch word {
            case "true": return [Definition.Option(key)]
            // As if the line were not there.
            case "false": return []
            default:
                guard isNumber(word) else {
                    throw problem("the value of '\(key)' is no string in quotes, number, true, or array of strings")
                }
                return [Definition.Option(key, word)]
            }
        }

        private mutating func array() throws(Problem) -> [String] {
            rest.removeFirst()
            var values: [String] = []
            while true {
                skipLines()
                if rest.first == "]" {
                    rest.removeFirst()
                    return values
                }
                guard rest.first == "\"" || rest.first == "'" else {
                    throw problem("expected a string in quotes, or ']' at the end of the array")
                }
                values.append(try string())
                skipLines()
                if rest.first == "," {
                    rest.removeFirst()
                } else if rest.first != "]" {
                    throw problem("expected ',' or ']' after an element of the array")
                }
            }
        }

        private mutating func string() throws(Problem) -> String {
            let quote = rest.removeFirst()
            var text = String.UnicodeScalarView()
            while let scalar = rest.popFirst() {
                switch scalar {
                case quote:
                    // Two quotes and a third one begin a string of several lines.
                    if text.isEmpty, rest.first == quote { throw problem("strings of several lines are not used here") }
                    return String(text)
                case "\\" where quote == "\"": text.append(try escaped())
                case _ where scalar.value < 0x20 && scalar != "\t" || scalar.value == 0x7f:
                    throw problem(
                        scalar == "\n" ? "a string ends without its quote" : "a control character in a string")
                default: text.append(scalar)
                }
            }
            throw problem("a string ends without its quote")
        }

        private mutating func escaped() throws(Problem) -> UnicodeScalar {
            switch rest.popFirst() {
            case "\""?: return "\""
            case "\\"?: return "\\"
            case "n"?: return "\n"
            case "t"?: return "\t"
            case "r"?: return "\r"
            case "b"?: return "\u{8}"
            case "f"?: return "\u{c}"
            case "u"?: return try scalar(digits: 4)
            case "U"?: return try scalar(digits: 8)
            default: throw problem("an unknown escape in a string: a backslash is written twice, or in 'single quotes'")
            }
        }

        private mutating func scalar(digits: Int) throws(Problem) -> UnicodeScalar {
            let text = String(rest.prefix(digits))
            let isHexadecimal = text.utf8.allSatisfy {
                UInt8(ascii: "0")...UInt8(ascii: "9") ~= $0 || 0x61...0x66 ~= $0 | 0x20
            }
            guard text.utf8.count == digits, isHexadecimal, let value = UInt32(text, radix: 16), value != 0,
                let scalar = UnicodeScalar(value)
            else { throw problem("a Unicode escape needs \(digits) hexadecimal digits of a character") }
            rest.removeFirst(digits)
            return scalar
        }

        // MARK: Blanks

        private var isNewline: Bool { rest.first == "\n" || rest.first == "\r" && rest.dropFirst().first == "\n" }

        private mutating func skipBlanks() { while rest.first == " " || rest.first == "\t" { rest.removeFirst() } }

        private mutating func skipComment() {
            guard rest.first == "#" else { return }
            while !rest.isEmpty, !isNewline { rest.removeFirst() }
        }

        private mutating func skipLines() {
            while true {
                skipBlanks()
                skipComment()
                guard isNewline else { return }
                if rest.first == "\r" { rest.removeFirst() }
                rest.removeFirst()
                line += 1
            }
        }

        private mutating func prefix(_ isPart: (UnicodeScalar) -> Bool) -> String {
            let part = rest.prefix(while: isPart)
            rest = rest.dropFirst(part.count)
            return String(part)
        }

        private mutating func take(_ scalar: UnicodeScalar, _ sentence: String) throws(Problem) {
            guard rest.first == scalar else { throw problem(sentence) }
            rest.removeFirst()
        }

        private func problem(_ sentence: String) -> Problem { Problem(line: line, sentence: sentence) }
    }
}

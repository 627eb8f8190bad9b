// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@testable import Inventory

/// Definitions as files: what is written is TOML to others, and what others write is read as they mean it.
@Suite(.timed) struct DefinitionTextTests {
    private typealias Option = Definition.Option
    private let directory = TemporaryDirectory()

    /// What Python's reader of TOML finds in a text, as lines of key and value; nil if it refuses it.
    private func python(_ text: String) throws -> [String]? {
        try directory.write("file.toml", text)
        let result = run(
            """
            python3 -c 'import tomllib, sys
            for key, value in tomllib.load(open("\(directory.path)/file.toml", "rb")).items():
                for item in value if isinstance(value, list) else [value]: print(key, ascii(item))' 2>/dev/null
            """)
        return result.status == 0 ? result.output.split(separator: "\n").map(String.init) : nil
    }

    /// The same of a definition.
    private func lines(_ definition: Definition) -> [String] {
        definition.options.map { option in
            guard let value = option.value else { return "\(option.name) True" }
            let isNumber = !value.isEmpty && value.utf8.allSatisfy { (0x30...0x39).contains($0) }
            return "\(option.name) \(isNumber && (value == "0" || value.first != "0") ? value : ascii(value))"
        }
    }

    /// As Python's function of this name has it.
    private func ascii(_ text: String) -> String {
        let quote: Character = text.contains("'") && !text.contains("\"") ? "\"" : "'"
        return "\(quote)"
            + text.unicodeScalars.map { scalar in
                switch scalar {
                case "\\": return "\\\\"
                case "\n": return "\\n"
                case "\t": return "\\t"
                case "\r": return "\\r"
                case "'" where quote == "'": return "\\'"
                case _ where (0x20..<0x7f).contains(scalar.value): return String(scalar)
                default:
                    let digits = String(scalar.value, radix: 16)
                    let width = scalar.value < 0x100 ? 2 : scalar.value < 0x10000 ? 4 : 8
                    let letter = width == 2 ? "x" : width == 4 ? "u" : "U"
                    return "\\\(letter)" + String(repeating: "0", count: width - digits.count) + digits
                }
            }.joined() + "\(quote)"
    }

    /// Any values come back, and Python reads the same.
    @Test func valuesOfAllKindsComeBack() throws {
        var generator = SeededGenerator(seed: 7)
        let characters: [Character] = Array("ab\"'\\\n\t #=[],{}$0\u{1}\u{7f}\u{e9}\u{20ac}\u{1f600}-")
        for round in 0..<40 {
            var definition = Definition()
            for key in ["cpus", "mem", "disk", "ssh-key", "rng"] {
                for _ in 0..<Int.random(in: 0...3, using: &generator) {
                    let text = String(
                        (0..<Int.random(in: 0...8, using: &generator)).map { _ in
                            characters.randomElement(using: &generator)!
                        })
                    definition.options.append(Option(key, text))
                }
            }
            let text = DefinitionText.text(of: definition)
            #expect(try DefinitionText.parse(text) == definition, "\(text)")
            if round % 4 == 0 { #expect(try python(text) == lines(definition), "\(text)") }
        }
    }

    @Test func numbersAndFlags() throws {
        let definition = Definition([
            Option("cpus", "2"), Option("mem", "0"), Option("x", "007"), Option("y", "-1"), Option("prealloc"),
            Option("z", "12345678901234567890"),
        ])
        let text = DefinitionText.text(of: definition)
        let rest = text.split(separator: "\n").filter { $0.first != "#" }.map(String.init)
        #expect(
            rest == [
                "cpus = 2", "mem = 0", "x = \"007\"", "y = \"-1\"", "prealloc = true", "z = \"12345678901234567890\"",
            ])
        #expect(try DefinitionText.parse(text) == definition)
    }

    @Test func aNameThatIsNoUTF8() throws {
        let path = String(raw: [UInt8(ascii: "m"), 0xe9])
        let text = DefinitionText.text(of: Definition([Option("disk", path)]))
        #expect(try DefinitionText.parse(String(raw: text.rawBytes)).value(of: "disk") == path)
    }

    @Test func whatPeopleWrite() throws {
        let text = """
            # A comment
            cpus=2\t# and one behind a value\r
              mem   =   '2G'
            disk = [
              "a,,b.qcow2",   # the first
              'c:\\d',
            ]
            net = []
            cmdline = "say \\"hi\\" \\u00e9 \\\\ end"
            prealloc = true
            shared = false
            """
        let found = try DefinitionText.parse(text)
        #expect(
            found.options == [
                Option("cpus", "2"), Option("mem", "2G"), Option("disk", "a,,b.qcow2"), Option("disk", "c:\\d"),
                Option("cmdline", "say \"hi\" \u{e9} \\ end"), Option("prealloc"),
            ])
        #expect(try python(text)?.contains("shared False") == true)
        #expect(try DefinitionText.parse("") == Definition())
        #expect(try DefinitionText.parse("cpus = 1").words == ["--cpus=1"])
    }

    @Test(arguments: [
        ("[machine]", 1, "tables are not used"), ("a = 1\n[[x]]", 2, "tables are not used"),
        ("cpus = 2\ncpus = 3", 2, "'cpus' is there twice"), ("= 2", 1, "expected the name of an option"),
        ("\"cpus\" = 2", 1, "expected the name of an option"), ("a.b = 1", 1, "expected '='"),
        ("cpus 2", 1, "expected '='"), ("cpus =", 1, "no string in quotes"), ("cpus = two", 1, "no string in quotes"),
        ("cpus = 1.5", 1, "no string in quotes"), ("cpus = -1", 1, "no string in quotes"),
        ("cpus = 0x10", 1, "no string in quotes"), ("cpus = 2 3", 1, "unexpected text"),
        ("mem = \"2G", 1, "ends without its quote"), ("mem = \"2G\nx\"", 1, "ends without its quote"),
        ("mem = \"\"\"2G\"\"\"", 1, "several lines"), ("mem = '''2G'''", 1, "several lines"),
        ("mem = \"\\q\"", 1, "unknown escape"), ("mem = \"\\u12\"", 1, "4 hexadecimal digits"),
        ("mem = \"\\ud800\"", 1, "4 hexadecimal digits"), ("mem = \"\\u0000\"", 1, "4 hexadecimal digits"),
        ("mem = \"\u{1}\"", 1, "control character"), ("disk = [1]", 1, "expected a string"),
        ("disk = [\"a\" \"b\"]", 1, "expected ','"), ("disk = [\"a\",\n\n", 3, "expected a string"),
        ("x = { a = 1 }", 1, "no string in quotes"), ("x = 1979-05-27", 1, "no string in quotes"),
    ]) func whatIsRefused(text: String, line: Int, sentence: String) {
        do {
            let found = try DefinitionText.parse(text)
            Issue.record("\(found)")
        } catch {
            #expect(error.line == line)
            #expect(error.sentence.contains(sentence), "\(error.sentence)")
        }
    }

    /// Never a trap, whatever the bytes.
    @Test func anyBytes() {
        var generator = SeededGenerator(seed: 11)
        let pieces = ["cpus", " = ", "\"", "'", "[", "]", ",", "\\", "u", "0", "\n", "#", "\r", "true", "\u{e9}", "="]
        for _ in 0..<3000 {
            let text = (0..<Int.random(in: 0...12, using: &generator)).map { _ in
                pieces.randomElement(using: &generator)!
            }
            .joined()
            if let definition = try? DefinitionText.parse(text) {
                #expect((try? DefinitionText.parse(DefinitionText.text(of: definition))) != nil, "\(text)")
            }
        }
    }
}

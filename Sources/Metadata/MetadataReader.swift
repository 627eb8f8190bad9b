// SPDX-License-Identifier: Apache-2.0

extension MetadataValue {
    /// Arrays and objects within each other.
    public static let maximumDepth = 127

    /// Reads a JSON text in UTF-8 (RFC 8259). Of members with the same name the last one counts.
    /// - Throws: ``MetadataProblem/invalid(place:reason:)``.
    public init(parsing text: [UInt8]) throws(MetadataProblem) {
        var reader = Reader(text: text)
        self = try reader.value(depth: 0)
        reader.skipSpace()
        guard reader.place == text.count else { throw reader.problem("there is text behind the value") }
    }

    private struct Reader {
        let text: [UInt8]
        var place = 0

        func problem(_ reason: String) -> MetadataProblem { .invalid(place: place, reason: reason) }

        private var next: UInt8? { place < text.count ? text[place] : nil }

        mutating func skipSpace() {
            while let byte = next, [0x20, 0x09, 0x0a, 0x0d].contains(byte) { place += 1 }
        }

        private mutating func take(_ byte: Character) -> Bool {
            skipSpace()
            guard next == byte.asciiValue else { return false }
            place += 1
            return true
        }

        private mutating func takeWord(_ word: String) -> Bool {
            guard text[place...].starts(with: word.utf8) else { return false }
            place += word.utf8.count
            return true
        }

        mutating func value(depth: Int) throws(MetadataProblem) -> MetadataValue {
            skipSpace()
            switch next {
            case UInt8(ascii: "{"), UInt8(ascii: "["):
                guard depth < MetadataValue.maximumDepth else {
                    throw problem("more than \(MetadataValue.maximumDepth) arrays and objects are within each other")
                }
                return take("{") ? try object(depth + 1) : try array(depth + 1)
            case UInt8(ascii: "\""): return .string(try string())
            case UInt8(ascii: "t") where takeWord("true"): return .bool(true)
            case UInt8(ascii: "f") where takeWord("false"): return .bool(false)
            case UInt8(ascii: "n") where takeWord("null"): return .null
            default: return .number(try number())
            }
        }

        private mutating func object(_ depth: Int) throws(MetadataProblem) -> MetadataValue {
            var members: [String: MetadataValue] = [:]
            if take("}") { return .object(members) }
            repeat {
                skipSpace()
                let name = try string()
                guard take(":") else { throw problem("expected a colon") }
                members[name] = try value(depth: depth)
            } while take(",")
            guard take("}") else { throw problem("expected a comma or }") }
            return .object(members)
        }

        private mutating func array(_ depth: Int) throws(MetadataProblem) -> MetadataValue {
            _ = take("[")
            var values: [MetadataValue] = []
            if take("]") { return .array(values) }
            repeat { values.append(try value(depth: depth)) } while take(",")
            guard take("]") else { throw problem("expected a comma or ]") }
            return .array(values)
        }

        private mutating func number() throws(MetadataProblem) -> String {
            let start = place
            func isDigit(_ byte: UInt8?) -> Bool { byte.map { (0x30...0x39).contains($0) } ?? false }
            func digits() throws(MetadataProblem) {
                guard isDigit(next) else { throw problem("expected a value") }
                while isDigit(next) { place += 1 }
            }
            if next == UInt8(ascii: "-") { place += 1 }
            if next == UInt8(ascii: "0") { place += 1 } else { try digits() }
            if next == UInt8(ascii: ".") {
                place += 1
                try digits()
            }
            if next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
                place += 1
                if next == UInt8(ascii: "+") || next == UInt8(ascii: "-") { place += 1 }
                try digits()
            }
            return String(decoding: text[start..<place], as: UTF8.self)
        }

        private mutating func string() throws(MetadataProblem) -> String {
            guard next == UInt8(ascii: "\"") else { throw problem("expected a string") }
            place += 1
            var bytes: [UInt8] = []
            while let byte = next, byte != UInt8(ascii: "\"") {
                guard byte >= 0x20 else { throw problem("a control character is in a string") }
                place += 1
                if byte == UInt8(ascii: "\\") { try escape(into: &bytes) } else { bytes.append(byte) }
            }
            guard next != nil else { throw problem("a string has no end") }
            guard let string = String(validating: bytes, as: UTF8.self) else {
                throw problem("a string is not UTF-8")
            }
            place += 1
            return string
        }

        private mutating func escape(into bytes: inout [UInt8]) throws(MetadataProblem) {
            guard let byte = next else { throw problem("a string has no end") }
            place += 1
            switch byte {
            case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): bytes.append(byte)
            case UInt8(ascii: "b"): bytes.append(8)
            case UInt8(ascii: "f"): bytes.append(12)
            case UInt8(ascii: "n"): bytes.append(10)
            case UInt8(ascii: "r"): bytes.append(13)
            case UInt8(ascii: "t"): bytes.append(9)
            case UInt8(ascii: "u"):
                var code = try hexadecimal()
                if (0xd800..<0xdc00).contains(code), takeWord("\\u") {
                    let low = try hexadecimal()
                    guard (0xdc00..<0xe000).contains(low) else { throw problem("half of a surrogate pair") }
                    code = 0x1_0000 + (code - 0xd800) << 10 + (low - 0xdc00)
                }
                guard let scalar = Unicode.Scalar(code) else { throw problem("half of a surrogate pair") }
                bytes += String(Character(scalar)).utf8
            default: throw problem("unknown escape in a string")
            }
        }

        private mutating func hexadecimal() throws(MetadataProblem) -> UInt32 {
            var code: UInt32 = 0
            for _ in 0..<4 {
                guard let byte = next, let digit = Character(Unicode.Scalar(byte)).hexDigitValue, byte < 0x80 else {
                    throw problem("expected four hexadecimal digits")
                }
                code = code << 4 | UInt32(digit)
                place += 1
            }
            return code
        }
    }
}

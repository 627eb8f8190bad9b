// SPDX-License-Identifier: Apache-2.0

/// Text as bytes, for the console, the command line and the shell. `String` would add Unicode tables.
struct Text: ExpressibleByStringInterpolation, Equatable {
    private(set) var bytes: [UInt8]

    init(_ bytes: [UInt8] = []) { self.bytes = bytes }
    init(_ bytes: ArraySlice<UInt8>) { self.bytes = [UInt8](bytes) }

    init(stringLiteral literal: StaticString) {
        bytes = []
        append(literal: literal)
    }

    init(stringInterpolation: StringInterpolation) { bytes = stringInterpolation.text.bytes }

    var isEmpty: Bool { bytes.isEmpty }
    var count: Int { bytes.count }

    /// Whether the text equals `literal`.
    func equals(_ literal: StaticString) -> Bool { count == literal.utf8CodeUnitCount && starts(with: literal) }

    func starts(with literal: StaticString) -> Bool {
        let length = literal.utf8CodeUnitCount
        guard count >= length else { return false }
        return literal.withUTF8Buffer { buffer in
            for index in 0..<length where unsafe buffer[index] != bytes[index] { return false }
            return true
        }
    }

    mutating func append(_ byte: UInt8) { bytes.append(byte) }
    mutating func append(_ text: Text) { bytes.append(contentsOf: text.bytes) }
    mutating func append(literal: StaticString) {
        literal.withUTF8Buffer { for index in 0..<$0.count { unsafe bytes.append($0[index]) } }
    }
    mutating func removeLast() { if !bytes.isEmpty { bytes.removeLast() } }

    /// The text from byte `index` on; empty beyond its end.
    func dropFirst(_ index: Int) -> Text { Text(bytes.dropFirst(index)) }

    /// Splits at each `separator` outside single quotes. Quotes and empty pieces are removed.
    func split(_ separator: UInt8) -> [Text] {
        var pieces: [Text] = []
        var piece = Text()
        var quoted = false
        for byte in bytes {
            if byte == UInt8(ascii: "'") {
                quoted.toggle()
            } else if byte == separator && !quoted {
                if !piece.isEmpty { pieces.append(piece) }
                piece = Text()
            } else {
                piece.append(byte)
            }
        }
        if !piece.isEmpty { pieces.append(piece) }
        return pieces
    }

    /// The parts before and after the first `separator`; nil if there is none.
    func cut(_ separator: UInt8) -> (before: Text, after: Text)? {
        guard let index = bytes.firstIndex(of: separator) else { return nil }
        return (Text(bytes[..<index]), Text(bytes[(index + 1)...]))
    }

    /// The whole text as a number: decimal, or hexadecimal after `0x`. Nil if it is not a number or does not fit.
    var number: UInt64? {
        let hexadecimal = starts(with: "0x")
        let digits = hexadecimal ? bytes.dropFirst(2) : bytes[...]
        guard !digits.isEmpty else { return nil }
        var value: UInt64 = 0
        for byte in digits {
            let digit: UInt8
            switch byte {
            case UInt8(ascii: "0")...UInt8(ascii: "9"): digit = byte - UInt8(ascii: "0")
            case UInt8(ascii: "a")...UInt8(ascii: "f") where hexadecimal: digit = byte - UInt8(ascii: "a") + 10
            case UInt8(ascii: "A")...UInt8(ascii: "F") where hexadecimal: digit = byte - UInt8(ascii: "A") + 10
            default: return nil
            }
            let (product, overflow) = value.multipliedReportingOverflow(by: hexadecimal ? 16 : 10)
            let (sum, carry) = product.addingReportingOverflow(UInt64(digit))
            guard !overflow, !carry else { return nil }
            value = sum
        }
        return value
    }

    /// A number with an optional suffix K, M or G, as sizes on the kernel's command line have.
    var size: UInt64? {
        var shift: UInt64 = 0
        switch bytes.last {
        case UInt8(ascii: "K"), UInt8(ascii: "k"): shift = 10
        case UInt8(ascii: "M"), UInt8(ascii: "m"): shift = 20
        case UInt8(ascii: "G"), UInt8(ascii: "g"): shift = 30
        default: return number
        }
        guard let value = Text(bytes.dropLast()).number, value <= UInt64.max >> shift else { return nil }
        return value << shift
    }

    struct StringInterpolation: StringInterpolationProtocol {
        typealias StringLiteralType = StaticString
        fileprivate var text = Text()

        init(literalCapacity: Int, interpolationCount: Int) {}

        mutating func appendLiteral(_ literal: StaticString) { text.append(literal: literal) }
        mutating func appendInterpolation(_ other: Text) { text.append(other) }
        mutating func appendInterpolation(_ literal: StaticString) { text.append(literal: literal) }
        mutating func appendInterpolation(_ value: Int) {
            if value < 0 { text.append(UInt8(ascii: "-")) }
            digits(UInt64(value.magnitude), base: 10, width: 1, padding: UInt8(ascii: " "))
        }
        mutating func appendInterpolation(_ value: UInt64) {
            digits(value, base: 10, width: 1, padding: UInt8(ascii: " "))
        }
        mutating func appendInterpolation(_ value: some FixedWidthInteger & UnsignedInteger) {
            appendInterpolation(UInt64(value))
        }

        /// Right-aligned in `width` columns.
        mutating func appendInterpolation(_ value: UInt64, width: Int) {
            digits(value, base: 10, width: width, padding: UInt8(ascii: " "))
        }

        /// Hexadecimal, `width` digits at least.
        mutating func appendInterpolation(hex value: UInt64, width: Int = 1) {
            digits(value, base: 16, width: width, padding: UInt8(ascii: "0"))
        }

        private mutating func digits(_ value: UInt64, base: UInt64, width: Int, padding: UInt8) {
            var count = 1
            var top: UInt64 = 1
            while value / top >= base {
                top *= base
                count += 1
            }
            while count < width {
                text.append(padding)
                count += 1
                if count == 64 { break }
            }
            while top > 0 {
                let digit = UInt8(value / top % base)
                text.append(digit < 10 ? UInt8(ascii: "0") + digit : UInt8(ascii: "a") + digit - 10)
                top /= base
            }
        }
    }
}

/// An error message.
struct Failure: Error {
    let reason: Text

    init(_ reason: Text) { self.reason = reason }
}

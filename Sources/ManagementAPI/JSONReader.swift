// SPDX-License-Identifier: Apache-2.0

internal import CJansson
package import Linux

/// Why a text is no JSON value, in words that complete a sentence.
package struct JSONProblem: Error, Equatable {
    package let reason: String
}

/// Reads JSON texts (RFC 8259) of clients. Duplicate names, trailing commas, comments and text behind the value are
/// refused.
package enum JSONReader {
    /// Arrays and objects within each other; a text with more is refused before it is parsed by recursion.
    package static let maximumDepth = 127

    /// The value of a text in UTF-8.
    ///
    /// Numbers are whole where they are written so; they have to fit in 64 bits with a sign.
    package static func read(_ text: [UInt8]) throws(JSONProblem) -> JSON {
        guard depth(of: text) <= maximumDepth else { throw JSONProblem(reason: "recursion limit exceeded") }
        var error = json_error_t()
        let flags = Int(JSON_REJECT_DUPLICATES | JSON_DECODE_ANY)
        // Both are valid for the call; the array's bytes are only read.
        let value = unsafe text.withUnsafeBytes { bytes in
            unsafe json_loadb(bytes.baseAddress?.assumingMemoryBound(to: CChar.self), bytes.count, flags, &error)
        }
        guard let value = unsafe value else {
            let reason = unsafe withUnsafeBytes(of: &error.text) { bytes in
                unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            throw JSONProblem(reason: "\(reason) at line \(error.line) column \(error.column)")
        }
        defer { unsafe json_decref(value) }
        return unsafe convert(value)
    }

    /// Has the parser's hash table take its seed from the kernel's generator; otherwise it opens a file for that, which
    /// a confined process may not.
    package static func prepare() {
        var generator = SystemRandomNumberGenerator()
        json_object_seed(Int(truncatingIfNeeded: generator.next() | 1))
    }

    /// The deepest nesting of brackets outside of strings.
    private static func depth(of text: [UInt8]) -> Int {
        var depth = 0, deepest = 0, isInString = false, isEscaped = false
        for byte in text {
            if isInString {
                if isEscaped {
                    isEscaped = false
                } else if byte == UInt8(ascii: "\\") {
                    isEscaped = true
                } else if byte == UInt8(ascii: "\"") {
                    isInString = false
                }
                continue
            }
            switch byte {
            case UInt8(ascii: "\""): isInString = true
            case UInt8(ascii: "["), UInt8(ascii: "{"):
                depth += 1
                deepest = max(deepest, depth)
            case UInt8(ascii: "]"), UInt8(ascii: "}"): depth -= 1
            default: break
            }
        }
        return deepest
    }

    /// - Parameter value: valid during the call.
    private static func convert(_ value: UnsafeMutablePointer<json_t>) -> JSON {
        // The functions of each type are called for values of that type only; what they return is valid as long as the
        // value is.
        switch unsafe value.pointee.type {
        case JSON_OBJECT:
            var members: [(String, JSON?)] = []
            var iterator = unsafe json_object_iter(value)
            while let current = unsafe iterator {
                if let name = unsafe json_object_iter_key(current), let member = unsafe json_object_iter_value(current)
                {
                    members.append((unsafe String(cString: name), unsafe convert(member)))
                }
                unsafe iterator = json_object_iter_next(value, current)
            }
            return .object(members)
        case JSON_ARRAY:
            let count = unsafe json_array_size(value)
            return .array(
                (0..<count).compactMap { index in
                    guard let element = unsafe json_array_get(value, index) else { return nil }
                    return unsafe convert(element)
                })
        case JSON_STRING:
            let bytes = unsafe UnsafeRawBufferPointer(start: json_string_value(value), count: json_string_length(value))
            return unsafe .string(String(decoding: bytes, as: UTF8.self))
        case JSON_INTEGER:
            let number = Int64(unsafe json_integer_value(value))
            return number < 0 ? .negative(number) : .number(UInt64(number))
        case JSON_REAL: return .decimal(unsafe json_real_value(value))
        case JSON_TRUE: return .bool(true)
        case JSON_FALSE: return .bool(false)
        default: return .null
        }
    }
}

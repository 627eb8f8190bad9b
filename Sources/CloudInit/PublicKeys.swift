// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The public keys of a file in the form of `authorized_keys` (sshd(8)): one a line, comments and empty lines.
enum PublicKeys {
    static let maximumSize = 64 << 10

    static func read(_ path: String) throws(SeedError) -> [String] {
        let bytes = try SeedFile.read(path, option: "ssh-key", limit: maximumSize)
        return try parse(bytes, path: path)
    }

    static func parse(_ bytes: [UInt8], path: String) throws(SeedError) -> [String] {
        var keys: [String] = []
        for (index, line) in bytes.split(separator: 0x0a, omittingEmptySubsequences: false).enumerated() {
            let line = line.last == 0x0d ? line.dropLast() : line
            // A line of binary data is no place to search for words.
            let text = String(validating: line, as: UTF8.self)
            if let text, isPrivate(text) { throw .privateKey(path: path, publicKey: publicKey(of: path)) }
            guard let text, isPlain(text) else {
                throw .key(path: path, line: index + 1, reason: "it is not plain text")
            }
            let words = text.drop { $0 == " " || $0 == "\t" }
            if words.isEmpty || words.first == "#" { continue }
            if let reason = problem(of: words) { throw .key(path: path, line: index + 1, reason: reason) }
            keys.append(String(words))
        }
        guard !keys.isEmpty else { throw .noKeys(path: path) }
        return keys
    }

    /// PEM's and OpenSSH's own form, and PuTTY's.
    private static func isPrivate(_ line: String) -> Bool {
        line.hasPrefix("-----BEGIN ") && line.hasSuffix("PRIVATE KEY-----") || line.hasPrefix("PuTTY-User-Key-File")
    }

    private static func publicKey(of path: String) -> String? {
        fileStatus(ofPath: path + ".pub") == nil ? nil : path + ".pub"
    }

    /// Indicates whether YAML takes every character.
    private static func isPlain(_ text: String) -> Bool {
        let text = text.filter { $0 != "\t" }
        return text.printable == text && !text.unicodeScalars.contains { $0 == "\u{fffe}" || $0 == "\u{ffff}" }
    }

    /// What is wrong with a line; nil for `[OPTIONS] TYPE BASE64 [COMMENT]`.
    private static func problem(of line: Substring) -> String? {
        if line.hasPrefix("---- BEGIN SSH2") {
            return "it is in another format; `ssh-keygen -i -f FILE` converts it"
        }
        var words = split(line)
        // Options come first, such as `from="192.0.2.0/24"`.
        if let first = words.first, !types.contains(first) { words.removeFirst() }
        guard let type = words.first, types.contains(type) else {
            return "expected a type such as ssh-ed25519, the key in base64, and a name"
        }
        guard words.count > 1 else { return "the key itself is missing behind \(type)" }
        guard let blob = base64(words[1]), isKey(blob, type: type) else {
            return "the key behind \(type) is incomplete or damaged"
        }
        return nil
    }

    private static let types: Set<String> = [
        "ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com", "ssh-dss",
    ]

    /// At blanks and tabs, but for those in quotation marks.
    private static func split(_ line: Substring) -> [String] {
        var words: [String] = [], word = "", isQuoted = false, isEscaped = false
        for character in line {
            if (character == " " || character == "\t") && !isQuoted {
                if !word.isEmpty { words.append(word) }
                word = ""
                continue
            }
            if character == "\"" && !isEscaped { isQuoted.toggle() }
            isEscaped = character == "\\" && !isEscaped
            word.append(character)
        }
        return word.isEmpty ? words : words + [word]
    }

    /// A key is a sequence of strings, each behind its length (RFC 4253 §6.6); the first one is the type.
    private static func isKey(_ blob: [UInt8], type: String) -> Bool {
        var rest = blob[...], count = 0
        while rest.count >= 4 {
            let length = rest.prefix(4).reduce(0) { $0 << 8 | Int($1) }
            rest = rest.dropFirst(4)
            guard length <= rest.count, count > 0 || rest.prefix(length).elementsEqual(type.utf8) else { return false }
            rest = rest.dropFirst(length)
            count += 1
        }
        return rest.isEmpty && count > 1
    }

    /// RFC 4648 §4, with padding; nil for anything else.
    private static func base64(_ text: String) -> [UInt8]? {
        let digits = Array(text.utf8)
        let padding = digits.reversed().prefix { $0 == UInt8(ascii: "=") }.count
        guard digits.count % 4 == 0, padding <= 2 else { return nil }
        var bytes: [UInt8] = [], bits: UInt32 = 0, count: UInt32 = 0
        for digit in digits.dropLast(padding) {
            guard let value = value(ofDigit: digit) else { return nil }
            bits = bits << 6 | value
            count += 6
            if count >= 8 {
                count -= 8
                bytes.append(UInt8(truncatingIfNeeded: bits >> count))
            }
        }
        return bytes
    }

    private static func value(ofDigit digit: UInt8) -> UInt32? {
        switch digit {
        case UInt8(ascii: "A")...UInt8(ascii: "Z"): UInt32(digit - UInt8(ascii: "A"))
        case UInt8(ascii: "a")...UInt8(ascii: "z"): UInt32(digit - UInt8(ascii: "a")) + 26
        case UInt8(ascii: "0")...UInt8(ascii: "9"): UInt32(digit - UInt8(ascii: "0")) + 52
        case UInt8(ascii: "+"): 62
        case UInt8(ascii: "/"): 63
        default: nil
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

public import CLinux
internal import Glibc

// A path is bytes to the kernel: all but NUL, and UTF-8 or not. Swift's text is Unicode, and reading others' bytes as
// text changes them. Names therefore travel as text in which each byte that is no part of a UTF-8 sequence stands as
// one scalar of its own: U+10F700 plus the byte, from a private-use plane. A name that has such scalars itself gets
// them byte for byte, so two names never become one. What text came from bytes gives the same bytes back.

extension String {
    /// Text that stands for bytes which need not be UTF-8: a path, an argument of the command line, a name in an image.
    ///
    /// ``rawBytes`` gives the same bytes back. Text that is UTF-8 is itself.
    public init(raw bytes: some Collection<UInt8>) {
        let bytes = Array(bytes)
        if let text = String(validating: bytes, as: UTF8.self), !text.hasRawScalars {
            self = text
            return
        }
        var scalars = String.UnicodeScalarView()
        var place = 0
        while place < bytes.count {
            let length = Self.sequenceLength(bytes[place])
            if place + length <= bytes.count,
                let text = String(validating: bytes[place..<place + length], as: UTF8.self), !text.hasRawScalars
            {
                scalars.append(contentsOf: text.unicodeScalars)
                place += length
            } else {
                // Not ASCII, so from 0x80 to 0xff: U+10F780 to U+10F7FF.
                scalars.append(UnicodeScalar(UInt32(0x10f700) + UInt32(bytes[place])) ?? "\u{fffd}")
                place += 1
            }
        }
        self = String(scalars)
    }

    /// The bytes that the text stands for: see ``init(raw:)``.
    public var rawBytes: [UInt8] {
        guard hasRawScalars else { return Array(utf8) }
        var bytes: [UInt8] = []
        for scalar in unicodeScalars {
            if let byte = scalar.rawByte {
                bytes.append(byte)
            } else {
                bytes.append(contentsOf: UTF8.encode(scalar) ?? UTF8.encodedReplacementCharacter)
            }
        }
        return bytes
    }

    /// Indicates whether there are bytes among it that are no UTF-8.
    public var hasRawScalars: Bool {
        // Each begins with this byte, as few others do.
        utf8.contains(0xf4) && unicodeScalars.contains { $0.rawByte != nil }
    }

    /// Hands ``rawBytes`` and a NUL to a call that takes a path, for as long as it lasts: what the call does with the
    /// pointer is its caller's affair.
    @safe public func withRawCString<Answer>(_ body: (UnsafePointer<CChar>) -> Answer) -> Answer {
        guard hasRawScalars else { return unsafe withCString(body) }
        let bytes = rawBytes.map { CChar(bitPattern: $0) } + [0]
        // The array ends in NUL and outlives the call.
        return unsafe bytes.withUnsafeBufferPointer { unsafe body($0.baseAddress!) }
    }

    /// The text as it can be printed: bytes that are no UTF-8 as `\xe9`, control characters and what changes the
    /// direction of writing escaped.
    public var printable: String {
        unicodeScalars.allSatisfy(\.isPrintable)
            ? self : unicodeScalars.map { $0.isPrintable ? String($0) : $0.printed }.joined()
    }

    private static func sequenceLength(_ first: UInt8) -> Int {
        switch first {
        case 0xc2...0xdf: 2
        case 0xe0...0xef: 3
        case 0xf0...0xf4: 4
        default: 1
        }
    }
}

extension UnicodeScalar {
    /// The byte that the scalar stands for in ``Swift/String/init(raw:)``, from 0x80 on; nil of others.
    public var rawByte: UInt8? { (0x10f780...0x10f7ff).contains(value) ? UInt8(value & 0xff) : nil }

    /// Indicates whether a terminal shows it where it stands, and does nothing else with it.
    fileprivate var isPrintable: Bool {
        if value < 0x300 { return value >= 0x20 && !(0x7f...0x9f).contains(value) }
        switch value {
        // Marks and overrides of the direction; separators of lines.
        case 0x61c, 0x200e, 0x200f, 0x2028...0x202e, 0x2066...0x2069: return false
        default: return rawByte == nil
        }
    }

    fileprivate var printed: String {
        guard let rawByte else { return escaped(asASCII: true) }
        return "\\x" + String(rawByte, radix: 16)
    }
}

/// Returns the result of `stat` for a path, or nil with errno set on failure.
/// - Parameter followsLinks: whether a symbolic link at its end is followed, or itself what is asked for.
public func fileStatus(ofPath path: String, followsLinks: Bool = true) -> stat? {
    var status = stat()
    // Both write no more than the structure.
    let result = path.withRawCString { unsafe followsLinks ? stat($0, &status) : lstat($0, &status) }
    return result == 0 ? status : nil
}

/// Removes a name, if it is there.
public func removeName(_ path: String) { _ = path.withRawCString { unsafe unlink($0) } }

/// The process's arguments with the program's name first, every byte of them: see ``Swift/String/init(raw:)``.
public func rawArguments() -> [String] {
    var arguments: [String] = []
    for index in 0..<Int(CommandLine.argc) {
        // The kernel's own strings, which do not change; the array has `argc` of them.
        guard let text = unsafe CommandLine.unsafeArgv[index] else { break }
        arguments.append(
            unsafe String(raw: UnsafeBufferPointer(start: text, count: strlen(text)).map { UInt8(bitPattern: $0) }))
    }
    return arguments
}

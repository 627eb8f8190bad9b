// SPDX-License-Identifier: Apache-2.0

/// The encodings with one byte for each character in which programs for Windows write names of files.
enum TextEncoding {
    /// Western Europe, as Windows has it; ISO 8859-1 where it has control characters is the same.
    case windows1252

    /// - Parameter name: in lower case.
    /// - Returns: nil for UTF-8, which needs no conversion, and for what is not known.
    init?(named name: String) {
        switch name {
        case "windows-1252", "cp1252", "iso-8859-1", "latin1", "us-ascii", "ascii": self = .windows1252
        default: return nil
        }
    }

    /// What stands at 0x80 to 0x9f; the other bytes are the first characters of Unicode. Five of them are undefined
    /// and stand for themselves, as in Windows.
    private static let windows: [UInt16] = [
        0x20ac, 0x0081, 0x201a, 0x0192, 0x201e, 0x2026, 0x2020, 0x2021,
        0x02c6, 0x2030, 0x0160, 0x2039, 0x0152, 0x008d, 0x017d, 0x008f,
        0x0090, 0x2018, 0x2019, 0x201c, 0x201d, 0x2022, 0x2013, 0x2014,
        0x02dc, 0x2122, 0x0161, 0x203a, 0x0153, 0x009d, 0x017e, 0x0178,
    ]

    /// A name in UTF-8 that is written in this encoding, or in none that is said and is no UTF-8.
    /// - Returns: nil where that is what it is already, or where nothing is known of it.
    static func converted(_ name: ArraySlice<UInt8>, _ encoding: TextEncoding?) -> String? {
        guard name.contains(where: { $0 >= 0x80 }) else { return nil }
        guard encoding != nil || String(validating: name, as: UTF8.self) == nil else { return nil }
        var text = String.UnicodeScalarView()
        for byte in name {
            let code = (0x80..<0xa0).contains(byte) ? windows[Int(byte) - 0x80] : UInt16(byte)
            // None of them is a surrogate.
            text.append(UnicodeScalar(code) ?? "?")
        }
        return String(text)
    }
}

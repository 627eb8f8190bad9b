// SPDX-License-Identifier: Apache-2.0

/// Integers in bytes of an image. What lies past the end of the bytes is zero, so no offset causes a trap.
extension RandomAccessCollection<UInt8> where Index == Int {
    func little16(_ offset: Int) -> UInt16 { UInt16(truncatingIfNeeded: little(offset, 2)) }
    func little32(_ offset: Int) -> UInt32 { UInt32(truncatingIfNeeded: little(offset, 4)) }
    func little64(_ offset: Int) -> UInt64 { little(offset, 8) }
    func big16(_ offset: Int) -> UInt16 { little16(offset).byteSwapped }
    func big32(_ offset: Int) -> UInt32 { little32(offset).byteSwapped }
    func byte(_ offset: Int) -> UInt8 {
        offset >= 0 && offset < count ? self[startIndex + offset] : 0
    }

    private func little(_ offset: Int, _ size: Int) -> UInt64 {
        var result: UInt64 = 0
        for index in 0..<size { result |= UInt64(byte(offset &+ index)) << UInt64(8 * index) }
        return result
    }

    /// Some of the bytes, fewer where there are not as many.
    func piece(_ offset: Int, _ length: Int) -> [UInt8] {
        let first = Swift.min(Swift.max(offset, 0), count)
        let last = first + Swift.min(Swift.max(length, 0), count - first)
        return Array(self[startIndex + first..<startIndex + last])
    }

    /// The text up to the first zero byte.
    func text(_ offset: Int, _ length: Int) -> String {
        String(decoding: piece(offset, length).prefix { $0 != 0 }, as: UTF8.self)
    }

    func matches(_ text: StaticString, at offset: Int) -> Bool {
        let wanted = "\(text)".utf8
        return offset >= 0 && offset <= count && piece(offset, wanted.count).elementsEqual(wanted)
    }
}

extension [UInt8] {
    /// The bytes with some of them zero, as checksums want theirs.
    func clearing(_ ranges: Range<Int>...) -> [UInt8] {
        var result = self
        for range in ranges {
            for index in range where index < result.count { result[index] = 0 }
        }
        return result
    }
}

/// The UUID in bytes that are stored in the order in which it is written.
func uuidText(_ bytes: [UInt8]) -> String? {
    guard bytes.count == 16, bytes.contains(where: { $0 != 0 }) else { return nil }
    let digits = bytes.map { hexadecimal(UInt64($0), 2) }.joined()
    var result = "", rest = digits[...]
    for (index, length) in [8, 4, 4, 4, 12].enumerated() {
        result += (index > 0 ? "-" : "") + rest.prefix(length)
        rest = rest.dropFirst(length)
    }
    return result
}

/// The UUID in bytes of a GPT, whose first three fields are little-endian.
func guidText(_ bytes: [UInt8]) -> String? {
    guard bytes.count == 16 else { return nil }
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]
    return uuidText(order.map { bytes[$0] })
}

func hexadecimal(_ value: UInt64, _ digits: Int) -> String {
    let text = String(value, radix: 16)
    return String(repeating: "0", count: max(0, digits - text.count)) + text
}

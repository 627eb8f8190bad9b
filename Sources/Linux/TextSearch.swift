// SPDX-License-Identifier: Apache-2.0

// Searches for a text in another. The standard library's own are in its module of regular expressions, which would add
// 1.3 MB to the program.

extension StringProtocol {
    /// The first occurrence of a text that is not empty; the same bytes, whatever they mean in Unicode.
    public func firstOccurrence(of text: String) -> Range<Index>? {
        guard let first = text.utf8.first else { return nil }
        var rest = utf8[...]
        while let start = rest.firstIndex(of: first) {
            rest = rest[start...]
            if rest.starts(with: text.utf8) { return start..<rest.index(start, offsetBy: text.utf8.count) }
            rest = rest.dropFirst()
        }
        return nil
    }

    /// The text with another one in the place of the first occurrence of one.
    public func replacing(first text: String, with other: String) -> String {
        guard let range = firstOccurrence(of: text) else { return String(self) }
        return String(self[..<range.lowerBound]) + other + String(self[range.upperBound...])
    }
}

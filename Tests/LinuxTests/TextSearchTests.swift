// SPDX-License-Identifier: Apache-2.0

import Linux
import TestSupport
import Testing

@Suite(.timed) struct TextSearchTests {
    @Test(arguments: [
        ("nbd://host", "://", 3), ("aab", "ab", 1), ("aaab", "aab", 1), ("ab", "ab", 0), ("abab", "ab", 0),
        ("a", "ab", nil), ("", "a", nil), ("abc", "", nil), ("ab", "ba", nil), ("späße: x", ": ", 7),
    ]) func firstOccurrence(text: String, searched: String, place: Int?) {
        let range = text.firstOccurrence(of: searched)
        #expect(range.map { text.utf8.distance(from: text.startIndex, to: $0.lowerBound) } == place)
        if let range { #expect(String(text[range]) == searched) }
        // In a part of a text, with the indices of the whole.
        let whole = "--" + text + "--", part = whole.dropFirst(2).dropLast(2)
        #expect((part.firstOccurrence(of: searched) == nil) == (place == nil))
        if let range = part.firstOccurrence(of: searched) { #expect(whole[range] == searched) }
    }

    @Test func replacing() {
        #expect("a]:b]:c".replacing(first: "]:", with: "]::") == "a]::b]:c")
        #expect("abc".replacing(first: "d", with: "e") == "abc")
        #expect("xaby".dropFirst().replacing(first: "ab", with: "") == "y")
    }
}

// SPDX-License-Identifier: Apache-2.0

/// A list of `word` and `key=value`, separated by commas; a comma within a value is written twice.
public struct OptionList: Sendable {
    public private(set) var items: [(key: String, value: String?)] = []

    public init(_ text: String) {
        // By scalars: to Unicode a comma can be one character with what follows.
        var current = String.UnicodeScalarView()
        var words: [String.UnicodeScalarView] = []
        var rest = text.unicodeScalars[...]
        while let scalar = rest.popFirst() {
            if scalar == "," {
                guard rest.first == "," else {
                    words.append(current)
                    current = String.UnicodeScalarView()
                    continue
                }
                rest.removeFirst()
            }
            current.append(scalar)
        }
        words.append(current)
        items = words.map { word in
            guard let equals = word.firstIndex(of: "=") else { return (String(word), nil) }
            return (String(Substring(word[..<equals])), String(Substring(word[word.index(after: equals)...])))
        }
    }

    /// The first item as it was written: a path may have an equals sign in it.
    public mutating func takeFirst() -> String {
        let first = items.removeFirst()
        return first.value.map { "\(first.key)=\($0)" } ?? first.key
    }
}

extension String {
    /// As a path is written in a list of options.
    public var commaDoubled: String {
        String(
            unicodeScalars.reduce(into: String.UnicodeScalarView()) { text, scalar in
                if scalar == "," { text.append(",") }
                text.append(scalar)
            })
    }
}

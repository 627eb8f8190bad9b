// SPDX-License-Identifier: Apache-2.0

/// A table of two columns in a help text. The parser breaks a line that is too long and continues it at the margin, so
/// that it looks like another paragraph.
enum HelpTable {
    /// Lines of at most `columns` characters; what a meaning needs beyond its line stands below its beginning.
    static func text(_ rows: [(word: String, meaning: String)], columns: Int = 80) -> String {
        let width = (rows.map(\.word.count).max() ?? 0) + 2
        return rows.map { row in
            var lines: [String] = [], line = "  " + row.word + String(repeating: " ", count: width - row.word.count)
            for word in row.meaning.split(separator: " ").map(String.init) {
                let isFirst = line.last == " "
                if !isFirst, line.count + 1 + word.count > columns {
                    lines.append(line)
                    line = String(repeating: " ", count: width + 2) + word
                } else {
                    line += (isFirst ? "" : " ") + word
                }
            }
            return (lines + [line]).joined(separator: "\n")
        }.joined(separator: "\n")
    }

    /// Lines of a table whose columns are as wide as their longest cell; the last one is not filled up.
    static func columns(_ rows: [[String]]) -> [String] {
        let count = rows.map(\.count).max() ?? 0
        let widths = (0..<count).map { column in rows.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0 }
        return rows.map { row in
            row.enumerated().map { column, cell in
                column + 1 < row.count ? cell + String(repeating: " ", count: widths[column] - cell.count + 2) : cell
            }.joined()
        }
    }
}

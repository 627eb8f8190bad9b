// SPDX-License-Identifier: Apache-2.0

/// A help text taken apart: what it says, and its sections.
struct Discussion {
    enum Block: Equatable {
        case paragraph(String)
        /// Lines as they are, such as commands.
        case literal([String])
    }

    var description: [Block] = []
    var examples: [Block] = []
    /// Each status and what it means.
    var statuses: [(status: String, meaning: String)] = []
    /// Sections without special treatment.
    var others: [(title: String, blocks: [Block])] = []

    /// A heading is a line in capital letters; an indented line is literal, or an exit status below that heading.
    init(_ text: String) {
        var title: String?, lines: [Substring] = []
        for line in text.split(separator: "\n", omittingEmptySubsequences: false) {
            guard Self.isHeading(line) else {
                lines.append(line)
                continue
            }
            take(lines, below: title)
            (title, lines) = (String(line), [])
        }
        take(lines, below: title)
    }

    private mutating func take(_ lines: [Substring], below title: String?) {
        switch title {
        case nil: description = Self.blocks(lines)
        case "EXAMPLES", "EXAMPLE": examples = Self.blocks(lines)
        case "EXIT STATUS": statuses = Self.statuses(lines)
        case let title?: others.append((title, Self.blocks(lines)))
        }
    }

    private static func isHeading(_ line: Substring) -> Bool {
        !line.isEmpty && line.allSatisfy { $0 == " " || $0.isUppercase } && line.first != " "
    }

    private static func blocks(_ lines: [Substring]) -> [Block] {
        var blocks: [Block] = []
        var isOpen = false
        for line in lines {
            let text = line.drop { $0 == " " }
            guard !text.isEmpty else {
                isOpen = false
                continue
            }
            switch (blocks.last, text.startIndex > line.startIndex) {
            case (.paragraph(let before)?, false) where isOpen:
                blocks[blocks.count - 1] = .paragraph(before + " " + text)
            case (.literal(let before)?, true) where isOpen:
                blocks[blocks.count - 1] = .literal(before + [String(line)])
            case (_, let isLiteral): blocks.append(isLiteral ? .literal([String(line)]) : .paragraph(String(text)))
            }
            isOpen = true
        }
        return blocks
    }

    /// `  71       something that swkvm needs`; deeper lines continue.
    private static func statuses(_ lines: [Substring]) -> [(String, String)] {
        var statuses: [(String, String)] = []
        for line in lines where !line.allSatisfy({ $0 == " " }) {
            let text = line.drop { $0 == " " }
            if let gap = text.firstRange(of: "  ") {
                statuses.append((String(text[..<gap.lowerBound]), String(text[gap.upperBound...].drop { $0 == " " })))
            } else if let last = statuses.popLast() {
                statuses.append((last.0, last.1 + " " + text))
            }
        }
        return statuses
    }
}

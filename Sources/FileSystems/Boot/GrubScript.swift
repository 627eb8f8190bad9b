// SPDX-License-Identifier: Apache-2.0

/// A word of a script: pieces that stand as they are, and variables.
struct GrubWord: Equatable {
    enum Piece: Equatable {
        case text(String)
        /// Within double quotes its value is not split into words.
        case variable(String, isQuoted: Bool)
    }

    var pieces: [Piece] = []
    /// Nothing, in quotes, is a word too.
    var isQuoted = false

    /// The word, where it has no variables.
    var plain: String? {
        var text = ""
        for piece in pieces {
            guard case .text(let part) = piece else { return nil }
            text += part
        }
        return text
    }
}

/// A command of GRUB's script language, with what is nested in it.
indirect enum GrubCommand {
    case words([GrubWord], line: Int)
    case ifElse([(condition: [GrubCommand], body: [GrubCommand])], otherwise: [GrubCommand])
    case function(String, [GrubCommand])
    /// `menuentry` or `submenu`.
    case entry([GrubWord], [GrubCommand], line: Int)
    case forLoop(String, [GrubWord], [GrubCommand])
    case whileLoop([GrubCommand], isUntil: Bool, [GrubCommand], line: Int)
}

/// Reads the text of a configuration of GRUB.
struct GrubParser {
    private enum Token: Equatable {
        case word(GrubWord)
        /// A newline or a semicolon.
        case end
        case open, close
    }

    private var tokens: [(token: Token, line: Int)] = []
    private var position = 0
    private var depth = 0
    private let file: String

    private static let maximumDepth = 32

    static func parse(_ text: String, file: String) throws(FileSystemError) -> [GrubCommand] {
        var parser = try GrubParser(text, file: file)
        return try parser.commands(until: [])
    }

    private init(_ text: String, file: String) throws(FileSystemError) {
        self.file = file
        try split(Array(text.unicodeScalars))
    }

    private func problem(_ line: Int, _ reason: String) -> FileSystemError {
        .configuration(file: file, line: line, reason: reason)
    }

    // MARK: Words

    private mutating func split(_ text: [Unicode.Scalar]) throws(FileSystemError) {
        var index = 0, line = 1
        var word: GrubWord?
        func isName(_ scalar: Unicode.Scalar) -> Bool {
            scalar == "_" || ("0"..."9").contains(scalar) || ("a"..."z").contains(scalar)
                || ("A"..."Z").contains(scalar)
        }
        func add(_ part: String) {
            var current = word ?? GrubWord()
            if case .text(let before)? = current.pieces.last {
                current.pieces[current.pieces.count - 1] = .text(before + part)
            } else {
                current.pieces.append(.text(part))
            }
            word = current
        }
        func end(_ token: Token?) {
            if let word { tokens.append((.word(word), line)) }
            word = nil
            if let token { tokens.append((token, line)) }
        }
        // A variable, whose dollar sign is at `index`.
        func variable(isQuoted: Bool) throws(FileSystemError) {
            var name = ""
            var next = index + 1
            if next < text.count, text[next] == "{" {
                next += 1
                while next < text.count, text[next] != "}", text[next] != "\n" {
                    name.unicodeScalars.append(text[next])
                    next += 1
                }
                guard next < text.count, text[next] == "}" else { throw problem(line, "'${' without '}'") }
                next += 1
            } else if next < text.count, "?@*#".unicodeScalars.contains(text[next]) {
                name.unicodeScalars.append(text[next])
                next += 1
            } else {
                while next < text.count, isName(text[next]) {
                    name.unicodeScalars.append(text[next])
                    next += 1
                }
            }
            if name.isEmpty {
                add("$")
            } else {
                word = word ?? GrubWord()
                word?.pieces.append(.variable(name, isQuoted: isQuoted))
            }
            index = next
        }
        func quoted() throws(FileSystemError) {
            let start = line, kind = text[index]
            word = word ?? GrubWord()
            word?.isQuoted = true
            index += 1
            while index < text.count, text[index] != kind {
                if text[index] == "\n" { line += 1 }
                if kind == "\"", text[index] == "$" {
                    try variable(isQuoted: true)
                    continue
                }
                if kind == "\"", text[index] == "\\", index + 1 < text.count {
                    index += 1
                    // Before another character the backslash stands for itself.
                    if !"$\"\\\n".unicodeScalars.contains(text[index]) { add("\\") }
                    if text[index] == "\n" {
                        line += 1
                        index += 1
                        continue
                    }
                }
                add(String(text[index]))
                index += 1
            }
            guard index < text.count else { throw problem(start, "a quotation without an end") }
            index += 1
        }
        while index < text.count {
            let scalar = text[index]
            switch scalar {
            case "\n":
                end(.end)
                line += 1
                index += 1
            case ";":
                end(.end)
                index += 1
            case " ", "\t", "\r":
                end(nil)
                index += 1
            case "#" where word == nil:
                while index < text.count, text[index] != "\n" { index += 1 }
            case "{" where word == nil:
                end(.open)
                index += 1
            case "}" where word == nil:
                end(.close)
                index += 1
            case "$": try variable(isQuoted: false)
            case "'", "\"": try quoted()
            case "\\" where index + 1 < text.count:
                if text[index + 1] == "\n" { line += 1 } else { add(String(text[index + 1])) }
                index += 2
            default:
                add(String(scalar))
                index += 1
            }
        }
        end(.end)
    }

    // MARK: Commands

    /// The next token, which may be a keyword.
    private var keyword: String? {
        guard position < tokens.count, case .word(let word) = tokens[position].token, !word.isQuoted else { return nil }
        return word.plain
    }

    private var line: Int { position < tokens.count ? tokens[position].line : tokens.last?.line ?? 1 }

    /// Commands up to one of some keywords, to a closing brace, or to the end of the text.
    private mutating func commands(
        until ends: Set<String>, isBlock: Bool = false
    ) throws(FileSystemError) -> [GrubCommand] {
        depth += 1
        defer { depth -= 1 }
        guard depth <= Self.maximumDepth else { throw problem(line, "it is nested too deeply") }
        var result: [GrubCommand] = []
        while position < tokens.count {
            switch tokens[position].token {
            case .end:
                position += 1
                continue
            case .close:
                guard isBlock else { throw problem(line, "'}' without '{'") }
                return result
            case .open: throw problem(line, "'{' where a command was expected")
            case .word: break
            }
            if let keyword, ends.contains(keyword) { return result }
            result.append(try command())
        }
        if isBlock || !ends.isEmpty {
            throw problem(
                line,
                "the file ends before \(isBlock ? "'}'" : ends.sorted().map { "'\($0)'" }.joined(separator: " or "))")
        }
        return result
    }

    private mutating func command() throws(FileSystemError) -> GrubCommand {
        let start = line
        switch keyword {
        case "if"?: return try ifElse()
        case "function"?:
            position += 1
            guard let name = keyword else { throw problem(start, "'function' without a name") }
            position += 1
            return .function(name, try block())
        case "menuentry"?, "submenu"?:
            var words = takeWords()
            // `menuentry TITLE { ... }`: the block follows the words.
            if case .words(let given, _) = words, position < tokens.count, tokens[position].token == .open {
                words = .entry(given, try block(), line: start)
            }
            return words
        case "for"?:
            position += 1
            guard let name = keyword else { throw problem(start, "'for' without a variable") }
            position += 1
            guard keyword == "in" else { throw problem(start, "'for' without 'in'") }
            position += 1
            guard case .words(let words, _) = takeWords() else { throw problem(start, "'for' without words") }
            return .forLoop(name, words, try loopBody())
        case "while"?, "until"?:
            let isUntil = keyword == "until"
            position += 1
            return .whileLoop(try commands(until: ["do"]), isUntil: isUntil, try loopBody(), line: start)
        default: return takeWords()
        }
    }

    private mutating func loopBody() throws(FileSystemError) -> [GrubCommand] {
        skipEnds()
        guard keyword == "do" else { throw problem(line, "a loop without 'do'") }
        position += 1
        let body = try commands(until: ["done"])
        position += 1
        return body
    }

    private mutating func ifElse() throws(FileSystemError) -> GrubCommand {
        var branches: [(condition: [GrubCommand], body: [GrubCommand])] = []
        while keyword == "if" || keyword == "elif" {
            position += 1
            let condition = try commands(until: ["then"])
            position += 1
            branches.append((condition, try commands(until: ["elif", "else", "fi"])))
        }
        var otherwise: [GrubCommand] = []
        if keyword == "else" {
            position += 1
            otherwise = try commands(until: ["fi"])
        }
        guard keyword == "fi" else { throw problem(line, "'if' without 'fi'") }
        position += 1
        return .ifElse(branches, otherwise: otherwise)
    }

    private mutating func block() throws(FileSystemError) -> [GrubCommand] {
        skipEnds()
        guard position < tokens.count, tokens[position].token == .open else { throw problem(line, "'{' was expected") }
        position += 1
        let body = try commands(until: [], isBlock: true)
        position += 1
        return body
    }

    private mutating func skipEnds() {
        while position < tokens.count, tokens[position].token == .end { position += 1 }
    }

    /// The words up to the end of a command.
    private mutating func takeWords() -> GrubCommand {
        let start = line
        var words: [GrubWord] = []
        while position < tokens.count, case .word(let word) = tokens[position].token {
            words.append(word)
            position += 1
        }
        return .words(words, line: start)
    }
}

// SPDX-License-Identifier: Apache-2.0

/// A manual page in mdoc(7), for one command.
struct Page {
    /// `["swkvm", "image", "convert"]`.
    let words: [String]
    let command: CommandDescription
    /// The text about exit statuses; a command without one inherits that of its parent.
    let statuses: [(status: String, meaning: String)]
    let date: String

    /// `swkvm-image-convert`: `man swkvm image` finds `swkvm-image`.
    var name: String { words.joined(separator: "-") }

    /// The pages of a command and of all below it.
    static func all(
        _ command: CommandDescription, below words: [String] = [], date: String,
        statuses: [(status: String, meaning: String)] = []
    ) -> [Page] {
        let own = Discussion(command.discussion ?? "").statuses
        let page = Page(
            words: words + [command.commandName], command: command, statuses: own.isEmpty ? statuses : own, date: date)
        return [page] + command.pages.flatMap { all($0, below: page.words, date: date, statuses: page.statuses) }
    }

    var text: String {
        let discussion = Discussion(command.discussion ?? "")
        var lines = [".Dd \(date)", ".Dt \(name.uppercased()) 1", ".Os"]
        lines += [".Sh NAME", ".Nm \(name)", ".Nd \(Self.plain(summary))"]
        lines += [".Sh SYNOPSIS"] + synopsis
        lines +=
            [".Sh DESCRIPTION"]
            + Self.lines(
                of: discussion.description.isEmpty ? [.paragraph(command.abstract ?? "")] : discussion.description)
        lines += options + subcommands
        for (title, blocks) in discussion.others { lines += [".Sh \(title)"] + Self.lines(of: blocks) }
        if !statuses.isEmpty {
            lines += [".Sh EXIT STATUS", ".Bl -tag -width Ds"]
            for (status, meaning) in statuses { lines += [".It \(Self.argument(status))"] + Self.sentences(meaning) }
            lines.append(".El")
        }
        if !discussion.examples.isEmpty { lines += [".Sh EXAMPLES"] + Self.lines(of: discussion.examples) }
        lines += references
        lines += [".Sh AUTHORS", ".An The swkvm maintainers"]
        return lines.joined(separator: "\n") + "\n"
    }

    // MARK: Parts

    /// One line that begins with a small letter and has no full stop, as the index wants it.
    private var summary: String {
        let abstract = command.abstract ?? name
        let text = abstract.hasSuffix(".") ? abstract.dropLast() : abstract[...]
        let isWord = text.dropFirst().first?.isLowercase == true || text.dropFirst().first == " "
        return (isWord ? text.prefix(1).lowercased() : String(text.prefix(1))) + text.dropFirst()
    }

    private var arguments: [CommandDescription.Argument] { (command.arguments ?? []).filter(\.shouldDisplay) }

    private var synopsis: [String] {
        var lines = [".Nm \(words.joined(separator: " "))"]
        for argument in arguments where argument.kind != "positional" {
            let repeated = argument.isRepeating && argument.kind == "option" ? " No ..." : ""
            let names = (argument.names ?? []).map(Self.flag)
            // The long name alone: a page's list has the others.
            let name = names.first { $0.hasPrefix("-") } ?? names.first ?? ""
            lines.append(
                (argument.isOptional || argument.kind == "flag" || argument.defaultValue != nil ? ".Op " : ".")
                    + "Fl \(name)\(value(of: argument))" + repeated)
        }
        for argument in arguments where argument.kind == "positional" {
            let name = "Ar \(Self.argument(argument.valueName ?? "argument"))" + (argument.isRepeating ? " No ..." : "")
            lines.append((argument.isOptional ? ".Op " : ".") + name)
        }
        if !command.pages.isEmpty { lines += [".Ar command", ".Op Ar argument No ..."] }
        return lines
    }

    private var options: [String] {
        guard !arguments.isEmpty else { return [] }
        var lines = [".Bl -tag -width Ds"]
        for argument in arguments {
            if argument.kind == "positional" {
                lines.append(".It Ar \(Self.argument(argument.valueName ?? "argument"))")
            } else {
                let names = (argument.names ?? []).map { "Fl \(Self.flag($0))" }.joined(separator: " , ")
                lines.append(".It \(names)\(value(of: argument))")
            }
            lines += Self.sentences(Self.explanation(of: argument))
        }
        return lines + [".El"]
    }

    private var subcommands: [String] {
        guard !command.pages.isEmpty else { return [] }
        var lines = [".Pp", "Its commands, each with a page of its own:", ".Bl -tag -width Ds"]
        for page in command.pages {
            lines += [".It Xr \(name)-\(page.commandName) 1"] + Self.sentences(page.abstract ?? "")
        }
        return lines + [".El"]
    }

    private var references: [String] {
        var names = command.pages.map { "\(name)-\($0.commandName)" }
        if words.count > 1 { names.append(words.dropLast().joined(separator: "-")) }
        guard !names.isEmpty else { return [] }
        let sorted = names.sorted()
        return [".Sh SEE ALSO"] + sorted.map { ".Xr \($0) 1" + ($0 == sorted.last ? "" : " ,") }
    }

    /// Its help, with the values and the default where the help does not name them.
    private static func explanation(of argument: CommandDescription.Argument) -> String {
        var text = argument.abstract ?? ""
        if let more = argument.discussion, !more.isEmpty { text += " " + more }
        let values = argument.allValues ?? []
        if !values.isEmpty, !values.allSatisfy({ text.contains($0) }) {
            text += " Values: \(values.joined(separator: ", "))."
        }
        if let value = argument.defaultValue, !value.isEmpty, argument.kind != "flag",
            !text.lowercased().contains("default")
        {
            text += " Default: \(value)."
        }
        return text
    }

    private func value(of argument: CommandDescription.Argument) -> String {
        guard argument.kind == "option" else { return "" }
        let isOptional = (argument.names ?? []).contains { Self.withOptionalValue.contains($0.name) }
        return (isOptional ? " Op" : "") + " Ar \(Self.argument(argument.valueName ?? "value"))"
    }

    /// Options whose value can be left out, which the parser's description does not say.
    static let withOptionalValue: Set = ["hugepages", "rng"]

    private static func flag(_ name: CommandDescription.Name) -> String { (name.kind == "long" ? "-" : "") + name.name }

    // MARK: mdoc

    private static func lines(of blocks: [Discussion.Block]) -> [String] {
        var lines: [String] = []
        for block in blocks {
            switch block {
            case .paragraph(let text): lines += (lines.isEmpty ? [] : [".Pp"]) + sentences(text)
            case .literal(let literal):
                let margin = literal.map { $0.prefix { $0 == " " }.count }.min() ?? 0
                lines +=
                    [".Bd -literal -offset indent"]
                    + literal.map { escaped(String($0.dropFirst(margin)), isLiteral: true) } + [".Ed"]
            }
        }
        return lines
    }

    /// A new line for each sentence and none of more than 78 bytes, as mdoc wants it.
    private static func sentences(_ text: String) -> [String] {
        var sentences: [String] = [], current = ""
        for word in text.split(separator: " ") {
            current += (current.isEmpty ? "" : " ") + word
            if let last = word.last(where: { $0 != ")" }), ".!?".contains(last) {
                sentences.append(current)
                current = ""
            }
        }
        if !current.isEmpty { sentences.append(current) }
        return sentences.flatMap { wrapped(plain($0)) }
    }

    private static func wrapped(_ line: String) -> [String] {
        var lines: [String] = []
        for word in line.split(separator: " ") {
            if let last = lines.last, last.utf8.count + word.utf8.count < 78 {
                lines[lines.count - 1] = last + " " + word
            } else {
                // A line that begins with these would be a macro.
                lines.append((word.hasPrefix(".") || word.hasPrefix("'") ? "\\&" : "") + word)
            }
        }
        return lines
    }

    /// Running text; what stands between backquotes is bold.
    private static func plain(_ text: String) -> String {
        var result = "", isBold = false
        for part in text.split(separator: "`", omittingEmptySubsequences: false) {
            result +=
                isBold ? "\\fB\(escaped(String(part), isLiteral: true))\\fR" : escaped(String(part), isLiteral: false)
            isBold.toggle()
        }
        return result
    }

    /// A word of a macro's line, which is no macro's name itself and no punctuation.
    private static func argument(_ text: String) -> String {
        let word = escaped(text, isLiteral: true)
        return word.contains(" ") ? "\"\(word)\"" : word.count < 4 && word.first?.isLetter == true ? "\\&" + word : word
    }

    /// - Parameter isLiteral: whether hyphens are copied unchanged; in running text those of options are.
    private static func escaped(_ text: String, isLiteral: Bool) -> String {
        var result = ""
        var before: Unicode.Scalar = " "
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\\": result += "\\e"
            case "-" where isLiteral || before == " " || before == "-" || before == "(" || before == ",":
                result += "\\-"
            case "'" where isLiteral: result += "\\(aq"
            case "`": result += "\\(ga"
            case _ where scalar.value > 0x7e: result += "\\[u\(hexadecimal(scalar.value))]"
            default: result.unicodeScalars.append(scalar)
            }
            before = scalar
        }
        return isLiteral && (result.hasPrefix(".") || result.hasPrefix("'")) ? "\\&" + result : result
    }

    private static func hexadecimal(_ number: UInt32) -> String {
        let digits = String(number, radix: 16, uppercase: true)
        return String(repeating: "0", count: max(0, 4 - digits.count)) + digits
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Linux

/// How the shells complete the values of `swkvm run`'s options that the parser has no word for.
///
/// The parser's scripts call a shell's command for such a value, and this one is a function of the script itself
/// (``CompletionScript``), which is called in place.
enum ValueCompletion {
    /// Parts that are separated by commas.
    /// - Parameters:
    ///   - first: whether the first part is a file's path.
    ///   - keys: `ro`, a word; `serial=`, with a value of one's own; `cache=writeback/none`, with one of these;
    ///     `key-file=@file`, with a path
    ///     (or `@dir`, or the name of a `@tap` or a `@bridge`). `+` before a key lets it be given again; `%fd/mtu`
    ///     behind it keeps it
    ///     from being offered beside these.
    static func list(file first: Bool = false, _ keys: [String]) -> CompletionKind {
        .shellCommand("\(CompletionScript.listFunction) \(first ? "file" : "none") \(keys.joined(separator: " "))")
    }

    /// One of several words, a word and a colon before a path (`unix+@file`), or a path (`@file`).
    /// - Parameter keys: those of a list that may follow, as in ``list(file:_:)``; `%word` keeps one from being offered
    ///   behind that word. Where there are keys, a comma in a path is written twice.
    static func one(of words: [String], then keys: [String] = []) -> CompletionKind {
        let tokens = words + (keys.isEmpty ? [] : ["--"]) + keys
        return .shellCommand("\(CompletionScript.wordFunction) \(tokens.joined(separator: " "))")
    }
}

/// The completion scripts: the parser's, with what it lacks.
///
/// In bash, words are taken as the shell cuts them: the parser takes what readline cuts, at `=` and `:` too. In zsh,
/// `--option=value` is
/// completed as `--option value` is. Values that are lists are completed part by part in both.
enum CompletionScript {
    static let listFunction = "__swkvm_list", wordFunction = "__swkvm_word"

    /// The script that `--generate-completion-script` asks for; nil when something else is asked for, or a shell that
    /// is not known.
    /// - Parameter words: the command line after the program's name.
    static func asked(for words: [String]) -> String? {
        let option = "--generate-completion-script"
        guard let first = words.first, first.hasPrefix(option), words.count < 3 else { return nil }
        let name =
            first.hasPrefix(option + "=")
            ? String(first.dropFirst(option.count + 1)) : words.count == 2 ? words[1] : nil
        guard first == option || first.hasPrefix(option + "=") else { return nil }
        return (name.map { CompletionShell(rawValue: $0) } ?? CompletionShell.autodetected()).map(text)
    }

    static func text(for shell: CompletionShell) -> String {
        let generated = Command.completionScript(for: shell)
        return switch shell {
        case .bash: bash(generated)
        case .zsh: zsh(generated)
        default: fish(generated)
        }
    }

    // MARK: bash

    private static func bash(_ generated: String) -> String {
        var lines: [Substring] = []
        for line in generated.split(separator: "\n", omittingEmptySubsequences: false) {
            if let call = call(in: line, between: "__swkvm_add_completions -W \"$(eval '", and: "')\"") {
                lines.append(line.prefix { $0 == " " } + call)
            } else if !line.hasPrefix("complete ") {
                lines.append(line)
            }
        }
        return CreateCompletion.bash(lines).joined(separator: "\n") + "\n" + bashHelp + "\n" + bashFunctions + "\n"
    }

    /// Instead of the parser's function, which offers nothing behind `swkvm help`.
    private static var bashHelp: String {
        """
        _swkvm_help() {
            local -r count="${#unparsed_words[@]}"
            local -r place="${unparsed_words[*]:0:count > 0 ? count - 1 : 0}"
            local names=''
            case "${place}" in
        \(CommandNames.branches { "names='\($0)'" })
            esac
            COMPREPLY+=($(compgen -W "${names}" -- "${cur}"))
        }
        """
    }

    // MARK: zsh

    private static func zsh(_ generated: String) -> String {
        var lines: [Substring] = []
        var function: Substring = ""
        for line in generated.split(separator: "\n", omittingEmptySubsequences: false) {
            if line.hasSuffix("() {") {
                function = line
                if line == "_swkvm_help() {" { lines.append(Substring(zshHelp)) }
            }
            if function == "_swkvm_help() {" {
                if line == "}" { function = "" }
                continue
            }
            if function == "_swkvm_image_snapshot() {", line.hasSuffix("'(-): :->command'") {
                // As qemu-img has it, which the parser's script does not know.
                for (letter, name) in [("l", ""), ("c", ":name: "), ("a", ":name: "), ("d", ":name: ")] {
                    lines.append("        '(- 1 *)-\(letter)[As qemu-img snapshot -\(letter).]\(name):file:_files'")
                }
            }
            if line.hasPrefix("#compdef") {
                lines += [line, Substring(zshFunctions)]
                continue
            }
            let line = excluding(withAttachedValues(line), in: function)
            if let call = call(
                in: line, between: "{local -a list;list=(${(f)\"$(", and: ")\"});_describe -V \"\" list}")
            {
                lines.append(line.prefix(upTo: line.firstOccurrence(of: "{local -a list")!.lowerBound) + "{\(call)}'")
            } else {
                lines.append(line)
            }
        }
        return CreateCompletion.zsh(lines).joined(separator: "\n")
    }

    /// Instead of the parser's function, as for bash.
    private static var zshHelp: String {
        """
        _swkvm_help() {
            local -a names
            case "${(j: :)words[2,CURRENT - 1]}" in
        \(CommandNames.branches { "names=(\($0))" })
            esac
            compadd -a names
        }
        """
    }

    /// With the options named that are refused beside it.
    private static func excluding(_ line: Substring, in function: Substring) -> Substring {
        let isRebase = function == "_swkvm_image_rebase() {"
        for (option, others) in [
            ("--iter-time", "--iterations"), ("--iterations", "--iter-time"), ("--no-backing", "-b --backing"),
        ]
        where line.firstOccurrence(of: "'\(option)") != nil && (isRebase || option != "--no-backing") {
            return Substring(line.replacing(first: "'\(option)", with: "'(\(others))\(option)"))
        }
        return isRebase
            ? Substring(line.replacing(first: "'(-b --backing)'", with: "'(-b --backing --no-backing)'")) : line
    }

    /// `'--name[Text]:value:…'` as `'--name=[Text]:value:…'`, and `{-f,--format}'[Text]:…'` as
    /// `{-f+,--format=}'[Text]:…'`: a value may
    /// also be in the same word.
    private static func withAttachedValues(_ line: Substring) -> Substring {
        guard line.firstOccurrence(of: "]:") != nil, let end = line.firstOccurrence(of: "[")?.lowerBound else {
            return line
        }
        let names = line[..<end]
        if let open = names.firstOccurrence(of: "'{")?.upperBound,
            let close = names.firstOccurrence(of: "}'")?.lowerBound
        {
            let attached = names[open..<close].split(separator: ",").map { $0 + ($0.hasPrefix("--") ? "=" : "+") }
            return names[..<open] + attached.joined(separator: ",") + line[close...]
        }
        guard let start = names.firstOccurrence(of: "-")?.lowerBound, names.last != "'" else { return line }
        // With a value in the same word, or without one.
        if ["--hugepages", "--rng"].contains(names[start...]) {
            return names + "=-" + line[end...].replacing(first: "]:", with: "]::")
        }
        return names + (names[start...].hasPrefix("--") ? "=" : "+") + line[end...]
    }

    // MARK: fish

    /// Lists are files there, as most of them begin with one; those of words alone are these words.
    private static func fish(_ generated: String) -> String {
        var lines: [Substring] = []
        for line in generated.split(separator: "\n", omittingEmptySubsequences: false) {
            // An option has `-r` before it, an argument has not.
            guard let start = line.firstOccurrence(of: "fka '(__swkvm_"),
                let end = line.firstOccurrence(of: ")'", in: start.upperBound)
            else {
                lines.append(line)
                continue
            }
            let call = line[start.upperBound..<end.lowerBound].split(separator: " ")
            let completion: String
            if call.starts(with: ["list", "none"]) {
                let words = call.dropFirst(2).map { $0.prefix { $0 != "%" } }
                completion = words.contains { $0.contains("=") } ? "f" : "fka '\(words.joined(separator: " "))'"
            } else {
                completion = "F"
            }
            lines.append(line[..<start.lowerBound] + completion + line[end.upperBound...])
        }
        return lines.joined(separator: "\n")
    }

    // MARK: Helpers

    /// The call of one of the script's own functions in a line of the parser's.
    private static func call(in line: Substring, between before: String, and after: String) -> Substring? {
        guard let start = line.firstOccurrence(of: before)?.upperBound,
            let end = line.firstOccurrence(of: after, in: start)?.lowerBound
        else { return nil }
        let call = line[start..<end]
        return call.hasPrefix(listFunction) || call.hasPrefix(wordFunction) ? call : nil
    }
}

extension Substring {
    fileprivate func firstOccurrence(of text: String, in start: Index) -> Range<Index>? {
        self[start...].firstOccurrence(of: text)
    }
}

/// The names of commands that `swkvm help` explains.
private struct CommandNames {
    /// What stands behind `help` already, `image` say.
    let place: String
    /// What may follow.
    let names: [String]

    /// The branches of a shell's `case` over the places.
    /// - Parameter assignment: of the names, which are separated by blanks.
    static func branches(_ assignment: (String) -> String) -> String {
        all(below: Command.self).map { "    '\($0.place)') \(assignment($0.names.joined(separator: " "))) ;;" }
            .joined(separator: "\n")
    }

    /// Those of a command's subcommands, then those of their own.
    static func all(below command: any ParsableCommand.Type, place: [String] = []) -> [CommandNames] {
        let shown = command.configuration.subcommands.filter { $0.configuration.shouldDisplay }
        guard !shown.isEmpty else { return [] }
        var found = [CommandNames(place: place.joined(separator: " "), names: shown.map { $0._commandName })]
        for subcommand in shown { found += all(below: subcommand, place: place + [subcommand._commandName]) }
        return found
    }
}

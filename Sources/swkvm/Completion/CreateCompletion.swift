// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// `swkvm create` takes the options of `swkvm run`, and some of its own, behind a name: the parser does not know them,
/// so its function for the shell is that of `run` with these changes.
enum CreateCompletion {
    private static let reserved = DefinitionCheck.reserved.map { "--\($0)" }

    /// What is added to lists of options in bash.
    private static let own = [
        ("non_repeating_flags=(", "--copy --progress --start"), ("non_repeating_options=(", "--disk-size"),
    ]

    /// - Parameter lines: of the script for bash.
    static func bash(_ lines: [Substring]) -> [Substring] {
        replacing(in: lines) { line in
            for (start, words) in own where line.hasPrefix("    " + start) {
                let given = line.dropFirst(4 + start.count).dropLast().split(separator: " ")
                    .filter { !reserved.contains(String($0)) }
                return ["    \(start)\(words) \(given.joined(separator: " ")))"]
            }
            switch line {
            case "    __swkvm_offer_flags_options 1": return ["    __swkvm_offer_flags_options 2"]
            // The image comes after the name.
            case "    1)": return ["    2)"]
            default: return [line]
            }
        }
    }

    /// - Parameter lines: of the script for zsh.
    static func zsh(_ lines: [Substring]) -> [Substring] {
        replacing(in: lines) { line in
            if reserved.contains(where: { line.hasPrefix("        '\($0)=[") }) { return [] }
            guard line == "    local -ar arg_specs=(" else { return [line] }
            return [
                line, "        ':name:'", "        '--disk-size=[Size of the disk.]:size:'",
                "        '--copy[Copy the image, instead of creating an overlay over it.]'",
                "        '--progress[Show how far a copy is.]'",
                "        '--start[Start the machine, too.]'",
            ]
        }
    }

    /// Puts the changed lines of the function for `run` in the place of the one for `create`.
    private static func replacing(in lines: [Substring], _ change: (Substring) -> [Substring]) -> [Substring] {
        guard let run = function("_swkvm_run() {", in: lines), let create = function("_swkvm_create() {", in: lines)
        else { return lines }
        var changed = lines
        changed.replaceSubrange(create, with: [lines[create.lowerBound]] + lines[run].dropFirst().flatMap(change))
        return changed
    }

    private static func function(_ head: Substring, in lines: [Substring]) -> Range<Int>? {
        guard let start = lines.firstIndex(of: head), let end = lines[start...].firstIndex(of: "}") else { return nil }
        return start..<end + 1
    }
}

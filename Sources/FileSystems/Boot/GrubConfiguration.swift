// SPDX-License-Identifier: Apache-2.0

/// The menu that a configuration of GRUB makes: what grub-mkconfig of the distributions writes is evaluated, with the
/// commands that choose and describe entries; all others succeed and do nothing.
struct GrubConfiguration {
    /// An entry of the menu, or a submenu.
    struct Entry {
        var title: String
        var id: String
        /// nil for an entry that boots no Linux, and for a submenu.
        var boot: Boot?
        var submenu: [Entry]?
    }

    struct Boot {
        var kernel: BootEntry.FileReference
        var initrds: [BootEntry.FileReference] = []
        var commandLine: String
    }

    private let disk: DiskContents
    private var variables: [String: String] = [:]
    private var functions: [String: [GrubCommand]] = [:]
    private var menu: [Entry] = []
    /// The arguments of `linux` and `initrd` of the entry that is evaluated.
    private var boot: Boot?
    private var status = true
    private var isInEntry = false
    /// Commands that were run and bytes that were made: what a configuration may cost is bounded.
    private var work = 0
    private var depth = 0
    private(set) var problems: [FileSystemError] = []
    private let file: String

    private static let maximumWork = 2_000_000
    private static let maximumDepth = 24
    static let maximumFile: UInt64 = 1 << 20
    private static let maximumEntries = 512

    /// Evaluates a configuration.
    /// - Parameters:
    ///   - place: the number of the place with the file.
    ///   - directory: that of the file.
    init(_ text: String, place: Int, directory: String, file: String, _ disk: DiskContents) throws(FileSystemError) {
        self.disk = disk
        self.file = file
        for name in [
            "menuentry_id", "menuentry_options", "default_font_path", "platform_search_hint", "timeout_style",
            "all_video_module", "200_final", "chainloader_bpb", "ntldr", "nativedisk_cmd",
        ] { variables["feature_" + name] = "y" }
        variables["grub_platform"] = "pc"
        variables["grub_cpu"] = "x86_64"
        variables["root"] = deviceName(place)
        variables["prefix"] = "(\(deviceName(place)))\(directory)"
        variables["config_directory"] = variables["prefix"]
        try run(GrubParser.parse(text, file: file))
    }

    /// The entries without those that boot nothing, in order, and which of them is the default.
    var entries: (list: [Entry], defaultIndex: Int) {
        var list: [Entry] = []
        func add(_ entries: [Entry], _ prefix: String) {
            for entry in entries {
                if let submenu = entry.submenu {
                    add(submenu, prefix + entry.title + " > ")
                } else if entry.boot != nil {
                    var entry = entry
                    entry.title = prefix + entry.title
                    list.append(entry)
                }
            }
        }
        add(menu, "")
        guard let chosen = selected(variables["default"] ?? "0", menu),
            let index = list.firstIndex(where: { $0.id == chosen.id && $0.title.hasSuffix(chosen.title) })
        else { return (list, 0) }
        return (list, index)
    }

    /// The entry that a value of `default` means: a number, a title or an id, with `>` behind that of a submenu.
    private func selected(_ name: String, _ entries: [Entry]) -> Entry? {
        var parts = name.split(separator: ">", omittingEmptySubsequences: false).map(String.init)
        guard let first = parts.first else { return nil }
        parts.removeFirst()
        let rest = parts.joined(separator: ">")
        let whole = entries.first { $0.id == name || $0.title == name }
        let entry =
            whole ?? Int(first).flatMap { entries.indices.contains($0) ? entries[$0] : nil }
            ?? entries.first { $0.id == first || $0.title == first }
        guard let entry else { return entries.first.flatMap { first == "0" ? nil : selected("0", [$0]) } }
        if let submenu = entry.submenu { return selected(rest.isEmpty ? "0" : rest, submenu) }
        return entry.boot == nil ? nil : entry
    }

    // MARK: Running

    private func problem(_ line: Int?, _ reason: String) -> FileSystemError {
        .configuration(file: file, line: line, reason: reason)
    }

    private mutating func spend(_ amount: Int, _ line: Int? = nil) throws(FileSystemError) {
        work += amount
        guard work <= Self.maximumWork else { throw problem(line, "it does not end (a loop?)") }
    }

    private mutating func run(_ commands: [GrubCommand]) throws(FileSystemError) {
        depth += 1
        defer { depth -= 1 }
        guard depth <= Self.maximumDepth else { throw problem(nil, "it is nested too deeply (a loop?)") }
        for command in commands {
            switch command {
            case .words(let words, let line): try run(words, line)
            case .ifElse(let branches, let otherwise): try run(branches, otherwise)
            case .function(let name, let body):
                try spend(1)
                functions[name] = body
            case .entry(let words, let body, let line): try addEntry(words, body, line)
            case .forLoop(let name, let words, let body):
                for value in try expand(words) {
                    try spend(1)
                    variables[name] = value
                    try run(body)
                }
            case .whileLoop(let condition, let isUntil, let body, let line):
                while true {
                    try spend(10, line)
                    try run(condition)
                    guard status != isUntil else { break }
                    try run(body)
                }
            }
        }
    }

    private mutating func run(
        _ branches: [(condition: [GrubCommand], body: [GrubCommand])], _ otherwise: [GrubCommand]
    ) throws(FileSystemError) {
        for branch in branches {
            try spend(1)
            try run(branch.condition)
            if status { return try run(branch.body) }
        }
        status = true
        try run(otherwise)
    }

    private mutating func expand(_ words: [GrubWord]) throws(FileSystemError) -> [String] {
        var result: [String] = []
        for word in words {
            var current: String? = word.isQuoted ? "" : nil
            for piece in word.pieces {
                switch piece {
                case .text(let text): current = (current ?? "") + text
                case .variable(let name, true): current = (current ?? "") + value(name)
                case .variable(let name, false):
                    let value = value(name)
                    for (index, part) in value.split(separator: " ", omittingEmptySubsequences: false).enumerated() {
                        if index > 0 {
                            if let word = current { result.append(word) }
                            current = nil
                        }
                        if !part.isEmpty { current = (current ?? "") + part }
                    }
                }
                try spend(1 + (current?.utf8.count ?? 0) / 16)
            }
            if let current { result.append(current) }
        }
        return result
    }

    private func value(_ name: String) -> String {
        switch name {
        case "?": status ? "0" : "1"
        // Entries of Ubuntu's cloud images boot without an initrd first, and with it after that has failed.
        case "initrdfail" where isInEntry: "1"
        // It is for one boot, and would have to be cleared on the disk, which is never written.
        case "next_entry": ""
        default: variables[name] ?? ""
        }
    }

    private mutating func run(_ words: [GrubWord], _ line: Int) throws(FileSystemError) {
        try spend(1, line)
        var words = try expand(words)
        guard let name = words.first else { return }
        words.removeFirst()
        if name == "!" {
            try run(words.map { GrubWord(pieces: [.text($0)], isQuoted: true) }, line)
            status.toggle()
            return
        }
        if let body = functions[name] {
            for (index, word) in words.enumerated() { variables["\(index + 1)"] = word }
            return try run(body)
        }
        status = true
        switch name {
        case "set", "export": for word in words { assign(word) }
        case "unset": for word in words { variables[word] = nil }
        case "[", "test": status = try GrubTest(name == "[" ? words.dropLast() : words[...]).value { self.file($0) }
        case "false": status = false
        // What asks the keyboard or the screen.
        case "keystatus", "sleep", "background_image", "cmp", "regexp", "chainloader", "loadfont": status = false
        case "load_env": try loadEnvironment(words)
        case "search", "search.fs_uuid", "search.fs_label", "search.file": search(name, words)
        case "configfile", "source", ".": try source(words.last, line)
        case "linux", "linux16", "linuxefi", "kernel": try setKernel(words, line)
        case "initrd", "initrd16", "initrdefi":
            for word in words where !word.hasPrefix("--") {
                if let file = reference(word) { boot?.initrds.append(file) }
            }
        case "blscfg": try addLoaderEntries()
        default: if isAssignment(name) { assign(name) }
        }
    }

    private func isAssignment(_ word: String) -> Bool {
        guard let equals = word.firstIndex(of: "=") else { return false }
        return word[..<equals].allSatisfy { $0.isLetter || $0.isNumber || $0 == "_" } && equals != word.startIndex
    }

    private mutating func assign(_ word: String) {
        guard let equals = word.firstIndex(of: "=") else { return }
        variables[String(word[..<equals])] = String(word[word.index(after: equals)...])
    }

    // MARK: Files

    /// `hd0,gpt2`, as GRUB calls a partition.
    private func deviceName(_ place: Int) -> String {
        guard let table = disk.table, let partition = disk.places[place].partition else { return "hd0" }
        return "hd0,\(table.kind == .gpt ? "gpt" : "msdos")\(partition.number)"
    }

    /// The place that a device's name means, whatever the number of the disk: this one is all there is.
    private func place(ofDevice name: String) -> Int? {
        let parts = name.split(separator: ",")
        guard let disk = parts.first, disk.hasPrefix("hd") else { return nil }
        guard parts.count > 1 else { return self.disk.table == nil ? 0 : nil }
        guard let number = Int(parts[parts.count - 1].drop { !$0.isNumber }) else { return nil }
        return self.disk.places.firstIndex { $0.partition?.number == number }
    }

    /// The file that a path means: on the device that it begins with, or on the root device.
    private func reference(_ path: String) -> BootEntry.FileReference? {
        var device = variables["root"] ?? "", rest = path[...]
        if path.hasPrefix("("), let close = path.firstIndex(of: ")") {
            device = String(path[path.index(after: path.startIndex)..<close])
            rest = path[path.index(after: close)...]
        }
        guard let place = place(ofDevice: device), rest.hasPrefix("/") else { return nil }
        return BootEntry.FileReference(place: place, path: String(rest))
    }

    private func file(_ path: String) -> FileNode? {
        guard let file = reference(path), let fileSystem = disk.places[file.place].fileSystem else { return nil }
        return try? fileSystem.find(file.path)
    }

    private func text(_ path: String) throws(FileSystemError) -> String? {
        guard let file = reference(path), let fileSystem = disk.places[file.place].fileSystem,
            let contents = try fileSystem.fileIfPresent(file.path)
        else { return nil }
        return String(decoding: try contents.all(limit: Self.maximumFile, path), as: UTF8.self)
    }

    private mutating func loadEnvironment(_ words: [String]) throws(FileSystemError) {
        var path = value("prefix") + "/grubenv", names: Set<String> = []
        var rest = words[...]
        while let word = rest.popFirst() {
            if word == "-f" || word == "--file" {
                path = rest.popFirst() ?? path
            } else if word.hasPrefix("--file=") {
                path = String(word.dropFirst(7))
            } else if !word.hasPrefix("-") {
                names.insert(word)
            }
        }
        try spend(100)
        guard let text = try text(path) else {
            status = false
            return
        }
        try spend(text.utf8.count / 16)
        for line in text.split(whereSeparator: \.isNewline) where !line.hasPrefix("#") {
            guard let equals = line.firstIndex(of: "=") else { continue }
            let name = String(line[..<equals])
            guard names.isEmpty || names.contains(name) else { continue }
            // A backslash stands before what would end the value.
            var value = "", isEscaped = false
            for character in line[line.index(after: equals)...] {
                if character == "\\", !isEscaped {
                    isEscaped = true
                } else {
                    value.append(character)
                    isEscaped = false
                }
            }
            variables[name] = value
        }
    }

    private mutating func search(_ name: String, _ words: [String]) {
        enum Kind { case uuid, label, file }
        var kind: Kind? =
            switch name {
            case "search.fs_uuid": .uuid
            case "search.fs_label": .label
            case "search.file": .file
            default: nil
            }
        var variable: String? = nil, wanted: String?
        var rest = words[...]
        while let word = rest.popFirst() {
            switch word {
            case "--fs-uuid", "-u": kind = .uuid
            case "--label", "--fs-label", "-l": kind = .label
            case "--file", "-f": kind = .file
            case "--set", "-s": variable = rest.popFirst()
            case "--hint", "-h": _ = rest.popFirst()
            default:
                if word.hasPrefix("--set=") {
                    variable = String(word.dropFirst(6))
                } else if !word.hasPrefix("-") {
                    // `search.fs_uuid UUID VARIABLE HINTS`
                    if wanted == nil {
                        wanted = word
                    } else if kind != nil, name != "search", variable == nil {
                        variable = word
                    }
                }
            }
        }
        guard let wanted, let kind else { return status = false }
        let found = disk.places.indices.first { index in
            guard let fileSystem = disk.places[index].fileSystem else { return false }
            switch kind {
            case .uuid: return fileSystem.uuid?.lowercased() == wanted.lowercased()
            case .label: return fileSystem.label == wanted
            case .file: return (try? fileSystem.find(wanted)) != nil
            }
        }
        work += 100
        guard let found else { return status = false }
        variables[variable ?? "root"] = deviceName(found)
    }

    private mutating func source(_ path: String?, _ line: Int) throws(FileSystemError) {
        try spend(1000, line)
        guard let path, let text = try text(path) else { return status = false }
        try spend(text.utf8.count / 8, line)
        let commands = try GrubParser.parse(text, file: path)
        if let slash = path.lastIndex(of: "/") { variables["config_directory"] = String(path[..<slash]) }
        try run(commands)
    }

    // MARK: Entries

    private mutating func addEntry(
        _ words: [GrubWord], _ body: [GrubCommand], _ line: Int
    ) throws(FileSystemError) {
        try spend(100, line)
        let words = try expand(words)
        let isSubmenu = words.first == "submenu"
        var title: String?, id: String?
        var rest = words.dropFirst()
        while let word = rest.popFirst() {
            switch word {
            case "--id": id = rest.popFirst()
            case "--class", "--users", "--hotkey", "--source": _ = rest.popFirst()
            default:
                if word.hasPrefix("--id=") {
                    id = String(word.dropFirst(5))
                } else if !word.hasPrefix("--"), title == nil {
                    title = word
                }
            }
        }
        guard let title, menu.count < Self.maximumEntries else { return }
        // What an entry sets is its own.
        var inside = self
        inside.menu = []
        inside.boot = nil
        inside.isInEntry = !isSubmenu
        inside.variables["chosen"] = id ?? title
        do throws(FileSystemError) { try inside.run(body) } catch {
            guard case .configuration = error else { throw error }
            inside.problems.append(error)
        }
        work = inside.work
        problems = inside.problems
        menu.append(
            Entry(
                title: title, id: id ?? title, boot: isSubmenu ? nil : inside.boot,
                submenu: isSubmenu ? inside.menu : nil))
    }

    private mutating func setKernel(_ words: [String], _ line: Int) throws(FileSystemError) {
        guard let path = words.first(where: { !$0.hasPrefix("--") }) else { return }
        guard let file = reference(path) else {
            throw problem(line, "the kernel \(path) is on a device that this disk does not have")
        }
        let arguments = words.drop { $0 != path }.dropFirst()
        boot = Boot(kernel: file, commandLine: arguments.joined(separator: " "))
    }

    /// Adds the entries of the Boot Loader Specification, as Fedora's GRUB does.
    private mutating func addLoaderEntries() throws(FileSystemError) {
        guard let place = place(ofDevice: value("root")) else { return status = false }
        for entry in try LoaderEntries.read(disk, place) {
            guard let linux = entry.linux, menu.count < Self.maximumEntries else { continue }
            try spend(1000)
            let options = try expandText(entry.options.joined(separator: " "))
            var initrds: [BootEntry.FileReference] = []
            for name in entry.initrds {
                let name = try expandText(name)
                if !name.isEmpty { initrds.append(LoaderEntries.reference(name, disk, place)) }
            }
            menu.append(
                Entry(
                    title: entry.title ?? entry.id, id: entry.id,
                    boot: Boot(
                        kernel: LoaderEntries.reference(linux, disk, place), initrds: initrds, commandLine: options)))
        }
    }

    /// A text with the values of the variables in it.
    private mutating func expandText(_ text: String) throws(FileSystemError) -> String {
        guard text.utf8.contains(UInt8(ascii: "$")) else { return text }
        let quoted = "\"" + text.filter { $0 != "\"" && $0 != "`" } + "\""
        guard case .words(let words, _)? = try GrubParser.parse(quoted, file: file).first else { return text }
        return trimmed(try expand(words).joined(separator: " "))
    }
}

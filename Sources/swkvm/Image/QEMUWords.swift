// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Inventory

/// A command line of `swkvm image` in qemu-img's spelling, put into ours: values that stand right behind their option
/// (`-fqcow2`), options that are called otherwise here, and those that have no effect. What swkvm does not have is an
/// error that names the replacement.
///
/// The table is in QEMUWords+Table.swift, and for people in docs/images.md.
struct QEMUWords {
    /// What becomes of an option of qemu-img.
    enum Treatment: Equatable {
        /// Ours is spelled alike.
        case same
        /// Ours has another name.
        case renamed(String)
        /// Accepted without effect.
        case noEffect
        /// What to use instead.
        case refused(String)
        /// A mode of the page cache, of what is read or written, that `convert` has one option for.
        case cache
        /// A cache mode for a command that has no cache option.
        case anyCache
        /// How many zero bytes `convert` leaves out.
        case sparseness
        /// A list of words for a new image's layout.
        case layout
        /// A snapshot's number or name, or `snapshot.id=` or `snapshot.name=` before it.
        case snapshot
    }

    struct Option: Equatable {
        /// `-f`, `--image-opts`.
        let name: String
        let takesValue: Bool
        let treatment: Treatment

        init(_ name: String, value: Bool, _ treatment: Treatment) {
            self.name = name
            self.takesValue = value
            self.treatment = treatment
        }

        static func flag(_ name: String, _ treatment: Treatment = .same) -> Option {
            Option(name, value: false, treatment)
        }
        static func value(_ name: String, _ treatment: Treatment = .same) -> Option {
            Option(name, value: true, treatment)
        }
    }

    /// The words after `swkvm`, with those of `swkvm image` translated.
    /// - Throws: `ValidationError` for what swkvm does not have, with a sentence that names it.
    static func translated(_ words: [String]) throws -> [String] {
        guard words.count >= 2, words[0] == "image" else { return words }
        let verb = words[1]
        if verb == "-V" { return ["image", "--version"] }
        if let instead = verbs[verb] { throw ValidationError("image has no \(verb): \(instead)") }
        if verb == "dd" { return ["image"] + (try copy(Array(words.dropFirst(2)))) }
        guard let options = options[verb] else { return words }
        var translation = QEMUWords(verb: verb, options: options)
        try translation.read(words.dropFirst(2))
        return ["image", verb] + translation.result
    }

    private let verb: String
    private let options: [Option]
    private var result: [String] = []
    private var cacheModes: [String] = []

    private init(verb: String, options: [Option]) {
        self.verb = verb
        self.options = options
    }

    private mutating func read(_ words: ArraySlice<String>) throws {
        var rest = words
        while let word = rest.popFirst() {
            if word == "--" {
                result.append(word)
                result += rest
                break
            }
            switch word.utf8 {
            case let text where text.starts(with: "--".utf8): try readLong(word, &rest)
            case let text where text.first == UInt8(ascii: "-"): try readShort(word, &rest)
            default: result.append(word)
            }
        }
        // One option is for both: around the page cache if either is to go there. Before everything else, so that a
        // `--` does not hide it.
        func isAsked(_ modes: String...) -> Bool { modes.contains(where: cacheModes.contains) }
        if isAsked("writethrough", "directsync") { result.insert("--sync", at: 0) }
        if isAsked("none", "directsync") {
            result.insert(contentsOf: ["--cache", "none"], at: 0)
        } else if isAsked("writeback", "writethrough") {
            result.insert(contentsOf: ["--cache", "writeback"], at: 0)
        }
    }

    private mutating func readLong(_ word: String, _ rest: inout ArraySlice<String>) throws {
        let (name, attached) = Self.halves(word)
        guard let option = options.first(where: { $0.name == name }) else { return result.append(word) }
        try apply(option, option.takesValue ? attached ?? rest.popFirst() : nil)
    }

    /// What is before the first equals sign of a word, and what is behind it. As bytes: to Unicode it can be one
    /// character with what follows.
    private static func halves(_ word: String) -> (name: String, value: String?) {
        guard let sign = word.utf8.firstIndex(of: UInt8(ascii: "=")) else { return (word, nil) }
        return (String(Substring(word.utf8[..<sign])), String(Substring(word.utf8[word.utf8.index(after: sign)...])))
    }

    /// Flags may stand together, and a value right behind its option.
    private mutating func readShort(_ word: String, _ rest: inout ArraySlice<String>) throws {
        var letters = word.dropFirst()
        while let letter = letters.first {
            guard let option = options.first(where: { $0.name == "-\(letter)" }) else {
                // Nothing of qemu-img's, or a size that is taken away: the parser knows.
                result.append("-\(letters)")
                return
            }
            letters.removeFirst()
            if option.takesValue {
                // Our parser's own way of attaching one.
                if letters.first == "=" { letters.removeFirst() }
                return try apply(option, letters.isEmpty ? rest.popFirst() : String(letters))
            }
            try apply(option, nil)
        }
        if word == "-" { result.append(word) }
    }

    private mutating func apply(_ option: Option, _ value: String?) throws {
        let values = value.map { [$0] } ?? []
        switch option.treatment {
        case .same: result += [option.name] + values
        case .renamed(let name): result += [name] + values
        case .noEffect: break
        case .refused(let instead): throw ValidationError("image \(verb) has no \(option.name): \(instead)")
        case .cache, .anyCache:
            guard let value, Self.cacheWords.contains(value) else {
                throw ValidationError(
                    "The value '\(value ?? "")' is invalid for \(option.name): expected \(Self.cacheWords.joined(separator: ", "))"
                )
            }
            if option.treatment == .cache { cacheModes.append(value) }
        case .sparseness:
            guard let value, let size = ByteSize(argument: value) else {
                throw ValidationError("The value '\(value ?? "")' is invalid for -S: expected a size, such as 4k")
            }
            if size.bytes == 0 {
                throw ValidationError(
                    "image convert has no -S 0: zeroes are not stored; --preallocation full allocates space for them"
                )
            }
        case .snapshot:
            let prefix = ["snapshot.id=", "snapshot.name="].first { value?.hasPrefix($0) == true }
            result += [option.name] + values.map { String($0.dropFirst(prefix?.count ?? 0)) }
        case .layout:
            guard let value else { return result.append("-o") }
            try readLayout(value)
        }
    }

    private static let cacheWords = ["none", "writeback", "unsafe", "writethrough", "directsync"]

    // MARK: - The layout of a new image

    private mutating func readLayout(_ list: String) throws {
        var known: [String] = []
        for (name, value) in OptionList(list).items {
            guard name != "help", name != "?" else {
                throw ValidationError(
                    "-o supports \(LayoutWords.names), and the qemu-img options listed in docs/images.md")
            }
            let text = value ?? "on"
            switch Self.layoutWords[name] {
            case .same?: known.append("\(name)=\(text)")
            case .renamed(let option)?: result += try renamed(option, name, text)
            case .noEffect?: break
            case .refused(let instead)?: throw ValidationError("image \(verb) has no -o \(name): \(instead)")
            default: throw ValidationError("-o \(name) is not recognized; expected \(LayoutWords.names)")
            }
        }
        if !known.isEmpty { result += ["-o", known.joined(separator: ",")] }
    }

    private func renamed(_ option: String, _ name: String, _ value: String) throws -> [String] {
        func isOn() throws -> Bool {
            guard let isOn = ["on": true, "off": false][value] else {
                throw ValidationError("The value '\(value)' is invalid for -o \(name): expected on or off")
            }
            return isOn
        }
        if verb == "convert", name.hasPrefix("data_file") {
            throw ValidationError(
                "image convert has no -o \(name): an external data file is not supported for conversion")
        }
        if verb == "convert", name == "size" {
            throw ValidationError("image convert has no -o size: swkvm image resize changes the new image")
        }
        switch name {
        case "data_file_raw", "encryption": return try isOn() ? [option] : []
        case "static": return ["-o", "subformat=\(try isOn() ? "static" : "dynamic")"]
        case "encrypt.format":
            guard value == "luks" else {
                throw ValidationError(
                    "image \(verb) has no -o encrypt.format=\(value): only encrypt.format=luks is supported"
                )
            }
            return [option]
        default: return [option, value]
        }
    }

    // MARK: - Verbs

    /// `dd` of a whole image is a conversion.
    private static func copy(_ words: [String]) throws -> [String] {
        var source: String?, target: String?, options: [String] = []
        var translation = QEMUWords(verb: "dd", options: ddOptions)
        try translation.read(words[...])
        for word in translation.result {
            let (name, value) = halves(word)
            guard let value, word.utf8.first != UInt8(ascii: "-") else {
                options.append(word)
                continue
            }
            switch name {
            case "if": source = value
            case "of": target = value
            case "bs": break
            case "count", "skip":
                throw ValidationError(
                    "image dd has no \(name)=: it copies the whole disk; convert to raw and extract a part with dd(1)"
                )
            default: throw ValidationError("image dd has no \(name)=; expected if= and of=")
            }
        }
        guard let source, let target else {
            throw ValidationError(
                "image dd takes if=FILE and of=FILE, and does the same as swkvm image convert --force FILE FILE")
        }
        return ["convert", "--force"] + options + [source, target]
    }
}

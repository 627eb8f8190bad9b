// SPDX-License-Identifier: Apache-2.0

/// An entry of the Boot Loader Specification, type 1: a file of `loader/entries`.
struct LoaderEntry {
    /// The file's name without `.conf` and without what counts attempts.
    let id: String
    private(set) var title: String?
    private(set) var version = ""
    private(set) var sortKey: String?
    private(set) var machine = ""
    private(set) var linux: String?
    private(set) var efi: String?
    private(set) var initrds: [String] = []
    private(set) var options: [String] = []
    private(set) var architecture: String?
    /// All attempts to boot it have failed.
    let isBad: Bool

    init(file: String, _ text: String) {
        let stem = file.hasSuffix(".conf") ? String(file.dropLast(5)) : file
        (id, isBad) = Self.withoutCounter(stem)
        for line in text.split(whereSeparator: \.isNewline) {
            let parts = line.split(maxSplits: 1, whereSeparator: { $0 == " " || $0 == "\t" })
            guard let key = parts.first, !key.hasPrefix("#") else { continue }
            let value = parts.count > 1 ? trimmed(parts[1]) : ""
            switch key {
            case "title": title = value
            case "version": version = value
            case "sort-key": sortKey = value
            case "machine-id": machine = value.lowercased()
            case "linux": linux = value
            case "efi", "uki": efi = value
            // Files that are words of one line are GRUB's way.
            case "initrd": initrds += value.split(separator: " ").map(String.init)
            case "options": options.append(value)
            case "architecture": architecture = value
            default: break
            }
        }
    }

    /// `name+2-1` is an entry with two attempts left.
    private static func withoutCounter(_ stem: String) -> (String, Bool) {
        guard let plus = stem.lastIndex(of: "+") else { return (stem, false) }
        let counter = stem[stem.index(after: plus)...].split(separator: "-", omittingEmptySubsequences: false)
        guard (1...2).contains(counter.count), counter.allSatisfy({ !$0.isEmpty && $0.allSatisfy(\.isNumber) }) else {
            return (stem, false)
        }
        return (String(stem[..<plus]), counter.count == 2 && counter[0].allSatisfy { $0 == "0" })
    }

    var isBootable: Bool {
        (linux != nil || efi != nil) && (architecture == nil || architecture?.lowercased() == "x64")
    }

    /// The order of menus: entries that have a sort key first, by it, the newest version of each first.
    static func isBefore(_ left: LoaderEntry, _ right: LoaderEntry) -> Bool {
        if left.isBad != right.isBad { return right.isBad }
        if (left.sortKey == nil) != (right.sortKey == nil) { return left.sortKey != nil }
        if let first = left.sortKey, let second = right.sortKey {
            if first != second { return first < second }
            if left.machine != right.machine { return left.machine < right.machine }
            let order = compareVersions(left.version, right.version)
            if order != 0 { return order > 0 }
        }
        return compareVersions(left.id, right.id) > 0
    }
}

/// What precedes what as a version: runs of digits by their number, other runs as text; `~` precedes the end.
func compareVersions(_ left: String, _ right: String) -> Int {
    var first = Array(left.utf8)[...], second = Array(right.utf8)[...]
    func isDigit(_ byte: UInt8) -> Bool { (0x30...0x39).contains(byte) }
    func isLetter(_ byte: UInt8) -> Bool { (0x41...0x5a).contains(byte & 0xdf) }
    func isOther(_ byte: UInt8) -> Bool { !isDigit(byte) && !isLetter(byte) && byte != UInt8(ascii: "~") }
    while true {
        first = first.drop(while: isOther)
        second = second.drop(while: isOther)
        let tilde = (first.first == UInt8(ascii: "~"), second.first == UInt8(ascii: "~"))
        if tilde.0 || tilde.1 {
            if tilde.0 != tilde.1 { return tilde.0 ? -1 : 1 }
            first = first.dropFirst()
            second = second.dropFirst()
            continue
        }
        guard let one = first.first, let other = second.first else {
            return first.isEmpty == second.isEmpty ? 0 : first.isEmpty ? -1 : 1
        }
        if isDigit(one) || isDigit(other) {
            // A number is newer than letters.
            guard isDigit(one), isDigit(other) else { return isDigit(one) ? 1 : -1 }
            let a = first.prefix(while: isDigit).drop { $0 == 0x30 },
                b = second.prefix(while: isDigit).drop { $0 == 0x30 }
            if a.count != b.count { return a.count < b.count ? -1 : 1 }
            if !a.elementsEqual(b) { return a.lexicographicallyPrecedes(b) ? -1 : 1 }
            first = first.drop(while: isDigit)
            second = second.drop(while: isDigit)
        } else {
            let a = first.prefix(while: isLetter), b = second.prefix(while: isLetter)
            if !a.elementsEqual(b) { return a.lexicographicallyPrecedes(b) ? -1 : 1 }
            first = first.dropFirst(a.count)
            second = second.dropFirst(b.count)
        }
    }
}

/// Indicates whether a name matches a pattern with `*` and `?`.
func matches(_ name: String, pattern: String) -> Bool {
    let name = Array(name.unicodeScalars), pattern = Array(pattern.unicodeScalars)
    var position = 0, index = 0, star: Int?, mark = 0
    while position < name.count {
        if index < pattern.count, pattern[index] == "*" {
            (star, mark) = (index, position)
            index += 1
        } else if index < pattern.count, pattern[index] == "?" || pattern[index] == name[position] {
            position += 1
            index += 1
        } else if let last = star {
            // The star takes one more.
            mark += 1
            (position, index) = (mark, last + 1)
        } else {
            return false
        }
    }
    return pattern[index...].allSatisfy { $0 == "*" }
}

/// Without spaces at both ends.
func trimmed(_ text: some StringProtocol) -> String {
    var rest = Substring(text)
    while rest.first?.isWhitespace == true { rest.removeFirst() }
    while rest.last?.isWhitespace == true { rest.removeLast() }
    return String(rest)
}

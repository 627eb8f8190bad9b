// SPDX-License-Identifier: Apache-2.0

/// `extlinux.conf`, `syslinux.cfg`: labels with a kernel, an initrd and a command line.
struct ExtlinuxConfiguration {
    struct Label {
        var name: String
        var title: String?
        var kernel: String?
        var initrds: [String] = []
        var append: String?
    }

    private(set) var labels: [Label] = []
    private(set) var defaultLabel: String?
    /// For labels that have none of their own.
    private var append = ""
    private var lines = 0

    private static let maximumLabels = 512
    private static let maximumLines = 20000

    /// - Parameter include: the text of another file; nil where there is none.
    init(_ text: String, include: (String) throws(FileSystemError) -> String?) throws(FileSystemError) {
        try read(text, depth: 0, include)
        for index in labels.indices where labels[index].append == nil { labels[index].append = append }
    }

    private mutating func read(
        _ text: String, depth: Int, _ include: (String) throws(FileSystemError) -> String?
    ) throws(FileSystemError) {
        for line in text.split(whereSeparator: \.isNewline) {
            lines += 1
            guard lines <= Self.maximumLines else {
                throw .tooLarge(what: "extlinux.conf", size: UInt64(lines), limit: UInt64(Self.maximumLines))
            }
            let parts = trimmed(line).split(maxSplits: 1, whereSeparator: \.isWhitespace)
            guard let key = parts.first?.lowercased(), !key.hasPrefix("#") else { continue }
            let value = parts.count > 1 ? trimmed(parts[1]) : ""
            switch key {
            case "default": defaultLabel = defaultLabel ?? value
            case "label":
                guard labels.count < Self.maximumLabels else { return }
                labels.append(Label(name: value))
            case "include":
                guard depth < 8 else { continue }
                if let text = try include(value) { try read(text, depth: depth + 1, include) }
            case "menu": readMenu(value)
            case "append":
                // A hyphen is nothing, also where all others have something.
                let words = value == "-" ? "" : value
                if labels.isEmpty { append = words } else { labels[labels.count - 1].append = words }
            default:
                guard !labels.isEmpty else { continue }
                switch key {
                case "kernel", "linux": labels[labels.count - 1].kernel = value
                case "initrd": labels[labels.count - 1].initrds = value.split(separator: ",").map(String.init)
                default: break
                }
            }
        }
    }

    private mutating func readMenu(_ value: String) {
        let parts = value.split(maxSplits: 1, whereSeparator: \.isWhitespace)
        guard let key = parts.first?.lowercased(), !labels.isEmpty else { return }
        switch key {
        // A circumflex marks a key.
        case "label" where parts.count > 1: labels[labels.count - 1].title = parts[1].filter { $0 != "^" }
        case "default": defaultLabel = labels[labels.count - 1].name
        default: break
        }
    }
}

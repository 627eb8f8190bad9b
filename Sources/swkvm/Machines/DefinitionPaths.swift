// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Inventory
internal import Linux

/// Paths of a command line as they are stored in a definition: a machine is started from another directory.
enum DefinitionPaths {
    /// Options of `swkvm run` whose value is a path.
    private static let paths: Set<String> = [
        "initrd", "ssh-key", "password-file", "user-data", "meta-data", "network-config", "metrics",
    ]
    /// Words of an option's list whose value is a path.
    private static let words: Set<String> = ["key-file", "data-file", "backing-dir", "log"]

    /// Files of the host that a machine is started with, and that are not there.
    static func missing(in definition: Definition) -> [String] {
        let files = definition.options.compactMap { option -> String? in
            guard let value = option.value else { return nil }
            switch option.name {
            case "kernel": return value == RunCommand.bundled ? nil : value
            case "initrd": return value
            case "disk":
                var list = OptionList(value)
                let path = list.takeFirst()
                return isRemote(path) ? nil : path
            default: return nil
            }
        }
        return files.filter { fileStatus(ofPath: $0) == nil && errno == ENOENT }
    }

    private static func isRemote(_ disk: String) -> Bool {
        ["nbd:", "nbds:", "nbd+", "nbds+"].contains { disk.hasPrefix($0) }
    }

    static func absolute(_ option: Definition.Option) -> Definition.Option {
        guard let value = option.value else { return option }
        switch option.name {
        case "kernel" where value != RunCommand.bundled: return Definition.Option(option.name, absolute(value))
        case let name where paths.contains(name): return Definition.Option(name, absolute(value))
        case "disk": return Definition.Option(option.name, absolute(list: value) { absolute(disk: $0) })
        case "vsock":
            let items = OptionList(value).items.map { key, value in
                key == "path" ? "path=" + absolute(value ?? "").commaDoubled : absolute(key, value)
            }
            return Definition.Option(option.name, items.joined(separator: ","))
        case "cgroup", "firmware", "metadata":
            return Definition.Option(option.name, absolute(list: value) { absolute($0) })
        case "console", "gdb", "net":
            return Definition.Option(
                option.name,
                absolute(list: value) { first in
                    for prefix in ["unix:", "file:", "stream="] {
                        if let path = first.path(after: prefix) { return prefix + absolute(path) }
                    }
                    return first
                })
        default: return option
        }
    }

    /// A path from the root.
    static func absolute(_ path: String) -> String {
        guard path.utf8.first != UInt8(ascii: "/"), let here = currentDirectory else { return path }
        return (here == "/" ? "" : here) + "/" + path
    }

    /// A word of a list, with what is doubled in it.
    static func absolute(_ key: String, _ value: String?) -> String {
        guard let value else { return key.commaDoubled }
        return key.commaDoubled + "=" + (words.contains(key) ? absolute(value) : value).commaDoubled
    }

    private static func absolute(disk: String) -> String {
        // Remote disks have no path here.
        isRemote(disk) ? disk : absolute(disk)
    }

    private static func absolute(list: String, _ first: (String) -> String) -> String {
        var items = OptionList(list)
        let head = first(items.takeFirst()).commaDoubled
        return ([head] + items.items.map { absolute($0.key, $0.value) }).joined(separator: ",")
    }

    private static var currentDirectory: String? {
        // The kernel's own text, which is freed.
        guard let path = unsafe getcwd(nil, 0) else { return nil }
        defer { unsafe free(path) }
        return unsafe String(raw: UnsafeBufferPointer(start: path, count: strlen(path)).map { UInt8(bitPattern: $0) })
    }
}

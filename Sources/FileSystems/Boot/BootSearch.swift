// SPDX-License-Identifier: Apache-2.0

/// The entries of the Boot Loader Specification in a file system.
enum LoaderEntries {
    private static let directories = ["/loader/entries", "/boot/loader/entries"]
    private static let maximumEntries = 256

    /// The entries that can be booted, in the order of menus.
    static func read(_ disk: DiskContents, _ place: Int) throws(FileSystemError) -> [LoaderEntry] {
        guard let fileSystem = disk.places[place].fileSystem else { return [] }
        var entries: [LoaderEntry] = []
        for directory in directories {
            for name in try fileSystem.names(in: directory).filter({ $0.hasSuffix(".conf") }).prefix(maximumEntries) {
                guard let file = try fileSystem.fileIfPresent("\(directory)/\(name)") else { continue }
                let text = try file.all(limit: 64 << 10, "\(directory)/\(name)")
                entries.append(LoaderEntry(file: name, String(decoding: text, as: UTF8.self)))
            }
            if !entries.isEmpty { break }
        }
        return entries.filter(\.isBootable).sorted(by: LoaderEntry.isBefore)
    }

    /// A file that an entry names: from the root of its file system, or from `/boot` where that is a directory of it.
    static func reference(_ path: String, _ disk: DiskContents, _ place: Int) -> BootEntry.FileReference {
        let path = path.hasPrefix("/") ? path : "/" + path
        let fileSystem = disk.places[place].fileSystem
        let isBelow = fileSystem.map { (try? $0.find(path)) == nil && (try? $0.find("/boot" + path)) != nil } ?? false
        return BootEntry.FileReference(place: place, path: isBelow ? "/boot" + path : path)
    }
}

/// Searches a disk for what boots.
struct BootSearch {
    private let disk: DiskContents
    private(set) var entries: [BootEntry] = []
    private(set) var defaultIndex = 0
    private(set) var problems: [FileSystemError] = []

    static let looked = [
        "grub.cfg", "loader/entries", "EFI/Linux/*.efi", "extlinux.conf", "syslinux.cfg", "vmlinuz",
    ]

    init(_ disk: DiskContents) { self.disk = disk }

    /// What a disk has of systemd-boot comes first, if that is installed, since nothing else would have put it there;
    /// then GRUB. The default is the first group's.
    mutating func run() throws(FileSystemError) {
        let hasManager = try hasBootManager()
        if hasManager { try addLoaderEntries() }
        try addGrub()
        if !hasManager {
            if entries.isEmpty { try addLoaderEntries() } else { try addUnified([]) }
        }
        try addExtlinux()
        if entries.isEmpty { try addLinks() }
    }

    /// Goes on after a damaged or unknown file; what cannot be read at all is an error.
    private mutating func attempt(_ body: (inout BootSearch) throws(FileSystemError) -> Void) throws(FileSystemError) {
        do throws(FileSystemError) { try body(&self) } catch {
            if case .unreadable = error { throw error }
            problems.append(error)
        }
    }

    private var places: [(index: Int, fileSystem: any FileSystem)] {
        disk.places.enumerated().compactMap { index, place in place.fileSystem.map { (index, $0) } }
    }

    private func source(_ path: String, _ place: Int) -> String {
        disk.table == nil ? path : "\(path) in \(disk.places[place].description)"
    }

    private mutating func add(_ group: [BootEntry], defaultIndex: Int = 0) {
        if entries.isEmpty { self.defaultIndex = defaultIndex }
        entries += group
    }

    private static func text(_ fileSystem: any FileSystem, _ path: String) throws(FileSystemError) -> String? {
        guard let file = try fileSystem.fileIfPresent(path) else { return nil }
        return String(decoding: try file.all(limit: GrubConfiguration.maximumFile, path), as: UTF8.self)
    }

    // MARK: systemd-boot

    private func hasBootManager() throws(FileSystemError) -> Bool {
        for (_, fileSystem) in places {
            for path in ["/EFI/systemd/systemd-bootx64.efi", "/loader/loader.conf"] {
                let file = try? fileSystem.fileIfPresent(path)
                if file != nil { return true }
            }
        }
        return false
    }

    /// Adds entries of type 1 of all file systems, and unified kernels.
    private mutating func addLoaderEntries() throws(FileSystemError) {
        var group: [BootEntry] = []
        var pattern: String?
        for (index, fileSystem) in places {
            try attempt { (search) throws(FileSystemError) in
                if let text = try Self.text(fileSystem, "/loader/loader.conf") {
                    for line in text.split(whereSeparator: \.isNewline) {
                        let parts = line.split(maxSplits: 1, whereSeparator: \.isWhitespace)
                        if parts.first == "default", parts.count > 1 { pattern = trimmed(parts[1]) }
                    }
                }
                for entry in try LoaderEntries.read(search.disk, index) {
                    guard let linux = entry.linux else {
                        if let efi = entry.efi, let found = try search.unified(efi, index, fileSystem) {
                            group.append(found)
                        }
                        continue
                    }
                    group.append(
                        BootEntry(
                            title: [entry.title ?? entry.id, entry.version].filter { !$0.isEmpty }.joined(
                                separator: " "),
                            id: entry.id, kernel: LoaderEntries.reference(linux, search.disk, index),
                            initrds: entry.initrds.map { LoaderEntries.reference($0, search.disk, index) },
                            commandLine: entry.options.joined(separator: " "),
                            source: search.source("loader/entries/\(entry.id).conf", index)))
                }
            }
        }
        try addUnified(group, pattern)
    }

    /// Adds a group of entries with the unified kernels behind it.
    private mutating func addUnified(_ group: [BootEntry], _ pattern: String? = nil) throws(FileSystemError) {
        var group = group
        for (index, fileSystem) in places where disk.places[index].partition?.isEFISystem ?? true {
            try attempt { (search) throws(FileSystemError) in
                let names = try fileSystem.names(in: "/EFI/Linux").filter { $0.lowercased().hasSuffix(".efi") }
                for name in names.sorted(by: { compareVersions($0, $1) > 0 }).prefix(64) {
                    if let entry = try search.unified("/EFI/Linux/\(name)", index, fileSystem) { group.append(entry) }
                }
                if group.isEmpty, search.entries.isEmpty,
                    let entry = try search.unified("/EFI/BOOT/BOOTX64.EFI", index, fileSystem)
                {
                    group.append(entry)
                }
            }
        }
        let chosen = pattern.flatMap { pattern in
            group.firstIndex { matches($0.id, pattern: pattern) || matches($0.id + ".conf", pattern: pattern) }
        }
        add(group, defaultIndex: chosen ?? 0)
    }

    /// The entry of a unified kernel; nil for another program.
    private func unified(
        _ path: String, _ place: Int, _ fileSystem: any FileSystem
    ) throws(FileSystemError) -> BootEntry? {
        let path = path.hasPrefix("/") ? path : "/" + path
        guard let file = try fileSystem.fileIfPresent(path) else { return nil }
        let image = try UnifiedKernel(file, path)
        guard image[".linux"] != nil else { return nil }
        let name = String(path.split(separator: "/").last ?? "")
        let release = try image.text(".osrel", path) ?? ""
        let title = release.split(whereSeparator: \.isNewline).first { $0.hasPrefix("PRETTY_NAME=") }
            .map { $0.dropFirst(12).filter { $0 != "\"" && $0 != "'" } }
        let version = try image.text(".uname", path).map { " " + trimmed($0) } ?? ""
        func section(_ section: String) -> BootEntry.FileReference {
            BootEntry.FileReference(place: place, path: path, section: section)
        }
        return BootEntry(
            title: (title ?? name) + version, id: name, kernel: section(".linux"),
            initrds: [".ucode", ".initrd"].filter { image[$0] != nil }.map(section),
            commandLine: trimmed(try image.text(".cmdline", path) ?? ""), source: source(path, place))
    }

    // MARK: GRUB

    private mutating func addGrub() throws(FileSystemError) {
        let usual = ["/boot/grub/grub.cfg", "/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub2/grub.cfg"]
        for (index, fileSystem) in places {
            for path in usual where try addGrub(path, index, fileSystem) { return }
        }
        // What is in an EFI system partition leads to the other one.
        for (index, fileSystem) in places {
            for name in (try? fileSystem.names(in: "/EFI")) ?? [] {
                if try addGrub("/EFI/\(name)/grub.cfg", index, fileSystem) { return }
            }
        }
    }

    /// - Returns: whether it has entries.
    private mutating func addGrub(
        _ path: String, _ place: Int, _ fileSystem: any FileSystem
    ) throws(FileSystemError) -> Bool {
        var group: [BootEntry] = [], index = 0
        try attempt { (search) throws(FileSystemError) in
            guard let text = try Self.text(fileSystem, path) else { return }
            let directory = String(path[..<(path.lastIndex(of: "/") ?? path.startIndex)])
            let menu = try GrubConfiguration(
                text, place: place, directory: directory, file: search.source(path, place), search.disk)
            search.problems += menu.problems
            let (list, chosen) = menu.entries
            index = chosen
            group = list.compactMap { entry in
                entry.boot.map {
                    BootEntry(
                        title: entry.title, id: entry.id, kernel: $0.kernel, initrds: $0.initrds,
                        commandLine: $0.commandLine, source: search.source(path, place))
                }
            }
        }
        add(group, defaultIndex: index)
        return !group.isEmpty
    }

    // MARK: extlinux

    private mutating func addExtlinux() throws(FileSystemError) {
        let directories = ["/boot/extlinux", "/extlinux", "/boot/syslinux", "/syslinux", "/boot", ""]
        for (index, fileSystem) in places {
            for directory in directories {
                for name in ["extlinux.conf", "syslinux.cfg"] {
                    let path = "\(directory)/\(name)"
                    try attempt { (search) throws(FileSystemError) in
                        guard let text = try Self.text(fileSystem, path) else { return }
                        try search.addExtlinux(text, path, directory, index, fileSystem)
                    }
                }
            }
        }
    }

    private mutating func addExtlinux(
        _ text: String, _ path: String, _ directory: String, _ place: Int, _ fileSystem: any FileSystem
    ) throws(FileSystemError) {
        func absolute(_ name: String) -> String { name.hasPrefix("/") ? name : "\(directory)/\(name)" }
        let configuration = try ExtlinuxConfiguration(text) { (name) throws(FileSystemError) in
            try Self.text(fileSystem, absolute(name))
        }
        var group: [BootEntry] = [], index = 0
        for label in configuration.labels {
            guard let kernel = label.kernel else { continue }
            var initrds = label.initrds, words: [Substring] = []
            for word in (label.append ?? "").split(separator: " ") {
                // syslinux takes the initrd from the command line, too.
                if word.hasPrefix("initrd="), initrds.isEmpty {
                    initrds = word.dropFirst(7).split(separator: ",").map(String.init)
                } else {
                    words.append(word)
                }
            }
            if label.name == configuration.defaultLabel { index = group.count }
            group.append(
                BootEntry(
                    title: label.title ?? label.name, id: label.name,
                    kernel: BootEntry.FileReference(place: place, path: absolute(kernel)),
                    initrds: initrds.map { BootEntry.FileReference(place: place, path: absolute($0)) },
                    commandLine: words.joined(separator: " "), source: source(path, place)))
        }
        add(group, defaultIndex: index)
    }

    // MARK: Links

    /// A system without a boot loader may have the links that Debian's kernels make.
    private mutating func addLinks() throws(FileSystemError) {
        for (index, fileSystem) in places {
            for (kernel, initrd) in [("/vmlinuz", "/initrd.img"), ("/boot/vmlinuz", "/boot/initrd.img")] {
                try attempt { (search) throws(FileSystemError) in
                    guard try fileSystem.fileIfPresent(kernel) != nil else { return }
                    let hasInitrd = try fileSystem.fileIfPresent(initrd) != nil
                    let root = fileSystem.uuid.map { "root=UUID=\($0) ro" } ?? "root=/dev/vda ro"
                    search.add([
                        BootEntry(
                            title: kernel, id: kernel, kernel: BootEntry.FileReference(place: index, path: kernel),
                            initrds: hasInitrd ? [BootEntry.FileReference(place: index, path: initrd)] : [],
                            commandLine: root, source: search.source(kernel, index))
                    ])
                }
                if !entries.isEmpty { return }
            }
        }
    }
}

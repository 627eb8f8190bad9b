// SPDX-License-Identifier: Apache-2.0

/// An entry of a disk's boot menu.
public struct BootEntry: Sendable, Equatable {
    public var title: String
    /// What names it besides its number: an id of GRUB, a file's name, a label.
    public var id: String
    public var kernel: FileReference
    public var initrds: [FileReference] = []
    public var commandLine: String
    /// The file that defines it: `/boot/grub/grub.cfg in partition 1`.
    public var source: String

    /// A file of a file system of the disk.
    public struct FileReference: Sendable, Equatable {
        /// The number of the place (``DiskContents/places``).
        public var place: Int
        public var path: String
        /// The section of a unified kernel image; nil for all of the file.
        public var section: String?
    }
}

/// What an entry boots, to be read.
public struct BootFiles: Sendable {
    public let entry: BootEntry
    public let kernel: FileContents
    /// All initrds, one behind the other; nil without.
    public let initrd: FileContents?
}

/// The boot menu of a disk.
public struct BootMenu: Sendable {
    /// Never empty.
    public let entries: [BootEntry]
    /// The index of the one that boots unless another is requested.
    public let defaultIndex: Int
    /// What was not understood, in sentences.
    public let notes: [String]
    private let disk: DiskContents

    /// Reads the configuration of the boot loaders of a disk.
    /// - Throws: `nothingBoots` if nothing is found.
    public init(_ disk: DiskContents) throws(FileSystemError) {
        self.disk = disk
        var search = BootSearch(disk)
        try search.run()
        guard !search.entries.isEmpty else {
            if let problem = search.problems.first { throw problem }
            throw .nothingBoots(looked: BootSearch.looked, found: disk.found)
        }
        entries = search.entries
        defaultIndex = min(search.defaultIndex, search.entries.count - 1)
        notes = search.problems.map(\.description)
    }

    /// The files of an entry.
    /// - Parameter wanted: an entry's number, from 1, its id or its title; nil for the default.
    public func files(_ wanted: String?) throws(FileSystemError) -> BootFiles {
        let entry = entries[try index(wanted)]
        do throws(FileSystemError) {
            let kernel = try contents(entry.kernel)
            guard kernel.size > 0 else { throw .damaged(what: entry.kernel.path, reason: "it is empty") }
            var initrds: [FileContents] = []
            for file in entry.initrds { initrds.append(try contents(file)) }
            return BootFiles(
                entry: entry, kernel: kernel,
                initrd: initrds.isEmpty ? nil : initrds.count == 1 ? initrds[0] : FileContents(joining: initrds))
        } catch {
            if case .unreadable = error { throw error }
            throw .configuration(
                file: entry.source, line: nil, reason: "the entry '\(entry.title)' cannot be booted: \(error)")
        }
    }

    private func index(_ wanted: String?) throws(FileSystemError) -> Int {
        guard let wanted else { return defaultIndex }
        if let number = Int(wanted) {
            guard entries.indices.contains(number &- 1) else { throw .noEntry(wanted: wanted, count: entries.count) }
            return number - 1
        }
        guard let index = entries.firstIndex(where: { $0.id == wanted || $0.title == wanted }) else {
            throw .noEntry(wanted: "'\(wanted)'", count: entries.count)
        }
        return index
    }

    private func contents(_ file: BootEntry.FileReference) throws(FileSystemError) -> FileContents {
        guard disk.places.indices.contains(file.place), let fileSystem = disk.places[file.place].fileSystem else {
            throw .notFound(path: file.path, missing: file.path)
        }
        let contents = try fileSystem.file(file.path)
        guard let name = file.section else { return contents }
        guard let section = try UnifiedKernel(contents, file.path)[name] else {
            throw .damaged(what: file.path, reason: "it has no section \(name)")
        }
        return section
    }
}

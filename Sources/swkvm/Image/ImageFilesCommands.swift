// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import FileSystems
internal import Linux

/// The image, and the file system in it, of a verb that reads files.
struct FilesOptions: ParsableArguments {
    @Option(
        name: [.short, .long],
        help: ArgumentHelp("\(ImageFormat.names). Default: from the file extension.", valueName: "format"))
    var format: ImageFormat?

    @Option(
        help: ArgumentHelp(
            "Number of the partition. Default: the only one with a supported file system; of several, the one with /etc.",
            valueName: "n"),
        transform: wholeNumber(1...Int(Int32.max)))
    var partition: Int?

    @Flag(
        name: [.customShort("U"), .long],
        help: "Open an image that a running machine may be writing; the output may be inconsistent.")
    var forceShare = false

    @OptionGroup var data: DataFileOption
    @OptionGroup var named: NamedFilesOptions
    @OptionGroup var keys: KeyOptions
    @OptionGroup var vhd: VHDSizeOption

    /// Opens an image for reading, with its backing files.
    func open(_ image: String) throws(DiskImageError) -> ImageSource {
        var options = DiskImageOptions(
            format: format, readOnly: true, locking: !forceShare, dataFile: data.dataFile,
            namedFiles: try named.files(image, data.dataFile))
        vhd.apply(to: &options)
        options.keys = try keys.load()
        return ImageSource(ImageContents(try DiskImage(path: image, options: options)))
    }
}

/// A verb that reads files of an image.
protocol FilesVerb: ImageVerb {
    var files: FilesOptions { get }
    var image: String { get }
}

extension FilesVerb {
    static var options: OptionSyntax.VerbOptions { OptionSyntax.VerbOptions(canShare: true) }

    /// What is on the disk.
    func disk() throws -> DiskContents {
        let source = try attempt { () throws(DiskImageError) in try files.open(image) }
        return try reading { () throws(FileSystemError) in try DiskContents(source) }
    }

    /// The file system that is meant.
    func fileSystem() throws -> any FileSystem {
        let disk = try disk()
        return try reading { () throws(FileSystemError) in try disk.fileSystem(partition: files.partition) }
    }

    /// Reports an error in one line, and ends the program.
    func reading<Answer>(_ body: () throws(FileSystemError) -> Answer) throws -> Answer {
        do throws(FileSystemError) { return try body() } catch {
            StandardError().say("\(image): \(error.description.printable)")
            throw ExitCode(ImageTool.failure)
        }
    }
}

/// `swkvm image ls`: partitions of an image, and the files in its file systems.
struct ImageListCommand: FilesVerb {
    static let configuration = CommandConfiguration(
        commandName: "ls",
        abstract: "List the partitions of a disk image, or the files in a directory of it.",
        discussion: """
            Reads GPT and MBR partition tables, ext2, ext3, ext4 (with its journal replayed in memory) and FAT; the image is never changed, and \
            nothing is mounted.

            EXAMPLES
              swkvm image ls debian.qcow2
              swkvm image ls -l debian.qcow2 /boot
              swkvm image ls --partition 15 debian.qcow2 /EFI
            """)

    @Flag(name: [.customShort("l"), .long], help: "Show type, permissions, size and time of each file.")
    var long = false

    @OptionGroup var files: FilesOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    @Argument(help: "A path in its file system. Default: show the partitions.")
    var path: String?

    func run() throws {
        guard let path else { return try listPartitions() }
        let fileSystem = try fileSystem()
        let lines = try reading { () throws(FileSystemError) in
            let node = try fileSystem.find(path.rawBytes)
            guard node.kind == .directory else { return [try line(node, path.rawBytes, fileSystem)] }
            let entries = try fileSystem.entries(of: node).sorted { $0.name.lexicographicallyPrecedes($1.name) }
            var lines: [String] = []
            for entry in entries {
                lines.append(
                    long
                        ? try line(fileSystem.node(of: entry), entry.name, fileSystem)
                        : String(raw: entry.name).printable)
            }
            return lines
        }
        for line in lines { print(line) }
    }

    private func listPartitions() throws {
        let disk = try disk()
        if let note = disk.table?.note { StandardError().say("\(image): \(note)") }
        var rows = [["partition", "size", "file system", "UUID", "label", "name"]]
        for place in disk.places where files.partition == nil || place.partition?.number == files.partition {
            let kind = place.kind ?? (place.problem == nil ? "-" : "unreadable")
            let label = place.fileSystem?.label ?? ""
            let name = place.partition?.name ?? ""
            rows.append([
                place.partition.map { "\($0.number)" } ?? "-", place.partition.map { ImageTool.size($0.size) } ?? "-",
                kind,
                place.fileSystem?.uuid ?? "-", label.isEmpty ? "-" : label.printable,
                name.isEmpty ? "-" : name.printable,
            ])
            if let problem = place.problem { StandardError().say("\(image), \(place.description): \(problem)") }
        }
        for line in HelpTable.columns(rows) { print(line) }
    }

    private func line(
        _ node: FileNode, _ name: [UInt8], _ fileSystem: any FileSystem
    ) throws(FileSystemError) -> String {
        let name = String(raw: name).printable
        guard long else { return name }
        let kind =
            switch node.kind {
            case .file: "-"
            case .directory: "d"
            case .symbolicLink: "l"
            case .other: "?"
            }
        let bits = (0..<9).map { index in
            node.permissions >> UInt16(8 - index) & 1 != 0 ? ["r", "w", "x"][index % 3] : "-"
        }.joined()
        let size = "\(node.size)"
        let time = Timestamp.text(seconds: Int(node.modified), nanoseconds: 0).prefix(16).map { $0 == "T" ? " " : $0 }
        let target = node.kind == .symbolicLink ? " -> " + String(raw: try fileSystem.target(of: node)).printable : ""
        return kind + bits + " " + String(repeating: " ", count: max(0, 12 - size.count)) + size + " " + String(time)
            + " "
            + name + target
    }
}

/// `swkvm image cat`: a file of an image, on standard output.
struct ImageCatCommand: FilesVerb {
    static let configuration = CommandConfiguration(
        commandName: "cat",
        abstract: "Write a file of a disk image to standard output.",
        discussion: """
            EXAMPLE
              swkvm image cat debian.qcow2 /etc/os-release
            """)

    @OptionGroup var files: FilesOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    @Argument(help: "The file's path in its file system.")
    var path: String

    func run() throws {
        let fileSystem = try fileSystem()
        let output = try? FileDescriptor.duplicate(of: 1)
        try reading { () throws(FileSystemError) in
            switch output {
            case .some(let output): try FileExtraction(fileSystem).write(path, to: output)
            case nil: throw .host(path: "the output", reason: "it is closed")
            }
        }
    }
}

/// `swkvm image cp-out`: copies files out of an image.
struct ImageCopyOutCommand: FilesVerb {
    static let configuration = CommandConfiguration(
        commandName: "cp-out",
        abstract: "Copy a file or directory of a disk image to the host.",
        discussion: """
            A directory is copied with its contents. Nothing that exists is replaced; owners and times are not copied.

            EXAMPLES
              swkvm image cp-out debian.qcow2 /boot/vmlinuz-6.1.0-13-amd64 vmlinuz
              swkvm image cp-out debian.qcow2 /etc .
            """)

    @OptionGroup var files: FilesOptions

    @Argument(help: "The image.", completion: .file())
    var image: String

    @Argument(help: "The path in its file system.")
    var path: String

    @Argument(
        help: "The new file or directory, or a directory that exists. Default: here, with the same name.",
        completion: .file())
    var destination = "."

    func run() throws {
        let fileSystem = try fileSystem()
        try reading { () throws(FileSystemError) in
            var extraction = FileExtraction(fileSystem)
            try extraction.copy(path, to: destination)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import DiskImage
internal import Linux

/// `swkvm image snapshot`.
struct ImageSnapshotCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "snapshot",
        abstract: "Manage the internal snapshots of a qcow2 image.",
        discussion: """
            A snapshot is named by its number or, if no number matches, by its name. Each verb is atomic: it is done in full or not at all. \
            `swkvm run --disk FILE,ro,snapshot=NAME` and `swkvm image convert --snapshot NAME` read a snapshot without reverting to it.

            The options of qemu-img snapshot do the same: -l FILE, -c NAME FILE, -a NAME FILE, -d NAME FILE.
            """,
        subcommands: [List.self, Create.self, Apply.self, Delete.self, ByOption.self], defaultSubcommand: ByOption.self)

    struct Image: ParsableArguments {
        @Option(
            name: [.short, .long],
            help: ArgumentHelp(
                "The image's format, which must be qcow2. Default: from the file extension.", valueName: "format"),
            completion: .list(["qcow2"]))
        var format: ImageFormat?

        @OptionGroup var data: DataFileOption
        @OptionGroup var named: NamedFilesOptions

        @Argument(help: "The image.", completion: .file())
        var file: String

        func open(readOnly: Bool = false, forceShare: Bool = false) throws(DiskImageError) -> DiskEngine {
            // A raw disk is not taken for what its guest may have written to its start, here as little as elsewhere.
            try DiskImage.requireQCOW2(file, format: format) { known in
                "it is \(known.name) by \(format == nil ? "its name" : "--format"), and only qcow2 images have snapshots; use --format qcow2 if it is a qcow2 image"
            }
            var options = DiskImageOptions(
                format: .qcow2, readOnly: readOnly, locking: !forceShare, dataFile: data.dataFile,
                namedFiles: try named.files(file, data.dataFile))
            // Only tables change.
            options.opensData = false
            options.report = ImageTool.report
            return try DiskEngine(DiskImage(path: file, options: options), depth: 1)
        }
    }

    struct ForceShare: ParsableArguments {
        @Flag(
            name: [.customShort("U"), .long],
            help: "Open an image that a running machine may be writing; the output may be inconsistent.")
        var forceShare = false
    }

    struct List: ImageVerb {
        static let options = OptionSyntax.VerbOptions(canShare: true)
        static let configuration = CommandConfiguration(
            commandName: "list", abstract: "List an image's snapshots, the oldest first.")

        @OptionGroup var output: OutputOptions
        @OptionGroup var sharing: ForceShare
        @OptionGroup var image: Image

        func run() throws {
            let snapshots = try attempt { () throws(DiskImageError) in
                let engine = try image.open(readOnly: true, forceShare: sharing.forceShare)
                return try engine.snapshots()
            }
            if output.isJSON { return print(JSON.array(snapshots.map(ImageSnapshotCommand.json)).description) }
            ImageSnapshotCommand.show(snapshots)
        }
    }

    struct Create: ImageVerb {
        static let configuration = CommandConfiguration(
            commandName: "create", abstract: "Save the current state as a snapshot.")

        @OptionGroup var image: Image
        @Argument(help: "The snapshot's name.")
        var name: String

        func run() throws {
            try attempt { () throws(DiskImageError) in
                var engine = try image.open()
                try engine.createSnapshot(named: name)
            }
        }
    }

    struct Apply: ImageVerb {
        static let configuration = CommandConfiguration(
            commandName: "apply", abstract: "Revert to a snapshot. The current state is lost; the snapshot is kept.")

        @OptionGroup var image: Image
        @Argument(help: "The snapshot's number or name.")
        var name: String

        func run() throws {
            try attempt { () throws(DiskImageError) in
                var engine = try image.open()
                try engine.applySnapshot(name)
            }
        }
    }

    struct Delete: ImageVerb {
        static let configuration = CommandConfiguration(
            commandName: "delete", abstract: "Delete a snapshot and free the space that only it uses.")

        @OptionGroup var image: Image
        @Argument(help: "The snapshot's number or name.")
        var name: String

        func run() throws {
            try attempt { () throws(DiskImageError) in
                var engine = try image.open()
                try engine.deleteSnapshot(name)
            }
        }
    }

    /// The verbs as qemu-img's users type them.
    struct ByOption: ImageVerb {
        static let options = OptionSyntax.VerbOptions(canShare: true)
        static let configuration = CommandConfiguration(
            commandName: "by-option", abstract: "The verbs by qemu-img's options.", shouldDisplay: false)

        @Flag(name: .customShort("l"), help: "List the snapshots.")
        var lists = false
        @Option(name: .customShort("c"), help: ArgumentHelp("Create one.", valueName: "name"))
        var created: String?
        @Option(name: .customShort("a"), help: ArgumentHelp("Apply one.", valueName: "name"))
        var applied: String?
        @Option(name: .customShort("d"), help: ArgumentHelp("Delete one.", valueName: "name"))
        var deleted: String?
        @Flag(name: .customShort("q"), help: "Accepted for compatibility: only the list is ever printed.")
        var quiet = false
        @OptionGroup var sharing: ForceShare
        @OptionGroup var image: Image

        func validate() throws {
            guard !sharing.forceShare || lists else {
                throw ValidationError(
                    "The option -U can only be combined with -l: changes require exclusive access to the image.")
            }
            guard [created, applied, deleted].count(where: { $0 != nil }) + (lists ? 1 : 0) == 1 else {
                throw ValidationError("Specify list, create, apply or delete.")
            }
        }

        func run() throws {
            try attempt { () throws(DiskImageError) in
                var engine = try image.open(readOnly: lists, forceShare: sharing.forceShare)
                if let created { try engine.createSnapshot(named: created) }
                if let applied { try engine.applySnapshot(applied) }
                if let deleted { try engine.deleteSnapshot(deleted) }
                if lists { ImageSnapshotCommand.show(try engine.snapshots()) }
            }
        }
    }

    private static func show(_ snapshots: [DiskSnapshot]) {
        guard !snapshots.isEmpty else { return }
        print("ID        TAG               VM SIZE                DATE     VM CLOCK")
        for snapshot in snapshots { print(line(snapshot)) }
    }

    private static func json(_ snapshot: DiskSnapshot) -> JSON {
        .object([
            ("id", .string(snapshot.id)), ("name", .string(snapshot.name)),
            ("vm-state-size", .number(snapshot.stateSize)),
            ("disk-size", .number(snapshot.size)), ("date-sec", .number(UInt64(snapshot.seconds))),
            ("date-nsec", .number(UInt64(snapshot.nanoseconds))),
            ("vm-clock-sec", .number(snapshot.guestNanoseconds / 1_000_000_000)),
            ("vm-clock-nsec", .number(snapshot.guestNanoseconds % 1_000_000_000)),
        ])
    }

    /// A row in the columns of qemu-img.
    private static func line(_ snapshot: DiskSnapshot) -> String {
        func left(_ text: String, _ width: Int) -> String {
            text + String(repeating: " ", count: max(0, width - text.count))
        }
        func right(_ text: String, _ width: Int) -> String {
            String(repeating: " ", count: max(0, width - text.count)) + text
        }
        func two(_ number: some BinaryInteger) -> String { number < 10 ? "0\(number)" : "\(number)" }
        var seconds = time_t(snapshot.seconds)
        // The structure's pointer, to a time zone's name, is not used.
        var date = unsafe tm()
        _ = unsafe localtime_r(&seconds, &date)
        let when =
            unsafe "\(Int(date.tm_year) + 1900)-\(two(date.tm_mon + 1))-\(two(date.tm_mday)) \(two(date.tm_hour)):\(two(date.tm_min)):\(two(date.tm_sec))"
        let clock = snapshot.guestNanoseconds / 1_000_000
        let thousandths = String(clock % 1000)
        let ran =
            "\(two(clock / 3_600_000)):\(two(clock / 60000 % 60)):\(two(clock / 1000 % 60)).\(String(repeating: "0", count: 3 - thousandths.count))\(thousandths)"
        // Names are the image's, and may have what moves a terminal's cursor.
        let name = ImageTool.printable(snapshot.name)
        return [
            left(ImageTool.printable(snapshot.id), 9), left(name, 16), right(ImageTool.size(snapshot.stateSize), 8),
            right(when, 19), right(ran, 12),
        ].joined(separator: " ")
    }
}

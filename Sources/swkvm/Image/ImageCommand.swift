// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import DiskImage
internal import Linux

/// `swkvm image`: disk images without a machine. The work is done by `DiskImage`; a verb parses, calls it and prints.
struct ImageCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "image",
        abstract: "Create, inspect, convert and modify disk images.",
        discussion: """
            The supported formats are raw, qcow2, VMDK and VDI, and read-only VHD and VHDX. The format of a file is given by its extension \
            (.raw, .img, .qcow2, .vmdk, .vdi, .vhd, .vhdx) or by --format. It is never guessed from the contents; if --format is not given, \
            an image whose contents look like another format is refused. Verbs, options and output follow qemu-img. Some verbs have more exit statuses, which their own help lists.

            EXIT STATUS
              0    done
              1    failure
              64   the command line is wrong
            """,
        subcommands: [
            ImageCreateCommand.self, ImageInfoCommand.self, ImageCheckCommand.self, ImageConvertCommand.self,
            ImageCompareCommand.self,
            ImageMapCommand.self, ImageResizeCommand.self, ImageSnapshotCommand.self, ImageCommitCommand.self,
            ImageRebaseCommand.self,
            ImageBenchCommand.self, ImageListCommand.self, ImageCatCommand.self, ImageCopyOutCommand.self,
        ])
}

/// How the verbs of `swkvm image` end and what they print.
enum ImageTool {
    /// The status of a verb that could not do what was asked.
    static let failure: Int32 = 1

    /// Reports to the user what happens to an image, in a line on standard error.
    static let report: @Sendable (String) -> Void = { StandardError().say($0) }

    /// Text that comes from an image, safe for a terminal.
    static func printable(_ text: String) -> String { text.printable }

    /// `1.5 GiB`: three digits at most before the unit, as qemu-img shows sizes.
    static func size(_ bytes: UInt64) -> String {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
        var unit = 0
        while unit + 1 < units.count, bytes >> UInt64(10 * unit) >= 1000 { unit += 1 }
        guard unit > 0 else { return "\(bytes) B" }
        return "\(significant(bytes, in: UInt64(10 * unit))) \(units[unit])"
    }

    /// `1.5 GiB (1610612736 bytes)`.
    static func sizeAndBytes(_ bytes: UInt64) -> String { "\(size(bytes)) (\(bytes) bytes)" }

    /// A number of units of `1 << shift` with three significant digits, zeroes at the end left out.
    private static func significant(_ bytes: UInt64, in shift: UInt64) -> String {
        let whole = bytes >> shift
        // Digits after the point: 2 below 10, 1 below 100, none above.
        let digits: UInt64 = whole < 10 ? 100 : whole < 100 ? 10 : 1
        // As printf rounds: a half to the even digit.
        let scaled = UInt64((Double(bytes) / Double(UInt64(1) << shift) * Double(digits)).rounded(.toNearestOrEven))
        var after = scaled % digits, places = digits == 100 ? 2 : digits == 10 ? 1 : 0
        while places > 0, after % 10 == 0 { (after, places) = (after / 10, places - 1) }
        guard places > 0 else { return "\(scaled / digits)" }
        let text = String(after)
        return "\(scaled / digits).\(String(repeating: "0", count: places - text.count))\(text)"
    }
}

/// A verb that opens images.
protocol ImageVerb: ParsableCommand {
    /// Its options that not every verb has, for messages that name them.
    static var options: OptionSyntax.VerbOptions { get }
}

extension ImageVerb {
    static var options: OptionSyntax.VerbOptions { OptionSyntax.VerbOptions() }

    /// Calls the library; its error is reported in one line, with this verb's options, and ends the program with
    /// `status`, or, where another command line is what is wanted, with that of a usage error.
    func attempt<Answer: ~Copyable>(
        status: Int32 = ImageTool.failure, _ body: () throws(DiskImageError) -> Answer
    ) throws -> Answer {
        do throws(DiskImageError) { return try body() } catch { throw failure(error, status: status) }
    }

    /// Reports an error in one line.
    /// - Returns: what ends the program.
    func failure(_ error: DiskImageError, status: Int32) -> ExitCode {
        StandardError().say(error.text(.verb(Self.options)))
        return switch error {
        case .impossible, .formatUnknown, .formatContradicted: .validationFailure
        default: ExitCode(status)
        }
    }
}

extension ImageFormat: ExpressibleByArgument {}

/// The format of a new image; that of one which cannot be created is refused later, by a sentence.
struct NewImageFormat: ExpressibleByArgument {
    let format: ImageFormat

    init?(argument: String) {
        guard let format = ImageFormat(rawValue: argument) else { return nil }
        self.format = format
    }

    static let allValueStrings = ImageFormat.allCases.filter(\.isMakeable).map(\.rawValue)
}

/// How a verb shows what it found: as text, or as JSON.
struct OutputOptions: ParsableArguments {
    enum Form: String, ExpressibleByArgument, CaseIterable {
        case human, json
    }

    @Flag(help: "Print JSON with the field names of qemu-img.")
    var json = false

    @Option(help: ArgumentHelp("Output format: human, or json (same as --json).", valueName: "form"))
    var output: Form?

    var isJSON: Bool { json || output == .json }
}

/// Where the files may be that images name.
struct NamedFilesOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "Also allow backing files below this directory; by default only those below the image's own directory are opened. Repeatable.",
            valueName: "directory"), completion: .directory)
    var backingDir: [String] = []

    @Flag(help: "Allow backing files anywhere, including remote disks.")
    var backingAnywhere = false

    /// - Parameter stated: what else the command line names.
    func files(_ stated: String?...) throws(DiskImageError) -> NamedFiles {
        let files = NamedFiles(isAnywhere: backingAnywhere, directories: backingDir, stated: stated.compactMap { $0 })
        try files.checkDirectories()
        return files
    }
}

/// The file with the data of an image that keeps it outside: its name in the image is not followed, since what it names
/// may be written.
struct DataFileOption: ParsableArguments {
    @Option(help: ArgumentHelp("External data file of the qcow2 image.", valueName: "file"), completion: .file())
    var dataFile: String?
}

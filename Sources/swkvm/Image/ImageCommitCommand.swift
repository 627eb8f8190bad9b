// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage

/// `swkvm image commit`: an overlay's contents into its backing file.
struct ImageCommitCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(otherDataFile: "backing")
    static let configuration = CommandConfiguration(
        commandName: "commit",
        abstract: "Commit the contents of a qcow2 overlay to its backing file.",
        discussion: """
            The backing file is written and flushed, then the overlay is emptied. Other overlays of the same backing file show different \
            contents afterwards.

            EXAMPLE
              swkvm image commit overlay.qcow2
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp("The image's format. Default: from the file extension.", valueName: "format"),
        completion: .list(["qcow2"]))
    var format: ImageFormat?

    @OptionGroup var data: DataFileOption
    @OptionGroup var named: NamedFilesOptions

    @Option(help: ArgumentHelp("Like --data-file, for the backing file.", valueName: "file"), completion: .file())
    var backingDataFile: String?

    @OptionGroup var keys: KeyOptions

    @Flag(name: [.customShort("d"), .customLong("keep")], help: "Keep the overlay's contents.")
    var keep = false

    @Flag(name: [.short, .long], help: "Show progress; the default on a terminal.")
    var progress = false

    @Flag(name: [.short, .long], help: "Print nothing on success.")
    var quiet = false

    @Argument(help: "The image.", completion: .file())
    var file: String

    func run() throws {
        let backing = try attempt { () throws(DiskImageError) in
            var commit = ImageCommit(path: file)
            commit.options.format = format
            commit.options.report = ImageTool.report
            commit.options.dataFile = data.dataFile
            commit.backingDataFile = backingDataFile
            commit.options.namedFiles = try named.files(file, data.dataFile, backingDataFile)
            commit.options.keys = try keys.load()
            commit.keepsContents = keep
            let line = ProgressLine(isShown: quiet ? false : progress ? true : nil)
            defer { line.end() }
            return try commit.run(line.show)
        }
        if !quiet { print("\(ImageTool.printable(file)): committed to \(ImageTool.printable(backing))") }
    }
}

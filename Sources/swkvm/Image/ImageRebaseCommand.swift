// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage

/// `swkvm image rebase`: another backing file.
struct ImageRebaseCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(otherKey: "backing")
    static let configuration = CommandConfiguration(
        commandName: "rebase",
        abstract: "Change or remove the backing file of a qcow2 image.",
        discussion: """
            Where the new backing file differs from the old one, the old data is first copied into the image, so that the contents of the disk \
            do not change, even if the command is interrupted. With --unsafe, only the name is changed: use it for a backing file that was \
            renamed or moved.

            EXAMPLES
              swkvm image rebase --backing newbase.qcow2 overlay.qcow2
              swkvm image rebase --no-backing overlay.qcow2
              swkvm image rebase --unsafe --backing moved/base.qcow2 overlay.qcow2
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp(
            "The new backing file, relative to the image's directory, or a remote disk (nbd://…); an empty name means none.",
            valueName: "file"), completion: .file())
    var backing: String?

    @Flag(help: "Remove the backing file: copy all data into the image.")
    var noBacking = false

    @Option(
        name: [.customShort("F"), .long],
        help: ArgumentHelp("The new backing file's format. Default: from the file extension.", valueName: "format"))
    var backingFormat: ImageFormat?

    @OptionGroup var data: DataFileOption
    @OptionGroup var named: NamedFilesOptions

    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var keys: KeyOptions

    @Option(
        help: ArgumentHelp("Like --key-file, for the new backing file and those below it.", valueName: "file"),
        completion: .file())
    var backingKeyFile: [String] = []

    @Option(
        help: ArgumentHelp("Like --key-fd, for the new backing file and those below it.", valueName: "n"),
        transform: descriptorNumber)
    var backingKeyFd: [Int32] = []

    @Flag(name: [.short, .long], help: "Change only the recorded name.")
    var unsafe = false

    @Option(
        name: [.short, .long],
        help: ArgumentHelp("The image's format. Default: from the file extension.", valueName: "format"),
        completion: .list(["qcow2"]))
    var format: ImageFormat?

    @Flag(name: [.short, .long], help: "Show progress; the default on a terminal.")
    var progress = false

    @Flag(name: [.short, .long], help: "Do not show progress.")
    var quiet = false

    @Argument(help: "The image.", completion: .file())
    var file: String

    func validate() throws {
        guard (backing == nil) == noBacking else { throw ValidationError("Specify --backing or --no-backing.") }
        guard !unsafe || vhd.vhdSize == nil else {
            throw ValidationError("The options --vhd-size and --unsafe cannot be combined.")
        }
    }

    func run() throws {
        try attempt { () throws(DiskImageError) in
            var rebase = ImageRebase(path: file)
            rebase.options.format = format
            rebase.options.report = ImageTool.report
            rebase.options.dataFile = data.dataFile
            vhd.apply(to: &rebase.options)
            rebase.options.namedFiles = try named.files(
                file, data.dataFile, backing.flatMap { BackingReference.path($0, of: file) })
            rebase.options.keys = try keys.load()
            rebase.backingKeys = try KeyOptions.load(backingKeyFile, backingKeyFd)
            if let backing, !backing.isEmpty {
                rebase.backing = try BackingReference(name: backing, stated: backingFormat)
            }
            rebase.isUnsafe = self.unsafe
            let line = ProgressLine(isShown: quiet ? false : progress ? true : nil)
            defer { line.end() }
            try rebase.run(line.show)
        }
    }
}

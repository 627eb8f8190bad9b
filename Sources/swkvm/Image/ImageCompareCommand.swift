// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage

/// `swkvm image compare`: whether two images show the same disk.
struct ImageCompareCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(canShare: true, otherKey: "second", otherDataFile: "second")
    static let configuration = CommandConfiguration(
        commandName: "compare",
        abstract: "Compare the contents of two disk images of any formats.",
        discussion: """
            Disks of different sizes are equal if the rest of the longer one is zero.

            EXIT STATUS
              0   identical
              1   different
              2   an image could not be opened or read
              64  the command line is wrong

            EXAMPLE
              swkvm image compare disk.qcow2 disk.raw
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp("The first image's format. Default: from the file extension.", valueName: "format"))
    var format: ImageFormat?

    @Option(name: [.customShort("F"), .long], help: ArgumentHelp("The second image's format.", valueName: "format"))
    var secondFormat: ImageFormat?

    @OptionGroup var data: DataFileOption
    @OptionGroup var named: NamedFilesOptions

    @Option(help: ArgumentHelp("Like --data-file, for the second image.", valueName: "file"), completion: .file())
    var secondDataFile: String?

    @OptionGroup var vhd: VHDSizeOption

    @Option(help: ArgumentHelp("Like --vhd-size, for the second image.", valueName: "which"))
    var secondVhdSize: VHDSize?

    @OptionGroup var keys: KeyOptions

    @Option(help: ArgumentHelp("Like --key-file, for the second image.", valueName: "file"), completion: .file())
    var secondKeyFile: [String] = []

    @Option(help: ArgumentHelp("Like --key-fd, for the second image.", valueName: "n"), transform: descriptorNumber)
    var secondKeyFd: [Int32] = []

    @Flag(name: [.short, .long], help: "Strict mode: sizes and allocation must match too.")
    var strict = false

    @Flag(
        name: [.customShort("U"), .long],
        help: "Open images that a running machine may be writing; the result may be inconsistent.")
    var forceShare = false

    @Flag(name: [.short, .long], help: "Show progress; the default on a terminal.")
    var progress = false

    @Flag(name: [.short, .long], help: "Print nothing; the exit status gives the result.")
    var quiet = false

    @Argument(help: "An image.", completion: .file())
    var first: String

    @Argument(help: "Another image.", completion: .file())
    var second: String

    func run() throws {
        let outcome = try attempt(status: 2) { () throws(DiskImageError) in
            var comparison = ImageComparison(first, with: second)
            comparison.firstOptions.format = format
            comparison.secondOptions.format = secondFormat
            comparison.secondOptions.formatOption = "--second-format"
            vhd.apply(to: &comparison.firstOptions)
            vhd.apply(to: &comparison.secondOptions)
            comparison.secondOptions.vhdSize = secondVhdSize
            comparison.secondOptions.vhdSizeOption = "--second-vhd-size "
            comparison.firstOptions.dataFile = data.dataFile
            comparison.secondOptions.dataFile = secondDataFile
            comparison.firstOptions.namedFiles = try named.files(first, second, data.dataFile, secondDataFile)
            comparison.secondOptions.namedFiles = comparison.firstOptions.namedFiles
            comparison.firstOptions.keys = try keys.load()
            comparison.secondOptions.keys = try KeyOptions.load(secondKeyFile, secondKeyFd)
            comparison.firstOptions.locking = !forceShare
            comparison.secondOptions.locking = !forceShare
            comparison.isStrict = strict
            let line = ProgressLine(isShown: quiet ? false : progress ? true : nil, holdsSignals: false)
            defer { line.end() }
            return try comparison.run(line.show)
        }
        if !quiet { print(outcome.sentence) }
        switch outcome {
        case .identical, .identicalUpToZeroes: break
        case .contents, .allocation, .size: throw ExitCode(1)
        }
    }
}

extension ImageComparison.Outcome {
    fileprivate var sentence: String {
        switch self {
        case .identical: "Images are identical."
        case .identicalUpToZeroes: "Images are identical; the longer one ends in zeroes."
        case .contents(let offset): "Content mismatch at offset \(offset)!"
        case .allocation(let offset): "Strict mode: Offset \(offset) block status mismatch!"
        case .size(let first, let second): "Strict mode: Image size mismatch: \(first) and \(second) bytes!"
        }
    }
}

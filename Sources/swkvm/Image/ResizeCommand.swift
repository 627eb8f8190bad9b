// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
internal import DiskImage

extension Preallocation: ExpressibleByArgument {}

/// A disk's size, or what is added to it or taken away: `20G`, `+5G`, `-512M`.
struct SizeChange: Equatable {
    enum Sign: Equatable { case none, plus, minus }

    let sign: Sign
    let amount: ByteSize

    /// - Throws: a sentence that states what is expected.
    init(parsing argument: String) throws {
        let sign: Sign =
            switch argument.first {
            case "+": .plus
            case "-": .minus
            default: .none
            }
        guard let amount = ByteSize(argument: String(sign == .none ? argument[...] : argument.dropFirst())) else {
            throw ArgumentProblem("expected a size, or + or - and a size: 20G, 1.5T, +5G, -512M")
        }
        self.sign = sign
        self.amount = amount
    }

    /// The new size of a disk; nil where there is none.
    func applied(to size: UInt64) -> UInt64? {
        switch sign {
        case .none: return amount.bytes
        case .plus:
            let (sum, overflow) = size.addingReportingOverflow(amount.bytes)
            return overflow ? nil : sum
        case .minus: return amount.bytes <= size ? size - amount.bytes : nil
        }
    }
}

/// `swkvm image resize`.
struct ImageResizeCommand: ImageVerb {
    static let configuration = CommandConfiguration(
        commandName: "resize",
        abstract: "Change the size of a disk.",
        discussion: """
            Added space reads as zeroes. Shrinking discards data: shrink the guest's file systems first, and pass --shrink. A resize is \
            atomic: if it is interrupted, the disk has either the old size or the new one.

            EXAMPLES
              swkvm image resize disk.qcow2 +5G
              swkvm image resize --shrink disk.qcow2 -1G
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp("The image's format. Default: from the file extension.", valueName: "format"))
    var format: ImageFormat?

    @OptionGroup var data: DataFileOption
    @OptionGroup var named: NamedFilesOptions

    @Flag(help: "Allow the disk to shrink.")
    var shrink = false

    @Option(
        help: ArgumentHelp(
            "Preallocation of the added space: off, metadata (qcow2), falloc or full.", valueName: "mode"))
    var preallocation = Preallocation.off

    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var keys: KeyOptions

    @Argument(help: "The image.", completion: .file())
    var file: String

    @Flag(name: [.short, .long], help: "Print nothing on success.")
    var quiet = false

    // One that is taken away looks like an option, of which none is known by that name. It may also come after `--`.
    @Argument(
        parsing: .allUnrecognized,
        help: ArgumentHelp("The new size, or a change with + or -: 20G, +5G, -512M.", valueName: "size"))
    var words: [String]

    func validate() throws { _ = try size() }

    func size() throws -> SizeChange {
        let words = words.filter { $0 != "--" }
        guard let word = words.first else { throw ValidationError("Missing expected argument '<size>'") }
        guard words.count == 1 else { throw ValidationError("Unexpected argument '\(words[1])'") }
        do { return try SizeChange(parsing: word) } catch {
            throw ValidationError("The value '\(word)' is invalid for '<size>': \(error)")
        }
    }

    func run() throws {
        let size = try size()
        let made = try attempt { () throws(DiskImageError) in
            var options = DiskImageOptions(
                format: format, dataFile: data.dataFile, namedFiles: try named.files(file, data.dataFile))
            options.keys = try keys.load()
            vhd.apply(to: &options)
            options.report = ImageTool.report
            // The rest of a last cluster is made zeroes.
            var engine = try DiskEngine(DiskImage(path: file, options: options), depth: 1)
            let old = engine.image.size
            guard let new = size.applied(to: old) else {
                throw .resize(
                    path: file,
                    reason:
                        "it has \(old) bytes, \(size.amount.bytes) cannot be \(size.sign == .plus ? "added" : "subtracted")"
                )
            }
            try engine.resize(to: new, preallocation: preallocation, shrinks: shrink)
            return new
        }
        if !quiet { print("\(ImageTool.printable(file)): \(ImageTool.sizeAndBytes(made))") }
    }
}

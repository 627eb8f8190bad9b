// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import DiskImage
internal import Linux

/// `swkvm image convert`: the same disk in another image.
struct ImageConvertCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(canShare: true)
    static let configuration = CommandConfiguration(
        commandName: "convert",
        abstract: "Convert a disk image to another format or layout.",
        discussion: """
            The target contains everything that the source shows, including the data of its backing files. Zeroes take no space. The target \
            appears under its name only when it is complete: after an error or a signal, no file is left. With --force, a block device or a \
            remote disk (nbd://…) that is large enough is overwritten as raw; after an error it may be partly overwritten. A remote disk is \
            flushed at the end. Other targets may still be in the page cache when the command returns, as with cp and qemu-img; --sync \
            waits until they are on stable storage, and so does --force when it replaces a file.

            EXAMPLES
              swkvm image convert disk.raw disk.qcow2
              swkvm image convert --compress --compression-type zstd disk.qcow2 small.qcow2
              swkvm image convert --subformat streamOptimized disk.qcow2 disk.vmdk
              swkvm image convert --force disk.qcow2 /dev/vg/disk --target-format raw
              swkvm image convert --force disk.qcow2 nbd://host/disk
              swkvm image convert --encrypt --target-key-file secret plain.qcow2 disk.qcow2
              swkvm image convert --key-file secret disk.qcow2 plain.raw
              swkvm image convert --salvage broken.qcow2 whatisleft.raw
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp(
            "The source's format: \(ImageFormat.names). Default: from the file extension.", valueName: "format"))
    var format: ImageFormat?

    @Option(
        name: [.customShort("O"), .long],
        help: ArgumentHelp(
            "The target's format: \(ImageFormat.makeableNames). Default: from the file extension.", valueName: "format"),
        completion: .list(NewImageFormat.allValueStrings))
    var targetFormat: NewImageFormat?

    @Option(
        name: [.customShort("l"), .long],
        help: ArgumentHelp(
            "Internal snapshot to read instead of the current state: a number or a name.", valueName: "name"))
    var snapshot: String?

    @Flag(name: [.short, .long], help: "Compress clusters (qcow2, and VMDK as streamOptimized).")
    var compress = false

    @Option(
        help: ArgumentHelp(
            "Compression level: 1 to 9 for zlib (default 6), 1 to 19 for zstd (default 3).", valueName: "n"),
        transform: wholeNumber(0...Int.max))
    var compressionLevel: Int?

    @OptionGroup var layout: LayoutOptions

    @Option(
        name: [.customShort("B"), .long],
        help: ArgumentHelp(
            "Use this image or remote disk as the backing file and store only the differences (qcow2); relative to the target's directory.",
            valueName: "file"), completion: .file())
    var backing: String?

    @Option(
        name: [.customShort("F"), .long],
        help: ArgumentHelp("The backing image's format. Default: from the file extension.", valueName: "format"))
    var backingFormat: ImageFormat?

    @OptionGroup var data: DataFileOption
    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var named: NamedFilesOptions
    @OptionGroup var keys: KeyOptions

    @OptionGroup var encryption: EncryptionOptions

    @Option(
        help: ArgumentHelp("File with the key for --encrypt; every byte counts.", valueName: "file"),
        completion: .file())
    var targetKeyFile: [String] = []

    @Option(help: ArgumentHelp("The same, from an open file descriptor.", valueName: "n"), transform: descriptorNumber)
    var targetKeyFd: [Int32] = []

    @Option(
        name: [.customShort("m"), .long],
        help: ArgumentHelp("Threads that read, compress and write, 1 to 64. Default: one per CPU.", valueName: "n"),
        transform: wholeNumber(0...Int.max))
    var threads: Int?

    @Option(
        help: ArgumentHelp(
            "Cache mode: auto (bypass the page cache where that is faster), writeback (use it), none (bypass it).",
            valueName: "mode"))
    var cache = ToolCache.automatic

    @Flag(help: "Read a damaged image or device as far as possible: unreadable ranges become zeroes and are listed.")
    var salvage = false

    @Flag(help: "Wait until the new image is on stable storage.")
    var sync = false

    @Flag(help: "Refuse a source that has a backing file.")
    var noBacking = false

    @Flag(help: "Overwrite an existing file, block device or remote disk.")
    var force = false

    @Flag(
        name: [.customShort("n"), .long],
        help: "Write in place to an existing target, a block device or a remote disk; same as --force for these.")
    var noCreate = false

    @Flag(
        name: [.customShort("U"), .long],
        help: "Read an image that a running machine may be writing; the copy may be inconsistent.")
    var forceShare = false

    @Flag(name: [.short, .long], help: "Show progress; the default on a terminal.")
    var progress = false

    @Flag(name: [.short, .long], help: "Do not show progress.")
    var quiet = false

    @Argument(
        help: "The image to read, or a remote disk: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.",
        completion: .file())
    var source: String

    @Argument(help: "The image to create, or the block device or remote disk to overwrite.", completion: .file())
    var target: String

    func run() throws {
        let lost = try attempt { () throws(DiskImageError) in
            var conversion = ImageConversion(
                source: source, target: target,
                format: try ImageFormat(targetFormat?.format, orExtensionOf: target, option: "--target-format"))
            conversion.sourceOptions.format = format
            conversion.sourceOptions.snapshot = snapshot
            vhd.apply(to: &conversion.sourceOptions)
            conversion.sourceOptions.namedFiles = try named.files(
                source, data.dataFile, backing.flatMap { BackingReference.path($0, of: target) })
            conversion.sourceOptions.allowsBacking = !noBacking
            conversion.subformat = layout.subformat
            conversion.sourceOptions.keys = try keys.load()
            conversion.options = layout.options
            let targetKeys = try KeyOptions.load(targetKeyFile, targetKeyFd)
            conversion.options.encryption = try encryption.encryption(targetKeys, target, option: "--target-key")
            guard encryption.encrypt || targetKeys.isEmpty else {
                throw .impossible(path: target, reason: "a target key requires --encrypt")
            }
            conversion.preallocation = layout.preallocation
            if let backing { conversion.backing = try BackingReference(name: backing, stated: backingFormat) }
            conversion.sourceOptions.dataFile = data.dataFile
            conversion.compresses = compress
            conversion.compressionLevel = compressionLevel
            if let threads { conversion.threads = threads }
            conversion.cache = cache
            conversion.durably = sync
            conversion.replacing = force || noCreate
            conversion.isTargetThere = noCreate
            conversion.salvages = salvage
            conversion.sourceOptions.locking = !forceShare
            let line = ProgressLine(isShown: quiet ? false : progress ? true : nil)
            defer { line.end() }
            return try conversion.run(line.show)
        }
        show(lost)
    }

    /// Lists what of the source is zeroes in the target because it could not be read.
    private func show(_ lost: [LostRange]) {
        guard !lost.isEmpty else { return }
        let bytes = lost.reduce(0) { $0 + $1.length }
        let ranges = lost.count == 1 ? "1 range" : "\(lost.count) ranges"
        print(
            "\(ImageTool.printable(source)): \(ranges) of the disk, \(ImageTool.sizeAndBytes(bytes)), could not be read "
                + "and \(lost.count == 1 ? "is" : "are") zeroes in \(ImageTool.printable(target)):")
        print("Offset          Length          Reason")
        for range in lost {
            print(
                left(hexadecimal(range.offset), 16) + left(hexadecimal(range.length), 16)
                    + ImageTool.printable(range.reason))
        }
    }

    private func left(_ text: String, _ width: Int) -> String {
        text + String(repeating: " ", count: max(1, width - text.count))
    }

    private func hexadecimal(_ number: UInt64) -> String { number == 0 ? "0" : "0x" + String(number, radix: 16) }
}

extension CacheMode: ExpressibleByArgument {}
extension ToolCache: ExpressibleByArgument {}

// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import DiskImage
internal import Linux

/// `swkvm image convert`: the same disk in another image.
struct ImageConvertCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "convert",
        abstract: "Copy a disk image into a new one, in another format or layout.",
        discussion: """
            All that the source shows, its backing files included, goes into one image. Zeroes take no space. The target gets its name when it is \
            whole: after an error or a signal there is none. A block device or a remote disk (nbd://…), which has to be large enough, is overwritten \
            with --force, as raw; after an error a part of it has been. A remote disk is asked to store all at the end. What is written otherwise need not be on the disk at once, as with cp and qemu-img; --sync \
            waits until it is, and so does --force when it replaces a file.

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

    @Option(name: [.short, .long], help: ArgumentHelp("The source's format: \(ImageFormat.names). Default: what its extension says.", valueName: "format"))
    var format: ImageFormat?

    @Option(name: [.customShort("O"), .long], help: ArgumentHelp("The target's format: \(ImageFormat.makeableNames). Default: what its extension says.", valueName: "format"), completion: .list(ImageFormat.allCases.filter(\.isMakeable).map(\.rawValue)))
    var targetFormat: ImageFormat?

    @Option(name: [.customShort("l"), .long], help: ArgumentHelp("The source's internal snapshot to read in place of its current state: a number or a name.", valueName: "name"))
    var snapshot: String?

    @Flag(name: [.short, .long], help: "Compress clusters (qcow2, and VMDK as streamOptimized).")
    var compress = false

    @Option(help: ArgumentHelp("How hard to compress: 1 to 9 for zlib (default 6), 1 to 19 for zstd (default 3).", valueName: "n"), transform: wholeNumber(0...Int.max))
    var compressionLevel: Int?

    @OptionGroup var layout: LayoutOptions

    @Option(name: [.customShort("B"), .long], help: ArgumentHelp(
        "Stand on this image or remote disk, and keep only what differs from it (qcow2); relative to the target's directory.", valueName: "file"), completion: .file())
    var backing: String?

    @Option(name: [.customShort("F"), .long], help: ArgumentHelp("The backing image's format. Default: what its extension says.", valueName: "format"))
    var backingFormat: ImageFormat?

    @OptionGroup var data: DataFileOption
    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var named: NamedFilesOptions
    @OptionGroup var keys: KeyOptions

    @OptionGroup var encryption: EncryptionOptions

    @Option(help: ArgumentHelp("A file with the key that --encrypt gives the target.", valueName: "file"), completion: .file())
    var targetKeyFile: [String] = []

    @Option(help: ArgumentHelp("The same from an open descriptor.", valueName: "n"), transform: descriptorNumber)
    var targetKeyFd: [Int32] = []

    @Option(name: [.customShort("m"), .long], help: ArgumentHelp("Threads that read, compress and write, 1 to 64. Default: one for each processor.", valueName: "n"), transform: wholeNumber(0...Int.max))
    var threads: Int?

    @Option(help: ArgumentHelp("The page cache: auto (sparing it where that is quicker), writeback (through it), none (around it).", valueName: "mode"))
    var cache = ToolCache.automatic

    @Flag(help: "Read what there is of a damaged image or device: what cannot be read becomes zeroes and is listed.")
    var salvage = false

    @Flag(help: "Wait until the new image is on the disk.")
    var sync = false

    @Flag(help: "Do not follow the source's backing files: refuse an image that has one.")
    var noBacking = false

    @Flag(help: "Overwrite a file, a block device or a remote disk that is there already.")
    var force = false

    @Flag(name: [.customShort("n"), .long], help: "The target is there already and is written in place: a block device or a remote disk, for which this is --force.")
    var noCreate = false

    @Flag(name: [.customShort("U"), .long], help: "Read an image that a machine writes to; what is copied may be of many moments.")
    var forceShare = false

    @Flag(name: [.short, .long], help: "Show how far it is; always so on a terminal.")
    var progress = false

    @Flag(name: [.short, .long], help: "Never show how far it is.")
    var quiet = false

    @Argument(help: "The image to read, or a remote disk: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.", completion: .file())
    var source: String

    @Argument(help: "The image to make, or the block device or remote disk to overwrite.", completion: .file())
    var target: String

    func run() throws {
        let lost = try ImageTool.run { () throws(DiskImageError) in
            var conversion = ImageConversion(source: source, target: target, format: try ImageFormat(targetFormat, orExtensionOf: target, option: "--target-format"))
            conversion.sourceOptions.format = format
            conversion.sourceOptions.snapshot = snapshot
            vhd.apply(to: &conversion.sourceOptions)
            conversion.sourceOptions.namedFiles = named.files(source, data.dataFile, backing.flatMap { BackingReference.path($0, of: target) })
            conversion.sourceOptions.allowsBacking = !noBacking
            conversion.subformat = layout.subformat
            conversion.sourceOptions.keys = try keys.load()
            conversion.options = layout.options
            let targetKeys = try KeyOptions.load(targetKeyFile, targetKeyFd)
            conversion.options.encryption = try encryption.encryption(targetKeys, target, option: "--target-key")
            guard encryption.encrypt || targetKeys.isEmpty else { throw .impossible(path: target, reason: "a key for it was given; --encrypt makes an image that needs it") }
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
            print(left(hexadecimal(range.offset), 16) + left(hexadecimal(range.length), 16) + ImageTool.printable(range.reason))
        }
    }

    private func left(_ text: String, _ width: Int) -> String { text + String(repeating: " ", count: max(1, width - text.count)) }

    private func hexadecimal(_ number: UInt64) -> String { number == 0 ? "0" : "0x" + String(number, radix: 16) }
}

extension CacheMode: ExpressibleByArgument {}
extension ToolCache: ExpressibleByArgument {}

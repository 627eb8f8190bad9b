// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
public import DiskImage

/// `swkvm image create`: a new disk image.
struct ImageCreateCommand: ImageVerb {
    static let configuration = CommandConfiguration(
        commandName: "create",
        abstract: "Create a disk image.",
        discussion: """
            The file appears under its name only when it is complete: after an error or a signal, no file is left.

            EXAMPLES
              swkvm image create disk.qcow2 20G
              swkvm image create --cluster-size 1M --preallocation metadata big.qcow2 1T
              swkvm image create --backing base.qcow2 overlay.qcow2
              swkvm image create --backing nbd://host/base overlay.qcow2
              swkvm image create --preallocation falloc data.raw 100G
              swkvm image create --encrypt --key-file secret disk.qcow2 20G
            """)

    @Option(
        name: [.short, .customShort("O"), .long],
        help: ArgumentHelp("\(ImageFormat.makeableNames). Default: from the file extension.", valueName: "format"),
        completion: .list(NewImageFormat.allValueStrings))
    var format: NewImageFormat?

    @OptionGroup var layout: LayoutOptions

    @OptionGroup var encryption: EncryptionOptions

    @Option(
        help: ArgumentHelp("File with the key (password) for --encrypt; every byte counts.", valueName: "file"),
        completion: .file())
    var keyFile: [String] = []

    @Option(help: ArgumentHelp("The same, from an open file descriptor.", valueName: "n"), transform: descriptorNumber)
    var keyFd: [Int32] = []

    @Option(
        name: [.short, .long],
        help: ArgumentHelp(
            "Backing file: the image or remote disk (nbd://…) that provides all data not in the new image; relative to the new image's directory.",
            valueName: "file"), completion: .file())
    var backing: String?

    @Option(
        name: [.customShort("F"), .long],
        help: ArgumentHelp("The backing image's format. Default: from the file extension.", valueName: "format"))
    var backingFormat: ImageFormat?

    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var named: NamedFilesOptions

    @Flag(name: [.short, .long], help: "Do not open the backing image, which may not exist yet.")
    var unsafe = false

    @Option(
        help: ArgumentHelp("Store the data in this external file, and only metadata in the image.", valueName: "file"),
        completion: .file())
    var dataFile: String?

    @Flag(help: "Keep the data file valid as a raw image by itself.")
    var dataFileRaw = false

    @Option(
        name: .customLong("size"), help: ArgumentHelp("Same as the second argument.", valueName: "size"),
        transform: ByteSize.init(parsing:))
    var sizeOption: ByteSize?

    @Flag(help: "Replace an existing file.")
    var force = false

    @Flag(name: [.short, .long], help: "Print nothing on success.")
    var quiet = false

    @Argument(help: "The file to create.", completion: .file())
    var file: String

    @Argument(
        help: "The size of the disk, in bytes or with K, M, G, T, P or E: 20G, 1.5T. Default: the backing image's.",
        transform: ByteSize.init(parsing:))
    var size: ByteSize?

    func validate() throws {
        guard vhd.vhdSize == nil || (backing != nil && !unsafe) else {
            throw ValidationError("The option --vhd-size requires --backing, without --unsafe.")
        }
    }

    func run() throws {
        let disk = try attempt { () throws(DiskImageError) in
            let format = try ImageFormat(format?.format, orExtensionOf: file)
            var creation = ImageCreation(path: file, format: format, size: (size ?? sizeOption)?.bytes)
            creation.subformat = layout.subformat
            creation.options = layout.options
            let keys = try KeyOptions.load(keyFile, keyFd)
            creation.options.encryption = try encryption.encryption(keys, file, option: "--key")
            guard encryption.encrypt || keys.isEmpty else {
                throw .impossible(path: file, reason: "a key requires --encrypt")
            }
            creation.options.dataFile = dataFile
            creation.options.dataFileIsRaw = dataFileRaw
            creation.preallocation = layout.preallocation
            if let backing { creation.backing = try BackingReference(name: backing, stated: backingFormat) }
            creation.opensBacking = !unsafe
            vhd.apply(to: &creation.backingOptions)
            creation.backingOptions.namedFiles = try named.files(
                backing.flatMap { BackingReference.path($0, of: file) })
            creation.replacing = force
            return (format, try creation.create())
        }
        if !quiet { print("\(ImageTool.printable(file)): \(disk.0), \(ImageTool.sizeAndBytes(disk.1))") }
    }
}

/// How a new image is laid out, for the verbs that make one.
struct LayoutOptions: ParsableArguments {
    @Option(
        name: .customShort("o"),
        help: ArgumentHelp(
            "The same options under qemu-img's names: \(LayoutWords.names); on or off for flags.",
            valueName: "word=value,..."),
        completion: LayoutWords.completion, transform: LayoutWords.init(parsing:))
    var words: [LayoutWords] = []

    @Option(
        name: .long,
        help: ArgumentHelp("qcow2: cluster size, a power of two from 512 to 2M. (default: 64K)", valueName: "size"),
        transform: ByteSize.init(parsing:))
    var clusterSize = ByteSize(bytes: 65536)

    @Option(
        help: ArgumentHelp("qcow2: refcount width in bits: 1, 2, 4, 8, 16, 32 or 64. (default: 16)", valueName: "n"),
        transform: wholeNumber(0...Int.max))
    var refcountBits = 16

    @Option(help: ArgumentHelp("qcow2: 1.1 (version 3) or 0.10 (version 2).", valueName: "version"))
    var compat = QCOW2Compatibility.version3

    @Flag(help: "qcow2: allow lazy refcounts.")
    var lazyRefcounts = false

    @Flag(name: .customLong("extended-l2"), help: "qcow2: 32 subclusters per cluster; needs clusters of 16K or more.")
    var extendedL2 = false

    @Option(help: ArgumentHelp("qcow2: compression type: zlib or zstd.", valueName: "type"))
    var compressionType = CompressionType.zlib

    @Option(
        name: .customLong("subformat"),
        help: ArgumentHelp(
            "vmdk: \(ImageSubformat.names(of: .vmdk)); vdi: \(ImageSubformat.names(of: .vdi)). Default: the first.",
            valueName: "kind"))
    var statedSubformat: ImageSubformat?

    @Option(
        name: .customLong("preallocation"),
        help: ArgumentHelp(
            "Preallocation: off, metadata (qcow2), falloc or full (not in sparse VMDK and VDI).", valueName: "mode"))
    var statedPreallocation = Preallocation.off

    var options: QCOW2Options {
        var options = QCOW2Options()
        options.clusterSize = clusterSize.bytes
        options.refcountBits = refcountBits
        options.compatibility = compat
        options.lazyRefcounts = lazyRefcounts
        options.extendedL2 = extendedL2
        options.compression = compressionType
        for word in words.flatMap(\.all) { word.change(&options) }
        return options
    }

    var subformat: ImageSubformat? { words.flatMap(\.all).compactMap(\.subformat).last ?? statedSubformat }
    var preallocation: Preallocation { words.flatMap(\.all).compactMap(\.preallocation).last ?? statedPreallocation }
}

extension QCOW2Compatibility: ExpressibleByArgument {}
extension CompressionType: ExpressibleByArgument {}
extension ImageSubformat: ExpressibleByArgument {}

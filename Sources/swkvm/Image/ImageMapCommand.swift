// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import Linux

/// `swkvm image map`: where a disk's data lies.
struct ImageMapCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(canShare: true)
    static let configuration = CommandConfiguration(
        commandName: "map",
        abstract: "Show which parts of a disk are allocated, in which image of the chain, and at which file offset.",
        discussion: """
            The text output lists only allocated data, one range per line; --json lists the whole disk. Compressed clusters cannot be read \
            directly at their offset: the text output shows `compressed` instead of it.

            EXAMPLES
              swkvm image map disk.qcow2
              swkvm image map --json overlay.qcow2
            """)

    @OptionGroup var image: SourceOptions

    @OptionGroup var data: DataFileOption
    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var named: NamedFilesOptions
    @OptionGroup var output: OutputOptions

    @Option(
        name: [.customShort("s"), .long], help: ArgumentHelp("Start at this offset. (default: 0)", valueName: "size"),
        transform: ByteSize.init(parsing:))
    var startOffset = ByteSize(bytes: 0)

    @Option(
        name: [.customShort("l"), .long],
        help: ArgumentHelp("Show at most this many bytes. Default: all.", valueName: "size"),
        transform: ByteSize.init(parsing:))
    var maxLength: ByteSize?

    func run() throws {
        let start = startOffset.bytes, (sum, overflow) = start.addingReportingOverflow(maxLength?.bytes ?? .max)
        let range = start..<(overflow ? .max : sum)
        try attempt { () throws(DiskImageError) in
            var options = DiskImageOptions(
                format: image.format, readOnly: true, locking: !image.forceShare, dataFile: data.dataFile,
                namedFiles: try named.files(image.file, data.dataFile))
            vhd.apply(to: &options)
            // Where data lies is no secret.
            options.opensData = false
            var map = ImageMap(try DiskImage(path: image.file, options: options))
            var isFirst = true
            let json = output.isJSON
            if !json { print("Offset          Length          Mapped to       File") }
            while let whole = try map.next(), whole.offset < range.upperBound {
                guard let extent = whole.clamped(to: range) else { continue }
                if json {
                    print((isFirst ? "[" : ",\n") + extent.json(files: map.files).line, terminator: "")
                } else if !extent.readsAsZeroes {
                    print(extent.text(files: map.files))
                }
                isFirst = false
            }
            if json { print(isFirst ? "[]" : "]") }
        }
    }
}

extension ImageExtent {
    /// What of it is in a range of the disk; nil if nothing is.
    fileprivate func clamped(to range: Range<UInt64>) -> ImageExtent? {
        let first = max(offset, range.lowerBound), last = min(offset + length, range.upperBound)
        guard first < last else { return nil }
        var part = self
        (part.offset, part.length) = (first, last - first)
        // A compressed cluster is one place, whatever is wanted of it.
        if kind != .compressed { part.fileOffset = fileOffset.map { $0 + first - offset } }
        return part
    }

    fileprivate func text(files: [String]) -> String {
        let place = kind == .compressed ? "compressed" : Self.hexadecimal(fileOffset ?? 0)
        return [Self.hexadecimal(offset), Self.hexadecimal(length), place].map {
            $0 + String(repeating: " ", count: max(1, 16 - $0.count))
        }.joined()
            + ImageTool.printable(files[file])
    }

    fileprivate func json(files: [String]) -> JSON {
        .object([
            ("start", .number(offset)), ("length", .number(length)), ("depth", .number(UInt64(depth))),
            ("present", .bool(kind != .unallocated)), ("zero", .bool(readsAsZeroes)), ("data", .bool(!readsAsZeroes)),
            ("compressed", kind == .compressed ? true : nil),
            ("offset", kind == .compressed ? nil : fileOffset.map(JSON.number)),
        ])
    }

    private static func hexadecimal(_ number: UInt64) -> String { number == 0 ? "0" : "0x" + String(number, radix: 16) }
}

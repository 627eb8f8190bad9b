// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import CLinux
internal import DiskImage
internal import Linux

/// `swkvm image info`: information about images.
struct ImageInfoCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(canShare: true)
    static let configuration = CommandConfiguration(
        commandName: "info",
        abstract: "Show the format, size, backing file, features and snapshots of a disk image.",
        discussion: """
            EXAMPLES
              swkvm image info disk.qcow2
              swkvm image info --backing-chain --json overlay.qcow2
            """)

    @OptionGroup var image: SourceOptions

    @OptionGroup var data: DataFileOption
    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var named: NamedFilesOptions

    @Flag(help: "Also show every backing file in the chain.")
    var backingChain = false

    @OptionGroup var output: OutputOptions

    func run() throws {
        let chain = try attempt { () throws(DiskImageError) in
            let namedFiles = try named.files(image.file, data.dataFile)
            if backingChain {
                return try ImageInformation.chain(
                    path: image.file, format: image.format, locking: !image.forceShare, dataFile: data.dataFile,
                    vhdSize: vhd.vhdSize,
                    namedFiles: namedFiles)
            }
            return [
                try ImageInformation(
                    path: image.file, format: image.format, locking: !image.forceShare, dataFile: data.dataFile,
                    vhdSize: vhd.vhdSize)
            ]
        }
        if output.isJSON {
            print(backingChain ? JSON.array(chain.map(\.json)) : chain[0].json)
        } else {
            print(chain.map(\.text).joined(separator: "\n\n"))
        }
    }
}

/// An image that is read.
struct SourceOptions: ParsableArguments {
    @Option(
        name: [.short, .long],
        help: ArgumentHelp("\(ImageFormat.names). Default: from the file extension.", valueName: "format"))
    var format: ImageFormat?

    @Flag(
        name: [.customShort("U"), .long],
        help: "Open an image that a running machine may be writing; the output may be inconsistent.")
    var forceShare = false

    @Argument(help: "The image.", completion: .file())
    var file: String
}

extension ImageInformation {
    fileprivate var text: String {
        var lines = [
            "image: \(ImageTool.printable(path))", "file format: \(format.rawValue)",
            "virtual size: \(ImageTool.sizeAndBytes(size))",
            "disk size: \(allocated.map(ImageTool.size) ?? "unavailable")",
        ]
        if encryption != nil { lines.append("encrypted: yes") }
        if isDirty { lines.append("cleanly shut down: no") }
        if let clusterSize { lines.append("cluster_size: \(clusterSize)") }
        if let backing {
            let path =
                backing.path.map { $0 == backing.name ? "" : " (actual path: \(ImageTool.printable($0)))" }
                ?? " (not followed)"
            lines.append("backing file: \(ImageTool.printable(backing.name))\(path)")
            if let format = backing.format { lines.append("backing file format: \(ImageTool.printable(format))") }
        }
        if !snapshots.isEmpty {
            lines.append("Snapshot list:")
            lines.append("ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT")
            lines += snapshots.map(\.line)
        }
        if let remote { lines += remote.lines }
        if let vhd, vhd.chs != vhd.current {
            lines += [
                "Format specific information:", "    current size: \(vhd.current)", "    chs size: \(vhd.chs)",
                "    size taken: \(vhd.taken.rawValue)",
            ]
        }
        guard let qcow2 else { return lines.joined(separator: "\n") }
        lines.append("Format specific information:")
        lines.append("    compat: \(qcow2.compatibility.rawValue)")
        lines.append("    compression type: \(qcow2.compression)")
        if qcow2.compatibility == .version3 { lines.append("    lazy refcounts: \(qcow2.lazyRefcounts)") }
        lines += qcow2.bitmapLines
        lines.append("    refcount bits: \(qcow2.refcountBits)")
        if let dataFile = qcow2.dataFile {
            let path =
                qcow2.dataFilePath.map { $0 == dataFile ? "" : " (actual path: \(ImageTool.printable($0)))" } ?? ""
            lines.append("    data file: \(ImageTool.printable(dataFile))\(path)")
            if let size = qcow2.dataFileAllocated { lines.append("    data file disk size: \(ImageTool.size(size))") }
            lines.append("    data file raw: \(qcow2.dataFileIsRaw)")
        }
        if let encryption { lines += encryption.lines }
        if qcow2.compatibility == .version3 {
            lines.append("    corrupt: \(qcow2.isCorrupt)")
            lines.append("    extended l2: \(qcow2.extendedL2)")
        }
        return lines.joined(separator: "\n")
    }

    fileprivate var json: JSON {
        var specific: JSON?
        if let qcow2 {
            let isVersion3 = qcow2.compatibility == .version3
            specific = .object([
                ("type", "qcow2"),
                (
                    "data",
                    .object([
                        ("compat", .string(qcow2.compatibility.rawValue)),
                        ("compression-type", .string(qcow2.compression)),
                        ("lazy-refcounts", isVersion3 ? .bool(qcow2.lazyRefcounts) : nil),
                        ("bitmaps", qcow2.bitmaps.isEmpty ? nil : .array(qcow2.bitmaps.map(\.json))),
                        ("refcount-bits", .number(UInt64(qcow2.refcountBits))),
                        ("data-file", qcow2.dataFile.map(JSON.string)),
                        ("data-file-actual-size", qcow2.dataFileAllocated.map(JSON.number)),
                        ("data-file-raw", qcow2.dataFile == nil ? nil : .bool(qcow2.dataFileIsRaw)),
                        ("encrypt", encryption?.json),
                        ("corrupt", isVersion3 ? .bool(qcow2.isCorrupt) : nil),
                        ("extended-l2", isVersion3 ? .bool(qcow2.extendedL2) : nil),
                    ])
                ),
            ])
        }
        if let remote { specific = remote.json }
        if let vhd, vhd.chs != vhd.current {
            specific = .object([
                ("type", "vpc"),
                (
                    "data",
                    .object([
                        ("current-size", .number(vhd.current)), ("chs-size", .number(vhd.chs)),
                        ("size-taken", .string(vhd.taken.rawValue)),
                    ])
                ),
            ])
        }
        return .object([
            ("filename", .string(path)), ("format", .string(format.rawValue)), ("virtual-size", .number(size)),
            ("actual-size", allocated.map(JSON.number)),
            ("encrypted", encryption == nil ? nil : true), ("dirty-flag", .bool(isDirty)),
            ("cluster-size", clusterSize.map(JSON.number)),
            ("backing-filename", backing.map { .string($0.name) }),
            ("full-backing-filename", backing?.path.map(JSON.string)),
            ("backing-filename-format", backing?.format.map(JSON.string)),
            ("snapshots", snapshots.isEmpty ? nil : .array(snapshots.map(\.json))),
            ("format-specific", specific),
        ])
    }
}

extension ImageInformation.QCOW2 {
    /// The persistent bitmaps as qemu-img lists them.
    fileprivate var bitmapLines: [String] {
        guard !bitmaps.isEmpty else { return [] }
        return ["    bitmaps:"]
            + bitmaps.enumerated().flatMap { number, bitmap in
                ["        [\(number)]:", "            flags:"]
                    + bitmap.flags.enumerated().map { "                [\($0)]: \($1)" }
                    + [
                        "            name: \(ImageTool.printable(bitmap.name))",
                        "            granularity: \(bitmap.granularity)",
                    ]
            }
    }
}

extension DiskBitmap {
    /// In qemu-img's words and order.
    fileprivate var flags: [String] { (isInUse ? ["in-use"] : []) + (isAutomatic ? ["auto"] : []) }

    fileprivate var json: JSON {
        .object([
            ("flags", .array(flags.map(JSON.string))), ("name", .string(name)), ("granularity", .number(granularity)),
        ])
    }
}

extension ImageInformation.Remote {
    fileprivate var lines: [String] {
        [
            "Server specific information:", "    size: \(size)", "    read-only: \(isReadOnly)", "    flush: \(flush)",
            "    trim: \(trim)",
            "    write zeroes: \(writeZeroes)", "    block status: \(blockStatus)",
            "    block size: at least \(minimumBlock), best \(preferredBlock == 0 ? "unknown" : "\(preferredBlock)"), at most \(maximumPayload)",
        ]
    }

    fileprivate var json: JSON {
        .object([
            ("type", "nbd"),
            (
                "data",
                .object([
                    ("size", .number(size)), ("read-only", .bool(isReadOnly)), ("flush", .bool(flush)),
                    ("trim", .bool(trim)),
                    ("write-zeroes", .bool(writeZeroes)), ("block-status", .bool(blockStatus)),
                    ("minimum-block", .number(minimumBlock)),
                    ("preferred-block", preferredBlock == 0 ? nil : .number(preferredBlock)),
                    ("maximum-payload", .number(maximumPayload)),
                ])
            ),
        ])
    }
}

extension ImageInformation.Encryption {
    fileprivate var lines: [String] {
        var lines = ["    encrypt:", "        format: \(format)"]
        guard let luks else { return lines }
        lines += ["cipher alg: \(luks.cipher)", "cipher mode: \(luks.mode)", "ivgen alg: \(luks.vectors)"].map {
            "        " + $0
        }
        if let hash = luks.vectorHash { lines.append("        ivgen hash alg: \(hash)") }
        lines += ["hash alg: \(luks.hash)", "uuid: \(ImageTool.printable(luks.uuid))", "slots:"].map { "        " + $0 }
        for (index, slot) in luks.slots.enumerated() {
            lines += ["    [\(index)]:", "        active: \(slot.isActive)"].map { "        " + $0 }
            if slot.isActive { lines.append("                iters: \(slot.iterations)") }
            lines.append("                key offset: \(slot.keyOffset)")
            if slot.isActive { lines.append("                stripes: \(slot.stripes)") }
        }
        return lines + [
            "        payload offset: \(luks.payloadOffset)", "        master key iters: \(luks.keyIterations)",
        ]
    }

    fileprivate var json: JSON {
        guard let luks else { return .object([("format", .string(format))]) }
        let slots = luks.slots.map { slot in
            JSON.object([
                ("active", .bool(slot.isActive)), ("iters", slot.isActive ? .number(UInt64(slot.iterations)) : nil),
                ("key-offset", .number(slot.keyOffset)),
                ("stripes", slot.isActive ? .number(UInt64(slot.stripes)) : nil),
            ])
        }
        return .object([
            ("format", .string(format)), ("cipher-alg", .string(luks.cipher)), ("cipher-mode", .string(luks.mode)),
            ("ivgen-alg", .string(luks.vectors)),
            ("ivgen-hash-alg", luks.vectorHash.map(JSON.string)), ("hash-alg", .string(luks.hash)),
            ("uuid", .string(luks.uuid)), ("slots", .array(slots)),
            ("payload-offset", .number(luks.payloadOffset)), ("master-key-iters", .number(UInt64(luks.keyIterations))),
        ])
    }
}

extension ImageInformation.Snapshot {
    fileprivate var line: String {
        func padded(_ text: String, _ width: Int) -> String {
            text + String(repeating: " ", count: max(0, width - text.count))
        }
        func trailing(_ text: String, _ width: Int, _ padding: String = " ") -> String {
            String(repeating: padding, count: max(0, width - text.count)) + text
        }
        func two(_ number: UInt64) -> String { trailing("\(number)", 2, "0") }
        let milliseconds = clock / 1_000_000
        let clockText =
            "\(two(milliseconds / 3_600_000)):\(two(milliseconds / 60_000 % 60)):\(two(milliseconds / 1000 % 60)).\(trailing("\(milliseconds % 1000)", 3, "0"))"
        return padded(ImageTool.printable(identifier), 10) + padded(ImageTool.printable(name), 15)
            + trailing(ImageTool.size(stateSize), 10)
            + trailing(date, 20) + trailing(clockText, 13) + trailing(instructions.map { "\($0)" } ?? "", 11)
    }

    /// In the local time zone.
    private var date: String {
        // The structure names its time zone by a pointer, which is not used.
        var time = time_t(seconds), fields = unsafe tm()
        unsafe localtime_r(&time, &fields)
        func two(_ number: Int32) -> String { number < 10 ? "0\(number)" : "\(number)" }
        let day = unsafe "\(fields.tm_year + 1900)-\(two(fields.tm_mon + 1))-\(two(fields.tm_mday))"
        return unsafe "\(day) \(two(fields.tm_hour)):\(two(fields.tm_min)):\(two(fields.tm_sec))"
    }

    fileprivate var json: JSON {
        .object([
            ("id", .string(identifier)), ("name", .string(name)), ("vm-state-size", .number(stateSize)),
            ("date-sec", .number(UInt64(seconds))),
            ("date-nsec", .number(UInt64(nanoseconds))), ("vm-clock-sec", .number(clock / 1_000_000_000)),
            ("vm-clock-nsec", .number(clock % 1_000_000_000)),
            ("icount", instructions.map(JSON.number)),
        ])
    }
}

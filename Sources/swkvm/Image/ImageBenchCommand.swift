// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage
internal import Linux

/// `swkvm image bench`: how fast an image is.
struct ImageBenchCommand: ImageVerb {
    static let options = OptionSyntax.VerbOptions(canShare: true)
    static let configuration = CommandConfiguration(
        commandName: "bench",
        abstract: "Benchmark reads or writes of a disk image.",
        discussion: """
            --write DESTROYS the contents of the image.

            EXAMPLES
              swkvm image bench --cache none --random disk.qcow2
              swkvm image bench --write --count 10000 --depth 1 scratch.qcow2
            """)

    @Option(
        name: [.short, .long],
        help: ArgumentHelp("\(ImageFormat.names). Default: from the file extension.", valueName: "format"))
    var format: ImageFormat?

    @Option(
        name: [.short, .long], help: ArgumentHelp("Number of requests. (default: 75000)", valueName: "n"),
        transform: wholeNumber(0...UInt64.max))
    var count: UInt64 = 75000

    @Option(
        name: [.short, .long], help: ArgumentHelp("Requests in flight, 1 to 4096. (default: 64)", valueName: "n"),
        transform: wholeNumber(1...4096))
    var depth = 64

    @Option(
        name: [.short, .customLong("buffer-size")],
        help: ArgumentHelp("Size of a request, at most 64M. (default: 4K)", valueName: "size"),
        transform: byteSize(1...64 << 20))
    var size = ByteSize(bytes: 4096)

    @Option(
        name: [.customShort("S"), .customLong("step-size")],
        help: ArgumentHelp(
            "Distance between the starts of consecutive requests. Default: the request size.", valueName: "size"),
        transform: ByteSize.init(parsing:))
    var step: ByteSize?

    @Option(
        name: [.short, .long], help: ArgumentHelp("Offset of the first request. (default: 0)", valueName: "size"),
        transform: ByteSize.init(parsing:))
    var offset = ByteSize(bytes: 0)

    @Flag(name: [.short, .long], help: "Send requests to random offsets instead of sequential ones.")
    var random = false

    @Option(
        help: ArgumentHelp("Seed of the random offsets. (default: 1)", valueName: "n"),
        transform: wholeNumber(0...UInt64.max))
    var seed: UInt64 = 1

    @Flag(name: [.short, .long], help: "Write instead of read. Destroys the contents of the image.")
    var write = false

    @Option(
        help: ArgumentHelp("Byte value to write, 0 to 255. (default: 0)", valueName: "n"),
        transform: wholeNumber(0...UInt8.max))
    var pattern: UInt8 = 0

    @Option(
        help: ArgumentHelp("Flush after this many writes; 0 means only at the end. (default: 0)", valueName: "n"),
        transform: wholeNumber(0...UInt64.max))
    var flushInterval: UInt64 = 0

    @Option(
        name: [.customShort("t"), .long],
        help: ArgumentHelp("Cache mode: writeback, or none (bypass the page cache).", valueName: "mode"))
    var cache = CacheMode.writeback

    @OptionGroup var data: DataFileOption
    @OptionGroup var vhd: VHDSizeOption
    @OptionGroup var named: NamedFilesOptions
    @OptionGroup var keys: KeyOptions

    @Flag(name: [.customShort("U"), .long], help: "Read an image that a running machine may be writing.")
    var forceShare = false

    @Flag(help: "Use synchronous system calls instead of io_uring.")
    var noRing = false

    @Flag(help: "As JSON.")
    var json = false

    @Argument(help: "The image.", completion: .file())
    var file: String

    func validate() throws {
        guard !forceShare || !write else {
            throw ValidationError(
                "The option --write cannot be combined with -U: it requires exclusive access to the image.")
        }
    }

    func run() throws {
        let result = try attempt { () throws(DiskImageError) in
            var bench = ImageBench(path: file)
            bench.options.format = format
            bench.options.report = ImageTool.report
            bench.options.dataFile = data.dataFile
            vhd.apply(to: &bench.options)
            bench.options.namedFiles = try named.files(file, data.dataFile)
            bench.options.keys = try keys.load()
            bench.options.cache = cache
            bench.options.locking = !forceShare
            bench.writes = write
            bench.fill = pattern
            bench.count = count
            bench.depth = depth
            bench.size = Int(clamping: size.bytes)
            bench.offset = offset.bytes
            bench.pattern = random ? .random(seed: seed) : .sequential(step: step?.bytes ?? size.bytes)
            bench.flushInterval = flushInterval
            bench.usesRing = !noRing
            return try bench.run {
                guard !json else { return }
                let how =
                    random
                    ? "random offsets, seed \(seed)"
                    : "starting at offset \(offset.bytes), step size \(step?.bytes ?? size.bytes)"
                print(
                    "Sending \(count) \(write ? "write" : "read") requests, \(size.bytes) bytes each, \(depth) in parallel (\(how))"
                )
                if flushInterval > 0, write { print("Sending flush every \(flushInterval) requests") }
            }
        }
        let perSecond = result.seconds > 0 ? 1 / result.seconds : 0
        if json {
            print(
                JSON.object([
                    ("requests", .number(result.requests)), ("bytes", .number(result.bytes)),
                    ("seconds", .decimal(result.seconds)),
                    ("requests-per-second", .decimal(Double(result.requests) * perSecond)),
                    ("bytes-per-second", .decimal(Double(result.bytes) * perSecond)),
                ]))
        } else {
            print("Run completed in \(JSON.decimal(result.seconds).line) seconds.")
            let rate = ImageTool.size(UInt64(Double(result.bytes) * perSecond))
            print("\(UInt64(Double(result.requests) * perSecond)) requests/s, \(rate)/s")
        }
    }
}

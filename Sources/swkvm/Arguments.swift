// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import Devices
internal import DiskImage
internal import Glibc
internal import GuestMemory
internal import Inventory
internal import Linux
internal import Machine

/// `--rng`, `--rng=max-bytes=1K,period=1000`.
struct EntropyArgument: ExpressibleByArgument, CustomStringConvertible {
    let description: String
    /// What is wrong is reported by ``entropy()``: refused here, the parser would take the option as if no value had
    /// been given.
    private let parsed: Result<Configuration.Entropy, ArgumentProblem>

    static let unlimited = EntropyArgument(argument: "")
    static let completion = ValueCompletion.list(["max-bytes=", "period="])

    init(argument: String) {
        description = argument
        parsed = Result { () throws(ArgumentProblem) in try Self.parse(argument) }
    }

    func entropy() throws(ArgumentProblem) -> Configuration.Entropy { try parsed.get() }

    private static func parse(_ text: String) throws(ArgumentProblem) -> Configuration.Entropy {
        guard !text.isEmpty else { return Configuration.Entropy() }
        var bytes: UInt64?
        var period: Int?
        for (key, value) in try OptionList(text).unique() {
            switch (key, value) {
            case ("max-bytes", let value?):
                guard let size = ByteSize(argument: value), size.bytes > 0 else {
                    throw ArgumentProblem(
                        "max-bytes=\(value) is not a number of bytes; expected 1 or more, such as 64K")
                }
                bytes = size.bytes
            case ("period", let value?):
                guard let number = Int(value), (1...60_000).contains(number) else {
                    throw ArgumentProblem("period=\(value) is not a valid period; expected 1 to 60000 milliseconds")
                }
                period = number
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected max-bytes= or period=")
            }
        }
        guard let bytes else { throw ArgumentProblem("period= requires max-bytes=") }
        return Configuration.Entropy(limit: EntropyLimit(bytes: bytes, period: period ?? 1000))
    }
}

/// `--balloon 512M,stats=5`, `--balloon reporting=on`.
struct BalloonArgument {
    static let completion = ValueCompletion.list([
        "target=", "deflate-on-oom=on/off", "stats=", "reporting=on/off", "hinting=on/off",
    ])

    let settings: BalloonSettings

    init(parsing argument: String) throws {
        var settings = BalloonSettings()
        for (index, (key, value)) in try OptionList(argument).unique().enumerated() {
            switch (key, value) {
            case ("target", let value?):
                guard settings.target == 0 else { throw ArgumentProblem("the size is given twice") }
                settings.target = try Self.target(value)
            case ("deflate-on-oom", let value): settings.deflatesOnOOM = try onOrOff(key, value)
            case ("reporting", let value): settings.reportsFreePages = try onOrOff(key, value)
            case ("hinting", let value): settings.hintsFreePages = try onOrOff(key, value)
            case ("stats", let value?):
                guard let seconds = UInt32(value), seconds <= BalloonSettings.maximumInterval else {
                    throw ArgumentProblem(
                        "stats=\(value) is not valid; expected 1 to \(BalloonSettings.maximumInterval) seconds, or 0 for none"
                    )
                }
                settings.statisticsInterval = seconds
            case (let size, nil) where index == 0 && size.first?.isNumber == true:
                settings.target = try Self.target(size)
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected target=, deflate-on-oom=on|off, stats=, reporting=on|off or hinting=on|off"
                )
            }
        }
        self.settings = settings
    }

    private static func target(_ text: String) throws -> UInt64 {
        do { return try ByteSize.memory(text).bytes } catch { throw ArgumentProblem("\(text): \(error)") }
    }
}

/// `--numa mem=1G,cpus=0-1,…`.
struct NodeArgument {
    static let completion = ValueCompletion.list([
        "mem=", "+cpus=", "+host=", "policy=" + MemoryPolicy.Mode.allCases.map(\.rawValue).joined(separator: "/"),
        "+distance=",
    ])

    let node: Configuration.Node

    init(parsing argument: String) throws {
        var cpus: Set<Int> = []
        var memory: UInt64?
        var mode: MemoryPolicy.Mode?
        var hostNodes: Set<Int> = []
        var distances: [Int: UInt8] = [:]
        for (key, value) in try OptionList(argument).unique(except: ["cpus", "host", "distance"]) {
            switch (key, value) {
            case ("cpus", let value?): cpus.formUnion(try Self.range(value, "CPUs"))
            case ("mem", let value?):
                do { memory = try ByteSize.memory(value).bytes } catch {
                    throw ArgumentProblem("mem=\(value): \(error)")
                }
            case ("host", let value?): hostNodes.formUnion(try Self.range(value, "the host's nodes"))
            case ("policy", let value?):
                guard let known = MemoryPolicy.Mode(rawValue: value) else {
                    throw ArgumentProblem(
                        "policy=\(value) is not recognized; expected \(MemoryPolicy.Mode.allCases.map(\.rawValue).joined(separator: ", "))"
                    )
                }
                mode = known
            case ("distance", let value?):
                let parts = value.split(separator: ":", omittingEmptySubsequences: false)
                guard parts.count == 2, let node = Self.number(parts[0]), let distance = Self.number(parts[1]),
                    distance < 256
                else {
                    throw ArgumentProblem("distance=\(value) is not valid; expected NODE:DISTANCE, such as 1:20")
                }
                distances[node] = UInt8(distance)
            default:
                throw ArgumentProblem(
                    "'\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected mem=, cpus=, host=, policy= or distance="
                )
            }
        }
        guard let memory else { throw ArgumentProblem("a NUMA node needs mem=SIZE") }
        guard mode == nil || !hostNodes.isEmpty else { throw ArgumentProblem("policy= requires host=N") }
        guard mode != .preferred || hostNodes.count == 1 else {
            throw ArgumentProblem("policy=preferred requires exactly one host node")
        }
        node = Configuration.Node(
            cpus: cpus.sorted(), memory: memory,
            policy: hostNodes.isEmpty ? nil : MemoryPolicy(mode ?? .bind, hostNodes: hostNodes), distances: distances)
    }

    /// `3` or `0-3`; numbers up to 4095, more than Linux has of either.
    private static func range(_ text: String, _ what: String) throws -> ClosedRange<Int> {
        let bounds = text.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false).map(number)
        guard let first = bounds.first ?? nil, let last = bounds.last ?? nil, first <= last, last < 4096 else {
            throw ArgumentProblem("'\(text)' does not list \(what); expected N or FIRST-LAST (repeat the key for more)")
        }
        return first...last
    }

    private static func number(_ text: Substring) -> Int? {
        text.utf8.allSatisfy { (0x30...0x39).contains($0) } ? Int(text) : nil
    }
}

/// `--uuid UUID` or `--uuid none`.
struct UUIDArgument {
    /// nil for none.
    let uuid: UUID?

    init(parsing argument: String) throws {
        uuid = UUID(argument)
        guard uuid != nil || argument == "none" else {
            throw ArgumentProblem(
                "'\(argument)' is not a UUID; expected none or a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8 (`uuidgen` makes one)"
            )
        }
    }
}

extension String {
    /// The path behind a word and a colon, as in `unix:PATH`; nil for another word, or without a path.
    func path(after prefix: String) -> String? {
        guard utf8.starts(with: prefix.utf8), utf8.count > prefix.utf8.count else { return nil }
        return String(Substring(utf8.dropFirst(prefix.utf8.count)))
    }
}

extension OptionList {
    /// Refuses a word that is there twice, of which one would be lost.
    /// - Parameter repeatable: words that add to each other.
    /// - Returns: the items.
    func unique(
        except repeatable: Set<String> = []
    ) throws(ArgumentProblem) -> [(key: String, value: String?)] {
        var seen = repeatable
        for (key, _) in items where !seen.insert(key).inserted && !repeatable.contains(key) {
            throw ArgumentProblem("'\(key)' is given twice")
        }
        return items
    }
}

/// `--disk PATH[,…]`.
struct DiskArgument {
    static let completion = ValueCompletion.list(
        file: true,
        [
            "format=" + ImageFormat.allCases.map(\.rawValue).joined(separator: "/"), "ro", "cache=writeback/none",
            "snapshot=", "data-file=@file",
            "+key-file=@file", "+key-fd=", "reconnect=", "backing=on/off/anywhere", "backing-dir=@dir",
            "vhd-size=chs/current", "lock=on/off", "serial=", "queues=", "bps=", "bps-burst=", "iops=", "iops-burst=",
        ])

    private(set) var disk: Configuration.Disk

    /// What is wrong with a path that begins with a word of another program's, unless there is such a file.
    private static func foreignPath(_ path: String) -> ArgumentProblem? {
        guard path.withRawCString({ unsafe access($0, F_OK) }) != 0 else { return nil }
        for word in ["path=", "file="] where path.hasPrefix(word) {
            let rest = path.dropFirst(word.count)
            return ArgumentProblem("disk \(path): expected PATH first, without '\(word)': \(rest)")
        }
        return path.hasPrefix("size=")
            ? ArgumentProblem("disk \(path): expected PATH first; `swkvm image create` creates an image of a size")
            : nil
    }

    init(parsing argument: String) throws {
        var list = OptionList(argument)
        let path = list.takeFirst()
        guard !path.isEmpty else { throw ArgumentProblem("a disk needs a path: PATH[,format=…][,ro]") }
        if let problem = Self.foreignPath(path) { throw problem }
        var options = DiskImageOptions()
        var serial: String?
        var keys: [KeySource] = []
        var queues = 1
        var limit = LimitWords(operations: "iops")
        let items: [(key: String, value: String?)]
        do { items = try list.unique(except: ["key-file", "key-fd", "backing-dir"]) } catch {
            throw ArgumentProblem("disk \(path): \(error)")
        }
        for (key, value) in items {
            do { if try limit.take(key, value) { continue } } catch { throw ArgumentProblem("disk \(path): \(error)") }
            switch (key, value) {
            case ("ro", nil): options.readOnly = true
            case ("format", let value?):
                guard let format = ImageFormat(rawValue: value) else {
                    throw ArgumentProblem(
                        "disk \(path): format=\(value) is not recognized; expected one of \(ImageFormat.names)")
                }
                options.format = format
            case ("cache", let value?):
                guard let cache = CacheMode(rawValue: value) else {
                    throw ArgumentProblem("disk \(path): cache=\(value) is not recognized; expected writeback or none")
                }
                options.cache = cache
            case ("vhd-size", let value?):
                guard let size = VHDSize(rawValue: value) else {
                    throw ArgumentProblem("disk \(path): vhd-size=\(value) is not recognized; expected chs or current")
                }
                options.vhdSize = size
            case ("snapshot", let value?):
                guard !value.isEmpty else {
                    throw ArgumentProblem("disk \(path): snapshot= needs a snapshot's number or name")
                }
                options.snapshot = value
            case ("data-file", let value?):
                guard !value.isEmpty else { throw ArgumentProblem("disk \(path): data-file= needs a path") }
                options.dataFile = value
            case ("reconnect", let value?):
                guard let seconds = Int(value), DiskImageOptions.possibleReconnect.contains(seconds) else {
                    throw ArgumentProblem(
                        "disk \(path): reconnect=\(value) is not a valid time; expected 0 to \(DiskImageOptions.possibleReconnect.upperBound) seconds"
                    )
                }
                options.reconnect = seconds
            case ("key-file", let value?):
                guard !value.isEmpty else { throw ArgumentProblem("disk \(path): key-file= needs a path") }
                keys.append(.file(value))
            case ("key-fd", let value?):
                guard let number = Int32(value), number >= 0 else {
                    throw ArgumentProblem(
                        "disk \(path): key-fd=\(value) is not a file descriptor number; expected one such as 3")
                }
                keys.append(.descriptor(number))
            case ("backing", let value?) where ["on", "off", "anywhere"].contains(value):
                options.allowsBacking = value != "off"
                options.namedFiles.isAnywhere = value == "anywhere"
            case ("backing-dir", let value?):
                guard !value.isEmpty else { throw ArgumentProblem("disk \(path): backing-dir= needs a directory") }
                options.namedFiles.directories.append(value)
            case ("lock", "on"?): options.locking = true
            case ("lock", "off"?): options.locking = false
            case ("serial", let value?):
                guard (1...20).contains(value.utf8.count) else {
                    throw ArgumentProblem(
                        "disk \(path): a serial number has 1 to 20 bytes, this one \(value.utf8.count)")
                }
                serial = value
            case ("queues", let value?):
                guard let count = Int(value), (1...BlockDevice.maximumQueues).contains(count) else {
                    throw ArgumentProblem(
                        "disk \(path): queues=\(value) is not valid; expected a number from 1 to \(BlockDevice.maximumQueues)"
                    )
                }
                queues = count
            default:
                throw ArgumentProblem(
                    "disk \(path): '\(key)\(value.map { "=" + $0 } ?? "")' is not recognized; expected format=, ro, cache=, snapshot=, data-file=, key-file=, key-fd=, reconnect=, backing=on|off|anywhere, backing-dir=, vhd-size=, lock=on|off, serial=, queues=, bps=, bps-burst=, iops= or iops-burst="
                )
            }
        }
        disk = Configuration.Disk(path: path, options: options, serial: serial, queues: queues)
        disk.keys = keys
        do { disk.limit = try limit.limit() } catch { throw ArgumentProblem("disk \(path): \(error)") }
    }
}

// SPDX-License-Identifier: Apache-2.0

import CLinux
import Devices
import DiskImage
import Glibc
import Linux
import Logging
import TestSupport
import Testing
import Virtio

@testable import Machine

/// Every figure with a value, twice where there may be several of a thing.
private func fullSnapshot(machine: String = "vm") -> MetricsSnapshot {
    func values(_ scope: Metric.Scope) -> [String: MetricsSnapshot.Value] {
        var values: [String: MetricsSnapshot.Value] = [:]
        for (index, metric) in Metric.all.enumerated() where metric.scope == scope {
            let number = UInt64(index + 1)
            values[metric.field] =
                metric.label != nil
                ? .byLabel([("first", number), ("second", 2 * number)])
                : metric.field.hasSuffix("seconds") ? .decimal(Double(number) + 0.25) : .whole(number)
        }
        return values
    }
    var groups = [Metric.Scope.machine, .memory, .process].map { MetricsSnapshot.Group(scope: $0, values: values($0)) }
    for cpu in 0..<2 { groups.append(.init(scope: .vcpu, labels: [("vcpu", "\(cpu)")], values: values(.vcpu))) }
    for (device, scopes) in [
        ("blk0", [Metric.Scope.block, .nbd]), ("net0", [.network]), ("balloon0", [.balloon]),
        ("vsock0", [.vsock]), ("con0", [.console]),
    ] {
        for scope in [.device] + scopes {
            groups.append(.init(scope: scope, labels: [("device", device)], values: values(scope)))
        }
    }
    for file in 0..<2 {
        let labels = [(name: "device", value: "blk0"), (name: "file", value: "\(file)")]
        groups.append(.init(scope: .image, labels: labels, values: values(.image)))
    }
    return MetricsSnapshot(reason: "signal", time: "2026-01-01T00:00:00.000Z", machine: machine, groups: groups)
}

@Suite(.timed) struct MetricsTests {
    /// The rows of the documentation's tables of figures: JSON path and Prometheus name.
    private func documented() throws -> [(path: String, name: String, unit: String)] {
        let file = "\(#filePath)".replacing("Tests/MachineTests/MetricsTests.swift", with: "docs/metrics.md")
        let text = String(decoding: try readFile(file, limit: 1 << 20), as: UTF8.self)
        return text.split(separator: "\n").compactMap { line in
            let cells = line.split(separator: "|").map {
                $0.split(separator: " ").joined(separator: " ").replacing("`", with: "")
            }
            return cells.count == 4 && cells[1].hasPrefix("swkvm_") ? (cells[0], cells[1], cells[2]) : nil
        }
    }

    @Test func theDocumentationHasEachFigureAndNoOther() throws {
        let rows = try documented()
        #expect(rows.map(\.path) == Metric.all.map(\.path))
        #expect(rows.map(\.name) == Metric.all.map(\.name))
        #expect(Set(rows.map(\.name)).count == rows.count)
        for row in rows {
            #expect(
                (row.unit == "bytes") == row.path.contains("bytes")
                    && (row.unit == "seconds") == row.path.contains("seconds"))
        }
    }

    @Test func theLabelsAreDocumented() throws {
        let file = "\(#filePath)".replacing("Tests/MachineTests/MetricsTests.swift", with: "docs/metrics.md")
        let text = String(decoding: try readFile(file, limit: 1 << 20), as: UTF8.self)
        for kind in DeviceEvents.Kind.names { #expect(text.contains("`\(kind)`"), "\(kind)") }
    }

    /// What is written has each documented figure and no other, in both formats.
    /// A counter that nobody can read is of no use: whatever a device counts is a figure.
    @Test func eachCounterOfADeviceIsAFigure() throws {
        let root = "\(#filePath)".replacing("Tests/MachineTests/MetricsTests.swift", with: "Sources/")
        func text(_ path: String) throws -> String {
            String(decoding: try readFile(root + path, limit: 1 << 20), as: UTF8.self)
        }
        let shown = try text("Machine/Metrics/Machine+Metrics.swift")
        var found = 0, internalNames = ["hostDrops", "hostSendDrops"]
        for file in [
            "Virtio/DeviceSignals", "Devices/Network/NetworkCounters", "Devices/Block/BlockDevice",
            "Devices/Console/ConsoleDevice", "Devices/Vsock/VsockCounters",
        ] {
            for match in try text(file + ".swift").matches(of: /public let (\w+) = (DeviceCounters\.)?Counter\(\)/) {
                #expect(shown.contains(".\(match.1).value"), "\(file): \(match.1)")
                internalNames.append(String(match.1))
                found += 1
            }
        }
        #expect(found == 39, "\(found)")
        // The documentation calls each by its name in the metrics.
        for document in ["networking", "disks", "console", "pci", "debugging", "performance", "metrics"] {
            let words = Set(try text("../docs/\(document).md").split { !$0.isLetter && !$0.isNumber && $0 != "_" })
            for name in internalNames where name.contains(where: \.isUppercase) {
                #expect(!words.contains(name[...]), "\(document): \(name)")
            }
        }
        found = 0
        for match in try text("DiskImage/Memory/CacheStatistics.swift").matches(of: /public var (\w+): UInt64/) {
            #expect(shown.contains("$0.\(match.1)"), "\(match.1)")
            found += 1
        }
        #expect(found == 4, "\(found)")
    }

    @Test func theOutputHasEachDocumentedFigureAndNoOther() throws {
        let rows = try documented()
        let snapshot = fullSnapshot()
        var paths: Set<String> = []
        func collect(_ value: Any, _ path: String) {
            if let object = value as? [String: Any] {
                let isDivided = Metric.all.contains { $0.path == path }
                if isDivided {
                    paths.insert(path)
                } else {
                    for (key, value) in object { collect(value, path.isEmpty ? key : "\(path).\(key)") }
                }
            } else if let array = value as? [Any] {
                for value in array { collect(value, path + "[]") }
            } else {
                paths.insert(path)
            }
        }
        collect(try parseJSON(snapshot.json), "")
        #expect(
            paths.subtracting([
                "time", "reason", "name", "vcpus[].vcpu", "devices[].device", "devices[].images[].file",
            ]) == Set(rows.map(\.path)))

        let lines = snapshot.prometheus.split(separator: "\n")
        let sampled = Set(lines.filter { !$0.hasPrefix("#") }.map { String($0.prefix { $0 != "{" }) })
        #expect(sampled == Set(rows.map(\.name)))
        #expect(
            lines.count { $0.hasPrefix("# HELP ") } == rows.count
                && lines.count { $0.hasPrefix("# TYPE ") } == rows.count)
        #expect(
            lines.contains(
                #"swkvm_device_events_total{machine="vm",device="blk0",kind="second"} \#(2 * (1 + Metric.all.firstIndex { $0.name == "swkvm_device_events_total" }!))"#
            ))
        let hits = 1 + Metric.all.firstIndex { $0.name == "swkvm_image_cache_hits_total" }!
        #expect(
            lines.contains(
                #"swkvm_image_cache_hits_total{machine="vm",device="blk0",file="1",cache="first"} \#(hits)"#))
    }

    /// Each queue of a disk, and each cache of each of its files, has figures of its own.
    @Test func aDiskHasFiguresOfEachQueueAndCache() throws {
        let directory = "/tmp/swkvm-metrics-\(getpid())-\(UInt64.random(in: 0...UInt64.max))"
        try #require(mkdir(directory, 0o700) == 0)
        defer { _ = system("rm -rf '\(directory)'") }
        let made = system(
            """
            cd '\(directory)' && qemu-img create -q -f vdi base.vdi 4M &&
                qemu-img create -q -f qcow2 -b base.vdi -F vdi top.qcow2
            """)
        try #require(made == 0)
        let device = try BlockDevice(name: "blk3", image: DiskImage(path: directory + "/top.qcow2"), queues: 2)
        device.statistics.queues[0].reads.add(3)
        device.statistics.queues[1].reads.add(4)
        device.statistics.queues[1].failures.add()
        let groups = Machine.metrics(of: device, PastCounters.Counts())
        let block = try #require(groups.first { $0.scope == .block }).values
        #expect(block["reads"] == .whole(7) && block["failures"] == .whole(1))
        #expect(block["queue_reads"] == .byLabel([("0", 3), ("1", 4)]))
        #expect(block["queue_failures"] == .byLabel([("0", 0), ("1", 1)]))
        #expect(block["queue_flushes"] == .byLabel([("0", 0), ("1", 0)]))
        let images = groups.filter { $0.scope == .image }
        #expect(images.map { $0.labels.map(\.value) } == [["blk3", "0"], ["blk3", "1"]])
        let none: [MetricsSnapshot.Value?] = [
            .byLabel([("mapping", 0), ("refcounts", 0), ("decompressed", 0)]), .byLabel([("mapping", 0)]),
        ]
        #expect(images.map { $0.values["cache_hits"] } == none && images.map { $0.values["cache_misses"] } == none)
        guard case .byLabel(let sizes)? = images[0].values["cache_size_bytes"] else {
            return #expect(Bool(false), "\(images)")
        }
        #expect(sizes.count == 3 && sizes.allSatisfy { $0.value > 0 })
    }

    @Test func oneObjectIsOneLine() throws {
        let json = fullSnapshot(machine: "a \"b\"\n\\c").json
        #expect(json.hasSuffix("}\n") && json.count { $0 == "\n" } == 1)
        let object = try #require(try parseJSON(json) as? [String: Any])
        #expect(object["reason"] as? String == "signal" && (object["vcpus"] as? [Any])?.count == 2)
    }

    /// Names of machines are the user's, and may be no UTF-8.
    @Test(arguments: ["vm", "a\"b\\c\nd", String(raw: [0x76, 0xe9, 0x6d])])
    func prometheusTakesTheText(machine: String) throws {
        let text = fullSnapshot(machine: machine).prometheus
        let file = "/tmp/swkvm-metrics-\(getpid())-\(UInt64.random(in: 0...UInt64.max)).prom"
        defer { unlink(file) }
        try write(text, to: file)
        let status = system("promtool check metrics <'\(file)' >'\(file).log' 2>&1")
        let answer = try contents(file + ".log")
        #expect(status == 0 && answer.isEmpty, "\(answer)")
        unlink(file + ".log")
    }
}

// MARK: - The file

private func write(_ text: String, to path: String) throws {
    let file = try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC, mode: 0o600)
    var rest = Array(text.utf8)[...]
    while !rest.isEmpty { rest = rest.dropFirst(try file.writeOnce(rest)) }
}

private func contents(_ path: String) throws -> String {
    String(decoding: try readFile(path, limit: 1 << 24), as: UTF8.self)
}

/// A reader of JSON for what metrics have: objects, arrays, strings, numbers.
private func parseJSON(_ text: String) throws -> Any {
    struct Problem: Error { let rest: String }
    var rest = text[...]
    func take(_ character: Character) throws {
        guard rest.popFirst() == character else { throw Problem(rest: String(rest)) }
    }
    func string() throws -> String {
        try take("\"")
        var result = ""
        while let next = rest.popFirst(), next != "\"" {
            guard next == "\\" else { result.append(next); continue }
            switch rest.popFirst() {
            case "n": result.append("\n")
            case let other?: result.append(other)
            case nil: throw Problem(rest: "")
            }
        }
        return result
    }
    func value() throws -> Any {
        switch rest.first {
        case "{":
            try take("{")
            var object: [String: Any] = [:]
            while rest.first != "}" {
                let key = try string()
                try take(":")
                guard object.updateValue(try value(), forKey: key) == nil else {
                    throw Problem(rest: "\(key) is there twice")
                }
                if rest.first == "," { try take(",") }
            }
            try take("}")
            return object
        case "[":
            try take("[")
            var array: [Any] = []
            while rest.first != "]" {
                array.append(try value())
                if rest.first == "," { try take(",") }
            }
            try take("]")
            return array
        case "\"": return try string()
        default:
            let digits = rest.prefix { "0123456789.".contains($0) }
            guard let number = Double(digits) else { throw Problem(rest: String(rest)) }
            rest = rest[digits.endIndex...]
            return number
        }
    }
    return try value()
}

/// Lines of a log.
private final class LogLines: Sendable {
    private let lines = Guarded<[String]>([])
    var all: [String] { lines.withLock { $0 } }
    func add(_ line: String) { lines.withLock { $0.append(line) } }
    var events: DeviceEvents { DeviceEvents { [self] level, line in add("\(level): \(line)") } }
}

@Suite(.timed) struct MetricsFileTests {
    private let directory: String
    private let lines = LogLines()

    init() throws {
        directory = "/tmp/swkvm-metrics-\(getpid())-\(UInt64.random(in: 0...UInt64.max))"
        guard mkdir(directory, 0o700) == 0 else { throw SystemCallError.last("mkdir") }
    }

    private func remove() { _ = system("rm -rf '\(directory)'") }

    @Test func linesAreAppendedToAPrivateFile() throws {
        defer { remove() }
        let path = directory + "/m.jsonl"
        for round in 1...2 {
            let file = try MetricsFile(MetricsTarget.appending(to: path), events: lines.events)
            for index in 0..<3 { file.write("{\(round) \(index)}\n") }
            file.close()
        }
        #expect(try contents(path) == "{1 0}\n{1 1}\n{1 2}\n{2 0}\n{2 1}\n{2 2}\n")
        var status = stat()
        #expect(unsafe stat(path, &status) == 0 && status.st_mode & 0o777 == 0o600)
        #expect(lines.all.isEmpty)
    }

    @Test func whatCannotBeAppendedToIsRefused() throws {
        defer { remove() }
        symlink("/dev/null", directory + "/link")
        symlink(directory + "/nothing", directory + "/dangling")
        for (path, error) in [
            (directory, EISDIR), (directory + "/link", ELOOP), (directory + "/dangling", ELOOP),
            (directory + "/no/file", ENOENT),
        ] {
            #expect(throws: SystemCallError("open", errno: error), "\(path)") {
                _ = try MetricsTarget.appending(to: path)
            }
        }
        #expect(access(directory + "/nothing", F_OK) != 0)
    }

    @Test func devicesAndPipesGetLines() throws {
        defer { remove() }
        let null = try MetricsFile(MetricsTarget.appending(to: "/dev/null"), events: lines.events)
        null.write("x\n")
        null.close()
        let path = directory + "/pipe"
        mkfifo(path, 0o600)
        // Nobody reads yet.
        let file = try MetricsFile(MetricsTarget.appending(to: path), events: lines.events)
        let reader = try FileDescriptor.open(path, O_RDONLY | O_NONBLOCK)
        file.write("one\n")
        file.write("two\n")
        file.close()
        var bytes = [UInt8](repeating: 0, count: 100)
        // The kernel writes within the array.
        let count = unsafe bytes.withUnsafeMutableBytes { unsafe read(reader.rawValue, $0.baseAddress, $0.count) }
        #expect(String(decoding: bytes.prefix(max(0, count)), as: UTF8.self) == "one\ntwo\n")
        #expect(lines.all.isEmpty)
    }

    /// Nobody who reports waits for a pipe that nobody reads; neither does the end.
    @Test func aPipeThatNobodyReadsIsNotWaitedFor() throws {
        defer { remove() }
        let path = directory + "/pipe"
        mkfifo(path, 0o600)
        let file = try MetricsFile(MetricsTarget.appending(to: path), events: lines.events)
        let text = String(repeating: "x", count: 100_000) + "\n"
        for _ in 0..<100 { file.write(text) }
        file.close()
        #expect(
            lines.all == ["warning: metrics cannot be written to \(path): reports were dropped: it accepts no more"]
                || lines.all.first
                    == "warning: metrics cannot be written to \(path): reports were dropped: it accepts no more"
        )
    }

    @Test func aFullDiskIsReportedOnce() throws {
        defer { remove() }
        let file = try MetricsFile(MetricsTarget.appending(to: "/dev/full"), events: lines.events)
        for index in 0..<20 {
            file.write("x\n")
            // The first one alone: more at a time than the file takes are another event.
            while index == 0, lines.all.isEmpty { usleep(1000) }
        }
        file.close()
        #expect(lines.all.first == "warning: metrics cannot be written to /dev/full: No space left on device")
        #expect(lines.all.count { $0.contains("No space left") } == 1)
    }

    @Test func aFileIsReplacedAsAWhole() throws {
        defer { remove() }
        let path = directory + "/m.prom"
        // One that a process left which was killed.
        try write("old", to: directory + "/.m.prom.swkvm")
        let file = try MetricsFile(MetricsTarget.replacing(path), events: lines.events)
        #expect(access(path, F_OK) != 0)
        file.write("one\n")
        while access(path, F_OK) != 0 { usleep(1000) }
        let reader = try FileDescriptor.open(path, O_RDONLY)
        file.write("two, which is longer\n")
        file.close()
        #expect(try contents(path) == "two, which is longer\n")
        // Who has opened the old one reads the old one.
        var bytes = [UInt8](repeating: 0, count: 100)
        // The kernel writes within the array.
        let count = unsafe bytes.withUnsafeMutableBytes { unsafe read(reader.rawValue, $0.baseAddress, $0.count) }
        #expect(String(decoding: bytes.prefix(max(0, count)), as: UTF8.self) == "one\n")
        #expect(access(directory + "/.m.prom.swkvm", F_OK) != 0)
        #expect(lines.all.isEmpty)
    }

    @Test func onlyARegularFileIsReplaced() throws {
        defer { remove() }
        try write("kept", to: directory + "/target")
        symlink(directory + "/target", directory + "/link")
        mkfifo(directory + "/pipe", 0o600)
        for (path, error) in [
            (directory, EISDIR), (directory + "/", EISDIR), (directory + "/link", ELOOP),
            (directory + "/pipe", ENOTSUP),
            ("/dev/null", ENOTSUP), (directory + "/no/file", ENOENT), ("", EISDIR),
        ] {
            #expect(throws: SystemCallError("open", errno: error), "\(path)") { _ = try MetricsTarget.replacing(path) }
        }
        #expect(try contents(directory + "/target") == "kept")
    }

    /// A file of something else that a mistyped command names.
    @Test(arguments: ["disk", "{", "# HELP swkvm_x\n"]) func whatBeginsOtherwiseIsKept(text: String) throws {
        defer { remove() }
        let path = directory + "/file"
        try write(text, to: path)
        let other = SystemCallError("open", errno: EEXIST)
        if text != "{" { #expect(throws: other) { _ = try MetricsTarget.appending(to: path) } }
        if text == "disk" || text == "{" { #expect(throws: other) { _ = try MetricsTarget.replacing(path) } }
        #expect(try contents(path) == text)
        #expect(access(directory + "/.file.swkvm", F_OK) != 0)
        // An empty one has nothing to lose.
        try write("", to: path)
        _ = try MetricsTarget.appending(to: path)
        _ = try MetricsTarget.replacing(path)
    }
}

// MARK: - Running machines

private struct LineLog: LogHandler {
    var logLevel = Logger.Level.trace
    var metadata: Logger.Metadata = [:]
    let add: @Sendable (String) -> Void

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        add("\(event.level): " + (metadata[Logger.deviceKey].map { "\($0): " } ?? "") + "\(event.message)")
    }
}

/// Milliseconds that a test lets pass.
private final class Clock: Sendable {
    let now = Guarded<UInt64>(1_000)
}

private final class MachineBox: Sendable {
    let machine = Guarded<Machine?>(nil)
}

private final class Nowhere: SerialSink {
    func take(_ more: Span<UInt8>) -> Int { more.count }
}

@Suite(.timed, .enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "needs a /dev/kvm that opens"))
struct MachineEventTests {
    /// The event loop reports each minute what was only counted; the test has the minutes pass.
    @Test func theSumsAreReportedWhileTheMachineRuns() throws {
        let lines = LogLines(), clock = Clock(), machines = MachineBox()
        var configuration = Configuration(name: "test", memory: .init(size: 64 << 20), commandLine: "")
        configuration.entropy = Configuration.Entropy()
        configuration.eventClock = { clock.now.withLock { $0 } }
        let log = Logger(label: "test") { _ in
            LineLog { line in
                lines.add(line)
                if line.contains(" more: ") { machines.machine.withLock { $0 }?.control.end(.quit) }
            }
        }
        let machine = try Machine(configuration, output: Nowhere(), log: log)
        machines.machine.withLock { $0 = machine }
        let events = machine.parts.devices.all[0].device.deviceEvents
        for _ in 0..<5 { events.report(.needsReset, .error, "it needs a reset") }
        #expect(lines.all.count { $0.contains("it needs") } == 1)
        let console = try Console.open(.none)
        var loop = try EventLoop(machine, console, signals: SignalSet([]).descriptor(), terminal: nil, eventPeriod: 1)
        try machine.start()
        clock.now.withLock { $0 += DeviceEvents.period }
        loop.run { _ in }
        _ = machine.waitForEnd()
        machines.machine.withLock { $0 = nil }
        #expect(
            lines.all.filter { $0.contains("it needs") } == [
                "error: rng0: it needs a reset", "error: rng0: 4 more: it needs a reset",
            ])
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// `--metrics` and `--log-format` of the real program.
@Suite(.timed, .serialized) struct MetricsTests {
    private let directory: TemporaryDirectory
    private let disk: String

    init() throws {
        directory = try TemporaryDirectory()
        disk = try directory.write([UInt8](repeating: 7, count: 1 << 20), to: "disk.raw")
    }

    private func written(_ path: String) -> [String] {
        ((try? readFile(path, limit: 1 << 24)).map { String(decoding: $0, as: UTF8.self) } ?? "").split(separator: "\n")
            .map(String.init)
    }

    private func jq(_ filter: String, _ line: String) throws -> String {
        let file = try directory.write(Array(line.utf8), to: "line.json")
        return try shell("python3 -c 'import json; d = json.load(open(\"\(file)\")); print(\(filter))'")
    }

    @Test func theCountersAreWrittenOnASignalAndAtTheEnd() throws {
        let path = directory("m.jsonl")
        let machine = try Program.machineAtPrompt(["--name", "mine", "--disk", disk, "--rng", "--metrics", path])
        _ = try machine.ask("sum vda 0 8")
        machine.send(signal: SIGUSR1)
        #expect(try eventually { written(path).count == 1 })
        _ = try machine.ask("sum vda 8 8")
        try machine.powerOff()
        let lines = written(path)
        #expect(lines.count == 2)
        guard lines.count == 2 else { return }
        for (line, reason, bytes) in [(lines[0], "signal", 4096), (lines[1], "end", 8192)] {
            let fields =
                "d[\"name\"], d[\"reason\"], d[\"devices\"][0][\"device\"], d[\"devices\"][0][\"block\"][\"read_bytes\"], len(d[\"devices\"]), d[\"memory\"][\"size_bytes\"]"
            #expect(try jq(fields, line) == "mine \(reason) blk0 \(bytes) 2 \(64 << 20)\n")
        }
    }

    /// A read of a cluster that is mapped already finds its table in the cache.
    @Test func queuesAndCachesHaveCountersOfTheirOwn() throws {
        let path = directory("m.jsonl")
        try shell("cd '\(directory.path)'; qemu-img convert -f raw -O qcow2 disk.raw disk.qcow2")
        let machine = try Program.machineAtPrompt(["--disk", directory("disk.qcow2") + ",queues=2", "--metrics", path])
        for _ in 0..<2 { _ = try machine.ask("sum vda 0 8") }
        try machine.powerOff()
        let line = written(path).last ?? "{}"
        let reads = "sum(d[\"devices\"][0][\"block\"][\"queue_reads\"].values())"
        #expect(try jq("\(reads) == d[\"devices\"][0][\"block\"][\"reads\"] >= 2", line) == "True\n")
        #expect(try jq("len(d[\"devices\"][0][\"block\"][\"queue_read_bytes\"])", line) == "2\n")
        let image = "d[\"devices\"][0][\"images\"][0]"
        #expect(
            try jq(
                "\(image)[\"file\"], \(image)[\"cache_misses\"][\"mapping\"], \(image)[\"cache_hits\"][\"mapping\"] > 0",
                line) == "0 1 True\n", "\(line)")
    }

    @Test func prometheusTakesTheFile() throws {
        let path = directory("m.prom")
        let machine = try Program.machineAtPrompt(
            ["--disk", disk, "--metrics", path, "--metrics-format", "prometheus", "--metrics-interval", "1"])
        _ = try machine.ask("sum vda 0 8")
        #expect(
            try eventually {
                written(path).contains(#"swkvm_block_read_bytes_total{machine="swkvm",device="blk0"} 4096"#)
            })
        try machine.powerOff()
        #expect(try shell("promtool check metrics <'\(path)' 2>&1") == "")
        #expect(try shell("ls -A '\(directory.path)' | grep -c swkvm || true") == "0\n")
    }

    /// What was counted before a reboot of the guest is not forgotten.
    @Test func countersGoOnOverAReboot() throws {
        let path = directory("m.jsonl")
        let machine = try Program.machineAtPrompt(["--disk", disk, "--metrics", path])
        _ = try machine.ask("sum vda 0 8")
        machine.send(signal: SIGUSR1)
        #expect(try eventually { written(path).count == 1 })
        try machine.type("reboot\n")
        try machine.wait(for: Program.prompt)
        try machine.powerOff()
        let lines = written(path)
        #expect(lines.count == 2)
        let requests = try lines.map { Int(try jq("d[\"devices\"][0][\"requests\"]", $0).dropLast()) ?? -1 }
        #expect(requests.count == 2 && requests[1] >= requests[0] && requests[0] > 0, "\(requests)")
        #expect(try jq("d[\"machine\"][\"reboots\"]", lines.last ?? "{}") == "1\n")
    }

    @Test func aFileThatCannotBeOpenedIsAnError() throws {
        for (options, status, sentence) in [
            (
                ["--metrics", directory.path], 66 as Int32,
                "the file for metrics, \(directory.path), cannot be opened: Is a directory (open)"
            ),
            (
                ["--metrics", "/dev/null", "--metrics-format", "prometheus"], 64,
                "the file for metrics cannot be /dev/null: it is not a regular file (see --metrics-format)"
            ),
            (["--metrics-interval", "5"], 64, "the option --metrics-interval requires --metrics"),
            (["--metrics", "x", "--metrics-interval", "0"], 64, "expected a whole number, 1 to 86400"),
        ] {
            let machine = try Program.machine(options + ["--cmdline", "test=none"])
            try machine.expectEnd(status)
            #expect(machine.errors.text.contains(sentence), "\(machine.errors.text)")
        }
    }

    /// A disk that is full, and a reader that takes nothing, are no reason to stop a machine.
    @Test(arguments: ["full", "pipe"]) func theMachineOutlivesItsMetrics(kind: String) throws {
        let path = kind == "full" ? "/dev/full" : directory("pipe")
        if kind == "pipe" { mkfifo(path, 0o600) }
        let machine = try Program.machineAtPrompt(["--disk", disk, "--metrics", path, "--metrics-interval", "1"])
        for _ in 0..<100 { machine.send(signal: SIGUSR1) }
        if kind == "full" {
            try machine.waitForError("warning: metrics cannot be written to /dev/full: No space left on device")
        }
        #expect(try machine.ask("echo alive") == ["alive"])
        try machine.powerOff()
    }

    // MARK: The log

    /// Each line on standard error is an object, also about a path that is no UTF-8.
    @Test func theLogAsJSON() throws {
        let script = """
            name="$(printf 'd"i\\351').raw"
            cd '\(directory.path)'
            mv disk.raw "$name"
            exec '\(Host.swkvm)' run --mem 64M --disk "$name" --log-format json --log-level info
            """
        let machine = try Program(["sh", "-euc", script], input: .pipe)
        try machine.wait(for: Program.prompt)
        try shell("cd '\(directory.path)'; for file in *.raw; do truncate -s 4096 \"$file\"; done")
        _ = try machine.ask("sum vda 100 8")
        machine.send(signal: SIGTERM)
        try machine.expectEnd(0)
        var levels: Set<String> = []
        for line in machine.errors.lines {
            let hasOnlyThese = #"set(d) - {"device"} == {"time", "level", "message"}"#
            let fields = try jq("d[\"level\"], d.get(\"device\"), len(d[\"time\"]), \(hasOnlyThese)", line)
                .split { $0.isWhitespace }
            #expect(fields.count == 4 && fields[2] == "24" && fields[3] == "True", "\(line)")
            levels.insert("\(fields[0]) \(fields[1])")
        }
        #expect(levels.isSuperset(of: ["info None", "error blk0", "notice None"]), "\(levels)")
        #expect(machine.errors.text.contains(#"i\\xe9.raw"#), "\(machine.errors.text)")
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import TestSupport
import Testing

/// The tests of crashes find what is wrong: the log of a workload is changed into what a program without one of the
/// rules of docs/qcow2.md would have left, and then there is damage. Of the log as it is there is none.
@Suite(.timed) struct CrashCheckTests {
    let directory = TemporaryDirectory(inMemory: true)

    enum Rule: String, CaseIterable, CustomTestStringConvertible {
        /// Counts and data are durable before the mapping is written.
        case barrierBeforeTheMapping
        /// A flush ends when the mapping is durable.
        case flushAfterTheMapping
        /// The mapping is written after counts and data.
        case countsFirst
        /// All of them.
        case synchronisation

        var testDescription: String { rawValue }
    }

    private static let seed: UInt64 = 9, size = 256 << 10

    @Test(arguments: [
        ("cluster_size=512", false), ("cluster_size=4k,compat=0.10", true), ("cluster_size=16k,extended_l2=on", true),
    ])
    func everyRuleOfQCOW2IsNeeded(options: String, hasBacking: Bool) throws {
        let path = directory.file("disk.qcow2")
        let contents = hasBacking ? randomBytes(Self.size, seed: Self.seed) : [UInt8](repeating: 0, count: Self.size)
        try directory.write("base.raw", contents)
        let made = run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
                + (hasBacking ? ["-b", "base.raw", "-F", "raw"] : []) + [path, "\(Self.size)"])
        try #require(made.status == 0, "\(made.output)")
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        let states = try log.record(
            path, DiskImageOptions(locking: false, metadataCacheSize: 0), contents, seed: Self.seed, maximum: 16 << 10,
            rounds: 18)
        func problem(_ log: CrashLog) throws -> String? {
            try first(log, [start], tears: false) { files, flushed, comment in
                try directory.write("crashed.qcow2", files[0])
                let report = try DiskImage.check(path: directory.file("crashed.qcow2"), options: unlocked)
                if let error = report.findings.first(where: { !$0.isLeak }) { return "\(error), \(comment)" }
                return wrong(
                    "crashed.qcow2", DiskImageOptions(readOnly: true, locking: false), states[flushed], comment)
            }
        }
        #expect(try problem(log) == nil)
        for rule in Rule.allCases {
            #expect(try problem(log.without(rule)) != nil, "nobody notices that \(rule) is missing")
        }
    }

    /// What lies in the file where new blocks go must not be seen. There is nothing where a data file is the disk as it
    /// is, and beyond the end of a VMDK file, where its new grains go: there the first rule is for what nobody can see
    /// here, the host's own file system.
    @Test(arguments: SmallImage.allCases) func everyRuleOfOtherFormatsIsNeeded(image: SmallImage) throws {
        try image.make(in: directory)
        try image.leaveRemains(in: directory, seed: Self.seed)
        let path = directory.file(image.names[0])
        let contents = [UInt8](repeating: 0, count: image.size)
        let start = try image.names.map { try directory.bytes($0) }
        let log = CrashLog(image.names.map { directory.file($0) })
        let states = try log.record(path, image.options, contents, seed: Self.seed, maximum: 64 << 10, rounds: 15)
        func problem(_ log: CrashLog) throws -> String? {
            try first(log, start, tears: true) { files, flushed, comment in
                for (name, bytes) in zip(image.names, files) { try directory.write(name, bytes) }
                return wrong(image.names[0], image.options, states[flushed], comment)
            }
        }
        #expect(try problem(log) == nil)
        for rule in [Rule.barrierBeforeTheMapping, .flushAfterTheMapping, .synchronisation]
        where rule != .barrierBeforeTheMapping || [.vdi, .vdiOfSmallBlocks, .qcow2WithDataFile].contains(image) {
            #expect(try problem(log.without(rule)) != nil, "nobody notices that \(rule) is missing")
        }
    }

    private struct Found: Error { let problem: String }

    /// The first problem that `examine` sees after a power failure, or nil.
    private func first(
        _ log: CrashLog, _ start: [[UInt8]], tears: Bool,
        _ examine: (_ files: [[UInt8]], _ flushed: Int, _ comment: String) throws -> String?
    ) throws -> String? {
        do {
            try log.replay(start, prefixes: 150, seed: Self.seed, tears: tears) { files, flushed, comment in
                if let problem = try examine(files, flushed, comment) { throw Found(problem: problem) }
            }
        } catch let found as Found {
            return found.problem
        }
        return nil
    }

    /// What is wrong with a disk's contents.
    private func wrong(_ name: String, _ options: DiskImageOptions, _ state: CrashState, _ comment: String) -> String? {
        do {
            var engine = try DiskEngine(
                DiskImage(path: directory.file(name), options: options), depth: 4, usesRing: false)
            let sectors = try state.unexplained(engine.readAll(chunk: 8 << 20))
            return sectors.isEmpty && engine.image.damage == nil ? nil : "sectors at \(sectors.prefix(5)), \(comment)"
        } catch {
            return "\(error), \(comment)"
        }
    }
}

extension CrashLog {
    /// What a program that does not keep a rule would have left.
    func without(_ rule: CrashCheckTests.Rule) -> CrashLog {
        var entries: [Entry] = [], commit: [Entry] = []
        for entry in all {
            guard case .flushed = entry else {
                commit.append(entry)
                continue
            }
            entries += Self.without(rule, commit) + [entry]
            commit = []
        }
        return CrashLog(self, entries + commit)
    }

    /// - Parameter entries: all from one flush to the next, which ends with synchronisations of the mapping, one for
    ///   each file that has any.
    private static func without(_ rule: CrashCheckTests.Rule, _ entries: [Entry]) -> [Entry] {
        guard var end = entries.lastIndex(where: \.isSynchronisation) else { return entries }
        while end > 0, entries[end - 1].isSynchronisation { end -= 1 }
        var before = Array(entries[..<end])
        let last = Array(entries[end...])
        switch rule {
        case .barrierBeforeTheMapping: return before.filter { !$0.isSynchronisation } + last
        case .flushAfterTheMapping: return before + last.filter { !$0.isSynchronisation }
        case .synchronisation: return entries.filter { !$0.isSynchronisation }
        case .countsFirst:
            guard let barrier = before.lastIndex(where: \.isSynchronisation) else { return entries }
            let mapping = Array(before[(barrier + 1)...])
            before.removeSubrange((barrier + 1)...)
            return mapping + before + last
        }
    }
}

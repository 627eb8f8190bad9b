// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import Synchronization
import TestSupport
import Testing

/// Power that fails at any moment, and hosts that fail at any call.
@Suite(.timed) struct QCOW2CrashTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// Of each combination, unless all are wanted: more than 2,000 in all.
    static let prefixes = 150

    /// Every prefix of what came to the file, and for each what is left when some writes since the last synchronisation
    /// are lost.
    @Test(
        arguments: Share.of([
            "cluster_size=512,refcount_bits=16", "cluster_size=4k,compat=0.10", "cluster_size=4k,refcount_bits=1",
            "cluster_size=16k,extended_l2=on",
            "encrypted 512", "encrypted 4096", "encrypted 16384",
        ]), [false, true])
    func whatWasFlushedSurvivesAndNothingIsDamaged(options: String, hasBacking: Bool) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 5) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 256 << 10
        let path = directory.file("disk.qcow2")
        var contents = [UInt8](repeating: 0, count: size)
        var imageOptions = DiskImageOptions(locking: false, metadataCacheSize: 0)
        if options.hasPrefix("encrypted") {
            // Of what kind does not matter to the order of writes, so one that tries keys quickly.
            let encrypted = try Encrypted(directory)
            imageOptions.keys = [encrypted.key]
            var layout = QCOW2Options()
            layout.clusterSize = UInt64(options.split(separator: " ")[1])!
            layout.extendedL2 = layout.clusterSize == 16384
            if hasBacking {
                contents = randomBytes(size, seed: seed)
                try directory.write("base.raw", contents)
            }
            _ = try encrypted.create(
                "disk.qcow2", size: size, layout,
                backing: hasBacking ? BackingReference(name: "base.raw", format: .raw) : nil)
        } else {
            contents = try makeImage(options, size, hasBacking: hasBacking, seed: seed)
        }
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        let states = try log.record(
            path, imageOptions, contents, seed: seed, maximum: 16 << 10,
            rounds: environment("SWKVM_CRASH_ROUNDS") ?? 30, entries: Self.prefixes)
        let taken = try log.replay([start], prefixes: Self.prefixes, seed: seed) { files, flushed, comment in
            try examine(files[0], states[flushed], imageOptions.keys, comment)
        }
        #expect(taken >= Self.prefixes || environment("SWKVM_CRASH_STEP") != nil)
    }

    /// The same with two engines, each in a thread with sectors of its own between those of the other. The flush that
    /// counts is now the one's and now the other's, and covers what has ended at both.
    @Test(
        arguments: ["cluster_size=4k", "cluster_size=512,refcount_bits=16", "cluster_size=16k,extended_l2=on"],
        [false, true])
    func whatWasFlushedByEitherOfTwoSurvives(options: String, usesBacking: Bool) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 6) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 256 << 10
        let path = directory.file("disk.qcow2")
        let contents = try makeImage(options, size, hasBacking: usesBacking, seed: seed)
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        var states = [CrashState(flushed: contents)]
        do {
            let shared = try SharedImage(
                DiskImage(path: path, options: DiskImageOptions(locking: false, metadataCacheSize: 0)), calls: log.calls
            )
            let crew = EngineCrew(shared, count: 2, contents, seed: seed, usesRing: false)
            for phase in 0..<10 {
                let history = try crew.run(rounds: 3)
                states[states.count - 1].history = history
                crew.flush(phase % 2)
                log.append(.flushed(states.count))
                states.append(CrashState(flushed: crew.model))
            }
        }
        try log.replay([start], prefixes: 60, seed: seed) { files, flushed, comment in
            try examine(files[0], states[flushed], [], comment)
        }
    }

    /// Has qemu-img make the image, and returns what its disk shows.
    private func makeImage(_ options: String, _ size: Int, hasBacking: Bool, seed: UInt64) throws -> [UInt8] {
        let words = ["-q", "-f", "qcow2", "-o", options]
        var contents = [UInt8](repeating: 0, count: size), backing: [String] = []
        if hasBacking {
            contents = randomBytes(size, seed: seed)
            backing = ["-b", try directory.write("base.raw", contents), "-F", "raw"]
        }
        let (status, output) = run(
            ["qemu-img", "create"] + words + backing + [directory.file("disk.qcow2"), "\(size)"])
        try #require(status == 0, "\(output)")
        return contents
    }

    /// An image after the power failed: sound but for leaks, and with contents that there is a reason for.
    private func examine(_ file: [UInt8], _ state: CrashState, _ keys: [DiskKey], _ comment: String) throws {
        let path = try directory.write("crashed.qcow2", file)
        try expectNoErrors(path, comment, encryptedIn: keys.isEmpty ? nil : directory)
        var options = DiskImageOptions(readOnly: true, locking: false)
        options.keys = keys
        var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4, usesRing: false)
        let wrong = try state.unexplained(engine.readAll())
        let damage = engine.image.damage
        #expect(damage == nil && wrong.isEmpty, "sectors at \(wrong), \(comment)")
    }

    // MARK: - The image as a whole

    /// What a flush, or something that changes the image as a whole, has left.
    struct Whole {
        var disk: [UInt8]
        var snapshots: [(id: String, contents: [UInt8])]
        var history: [(range: Range<Int>, bytes: [UInt8])] = []
    }

    /// Power that fails while snapshots are made, applied and deleted and the disk gets longer and shorter: each of
    /// these has happened or it has not.
    @Test(arguments: [
        "cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,refcount_bits=64",
    ])
    func whatChangesTheImageHappensInFullOrNotAtAll(options: String) throws {
        let seed = UInt64(environment("SWKVM_SEED") ?? 11) &+ options.utf8.reduce(0) { $0 &* 31 &+ UInt64($1) }
        let size = 200 << 10, isOld = options.contains("0.10")
        let path = directory.file("disk.qcow2")
        // Longer than the disk, which must not show when that grows.
        let base = randomBytes(300 << 10, seed: seed)
        try directory.write("base.raw", base)
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", path, "\(size)")
        let start = try directory.read("disk.qcow2")
        let log = CrashLog([path])
        var life = Lifetime(Array(base.prefix(size)), seed: seed, maximum: 16 << 10, canKeep: true, canResize: !isOld)
        var states = [Whole(disk: life.workload.model, snapshots: [])]
        do {
            var engine = try DiskEngine(
                DiskImage(path: path, options: DiskImageOptions(locking: false, metadataCacheSize: 0)), depth: 8,
                segments: 8, calls: log.calls)
            for round in 0..<(environment("SWKVM_CRASH_ROUNDS") ?? 24) {
                try life.workload.round(&engine)
                try engine.perform(.flush)
                log.append(.flushed(states.count))
                states[states.count - 1].history = life.workload.history
                life.workload.history = []
                states.append(Whole(disk: life.workload.model, snapshots: life.snapshots))
                if round % 3 == 2, !isOld { try life.resize(&engine) } else { try life.changeSnapshots(&engine) }
                log.append(.flushed(states.count))
                states.append(Whole(disk: life.workload.model, snapshots: life.snapshots))
            }
        }
        try log.replay([start], prefixes: 200, seed: seed) { files, flushed, comment in
            try examine(files[0], states, flushed, comment)
        }
    }

    /// The image is sound, and is as state `number` has it, with or without what was done since, or already as the
    /// next.
    private func examine(_ file: [UInt8], _ states: [Whole], _ number: Int, _ comment: String) throws {
        let path = try directory.write("crashed.qcow2", file)
        try expectNoErrors(path, comment)
        var found: [(id: String?, contents: [UInt8])] = []
        var ids: [String?] = [nil]
        while let id = ids.popLast() {
            var engine = try DiskEngine(
                DiskImage(path: path, options: DiskImageOptions(readOnly: true, locking: false, snapshot: id)),
                depth: 4, usesRing: false)
            found.append((id, try engine.readAll()))
            if id == nil { ids += try engine.snapshots().map { $0.id } }
        }
        let candidates = [states[number]] + (number + 1 < states.count ? [states[number + 1]] : [])
        let fits = candidates.contains { state in
            guard found.count == state.snapshots.count + 1 else { return false }
            return found.allSatisfy { id, contents in
                if let id { return state.snapshots.contains { $0.id == id && $0.contents == contents } }
                guard contents.count == state.disk.count else { return false }
                return CrashState(flushed: state.disk, history: state.history).unexplained(contents).isEmpty
            }
        }
        #expect(fits, "\(found.count - 1) snapshots, \(found[0].contents.count) bytes; \(comment)")
    }

    /// Power that fails during a repair: what could be read can be read at every moment, and a repair can be made
    /// again.
    @Test(
        arguments: ["cluster_size=512", "cluster_size=4k,compat=0.10", "cluster_size=16k,extended_l2=on"],
        [CheckReport.Repair.leaks, .all])
    func aRepairCanBeInterrupted(options: String, repair: CheckReport.Repair) throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        qemuIO(path, ["write -P 3 0 400k"])
        qemuImage("snapshot", "-c", "one", path)
        qemuIO(path, ["write -P 4 100k 100k"])
        var file = try directory.read("disk.qcow2")
        let contents: [UInt8]
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
            contents = try engine.readAll()
        }
        let block = Int(file.bigEndian64(at: Int(file.bigEndian64(at: 48))))
        let clusters = file.count >> Int(file.bigEndian32(at: 20))
        // Shared clusters counted too often, with which no flag goes; and, for the other repair, clusters not counted
        // at all.
        for cluster in 3..<min(clusters, 200) where file[block + cluster * 2 + 1] == 2 {
            file[block + cluster * 2 + 1] = 5
        }
        if repair == .all {
            for cluster in stride(from: 4, to: min(clusters, 200), by: 7) { file[block + cluster * 2 + 1] = 0 }
        }
        try directory.write("disk.qcow2", file)
        let log = CrashLog([path])
        let before = try DiskImage.check(path: path, options: unlocked)
        #expect(before.leaks > 0 && (before.errors > 0) == (repair == .all))
        do {
            let image = try ImageFile(path: path, writable: true, cache: .writeback, locking: false)
            let report = try DiskImage.check(image, repair, calls: log.calls)
            #expect(report.isSound)
        }
        expectSound(path)
        try log.replay([file], prefixes: .max, seed: 6) { files, _, comment in
            let path = try directory.write("crashed.qcow2", files[0])
            if repair == .leaks { try expectNoErrors(path, comment) }
            #expect(try DiskImage.check(path: path, options: unlocked, repair: repair).isSound, "\(comment)")
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly), depth: 4, usesRing: false)
            #expect(try engine.readAll() == contents, "\(comment)")
        }
    }

    // MARK: - Hosts that fail

    /// One call fails while snapshots are made, applied and deleted and the disk gets longer and shorter: what failed
    /// has not happened, or, where nobody can know, is refused to be built upon until the image is opened again. The
    /// image is sound. A call that does a part of what it should, or is interrupted, is nothing that anybody hears of.
    @Test(arguments: Share.of(HostFault.allCases)) func everyCallOfAChangeMayFail(fault: HostFault) throws {
        let path = directory.file("disk.qcow2")
        let contents = randomBytes(256 << 10, seed: 12)
        try directory.write("base.raw", contents)
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw", path)
        let start = try directory.read("disk.qcow2")
        // The first time nothing fails, and the calls are counted.
        var victim = -1, total = 1, failures = 0
        let step = environment("SWKVM_FAULT_STEP") ?? 1
        while victim < total {
            try directory.write("disk.qcow2", start)
            let counter = FaultTests.Counter()
            let failing = victim
            // The states that the disk may be in: when something fails, the old one or the new.
            var possible = [contents], isWrite = false
            do {
                var engine = try DiskEngine(
                    DiskImage(path: path, options: unlocked), depth: 4, segments: 4,
                    calls: FaultTests.calls { call in
                        _ = counter.next()
                        return call == failing ? fault.fault : .none
                    })
                let steps: [([UInt8], (inout DiskEngine) throws -> Void)] = {
                    var disk = contents
                    disk.replaceSubrange(8192..<40960, with: repeatElement(7, count: 32768))
                    let short = Array(disk[..<(100 << 10)])
                    return [
                        (disk, { try $0.write(8192, [UInt8](repeating: 7, count: 32768)) }),
                        (disk, { try $0.perform(.flush) }),
                        (disk, { try $0.createSnapshot(named: "one") }),
                        (short, { try $0.resize(to: 100 << 10, shrinks: true) }),
                        (
                            short + [UInt8](repeating: 0, count: 924 << 10),
                            { try $0.resize(to: 1 << 20, preallocation: .metadata) }
                        ),
                        (disk, { try $0.applySnapshot("one") }), (disk, { try $0.deleteSnapshot("one") }),
                    ]
                }()
                for (index, (disk, change)) in steps.enumerated() {
                    do { try change(&engine) } catch {
                        failures += 1
                        // What no flush has made durable may be as it was.
                        possible += index < 2 ? [contents, disk] : [disk]
                        isWrite = index == 0
                        break
                    }
                    possible = [disk]
                }
                total = max(total, counter.next())
            }
            expectSound(path, leaksAllowed: true, "call \(failing)")
            var engine = try DiskEngine(DiskImage(path: path, options: unlocked), depth: 4)
            let now = try engine.readAll()
            #expect(possible.contains(now) || isWrite, "call \(failing): \(now.count) bytes")
            // And it can be gone on with.
            try engine.write(0, [UInt8](repeating: 9, count: 4096))
            _ = consume engine
            expectSound(path, leaksAllowed: true, "call \(failing)")
            victim = victim < 0 ? 0 : victim + step
        }
        #expect(
            total > 60 && (fault.isFailure ? failures > total / 2 / step : failures == 0),
            "\(total) calls, \(failures) failures")
    }

    /// A host that does everything in pieces and is interrupted all the time.
    @Test func shortTransfersAndInterruptsChangeNothing() throws {
        let path = directory.file("disk.qcow2")
        qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "400k")
        var life = Lifetime(
            [UInt8](repeating: 0, count: 400 << 10), seed: 4, maximum: 16 << 10, canKeep: true, canResize: true)
        do {
            var engine = try DiskEngine(
                DiskImage(path: path, options: unlocked), depth: 8, segments: 8,
                calls: FaultTests.calls { call in
                    switch call % 4 {
                    case 0, 2: .short
                    case 1: .error(EINTR)
                    default: .none
                    }
                })
            for round in 0..<80 {
                try life.step(&engine)
                if round % 10 == 5 { try life.changeSnapshots(&engine) }
                if round % 10 == 9 { try life.resize(&engine) }
            }
        }
        expectSound(path)
        try life.expectContents(path)
    }

    /// One call of a workload fails, does a part of what it should or is interrupted, each in its turn.
    @Test(arguments: HostFault.allCases, [false, true]) func everyCallMayFail(fault: HostFault, hasBacking: Bool) throws
    {
        let size = 512 << 10
        let contents = hasBacking ? randomBytes(size, seed: 3) : [UInt8](repeating: 0, count: size)
        try directory.write("base.raw", contents)
        let path = directory.file("disk.qcow2")
        if hasBacking {
            qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw", path)
        } else {
            qemuImage("create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "\(size)")
        }
        let start = try directory.read("disk.qcow2")
        var workload = EveryCall(fault: fault)
        workload.rounds = 12
        try workload.run(path, unlocked, contents) {
            try directory.write("disk.qcow2", start)
        } examine: {
            try expectNoErrors(path, $0)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Several engines of one image, in threads of their own.
@Suite(.timed) struct SharedImageThreadTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// What the engines have to do with.
    struct Kind: CustomTestStringConvertible, Sendable {
        /// For qemu-img, or the size of the clusters of an encrypted one.
        var options: String
        var start = QCOW2WritingTests.Kind.Start.empty
        var isEncrypted = false
        /// Bytes of the disk.
        var size = 512 << 10

        var testDescription: String { "\(options) \(start)\(isEncrypted ? " encrypted" : "")" }
        var keeps: Bool { !options.contains("refcount_bits=1") && !options.contains("DATA") }
    }

    static let kinds = [
        Kind(options: "cluster_size=4k"), Kind(options: "cluster_size=512,refcount_bits=1", start: .rawBacking),
        Kind(options: "cluster_size=64k,compat=0.10"),
        Kind(options: "cluster_size=64k,extended_l2=on"),
        Kind(options: "cluster_size=16k,extended_l2=on", start: .qcow2Backing),
        Kind(options: "cluster_size=4k", start: .compressed),
        Kind(options: "cluster_size=16k,compression_type=zstd,extended_l2=on", start: .compressed),
        Kind(options: "cluster_size=4k,data_file=DATA", start: .shortBacking),
        Kind(options: "cluster_size=16k,extended_l2=on,data_file=DATA"),
        Kind(options: "4096", start: .rawBacking, isEncrypted: true), Kind(options: "65536", isEncrypted: true),
        Kind(options: "16384,extended", start: .rawBacking, isEncrypted: true),
    ]

    /// Makes the image; returns what the disk has.
    private func make(_ kind: Kind, seed: UInt64, _ options: inout DiskImageOptions) throws -> [UInt8] {
        guard kind.isEncrypted else {
            return try QCOW2WritingTests(directory: directory).make(
                .init(options: kind.options, start: kind.start, size: kind.size), seed: seed)
        }
        let encrypted = try Encrypted(directory)
        options.keys = [encrypted.key]
        var layout = QCOW2Options()
        layout.clusterSize = UInt64(kind.options.split(separator: ",")[0])!
        layout.extendedL2 = kind.options.hasSuffix("extended")
        let old = randomBytes(kind.size, seed: seed)
        if kind.start == .rawBacking { try directory.write("base.raw", old) }
        _ = try encrypted.create(
            "disk.qcow2", size: kind.size, layout,
            backing: kind.start == .rawBacking ? BackingReference(name: "base.raw", format: .raw) : nil)
        return kind.start == .rawBacking ? old : [UInt8](repeating: 0, count: kind.size)
    }

    /// Random operations of several engines at once on sectors that lie between each other's, flushes among them, while
    /// one engine goes; then, with one engine, a snapshot made, applied or deleted, and another size; and all of it
    /// again. SWKVM_SEED and SWKVM_CREW_ROUNDS make it others and more.
    @Test(arguments: Share.of(kinds), [2, 4]) func whateverHappensTheDiskIsAnArray(kind: Kind, count: Int) throws {
        let seed = kind.testDescription.utf8.reduce(UInt64(environment("SWKVM_SEED") ?? 77) &+ UInt64(count)) {
            $0 &* 31 &+ UInt64($1)
        }
        let comment = "\(kind.testDescription), \(count) engines, seed \(seed)"
        let path = directory.file("disk.qcow2"), rounds = environment("SWKVM_CREW_ROUNDS") ?? 30
        var options = DiskImageOptions(locking: false, allowsDataFile: true)
        let isOld = kind.options.contains("0.10")
        var life = Lifetime(
            try make(kind, seed: seed, &options), seed: seed, maximum: 16 << 10, canKeep: kind.keeps && !isOld,
            canResize: true)
        life.keys = options.keys
        if kind.isEncrypted { life.preallocations = [.off, .full] }
        var operations = 0
        for session in 0..<3 {
            options.metadataCacheSize = session == 1 ? 1 << 20 : 0
            do {
                let shared = try SharedImage(DiskImage(path: path, options: options))
                let crew = EngineCrew(
                    shared, count: count, life.workload.model, seed: seed &+ UInt64(session * 100),
                    usesRing: session != 1)
                try crew.run(rounds: rounds, flushes: true)
                try crew.run(rounds: rounds)
                try crew.run(rounds: rounds, flushes: true, besides: count - 1)
                life.workload.model = crew.model
                operations += crew.operations
                #expect(shared.damage() == nil && shared.claims.isEmpty, "\(comment)")
            }
            try expectSound(path, kind, comment)
            try life.expectContents(path)
            do {
                var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 8)
                if life.canKeep { try life.changeSnapshots(&engine) }
                try life.resize(&engine)
                // The sectors of the crew are those of a disk that is not much smaller.
                if life.workload.model.count < kind.size / 2 {
                    try engine.resize(to: UInt64(kind.size))
                    life.workload.model += [UInt8](repeating: 0, count: kind.size - life.workload.model.count)
                }
            }
        }
        #expect(operations > count * rounds * 4)
        try expectSound(path, kind, comment)
        try life.expectContents(path)
        if kind.isEncrypted {
            #expect(try Encrypted(directory).qemuContents(path) == life.workload.model, "\(comment)")
        }
    }

    private func expectSound(_ path: String, _ kind: Kind, _ comment: String) throws {
        if kind.isEncrypted {
            try Encrypted(directory).expectSound(path, comment)
        } else {
            DiskImageTests.expectSound(path, leaksAllowed: false, comment)
        }
    }

    /// One call to the host fails, does a part or is interrupted, while two engines are at work, each in its turn: who
    /// asked has the error, or somebody whose flush it was; the image has no errors; and what was not to fail has what
    /// it should. SWKVM_FAULT_STEP=1 tries every call.
    @Test(
        arguments: HostFault.allCases,
        [
            Kind(options: "cluster_size=512,refcount_bits=64"),
            Kind(options: "cluster_size=16k,extended_l2=on", start: .qcow2Backing),
            Kind(options: "4096", start: .rawBacking, isEncrypted: true),
        ]) func everyCallMayFailUnderTwo(fault: HostFault, kind: Kind) throws
    {
        let path = directory.file("disk.qcow2"), step = environment("SWKVM_FAULT_STEP") ?? 4
        var kind = kind
        kind.size = 256 << 10
        var options = DiskImageOptions(locking: false, metadataCacheSize: 0)
        let contents = try make(kind, seed: 3, &options)
        let start = try directory.read("disk.qcow2")
        // At first none, which says how many there are: after some failures there are few.
        var victim = -1, total = 0
        while victim < total {
            try directory.write("disk.qcow2", start)
            let counter = FaultTests.Counter(), failing = victim
            let comment = "call \(failing), \(kind.testDescription)"
            var calls = FaultTests.calls { _ in counter.next() == failing ? fault.fault : .none }
            calls.bulkWork = { _ in Thread.yield() }
            var model: [UInt8] = []
            do {
                let shared = try SharedImage(DiskImage(path: path, options: options), calls: calls)
                let crew = EngineCrew(
                    shared, count: 2, contents, seed: UInt64(failing + 1), usesRing: false, mayFail: fault.isFailure)
                try crew.run(rounds: 3, flushes: true)
                try crew.run(rounds: 2)
                crew.flush(failing & 1)
                model = crew.model
                var engine = try DiskEngine(shared, depth: 4, usesRing: false)
                // The one failure may still come.
                let now = try (try? engine.readAll()) ?? engine.readAll()
                #expect(isSame(now, model), "\(comment)")
                #expect(shared.damage() == nil, "\(comment)")
                total = max(total, counter.next())
            }
            try expectNoErrors(path, comment, encryptedIn: kind.isEncrypted ? directory : nil)
            if !fault.isFailure {
                var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4, usesRing: false)
                #expect(try isSame(engine.readAll(), model), "\(comment)")
            }
            // Each fault begins elsewhere, so that all of them together try more.
            victim = victim < 0 ? HostFault.allCases.firstIndex(of: fault)! % step : victim + step
        }
        #expect(total > 40, "\(total) calls")
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// All that can happen to an image, in any order, against an array: requests, flushes, snapshots made, applied and
/// deleted, other sizes, and the image closed and opened again.
struct Lifetime: ~Copyable {
    var workload: Workload
    /// The snapshots that the image has, with their contents, oldest first.
    private(set) var snapshots: [(id: String, contents: [UInt8])] = []
    let canKeep: Bool
    let canResize: Bool
    let maximumSize: Int
    /// What may be preallocated for a longer disk.
    var preallocations = Preallocation.allCases
    /// Of an encrypted image.
    var keys: [DiskKey] = []

    init(_ contents: [UInt8], seed: UInt64, maximum: Int = 80 << 10, canKeep: Bool, canResize: Bool) {
        workload = Workload(contents, seed: seed, maximum: maximum)
        maximumSize = contents.count * 2
        self.canKeep = canKeep
        self.canResize = canResize
    }

    var operations: Int { workload.operations }
    private(set) var changes = 0

    /// A few requests at once, now and then followed by a flush or by something that changes the image as a whole.
    mutating func step(_ engine: inout DiskEngine) throws {
        try workload.round(&engine)
        switch Int.random(in: 0..<60, using: &workload.generator) {
        case 0..<8: try engine.perform(.flush)
        case 8..<11 where canKeep: try changeSnapshots(&engine)
        case 11..<13 where canResize: try resize(&engine)
        default: break
        }
    }

    mutating func changeSnapshots(_ engine: inout DiskEngine) throws {
        changes += 1
        let seed = workload.seed
        switch Int.random(in: 0..<4, using: &workload.generator) {
        case 0 where !snapshots.isEmpty:
            let index = Int.random(in: 0..<snapshots.count, using: &workload.generator)
            try engine.deleteSnapshot(snapshots[index].id)
            snapshots.remove(at: index)
        case 1 where !snapshots.isEmpty:
            let kept = snapshots.randomElement(using: &workload.generator)!
            try engine.applySnapshot(kept.id)
            workload.model = kept.contents
        default:
            guard snapshots.count < 4 else {
                try engine.deleteSnapshot(snapshots[0].id)
                snapshots.removeFirst()
                return
            }
            let made = try engine.createSnapshot(named: "s\(changes)")
            snapshots.append((made.id, workload.model))
        }
        #expect(try engine.snapshots().map(\.id).sorted() == snapshots.map(\.id).sorted(), "seed \(seed)")
        let size = engine.image.size
        #expect(size == UInt64(workload.model.count), "seed \(seed)")
    }

    mutating func resize(_ engine: inout DiskEngine) throws {
        changes += 1
        let size = Int.random(in: 1...maximumSize / 512, using: &workload.generator) * 512
        let preallocation =
            size > workload.model.count ? preallocations.randomElement(using: &workload.generator)! : .off
        try engine.resize(to: UInt64(size), preallocation: preallocation, shrinks: true)
        if size < workload.model.count {
            workload.model.removeLast(workload.model.count - size)
        } else {
            workload.model += [UInt8](repeating: 0, count: size - workload.model.count)
        }
        let now = engine.image.size
        #expect(now == UInt64(size), "seed \(workload.seed)")
    }

    /// The whole disk and every snapshot has what it is to have.
    func expectContents(_ path: String, sourceLocation: SourceLocation = #_sourceLocation) throws {
        for (id, contents) in snapshots.map({ (Optional($0.id), $0.contents) }) + [(nil, workload.model)] {
            var options = DiskImageOptions(readOnly: true, locking: false, snapshot: id, allowsDataFile: true)
            options.keys = keys
            var engine = try DiskEngine(DiskImage(path: path, options: options), depth: 4)
            let now = try engine.readAll()
            #expect(now.count == contents.count, sourceLocation: sourceLocation)
            #expect(now == contents, "snapshot \(id ?? "none"), seed \(workload.seed)", sourceLocation: sourceLocation)
            let damage = engine.image.damage
            #expect(damage == nil, sourceLocation: sourceLocation)
        }
    }
}

@Suite(.timed) struct LifetimeTests {
    let directory = TemporaryDirectory(inMemory: true)

    typealias Kind = QCOW2WritingTests.Kind

    static let kinds = [
        Kind(options: "cluster_size=512"), Kind(options: "cluster_size=512", start: .qcow2Backing),
        Kind(options: "cluster_size=4k", start: .compressed),
        Kind(options: "cluster_size=4k,refcount_bits=64", start: .shortBacking),
        Kind(options: "cluster_size=64k", start: .rawBacking),
        Kind(options: "cluster_size=64k,refcount_bits=8"), Kind(options: "cluster_size=4k,compat=0.10"),
        Kind(options: "cluster_size=512,refcount_bits=1"),
        Kind(options: "cluster_size=16k,compat=0.10", start: .shortBacking),
        Kind(options: "cluster_size=64k,compression_type=zstd", start: .compressed),
        Kind(options: "cluster_size=16k,extended_l2=on"),
        Kind(options: "cluster_size=16k,extended_l2=on", start: .rawBacking),
        Kind(options: "cluster_size=32k,extended_l2=on", start: .compressed),
        Kind(options: "cluster_size=16k,data_file=DATA", start: .rawBacking),
        Kind(options: "cluster_size=4k,data_file=DATA,data_file_raw=on"),
    ]

    /// Requests of all kinds of images together, at least.
    static let requests = 100_000

    /// SWKVM_ROUNDS, of a session, makes it more.
    @Test(arguments: Share.of(kinds)) func whateverHappensTheDiskIsAnArray(kind: Kind) throws {
        let seed = kind.testDescription.utf8.reduce(UInt64(environment("SWKVM_SEED") ?? 1)) { $0 &* 31 &+ UInt64($1) }
        print("\(kind.testDescription): seed \(seed)")
        let path = directory.file("disk.qcow2")
        let contents = try QCOW2WritingTests(directory: directory).make(kind, seed: seed)
        // Counts of one bit count no snapshots, a data file has none, and those of version 2 do not bear another size.
        let keepsNone = kind.options.hasSuffix("=1") || kind.options.contains("DATA")
        let isOld = kind.options.contains("0.10"), isOldAndKeeps = isOld && kind.start == .empty
        var life = Lifetime(
            contents, seed: seed, canKeep: isOld ? isOldAndKeeps : !keepsNone, canResize: !isOldAndKeeps)
        let sessions = 7, share = (Self.requests + Self.kinds.count - 1) / Self.kinds.count
        for session in 0..<sessions {
            let options = DiskImageOptions(
                locking: false, metadataCacheSize: session % 2 == 0 ? 0 : 32 << 20, allowsDataFile: true)
            do {
                var engine = try DiskEngine(
                    DiskImage(path: path, options: options), depth: 8, usesRing: session % 3 != 1)
                var rounds = environment("SWKVM_ROUNDS") ?? 0
                while rounds > 0 || life.operations < share * (session + 1) / sessions {
                    try life.step(&engine)
                    rounds -= 1
                }
                let damage = engine.image.damage
                #expect(damage == nil)
            }
            expectSound(path, "seed \(seed), session \(session)")
            try life.expectContents(path)
        }
        let (operations, changes) = (life.operations, life.changes)
        #expect(operations >= share && changes > 3)
        // And so says QEMU.
        #expect(try QCOW2WritingTests(directory: directory).contents(path) == life.workload.model, "seed \(seed)")
    }
}

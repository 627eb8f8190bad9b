// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// While a commit has the mapping locked it does not change, whatever is requested; `BarrierTests` has what would come
/// of it.
@Suite(.timed) struct MappingLockTests {
    let directory = TemporaryDirectory(inMemory: true)

    struct Kind: CustomTestStringConvertible, Sendable {
        var format = ImageFormat.qcow2
        /// For qemu-img.
        var options = ""
        var hasBacking = false
        var hasDataFile = false
        /// Whether the tables of VMDK are there before anything is written.
        var hasTables = true
        /// What is to be seen when the mapping is not locked.
        var changes: Set<Change> = [.clusters, .part, .mapping]

        var testDescription: String {
            "\(format) \(options)\(hasBacking ? " over another" : "")\(hasTables ? "" : " without tables")"
        }
    }

    enum Change {
        /// Whole new clusters, a part of one, a table or entry.
        case clusters, part, mapping
    }

    static let kinds = [
        Kind(options: "cluster_size=4k"), Kind(options: "cluster_size=4k", hasBacking: true),
        Kind(options: "cluster_size=4k,compat=0.10", hasBacking: true),
        Kind(options: "cluster_size=16k,extended_l2=on"),
        Kind(options: "cluster_size=16k,extended_l2=on", hasBacking: true),
        Kind(options: "cluster_size=4k,data_file=DATA", hasBacking: true, hasDataFile: true),
        Kind(format: .vdi, changes: [.part]), Kind(format: .vmdk, changes: [.clusters, .part]),
        Kind(format: .vmdk, hasTables: false, changes: [.mapping]),
    ]

    private static let size = 8 << 20
    /// Parts of the disk, all of which `makeImage` has written in some way.
    private static let written = 0..<192 << 10

    /// An image with clusters of its own, and with such as it shares with a snapshot, compressed ones and zeroes, where
    /// it can have them; and with as much again that has not been written, under a table that is there and under one
    /// that is not.
    private func makeImage(_ kind: Kind) throws -> String {
        let path = directory.file("disk.\(kind.format)")
        try directory.write("base.raw", randomBytes(Self.size, seed: 5))
        let options = kind.options.isEmpty ? [] : ["-o", kind.options.replacing("DATA", with: directory.file("data"))]
        qemuImage(
            ["create", "-q", "-f", kind.format.rawValue] + options
                + (kind.hasBacking ? ["-b", "base.raw", "-F", "raw"] : []) + [path, "\(Self.size)"])
        guard kind.hasTables else {
            var bytes = try directory.read("disk.vmdk")
            // Two grain directories, each with one entry for a disk of this size.
            for place in [48, 56] {
                let sector = Int(bytes.littleEndian64(at: place))
                bytes.replaceSubrange(sector * 512..<sector * 512 + 4, with: [0, 0, 0, 0])
            }
            return try directory.write("disk.vmdk", bytes)
        }
        guard kind.format == .qcow2 else {
            qemuIO(path, ["write -P 1 0 128k"], format: kind.format.rawValue)
            return path
        }
        qemuIO(
            path,
            ["write -P 1 0 64k", "write -P 2 5k 3k"]
                + (kind.hasDataFile ? [] : ["write -c -P 3 64k 16k", "write -c -P 4 80k 16k"]))
        if !kind.options.contains("0.10") { qemuIO(path, ["write -z 96k 32k"]) }
        if !kind.hasDataFile {
            qemuIO(path, ["write -P 5 2M 64k", "write -P 5 6M 4k"])
            qemuImage("snapshot", "-c", "one", path)
            // These are the image's own again, and of the second a part.
            qemuIO(path, ["write -P 6 0 16k", "write -P 7 33k 1k", "write -P 8 160k 2k"])
        }
        return path
    }

    @Test(arguments: kinds) func nothingChangesWhileItIsLocked(kind: Kind) throws {
        let path = try makeImage(kind)
        var engine = try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(format: kind.format, locking: false, allowsDataFile: true)),
            depth: 4, usesRing: false)
        // All tables are in memory, so that each lookup has an answer.
        _ = try engine.readAll()
        engine.image.lockMapping()
        var waiting = 0
        try sweep { operation, offset, length in
            var search = DiskImage.Search(limit: length)
            let target = engine.image.target(operation, offset, length, sequence: 0, .host, &search)
            let isChanged = engine.image.hasChangedMapping
            let mayBe =
                switch target {
                case .inPlace, .done, .unresolved(.wait): true
                case .clusters: false
                case .part: false
                case .unresolved: false
                }
            try #require(mayBe && !isChanged, "\(operation) of \(length) bytes at \(offset): \(target)")
            if case .unresolved(.wait) = target { waiting += 1 }
        }
        #expect(waiting > 100)

        // And that is what the lock does.
        engine.image.unlock()
        var changes: Set<Change> = []
        try sweep { operation, offset, length in
            var search = DiskImage.Search(limit: length)
            switch engine.image.target(operation, offset, length, sequence: 0, .host, &search) {
            case .clusters: changes.insert(.clusters)
            case .part: changes.insert(.part)
            case .inPlace: break
            case .done: break
            case .unresolved: break
            }
            if engine.image.hasChangedMapping { changes.insert(.mapping) }
        }
        #expect(changes == kind.changes)
    }

    /// Every operation, on pieces of some lengths, wherever they may be.
    private func sweep(_ body: (DiskOperation, UInt64, UInt64) throws -> Void) throws {
        for operation in [DiskOperation.write, .discard, .writeZeroes, .writeZeroesUnmapping] {
            for start in [0, 2 << 20, 4 << 20, 6 << 20] {
                for offset in stride(from: start, to: start + Self.written.count, by: 1536) {
                    for length in [512, 2048, 4096, 16 << 10, 40 << 10, 128 << 10] {
                        try body(operation, UInt64(offset), UInt64(length))
                    }
                    // Whole clusters.
                    if offset % 4096 == 0 { try body(operation, UInt64(offset), 4096) }
                }
            }
        }
    }
}

extension DiskImage {
    /// As a commit does.
    fileprivate func lockMapping() {
        for file in layers.indices {
            switch layers[file].layout {
            case .qcow2(let image): image.value.isLocked = true
            case .blocks(let image): image.value.isLocked = true
            case .raw: break
            case .extents: break
            }
        }
    }

    /// Whether anything of the mapping in memory is not what the file has, or something was allocated or given up.
    fileprivate var hasChangedMapping: Bool {
        layers.indices.contains { file in
            switch layers[file].layout {
            case .qcow2(let image): image.value.isDirty
            case .blocks(let image):
                image.value.slices.isDirty || image.value.directory.isDirty
                    || image.value.allocator?.needsBarrier == true
            case .raw: false
            case .extents: false
            }
        }
    }
}

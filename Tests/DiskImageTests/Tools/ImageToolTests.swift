// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// New images, and what is refused before there is one.
@Suite(.timed) struct ImageCreationTests {
    private let directory = TemporaryDirectory(inMemory: true)

    private func refusal(
        _ creation: ImageCreation, sourceLocation: SourceLocation = #_sourceLocation
    ) throws -> DiskImageError? {
        let before = try names()
        do throws(DiskImageError) {
            try creation.create()
            Issue.record("it was made", sourceLocation: sourceLocation)
            return nil
        } catch {
            #expect(try names() == before, sourceLocation: sourceLocation)
            return error
        }
    }

    private func names() throws -> String { run(["ls", "-A", directory.path]).output }

    private func new(
        _ name: String = "new.qcow2", _ size: UInt64? = 1 << 20, format: ImageFormat = .qcow2
    ) -> ImageCreation {
        ImageCreation(path: directory.file(name), format: format, size: size)
    }

    @Test(arguments: [0, 1, 511, 512, 513, 1 << 20, 1 << 40, 5 << 40, 1 << 50] as [UInt64]) func sizes(
        size: UInt64
    ) throws {
        for format in [.raw, .qcow2] as [ImageFormat] {
            // A file of 2^50 bytes is more than most file systems have.
            if format == .raw, size > 1 << 40 { continue }
            let name = "\(size).\(format)"
            let made = try new(name, size, format: format).create()
            #expect(made == (size + 511) / 512 * 512)
            let image = try DiskImage(
                path: directory.file(name), options: DiskImageOptions(format: format, readOnly: true))
            #expect(image.size == made)
            if format == .qcow2 { qemuImage("check", "-q", "-f", "qcow2", directory.file(name)) }
        }
    }

    @Test func impossibleSizes() throws {
        for size in [DiskImage.maximumSize + 1, 1 << 63, .max, .max - 510] as [UInt64] {
            for format in [.raw, .qcow2] as [ImageFormat] {
                guard case .impossible = try refusal(new("new.\(format)", size, format: format)) else {
                    Issue.record("\(size)"); continue
                }
            }
        }
        // More than an L1 table of 32 MiB maps.
        var small = new("small.qcow2", 1 << 40)
        small.options.clusterSize = 512
        guard case .impossible(_, let reason) = try refusal(small) else { Issue.record("2^40"); return }
        #expect(reason.contains("larger"))
        guard case .impossible = try refusal(new("none.qcow2", nil)) else { Issue.record("no size"); return }
    }

    @Test func optionsThatContradict() throws {
        let changes: [(inout ImageCreation) -> Void] = [
            { $0.options.clusterSize = 1000 }, { $0.options.clusterSize = 256 }, { $0.options.clusterSize = 4 << 20 },
            { $0.options.clusterSize = 0 },
            { $0.options.refcountBits = 0 }, { $0.options.refcountBits = 3 }, { $0.options.refcountBits = 128 },
            { $0.options.refcountBits = -16 },
            {
                $0.options.compatibility = .version2; $0.options.refcountBits = 8
            },
            {
                $0.options.compatibility = .version2; $0.options.lazyRefcounts = true
            },
            {
                $0.options.compatibility = .version2; $0.options.extendedL2 = true
            },
            {
                $0.options.compatibility = .version2; $0.options.compression = .zstd
            },
            {
                $0.options.compatibility = .version2; $0.options.dataFile = "data"
            },
            {
                $0.options.extendedL2 = true; $0.options.clusterSize = 4096
            },
            { $0.options.dataFileIsRaw = true }, { $0.options.dataFile = "" },
            {
                $0.backing = BackingReference(name: "", format: .raw); $0.opensBacking = false
            },
            {
                $0.backing = BackingReference(name: "b", format: .raw); $0.opensBacking = false;
                $0.preallocation = .metadata
            },
            {
                $0.backing = BackingReference(name: String(repeating: "b", count: 1024), format: .raw);
                $0.opensBacking = false
            },
            {
                $0.format = .raw; $0.preallocation = .metadata
            },
            {
                $0.format = .raw; $0.options.refcountBits = 8
            },
            {
                $0.format = .raw; $0.backing = BackingReference(name: "b", format: .raw); $0.opensBacking = false
            },
        ]
        for (index, change) in changes.enumerated() {
            var creation = new()
            change(&creation)
            guard case .impossible = try refusal(creation) else { Issue.record("\(index)"); continue }
        }
    }

    @Test func existingFilesStay() throws {
        try directory.write("new.qcow2", [1, 2, 3])
        #expect(try refusal(new()) == .exists(path: directory.file("new.qcow2")))
        #expect(symlink("nowhere", directory.file("link.qcow2")) == 0)
        #expect(try refusal(new("link.qcow2")) == .linkToNothing(path: directory.file("link.qcow2")))
        #expect(try directory.read("new.qcow2") == [1, 2, 3])
        #expect(
            try refusal(new("none/new.qcow2"))
                == .system(path: directory.file("none/new.qcow2"), SystemCallError("open", errno: ENOENT)))
        #expect(mkfifo(directory.file("pipe.qcow2"), 0o600) == 0)
        var creation = new("pipe.qcow2")
        creation.replacing = true
        #expect(try refusal(creation) == .notAFile(path: directory.file("pipe.qcow2")))
    }

    /// What is replaced keeps its owner, its permissions and the links to it.
    @Test func replacing() throws {
        try directory.write("old.qcow2", [1, 2, 3])
        #expect(
            chmod(directory.file("old.qcow2"), 0o640) == 0 && symlink("old.qcow2", directory.file("link.qcow2")) == 0)
        var creation = new("link.qcow2")
        creation.replacing = true
        try creation.create()
        qemuImage("check", "-q", "-f", "qcow2", directory.file("old.qcow2"))
        var status = stat()
        #expect(lstat(directory.file("link.qcow2"), &status) == 0 && status.st_mode & S_IFMT == S_IFLNK)
        #expect(stat(directory.file("old.qcow2"), &status) == 0 && status.st_mode & 0o777 == 0o640)
        #expect(try names() == "link.qcow2\nold.qcow2\n")
        // Not while somebody has it open.
        let image = try DiskImage(path: directory.file("old.qcow2"))
        #expect(try refusal(creation) == .locked(path: directory.file("link.qcow2"), forWriting: true))
        _ = image.size
    }

    @Test func backing() throws {
        try new("base.qcow2", 3 << 20).create()
        var over = new("over.qcow2", nil)
        over.backing = BackingReference(name: "base.qcow2", format: .qcow2)
        #expect(try over.create() == 3 << 20)
        let information = try ImageInformation(path: directory.file("over.qcow2"))
        #expect(information.backing == .init(name: "base.qcow2", path: directory.file("base.qcow2"), format: "qcow2"))
        over.path = directory.file("other.qcow2")
        over.backing = BackingReference(name: "none.qcow2", format: .qcow2)
        guard case .backing = try refusal(over) else { Issue.record("no such backing file"); return }
        over.opensBacking = false
        guard case .impossible = try refusal(over) else { Issue.record("no size"); return }
        over.size = 1 << 20
        #expect(try over.create() == 1 << 20)
        #expect(try ImageInformation.chain(path: directory.file("over.qcow2")).map(\.size) == [3 << 20, 3 << 20])
    }

    @Test func anImageIsNotItsOwnDataFile() throws {
        for name in ["new.qcow2", "./new.qcow2"] {
            var creation = new()
            creation.options.dataFile = name
            for isReplacing in [false, true] {
                creation.replacing = isReplacing
                _ = try refusal(creation)
            }
        }
    }

    @Test func dataFiles() throws {
        for isRaw in [false, true] {
            for preallocation in Preallocation.allCases {
                var creation = new("\(isRaw)\(preallocation).qcow2", 2 << 20 | 512)
                creation.options.dataFile = directory.file("\(isRaw)\(preallocation).data")
                creation.options.dataFileIsRaw = isRaw
                creation.preallocation = preallocation
                try creation.create()
                qemuImage("check", "-q", "-f", "qcow2", creation.path)
                qemuIO(creation.path, ["write -P 3 100k 1M", "read -P 3 100k 1M"])
                if isRaw {
                    #expect(try directory.read("\(isRaw)\(preallocation).data").prefix(100 << 10 | 1).last == 3)
                }
            }
        }
    }
}

/// Information about images, compared with qemu-img.
@Suite(.timed) struct ImageMapTests {
    private let directory = TemporaryDirectory(inMemory: true)

    @Test func kindsOfExtents() throws {
        try directory.write("base.raw", randomBytes(1 << 20, seed: 1))
        var creation = ImageCreation(path: directory.file("top.qcow2"), format: .qcow2, size: 4 << 20)
        creation.backing = BackingReference(name: "base.raw", format: .raw)
        try creation.create()
        qemuIO(creation.path, ["write -P 1 128k 64k", "write -z 256k 64k", "write -c -P 2 512k 64k"])
        var map = ImageMap(try DiskImage(path: creation.path, options: readOnly))
        var found: [(ImageExtent.Kind, UInt64, UInt64, Int)] = []
        while let extent = try map.next() {
            found.append((extent.kind, extent.offset >> 10, extent.length >> 10, extent.depth))
        }
        let expected: [(ImageExtent.Kind, UInt64, UInt64, Int)] = [
            (.data, 0, 128, 1), (.data, 128, 64, 0), (.data, 192, 64, 1), (.zero, 256, 64, 0), (.data, 320, 192, 1),
            (.compressed, 512, 64, 0),
            (.data, 576, 448, 1), (.unallocated, 1024, 3072, 0),
        ]
        #expect(found.count == expected.count && zip(found, expected).allSatisfy { $0 == $1 }, "\(found)")
    }

    @Test func holesOfRawFiles() throws {
        let path = directory.file("holes.raw")
        try ImageCreation(path: path, format: .raw, size: 1 << 20).create()
        let file = try FileDescriptor.open(path, O_RDWR)
        try MetadataFile(calls: .host, number: file.rawValue).write([UInt8](repeating: 1, count: 8192), at: 65536)
        var map = ImageMap(try DiskImage(path: path, options: readOnly))
        var found: [[UInt64]] = []
        while let extent = try map.next() {
            found.append([extent.kind == .data ? 1 : 0, extent.offset, extent.length])
        }
        #expect(found == [[0, 0, 65536], [1, 65536, 8192], [0, 73728, (1 << 20) - 73728]])
    }

    @Test func emptyDisk() throws {
        try ImageCreation(path: directory.file("empty.qcow2"), format: .qcow2, size: 0).create()
        var map = ImageMap(try DiskImage(path: directory.file("empty.qcow2"), options: readOnly))
        #expect(try map.next() == nil)
    }
}

@Suite(.timed) struct ImageComparisonTests {
    private let directory = TemporaryDirectory(inMemory: true)

    private func outcome(_ first: String, _ second: String, strict: Bool = false) throws -> ImageComparison.Outcome {
        var comparison = ImageComparison(directory.file(first), with: directory.file(second))
        comparison.isStrict = strict
        return try comparison.run()
    }

    @Test func outcomes() throws {
        var bytes = randomBytes(300_000, seed: 1) + [UInt8](repeating: 0, count: 100_000)
        bytes += [UInt8](repeating: 0, count: (512 - bytes.count % 512) % 512)
        try directory.write("a.raw", bytes)
        try directory.write("longer.raw", bytes + [UInt8](repeating: 0, count: 1 << 20))
        try directory.write(
            "other.raw", bytes + [UInt8](repeating: 0, count: 1 << 19) + [1] + [UInt8](repeating: 0, count: 511))
        for place in [0, 1, 4095, 299_999, bytes.count - 1] {
            var changed = bytes
            changed[place] ^= 0x40
            try directory.write("changed.raw", changed)
            #expect(try outcome("a.raw", "changed.raw") == .contents(offset: UInt64(place)))
            #expect(try outcome("changed.raw", "a.raw") == .contents(offset: UInt64(place)))
        }
        #expect(try outcome("a.raw", "a.raw") == .identical)
        #expect(try outcome("a.raw", "longer.raw") == .identicalUpToZeroes)
        #expect(try outcome("longer.raw", "a.raw") == .identicalUpToZeroes)
        #expect(
            try outcome("a.raw", "longer.raw", strict: true)
                == .size(UInt64(bytes.count), UInt64(bytes.count + 1 << 20)))
        #expect(try outcome("a.raw", "other.raw") == .contents(offset: UInt64(bytes.count + 1 << 19)))
        #expect(try outcome("other.raw", "a.raw") == .contents(offset: UInt64(bytes.count + 1 << 19)))
        var sparse = ImageConversion(source: directory.file("a.raw"), target: directory.file("a.qcow2"), format: .qcow2)
        try sparse.run()
        #expect(try outcome("a.raw", "a.qcow2") == .identical)
        sparse.target = directory.file("full.qcow2")
        sparse.preallocation = .full
        try sparse.run()
        #expect(try outcome("a.qcow2", "full.qcow2") == .identical)
        guard case .allocation = try outcome("a.qcow2", "full.qcow2", strict: true) else {
            Issue.record("strict"); return
        }
    }
}

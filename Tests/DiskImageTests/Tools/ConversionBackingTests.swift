// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Converting onto a backing file: only what differs from it gets into the new image.
@Suite(.timed) struct ConversionBackingTests {
    private let directory = TemporaryDirectory(inMemory: true)

    private static let cluster = 64 << 10

    /// A disk, and another that has some of its clusters as they are, some changed, some zero, and some where the first
    /// one has nothing.
    private func disks(_ size: Int) -> (base: [UInt8], disk: [UInt8]) {
        var base = [UInt8](repeating: 0, count: size), disk = base
        var generator = SeededGenerator(seed: UInt64(size))
        var position = 0
        while position < size {
            let count = min(Int.random(in: 1...5, using: &generator) * Self.cluster, size - position),
                bytes = randomBytes(count, seed: generator.next())
            switch Int.random(in: 0..<5, using: &generator) {
            case 0: break
            case 1:
                base.replaceSubrange(position..<position + count, with: bytes)
                disk.replaceSubrange(position..<position + count, with: bytes)
            case 2: base.replaceSubrange(position..<position + count, with: bytes)
            case 3: disk.replaceSubrange(position..<position + count, with: bytes)
            default:
                base.replaceSubrange(position..<position + count, with: bytes)
                disk.replaceSubrange(position..<position + count, with: bytes)
                // One sector of each.
                disk[position + count / 2] ^= 1
            }
            position += count
        }
        return (base, disk)
    }

    @Test(arguments: ["plain", "compressed", "version 2", "subclusters"], [-1, 0, 1]) func onlyDifferencesAreKept(
        kind: String, longer: Int
    ) throws {
        let size = 4 << 20 | 5 << 9
        let (base, disk) = disks(size)
        let raw = try directory.write("disk.raw", disk)
        // The backing file is shorter, as long, or longer with something behind the disk's end.
        let below = longer < 0 ? Array(base[..<(3 << 20 | 512)]) : base + [UInt8](repeating: 9, count: longer * 100_352)
        let source = try directory.write("below.raw", below)
        try ImageConversion(source: source, target: directory.file("base.qcow2"), format: .qcow2).run()
        var conversion = ImageConversion(source: raw, target: directory.file("over.qcow2"), format: .qcow2)
        conversion.backing = BackingReference(name: "base.qcow2", format: .qcow2)
        conversion.compresses = kind == "compressed"
        if kind == "version 2" { conversion.options.compatibility = .version2 }
        conversion.options.extendedL2 = kind == "subclusters"
        for threads in [1, 3] {
            conversion.threads = threads
            conversion.replacing = true
            try conversion.run()
            expectSound(conversion.target)
            let comparison = run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", conversion.target, raw])
            #expect(comparison.status == 0, "\(comparison.output)")
            // Each cluster of the new image's own is one that differs, and all that differ are there.
            var map = ImageMap(try DiskImage(path: conversion.target, options: readOnly)), own = Set<Int>(),
                expected = Set<Int>()
            while let extent = try map.next() {
                if extent.depth == 0, extent.kind != .unallocated {
                    for cluster in Int(extent.offset) / Self.cluster...Int(extent.offset + extent.length - 1)
                        / Self.cluster
                    { own.insert(cluster) }
                }
            }
            for cluster in 0...(size - 1) / Self.cluster {
                let range = cluster * Self.cluster..<min(size, (cluster + 1) * Self.cluster)
                let there = Array(below[min(below.count, range.lowerBound)..<min(below.count, range.upperBound)])
                if !isSame(there + [UInt8](repeating: 0, count: range.count - there.count), Array(disk[range])) {
                    expected.insert(cluster)
                }
            }
            #expect(own == expected && !expected.isEmpty, "\(own.symmetricDifference(expected).sorted())")
            let backing = try ImageInformation(path: conversion.target).backing
            #expect(backing?.name == "base.qcow2")
        }
    }

    @Test func whatCannotBeIsRefused() throws {
        let raw = try directory.write("disk.raw", randomBytes(1 << 20, seed: 1))
        try directory.write("base.raw", [UInt8](repeating: 0, count: 1 << 20))
        for (words, change) in [
            ("no backing file", { $0.format = .raw }), ("no backing file", { $0.format = .vmdk }),
            ("would hide the backing file", { $0.preallocation = .metadata }),
            ("backing file", { $0.backing?.name = "none.raw" }),
            (
                "it is the same file as the source",
                {
                    $0.target = self.directory.file("base.raw"); $0.format = .qcow2; $0.replacing = true
                }
            ),
        ] as [(String, (inout ImageConversion) -> Void)] {
            var conversion = ImageConversion(source: raw, target: directory.file("over.qcow2"), format: .qcow2)
            conversion.backing = BackingReference(name: "base.raw", format: .raw)
            change(&conversion)
            let before = run(["ls", "-A", directory.path]).output
            do throws(DiskImageError) {
                try conversion.run()
                Issue.record("it was done: \(words)")
            } catch {
                #expect("\(error)".contains(words), "\(error)")
            }
            #expect(run(["ls", "-A", directory.path]).output == before)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

@testable import CloudInit

/// What others read in the volumes.
@Suite(.timed) struct FATVolumeTests {
    private let directory = TemporaryDirectory()

    /// Bytes that are different in each cluster.
    private func contents(_ count: Int) -> [UInt8] { (0..<count).map { UInt8(truncatingIfNeeded: $0 ^ $0 >> 9) } }

    private func check(_ files: [FATVolume.File], sourceLocation: SourceLocation = #_sourceLocation) throws {
        let image = FATVolume.image(label: "CIDATA", files)
        #expect(image.count % 512 == 0, sourceLocation: sourceLocation)
        let path = try directory.write("volume", image)
        let found = run("/sbin/fsck.vfat -n '\(path)' 2>&1")
        #expect(found.status == 0, "\(text(found.output))", sourceLocation: sourceLocation)
        let names = text(run("mdir -b -i '\(path)' ::").output).split(separator: "\n").map { $0.dropFirst(3) }
        #expect(names.sorted() == files.map { $0.name[...] }.sorted(), sourceLocation: sourceLocation)
        for file in files {
            #expect(
                run("mtype -i '\(path)' '::\(file.name)'").output == file.contents, "\(file.name)",
                sourceLocation: sourceLocation)
        }
        #expect(
            text(run("/sbin/blkid -p -o value -s LABEL -s TYPE -s VERSION '\(path)'").output).split(separator: "\n")
                .sorted() == ["CIDATA", "FAT12", "vfat"], sourceLocation: sourceLocation)
    }

    @Test func whatASeedHas() throws {
        try check([
            FATVolume.File(name: "meta-data", contents: contents(200)),
            FATVolume.File(name: "user-data", contents: contents(3000)),
            FATVolume.File(name: "vendor-data", contents: []),
            FATVolume.File(name: "network-config", contents: contents(1)),
        ])
    }

    /// Around the ends of clusters, of the entries' room, and of the tables' sectors.
    @Test(arguments: [0, 1, 2047, 2048, 2049, 12 << 10, 693_000, 700_000, 2 << 20]) func sizes(count: Int) throws {
        try check([
            FATVolume.File(name: "a", contents: contents(count)),
            FATVolume.File(name: "thirteen-long", contents: contents(5)),
            FATVolume.File(name: "twenty-six-characters-long", contents: contents(7)),
            FATVolume.File(name: "twenty-six-characters-else", contents: contents(8)),
        ])
    }

    @Test func asMuchAsFits() throws {
        let sizes = [1 << 20, 1 << 20, 1 << 20, FATVolume.maximumContents - (3 << 20)]
        try check(
            sizes.enumerated().map { FATVolume.File(name: "file-number-\($0.offset)", contents: contents($0.element)) })
    }

    @Test func itDependsOnNothingElse() {
        func image(_ byte: UInt8) -> [UInt8] {
            FATVolume.image(label: "CIDATA", [FATVolume.File(name: "meta-data", contents: [byte])])
        }
        #expect(image(1) == image(1))
        // The volume's number.
        #expect(image(1)[39..<43] != image(2)[39..<43])
    }
}

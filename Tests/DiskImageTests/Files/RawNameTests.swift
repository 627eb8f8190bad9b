// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Names that are bytes, and no UTF-8.
@Suite(.timed) struct RawNameTests {
    let directory = TemporaryDirectory()

    private static let names: [[UInt8]] = [
        Array("m\u{e9}".utf8), Array("me\u{301}".utf8), [0x6d, 0xe9], [0x6d, 0xe8], [0xff, 0xfe], [0xed, 0xa0, 0x80],
        [0xf4, 0x8f, 0x9f, 0xa9], [0xc3], [0xe2, 0x82],
    ]

    private func path(_ name: [UInt8], _ ending: String = ".qcow2") -> String {
        directory.file(String(raw: name + Array(ending.utf8)))
    }

    /// The directory's names, as the kernel has them.
    private func entries() throws -> [[UInt8]] {
        let stream = try #require(opendir(directory.path))
        defer { closedir(stream) }
        var found: [[UInt8]] = []
        while let entry = readdir(stream) {
            let name = withUnsafeBytes(of: entry.pointee.d_name) { Array($0.prefix { $0 != 0 }) }
            if name != [0x2e], name != [0x2e, 0x2e] { found.append(name) }
        }
        return found
    }

    @Test func eachIsAFileOfItsOwn() throws {
        for (index, name) in Self.names.enumerated() {
            try ImageCreation(path: path(name), format: .qcow2, size: UInt64(index + 1) << 20).create()
        }
        #expect(Set(try entries()) == Set(Self.names.map { $0 + Array(".qcow2".utf8) }))
        for (index, name) in Self.names.enumerated() {
            #expect(try ImageInformation(path: path(name)).size == UInt64(index + 1) << 20)
            #expect(throws: DiskImageError.exists(path: path(name))) {
                try ImageCreation(path: path(name), format: .qcow2, size: 512).create()
            }
        }
        // One is replaced, the others are what they were.
        var creation = ImageCreation(path: path(Self.names[2]), format: .qcow2, size: 77 << 20)
        creation.replacing = true
        try creation.create()
        for (index, name) in Self.names.enumerated() {
            #expect(try DiskImage(path: path(name)).size == (index == 2 ? 77 : UInt64(index + 1)) << 20)
        }
        #expect(try entries().count == Self.names.count)
    }

    /// As a backing file, a data file, an extent: the bytes are in the image, and lead to the file.
    @Test(arguments: names.indices) func namesInImages(index: Int) throws {
        let name = Self.names[index]
        let base = String(raw: name + Array(".raw".utf8))
        try directory.write(base, [UInt8](repeating: 5, count: 1 << 20))
        let over = path(name, "-over.qcow2")
        var creation = ImageCreation(path: over, format: .qcow2)
        creation.backing = try BackingReference(name: base, stated: nil)
        try creation.create()
        #expect(try readFile(over, limit: 1 << 20).prefix(65536).firstRange(of: name + Array(".raw".utf8)) != nil)
        var engine = try DiskEngine(DiskImage(path: over))
        var contents = try engine.readAll()
        #expect(contents == [UInt8](repeating: 5, count: 1 << 20))
        try engine.write(0, [UInt8](repeating: 6, count: 512))
        try engine.perform(.flush)
        _ = consume engine
        #expect(try ImageCommit(path: over).run().rawBytes == directory.file(base).rawBytes)
        #expect(try directory.read(base).prefix(512) == [UInt8](repeating: 6, count: 512)[...])
        #expect(
            try ImageInformation.chain(path: over).map(\.path.rawBytes) == [
                over.rawBytes, directory.file(base).rawBytes,
            ])
        var rebase = ImageRebase(path: over)
        rebase.isUnsafe = true
        rebase.backing = BackingReference(name: "./" + base, format: .raw)
        try rebase.run()
        contents = try #require(try ImageInformation(path: over).backing?.name.rawBytes)
        #expect(contents == Array("./".utf8) + name + Array(".raw".utf8))

        let data = path(name, "-data.qcow2")
        creation = ImageCreation(path: data, format: .qcow2, size: 1 << 20)
        creation.options.dataFile = String(raw: name + Array(".data".utf8))
        try creation.create()
        #expect(
            try DiskImage(path: data, options: DiskImageOptions(allowsDataFile: true)).files.last?.rawBytes
                == path(name, ".data").rawBytes)
    }

    @Test func whatIsPrinted() throws {
        let path = directory.file(String(raw: [0x6d, 0xe9, 0x1b, 0x22]))
        #expect(
            "\(try #require(openError(path, DiskImageOptions(format: .raw))))".hasPrefix(
                "disk \"\(directory.path)/m\\xe9\\u{1B}\\\"\": "))
    }

    /// A snapshot's name is what was said.
    @Test func snapshots() throws {
        let path = path([0x61])
        try ImageCreation(path: path, format: .qcow2, size: 1 << 20).create()
        var engine = try DiskEngine(DiskImage(path: path))
        for name in Self.names { try engine.createSnapshot(named: String(raw: name)) }
        for name in Self.names { try engine.deleteSnapshot(String(raw: name)) }
        #expect(try engine.snapshots().isEmpty)
    }
}

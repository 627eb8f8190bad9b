// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import TestSupport
import Testing

/// The tools for whole images on formats that are only used as they are found.
@Suite(.timed) struct FormatToolTests {
    private let directory = TemporaryDirectory(inMemory: true)

    private static let formats = ImageFormat.allCases.filter { !$0.isMakeable }
    private static let kinds = [
        FormatKind(format: .vdi), FormatKind(format: .vhd, options: "subformat=dynamic"),
        FormatKind(format: .vhd, options: "subformat=fixed,force_size=on"),
        FormatKind(format: .vhdx, options: "subformat=dynamic"),
        FormatKind(format: .vmdk, options: "subformat=monolithicSparse"),
        FormatKind(format: .vmdk, options: "subformat=streamOptimized"),
        FormatKind(format: .vmdk, options: "subformat=twoGbMaxExtentFlat"),
    ]

    private func names() -> String { run(["ls", "-A", directory.path]).output }

    private func refusal(
        _ body: () throws(DiskImageError) -> Void, sourceLocation: SourceLocation = #_sourceLocation
    ) -> String {
        let before = names()
        var text = ""
        do throws(DiskImageError) {
            try body()
            Issue.record("it was done", sourceLocation: sourceLocation)
        } catch {
            text = "\(error)"
        }
        #expect(names() == before, sourceLocation: sourceLocation)
        return text
    }

    @Test(arguments: formats) func whatCannotBeMadeIsRefused(format: ImageFormat) throws {
        let source = try directory.write("source.raw", [UInt8](repeating: 1, count: 4096)),
            target = directory.file("new.\(format)")
        let creation = refusal { () throws(DiskImageError) in
            try ImageCreation(path: target, format: format, size: 1 << 20).create()
        }
        #expect(creation.contains("\(format.name) images cannot be created"))
        let conversion = refusal { () throws(DiskImageError) in
            try ImageConversion(source: source, target: target, format: format).run()
        }
        #expect(conversion.contains("\(format.name) images cannot be created"))
    }

    @Test(arguments: kinds) func whatCannotBeChangedIsRefused(kind: FormatKind) throws {
        let path = try directory.make(kind, QCOW2ImageTests.sparse(kind.size, seed: 1))
        let before = try directory.bytes(kind.fileName)
        for size in [512, 64 << 20] as [UInt64] {
            let resizing = refusal { () throws(DiskImageError) in
                var engine = try DiskEngine(DiskImage(path: path), depth: 1)
                try engine.resize(to: size, shrinks: true)
            }
            #expect(resizing.contains("\(kind.format.name) images ") || resizing.contains("compressed"), "\(resizing)")
        }
        #expect(throws: DiskImageError.notCheckable(path: path)) { try DiskImage.check(path: path, repair: .all) }
        var rebase = ImageRebase(path: path)
        rebase.isUnsafe = true
        #expect(refusal { () throws(DiskImageError) in try rebase.run() }.contains("only qcow2 images"))
        #expect(
            refusal { () throws(DiskImageError) in try ImageCommit(path: path).run() }.contains("only qcow2 images"))
        if kind.format.isWritable, !kind.options.contains("streamOptimized") {
            let snapshot = refusal { () throws(DiskImageError) in
                var engine = try DiskEngine(DiskImage(path: path), depth: 1)
                try engine.createSnapshot(named: "a")
            }
            #expect(snapshot.contains("only qcow2 images"))
        }
        #expect(try isSame(directory.bytes(kind.fileName), before))
    }

    @Test(arguments: kinds) func areConvertedComparedAndDescribed(kind: FormatKind) throws {
        let contents = QCOW2ImageTests.sparse(kind.size, seed: 7)
        let path = try directory.make(kind, contents)
        let raw = directory.file("in.raw")
        let found = try ImageComparison(path, with: raw).run()
        #expect(found == .identical || found == .identicalUpToZeroes)
        for format in [.raw, .qcow2] as [ImageFormat] {
            let target = directory.file("out.\(format)")
            try ImageConversion(source: path, target: target, format: format).run()
            #expect(try ImageComparison(path, with: target).run() == .identical)
            #expect(run(["qemu-img", "compare", "-f", "raw", "-F", format.rawValue, raw, target]).status == 0)
        }
        let information = try ImageInformation(path: path)
        let size = try DiskImage(path: path, options: DiskImageOptions(readOnly: true)).size
        #expect(information.size == size && information.format == kind.format && (information.allocated ?? 0) > 0)

        // The map says where the data is; what it calls zero is zero.
        var map = ImageMap(try DiskImage(path: path, options: DiskImageOptions(readOnly: true)))
        var end: UInt64 = 0, wrong: [UInt64] = []
        while let extent = try map.next() {
            #expect(extent.offset == end && extent.depth == 0 && map.files.indices.contains(extent.file))
            end += extent.length
            let range = min(contents.count, Int(extent.offset))..<min(contents.count, Int(end))
            if extent.readsAsZeroes, !isSame(Array(contents[range]), [UInt8](repeating: 0, count: range.count)) {
                wrong.append(extent.offset)
            }
            guard extent.kind == .data, let place = extent.fileOffset, !range.isEmpty else { continue }
            let name = try #require(map.files[extent.file].split(separator: "/").last)
            let file = try directory.bytes(String(name))
            let stored = Int(place)..<min(file.count, Int(place) + range.count)
            if !isSame(Array(file[stored]), Array(contents[range].prefix(stored.count))) { wrong.append(extent.offset) }
        }
        #expect(end == size && wrong.isEmpty, "\(wrong.prefix(5))")
    }
}

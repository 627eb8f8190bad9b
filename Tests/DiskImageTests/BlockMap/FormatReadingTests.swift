// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Images of other formats that qemu-img made, read byte for byte.
@Suite(.timed) struct FormatReadingTests {
    let directory = TemporaryDirectory(inMemory: true)

    @Test(arguments: FormatKind.readable) func whatWasConvertedIsRead(kind: FormatKind) throws {
        let size = min(kind.size, 40 << 20)
        let contents = QCOW2ImageTests.sparse(size, seed: UInt64(kind.size))
        let path = try directory.make(kind, contents)
        for usesRing in [true, false] {
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly), usesRing: usesRing)
            let isOurs = engine.image.format == kind.format && engine.image.isReadOnly
            #expect(isOurs)
            // Formats that round a disk's size up do it with zeroes.
            let diskSize = Int(engine.image.size)
            #expect(diskSize >= contents.count && diskSize - contents.count < 1 << 20)
            var wrong: [Int] = []
            let chunk = usesRing ? 4 << 20 : 777 << 9
            for offset in stride(from: 0, to: size, by: chunk) {
                let count = min(chunk, size - offset)
                let bytes = try engine.read(UInt64(offset), count)
                if !isSame(bytes, Array(contents[offset..<offset + count])) { wrong.append(offset) }
            }
            #expect(wrong.isEmpty, "\(wrong.prefix(5))")
            if diskSize > contents.count {
                #expect(try engine.read(UInt64(contents.count), diskSize - contents.count).allSatisfy { $0 == 0 })
            }
            let damage = engine.image.damage
            #expect(damage == nil)
        }
    }

    /// Data and zeroes that QEMU has written into an image, not converted.
    @Test(
        arguments: FormatKind.readable.filter {
            !$0.options.contains("streamOptimized") && $0.size > 1 << 20 && $0.size < 64 << 20
        })
    func whatWasWrittenIsRead(kind: FormatKind) throws {
        let path = directory.file(kind.fileName)
        let options = kind.options.isEmpty ? [] : ["-o", kind.options]
        let made = run(["qemu-img", "create", "-q", "-f", kind.format.rawValue] + options + [path, "\(kind.size)"])
        #expect(made.status == 0, "\(made.output)")
        qemuIO(
            path,
            [
                "write -P 1 0 64k", "write -P 2 1000k 300k", "write -z 1100k 64k", "write -P 3 4096k 512",
                "write -P 4 5119k 1k",
            ], format: kind.format.rawValue)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        let expected = try directory.contents(kind.fileName, kind.format)
        let size = engine.image.size
        #expect(size == expected.count)
        #expect(try isSame(engine.readAll(chunk: 333 << 9), expected))
        #expect(expected[0] == 1 && expected[1000 << 10] == 2 && expected[5120 << 10 - 1] == 4)
    }

    /// More than 2 GiB, so several files; and a table whose entries do not fit into one slice.
    @Test(arguments: ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicSparse"]) func largeDisksAreRead(
        type: String
    ) throws {
        let path = directory.file("disk.vmdk")
        qemuImage("create", "-q", "-f", "vmdk", "-o", "subformat=\(type)", path, "5G")
        qemuIO(path, ["write -P 1 2047M 2M", "write -P 2 4100M 1M", "write -P 3 5119M 1M"], format: "vmdk")
        var engine = try DiskEngine(
            DiskImage(path: path, options: DiskImageOptions(readOnly: true, metadataCacheSize: 0)))
        let files = engine.image.files.count
        #expect(files == (type == "monolithicSparse" ? 1 : 4))
        for (offset, value) in [(2046, 0), (2047, 1), (2048, 1), (2049, 0), (4100, 2), (4101, 0), (5119, 3)] {
            #expect(
                try isSame(
                    engine.read(UInt64(offset) << 20, 1 << 20), [UInt8](repeating: UInt8(value), count: 1 << 20)),
                "at \(offset) MiB")
        }
        // One request over the border of two files.
        #expect(try engine.read(2047 << 20 | 0xff000, 8192).allSatisfy { $0 == 1 })
    }

    /// Every 4096 blocks of 1 MiB are followed by the entry of something else.
    @Test func entriesOfBitmapsArePassedOver() throws {
        let path = directory.file("disk.vhdx")
        qemuImage("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "9G")
        qemuIO(path, ["write -P 1 4095M 2M", "write -P 2 8191M 2M", "write -P 3 9215M 1M"], format: "vhdx")
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        for (offset, value) in [
            (4094, 0), (4095, 1), (4096, 1), (4097, 0), (8190, 0), (8191, 2), (8192, 2), (8193, 0), (9215, 3),
        ] {
            #expect(
                try isSame(
                    engine.read(UInt64(offset) << 20, 1 << 20), [UInt8](repeating: UInt8(value), count: 1 << 20)),
                "at \(offset) MiB")
        }
    }

    /// Of a VMDK the extents are named by the image: only files beside it, and only if that is allowed.
    @Test func extentsStayWhereTheImageIs() throws {
        try directory.write("data", [UInt8](repeating: 7, count: 4096))
        for (name, allowed) in [
            ("data", true), ("../data", false), ("/etc/passwd", false), ("a/../../data", false), ("", false),
            ("a//data", false),
        ] {
            let text = VMDKDescriptor.text(type: "monolithicFlat", extents: ["RW 8 FLAT \"\(name)\" 0"], sectors: 8)
            let path = try directory.write("disk.vmdk", text)
            if allowed {
                var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
                #expect(try engine.readAll() == [UInt8](repeating: 7, count: 4096))
                #expect(
                    openError(path, DiskImageOptions(readOnly: true, allowsBacking: false))
                        == .extentNotAllowed(path: path, name: "data"))
            } else {
                #expect(openError(path, readOnly) == .extent(of: path, .extentName(path: path, name: name)))
            }
        }
    }

    /// A guest writes what it likes into a fixed VHD, another image's start among it: the footer is at the end.
    @Test func aGuestCannotMakeAFixedVHDAnother() throws {
        let dynamic = directory.file("other.vhd")
        qemuImage("create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", dynamic, "4M")
        qemuIO(dynamic, ["write -P 9 0 1M"], format: "vpc")
        let fake = Array(try directory.bytes("other.vhd").prefix(1 << 20))
        let path = try directory.make(
            FormatKind(format: .vhd, options: "subformat=fixed,force_size=on"),
            fake + [UInt8](repeating: 0, count: 1 << 20))
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try engine.read(0, fake.count) == fake)
    }

    /// Tools read by themselves, without an engine: what is broken ends them and does not keep them for ever.
    @Test(arguments: [FormatKind(format: .vmdk, options: "subformat=streamOptimized")]) func brokenGrainsEndATool(
        kind: FormatKind
    ) throws {
        let path = try directory.make(kind, [UInt8](repeating: 1, count: 1 << 20))
        let name = try #require(path.split(separator: "/").last)
        var bytes = try directory.read(String(name))
        // The first grain, behind the header and the descriptor, is a sector's number, a length, and what zlib's header
        // begins.
        var grain = 65536
        while grain + 13 < bytes.count, bytes[grain + 12] != 0x78 { grain += 512 }
        #expect(bytes[grain + 12] == 0x78)
        bytes[grain + 12] = 0
        let broken = try directory.write("broken.vmdk", bytes)
        #expect(throws: DiskImageError.self) { _ = try ImageComparison(broken, with: path).run() }
    }

    /// QEMU reads these as if they had no parent.
    @Test func differencingImagesAreRefusedByName() throws {
        func change(
            _ name: String, _ format: ImageFormat, _ kind: String, _ body: (inout [UInt8]) throws -> Void
        ) throws {
            let path = directory.file(name)
            qemuImage("create", "-q", "-f", format.rawValue, path, "4M")
            var bytes = try directory.read(name)
            try body(&bytes)
            try directory.write(name, bytes)
            let error = openError(path, DiskImageOptions(format: format, readOnly: true))
            #expect(error == .needsParent(path: path, kind: kind), "\(name): \(String(describing: error))")
        }
        for (name, type, kind) in [("undo.vdi", 3, "an undo image"), ("difference.vdi", 4, "a differencing image")]
            as [(String, UInt8, String)]
        {
            try change(name, .vdi, kind) { $0[0x4c] = type }
        }
        try change("uuid.vdi", .vdi, "an image with the UUID of another") { $0[0x1a8] = 1 }
        try change("difference.vhd", .vhd, "a differencing disk") { bytes in
            for footer in [0, bytes.count - 512] {
                bytes.store(4 as UInt32, at: footer + 60)
                bytes.store(0 as UInt32, at: footer + 64)
                bytes.store(~bytes[footer..<footer + 512].reduce(0 as UInt32) { $0 &+ UInt32($1) }, at: footer + 64)
            }
        }
        try change("difference.vhdx", .vhdx, "a differencing disk") { bytes in
            let id: [UInt8] = [
                0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b,
            ]
            let entry = try #require(
                stride(from: 1 << 20, to: bytes.count, by: 32).first { bytes[$0...].starts(with: id) })
            // The first item behind the table, which is 64 KiB long.
            bytes[entry / (64 << 10) * (64 << 10) + Int(bytes.littleEndian32(at: entry + 16)) + 4] |= 2
        }
    }

    /// What is only read is refused for writing, and what cannot be read at all is named.
    @Test func whatCannotBeUsedIsNamed() throws {
        for (format, word) in [(ImageFormat.vhd, "VHD"), (.vhdx, "VHDX")] {
            let path = try directory.make(FormatKind(format: format), [UInt8](repeating: 1, count: 1 << 20))
            #expect("\(openError(path)!)".contains("\(word) images are read-only"))
        }
        let stream = try directory.make(
            FormatKind(format: .vmdk, options: "subformat=streamOptimized"), [UInt8](repeating: 1, count: 1 << 20))
        #expect("\(openError(stream)!)".contains("its grains are compressed"))
        // A link to another image.
        qemuImage("create", "-q", "-f", "vmdk", directory.file("base.vmdk"), "1M")
        qemuImage("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", directory.file("link.vmdk"))
        #expect(
            "\(openError(directory.file("link.vmdk"), readOnly)!)".contains(
                "it is a link to another image and depends on a parent"))
        // Of another format than it says, or nothing at all.
        for format in ImageFormat.allCases where format != .raw && format != .qcow2 {
            let path = try directory.write("x.\(format.rawValue)", randomBytes(3 << 19, seed: 4))
            #expect("\(openError(path, readOnly)!)".contains("not a \(format.name)"), "\(format)")
            try directory.write("x.\(format.rawValue)", [])
            #expect("\(openError(path, readOnly)!)".contains("not a \(format.name)"), "\(format)")
        }
    }

    /// As a backing file.
    @Test func aQCOW2ImageStandsOnOthers() throws {
        let contents = QCOW2ImageTests.sparse(3 << 20, seed: 8)
        for format in [ImageFormat.vdi, .vmdk, .vhdx] {
            let base = try directory.make(FormatKind(format: format), contents)
            let top = directory.file("\(format).qcow2")
            qemuImage("create", "-q", "-f", "qcow2", "-b", base, "-F", format.rawValue, top)
            var engine = try DiskEngine(DiskImage(path: top, options: unlocked))
            try engine.write(1 << 20, randomBytes(1536, seed: 3))
            var expected = contents
            expected.replaceSubrange(1 << 20..<1 << 20 + 1536, with: randomBytes(1536, seed: 3))
            #expect(try isSame(engine.readAll(), expected))
        }
    }
}

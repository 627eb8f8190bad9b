// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// VMDK descriptors as VMware's, VirtualBox's and other programs write them, and people with editors.
@Suite(.timed) struct VMDKTextTests {
    private let directory = TemporaryDirectory(inMemory: true)

    private static let plain = """
        # Disk DescriptorFile
        version=1
        CID=7ca5ef2d
        parentCID=ffffffff
        createType="monolithicFlat"

        # Extent description
        RW 8 FLAT "data" 0

        # The Disk Data Base
        #DDB

        ddb.adapterType = "lsilogic"

        """

    /// What is done to the plain text.
    enum Change: String, CaseIterable {
        case none, blanks, tabs, returns, oldReturns, mark, upper, lower, spaced, indented, unquoted, otherSignature,
            tightSignature, noSignature, firstLineBlank

        func apply(_ text: String) -> [UInt8] {
            func lines(_ body: (Substring) -> String) -> String {
                text.split(separator: "\n", omittingEmptySubsequences: false).map(body).joined(separator: "\n")
            }
            return switch self {
            case .none: Array(text.utf8)
            // As VMware's OVF export has it.
            case .blanks: Array(lines { $0.isEmpty ? "" : $0 + " " }.utf8)
            case .tabs: Array(lines { $0 + " \t " }.replacing("RW 8 FLAT", with: "RW\t8\t FLAT\t").utf8)
            case .returns: Array(text.replacing("\n", with: "\r\n").utf8)
            case .oldReturns: Array(text.replacing("\n", with: "\r").utf8)
            case .mark: [0xef, 0xbb, 0xbf] + text.utf8
            case .upper: Array(text.uppercased().replacing("\"DATA\"", with: "\"data\"").utf8)
            case .lower: Array(text.lowercased().utf8)
            case .spaced: Array(text.replacing("=", with: " = ").utf8)
            case .indented: Array(lines { "  \t" + $0 }.utf8)
            case .unquoted: Array(text.replacing("\"monolithicFlat\"", with: "monolithicFlat").utf8)
            case .otherSignature: Array(text.replacing("# Disk DescriptorFile", with: "# Disk Descriptor File").utf8)
            case .tightSignature: Array(text.replacing("# Disk DescriptorFile", with: "#Disk DescriptorFile").utf8)
            case .noSignature: Array(text.replacing("# Disk DescriptorFile\n", with: "").utf8)
            case .firstLineBlank: Array(("\n  \n" + text).utf8)
            }
        }
    }

    @Test(arguments: Change.allCases) func textThatOthersWrite(change: Change) throws {
        let contents = randomBytes(4096, seed: 1), bytes = change.apply(Self.plain)
        try directory.write("data", contents)
        let path = try directory.write("disk.vmdk", bytes)
        do {
            var engine = try DiskEngine(DiskImage(path: path))
            #expect(try engine.readAll() == contents)
            // The first change gives it a new content ID, in its place.
            try engine.write(0, [1])
        }
        var after = try directory.read("disk.vmdk")
        let place = try #require(VMDKDescriptor(after, path: path).contentIDPlace)
        #expect(after.count == bytes.count && after != bytes)
        after.replaceSubrange(place..<place + 8, with: bytes[place..<place + 8])
        #expect(after == bytes)
        #expect(String(decoding: bytes[place..<place + 8], as: UTF8.self).lowercased() == "7ca5ef2d")
        // A link stays one, however it is written.
        try directory.write(
            "disk.vmdk", change.apply(Self.plain.replacing("parentCID=ffffffff", with: "parentCID=7ca5ef2e")))
        guard case .needsParent = openError(path, readOnly) else { Issue.record("it is a link"); return }
        try directory.write("disk.vmdk", change.apply(Self.plain.replacing("version=1", with: "version=4")))
        guard case .unsupported = openError(path, readOnly) else { Issue.record("it has version 4"); return }
    }

    /// What has neither the first line nor a type is no descriptor, whatever it has.
    @Test func otherTextIsRefused() throws {
        for text in ["", "\n", "hello", "RW 8 FLAT \"data\" 0\n", "version=1\n", "# Disk\nversion=1\n"] {
            guard case .notOfFormat = openError(try directory.write("disk.vmdk", Array(text.utf8)), readOnly) else {
                Issue.record("\(text)"); continue
            }
        }
        for line in [
            "RW 8 FLAT \"data", "RW 8 FLAT", "RW", "RW x FLAT \"data\" 0", "RW 0 FLAT \"data\" 0",
            "RW 8 FLAT \"data\" x", "RW 8 FLAT data 0", "rw 8 odd \"data\"",
        ] {
            let path = try directory.write(
                "disk.vmdk", Array(Self.plain.replacing("RW 8 FLAT \"data\" 0", with: line).utf8))
            let error = openError(path, readOnly)
            switch error {
            case .invalid, .unsupported: break
            default: Issue.record("\(line): \(String(describing: error))")
            }
        }
    }

    private func descriptor(_ extents: [String]) throws -> String {
        try directory.write(
            "disk.vmdk", Array(Self.plain.replacing("RW 8 FLAT \"data\" 0", with: extents.joined(separator: "\n")).utf8)
        )
    }

    /// As VirtualBox makes them for some partitions of a device, and as people do for parts of a file.
    @Test func severalExtentsOfOneFile() throws {
        let contents = randomBytes(64 << 10, seed: 2)
        try directory.write("data", contents)
        try directory.write("other", randomBytes(4096, seed: 3))
        func part(_ first: Int, _ count: Int) -> [UInt8] { Array(contents[first << 9..<(first + count) << 9]) }
        let path = try descriptor([
            "RW 16 FLAT \"data\" 64", "RW 8 FLAT \"other\" 0", "RW 32 FLAT \"data\" 0", "RW 1 FLAT \"data\" 127",
        ])
        let expected = part(64, 16) + randomBytes(4096, seed: 3) + part(0, 32) + part(127, 1)
        #expect(try isSame(directory.contents("disk.vmdk", .vmdk), expected))
        do {
            var engine = try DiskEngine(DiskImage(path: path))
            let files = engine.image.files
            #expect(files == [path, directory.file("data"), directory.file("other")])
            #expect(try isSame(engine.readAll(chunk: 1536), expected))
            // Over the borders of all of them.
            try engine.write(15 << 9, [UInt8](repeating: 7, count: 12 << 9))
        }
        var after = contents
        after.replaceSubrange(79 << 9..<80 << 9, with: [UInt8](repeating: 7, count: 512))
        after.replaceSubrange(0..<3 << 9, with: [UInt8](repeating: 7, count: 3 << 9))
        #expect(try isSame(directory.read("data"), after))
        #expect(try directory.read("other") == [UInt8](repeating: 7, count: 4096))
        // The same bytes twice can be read; written they would be one another's end.
        let twice = try descriptor(["RW 16 FLAT \"data\" 0", "RW 16 FLAT \"data\" 8"])
        var engine = try DiskEngine(DiskImage(path: twice, options: readOnly))
        #expect(try isSame(engine.readAll(), Array(after[..<(16 << 9)] + after[8 << 9..<24 << 9])))
        _ = consume engine
        guard case .notWritable = openError(twice) else { Issue.record("it was opened for writing"); return }
        // By another name of the file, and beyond its end.
        #expect(symlink("data", directory.file("link")) == 0)
        guard case .notWritable = openError(try descriptor(["RW 16 FLAT \"data\" 0", "RW 16 FLAT \"link\" 8"])) else {
            Issue.record("by a link"); return
        }
        guard
            case .truncated = try #require(
                openError(try descriptor(["RW 16 FLAT \"data\" 0", "RW 16 FLAT \"data\" 113"]), readOnly)
            ).cause
        else {
            Issue.record("beyond the end")
            return
        }
        // The descriptor is none of them.
        guard case .extent = openError(try descriptor(["RW 1 FLAT \"disk.vmdk\" 0"])) else {
            Issue.record("its own descriptor"); return
        }
    }

    /// Makes a file whose name is these bytes, or ends it.
    private func put(_ name: [UInt8], _ contents: [UInt8]?) {
        var path = Array("\(directory.path)/".utf8CString.dropLast()) + name.map { CChar(bitPattern: $0) } + [0]
        guard let contents else {
            #expect(unlink(&path) == 0)
            return
        }
        let number = creat(&path, 0o644)
        #expect(
            number >= 0 && contents.withUnsafeBytes { Glibc.write(number, $0.baseAddress, $0.count) } == contents.count)
        close(number)
    }

    /// A name is bytes. Where no file has them, and they are windows-1252, the file with the same name in UTF-8 is
    /// meant.
    @Test(
        arguments: [
            ("", [0x4d, 0xe4, 0x72, 0x7a], [0x4d, 0xe4, 0x72, 0x7a], true),
            ("windows-1252", [0x4d, 0xe4, 0x72, 0x7a, 0x80], Array("M\u{e4}rz\u{20ac}".utf8), true),
            ("Windows-1252", [0x4d, 0xe4], [0x4d, 0xe4], true), ("", [0x4d, 0xe4], Array("M\u{e4}".utf8), true),
            ("UTF-8", Array("M\u{e4}".utf8), Array("M\u{e4}".utf8), true),
            ("UTF-8", Array("M\u{e4}".utf8), [0x4d, 0xe4], false),
            ("windows-1252", Array("M\u{e4}".utf8), Array("M\u{e4}".utf8), true),
            ("Shift_JIS", [0x83, 0x66], [0x83, 0x66], true),
            ("windows-1252", Array("data".utf8), Array("date".utf8), false),
        ] as [(String, [UInt8], [UInt8], Bool)])
    func namesOfExtents(encoding: String, name: [UInt8], file: [UInt8], isFound: Bool) throws {
        let line = encoding.isEmpty ? "" : "encoding=\"\(encoding)\"\n"
        let parts = Self.plain.replacing("version=1\n", with: "version=1\n" + line).split(
            separator: "data", maxSplits: 1)
        let path = try directory.write("disk.vmdk", Array(parts[0].utf8) + name + Array(parts[1].utf8))
        put(file, [UInt8](repeating: 1, count: 4096))
        guard isFound else {
            guard case .system(_, let error) = try #require(openError(path, readOnly)).cause, error.errno == ENOENT
            else {
                Issue.record("it is another name")
                return
            }
            return
        }
        do {
            var engine = try DiskEngine(DiskImage(path: path))
            #expect(try engine.readAll() == [UInt8](repeating: 1, count: 4096))
        }
        guard name != file else {
            return #expect(try directory.contents("disk.vmdk", .vmdk) == [UInt8](repeating: 1, count: 4096))
        }
        // The one that is there by its bytes comes first.
        put(name, [UInt8](repeating: 2, count: 4096))
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try engine.readAll() == [UInt8](repeating: 2, count: 4096))
    }

    /// A stream as ESX exports it: version 3, blanks at the ends of lines, and a flag for a second directory that it
    /// does not have.
    @Test func aStreamOfESX() throws {
        let contents = QCOW2ImageTests.sparse(5 << 20, seed: 4)
        let path = try directory.make(FormatKind(format: .vmdk, options: "subformat=streamOptimized"), contents)
        var bytes = try directory.bytes("disk.vmdk")
        let text = Change.blanks.apply(
            Self.plain.replacing("monolithicFlat", with: "streamOptimized").replacing(
                "RW 8 FLAT \"data\" 0", with: "RDONLY \(contents.count / 512) SPARSE \"export.vmdk\""))
        let room = Int(bytes.littleEndian64(at: 36)) * 512
        bytes.replaceSubrange(512..<512 + room, with: text + [UInt8](repeating: 0, count: room - text.count))
        #expect(bytes[4] == 3)
        bytes[8] |= 2
        bytes.replaceSubrange(48..<56, with: [UInt8](repeating: 0, count: 8))
        try directory.write("disk.vmdk", bytes)
        #expect(try isSame(directory.contents("disk.vmdk", .vmdk), contents))
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try isSame(engine.readAll(), contents))
    }

    /// Version 3 without compression, as changed block tracking makes it: for reading.
    @Test func versionThreeIsRead() throws {
        let contents = QCOW2ImageTests.sparse(5 << 20, seed: 5)
        let path = try directory.make(FormatKind(format: .vmdk, options: "subformat=monolithicSparse"), contents)
        var bytes = try directory.bytes("disk.vmdk")
        bytes[4] = 3
        try directory.write("disk.vmdk", bytes)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try isSame(engine.readAll(), contents))
        _ = consume engine
        guard case .notWritable = openError(path) else { Issue.record("it was opened for writing"); return }
    }

    /// Where the two directories of a file differ, the one that QEMU and VirtualBox read.
    @Test func theFirstDirectoryCounts() throws {
        let contents = QCOW2ImageTests.sparse(5 << 20, seed: 6)
        let path = try directory.make(FormatKind(format: .vmdk, options: "subformat=monolithicSparse"), contents)
        var bytes = try directory.bytes("disk.vmdk")
        let second = Int(bytes.littleEndian64(at: 48)) * 512
        bytes.replaceSubrange(second..<second + 4, with: [0, 0, 0, 0])
        try directory.write("disk.vmdk", bytes)
        #expect(try isSame(directory.contents("disk.vmdk", .vmdk), contents))
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try isSame(engine.readAll(), contents))
    }

    /// Disk2vhd numbers unmapped blocks as a draft of the specification did.
    @Test func blocksOfDisk2vhd() throws {
        let path = try directory.make(
            FormatKind(format: .vhdx, options: "subformat=dynamic,block_size=1M"),
            [UInt8](repeating: 1, count: 1 << 20) + [UInt8](repeating: 0, count: 3 << 20))
        var bytes = try directory.bytes("disk.vhdx")
        let id: [UInt8] = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08,
        ]
        let entry = try #require(
            stride(from: 192 << 10, to: 256 << 10, by: 8).first { bytes[$0..<$0 + 16].elementsEqual(id) })
        let table = Int(bytes.littleEndian64(at: entry + 16))
        for block in 1..<4 { bytes[table + 8 * block] = bytes[table + 8 * block] & ~7 | 5 }
        try directory.write("disk.vhdx", bytes)
        var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
        #expect(try isSame(engine.readAll(), directory.contents("disk.vhdx", .vhdx)))
    }
}

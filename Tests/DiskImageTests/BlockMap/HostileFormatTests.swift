// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// Images of other formats than qcow2 that were made to harm the program that opens them: each size, count and offset
/// of their headers and tables at the edges of its range. None may do more than fail.
@Suite(.timed) struct HostileFormatTests {
    let directory = TemporaryDirectory(inMemory: true)

    /// A number in a file.
    struct Field {
        var name: String
        var place: Int
        var width: Int
        var isBig = false

        init(_ name: String, _ place: Int, _ width: Int, isBig: Bool = false) {
            self.name = name
            self.place = place
            self.width = width
            self.isBig = isBig
        }

        func put(_ value: UInt64, into bytes: inout [UInt8]) {
            for index in 0..<width {
                bytes[place + index] = UInt8(
                    truncatingIfNeeded: value >> UInt64(8 * (isBig ? width - 1 - index : index)))
            }
        }

        /// Nothing, the least, the most, half of it, just beyond the end in bytes, sectors and MiB, and where the
        /// header itself is.
        func values(_ size: Int) -> [(name: String, value: UInt64)] {
            let most = width == 8 ? UInt64.max : 1 << UInt64(8 * width) - 1
            let all: [(String, UInt64)] = [
                ("0", 0), ("1", 1), ("2", 2), ("most", most), ("half", most >> 1), ("half+1", most >> 1 + 1),
                ("end", UInt64(size)), ("sectors", UInt64(size / 512)),
                ("sectors-1", UInt64(size / 512 - 1)), ("512", 512), ("MiB", 1 << 20),
                ("MiBs", UInt64(size) & ~0xfffff),
            ]
            return all.filter { $0.1 <= most }
        }
    }

    /// Opens the bytes as an image, for reading and, where that can be, for writing, and uses the start, the middle and
    /// the end of the disk.
    /// - Returns: how it failed to open, or nothing.
    private func use(
        _ bytes: [UInt8], _ format: ImageFormat, _ comment: String
    ) throws -> (reading: DiskImageError?, writing: DiskImageError?) {
        var answers: [DiskImageError?] = []
        for isReadOnly in [true, false] {
            let path = try directory.write("hostile.\(format)", bytes)
            let options = DiskImageOptions(
                format: format, readOnly: isReadOnly, locking: false, allowsBacking: false, metadataCacheSize: 64 << 10)
            let image: DiskImage
            do throws(DiskImageError) { image = try DiskImage(path: path, options: options) } catch {
                // The sentence is made, too.
                #expect("\(error)".hasPrefix("disk \"") && "\(error)".utf8.count < 400, "\(comment)")
                answers.append(error)
                continue
            }
            answers.append(nil)
            var engine = try DiskEngine(image, depth: 4, segments: 4, usesRing: false)
            let size = engine.image.size, count = Int(min(size, 8192))
            #expect(size % 512 == 0 && size <= DiskImage.maximumSize, "\(comment)")
            var written: [UInt64] = []
            for offset in [0, size / 2 & ~511, size - UInt64(count)] where count > 0 && offset <= size - UInt64(count) {
                try expectAnswer(comment) { _ = try engine.read(offset, count) }
                guard !isReadOnly else { continue }
                try expectAnswer(comment) {
                    try engine.write(offset, [UInt8](repeating: 0x77, count: count))
                    written.append(offset)
                }
            }
            guard !isReadOnly else { continue }
            try expectAnswer(comment) { try engine.perform(.flush) }
            if let damage = engine.image.damage {
                #expect("\(damage)".hasPrefix("disk "), "\(comment)")
                continue
            }
            for offset in written {
                #expect(try engine.read(offset, count).allSatisfy { $0 == 0x77 }, "at \(offset): \(comment)")
            }
            _ = consume engine
            // What was written has left the image as one that can be opened.
            #expect(throws: Never.self, "\(comment)") { _ = try DiskImage(path: path, options: options) }
        }
        return (answers[0], answers[1])
    }

    /// What a request may come to: success, or an error of the request.
    private func expectAnswer(_ comment: String, _ body: () throws -> Void) throws {
        do { try body() } catch {
            guard case .request = error as? DiskImageError else { Issue.record("\(error), \(comment)"); return }
        }
    }

    /// Tries all values of all fields.
    /// - Parameters:
    ///   - refusals: for each field the values with which the image is refused at once; with others it opens, and then
    ///     requests may fail.
    ///   - seal: puts checksums right.
    private func expect(
        _ bytes: [UInt8], _ format: ImageFormat, _ fields: [Field], _ refusals: [String: String],
        seal: (inout [UInt8]) -> Void = { _ in }, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        #expect(try use(bytes, format, "unchanged").reading == nil, sourceLocation: sourceLocation)
        for field in fields {
            var refused: [String] = []
            for (name, value) in field.values(bytes.count) {
                var changed = bytes
                field.put(value, into: &changed)
                if changed == bytes { continue }
                seal(&changed)
                if try use(changed, format, "\(field.name)=\(name)").reading != nil { refused.append(name) }
            }
            let expected = (refusals[field.name] ?? "").split(separator: " ").map { String($0) }
            #expect(
                refused == expected, "\(field.name): refused \(refused.joined(separator: " "))",
                sourceLocation: sourceLocation)
        }
    }

    private var contents: [UInt8] { QCOW2ImageTests.sparse(3 << 20 | 512, seed: 2) }

    private func made(_ kind: ImageSubformat, _ name: String) throws -> [UInt8] {
        let raw = try directory.write("in.raw", contents)
        var conversion = ImageConversion(source: raw, target: directory.file(name), format: kind.format)
        conversion.subformat = kind
        conversion.replacing = true
        try conversion.run()
        return try directory.bytes(name)
    }

    @Test func vdi() throws {
        let fields = [
            Field("version", 0x44, 4), Field("type", 0x4c, 4), Field("table", 0x154, 4), Field("data", 0x158, 4),
            Field("sector", 0x168, 4), Field("disk", 0x170, 8),
            Field("block", 0x178, 4), Field("extra", 0x17c, 4), Field("blocks", 0x180, 4), Field("allocated", 0x184, 4),
            Field("entry", 512, 4), Field("last entry", 524, 4),
        ]
        try expect(
            made(.dynamic, "made.vdi"), .vdi, fields,
            [
                "version": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "type": "0 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "table": "0 1 2 most half half+1 end sectors-1 MiB MiBs", "data": "0 1 2 most half sectors-1 512",
                "sector": "0 1 2 most half half+1 end sectors sectors-1 MiB MiBs", "disk": "most half half+1 end MiBs",
                "block": "0 1 2 most half half+1 end sectors sectors-1 512 MiBs",
                "extra": "1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "blocks": "0 1 2 most half half+1 end MiB MiBs",
            ])
    }

    @Test func sparseVMDK() throws {
        let bytes = try made(.monolithicSparse, "made.vmdk")
        let directory = Int(bytes.littleEndian64(at: 56)) * 512, copy = Int(bytes.littleEndian64(at: 48)) * 512
        let fields = [
            Field("version", 4, 4), Field("flags", 8, 4), Field("capacity", 12, 8), Field("grain", 20, 8),
            Field("descriptor", 28, 8), Field("descriptor size", 36, 8),
            Field("entries", 44, 4), Field("second directory", 48, 8), Field("directory", 56, 8),
            Field("overhead", 64, 8), Field("table", directory, 4),
            Field("copy of table", copy, 4), Field("grain entry", directory + 512, 4),
            Field("copy of grain entry", copy + 512, 4),
        ]
        try expect(
            bytes, .vmdk, fields,
            [
                "version": "0 most half half+1 end sectors sectors-1 512 MiB MiBs", "flags": "most half",
                "capacity": "most half half+1",
                "grain": "0 1 most half half+1 end sectors sectors-1 MiB MiBs",
                "descriptor": "most half half+1 end MiB MiBs",
                "descriptor size": "most half half+1 end sectors sectors-1 MiB MiBs",
                "entries": "0 1 2 most half half+1 end sectors sectors-1 MiB MiBs",
                "second directory": "most half half+1 end sectors MiB MiBs",
                "directory": "most half half+1 end sectors MiB MiBs",
            ])
    }

    @Test func streamOptimizedVMDK() throws {
        let bytes = try made(.streamOptimized, "made.vmdk")
        let footer = bytes.count - 1024, directory = Int(bytes.littleEndian64(at: footer + 56)) * 512,
            table = Int(bytes.littleEndian32(at: directory)) * 512
        let grain = Int(bytes.littleEndian32(at: table)) * 512
        let fields = [
            Field("header's directory", 56, 8), Field("compression", footer + 77, 2), Field("version", footer + 4, 4),
            Field("flags", footer + 8, 4),
            Field("capacity", footer + 12, 8), Field("grain", footer + 20, 8), Field("descriptor", footer + 28, 8),
            Field("descriptor size", footer + 36, 8),
            Field("entries", footer + 44, 4), Field("directory", footer + 56, 8), Field("overhead", footer + 64, 8),
            Field("marker", footer - 512 + 12, 4),
            Field("marker's size", footer - 512 + 8, 4), Field("table", directory, 4), Field("grain entry", table, 4),
            Field("grain's sector", grain, 8),
            Field("grain's length", grain + 8, 4), Field("grain's data", grain + 12, 4),
        ]
        try expect(
            bytes, .vmdk, fields,
            [
                "header's directory": "half half+1 end sectors MiB",
                "compression": "0 2 most half half+1 sectors sectors-1 512 MiBs",
                "version": "0 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "flags": "0 1 2 half+1 sectors sectors-1 512 MiB MiBs",
                "capacity": "most half half+1",
                "grain": "0 1 most half half+1 end sectors sectors-1 MiB MiBs",
                "descriptor": "most half half+1 end MiB",
                "descriptor size": "most half half+1 end MiB",
                "entries": "0 1 2 most half half+1 end sectors sectors-1 MiB MiBs",
                "directory": "most half half+1 end sectors MiB",
                "marker": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "marker's size": "1 2 most half half+1 end sectors sectors-1 512 MiB",
            ])
    }

    @Test(arguments: ["fixed", "dynamic"]) func vhd(kind: String) throws {
        let raw = try directory.write("in.raw", contents)
        qemuImage(
            "convert", "-f", "raw", "-O", "vpc", "-o", "subformat=\(kind),force_size=on", raw,
            directory.file("made.vhd"))
        let bytes = try directory.bytes("made.vhd"), end = bytes.count - 512, isDynamic = kind == "dynamic"
        let header = isDynamic ? Int(bytes.bigEndian64(at: 16)) : 0,
            table = isDynamic ? Int(bytes.bigEndian64(at: header + 16)) : 0
        var fields = [
            Field("header", end + 16, 8, isBig: true), Field("creator", end + 28, 4, isBig: true),
            Field("disk", end + 48, 8, isBig: true),
            Field("cylinders", end + 56, 2, isBig: true), Field("heads", end + 58, 1), Field("sectors", end + 59, 1),
            Field("type", end + 60, 4, isBig: true),
        ]
        if isDynamic {
            fields += [
                Field("table", header + 16, 8, isBig: true), Field("entries", header + 28, 4, isBig: true),
                Field("block", header + 32, 4, isBig: true),
                Field("entry", table, 4, isBig: true), Field("last entry", table + 4, 4, isBig: true),
            ]
        }
        let refusals =
            isDynamic
            ? [
                "header": "0 1 2 most half half+1 end sectors sectors-1 MiB MiBs", "disk": "most half half+1 end",
                "type": "0 1 most half half+1 end sectors sectors-1 512 MiB MiBs", "table": "most half half+1 end",
                "entries": "0 1",
                "block": "0 1 2 most half half+1 end sectors sectors-1 512 MiB",
            ]
            : [
                "disk": "most half half+1 end", "type": "0 1 most half half+1 end sectors sectors-1 512 MiB MiBs",
            ]
        try expect(bytes, .vhd, fields, refusals) { bytes in
            for (place, count, checksum) in [(end, 512, 64)] + (isDynamic ? [(header, 1024, 36)] : []) {
                Field("", place + checksum, 4).put(0, into: &bytes)
                let sum = bytes[place..<place + count].reduce(UInt32(0)) { $0 &+ UInt32($1) }
                Field("", place + checksum, 4, isBig: true).put(UInt64(~sum), into: &bytes)
            }
        }
    }

    @Test func vhdx() throws {
        let raw = try directory.write("in.raw", contents)
        qemuImage("convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", raw, directory.file("made.vhdx"))
        let bytes = try directory.bytes("made.vhdx")
        var fields = [
            Field("version", 64 << 10 | 66, 2), Field("log version", 64 << 10 | 64, 2),
            Field("log size", 64 << 10 | 68, 4), Field("log", 64 << 10 | 72, 8),
            Field("regions", 192 << 10 | 8, 4),
        ]
        var metadata = 0, table = 0
        for region in 0..<2 {
            let place = 192 << 10 | 16 + region * 32
            fields += [
                Field("region \(region)", place + 16, 8), Field("region \(region)'s length", place + 24, 4),
                Field("region \(region) is required", place + 28, 4),
                Field("region \(region)'s kind", place, 4),
            ]
            if bytes[place] == 0x06 {
                metadata = Int(bytes.littleEndian64(at: place + 16))
            } else {
                table = Int(bytes.littleEndian64(at: place + 16))
            }
        }
        fields += [Field("items", metadata + 10, 2), Field("entry", table, 8), Field("last entry", table + 24, 8)]
        for item in 0..<Int(bytes.littleEndian16(at: metadata + 10)) {
            let place = metadata + 32 + item * 32
            fields += [
                Field("item \(item)", place + 16, 4), Field("item \(item)'s length", place + 20, 4),
                Field("item \(item)'s flags", place + 24, 4),
                Field("item \(item)'s value", metadata + Int(bytes.littleEndian32(at: place + 16)), 4),
            ]
        }
        try expect(
            bytes, .vhdx, fields,
            [
                "version": "0 2 most half half+1 sectors sectors-1 512",
                "regions": "0 1 most half half+1 end sectors sectors-1 MiB MiBs",
                "region 0": "0 1 2 most half half+1 end sectors sectors-1 512 MiBs",
                "region 0's length": "0 1 2 most half half+1 end sectors sectors-1 512 MiBs",
                "region 0's kind": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "region 1": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "region 1's length": "0 1 2 most half half+1 end sectors sectors-1 512 MiBs",
                "region 1's kind": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "items": "0 1 2 most half half+1 sectors sectors-1",
                "item 0": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "item 0's length": "0 1 2 most half half+1 end MiB MiBs",
                "item 0's value": "0 1 2 most half half+1 end sectors sectors-1 512 MiBs",
                "item 1": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "item 1's length": "0 1 2 most half half+1 end MiB MiBs",
                "item 1's value": "1 2 most half sectors-1",
                "item 2": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "item 2's length": "most half half+1 end MiB MiBs",
                "item 3": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "item 3's length": "0 1 2 most half half+1 end MiB MiBs",
                "item 3's value": "0 1 2 most half half+1 end sectors sectors-1 MiB MiBs",
                "item 4": "0 1 2 most half half+1 end sectors sectors-1 512 MiB MiBs",
                "item 4's length": "most half half+1 end MiB MiBs",
            ]
        ) { bytes in
            // The second header and the second table go, so that the first ones count.
            for place in [128 << 10, 256 << 10] { bytes[place] = 0 }
            for (place, count) in [(64 << 10, 4096), (192 << 10, 64 << 10)] {
                let checksum = CRC32C.checksum(Array(bytes[place..<place + count]), zeroes: 4..<8)
                Field("", place + 4, 4).put(UInt64(checksum), into: &bytes)
            }
        }
    }

    // MARK: - Text

    /// Numbers and names of a VMDK's descriptor at the edges of what they can be.
    @Test func descriptors() throws {
        try directory.write("data", [UInt8](repeating: 7, count: 4096))
        func descriptor(
            _ lines: [String],
            head: String = "version=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\""
        ) -> [UInt8] {
            Array("# Disk DescriptorFile\n\(head)\n\(lines.joined(separator: "\n"))\n".utf8)
        }
        var texts: [(name: String, bytes: [UInt8], words: String)] = [
            ("no extents", descriptor([]), "no extents"),
            ("too many", descriptor([String](repeating: "RW 1 ZERO", count: 513)), "more than 512 extents"),
            ("other version", descriptor(["RW 8 ZERO"], head: "version=4"), "descriptor version 4"),
            ("linked", descriptor(["RW 8 ZERO"], head: "parentCID=00000001"), "a link to"),
            ("huge sum", descriptor([String](repeating: "RW \(UInt64(1) << 42) ZERO", count: 512)), ""),
            ("a name of many bytes", descriptor(["RW 8 FLAT \"\(String(repeating: "n", count: 100_000))\" 0"]), ""),
            ("not text", Array("# Disk DescriptorFile\nRW 8 FLAT \"".utf8) + [0xff, 0xfe] + Array("\" 0\n".utf8), ""),
            ("a name with NUL", Array("# Disk DescriptorFile\nRW 8 FLAT \"a".utf8) + [0] + Array("b\" 0\n".utf8), ""),
            ("itself", descriptor(["RW 8 FLAT \"hostile.vmdk\" 0"]), "twice"),
            (
                "twice the same", descriptor(["RW 4 FLAT \"data\" 0", "RW 4 FLAT \"data\" 0"]),
                "extents of the image overlap"
            ),
            ("too long", descriptor([String](repeating: "#", count: 600_000)), "too long"),
        ]
        for number in [
            "0", "-1", "+8", "9", "0x8", "8.5", "18446744073709551615", "18446744073709551616", "4398046511104",
            "4398046511105", "99999999999999999999999999", "",
        ] {
            texts.append(
                (
                    "sectors \(number)", descriptor(["RW \(number) FLAT \"data\" 0"]),
                    number == "" ? "an invalid size" : ""
                ))
            texts.append(
                (
                    "place \(number)", descriptor(["RW 8 FLAT \"data\" \(number)"]),
                    number == "0" || number == "" ? "-" : ""
                ))
        }
        for line in [
            "RW", "RW 8", "RW 8 FLAT", "RW 8 FLAT data", "RW 8 FLAT \"data", "RW 8 SPARSE \"data\"",
            "RW 8 VMFSRAW \"data\"", "NOACCESS 8 ZERO", "RW 8 FLAT \"\" 0",
        ] {
            texts.append((line, descriptor([line]), ""))
        }
        for (name, bytes, words) in texts {
            let path = try directory.write("hostile.vmdk", bytes)
            for isReadOnly in [true, false] {
                do throws(DiskImageError) {
                    _ = try DiskImage(
                        path: path, options: DiskImageOptions(format: .vmdk, readOnly: isReadOnly, locking: false))
                    // Those that are in order open.
                    #expect(
                        words == "-" || name == "sectors +8" || name == "place +8"
                            || (["huge sum", "twice the same"].contains(name) && isReadOnly), "\(name) opened")
                } catch {
                    #expect(
                        words != "-" && "\(error)".contains(words) && "\(error)".utf8.count < 5000,
                        "\(name): \("\(error)".prefix(300))")
                }
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// The two sizes of a VHD: which one is taken, and that it is said.
@Suite(.timed) struct VHDSizeTests {
    private let directory = TemporaryDirectory(inMemory: true)
    private let reports = Reports()

    /// A geometry for at most so many sectors, as Microsoft's specification has it for small disks.
    private struct Geometry {
        var cylinders: UInt64, heads: UInt64 = 4, sectors: UInt64 = 17
        init(atMost total: UInt64) { cylinders = total / (4 * 17) }
        var size: UInt64 { cylinders * heads * sectors * 512 }
    }

    private func footer(_ maker: String, current: UInt64, _ geometry: Geometry, type: UInt8 = 2) -> [UInt8] {
        var bytes =
            Array("conectix".utf8) + [0, 0, 0, 2, 0, 1, 0, 0] + [UInt8](repeating: 0xff, count: 8) + [0, 0, 0, 0]
            + Array(maker.utf8)
        bytes += [0, 5, 0, 0] + Array("Wi2k".utf8)
        bytes += [UInt8](littleEndian(current).reversed()) + littleEndian(current).reversed()
        bytes += [
            UInt8(geometry.cylinders >> 8), UInt8(geometry.cylinders & 255), UInt8(geometry.heads),
            UInt8(geometry.sectors), 0, 0, 0, type,
        ]
        bytes += [UInt8](repeating: 0, count: 512 - bytes.count)
        sum(&bytes, 0)
        return bytes
    }

    /// Puts the checksum of the footer at `place` right.
    private func sum(_ bytes: inout [UInt8], _ place: Int) {
        bytes.replaceSubrange(place + 64..<place + 68, with: [0, 0, 0, 0])
        bytes.replaceSubrange(
            place + 64..<place + 68,
            with: littleEndian(~bytes[place..<place + 512].reduce(0 as UInt32) { $0 &+ UInt32($1) }).reversed())
    }

    private func open(_ path: String, _ size: VHDSize? = nil) throws -> DiskEngine {
        var options = readOnly
        options.vhdSize = size
        options.notice = { [reports] in reports.add($0) }
        return try DiskEngine(DiskImage(path: path, options: options))
    }

    /// The GPT's second header is in the last sector, which whole cylinders leave out.
    @Test(
        arguments: ["vbox", "tap\0", "d2v ", "CTXS", "win ", "new!", "vpc ", "vs  ", "qemu", "\0\0\0\0"], [512, 511])
    func aFixedDiskThatFillsItsFileLosesNothing(
        maker: String, footerSize: Int
    ) throws {
        let contents = randomBytes(1 << 20 | 7 << 9, seed: 1), geometry = Geometry(atMost: UInt64(contents.count) / 512)
        #expect(geometry.size < contents.count)
        let path = try directory.write(
            "disk.vhd", contents + footer(maker, current: UInt64(contents.count), geometry).prefix(footerSize))
        var engine = try open(path)
        #expect(try isSame(engine.readAll(), contents))
        // Two sizes are there: it is said which was taken, unless the user has.
        #expect(
            reports.all.count == 1
                && reports.all[0].contains("\(geometry.size) by its geometry (chs); current is used"),
            "\(reports.all)")
        var other = try open(path, .chs)
        #expect(try isSame(other.readAll(), Array(contents[..<Int(geometry.size)])))
        #expect(reports.all.count == 1)
    }

    /// What is said names the disk as it can be printed.
    @Test func theNoticeNamesADiskWhoseNameIsNoText() throws {
        let contents = randomBytes(1 << 20 | 7 << 9, seed: 3), geometry = Geometry(atMost: UInt64(contents.count) / 512)
        let written = try directory.write(
            "disk.vhd", contents + footer("vbox", current: UInt64(contents.count), geometry))
        let path = directory.file(String(raw: Array("m".utf8) + [0xe9] + Array(".vhd".utf8)))
        #expect(written.withRawCString { from in path.withRawCString { to in unsafe rename(from, to) } } == 0)
        _ = try open(path)
        let name = "disk \"" + directory.file("m") + "\\xe9.vhd\": "
        #expect(reports.all.count == 1 && reports.all[0].hasPrefix(name), "\(reports.all)")
    }

    /// A fixed disk that ends before its footer, or a dynamic one: by its maker.
    @Test(arguments: [
        ("vpc ", VHDSize.chs), ("vs  ", .chs), ("qemu", .chs), ("win ", .current), ("vbox", .current),
        ("tap\0", .current), ("new!", .current),
    ])
    func otherwiseTheMakerDecides(maker: String, taken: VHDSize) throws {
        let contents = randomBytes(1 << 20 | 7 << 9, seed: 2), geometry = Geometry(atMost: UInt64(contents.count) / 512)
        let padding = [UInt8](repeating: 0, count: 4096)
        let path = try directory.write(
            "disk.vhd", contents + padding + footer(maker, current: UInt64(contents.count), geometry))
        for (stated, size) in [(nil, taken), (.chs, .chs), (.current, .current)] as [(VHDSize?, VHDSize)] {
            var engine = try open(path, stated)
            let sizes = engine.image.vhdSizes
            #expect(sizes == VHDSizes(chs: geometry.size, current: UInt64(contents.count), taken: size))
            #expect(
                try isSame(engine.readAll(), Array(contents[..<(size == .chs ? Int(geometry.size) : contents.count)])))
        }
        #expect(
            reports.all.count == 1
                && reports.all[0].contains("\(taken.rawValue) is used, vhd-size=\(taken == .chs ? "current" : "chs")"),
            "\(reports.all)")
        // A disk that would not be in the file is none.
        let cut = try directory.write(
            "cut.vhd", contents.dropLast(8 << 9) + footer(maker, current: UInt64(contents.count), geometry))
        if taken == .current {
            guard case .truncated = openError(cut, readOnly) else { Issue.record("it is longer than the file"); return }
        }
    }

    /// As QEMU decides, where it knows the maker, and by its own option.
    @Test(arguments: ["vpc ", "qemu", "win ", "qem2", "d2v ", "tap\0", "CTXS"]) func aDynamicDiskIsThatOfQEMU(
        maker: String
    ) throws {
        let path = directory.file("disk.vhd"), current: UInt64 = 9 << 20 | 9 << 9,
            geometry = Geometry(atMost: current / 512)
        qemuImage("create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", path, "\(current)")
        qemuIO(path, ["write -P 5 0 9441280"], format: "vpc")
        var bytes = try directory.bytes("disk.vhd")
        for place in [0, bytes.count - 512] {
            bytes.replaceSubrange(place + 28..<place + 32, with: Array(maker.utf8))
            bytes.replaceSubrange(
                place + 56..<place + 60, with: [UInt8(geometry.cylinders >> 8), UInt8(geometry.cylinders & 255), 4, 17])
            sum(&bytes, place)
        }
        try directory.write("disk.vhd", bytes)
        for (stated, word) in [(nil, nil), (.chs, "chs"), (.current, "current_size")] as [(VHDSize?, String?)] {
            let engine = try open(path, stated), size = engine.image.size
            let image =
                "driver=vpc,file.driver=file,file.filename=\(path)" + (word.map { ",force_size_calc=\($0)" } ?? "")
            let (status, output) = run(["qemu-img", "info", "--output=json", "--image-opts", image])
            #expect(status == 0 && output.contains("\"virtual-size\": \(size),"), "\(size): \(output)")
        }
    }

    /// Of a maker that is not known, whose table is for whole cylinders only.
    @Test func aTableForWholeCylindersIsBelieved() throws {
        let path = directory.file("disk.vhd"), geometry = Geometry(atMost: 16384)
        qemuImage("create", "-q", "-f", "vpc", "-o", "subformat=dynamic,force_size=on", path, "8M")
        var bytes = try directory.bytes("disk.vhd")
        for place in [0, bytes.count - 512] {
            bytes.replaceSubrange(place + 28..<place + 32, with: Array("new!".utf8))
            bytes.replaceSubrange(place + 48..<place + 56, with: littleEndian(UInt64(9 << 20)).reversed())
            bytes.replaceSubrange(
                place + 56..<place + 60, with: [UInt8(geometry.cylinders >> 8), UInt8(geometry.cylinders & 255), 4, 17])
            sum(&bytes, place)
        }
        // QEMU makes a table for a block more than the disk has.
        let header = 512
        bytes.replaceSubrange(header + 28..<header + 32, with: [0, 0, 0, 4])
        bytes.replaceSubrange(header + 36..<header + 40, with: [0, 0, 0, 0])
        bytes.replaceSubrange(
            header + 36..<header + 40,
            with: littleEndian(~bytes[header..<header + 1024].reduce(0 as UInt32) { $0 &+ UInt32($1) }).reversed())
        try directory.write("disk.vhd", bytes)
        let engine = try open(path), sizes = engine.image.vhdSizes
        #expect(sizes?.taken == .chs && sizes?.size == geometry.size)
        guard
            case .invalid = openError(
                path,
                {
                    var options = readOnly; options.vhdSize = .current; return options
                }())
        else { Issue.record("it has no room"); return }
    }

    /// A choice between sizes that no image of the chain has is a mistake; a VHD below makes it none.
    @Test func withoutAVHDTheChoiceIsRefused() throws {
        let contents = randomBytes(1 << 20, seed: 4)
        let disk = try directory.write("disk.raw", contents), overlay = directory.file("overlay.qcow2")
        let vhd = try directory.write(
            "disk.vhd", contents + footer("win ", current: UInt64(contents.count), Geometry(atMost: 1 << 11)))
        var options = readOnly
        options.vhdSize = .chs
        #expect(openError(disk, options) == .vhdSizeUnused(path: disk, .chs))
        qemuImage("create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", overlay)
        #expect(openError(overlay, options) == .vhdSizeUnused(path: overlay, .chs))
        #expect(throws: DiskImageError.vhdSizeUnused(path: overlay, .chs)) {
            try ImageInformation.chain(path: overlay, locking: false, vhdSize: .chs, namedFiles: .anywhere)
        }
        for path in [disk, overlay] {
            #expect(throws: DiskImageError.vhdSizeUnused(path: path, .current)) {
                try ImageInformation(path: path, locking: false, vhdSize: .current)
            }
        }
        var rebase = ImageRebase(path: overlay)
        rebase.options.namedFiles = .anywhere
        rebase.options.vhdSize = .current
        #expect(throws: DiskImageError.vhdSizeUnused(path: overlay, .current)) { try rebase.run() }
        rebase.backing = try BackingReference(name: vhd, stated: .vhd)
        try rebase.run()
        options.namedFiles = .anywhere
        _ = try DiskImage(path: overlay, options: options)
        #expect(
            try ImageInformation.chain(path: overlay, locking: false, vhdSize: .chs, namedFiles: .anywhere).count == 2)
    }

    /// The geometry of all large disks says nothing of their size.
    @Test func theLargestGeometryCounts() throws {
        let contents = randomBytes(1 << 20, seed: 3)
        var last = footer("vpc ", current: UInt64(contents.count), Geometry(atMost: 100))
        last.replaceSubrange(56..<60, with: [0xff, 0xff, 16, 255])
        sum(&last, 0)
        let path = try directory.write("disk.vhd", contents + [UInt8](repeating: 0, count: 512) + last)
        for stated in [nil, .chs, .current] as [VHDSize?] {
            let engine = try open(path, stated), size = engine.image.size
            #expect(size == contents.count)
        }
    }
}

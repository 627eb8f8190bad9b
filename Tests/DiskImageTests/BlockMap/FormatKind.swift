// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Testing

/// One way in which qemu-img makes an image of another format than qcow2.
struct FormatKind: CustomTestStringConvertible, Sendable {
    var format: ImageFormat
    var options = ""
    var size = 5 << 20 | 3 << 9

    var testDescription: String { "\(format.rawValue) \(options) \(size)" }
    /// The image's name; extents get names of their own beside it.
    var fileName: String { "disk.\(format == .vhd ? "vhd" : format.rawValue)" }

    static let readable: [FormatKind] = {
        var kinds = [
            FormatKind(format: .vdi), FormatKind(format: .vdi, options: "static=on"),
            FormatKind(format: .vdi, size: 9 << 20),
            FormatKind(format: .vdi, size: 1 << 20), FormatKind(format: .vdi, size: 512),
            FormatKind(format: .vhd, options: "subformat=dynamic"),
            FormatKind(format: .vhd, options: "subformat=fixed"),
            FormatKind(format: .vhd, options: "subformat=dynamic,force_size=on"),
            FormatKind(format: .vhd, options: "subformat=fixed,force_size=on"),
            FormatKind(format: .vhd, options: "subformat=dynamic,force_size=on", size: 9 << 20),
        ]
        for block in ["", ",block_size=1M", ",block_size=2M", ",block_size=64M", ",block_state_zero=off"] {
            kinds.append(FormatKind(format: .vhdx, options: "subformat=dynamic" + block))
            kinds.append(FormatKind(format: .vhdx, options: "subformat=fixed" + block, size: 20 << 20))
        }
        for type in [
            "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized",
        ] {
            kinds.append(FormatKind(format: .vmdk, options: "subformat=" + type))
            kinds.append(FormatKind(format: .vmdk, options: "subformat=" + type, size: 37 << 20))
        }
        kinds.append(FormatKind(format: .vmdk, options: "subformat=monolithicSparse,zeroed_grain=on"))
        kinds.append(FormatKind(format: .vmdk, options: "subformat=monolithicSparse,compat6=on"))
        return kinds
    }()

    static let writable: [FormatKind] = [
        FormatKind(format: .vdi), FormatKind(format: .vdi, options: "static=on"),
        FormatKind(format: .vdi, size: 1 << 20),
        FormatKind(format: .vmdk, options: "subformat=monolithicSparse"),
        FormatKind(format: .vmdk, options: "subformat=monolithicSparse,zeroed_grain=on", size: 700 << 10),
        FormatKind(format: .vmdk, options: "subformat=monolithicFlat"),
        FormatKind(format: .vmdk, options: "subformat=twoGbMaxExtentSparse"),
        FormatKind(format: .vmdk, options: "subformat=twoGbMaxExtentFlat"),
    ]
}

extension TemporaryDirectory {
    /// What qemu-img makes of an image.
    func contents(_ name: String, _ format: ImageFormat) throws -> [UInt8] {
        qemuImage("convert", "-U", "-f", format.rawValue, "-O", "raw", file(name), file("out.raw"))
        return try bytes("out.raw")
    }

    /// A file's bytes. Tests are built without optimisation, where collections of many of them take long.
    func bytes(_ name: String) throws -> [UInt8] {
        let file = try FileDescriptor.open(file(name), O_RDONLY)
        let size = Int(try file.size())
        return try unsafe [UInt8](unsafeUninitializedCapacity: size) { buffer, count in
            while count < size {
                let got = try unsafe file.read(
                    into: UnsafeMutableRawBufferPointer(start: buffer.baseAddress! + count, count: size - count),
                    at: UInt64(count))
                try #require(got > 0)
                count += got
            }
        }
    }

    /// Makes an image that has these contents.
    @discardableResult
    func make(_ kind: FormatKind, _ contents: [UInt8]) throws -> String {
        let raw = try write("in.raw", contents)
        let path = file(kind.fileName)
        qemuImage(
            "convert", "-f", "raw", "-O", kind.format.rawValue, "-o",
            kind.options.isEmpty ? "size=\(contents.count)" : kind.options, raw, path)
        return path
    }
}

/// Whether two arrays are the same, as fast as that can be said.
func isSame(_ left: [UInt8], _ right: [UInt8]) -> Bool {
    unsafe left.withUnsafeBytes { left in
        unsafe right.withUnsafeBytes { right in
            unsafe left.count == right.count
                && (left.isEmpty || memcmp(left.baseAddress!, right.baseAddress!, left.count) == 0)
        }
    }
}

/// Runs qemu-img check on an image of a format that has one.
func expectSound(
    _ path: String, _ format: ImageFormat, _ comment: String = "", sourceLocation: SourceLocation = #_sourceLocation
) {
    let (status, output) = run(["qemu-img", "check", "-U", "-f", format.rawValue, path])
    // Flat extents have nothing to be checked: 63.
    #expect(
        status == 0 || status == 63, "qemu-img check: \(status) \(output.prefix(1500)) \(comment)",
        sourceLocation: sourceLocation)
}

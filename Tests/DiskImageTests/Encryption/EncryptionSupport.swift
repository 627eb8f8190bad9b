// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import Testing

/// Keys of tests, and encrypted images made by qemu-img and by us.
struct Encrypted {
    let directory: TemporaryDirectory
    /// A key file's path, with a newline at its end that belongs to the key.
    let keyFile: String
    let key: DiskKey
    /// QEMU's options for the images below.
    var below = ""

    static let password = "three can keep a secret\n"

    init(_ directory: TemporaryDirectory, password: String = password, name: String = "key") throws {
        self.directory = directory
        keyFile = try directory.write(name, Array(password.utf8))
        key = try DiskKey(.file(keyFile))
    }

    /// Options for an image with this key.
    func options(readOnly: Bool = false) -> DiskImageOptions {
        var options = DiskImageOptions(readOnly: readOnly, locking: false, allowsDataFile: true)
        options.keys = [key]
        return options
    }

    /// Makes an image; trying a key costs little.
    func create(
        _ name: String, size: Int, _ layout: QCOW2Options = QCOW2Options(), backing: BackingReference? = nil,
        preallocation: Preallocation = .off
    ) throws -> String {
        var creation = ImageCreation(path: directory.file(name), format: .qcow2, size: UInt64(size))
        creation.options = layout
        creation.options.encryption = ImageEncryption(key: key, cost: .iterations(1000))
        creation.backing = backing
        creation.preallocation = preallocation
        try creation.create()
        return directory.file(name)
    }

    private var secret: [String] { ["--object", "secret,id=s,file=\(keyFile)"] }

    /// An image for QEMU's `--image-opts`.
    func image(_ path: String) -> String { "driver=qcow2,file.filename=\(path),encrypt.key-secret=s\(below)" }

    /// Has qemu-img make an image.
    func qemuCreate(
        _ name: String, size: Int, _ options: String, format: String = "luks", backing: [String] = []
    ) throws -> String {
        let path = directory.file(name)
        let time = format == "luks" && !options.contains("iter-time") ? ",encrypt.iter-time=10" : ""
        let words =
            ["qemu-img", "create", "-q"] + secret + [
                "-f", "qcow2", "-o", "encrypt.format=\(format),encrypt.key-secret=s\(time),\(options)",
            ] + backing + [path, "\(size)"]
        let outcome = run(words)
        try #require(outcome.status == 0, "\(words.joined(separator: " ")): \(outcome.output)")
        return path
    }

    /// Runs qemu-img on an image, in place of whose name the words have `IMAGE`.
    @discardableResult
    func qemuImage(_ words: [String], _ path: String, sourceLocation: SourceLocation = #_sourceLocation) -> String {
        let words =
            ["qemu-img", words[0]] + secret + ["--image-opts"] + words[1...].map { $0 == "IMAGE" ? image(path) : $0 }
        let (status, output) = run(words)
        #expect(status == 0, "\(words.joined(separator: " ")): \(output)", sourceLocation: sourceLocation)
        return output
    }

    /// Has QEMU write a disk into an image that is there.
    func qemuWrite(_ contents: [UInt8], _ path: String) throws {
        let raw = try directory.write("qemu.raw", contents)
        let words =
            ["qemu-img", "convert", "-n"] + secret + [
                "--image-opts", "driver=raw,file.filename=\(raw)", "--target-image-opts", image(path),
            ]
        let (status, output) = run(words)
        try #require(status == 0, "\(words.joined(separator: " ")): \(output)")
    }

    /// What QEMU reads.
    func qemuContents(_ path: String, sourceLocation: SourceLocation = #_sourceLocation) throws -> [UInt8] {
        qemuImage(
            ["convert", "-U", "IMAGE", "-O", "raw", directory.file("qemu-out.raw")], path,
            sourceLocation: sourceLocation)
        return try directory.read("qemu-out.raw")
    }

    /// QEMU finds no errors, and no leaks unless they are allowed.
    func expectSound(
        _ path: String, leaksAllowed: Bool = false, _ comment: String = "",
        sourceLocation: SourceLocation = #_sourceLocation
    ) {
        let (status, output) = run(["qemu-img", "check", "-U"] + secret + ["--image-opts", image(path)])
        #expect(
            status == 0 || (leaksAllowed && status == 3), "qemu-img check: \(status) \(output.prefix(1500)) \(comment)",
            sourceLocation: sourceLocation)
    }
}

/// Bytes from hexadecimal digits.
func hexadecimal(_ text: String) -> [UInt8] {
    let digits = Array(text.utf8).map { $0 >= 0x61 ? $0 - 0x61 + 10 : $0 - 0x30 }
    return stride(from: 0, to: digits.count, by: 2).map { digits[$0] << 4 | digits[$0 + 1] }
}

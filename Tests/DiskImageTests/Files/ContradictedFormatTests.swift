// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// A format that is only guessed is held against what the file begins as.
@Suite(.timed) struct ContradictedFormatTests {
    let directory = TemporaryDirectory()

    private static let made: [(format: String, options: [String], signature: ImageSignature)] = [
        ("qcow2", [], .qcow2), ("qcow2", ["-o", "compat=0.10"], .qcow2), ("qcow", [], .qcow), ("qed", [], .qed),
        ("vmdk", [], .vmdk),
        ("vmdk", ["-o", "subformat=monolithicFlat"], .vmdk), ("vmdk", ["-o", "subformat=streamOptimized"], .vmdk),
        ("vhdx", [], .vhdx), ("vdi", [], .vdi),
        ("vpc", [], .vhd), ("vpc", ["-o", "subformat=fixed"], .vhd), ("parallels", [], .parallels),
        ("luks", ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"], .luks),
    ]

    /// A disk of 4 MiB, which has the name of a raw one.
    private func make(_ index: Int) -> String {
        let path = directory.file("disk.img"), (format, options, _) = Self.made[index]
        unlink(path)
        qemuImage(["create", "-q", "-f", format] + options + [path, "4M"])
        return path
    }

    private func contradiction(
        _ sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws(DiskImageError) -> Void
    ) -> ImageSignature? {
        do throws(DiskImageError) {
            try body()
            Issue.record("it was done", sourceLocation: sourceLocation)
        } catch {
            if case .formatContradicted(_, _, let contents, _) = error.cause { return contents }
            Issue.record("\(error)", sourceLocation: sourceLocation)
        }
        return nil
    }

    @Test(arguments: made.indices) func anImageWithTheNameOfARawOne(index: Int) throws {
        let path = make(index), signature = Self.made[index].signature
        let before = try directory.read("disk.img")
        for options in [readOnly, DiskImageOptions()] {
            #expect(
                contradiction { () throws(DiskImageError) in _ = try DiskImage(path: path, options: options) }
                    == signature)
        }
        #expect(contradiction { () throws(DiskImageError) in _ = try ImageInformation(path: path) } == signature)
        #expect(contradiction { () throws(DiskImageError) in _ = try DiskImage.check(path: path) } == signature)
        #expect(
            contradiction { () throws(DiskImageError) in try DiskImage.requireQCOW2(path, format: nil) { _ in "" } }
                == signature)
        #expect(contradiction { () throws(DiskImageError) in _ = try ImageCommit(path: path).run() } == signature)
        #expect(contradiction { () throws(DiskImageError) in try ImageRebase(path: path).run() } == signature)
        #expect(
            contradiction { () throws(DiskImageError) in
                try ImageConversion(source: path, target: directory.file("new.qcow2"), format: .qcow2).run()
            } == signature)
        for isOpened in [true, false] {
            var creation = ImageCreation(path: directory.file("over.qcow2"), format: .qcow2, size: 1 << 20)
            #expect(
                contradiction { () throws(DiskImageError) in
                    creation.backing = try BackingReference(name: "disk.img", stated: nil)
                    creation.opensBacking = isOpened
                    try creation.create()
                } == signature)
        }
        #expect(try directory.read("disk.img") == before)
        // Both words of the user's are taken at their word.
        let raw = try DiskImage(path: path, options: DiskImageOptions(format: .raw, readOnly: true))
        #expect(raw.format == .raw)
        if let format = signature.format {
            let image = try DiskImage(path: path, options: DiskImageOptions(format: format, readOnly: true))
            #expect(image.size == 4 << 20 || format == .vhd)
            let error = try #require(openError(path, readOnly))
            for (syntax, option) in [(OptionSyntax.disk, "format="), (.verb(.init()), "--format ")] {
                let sentence = error.text(syntax)
                #expect(
                    sentence.contains(
                        "specify \(option)\(format.rawValue) if that is correct, \(option)raw if a guest"),
                    "\(sentence)")
            }
        }
    }

    /// A name that says something else says which it is.
    @Test func anImageWithTheNameOfAnother() throws {
        let path = directory.file("disk.vmdk")
        qemuImage("create", "-q", "-f", "qcow2", path, "1M")
        #expect(
            contradiction { () throws(DiskImageError) in _ = try DiskImage(path: path, options: readOnly) } == .qcow2)
        // What a guest writes to the start of a fixed VHD does not make it another.
        let fixed = directory.file("disk.vhd")
        qemuImage("create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", fixed, "1M")
        try FileDescriptor.open(fixed, O_WRONLY).writeAll(try directory.read("disk.vmdk").prefix(512))
        #expect(try DiskImage(path: fixed, options: readOnly).size == 1 << 20)
    }

    /// An overlay of QEMU before 6.1, made without `-F`: it does not say what its backing file is.
    private func overlay(_ base: String, address: Bool = false) throws -> String {
        let path = directory.file("over.qcow2")
        unlink(path)
        qemuImage("create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", "raw", path, "4M")
        var bytes = try directory.read("over.qcow2")
        let type: [UInt8] = [0xe2, 0x79, 0x2a, 0xca]
        let place = try #require((0..<512).first { Array(bytes[$0..<$0 + 4]) == type })
        // An extension that nobody knows.
        bytes[place] = 0x11
        try directory.write("over.qcow2", bytes)
        return path
    }

    @Test func aBackingFileOfWhichNobodySaysWhatItIs() throws {
        qemuImage("create", "-q", "-f", "qcow2", directory.file("base.img"), "4M")
        qemuIO(directory.file("base.img"), ["write -P 7 0 4M"])
        run(["cp", directory.file("base.img"), directory.file("base")])
        run(["cp", directory.file("base.img"), directory.file("base.qcow2")])
        for name in ["base.img", "base"] {
            let path = try overlay(name), before = try directory.read(name)
            #expect(
                contradiction { () throws(DiskImageError) in _ = try DiskImage(path: path, options: readOnly) }
                    == .qcow2)
            #expect(contradiction { () throws(DiskImageError) in _ = try ImageCommit(path: path).run() } == .qcow2)
            #expect(contradiction { () throws(DiskImageError) in _ = try ImageInformation.chain(path: path) } == .qcow2)
            #expect(contradiction { () throws(DiskImageError) in try ImageRebase(path: path).run() } == .qcow2)
            let sentence = "\(try #require(openError(path)))"
            #expect(
                sentence.contains("rebase --unsafe --backing-format qcow2")
                    && sentence.contains("--backing-format raw"), "\(sentence)")
            #expect(try directory.read(name) == before)
            // As the sentence says.
            var rebase = ImageRebase(path: path)
            rebase.isUnsafe = true
            rebase.backing = BackingReference(name: name, format: .qcow2)
            try rebase.run()
            var engine = try DiskEngine(DiskImage(path: path, options: readOnly))
            let contents = try engine.readAll()
            #expect(contents == [UInt8](repeating: 7, count: 4 << 20))
        }
        // The name says what the contents do.
        var engine = try DiskEngine(DiskImage(path: overlay("base.qcow2"), options: readOnly))
        let contents = try engine.readAll()
        #expect(contents == [UInt8](repeating: 7, count: 4 << 20))
        // Nothing speaks against raw.
        for name in ["plain", "plain.img"] {
            try directory.write(name, [UInt8](repeating: 9, count: 4 << 20))
            var engine = try DiskEngine(DiskImage(path: overlay(name), options: readOnly))
            let contents = try engine.readAll()
            #expect(contents == [UInt8](repeating: 9, count: 4 << 20))
        }
    }

    /// The name only is put into an image, of a file that nobody has opened: raw is not stated because of that.
    @Test func aBackingFileThatIsNotThere() throws {
        qemuImage("create", "-q", "-f", "qcow2", directory.file("disk.qcow2"), "1M")
        // A server that nobody asks may export anything.
        for (name, isTaken) in [("none.img", false), ("none.qcow2", true), ("nbd://127.0.0.1:1/export", false)] {
            var rebase = ImageRebase(path: directory.file("disk.qcow2"))
            rebase.isUnsafe = true
            rebase.backing = try BackingReference(name: name, stated: nil)
            var creation = ImageCreation(
                path: directory.file("new-\(name.split(separator: "/").last!).qcow2"), format: .qcow2, size: 1 << 20)
            creation.opensBacking = false
            creation.backing = rebase.backing
            if isTaken {
                try rebase.run()
                try creation.create()
            } else {
                #expect(throws: DiskImageError.self) { try rebase.run() }
                #expect(throws: DiskImageError.self) { try creation.create() }
                creation.backing?.isFormatStated = true
                try creation.create()
            }
        }
    }

    /// A guest can write whatever it likes to its raw disk: that opens nothing to it, whether or not the format is
    /// stated.
    @Test func aHeaderThatAGuestWrote() throws {
        let path = try directory.write("disk.img", [UInt8](repeating: 0, count: 1 << 20))
        try directory.write("secret.raw", [UInt8](repeating: 1, count: 1 << 20))
        qemuImage(
            "create", "-q", "-f", "qcow2", "-b", directory.file("secret.raw"), "-F", "raw", directory.file("evil"), "1M"
        )
        var engine = try DiskEngine(DiskImage(path: path))
        try engine.write(0, Array(try directory.read("evil").prefix(512)))
        try engine.perform(.flush)
        _ = consume engine
        #expect(contradiction { () throws(DiskImageError) in _ = try DiskImage(path: path) } == .qcow2)
        var stated = try DiskEngine(DiskImage(path: path, options: DiskImageOptions(format: .raw)))
        #expect(stated.image.files == [path] && stated.image.size == 1 << 20)
        let contents = try stated.readAll()
        #expect(contents == (try directory.read("disk.img")))
    }

    /// Who is silent from then on does not keep a machine from starting, or from not starting.
    @Test func aServerThatDoesNotAnswer() throws {
        let server = try NBDServer(directory, nbdkit: "--filter=delay", "memory", "1M", "delay-read=3600")
        let error = openError(server.address(), readOnly)
        #expect(error == .remoteUnchecked(path: server.address()))
        _ = try DiskImage(path: server.address(), options: DiskImageOptions(format: .raw, readOnly: true))
    }

    /// A server that shows the bytes of an image, and not its disk.
    @Test func aRemoteDisk() throws {
        qemuImage("create", "-q", "-f", "qcow2", directory.file("disk.qcow2"), "1M")
        let server = try NBDServer(directory, image: directory.file("disk.qcow2"))
        for options in [readOnly, DiskImageOptions()] {
            #expect(
                contradiction { () throws(DiskImageError) in _ = try DiskImage(path: server.address(), options: options)
                } == .qcow2)
        }
        #expect("\(try #require(openError(server.address())))".contains("qemu-nbd -f qcow2"))
        let path = try overlay(server.address())
        #expect(
            contradiction { () throws(DiskImageError) in
                _ = try DiskImage(path: path, options: DiskImageOptions(readOnly: true, namedFiles: .anywhere))
            } == .qcow2)
        _ = try DiskImage(path: server.address(), options: DiskImageOptions(format: .raw, readOnly: true))
        let whole = try NBDServer(
            directory, nbdkit: "--filter=blocksize-policy", "file", directory.file("disk.qcow2"),
            "blocksize-minimum=65536", "blocksize-preferred=65536",
            "blocksize-maximum=131072", "blocksize-error-policy=error", socket: "whole")
        #expect(
            contradiction { () throws(DiskImageError) in _ = try DiskImage(path: whole.address(), options: readOnly) }
                == .qcow2)
        // Nothing speaks against raw.
        try directory.write("plain.raw", randomBytes(100_000, seed: 1))
        let plain = try NBDServer(directory, nbdkit: "file", directory.file("plain.raw"), socket: "plain")
        var engine = try DiskEngine(DiskImage(path: plain.address(), options: readOnly))
        let contents = try engine.readAll()
        #expect(contents.prefix(100_000) == randomBytes(100_000, seed: 1)[...])
    }
}

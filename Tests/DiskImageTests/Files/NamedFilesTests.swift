// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import Glibc
import TestSupport
import Testing

/// Files that images name, which have to be below the image's own directory or another that is allowed, or be named by
/// the user.
@Suite(.timed) struct NamedFilesTests {
    let directory = TemporaryDirectory()

    private func options(below name: String = "bases", cache: CacheMode = .writeback) -> DiskImageOptions {
        var options = DiskImageOptions(readOnly: true, cache: cache)
        options.namedFiles.directories = [directory.file(name)]
        return options
    }

    /// vm/disk.qcow2 over a backing file of that name.
    private func overlay(_ backing: String, format: String = "raw") throws -> String {
        let path = directory.file("vm/disk.qcow2")
        unlink(path)
        var creation = ImageCreation(path: path, format: .qcow2, size: 1 << 20)
        // Those of the backing file are not the question.
        creation.backingOptions.namedFiles = .anywhere
        creation.backing = BackingReference(name: backing, format: try #require(ImageFormat(rawValue: format)))
        try creation.create()
        return path
    }

    private func prepare() throws {
        for name in ["vm", "bases", "bases/deep", "other"] { #expect(mkdir(directory.file(name), 0o755) == 0) }
        for name in ["bases/base.raw", "bases/deep/base.raw", "other/secret.raw", "secret.raw"] {
            try directory.write(name, [UInt8](repeating: 1, count: 1 << 20))
        }
        for (name, target) in [
            ("bases/inside.raw", "deep/base.raw"), ("bases/outside.raw", "../other/secret.raw"),
            ("bases/absolute.raw", directory.file("other/secret.raw")),
            ("bases/way", "../other"), ("link", "bases"),
        ] { #expect(symlink(target, directory.file(name)) == 0) }
    }

    @Test(arguments: CacheMode.allCases) func theyAreBelowIt(cache: CacheMode) throws {
        try prepare()
        for name in [
            "../bases/base.raw", "../bases/deep/base.raw", "../bases/deep/../base.raw", "../bases/inside.raw",
            "../link/base.raw", directory.file("bases/base.raw"), "file:\(directory.file("bases/base.raw"))",
        ] {
            var engine = try DiskEngine(DiskImage(path: overlay(name), options: options(cache: cache)))
            let contents = try engine.readAll()
            #expect(contents == [UInt8](repeating: 1, count: 1 << 20), "\(name)")
        }
        // The root of all has all, and the directory may be named by a link.
        for top in ["/", directory.file("link")] {
            var options = options()
            options.namedFiles.directories = [top]
            _ = try DiskImage(path: overlay("../bases/base.raw"), options: options)
        }
    }

    @Test func othersAreRefused() throws {
        try prepare()
        for name in [
            "../secret.raw", "../other/secret.raw", "../bases/../secret.raw", "../bases/outside.raw",
            "../bases/absolute.raw", "../bases/way/secret.raw", directory.file("secret.raw"),
        ] {
            let path = try overlay(name)
            let error = try #require(openError(path, options()))
            guard case .outside = error.cause else {
                Issue.record("\(name): \(error)")
                continue
            }
            #expect("\(error)".contains("neither below that image's directory nor named on the command line"))
            // With that directory, too, or without the rule, it is taken; and so it is when the user names the same
            // file.
            for allowed in [
                NamedFiles(directories: [directory.file("bases"), directory.path]), .anywhere,
                NamedFiles(stated: [
                    directory.file("none"), directory.file("secret.raw"), directory.file("link/../other/secret.raw"),
                ]),
            ] {
                _ = try DiskImage(path: path, options: DiskImageOptions(readOnly: true, namedFiles: allowed))
            }
        }
        // A name that only begins like the directory's.
        #expect(mkdir(directory.file("bases2"), 0o755) == 0)
        try directory.write("bases2/base.raw", [0])
        guard case .outside = try #require(openError(overlay("../bases2/base.raw"), options())).cause else {
            Issue.record("bases2 is taken"); return
        }
        // What is not there is said to be missing, and so is a directory that is not there.
        try directory.write("bases/none.raw", [0])
        let missing = try overlay("../bases/none.raw")
        unlink(directory.file("bases/none.raw"))
        guard case .system = try #require(openError(missing, options())).cause else { Issue.record("none.raw"); return }
        guard case .system = try #require(openError(overlay("../bases/base.raw"), options(below: "none"))).cause else {
            Issue.record("no directory"); return
        }
    }

    /// Names are bytes to the kernel: what Unicode takes for the same, or for one character with the slash before it,
    /// are others.
    @Test func namesAreBytes() throws {
        try prepare()
        for name in ["b\u{e4}se\u{fc}", "ba\u{308}seu\u{308}"] {
            #expect(mkdir(directory.file(name), 0o755) == 0)
            try directory.write("\(name)/base.raw", [UInt8](repeating: 1, count: 1 << 20))
            try directory.write("\(name)/\u{301}base.raw", [UInt8](repeating: 1, count: 1 << 20))
        }
        for file in ["base.raw", "\u{301}base.raw"] {
            let path = try overlay("../b\u{e4}se\u{fc}/\(file)")
            var engine = try DiskEngine(DiskImage(path: path, options: options(below: "b\u{e4}se\u{fc}")))
            let contents = try engine.readAll()
            #expect(contents == [UInt8](repeating: 1, count: 1 << 20))
            guard case .outside = try #require(openError(path, options(below: "ba\u{308}seu\u{308}"))).cause else {
                Issue.record("\(file) of the other"); return
            }
        }
        for name in ["../\u{301}secret", "a/../\u{301}secret", "/\u{301}etc"] {
            #expect(throws: DiskImageError.extentName(path: "disk.vmdk", name: name)) {
                try VMDKDescriptor.path(name, of: "disk.vmdk")
            }
        }
        let file = "\u{301}disk.vmdk"
        #expect(try VMDKDescriptor.path("data", of: "deep/\(file)").utf8.elementsEqual("deep/data".utf8))
        #expect(try backingPath("base.raw", of: "deep/\(file)").utf8.elementsEqual("deep/base.raw".utf8))
        #expect(try backingPath("/\u{301}base.raw", of: "deep/disk.qcow2").utf8.elementsEqual("/\u{301}base.raw".utf8))
    }

    /// What a file that may be there names in its turn is held to the same rule, and so is all that any image names.
    @Test func namesOfNames() throws {
        try prepare()
        qemuImage(
            "create", "-q", "-f", "qcow2", "-b", "../secret.raw", "-F", "raw", directory.file("bases/middle.qcow2"))
        guard
            case .outside = try #require(openError(overlay("../bases/middle.qcow2", format: "qcow2"), options())).cause
        else { Issue.record("middle.qcow2"); return }
        // Data files: of a backing file, and of the image itself where names are followed at all; the one that the user
        // names is anywhere.
        qemuImage(
            "create", "-q", "-f", "qcow2", "-o", "data_file=\(directory.file("other/data"))",
            directory.file("bases/outer.qcow2"), "1M")
        guard case .outside = try #require(openError(overlay("../bases/outer.qcow2", format: "qcow2"), options())).cause
        else { Issue.record("outer.qcow2"); return }
        let path = directory.file("bases/outer.qcow2")
        var allowing = options()
        allowing.allowsDataFile = true
        guard case .outside = try #require(openError(path, allowing)).cause else {
            Issue.record("the data file"); return
        }
        var stated = options()
        stated.dataFile = directory.file("other/data")
        _ = try DiskImage(path: path, options: stated)
        // Extents, which are beside their descriptor, or are links to somewhere else.
        qemuImage("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", directory.file("vm/disk.vmdk"), "1M")
        _ = try DiskImage(path: directory.file("vm/disk.vmdk"), options: readOnly)
        unlink(directory.file("vm/disk-flat.vmdk"))
        #expect(symlink("../secret.raw", directory.file("vm/disk-flat.vmdk")) == 0)
        guard case .outside = try #require(openError(directory.file("vm/disk.vmdk"), readOnly)).cause else {
            Issue.record("the extent"); return
        }
        _ = try DiskImage(
            path: directory.file("vm/disk.vmdk"), options: DiskImageOptions(readOnly: true, namedFiles: .anywhere))
        // A remote disk is nowhere below a directory; nobody is asked.
        let remote = try overlay("../bases/base.raw")
        var rebase = ImageRebase(path: remote)
        rebase.isUnsafe = true
        rebase.backing = BackingReference(name: "nbd://127.0.0.1:1/none", format: .raw)
        try rebase.run()
        var named = options()
        named.namedFiles.directories = ["/"]
        named.namedFiles.stated = ["nbd://127.0.0.1:2/none", "nbd://127.0.0.1/none"]
        guard case .addressNotStated = try #require(openError(remote, named)).cause else {
            Issue.record("a remote disk"); return
        }
        // The same place, however long one waits for it: now it is asked, and is not there.
        for allowed in [NamedFiles.anywhere, NamedFiles(stated: ["nbd://127.0.0.1:1/none?reconnect=1"])] {
            guard
                case .remote = try #require(openError(remote, DiskImageOptions(readOnly: true, namedFiles: allowed)))
                    .cause
            else {
                Issue.record("a remote disk that is named")
                return
            }
        }
    }

    /// An image that nobody has vouched for shows what is beside it, and no other file of the host.
    @Test func anImageNamesFilesOfItsOwnDirectory() throws {
        try prepare()
        #expect(mkdir(directory.file("vm/deep"), 0o755) == 0)
        for name in ["vm/base.raw", "vm/deep/base.raw"] {
            try directory.write(name, [UInt8](repeating: 1, count: 1 << 20))
        }
        #expect(
            symlink("base.raw", directory.file("vm/inside.raw")) == 0
                && symlink("../secret.raw", directory.file("vm/outside.raw")) == 0)
        for name in [
            "base.raw", "deep/base.raw", "deep/../base.raw", "../vm/base.raw", "inside.raw",
            directory.file("vm/base.raw"),
        ] {
            _ = try DiskImage(path: overlay(name), options: readOnly)
        }
        for name in [
            "../secret.raw", "deep/../../secret.raw", "outside.raw", directory.file("secret.raw"), "/etc/passwd",
        ] {
            let path = try overlay(name)
            guard case .outside = try #require(openError(path, readOnly)).cause else {
                Issue.record("\(name)")
                continue
            }
            // Nor does a verb: a commit would write there.
            let before = try directory.read("secret.raw")
            expectOutside("commit \(name)") { () throws(DiskImageError) in _ = try ImageCommit(path: path).run() }
            expectOutside("rebase \(name)") { () throws(DiskImageError) in try ImageRebase(path: path).run() }
            expectOutside("info \(name)") { () throws(DiskImageError) in _ = try ImageInformation.chain(path: path) }
            expectOutside("convert \(name)") { () throws(DiskImageError) in
                try ImageConversion(source: path, target: directory.file("new.raw"), format: .raw).run()
            }
            #expect(try directory.read("secret.raw") == before)
            // A name only is changed without a look at the old one.
            var rebase = ImageRebase(path: path)
            rebase.isUnsafe = true
            try rebase.run()
        }
        // An image's directory is where its name is, and where the file is that a link of that name leads to.
        let path = try overlay(directory.file("vm/base.raw"))
        #expect(symlink(path, directory.file("other/disk.qcow2")) == 0)
        _ = try DiskImage(path: directory.file("other/disk.qcow2"), options: readOnly)
        // What is allowed because of its own directory names files below its own directory.
        qemuImage(
            "create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", directory.file("vm/deep/middle.qcow2"))
        guard case .outside = try #require(openError(overlay("deep/middle.qcow2", format: "qcow2"), readOnly)).cause
        else { Issue.record("middle"); return }
    }

    private func expectOutside(_ what: String, _ body: () throws(DiskImageError) -> Void) {
        do throws(DiskImageError) {
            try body()
            Issue.record("\(what) is done")
        } catch {
            guard case .outside = error.cause else { return _ = Issue.record("\(what): \(error)") }
        }
    }
}

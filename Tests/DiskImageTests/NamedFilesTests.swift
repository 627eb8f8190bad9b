@testable import DiskImage
import Glibc
import Testing

/// Files that images name, which have to be below a directory.
@Suite struct NamedFilesTests {
    let directory = TemporaryDirectory()

    private func options(below name: String = "bases", cache: CacheMode = .writeback) -> DiskImageOptions {
        var options = DiskImageOptions(readOnly: true, cache: cache)
        options.namedFilesDirectory = directory.file(name)
        return options
    }

    /// vm/disk.qcow2 over a backing file of that name.
    private func overlay(_ backing: String, format: String = "raw") throws -> String {
        let path = directory.file("vm/disk.qcow2")
        unlink(path)
        var creation = ImageCreation(path: path, format: .qcow2, size: 1 << 20)
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
            ("bases/inside.raw", "deep/base.raw"), ("bases/outside.raw", "../other/secret.raw"), ("bases/absolute.raw", directory.file("other/secret.raw")),
            ("bases/way", "../other"), ("link", "bases"),
        ] { #expect(symlink(target, directory.file(name)) == 0) }
    }

    @Test(arguments: CacheMode.allCases) func theyAreBelowIt(cache: CacheMode) throws {
        try prepare()
        for name in ["../bases/base.raw", "../bases/deep/base.raw", "../bases/deep/../base.raw", "../bases/inside.raw", "../link/base.raw", directory.file("bases/base.raw"), "file:\(directory.file("bases/base.raw"))"] {
            var engine = try DiskEngine(DiskImage(path: overlay(name), options: options(cache: cache)))
            let contents = try engine.readAll()
            #expect(contents == [UInt8](repeating: 1, count: 1 << 20), "\(name)")
        }
        // The root of all has all, and the directory may be named by a link.
        for top in ["/", directory.file("link")] {
            var options = options()
            options.namedFilesDirectory = top
            _ = try DiskImage(path: overlay("../bases/base.raw"), options: options)
        }
    }

    @Test func othersAreRefused() throws {
        try prepare()
        for name in ["../secret.raw", "../other/secret.raw", "../bases/../secret.raw", "../bases/outside.raw", "../bases/absolute.raw", "../bases/way/secret.raw", directory.file("secret.raw")] {
            let path = try overlay(name)
            let error = try #require(openError(path, options()))
            guard case .outside(_, directory.file("bases")) = error.cause else {
                Issue.record("\(name): \(error)")
                continue
            }
            #expect("\(error)".contains("is not below"))
            // Without that rule it is taken.
            _ = try DiskImage(path: path, options: readOnly)
        }
        // A name that only begins like the directory's.
        #expect(mkdir(directory.file("bases2"), 0o755) == 0)
        try directory.write("bases2/base.raw", [0])
        guard case .outside = try #require(openError(overlay("../bases2/base.raw"), options())).cause else { Issue.record("bases2 is taken"); return }
        // What is not there is said to be missing, and so is a directory that is not there.
        try directory.write("bases/none.raw", [0])
        let missing = try overlay("../bases/none.raw")
        unlink(directory.file("bases/none.raw"))
        guard case .system = try #require(openError(missing, options())).cause else { Issue.record("none.raw"); return }
        guard case .system = try #require(openError(overlay("../bases/base.raw"), options(below: "none"))).cause else { Issue.record("no directory"); return }
    }

    /// Names are bytes to the kernel: what Unicode takes for the same, or for one character with the slash before it, are others.
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
            guard case .outside = try #require(openError(path, options(below: "ba\u{308}seu\u{308}"))).cause else { Issue.record("\(file) of the other"); return }
        }
        for name in ["../\u{301}secret", "a/../\u{301}secret", "/\u{301}etc"] {
            #expect(throws: DiskImageError.extentName(path: "disk.vmdk", name: name)) { try VMDKDescriptor.path(name, of: "disk.vmdk") }
        }
        let file = "\u{301}disk.vmdk"
        #expect(try VMDKDescriptor.path("data", of: "deep/\(file)").utf8.elementsEqual("deep/data".utf8))
        #expect(try backingPath("base.raw", of: "deep/\(file)").utf8.elementsEqual("deep/base.raw".utf8))
        #expect(try backingPath("/\u{301}base.raw", of: "deep/disk.qcow2").utf8.elementsEqual("/\u{301}base.raw".utf8))
    }

    /// What a file that may be there names in its turn is held to the same rule, and so is all that any image names.
    @Test func namesOfNames() throws {
        try prepare()
        qemuImage("create", "-q", "-f", "qcow2", "-b", "../secret.raw", "-F", "raw", directory.file("bases/middle.qcow2"))
        guard case .outside = try #require(openError(overlay("../bases/middle.qcow2", format: "qcow2"), options())).cause else { Issue.record("middle.qcow2"); return }
        // Data files: of a backing file, and of the image itself where names are followed at all; the one that the user names is anywhere.
        qemuImage("create", "-q", "-f", "qcow2", "-o", "data_file=\(directory.file("other/data"))", directory.file("bases/outer.qcow2"), "1M")
        guard case .outside = try #require(openError(overlay("../bases/outer.qcow2", format: "qcow2"), options())).cause else { Issue.record("outer.qcow2"); return }
        let path = directory.file("bases/outer.qcow2")
        var allowing = options()
        allowing.allowsDataFile = true
        guard case .outside = try #require(openError(path, allowing)).cause else { Issue.record("the data file"); return }
        var stated = options()
        stated.dataFile = directory.file("other/data")
        _ = try DiskImage(path: path, options: stated)
        // Extents, which are beside their descriptor.
        qemuImage("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", directory.file("vm/disk.vmdk"), "1M")
        guard case .outside = try #require(openError(directory.file("vm/disk.vmdk"), options())).cause else { Issue.record("the extent"); return }
        _ = try DiskImage(path: directory.file("vm/disk.vmdk"), options: options(below: "vm"))
        // A remote disk is nowhere below a directory; nobody is asked.
        let remote = try overlay("../bases/base.raw")
        var rebase = ImageRebase(path: remote)
        rebase.isUnsafe = true
        rebase.backing = BackingReference(name: "nbd://127.0.0.1:1/none", format: .raw)
        try rebase.run()
        guard case .outside = try #require(openError(remote, options())).cause else { Issue.record("a remote disk"); return }
    }
}

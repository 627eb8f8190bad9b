import ArgumentParser
import DiskImage
import Glibc
@testable import swkvm
import Testing

/// `swkvm image check`, `snapshot` and `resize`: what they take, and how they end.
@Suite struct ImageMaintenanceTests {
    private func parse<Verb>(_ verb: Verb.Type, _ arguments: String...) throws -> Verb {
        try #require(try Command.parseAsRoot(["image"] + arguments) as? Verb)
    }

    @Test func checks() throws {
        let plain = try parse(ImageCheckCommand.self, "check", "a.qcow2")
        #expect(plain.file == "a.qcow2" && plain.repair == nil && !plain.json && plain.format == nil)
        let all = try parse(ImageCheckCommand.self, "check", "--repair", "all", "--json", "--format", "qcow2", "a")
        #expect(all.repair == .all && all.json && all.format == .qcow2)
        #expect(try parse(ImageCheckCommand.self, "check", "-r", "leaks", "a.qcow2").repair == .leaks)
        #expect(try parse(ImageCheckCommand.self, "check", "--data-file", "d", "a.qcow2").data.dataFile == "d")
    }

    @Test func snapshots() throws {
        #expect(try parse(ImageSnapshotCommand.List.self, "snapshot", "list", "a.qcow2").image.file == "a.qcow2")
        let stated = try parse(ImageSnapshotCommand.List.self, "snapshot", "list", "--format", "qcow2", "--data-file", "a.data", "a").image
        #expect(stated.file == "a" && stated.format == .qcow2 && stated.data.dataFile == "a.data")
        #expect(try parse(ImageSnapshotCommand.Create.self, "snapshot", "create", "a.qcow2", "before").name == "before")
        #expect(try parse(ImageSnapshotCommand.Apply.self, "snapshot", "apply", "a.qcow2", "1").name == "1")
        #expect(try parse(ImageSnapshotCommand.Delete.self, "snapshot", "delete", "a.qcow2", "1").name == "1")
    }

    @Test(arguments: [
        ("20G", 1 << 30, 20 << 30 as UInt64?), ("+1G", 1 << 30, 2 << 30), ("512M", 1 << 30, 512 << 20), ("+0", 5, 5), ("-1M", 1 << 20, 0), ("-2M", 1 << 20, nil),
        ("+16777215T", 1 << 62, nil),
    ] as [(String, UInt64, UInt64?)])
    func sizes(argument: String, old: UInt64, new: UInt64?) throws {
        #expect(try #require(SizeChange(argument: argument)).applied(to: old) == new)
    }

    @Test func resizes() throws {
        let command = try parse(ImageResizeCommand.self, "resize", "--shrink", "--preallocation", "falloc", "a.qcow2", "--", "-1G")
        #expect(command.shrink && command.preallocation == .falloc && command.size.sign == .minus && command.size.amount.bytes == 1 << 30)
    }

    @Test(arguments: [
        ["check"], ["check", "-r", "some", "a.qcow2"], ["snapshot", "list"], ["snapshot", "create", "a.qcow2"], ["resize", "a.qcow2"], ["resize", "a.qcow2", "big"],
        ["resize", "a.qcow2", "+-1"], ["resize", "--preallocation", "some", "a.qcow2", "1G"],
    ])
    func mistakes(arguments: [String]) {
        let error = #expect(throws: (any Error).self) { try Command.parseAsRoot(["image"] + arguments) }
        #expect(error.map { Command.exitCode(for: $0) } == .validationFailure)
    }

    /// The statuses of qemu-img check.
    @Test func statuses() throws {
        var raw = try Command.parseAsRoot(["image", "check", "--format", "raw", "/dev/null"])
        #expect(throws: ExitCode(63)) { try raw.run() }
        var missing = try Command.parseAsRoot(["image", "check", "/nowhere/a.qcow2"])
        #expect(throws: ExitCode(1)) { try missing.run() }
        var resize = try Command.parseAsRoot(["image", "resize", "/nowhere/a.qcow2", "1G"])
        #expect(throws: ExitCode(1)) { try resize.run() }
    }

    /// Other formats than those that a verb can make or change.
    @Test(arguments: [
        ["create", "--format", "vdi", "/nowhere/a", "1M"], ["create", "/nowhere/a.vmdk", "1M"], ["convert", "-O", "vpc", "/dev/null", "/nowhere/a"],
        ["snapshot", "create", "/nowhere/a.vhdx", "b"], ["rebase", "--no-backing", "/nowhere/a.vdi"], ["commit", "/nowhere/a.vmdk"],
    ])
    func otherFormats(arguments: [String]) throws {
        var command = try Command.parseAsRoot(["image"] + arguments)
        #expect(throws: ExitCode(1)) { try command.run() }
    }

    @Test func disksTakeSnapshotsAndDataFiles() throws {
        let disk = try DiskArgument(parsing: "d.qcow2,ro,snapshot=before,data-file=/a/data.raw").disk
        #expect(disk.options.snapshot == "before" && disk.options.dataFile == "/a/data.raw" && !disk.options.allowsDataFile)
        for argument in ["d.qcow2,snapshot=", "d.qcow2,data-file=", "d.qcow2,snapshot", "d.qcow2,data-file"] {
            #expect(throws: ArgumentProblem.self) { try DiskArgument(parsing: argument) }
        }
    }

    /// Where a disk's keys come from, in the order in which they are named. A file's name may have commas, doubled.
    @Test func disksTakeKeys() throws {
        #expect(try DiskArgument(parsing: "d.qcow2").disk.keys.isEmpty)
        #expect(try DiskArgument(parsing: "d.qcow2,key-file=/a/key").disk.keys == [.file("/a/key")])
        #expect(try DiskArgument(parsing: "d.qcow2,key-fd=0,ro").disk.keys == [.descriptor(0)])
        let several = try DiskArgument(parsing: "d.qcow2,key-fd=5,ro,key-file=a=b,,c,key-fd=2147483647").disk
        #expect(several.keys == [.descriptor(5), .file("a=b,c"), .descriptor(.max)] && several.options.readOnly)
        for (argument, says) in [
            ("d.qcow2,key-file=", "key-file= needs a path"), ("d.qcow2,key-file", "'key-file' is not known"), ("d.qcow2,key-fd=", "key-fd= is no descriptor's number"),
            ("d.qcow2,key-fd=-1", "key-fd=-1 is no descriptor's number"), ("d.qcow2,key-fd=2147483648", "is no descriptor's number"), ("d.qcow2,key-fd=a", "key-fd=a is no"),
            ("d.qcow2,key-fd", "'key-fd' is not known"), ("d.qcow2,key=a", "'key=a' is not known"),
        ] {
            let problem = #expect(throws: ArgumentProblem.self) { try DiskArgument(parsing: argument) }
            #expect(problem.map { "\($0)".contains("disk d.qcow2: ") && "\($0)".contains(says) } == true, "\(argument): \(String(describing: problem))")
        }
    }

    /// The kinds of images that are made, what a new one stands on, and a source's data.
    @Test func makes() throws {
        let converted = try parse(ImageConvertCommand.self, "convert", "--subformat", "streamOptimized", "-B", "b.img", "-F", "raw", "--data-file", "d", "a.qcow2", "c.vmdk")
        #expect(converted.layout.subformat == .streamOptimized && converted.backing == "b.img" && converted.backingFormat == .raw && converted.data.dataFile == "d")
        #expect(try parse(ImageCreateCommand.self, "create", "--subformat", "static", "a.vdi", "1G").layout.subformat == .fixed)
        #expect(throws: (any Error).self) { try parse(ImageCreateCommand.self, "create", "--subformat", "fixed", "a.vdi", "1G") }
        #expect(try parse(ImageResizeCommand.self, "resize", "--data-file", "d", "a.qcow2", "1G").data.dataFile == "d")
    }

    /// The verbs that look at an image whose data is elsewhere.
    @Test func dataFiles() throws {
        #expect(try parse(ImageMapCommand.self, "map", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        #expect(try parse(ImageInfoCommand.self, "info", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        #expect(try parse(ImageBenchCommand.self, "bench", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        let comparison = try parse(ImageCompareCommand.self, "compare", "--data-file", "d", "--second-data-file", "e", "a.qcow2", "b.qcow2")
        #expect(comparison.data.dataFile == "d" && comparison.secondDataFile == "e")
    }
}

// SPDX-License-Identifier: Apache-2.0

import ArgumentParser
import DiskImage
import Glibc
@testable import swkvm
import TestSupport
import Testing

/// `swkvm image check`, `snapshot` and `resize`: what they take, and how they end.
@Suite(.timed) struct ImageMaintenanceTests {
    private func parse<Verb>(_ verb: Verb.Type, _ arguments: String...) throws -> Verb { try parse(verb, arguments) }

    private func parse<Verb>(_ verb: Verb.Type, _ arguments: [String]) throws -> Verb {
        try #require(try Command.parseAsRoot(["image"] + arguments) as? Verb)
    }

    @Test func checks() throws {
        let plain = try parse(ImageCheckCommand.self, "check", "a.qcow2")
        #expect(plain.file == "a.qcow2" && plain.repair == nil && !plain.output.isJSON && plain.format == nil)
        let all = try parse(ImageCheckCommand.self, "check", "--repair", "all", "--json", "--format", "qcow2", "a")
        #expect(all.repair == .all && all.output.isJSON && all.format == .qcow2)
        #expect(try parse(ImageCheckCommand.self, "check", "-r", "leaks", "a.qcow2").repair == .leaks)
        #expect(try parse(ImageCheckCommand.self, "check", "--data-file", "d", "a.qcow2").data.dataFile == "d")
    }

    @Test func snapshots() throws {
        #expect(try parse(ImageSnapshotCommand.List.self, "snapshot", "list", "a.qcow2").image.file == "a.qcow2")
        let stated = try parse(
            ImageSnapshotCommand.List.self, "snapshot", "list", "--format", "qcow2", "--data-file", "a.data", "a"
        ).image
        #expect(stated.file == "a" && stated.format == .qcow2 && stated.data.dataFile == "a.data")
        #expect(try parse(ImageSnapshotCommand.Create.self, "snapshot", "create", "a.qcow2", "before").name == "before")
        #expect(try parse(ImageSnapshotCommand.Apply.self, "snapshot", "apply", "a.qcow2", "1").name == "1")
        #expect(try parse(ImageSnapshotCommand.Delete.self, "snapshot", "delete", "a.qcow2", "1").name == "1")
    }

    /// The size of a VHD is the user's to say wherever one is opened.
    @Test func theSizeOfAVHD() throws {
        #expect(try parse(ImageInfoCommand.self, "info", "--vhd-size", "chs", "a.vhd").vhd.vhdSize == .chs)
        #expect(try parse(ImageMapCommand.self, "map", "--vhd-size=current", "a.vhd").vhd.vhdSize == .current)
        #expect(
            try parse(ImageConvertCommand.self, "convert", "--vhd-size", "current", "a.vhd", "b.raw").vhd.vhdSize
                == .current)
        #expect(try parse(ImageBenchCommand.self, "bench", "--vhd-size", "chs", "a.vhd").vhd.vhdSize == .chs)
        #expect(
            try parse(ImageCreateCommand.self, "create", "--vhd-size", "chs", "--backing", "a.vhd", "b.qcow2").vhd
                .vhdSize == .chs)
        #expect(
            try parse(ImageRebaseCommand.self, "rebase", "--vhd-size", "chs", "--backing", "a.vhd", "b.qcow2").vhd
                .vhdSize == .chs)
        #expect(try parse(ImageResizeCommand.self, "resize", "--vhd-size", "chs", "b.qcow2", "+1G").vhd.vhdSize == .chs)
        let compare = try parse(ImageCompareCommand.self, "compare", "--second-vhd-size", "chs", "a.vhd", "b.vhd")
        #expect(compare.vhd.vhdSize == nil && compare.secondVhdSize == .chs)
        #expect(throws: (any Error).self) { try parse(ImageInfoCommand.self, "info", "--vhd-size", "bytes", "a.vhd") }
        #expect(try DiskArgument(parsing: "a.vhd,ro,vhd-size=chs").disk.options.vhdSize == .chs)
        #expect(try DiskArgument(parsing: "a.vhd,ro").disk.options.vhdSize == nil)
        #expect(throws: ArgumentProblem.self) { try DiskArgument(parsing: "a.vhd,vhd-size=bytes") }
    }

    @Test(
        arguments: [
            ("20G", 1 << 30, 20 << 30 as UInt64?), ("+1G", 1 << 30, 2 << 30), ("512M", 1 << 30, 512 << 20),
            ("+0", 5, 5), ("-1M", 1 << 20, 0), ("-2M", 1 << 20, nil),
            ("+16777215T", 1 << 62, nil),
        ] as [(String, UInt64, UInt64?)])
    func sizes(argument: String, old: UInt64, new: UInt64?) throws {
        #expect(try SizeChange(parsing: argument).applied(to: old) == new)
    }

    /// What a user of qemu-img types.
    @Test func theWordsOfQEMU() throws {
        let check = try parse(ImageCheckCommand.self, "check", "-q", "-f", "qcow2", "-r", "all", "--output=json", "a")
        #expect(check.quiet && check.format == .qcow2 && check.output.isJSON && check.repair == .all)
        #expect(try !parse(ImageInfoCommand.self, "info", "--output", "human", "a.raw").output.isJSON)
        #expect(try parse(ImageMapCommand.self, "map", "--output=json", "-f", "raw", "a").output.isJSON)
        #expect(try parse(ImageSnapshotCommand.ByOption.self, "snapshot", "-l", "a.qcow2").lists)
        #expect(try parse(ImageSnapshotCommand.ByOption.self, "snapshot", "-U", "-l", "a.qcow2").sharing.forceShare)
        #expect(
            try parse(ImageSnapshotCommand.List.self, "snapshot", "list", "--force-share", "a.qcow2").sharing.forceShare
        )
        #expect(
            try parse(ImageSnapshotCommand.ByOption.self, "snapshot", "-q", "-c", "name", "a.qcow2").created == "name")
        #expect(try parse(ImageCommitCommand.self, "commit", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        #expect(
            try parse(ImageRebaseCommand.self, "rebase", "--data-file", "d", "-b", "", "a.qcow2").data.dataFile == "d")
        #expect(try parse(ImageSnapshotCommand.ByOption.self, "snapshot", "-a", "name", "a.qcow2").applied == "name")
        #expect(try parse(ImageSnapshotCommand.ByOption.self, "snapshot", "-d", "name", "a.qcow2").deleted == "name")
        #expect(
            try parse(ImageConvertCommand.self, "convert", "-l", "one", "-f", "qcow2", "-O", "raw", "a", "b").snapshot
                == "one")
        #expect(try parse(ImageRebaseCommand.self, "rebase", "-b", "", "a.qcow2").backing == "")
        let create = try parse(
            ImageCreateCommand.self, "create", "-f", "qcow2", "-o", "cluster_size=1M,lazy_refcounts=on", "-o",
            "compat=v3,refcount_bits=8,preallocation=metadata", "a", "1.5T")
        let options = create.layout.options
        #expect(
            options.clusterSize == 1 << 20 && options.lazyRefcounts && options.refcountBits == 8 && !options.extendedL2)
        #expect(create.layout.preallocation == .metadata && create.size?.bytes == 3 << 39)
        let vmdk = try parse(
            ImageConvertCommand.self, "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "a.raw", "b")
        #expect(vmdk.layout.subformat == .streamOptimized)
    }

    @Test(
        arguments: [
            ("1.5G", 3 << 29 as UInt64?), ("0.25k", 256), ("7E", 7 << 60), ("1.000001m", 1_048_577), ("2P", 2 << 50),
            ("16E", nil), ("1.5", nil), ("1.G", nil), (".5G", nil),
            ("15.9999999E", nil), ("1.2.3G", nil), ("15.5E", 31 << 59),
        ] as [(String, UInt64?)])
    func sizesOfDisks(argument: String, bytes: UInt64?) {
        #expect(ByteSize(argument: argument)?.bytes == bytes)
    }

    @Test(arguments: [["-1G"], ["--", "-1G"]]) func aSizeThatIsTakenAwayIsNoOption(size: [String]) throws {
        let command = try parse(ImageResizeCommand.self, ["resize", "--shrink", "a.qcow2"] + size)
        let change = try command.size()
        #expect(command.shrink && command.file == "a.qcow2" && change.sign == .minus && change.amount.bytes == 1 << 30)
    }

    @Test func resizes() throws {
        let command = try parse(ImageResizeCommand.self, "resize", "--preallocation", "falloc", "a.qcow2", "20G")
        #expect(!command.shrink && command.preallocation == .falloc)
        #expect(try command.size() == SizeChange(parsing: "20G"))
    }

    @Test(arguments: [
        ["check"], ["check", "-r", "some", "a.qcow2"], ["snapshot", "list"], ["snapshot", "create", "a.qcow2"],
        ["resize", "a.qcow2"], ["resize", "a.qcow2", "big"],
        ["resize", "a.qcow2", "+-1"], ["resize", "a.qcow2", "--frob"], ["resize", "a.qcow2", "1G", "2G"],
        ["create", "-o", "cluster_size", "a.qcow2", "1G"],
        ["create", "-o", "frob=on", "a.qcow2", "1G"], ["create", "-o", "lazy_refcounts=perhaps", "a.qcow2", "1G"],
        ["snapshot", "-l", "-c", "x", "a.qcow2"], ["snapshot", "-U", "-c", "x", "a.qcow2"], ["snapshot", "a.qcow2"],
        ["info", "--output=xml", "a.raw"], ["resize", "--preallocation", "some", "a.qcow2", "1G"],
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
        ["create", "--format", "vdi", "/nowhere/a", "1M"], ["create", "/nowhere/a.vmdk", "1M"],
        ["snapshot", "create", "/nowhere/a.vhdx", "b"], ["rebase", "--no-backing", "/nowhere/a.vdi"],
        ["commit", "/nowhere/a.vmdk"],
    ])
    func otherFormats(arguments: [String]) throws {
        var command = try Command.parseAsRoot(["image"] + arguments)
        #expect(throws: ExitCode(1)) { try command.run() }
    }

    @Test func aFormatThatCannotBeWrittenIsWrongUsage() throws {
        var command = try Command.parseAsRoot(["image", "convert", "-O", "vpc", "/dev/null", "/nowhere/a"])
        #expect(throws: ExitCode(64)) { try command.run() }
    }

    @Test func disksTakeSnapshotsAndDataFiles() throws {
        let disk = try DiskArgument(parsing: "d.qcow2,ro,snapshot=before,data-file=/a/data.raw").disk
        #expect(
            disk.options.snapshot == "before" && disk.options.dataFile == "/a/data.raw" && !disk.options.allowsDataFile)
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
            ("d.qcow2,key-file=", "key-file= needs a path"), ("d.qcow2,key-file", "'key-file' is not recognized"),
            ("d.qcow2,key-fd=", "key-fd= is not a file descriptor number"),
            ("d.qcow2,key-fd=-1", "key-fd=-1 is not a file descriptor number"),
            ("d.qcow2,key-fd=2147483648", "is not a file descriptor number"), ("d.qcow2,key-fd=a", "key-fd=a is not"),
            ("d.qcow2,key-fd", "'key-fd' is not recognized"), ("d.qcow2,key=a", "'key=a' is not recognized"),
        ] {
            let problem = #expect(throws: ArgumentProblem.self) { try DiskArgument(parsing: argument) }
            #expect(
                problem.map { "\($0)".contains("disk d.qcow2: ") && "\($0)".contains(says) } == true,
                "\(argument): \(String(describing: problem))")
        }
    }

    /// The kinds of images that are created, their backing files, and a source's data.
    @Test func makes() throws {
        let converted = try parse(
            ImageConvertCommand.self, "convert", "--subformat", "streamOptimized", "-B", "b.img", "-F", "raw",
            "--data-file", "d", "a.qcow2", "c.vmdk")
        #expect(
            converted.layout.subformat == .streamOptimized && converted.backing == "b.img"
                && converted.backingFormat == .raw && converted.data.dataFile == "d")
        #expect(
            try parse(ImageCreateCommand.self, "create", "--subformat", "static", "a.vdi", "1G").layout.subformat
                == .fixed)
        #expect(throws: (any Error).self) {
            try parse(ImageCreateCommand.self, "create", "--subformat", "fixed", "a.vdi", "1G")
        }
        #expect(try parse(ImageResizeCommand.self, "resize", "--data-file", "d", "a.qcow2", "1G").data.dataFile == "d")
    }

    /// The verbs that use an image whose data is elsewhere.
    @Test func dataFiles() throws {
        #expect(try parse(ImageMapCommand.self, "map", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        #expect(try parse(ImageInfoCommand.self, "info", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        #expect(try parse(ImageBenchCommand.self, "bench", "--data-file", "d", "a.qcow2").data.dataFile == "d")
        let commit = try parse(
            ImageCommitCommand.self, "commit", "--data-file", "d", "--backing-data-file", "e", "a.qcow2")
        #expect(commit.data.dataFile == "d" && commit.backingDataFile == "e")
        #expect(
            try parse(ImageRebaseCommand.self, "rebase", "--no-backing", "--data-file", "d", "a.qcow2").data.dataFile
                == "d")
        let comparison = try parse(
            ImageCompareCommand.self, "compare", "--data-file", "d", "--second-data-file", "e", "a.qcow2", "b.qcow2")
        #expect(comparison.data.dataFile == "d" && comparison.secondDataFile == "e")
    }
}

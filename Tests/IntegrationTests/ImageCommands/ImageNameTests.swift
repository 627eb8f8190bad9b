// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// File names, formats and options on the command line of `swkvm image`.
@Suite(.timed) struct ImageNameTests: ImageCommandSuite {
    let directory: TemporaryDirectory

    init() throws { directory = try Self.makeDirectory() }

    /// Command lines of qemu-img work, or are refused with the replacement.
    @Test func theWordsOfQEMU() throws {
        #expect(
            try image(
                "convert -pfraw -Oqcow2 -t none -T none -W -C -S 4k -ocluster_size=4k,lazy_refcounts=on disk.raw a.qcow2"
            ).status == .status(0))
        #expect(try image("dd -fqcow2 -Oraw bs=1M if=a.qcow2 of=b.raw").status == .status(0))
        #expect(try image("create -q -f qcow2 -o backing_file=disk.raw,backing_fmt=raw c.qcow2").status == .status(0))
        try shell(
            "cd '\(directory.path)' && cmp disk.raw b.raw && qemu-img check -q -U a.qcow2 && qemu-img compare -q disk.raw c.qcow2"
        )
        #expect(try image("check -U a.qcow2").status == .status(0))
        #expect(
            try image("map -s 1M -l 64k disk.raw").output
                == "Offset          Length          Mapped to       File\n0x100000        0x10000         0x100000        disk.raw\n"
        )
        try expectRefused("measure -O qcow2 disk.raw", "swkvm: image has no measure", status: 64)
        try expectRefused("convert -r 1M disk.raw x.raw", "swkvm: image convert has no -r", status: 64)
        try expectRefused("convert -n disk.raw x.raw", "neither a block device nor a remote disk")
    }

    /// Ubuntu's cloud images are called `.img`, and are qcow2.
    @Test func aFormatThatTheNameDoesNotTellIsNotGuessed() throws {
        try shell(
            "cd '\(directory.path)' && qemu-img convert -O qcow2 disk.raw cloud.img && qemu-img create -q -f qcow2 over.qcow2 8M"
        )
        for arguments in [
            "info cloud.img", "info --backing-chain cloud.img", "check cloud.img", "map cloud.img",
            "resize cloud.img 16M", "convert cloud.img new.raw",
            "snapshot list cloud.img", "snapshot -c one cloud.img", "bench --count 1 cloud.img",
            "bench --write --count 1 cloud.img", "commit cloud.img",
            "rebase --no-backing cloud.img",
        ] {
            try expectRefused(
                arguments,
                "its file name says raw, but its contents look like qcow2: specify --format qcow2 if that is correct, --format raw if",
                status: 64)
        }
        try expectRefused("compare cloud.img disk.raw", "--format qcow2", status: 64)
        try expectRefused("compare disk.raw cloud.img", "--second-format qcow2", status: 64)
        for arguments in [
            "create --backing cloud.img new.qcow2", "create --unsafe --backing cloud.img new.qcow2 8M",
            "convert --backing cloud.img disk.raw new.qcow2",
            "rebase --backing cloud.img over.qcow2", "rebase --unsafe --backing cloud.img over.qcow2",
        ] {
            try expectRefused(
                arguments,
                "specify --backing-format qcow2 if that is correct, --backing-format raw if a guest wrote this to its raw disk"
            )
        }
        #expect(try image("create --backing cloud.img --backing-format qcow2 new.qcow2").status == .status(0))
        #expect(try image("compare new.qcow2 disk.raw").output == "Images are identical.\n")
        #expect(try image("info --format qcow2 cloud.img").output.contains("file format: qcow2"))
    }

    /// A guest can write anything to the start of its raw disk, for example a qcow2 header with a backing file.
    @Test func aRawDiskIsNoQCOW2ImageOfItsGuests() throws {
        for (name, format) in [
            ("guest.raw", ""), ("guest.img", ""), ("guest.raw", " --format raw"), ("guest.img", " --format raw"),
            ("guest", ""),
        ] {
            try shell(
                "cd '\(directory.path)' && qemu-img create -q -u -f qcow2 -b 'nbd+unix:///?socket=/nowhere' -F raw guest.qcow2 8M && mv guest.qcow2 \(name)"
            )
            let before = try shell("cd '\(directory.path)' && sha256sum \(name)")
            let sentence = { (stated: String) in
                name == "guest"
                    ? "its file name does not determine the format"
                    : format.isEmpty ? "its file name says raw, but its contents look like qcow2" : stated
            }
            // A format has to be stated, by another command line.
            let status: Int32 = format.isEmpty ? 64 : 1
            for arguments in [
                "list \(name)", "create \(name) one", "apply \(name) 1", "delete \(name) 1", "-l \(name)",
                "-c one \(name)", "-a 1 \(name)", "-d 1 \(name)",
            ] {
                try expectRefused(
                    "snapshot \(arguments)\(format)",
                    sentence(
                        "it is raw by --format, and only qcow2 images have snapshots; use --format qcow2 if it is a qcow2 image"
                    ), status: status)
            }
            try expectRefused(
                "check \(name)\(format)", sentence("only the metadata of qcow2 images can be checked"),
                status: format.isEmpty ? status : 63)
            for arguments in [
                "commit \(name)", "rebase --no-backing \(name)", "rebase --unsafe --backing disk.raw \(name)",
            ] {
                try expectRefused(arguments + format, sentence("only qcow2 images have backing files"), status: status)
            }
            #expect(try shell("cd '\(directory.path)' && sha256sum \(name)") == before)
            if format.isEmpty { continue }
            #expect(try image("info \(name)\(format)").output.contains("file format: raw\n"))
            // With `--format qcow2` the file is used as such, and its backing file too.
            try expectRefused("snapshot list --format qcow2 \(name)", "/nowhere")
        }
    }

    /// Arguments and file names are bytes.
    @Test func namesThatAreNotUTF8() throws {
        let names = [#"m\351"#, #"m\350"#, #"\303"#, #"m\303\251"#]
        func image(_ arguments: String) throws -> (status: Program.End, output: String, errors: String) {
            // The shell's printf prints the bytes.
            let words = arguments.split(separator: " ").map { $0.contains("\\") ? "\"$(printf '\($0)')\"" : String($0) }
                .joined(separator: " ")
            return try self.image(words)
        }
        for (index, name) in names.enumerated() {
            #expect(try image("create -q \(name).raw \(index + 1)M").status == .status(0))
            #expect(try image("create -q \(name).qcow2 --backing \(name).raw").status == .status(0))
            // Each is a file of its own.
            #expect(try image("create -q --force \(name).raw \(index + 1)M").status == .status(0))
        }
        #expect(try shell("cd '\(directory.path)' && ls | wc -l") == "9\n")
        for (index, name) in names.enumerated() {
            let info = try image("info --backing-chain \(name).qcow2").output
            #expect(info.contains("(\((index + 1) << 20) bytes)"), "\(info)")
            #expect(
                try shell("cd '\(directory.path)' && stat -c %s \"$(printf '\(name).raw')\"")
                    == "\((index + 1) << 20)\n")
        }
        #expect(try image(#"info m\351.qcow2"#).output.contains(#"image: m\xe9.qcow2"#))
        #expect(try image(#"info --json m\351.qcow2"#).output.contains(#""filename": "m\udce9.qcow2""#))
        #expect(
            try image(#"info no\351.qcow2"#).errors == #"swkvm: disk "no\xe9.qcow2": open: No such file or directory"#
                + "\n")
        #expect(try image(#"info x.qcow2 too\351many"#).errors.contains(#"too\xe9many"#))
        #expect(
            try image(#"convert m\351.qcow2 m\352.qcow2"#).status == .status(0)
                && image(#"compare m\351.qcow2 m\352.qcow2"#).status == .status(0))
        #expect(try image(#"commit m\351.qcow2"#).output == #"m\xe9.qcow2: committed to m\xe9.raw"# + "\n")
    }
}

// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// `swkvm image` as its users meet it: what it prints, how it ends, and what it leaves.
@Suite(.timed) struct ImageCommandTests {
    private let directory: TemporaryDirectory

    init() throws {
        directory = try TemporaryDirectory()
        try shell(
            """
            cd '\(directory.path)'
            head -c 3000000 /dev/urandom >random
            truncate -s 8M disk.raw
            dd if=random of=disk.raw bs=64k seek=16 conv=notrunc status=none
            rm random
            """)
    }

    /// Runs a verb in the directory.
    private func image(_ arguments: String, limits: String = "") throws -> (status: Program.End, output: String, errors: String) {
        let program = try Program(["sh", "-c", "cd '\(directory.path)' && \(limits) exec '\(Host.swkvm)' image \(arguments)"])
        return (try program.finish(), program.output.text, program.errors.text)
    }

    private func expectRefused(
        _ arguments: String, _ sentence: String, status: Int32 = 1, limits: String = "", sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let before = try directory.contents
        let result = try image(arguments, limits: limits)
        #expect(result.status == .status(status), "\(result)", sourceLocation: sourceLocation)
        #expect(result.errors.hasPrefix("swkvm: ") && (sentence.isEmpty || result.errors.contains(sentence)), "\(result)", sourceLocation: sourceLocation)
        #expect(result.errors.split(separator: "\n").count == 1, "\(result)", sourceLocation: sourceLocation)
        #expect(try directory.contents == before, sourceLocation: sourceLocation)
    }

    @Test func convertsAndCompares() throws {
        for (options, name) in [("", "a"), ("--compress", "b"), ("--compress --compression-type zstd --cluster-size 4K", "c"), ("--sync -m 1", "d"), ("--cache none", "e")] {
            #expect(try image("convert \(options) disk.raw \(name).qcow2").status == .status(0), "\(options)")
            try shell("cd '\(directory.path)' && qemu-img check -q \(name).qcow2 && qemu-img compare -q disk.raw \(name).qcow2")
            #expect(try image("compare disk.raw \(name).qcow2").output == "Images are identical.\n")
            #expect(try image("convert \(name).qcow2 \(name).raw").status == .status(0))
            try shell("cd '\(directory.path)' && cmp disk.raw \(name).raw && [ $(stat -c %b \(name).raw) -lt 6200 ]")
        }
    }

    /// `| head`: whoever does not read what is said does not end a change half-way.
    @Test func aReaderThatHasGoneEndsNoChange() throws {
        let status = try shell(
            """
            cd '\(directory.path)'; qemu-img create -q -f qcow2 base.qcow2 8M; qemu-img bitmap --add base.qcow2 monday
            qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2; qemu-io -c 'write -P 7 0 1M' top.qcow2 >log
            mkfifo pipe; sleep 600 <>pipe & exec 3>pipe; kill $!; wait $! || true
            '\(Host.swkvm)' image commit top.qcow2 >&3 2>&1; echo $?
            """)
        #expect(status == "0\n")
        try shell(
            "cd '\(directory.path)'; qemu-img check -q base.qcow2; "
                + "! qemu-io -c 'read -P 7 0 1M' base.qcow2 | grep -q failed")
    }

    /// Whatever the number of threads.
    @Test func theSameImageEveryTime() throws {
        for options in ["", "--compress", "--cluster-size 512"] {
            for threads in [1, 2, 8] { #expect(try image("convert -m \(threads) \(options) --force disk.raw \(threads).qcow2").status == .status(0)) }
            try shell("cd '\(directory.path)' && cmp 1.qcow2 2.qcow2 && cmp 1.qcow2 8.qcow2")
        }
    }

    /// The same words as qemu-img's.
    @Test func infoAndMapAreThoseOfQEMU() throws {
        try shell(
            """
            cd '\(directory.path)'
            qemu-img create -q -f qcow2 -b disk.raw -F raw -o cluster_size=4k,refcount_bits=8 over.qcow2
            qemu-io -c 'write -P 1 1M 40k' -c 'write -z 2M 64k' over.qcow2 >log
            qemu-img snapshot -c first over.qcow2
            sync disk.raw over.qcow2
            """)
        for file in ["disk.raw", "over.qcow2"] {
            #expect(try image("info \(file)").output == shell("cd '\(directory.path)' && qemu-img info \(file)"))
            #expect(try image("map \(file)").output == shell("cd '\(directory.path)' && qemu-img map \(file)"))
            #expect(try image("map --json \(file)").output == shell("cd '\(directory.path)' && qemu-img map --output json \(file)"))
        }
        #expect(try image("info --backing-chain over.qcow2").output == shell("cd '\(directory.path)' && qemu-img info --backing-chain over.qcow2"))
    }

    /// A VHD has two sizes: the user is told which one was taken, and decides.
    @Test func theSizeOfAVHDIsSaid() throws {
        try shell(
            """
            cd '\(directory.path)'
            qemu-img convert -f raw -O vpc -o subformat=fixed,force_size=on disk.raw disk.vhd
            printf 'vbox' | dd of=disk.vhd bs=1 seek=8388636 conv=notrunc status=none
            printf '\\0\\360\\004\\021' | dd of=disk.vhd bs=1 seek=8388664 conv=notrunc status=none
            """)
        // The checksum of what was changed.
        var bytes = try readFile(directory("disk.vhd"), limit: 16 << 20)
        let place = bytes.count - 512
        bytes.replaceSubrange(place + 64..<place + 68, with: [0, 0, 0, 0])
        let sum = ~bytes[place...].reduce(0 as UInt32) { $0 &+ UInt32($1) }
        bytes.replaceSubrange(place + 64..<place + 68, with: (0..<4).map { UInt8(truncatingIfNeeded: sum >> (24 - 8 * $0)) })
        let file = try FileDescriptor.open(directory("disk.vhd"), O_WRONLY)
        try file.writeAll(bytes)
        let info = try image("info disk.vhd")
        #expect(info.status == .status(0) && info.output.contains("(8388608 bytes)") && info.output.contains("size taken: current"), "\(info)")
        let all = try image("convert disk.vhd all.raw"), part = try image("convert --vhd-size chs disk.vhd part.raw")
        #expect(all.status == .status(0) && all.errors.contains("8388608 bytes (current) and 8355840 by its geometry (chs); current is used"), "\(all)")
        #expect(all.errors.split(separator: "\n").count == 1, "\(all)")
        #expect(part.status == .status(0) && part.errors.isEmpty, "\(part)")
        try shell("cd '\(directory.path)' && cmp disk.raw all.raw && [ $(stat -c %s part.raw) = 8355840 ] && cmp -n 8355840 disk.raw part.raw")
    }

    /// Command lines of qemu-img are done, or named with what to use.
    @Test func theWordsOfQEMU() throws {
        #expect(try image("convert -pfraw -Oqcow2 -t none -T none -W -C -S 4k -ocluster_size=4k,lazy_refcounts=on disk.raw a.qcow2").status == .status(0))
        #expect(try image("dd -fqcow2 -Oraw bs=1M if=a.qcow2 of=b.raw").status == .status(0))
        #expect(try image("create -q -f qcow2 -o backing_file=disk.raw,backing_fmt=raw c.qcow2").status == .status(0))
        try shell("cd '\(directory.path)' && cmp disk.raw b.raw && qemu-img check -q -U a.qcow2 && qemu-img compare -q disk.raw c.qcow2")
        #expect(try image("check -U a.qcow2").status == .status(0))
        #expect(try image("map -s 1M -l 64k disk.raw").output == "Offset          Length          Mapped to       File\n0x100000        0x10000         0x100000        disk.raw\n")
        try expectRefused("measure -O qcow2 disk.raw", "swkvm image has no measure", status: 64)
        try expectRefused("convert -r 1M disk.raw x.raw", "swkvm image convert has no -r", status: 64)
        try expectRefused("convert -n disk.raw x.raw", "neither a block device nor a remote disk")
    }

    /// Persistent bitmaps are shown as qemu-img shows them, and who makes them untrue hears so.
    @Test func bitmapsAreShownAndTheirEndIsReported() throws {
        try shell(
            """
            cd '\(directory.path)'
            qemu-img create -q -f qcow2 disk.qcow2 8M
            qemu-img bitmap --add -g 512 disk.qcow2 first
            qemu-img bitmap --add --disable disk.qcow2 second
            sync disk.qcow2
            """)
        #expect(try image("info disk.qcow2").output == shell("cd '\(directory.path)' && qemu-img info disk.qcow2"))
        let json = try image("info --json disk.qcow2").output.filter { !$0.isWhitespace }
        #expect(
            json.contains(
                #""bitmaps":[{"flags":["auto"],"name":"first","granularity":512},{"flags":[],"name":"second","granularity":65536}]"#),
            "\(json)")
        let result = try image("resize disk.qcow2 +1M")
        #expect(result.status == .status(0) && result.output == "disk.qcow2: 9 MiB (9437184 bytes)\n")
        #expect(
            result.errors == "swkvm: disk \"disk.qcow2\": its persistent bitmaps \"first\", \"second\" no longer describe the disk and were removed; "
                + "the next backup must be a full one\n")
        let checked = try shell("cd '\(directory.path)' && qemu-img check disk.qcow2 2>&1")
        #expect(checked.contains("No errors were found") && !checked.contains("leaked") && !checked.contains("warning"), "\(checked)")
    }

    /// What is left of an image that was cut short before its snapshot table is read, and the rest listed; then it is repaired.
    @Test func aCutImageIsSalvagedAndRepaired() throws {
        try shell(
            """
            cd '\(directory.path)'
            qemu-img create -q -f qcow2 disk.qcow2 64M
            qemu-io -c 'write -P 1 0 8M' disk.qcow2 >log
            qemu-img snapshot -c one disk.qcow2
            qemu-io -c 'write -P 2 0 4M' -c 'write -P 3 40M 1M' disk.qcow2 >log
            qemu-img snapshot -c two disk.qcow2
            # In the last cluster but 15 of the disk's data.
            truncate -s 13500000 disk.qcow2
            """)
        try expectRefused("resize disk.qcow2 +1M", "check --repair all")
        #expect(try image("check disk.qcow2").status == .status(2))
        let result = try image("convert --salvage disk.qcow2 left.raw")
        #expect(result.status == .status(0) && result.errors == "", "\(result)")
        let lines = result.output.split(separator: "\n")
        #expect(lines.count > 2 && lines[0].contains("could not be read"), "\(result)")
        #expect(lines.dropFirst(2).allSatisfy { $0.hasPrefix("0x") && $0.contains("end") }, "\(result)")
        #expect(try image("check --repair all disk.qcow2").status == .status(0))
        try shell("cd '\(directory.path)' && qemu-img check -q disk.qcow2 && qemu-img compare -q disk.qcow2 left.raw")
    }

    /// Every cloud image of Ubuntu is called `.img` and is qcow2.
    @Test func aFormatThatTheNameDoesNotTellIsNotGuessed() throws {
        try shell("cd '\(directory.path)' && qemu-img convert -O qcow2 disk.raw cloud.img && qemu-img create -q -f qcow2 over.qcow2 8M")
        for arguments in [
            "info cloud.img", "info --backing-chain cloud.img", "check cloud.img", "map cloud.img", "resize cloud.img 16M", "convert cloud.img new.raw",
            "snapshot list cloud.img", "snapshot -c one cloud.img", "bench --count 1 cloud.img", "bench --write --count 1 cloud.img", "commit cloud.img",
            "rebase --no-backing cloud.img",
        ] {
            try expectRefused(arguments, "its file name says raw, but its contents look like qcow2: specify format=qcow2 (swkvm image: --format qcow2) if that is correct, format=raw")
        }
        try expectRefused("compare cloud.img disk.raw", "--format qcow2", status: 2)
        try expectRefused("compare disk.raw cloud.img", "--second-format qcow2", status: 2)
        for arguments in [
            "create --backing cloud.img new.qcow2", "create --unsafe --backing cloud.img new.qcow2 8M", "convert --backing cloud.img disk.raw new.qcow2",
            "rebase --backing cloud.img over.qcow2", "rebase --unsafe --backing cloud.img over.qcow2",
        ] {
            try expectRefused(arguments, "specify --backing-format qcow2 if that is correct, --backing-format raw if a guest wrote this to its raw disk")
        }
        #expect(try image("create --backing cloud.img --backing-format qcow2 new.qcow2").status == .status(0))
        #expect(try image("compare new.qcow2 disk.raw").output == "Images are identical.\n")
        #expect(try image("info --format qcow2 cloud.img").output.contains("file format: qcow2"))
    }

    /// What an image names is not the user's word.
    @Test func anImageNamesFilesOfItsOwnDirectory() throws {
        try shell("cd '\(directory.path)' && mkdir vm && qemu-img create -q -f qcow2 -b ../disk.raw -F raw vm/over.qcow2")
        let sentence = "it is neither below that image's directory nor named on the command line"
        for arguments in [
            "info --backing-chain vm/over.qcow2", "map vm/over.qcow2", "convert vm/over.qcow2 new.raw", "commit vm/over.qcow2", "rebase --no-backing vm/over.qcow2",
            "create --backing vm/over.qcow2 new.qcow2", "resize vm/over.qcow2 16M", "bench --count 1 vm/over.qcow2", "snapshot list vm/over.qcow2",
        ] { try expectRefused(arguments, sentence.replacing("it is", with: "an image refers to it, but it is")) }
        // Also where the image names nothing.
        for verb in ["info", "map", "convert -O raw", "bench --count 1"] {
            let target = verb.hasPrefix("convert") ? " new.raw" : ""
            try expectRefused("\(verb) --backing-dir nowhere disk.raw\(target)", "disk \"nowhere\": open: No such file or directory")
            try expectRefused("\(verb) --backing-dir disk.raw disk.raw\(target)", "disk \"disk.raw\": open: Not a directory")
        }
        for options in ["--backing-dir .", "--backing-dir vm --backing-dir .", "--backing-anywhere"] {
            for arguments in [
                "info --backing-chain", "map", "bench --count 1", "create --force new.qcow2 --backing", "snapshot list", "convert --force -O raw -q new.raw",
            ] {
                // The new image comes first.
                let words = arguments.hasPrefix("convert") ? "convert \(options) --force -q vm/over.qcow2 new.raw" : "\(arguments) vm/over.qcow2 \(options)"
                #expect(try image(words).status == .status(0), "\(words)")
            }
        }
        // The same file is named.
        #expect(try image("compare vm/over.qcow2 disk.raw").output == "Images are identical.\n")
        try expectRefused("compare vm/over.qcow2 new.raw", sentence, status: 2)
        #expect(try image("convert --force --backing disk.raw vm/over.qcow2 new.qcow2").status == .status(0))
        #expect(try image("rebase --backing disk.raw vm/over.qcow2 --backing-dir .").status == .status(1))
        #expect(try image("rebase --backing ../disk.raw vm/over.qcow2").status == .status(0))
        #expect(try image("commit --backing-dir . vm/over.qcow2").status == .status(0))
    }

    /// The arguments are bytes, and so are the names of files.
    @Test func namesThatAreNotUTF8() throws {
        let names = [#"m\351"#, #"m\350"#, #"\303"#, #"m\303\251"#]
        func image(_ arguments: String) throws -> (status: Program.End, output: String, errors: String) {
            // The shell's own printf makes the bytes.
            let words = arguments.split(separator: " ").map { $0.contains("\\") ? "\"$(printf '\($0)')\"" : String($0) }.joined(separator: " ")
            return try self.image(words)
        }
        for (index, name) in names.enumerated() {
            #expect(try image("create -q \(name).raw \(index + 1)M").status == .status(0))
            #expect(try image("create -q \(name).qcow2 --backing \(name).raw").status == .status(0))
            // None takes another's place.
            #expect(try image("create -q --force \(name).raw \(index + 1)M").status == .status(0))
        }
        #expect(try shell("cd '\(directory.path)' && ls | wc -l") == "9\n")
        for (index, name) in names.enumerated() {
            let info = try image("info --backing-chain \(name).qcow2").output
            #expect(info.contains("(\((index + 1) << 20) bytes)"), "\(info)")
            #expect(try shell("cd '\(directory.path)' && stat -c %s \"$(printf '\(name).raw')\"") == "\((index + 1) << 20)\n")
        }
        #expect(try image(#"info m\351.qcow2"#).output.contains(#"image: m\xe9.qcow2"#))
        #expect(try image(#"info --json m\351.qcow2"#).output.contains(#""filename": "m\udce9.qcow2""#))
        #expect(try image(#"info no\351.qcow2"#).errors == #"swkvm: disk "no\xe9.qcow2": open: No such file or directory"# + "\n")
        #expect(try image(#"info x.qcow2 too\351many"#).errors.contains(#"too\xe9many"#))
        #expect(try image(#"convert m\351.qcow2 m\352.qcow2"#).status == .status(0) && image(#"compare m\351.qcow2 m\352.qcow2"#).status == .status(0))
        #expect(try image(#"commit m\351.qcow2"#).output == #"m\xe9.qcow2: committed to m\xe9.raw"# + "\n")
    }

    /// A file with an image's data is used by every verb that looks at data, when the user names it.
    @Test func dataFilesAreNamedByTheUser() throws {
        let data = directory("disk.data")
        try shell(
            """
            cd '\(directory.path)'
            # Whole clusters: QEMU does not look for holes in a data file.
            truncate -s 8M disk.raw
            dd if=/dev/urandom of=disk.raw bs=64k count=46 seek=16 conv=notrunc status=none
            qemu-img convert -O qcow2 -o data_file='\(data)' disk.raw far.qcow2
            sync far.qcow2 '\(data)'
            """)
        try expectRefused("map far.qcow2", "specify data-file=PATH (swkvm image: --data-file) to use it")
        try expectRefused("map --data-file disk.data disk.raw", "it has no external data file")
        try expectRefused("compare --second-data-file disk.data far.qcow2 disk.raw", "", status: 2)
        #expect(try image("map --data-file '\(data)' far.qcow2").output == shell("cd '\(directory.path)' && qemu-img map far.qcow2"))
        #expect(try image("map --json --data-file '\(data)' far.qcow2").output == shell("cd '\(directory.path)' && qemu-img map --output json far.qcow2"))
        #expect(try image("compare --data-file disk.data far.qcow2 disk.raw").output == "Images are identical.\n")
        #expect(try image("compare --second-data-file disk.data disk.raw far.qcow2").output == "Images are identical.\n")
        // One line more than QEMU has.
        let lines = try image("info --data-file '\(data)' far.qcow2").output.split(separator: "\n")
        #expect(lines.contains { $0.hasPrefix("    data file disk size: 2.") })
        #expect(try lines.filter { !$0.contains("data file disk size") } == shell("cd '\(directory.path)' && qemu-img info far.qcow2").split(separator: "\n"))
        #expect(try image("info --data-file disk.data far.qcow2").output.contains("data file: \(data) (actual path: disk.data)\n"))
        #expect(try image("check --data-file disk.data far.qcow2").status == .status(0))
        let bench = try image("bench --data-file disk.data --write --pattern 5 --count 16 -s 64K far.qcow2")
        #expect(bench.status == .status(0), "\(bench)")
        try shell("cd '\(directory.path)' && qemu-io -r -c 'read -P 5 0 1M' far.qcow2 | grep -qv rror && qemu-img check -q far.qcow2")
        // Cut in the middle of what is there.
        try shell("cd '\(directory.path)' && truncate -s 2M disk.data")
        #expect(try image("check far.qcow2").status == .status(0))
        let cut = try image("check --data-file disk.data far.qcow2")
        #expect(cut.status == .status(2) && cut.output.contains("beyond the end of the data file"), "\(cut)")
    }

    /// Of an overlay that keeps its data outside, too.
    @Test func overlaysOfDataFiles() throws {
        let data = directory("over.data")
        try shell(
            """
            cd '\(directory.path)' && cp disk.raw base.raw && cp disk.raw new.raw && dd if=/dev/urandom of=new.raw bs=64k count=3 seek=20 conv=notrunc status=none
            qemu-img create -q -f qcow2 -o data_file='\(data)' -b base.raw -F raw over.qcow2
            qemu-io -c 'write -P 9 1M 300k' -c 'write -z 3M 100k' over.qcow2 >log && qemu-img convert -O raw over.qcow2 expected.raw
            """)
        for verb in ["commit over.qcow2", "rebase --backing new.raw over.qcow2"] {
            try expectRefused(verb, "specify data-file=PATH (swkvm image: --data-file) to use it")
        }
        try expectRefused("commit --data-file base.raw disk.raw", "only qcow2 images have backing files")
        for verb in ["rebase --data-file over.data --backing new.raw over.qcow2", "commit --data-file over.data over.qcow2", "rebase --data-file over.data --no-backing over.qcow2"] {
            let result = try image(verb)
            #expect(result.status == .status(0), "\(verb): \(result)")
            try shell("cd '\(directory.path)' && qemu-img check -q over.qcow2 && qemu-img compare -q over.qcow2 expected.raw")
        }
        try shell("cd '\(directory.path)' && qemu-img compare -q -f raw -F raw new.raw expected.raw && qemu-img info over.qcow2 | grep -q 'data file: \(data)' && cmp disk.raw base.raw")
    }

    /// A guest can write whatever it likes to the start of its raw disk, a qcow2 header with a backing file of its choice as well.
    @Test func aRawDiskIsNoQCOW2ImageOfItsGuests() throws {
        for (name, format) in [("guest.raw", ""), ("guest.img", ""), ("guest.raw", " --format raw"), ("guest.img", " --format raw"), ("guest", "")] {
            try shell("cd '\(directory.path)' && qemu-img create -q -u -f qcow2 -b 'nbd+unix:///?socket=/nowhere' -F raw guest.qcow2 8M && mv guest.qcow2 \(name)")
            let before = try shell("cd '\(directory.path)' && sha256sum \(name)")
            let sentence = { (stated: String) in name == "guest" ? "its file name does not determine the format" : format.isEmpty ? "its file name says raw, but its contents look like qcow2" : stated }
            for arguments in ["list \(name)", "create \(name) one", "apply \(name) 1", "delete \(name) 1", "-l \(name)", "-c one \(name)", "-a 1 \(name)", "-d 1 \(name)"] {
                try expectRefused("snapshot \(arguments)\(format)", sentence("it is raw by --format, and only qcow2 images have snapshots; use --format qcow2 if it is a qcow2 image"))
            }
            try expectRefused("check \(name)\(format)", sentence("only the metadata of qcow2 images can be checked"), status: format.isEmpty ? 1 : 63)
            for arguments in ["commit \(name)", "rebase --no-backing \(name)", "rebase --unsafe --backing disk.raw \(name)"] {
                try expectRefused(arguments + format, sentence("only qcow2 images have backing files"))
            }
            #expect(try shell("cd '\(directory.path)' && sha256sum \(name)") == before)
            if format.isEmpty { continue }
            #expect(try image("info \(name)\(format)").output.contains("file format: raw\n"))
            // Who says so gets it, and the name of the backing file with it.
            try expectRefused("snapshot list --format qcow2 \(name)", "/nowhere")
        }
    }

    @Test func compareTellsByItsStatus() throws {
        try shell("cd '\(directory.path)' && cp disk.raw other.raw && printf x | dd of=other.raw bs=1 seek=2000000 conv=notrunc status=none")
        let different = try image("compare disk.raw other.raw")
        #expect(different.status == .status(1) && different.output.hasPrefix("Content mismatch at offset "))
        try expectRefused("compare disk.raw none.raw", "none.raw\": open: No such file or directory", status: 2)
    }

    @Test func overlays() throws {
        let path = directory.path
        try shell("cd '\(path)' && cp disk.raw base.raw && qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2")
        try shell("cd '\(path)' && qemu-io -c 'write -P 9 1M 300k' -c 'write -z 3M 100k' top.qcow2 >log && qemu-img convert -O raw top.qcow2 expected.raw")
        // Another base, of which some is the same.
        try shell("cd '\(path)' && cp base.raw new.raw && dd if=/dev/urandom of=new.raw bs=64k count=3 seek=20 conv=notrunc status=none && truncate -s 6M new.raw")
        #expect(try image("rebase --backing new.raw top.qcow2").status == .status(0))
        try shell("cd '\(path)' && qemu-img check -q top.qcow2 && qemu-img compare -q top.qcow2 expected.raw && qemu-img info top.qcow2 | grep -q 'backing file: new.raw'")
        // Renamed.
        try shell("cd '\(path)' && mv new.raw moved.raw")
        try expectRefused("rebase --no-backing top.qcow2", "new.raw\": open: No such file or directory")
        #expect(try image("rebase --unsafe --backing moved.raw top.qcow2").status == .status(0))
        try shell("cd '\(path)' && qemu-img compare -q top.qcow2 expected.raw")
        // Into the base, which gets as long as the disk.
        let commit = try image("commit top.qcow2")
        #expect(commit.status == .status(0), "\(commit)")
        try shell("cd '\(path)' && qemu-img compare -q moved.raw expected.raw && qemu-img compare -q top.qcow2 expected.raw && qemu-img check -q top.qcow2")
        try shell("cd '\(path)' && [ $(stat -c %s top.qcow2) -lt 400000 ]")
        // And without any.
        #expect(try image("rebase --no-backing top.qcow2").status == .status(0))
        try shell("cd '\(path)' && rm moved.raw && qemu-img check -q top.qcow2 && qemu-img compare -q top.qcow2 expected.raw")
        try expectRefused("commit top.qcow2", "it has no backing file")
    }

    @Test func benches() throws {
        #expect(try image("convert disk.raw disk.qcow2").status == .status(0))
        for options in ["", "--random --depth 1", "--no-ring -s 64K", "--cache none -S 8K", "--write --flush-interval 100 --pattern 7"] {
            let result = try image("bench --count 1000 \(options) disk.qcow2")
            #expect(result.status == .status(0) && result.output.hasPrefix("Sending 1000 ") && result.output.contains("\nRun completed in "), "\(options): \(result)")
        }
        try shell("cd '\(directory.path)' && qemu-img check -q disk.qcow2 && qemu-io -r -c 'read -P 7 0 4000k' disk.qcow2 | grep -qv rror")
        try expectRefused("bench -s 16M disk.raw", "requests of 16777216 bytes")
    }

    /// Its tables are 128 MiB, its cache 32; all of the program has to do with 64 MiB of addresses besides its stack.
    @Test func memoryDoesNotGrowWithTheImage() throws {
        #expect(try image("create -q --preallocation metadata large.qcow2 1T").status == .status(0))
        for options in ["", "--write"] {
            let result = try image("bench --random --count 20000 --depth 16 \(options) large.qcow2", limits: "ulimit -v 65536;")
            #expect(result.status == .status(0) && result.output.contains("\nRun completed in "), "\(result)")
        }
    }

    // MARK: - What cannot be

    @Test func badFiles() throws {
        try expectRefused("convert none.raw new.qcow2", "none.raw\": open: No such file or directory")
        try expectRefused("convert disk.raw none/new.qcow2", "none/new.qcow2\": open: No such file or directory")
        try expectRefused("convert disk.raw disk.raw", "it already exists; --force overwrites it")
        try expectRefused("convert --force disk.raw disk.raw", "it is the same file as the source \"disk.raw\"; name another file")
        // The hint is the option that helps.
        try expectRefused("convert disk.raw new", "its file name does not determine the format; specify format=raw, format=qcow2 … (swkvm image: --target-format)")
        try expectRefused("convert nameless new.qcow2", "(swkvm image: --format)")
        try expectRefused("compare disk.raw nameless", "(swkvm image: --second-format)", status: 2)
        try expectRefused("create --backing nameless new.qcow2", "(swkvm image: --backing-format)")
        try expectRefused("convert --target-format raw --force disk.raw /dev/stdout", "neither a regular file nor a block device")
        try expectRefused("convert --compress disk.raw new.raw", "raw images are not compressed")
        try expectRefused("convert --compress --compression-level 10 disk.raw new.qcow2", "zlib has 1 to 9")
        try expectRefused("convert -m 0 disk.raw new.qcow2", "0 threads; 1 to 64 are possible")
        try expectRefused("create new.qcow2 4611686018427387905", "a disk has 4611686018427387904 at most")
        try expectRefused("create new.qcow2 -- -1", "", status: 64)
        try expectRefused("create new.qcow2", "its size is missing")
        try expectRefused("convert disk.raw", "", status: 64)
        // A base that would be overwritten by what stands on it.
        try shell("cd '\(directory.path)' && qemu-img create -q -f qcow2 -b disk.raw -F raw over.qcow2")
        try expectRefused("convert --force over.qcow2 disk.raw", "it is the same file as the source")
        try expectRefused("convert --no-backing over.qcow2 new.raw", "backing file")
    }

    /// A limit of the process, as a full file system would have it, at any point of the work.
    @Test func noSpace() throws {
        for blocks in [0, 8, 100, 1000, 4000] {
            let limits = "ulimit -f \(blocks);"
            for arguments in ["convert disk.raw new.qcow2", "convert --compress disk.raw new.qcow2", "convert disk.raw new.raw", "create --preallocation full new.raw 8M"] {
                try expectRefused(arguments, "File too large", limits: limits)
            }
        }
    }

    @Test(.enabled(if: geteuid() == 0, "a file system of its own needs root")) func fullFileSystem() throws {
        let mount = directory("full")
        try shell("mkdir '\(mount)' && mount -t tmpfs -o size=2M tmpfs '\(mount)'")
        defer { _ = try? shell("umount '\(mount)'") }
        for arguments in ["convert disk.raw full/new.qcow2", "convert disk.raw full/new.raw", "create --preallocation falloc full/new.raw 8M"] {
            try expectRefused(arguments, "No space left on device")
            #expect(try shell("ls -A '\(mount)'").isEmpty)
        }
    }

    /// What the user may not read or write, whom root is not: as nobody.
    @Test(.enabled(if: geteuid() == 0, "another user's programs need root")) func withoutPermission() throws {
        let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
        try shell(
            """
            cd '\(directory.path)' && chmod 755 . && mkdir mine && chmod 700 mine && cp disk.raw mine/ && qemu-img create -q -f qcow2 only.qcow2 1M
            cp only.qcow2 secret.qcow2 && chmod 644 only.qcow2 && chmod 600 secret.qcow2 && mkdir all && chmod 777 all && cp '\(Host.swkvm)' all/swkvm
            qemu-img create -q -f qcow2 -b ../secret.qcow2 -F qcow2 all/over.qcow2 && chmod 666 all/over.qcow2 && touch all/theirs.raw && chmod 644 all/theirs.raw
            """)
        let before = try directory.contents
        for (arguments, sentence) in [
            ("info secret.qcow2", "secret.qcow2\": open: Permission denied"), ("check secret.qcow2", "open: Permission denied"), ("map mine/disk.raw", "open: Permission denied"),
            ("convert secret.qcow2 all/new.raw", "secret.qcow2\": open: Permission denied"), ("convert all/over.qcow2 all/new.raw", "backing file: disk"),
            ("convert disk.raw new.qcow2", "new.qcow2\": open: Permission denied"), ("convert disk.raw new.vmdk --subformat monolithicFlat", "open: Permission denied"),
            ("create new.qcow2 1M", "open: Permission denied"), ("create mine/new.qcow2 1M", "open: Permission denied"), ("create --force all/theirs.raw 1M", "open: Permission denied"),
            ("check --repair all only.qcow2", "open: Permission denied"), ("resize only.qcow2 2M", "open: Permission denied"), ("snapshot create only.qcow2 a", "open: Permission denied"),
            ("rebase --unsafe --no-backing only.qcow2", "open: Permission denied"), ("commit --backing-dir . all/over.qcow2", "Permission denied"), ("bench --write only.qcow2", "open: Permission denied"),
        ] {
            let program = try Program(["sh", "-c", "cd '\(directory.path)' && exec \(nobody) all/swkvm image \(arguments)"])
            let status = try program.finish(), errors = program.errors.text
            // In one line, and nothing is made.
            #expect(status == .status(1) && errors.hasPrefix("swkvm: ") && (sentence.isEmpty || errors.contains(sentence)) && errors.split(separator: "\n").count == 1, "\(arguments): \(status) \(errors)")
            #expect(try directory.contents == before, "\(arguments)")
        }
        // What may be read is.
        #expect(try shell("cd '\(directory.path)' && \(nobody) all/swkvm image check only.qcow2 && \(nobody) all/swkvm image convert only.qcow2 all/new.vdi").contains("No errors"))
    }

    @Test func inUse() throws {
        try shell("cd '\(directory.path)' && qemu-img create -q -f qcow2 used.qcow2 8M")
        // As QEMU locks an image that it writes: byte 101 held, and byte 201 refused to others.
        let file = try FileDescriptor.open(directory("used.qcow2"), O_RDWR)
        for byte: off_t in [100, 101, 201] { #expect(clinux_ofd_lock(file.rawValue, Int16(F_RDLCK), byte, 1) == 0) }
        try expectRefused("convert used.qcow2 new.raw", "another process has it open for writing")
        try expectRefused("convert --force disk.raw used.qcow2", "another process has it open for writing")
        try expectRefused("info used.qcow2", "another process has it open for writing")
        #expect(try image("info --force-share used.qcow2").status == .status(0))
    }

    // MARK: - Interruption

    /// A conversion that takes its time, since it writes to a place that is slow to take it.
    private func longConversion() throws -> Program {
        try shell("cd '\(directory.path)' && [ -e long.raw ] || head -c 200M /dev/urandom >long.raw")
        let program = try Program([
            "sh", "-c", "cd '\(directory.path)' && exec '\(Host.swkvm)' image convert --progress -m 1 --compress --compression-level 9 long.raw long.qcow2",
        ])
        try program.waitForError("% ")
        return program
    }

    @Test func signalsLeaveNothing() throws {
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let program = try longConversion()
            program.send(signal: signal)
            #expect(try program.finish() == .status(1))
            #expect(program.errors.text.contains("interrupted; nothing was created"))
            #expect(try directory.contents.sorted() == ["disk.raw", "long.raw"])
        }
    }

    @Test func killedLeavesNothingInTheWay() throws {
        let program = try longConversion()
        program.send(signal: SIGKILL)
        _ = try program.finish()
        #expect(try !directory.contents.contains("long.qcow2"))
        let again = try image("convert --cluster-size 2M long.raw long.qcow2")
        #expect(again.status == .status(0), "\(again)")
        try shell("cd '\(directory.path)' && qemu-img compare -q long.raw long.qcow2")
    }
}

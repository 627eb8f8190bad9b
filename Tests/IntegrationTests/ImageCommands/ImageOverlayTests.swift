// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// `swkvm image commit` and `rebase`, and the files that an overlay refers to.
@Suite(.timed) struct ImageOverlayTests: ImageCommandSuite {
    let directory: TemporaryDirectory

    init() throws { directory = try Self.makeDirectory() }

    @Test func overlays() throws {
        let path = directory.path
        try shell("cd '\(path)' && cp disk.raw base.raw && qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2")
        try shell(
            "cd '\(path)' && qemu-io -c 'write -P 9 1M 300k' -c 'write -z 3M 100k' top.qcow2 >log && qemu-img convert -O raw top.qcow2 expected.raw"
        )
        // Another backing file, which is partly the same.
        try shell(
            "cd '\(path)' && cp base.raw new.raw && dd if=/dev/urandom of=new.raw bs=64k count=3 seek=20 conv=notrunc status=none && truncate -s 6M new.raw"
        )
        #expect(try image("rebase --backing new.raw top.qcow2").status == .status(0))
        try shell(
            "cd '\(path)' && qemu-img check -q top.qcow2 && qemu-img compare -q top.qcow2 expected.raw && qemu-img info top.qcow2 | grep -q 'backing file: new.raw'"
        )
        // Renamed.
        try shell("cd '\(path)' && mv new.raw moved.raw")
        try expectRefused("rebase --no-backing top.qcow2", "new.raw\": open: No such file or directory")
        #expect(try image("rebase --unsafe --backing moved.raw top.qcow2").status == .status(0))
        try shell("cd '\(path)' && qemu-img compare -q top.qcow2 expected.raw")
        // Into the backing file, which becomes as long as the disk.
        let commit = try image("commit top.qcow2")
        #expect(commit.status == .status(0), "\(commit)")
        try shell(
            "cd '\(path)' && qemu-img compare -q moved.raw expected.raw && qemu-img compare -q top.qcow2 expected.raw && qemu-img check -q top.qcow2"
        )
        try shell("cd '\(path)' && [ $(stat -c %s top.qcow2) -lt 400000 ]")
        // And without a backing file.
        #expect(try image("rebase --no-backing top.qcow2").status == .status(0))
        try shell(
            "cd '\(path)' && rm moved.raw && qemu-img check -q top.qcow2 && qemu-img compare -q top.qcow2 expected.raw")
        try expectRefused("commit top.qcow2", "it has no backing file")
    }

    /// The same for an overlay with an external data file.
    @Test func overlaysOfDataFiles() throws {
        let data = directory("over.data")
        try shell(
            """
            cd '\(directory.path)' && cp disk.raw base.raw && cp disk.raw new.raw && dd if=/dev/urandom of=new.raw bs=64k count=3 seek=20 conv=notrunc status=none
            qemu-img create -q -f qcow2 -o data_file='\(data)' -b base.raw -F raw over.qcow2
            qemu-io -c 'write -P 9 1M 300k' -c 'write -z 3M 100k' over.qcow2 >log && qemu-img convert -O raw over.qcow2 expected.raw
            """)
        for verb in ["commit over.qcow2", "rebase --backing new.raw over.qcow2"] {
            let other = verb.hasPrefix("commit") ? " (or --backing-data-file PATH)" : ""
            try expectRefused(verb, "specify --data-file PATH\(other) to use it")
        }
        try expectRefused("commit --data-file base.raw disk.raw", "only qcow2 images have backing files")
        for verb in [
            "rebase --data-file over.data --backing new.raw over.qcow2", "commit --data-file over.data over.qcow2",
            "rebase --data-file over.data --no-backing over.qcow2",
        ] {
            let result = try image(verb)
            #expect(result.status == .status(0), "\(verb): \(result)")
            try shell(
                "cd '\(directory.path)' && qemu-img check -q over.qcow2 && qemu-img compare -q over.qcow2 expected.raw")
        }
        try shell(
            "cd '\(directory.path)' && qemu-img compare -q -f raw -F raw new.raw expected.raw && qemu-img info over.qcow2 | grep -q 'data file: \(data)' && cmp disk.raw base.raw"
        )
    }

    /// A reader of the output that ends early, such as `head`, does not interrupt a change.
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

    /// An image can only refer to files in its own directory, unless the user names the file or the directory.
    @Test func anImageNamesFilesOfItsOwnDirectory() throws {
        try shell(
            "cd '\(directory.path)' && mkdir vm && qemu-img create -q -f qcow2 -b ../disk.raw -F raw vm/over.qcow2")
        let sentence = "it is neither below that image's directory nor named on the command line"
        for arguments in [
            "info --backing-chain vm/over.qcow2", "map vm/over.qcow2", "convert vm/over.qcow2 new.raw",
            "commit vm/over.qcow2", "rebase --no-backing vm/over.qcow2",
            "create --backing vm/over.qcow2 new.qcow2", "resize vm/over.qcow2 16M", "bench --count 1 vm/over.qcow2",
            "snapshot list vm/over.qcow2",
        ] { try expectRefused(arguments, sentence.replacing("it is", with: "an image refers to it, but it is")) }
        // Also if the image refers to no other file.
        for verb in ["info", "map", "convert -O raw", "bench --count 1"] {
            let target = verb.hasPrefix("convert") ? " new.raw" : ""
            try expectRefused(
                "\(verb) --backing-dir nowhere disk.raw\(target)", "disk \"nowhere\": open: No such file or directory")
            try expectRefused(
                "\(verb) --backing-dir disk.raw disk.raw\(target)", "disk \"disk.raw\": open: Not a directory")
        }
        for options in ["--backing-dir .", "--backing-dir vm --backing-dir .", "--backing-anywhere"] {
            for arguments in [
                "info --backing-chain", "map", "bench --count 1", "create --force new.qcow2 --backing", "snapshot list",
                "convert --force -O raw -q new.raw",
            ] {
                // The new image comes first.
                let words =
                    arguments.hasPrefix("convert")
                    ? "convert \(options) --force -q vm/over.qcow2 new.raw" : "\(arguments) vm/over.qcow2 \(options)"
                #expect(try image(words).status == .status(0), "\(words)")
            }
        }
        // The user names the same file.
        #expect(try image("compare vm/over.qcow2 disk.raw").output == "Images are identical.\n")
        try expectRefused("compare vm/over.qcow2 new.raw", sentence, status: 2)
        #expect(try image("convert --force --backing disk.raw vm/over.qcow2 new.qcow2").status == .status(0))
        #expect(try image("rebase --backing disk.raw vm/over.qcow2 --backing-dir .").status == .status(1))
        #expect(try image("rebase --backing ../disk.raw vm/over.qcow2").status == .status(0))
        #expect(try image("commit --backing-dir . vm/over.qcow2").status == .status(0))
    }
}

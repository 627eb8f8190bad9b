// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// `swkvm image info`, `map` and `check`: what they print of an image.
@Suite(.timed) struct ImageInformationTests: ImageCommandSuite {
    let directory: TemporaryDirectory

    init() throws { directory = try Self.makeDirectory() }

    /// The output is the same as qemu-img's.
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
            #expect(
                try image("map --json \(file)").output
                    == shell("cd '\(directory.path)' && qemu-img map --output json \(file)"))
        }
        #expect(
            try image("info --backing-chain over.qcow2").output
                == shell("cd '\(directory.path)' && qemu-img info --backing-chain over.qcow2"))
    }

    /// Persistent bitmaps are shown as qemu-img shows them. A change that invalidates them is reported.
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
                #""bitmaps":[{"flags":["auto"],"name":"first","granularity":512},{"flags":[],"name":"second","granularity":65536}]"#
            ),
            "\(json)")
        let result = try image("resize disk.qcow2 +1M")
        #expect(result.status == .status(0) && result.output == "disk.qcow2: 9 MiB (9437184 bytes)\n")
        #expect(
            result.errors
                == "swkvm: disk \"disk.qcow2\": its persistent bitmaps \"first\", \"second\" no longer describe the disk and were removed; "
                + "the next backup must be a full one\n")
        let checked = try shell("cd '\(directory.path)' && qemu-img check disk.qcow2 2>&1")
        #expect(
            checked.contains("No errors were found") && !checked.contains("leaked") && !checked.contains("warning"),
            "\(checked)")
    }

    /// An image that was truncated before its snapshot table is converted as far as it can be read, with a list of the
    /// rest; then it is repaired.
    @Test func aCutImageIsSalvagedAndRepaired() throws {
        try shell(
            """
            cd '\(directory.path)'
            qemu-img create -q -f qcow2 disk.qcow2 64M
            qemu-io -c 'write -P 1 0 8M' disk.qcow2 >log
            qemu-img snapshot -c one disk.qcow2
            qemu-io -c 'write -P 2 0 4M' -c 'write -P 3 40M 1M' disk.qcow2 >log
            qemu-img snapshot -c two disk.qcow2
            # In the sixteenth cluster from the end of the disk's data.
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

    /// Every verb that reads data uses an external data file that the user specifies.
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
        try expectRefused("map far.qcow2", "specify --data-file PATH to use it")
        try expectRefused("map --data-file disk.data disk.raw", "it has no external data file")
        try expectRefused("compare --second-data-file disk.data far.qcow2 disk.raw", "", status: 2)
        #expect(
            try image("map --data-file '\(data)' far.qcow2").output
                == shell("cd '\(directory.path)' && qemu-img map far.qcow2"))
        #expect(
            try image("map --json --data-file '\(data)' far.qcow2").output
                == shell("cd '\(directory.path)' && qemu-img map --output json far.qcow2"))
        #expect(try image("compare --data-file disk.data far.qcow2 disk.raw").output == "Images are identical.\n")
        #expect(
            try image("compare --second-data-file disk.data disk.raw far.qcow2").output == "Images are identical.\n")
        // One more line than in qemu-img's output.
        let lines = try image("info --data-file '\(data)' far.qcow2").output.split(separator: "\n")
        #expect(lines.contains { $0.hasPrefix("    data file disk size: 2.") })
        #expect(
            try lines.filter { !$0.contains("data file disk size") }
                == shell("cd '\(directory.path)' && qemu-img info far.qcow2").split(separator: "\n"))
        #expect(
            try image("info --data-file disk.data far.qcow2").output.contains(
                "data file: \(data) (actual path: disk.data)\n"))
        #expect(try image("check --data-file disk.data far.qcow2").status == .status(0))
        let bench = try image("bench --data-file disk.data --write --pattern 5 --count 16 -s 64K far.qcow2")
        #expect(bench.status == .status(0), "\(bench)")
        try shell(
            "cd '\(directory.path)' && qemu-io -r -c 'read -P 5 0 1M' far.qcow2 | grep -qv rror && qemu-img check -q far.qcow2"
        )
        // Truncated in the middle of the data.
        try shell("cd '\(directory.path)' && truncate -s 2M disk.data")
        #expect(try image("check far.qcow2").status == .status(0))
        let cut = try image("check --data-file disk.data far.qcow2")
        #expect(cut.status == .status(2) && cut.output.contains("beyond the end of the data file"), "\(cut)")
    }
}

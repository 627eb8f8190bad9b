// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// What `swkvm image` refuses: one message, a status, and nothing is left behind.
@Suite(.timed) struct ImageRefusalTests: ImageCommandSuite {
    let directory: TemporaryDirectory

    init() throws { directory = try Self.makeDirectory() }

    @Test func badFiles() throws {
        try expectRefused("convert none.raw new.qcow2", "none.raw\": open: No such file or directory")
        try expectRefused("convert disk.raw none/new.qcow2", "none/new.qcow2\": open: No such file or directory")
        try expectRefused("convert disk.raw disk.raw", "it already exists; --force overwrites it")
        try expectRefused(
            "convert --force disk.raw disk.raw", "it is the same file as the source \"disk.raw\"; name another file")
        try expectRefused(
            "convert --target-format raw --force disk.raw /dev/stdout", "neither a regular file nor a block device")
        // A backing file that its overlay would overwrite.
        try shell("cd '\(directory.path)' && qemu-img create -q -f qcow2 -b disk.raw -F raw over.qcow2")
        try expectRefused("convert --force over.qcow2 disk.raw", "it is the same file as the source")
        try expectRefused("convert --no-backing over.qcow2 new.raw", "backing file")
    }

    /// Another command line is what is wanted: the status of wrong usage, whichever part of the program finds out.
    @Test func wrongValues() throws {
        func expectWrong(_ arguments: String, _ sentence: String) throws {
            try expectRefused(arguments, sentence, status: 64)
        }
        // The hint names the right option.
        func unknown(_ option: String) -> String {
            "its file name does not determine the format; specify \(option) raw, \(option) qcow2 …\n"
        }
        try expectWrong("convert disk.raw new", unknown("--target-format"))
        try expectWrong("convert nameless new.qcow2", unknown("--format"))
        try expectWrong("compare disk.raw nameless", unknown("--second-format"))
        try expectWrong("create --backing nameless new.qcow2", unknown("--backing-format"))
        for verb in ["check", "info", "map", "commit", "resize --shrink", "snapshot list", "bench"] {
            try expectWrong("\(verb) nameless\(verb.hasPrefix("resize") ? " 1M" : "")", unknown("--format"))
        }
        for size in ["3k", "0", "256", "4M"] {
            try expectWrong("create --cluster-size \(size) new.qcow2 1M", "expected a power of two from 512 to 2097152")
            try expectWrong("convert -o cluster_size=\(size) disk.raw new.qcow2", "expected a power of two")
        }
        for bits in [0, 3, 128] {
            try expectWrong("create --refcount-bits \(bits) new.qcow2 1M", "1, 2, 4, 8, 16, 32 or 64 are possible")
        }
        try expectWrong("create --compat 0.10 --lazy-refcounts new.qcow2 1M", "version 2 (compat 0.10) has no")
        try expectWrong("create --extended-l2 --cluster-size 4k new.qcow2 1M", "subclusters require clusters of 16384")
        try expectWrong("create --preallocation metadata new.raw 1M", "a raw image has no metadata")
        try expectWrong("create --subformat streamOptimized new.vdi 1M", "has no subformat streamOptimized")
        try expectWrong("create --backing disk.raw new.raw", "a raw image has no backing file")
        try shell("printf secret >'\(directory("key"))'")
        try expectWrong("create --key-file key new.qcow2 1M", "a key requires --encrypt")
        try expectWrong("create --encrypt new.qcow2 1M", "--encrypt requires exactly one key")
        try expectWrong("create --encrypt --key-file key --iterations 1 new.qcow2 1M", "iterations for a password")
        try expectWrong("create new.qcow2 4611686018427387905", "a disk has 4611686018427387904 at most")
        try expectWrong("create new.qcow2 -- -1", "")
        try expectWrong("create new.qcow2", "its size is missing")
        try expectWrong("create new.vhd 1M", "VHD images cannot be created")
        try expectWrong("convert disk.raw", "")
        try expectWrong("convert --compress disk.raw new.raw", "raw images are not compressed")
        try expectWrong("convert --compress --compression-level 10 disk.raw new.qcow2", "zlib has 1 to 9")
        try expectWrong("convert -m 0 disk.raw new.qcow2", "0 threads; 1 to 64 are possible")
        try expectWrong("bench --depth 0 disk.raw", "expected a whole number, 1 to 4096")
        try expectWrong("bench --depth 4097 disk.raw", "expected a whole number, 1 to 4096")
        try expectWrong("bench --buffer-size 65M disk.raw", "expected a size from 1 to 64M")
        try expectWrong("bench --buffer-size 0 disk.raw", "expected a size from 1 to 64M")
    }

    /// A file size limit that is reached at different points, like a full file system.
    @Test func noSpace() throws {
        for blocks in [0, 8, 100, 1000, 4000] {
            let limits = "ulimit -f \(blocks);"
            for arguments in [
                "convert disk.raw new.qcow2", "convert --compress disk.raw new.qcow2", "convert disk.raw new.raw",
                "create --preallocation full new.raw 8M",
            ] {
                try expectRefused(arguments, "File too large", limits: limits)
            }
        }
    }

    @Test(.enabled(if: geteuid() == 0, "a file system of its own needs root")) func fullFileSystem() throws {
        let mount = directory("full")
        try shell("mkdir '\(mount)' && mount -t tmpfs -o size=2M tmpfs '\(mount)'")
        defer { _ = try? shell("umount '\(mount)'") }
        for arguments in [
            "convert disk.raw full/new.qcow2", "convert disk.raw full/new.raw",
            "create --preallocation falloc full/new.raw 8M",
        ] {
            try expectRefused(arguments, "No space left on device")
            #expect(try shell("ls -A '\(mount)'").isEmpty)
        }
    }

    /// Files that the user may not read or write; run as nobody, since root may.
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
            ("info secret.qcow2", "secret.qcow2\": open: Permission denied"),
            ("check secret.qcow2", "open: Permission denied"), ("map mine/disk.raw", "open: Permission denied"),
            ("convert secret.qcow2 all/new.raw", "secret.qcow2\": open: Permission denied"),
            ("convert all/over.qcow2 all/new.raw", "backing file: disk"),
            ("convert disk.raw new.qcow2", "new.qcow2\": open: Permission denied"),
            ("convert disk.raw new.vmdk --subformat monolithicFlat", "open: Permission denied"),
            ("create new.qcow2 1M", "open: Permission denied"), ("create mine/new.qcow2 1M", "open: Permission denied"),
            ("create --force all/theirs.raw 1M", "open: Permission denied"),
            ("check --repair all only.qcow2", "open: Permission denied"),
            ("resize only.qcow2 2M", "open: Permission denied"),
            ("snapshot create only.qcow2 a", "open: Permission denied"),
            ("rebase --unsafe --no-backing only.qcow2", "open: Permission denied"),
            ("commit --backing-dir . all/over.qcow2", "Permission denied"),
            ("bench --write only.qcow2", "open: Permission denied"),
        ] {
            let program = try Program([
                "sh", "-c", "cd '\(directory.path)' && exec \(nobody) all/swkvm image \(arguments)",
            ])
            let status = try program.waitForEnd(), errors = program.errors.text
            // One line, and no file is created.
            #expect(
                status == .status(1) && errors.hasPrefix("swkvm: ") && (sentence.isEmpty || errors.contains(sentence))
                    && errors.split(separator: "\n").count == 1, "\(arguments): \(status) \(errors)")
            #expect(try directory.contents == before, "\(arguments)")
        }
        // Files that can be read are used.
        #expect(
            try shell(
                "cd '\(directory.path)' && \(nobody) all/swkvm image check only.qcow2 && \(nobody) all/swkvm image convert only.qcow2 all/new.vdi"
            ).contains("No errors"))
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
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import TestSupport
import Testing

@testable import FileSystems

/// File systems that Debian's tools made, compared with what was put into them.
@Suite(.timed) struct FileSystemTests {
    private let directory = TemporaryDirectory()

    /// Small and large files, holes, links, long names, and a directory that needs an index.
    private static let tree = """
        mkdir -p tree/a/b/c tree/many && cd tree
        printf 'hello\\n' >small && : >empty && head -c 100 /dev/urandom >inline && head -c 700000 /dev/urandom >large
        truncate -s 2M sparse && printf x | dd of=sparse bs=1 seek=1300000 conv=notrunc status=none
        ln -s small link && ln -s /a/b up && ln -s "$(printf 'x%.0s' $(seq 80))" long && ln -s ../../large a/b/relative
        printf deep >a/b/c/deep && for i in $(seq 300); do echo $i >"many/a file with a longer name, number $i"; done
        cd ..

        """

    @Test(arguments: [
        "-t ext2", "-t ext3", "-b 4096", "-b 1024", "-O ^metadata_csum,^64bit,uninit_bg", "-O inline_data -I 256",
        "-O bigalloc", "-O meta_bg,^resize_inode -b 1024 -g 1024", "-O metadata_csum_seed,sparse_super2",
        "-b 2048 -I 128",
    ])
    func extFileSystems(options: String) throws {
        // mke2fs gives a sparse file a wrong size where there is inline data.
        let isInline = options.hasPrefix("-O inline")
        directory.shell(
            Self.tree + (isInline ? "rm tree/sparse\n" : "")
                + "truncate -s 16M disk && mkfs.ext4 -q -F \(options) -L name -d tree disk 2>log || { cat log; false; }"
        )
        let disk = try DiskContents(directory.disk("disk"))
        let fileSystem = try disk.fileSystem(partition: nil)
        #expect(fileSystem.label == "name")
        #expect(fileSystem.kind == (options == "-t ext2" ? "ext2" : options == "-t ext3" ? "ext3" : "ext4"))
        var extraction = FileExtraction(fileSystem)
        try extraction.copy("/", to: directory.path + "/out")
        directory.shell(
            "rmdir out/lost+found && diff -r --no-dereference tree out && [ $(blkid -o value -s UUID disk) = \(fileSystem.uuid ?? "-") ]"
        )
        #expect(try fileSystem.file("/up/relative").size == 700_000)
        #expect(throws: FileSystemError.notFound(path: "/a/x/y", missing: "x")) { try fileSystem.file("/a/x/y") }
        #expect(throws: FileSystemError.notADirectory(path: "/small/x")) { try fileSystem.file("/small/x") }
        #expect(throws: FileSystemError.notAFile(path: "/a")) { try fileSystem.file("/a") }
        // What exists stays.
        #expect(throws: FileSystemError.self) { try extraction.copy("/small", to: directory.path + "/tree/large") }
        directory.shell("[ $(stat -c %s tree/large) = 700000 ]")
    }

    /// Journals that were not replayed, as e2fsck replays them: newer copies, a copy that begins as a block of the
    /// journal does, and blocks whose copies were revoked.
    @Test(arguments: ["-b 4096", "-b 1024", "-O ^64bit,^metadata_csum"], ["jo", "jo -c -v 2", "jo -c -v 3"])
    func journals(options: String, open: String) throws {
        for end in ["jw -r $one\\njw -b $one new\\n", "jw -r $one\\n"] {
            directory.shell(
                """
                rm -rf tree disk copy out replayed && mkdir tree && head -c 100000 /dev/urandom >tree/file
                truncate -s 16M disk && mkfs.ext4 -q -F \(options) -d tree disk
                size=$(dumpe2fs -h disk 2>log | awk '/^Block size/ { print $3 }')
                one=$(debugfs -R 'bmap /file 3' disk 2>log) two=$(debugfs -R 'bmap /file 4' disk 2>log)
                head -c $size /dev/urandom >new
                { cat new; printf '\\300\\073\\071\\230'; head -c $((size - 4)) /dev/zero; } >both
                printf "\(open)\\njw -b $one,$two both\\njc\\n\(open)\\n\(end)jc\\n" >commands
                debugfs -w -f commands disk >log 2>&1 && dumpe2fs -h disk 2>log | grep -q needs_recovery
                cp disk copy && { e2fsck -fy copy >log 2>&1 || [ $? = 1 ]; }
                debugfs -R 'dump /file replayed' copy 2>log && ! cmp -s replayed tree/file
                """)
            let fileSystem = try DiskContents(directory.disk("disk")).fileSystem(partition: nil)
            var extraction = FileExtraction(fileSystem)
            try extraction.copy("/file", to: directory.path + "/out")
            directory.shell("cmp out replayed")
        }
    }

    /// What a journal says is bounded by its number of blocks, not by its size.
    @Test func moreRevocationsThanAreRemembered() throws {
        directory.shell(
            """
            truncate -s 8G disk && mkfs.ext4 -q -F -b 4096 -J size=32 disk
            printf 'jo\\njw -r 2000-1500000\\njc\\n' >commands && debugfs -w -f commands disk >log 2>&1
            dumpe2fs -h disk 2>log | grep -q needs_recovery
            """)
        let error = #expect(throws: FileSystemError.self) {
            _ = try DiskContents(directory.disk("disk")).fileSystem(partition: nil)
        }
        #expect("\(try #require(error))".contains("revocations of more than 1048576 blocks"))
    }

    @Test(arguments: ["3M -F 12", "20M -F 16 -s 1", "40M -F 32 -s 1", "280M -F 32 -s 1 -S 4096"])
    func fatFileSystems(options: String) throws {
        let parts = options.split(separator: " ", maxSplits: 1)
        directory.shell(
            """
            mkdir -p tree/EFI/BOOT tree/sub && head -c 300000 /dev/urandom >tree/EFI/BOOT/BOOTX64.EFI && : >tree/EMPTY
            echo hi >'tree/A long name with späces.conf' && echo x >tree/short.txt
            for i in $(seq 60); do echo $i >"tree/sub/entry number $i.conf"; done
            truncate -s \(parts[0]) disk && mkfs.vfat -n ESP \(parts[1]) disk >log && mcopy -s -i disk tree/* ::/
            """)
        let fileSystem = try DiskContents(directory.disk("disk")).fileSystem(partition: nil)
        #expect(fileSystem.kind == "FAT\(parts[1].split(separator: " ")[1])" && fileSystem.label == "ESP")
        var extraction = FileExtraction(fileSystem)
        try extraction.copy("/", to: directory.path + "/out")
        directory.shell("diff -r tree out && [ $(blkid -o value -s UUID disk) = \(fileSystem.uuid ?? "-") ]")
        #expect(try fileSystem.file("/efi/boot/bootx64.efi").size == 300_000)
    }

    @Test func partitionTables() throws {
        directory.shell(
            """
            truncate -s 40M gpt mbr && mkdir tree && echo hi >tree/file
            printf 'label: gpt\\nstart=2048,size=4M,type=U,name=esp\\nsize=20M,name="root ü"\\nsize=1M' | sfdisk -q gpt
            printf 'label: dos\\nsize=4M,type=ef\\nsize=20M,type=83\\ntype=5\\nsize=3M\\nsize=2M,type=82' | sfdisk -q mbr
            truncate -s 16M system && mkfs.ext4 -q -F -d tree system
            for disk in gpt mbr; do
                start=$(sfdisk -l -o start $disk | tail -n +9 | grep -v Start | sed -n '/^[0-9 ]*$/p' | sed -n 2p)
                dd if=system of=$disk bs=512 seek=$((start)) conv=notrunc status=none
            done
            cp gpt first && dd if=/dev/zero of=first bs=512 seek=1 count=1 conv=notrunc status=none
            cp first none && dd if=/dev/zero of=none bs=512 seek=$((40 * 2048 - 1)) count=1 conv=notrunc status=none
            """)
        let gpt = try DiskContents(directory.disk("gpt")), mbr = try DiskContents(directory.disk("mbr"))
        let first = try #require(gpt.table), second = try #require(mbr.table)
        #expect(first.kind == .gpt && first.partitions.map(\.number) == [1, 2, 3] && first.note == nil)
        #expect(first.partitions[0].isEFISystem && first.partitions[1].name == "root ü")
        #expect(first.partitions.map(\.size) == [4 << 20, 20 << 20, 1 << 20] && first.partitions[0].start == 1 << 20)
        #expect(second.kind == .mbr && second.partitions.map(\.number) == [1, 2, 5, 6])
        #expect(second.partitions.map(\.size) == [4 << 20, 20 << 20, 3 << 20, 2 << 20])
        #expect(second.partitions.map(\.type) == ["0xef", "0x83", "0x83", "0x82"])
        for disk in [gpt, mbr] {
            #expect(try disk.fileSystem(partition: nil).file("/file").size == 3)
            #expect(try disk.fileSystem(partition: 2).kind == "ext4")
            #expect(throws: FileSystemError.noFileSystem(found: [])) { try disk.fileSystem(partition: 1) }
            #expect(throws: FileSystemError.self) { try disk.fileSystem(partition: 9) }
        }
        let backup = try #require(try PartitionTable(directory.disk("first")))
        #expect(backup.partitions == first.partitions && backup.note != nil)
        #expect(throws: FileSystemError.self) { try PartitionTable(directory.disk("none")) }
    }

    /// What is not read has a name, where it has one.
    @Test(arguments: [
        (0, "XFSB", "XFS"), (0x10040, "_BHRfS_M", "btrfs"), (0, "LUKS", "LUKS"), (0x218, "LVM2 001", "LVM"),
    ])
    func otherFileSystems(offset: Int, magic: String, name: String) throws {
        var bytes = [UInt8](repeating: 0, count: 1 << 20)
        bytes.replaceSubrange(offset..<offset + magic.utf8.count, with: magic.utf8)
        let disk = try DiskContents(MemorySource(bytes: bytes))
        #expect(throws: FileSystemError.noFileSystem(found: [name])) { try disk.fileSystem(partition: nil) }
        #expect(throws: FileSystemError.self) { try BootMenu(disk) }
    }

    /// Images that were changed at random or cut: an answer, or an error, after a bounded time.
    @Test(arguments: [
        "mkfs.ext4 -q -F -b 1024 -O ^metadata_csum,^has_journal,inline_data -I 256 -N 64 -d tree disk 600",
        "mkfs.ext4 -q -F -b 1024 -O ^has_journal -N 64 -d tree disk 600",
        "mkfs.ext4 -q -F -t ext2 -b 1024 -N 64 -d tree disk 600",
        "truncate -s 600k disk && mkfs.vfat disk >log && mcopy -s -i disk tree/* ::/",
        """
        mkfs.ext4 -q -F -b 1024 -O ^metadata_csum -N 64 -J size=1 -d tree disk 2000
        printf 'jo\\njw -b 5 small\\njc\\njo\\njw -r 700\\njc\\n' >commands && debugfs -w -f commands disk >log 2>&1
        """,
    ])
    func hostileImages(script: String) throws {
        directory.shell(
            """
            mkdir -p tree/a/b tree/boot/grub && head -c 1024 /dev/urandom >small && cp small tree/a/b/file
            for i in $(seq 20); do echo $i >tree/a/"a long name, number $i"; done; ls -R / 2>/dev/null | head -c 90000 >tree/large || true
            printf 'menuentry a { linux /a/b/file x; }' >tree/boot/grub/grub.cfg

            """ + script)
        let image = try directory.disk("disk").bytes
        try visit(MemorySource(bytes: image))
        // Metadata comes first, and is where changes matter.
        let hot = (0..<image.count).filter { image[$0] != 0 && $0 < 40_000 }
        var generator = SeededGenerator(seed: 7)
        var failures = 0
        for round in 0..<150 {
            var bytes = image
            for _ in 0...generator.below(6) {
                let place = hot[Int(generator.below(UInt64(hot.count)))]
                bytes[place] = generator.chance(30) ? 0xff : UInt8(truncatingIfNeeded: generator.next())
            }
            if round % 10 == 0 { bytes.removeLast(Int(generator.below(UInt64(bytes.count)))) }
            do throws(FileSystemError) { try visit(MemorySource(bytes: bytes)) } catch { failures += 1 }
        }
        #expect(failures > 0)
    }
}

// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

/// A disk that boots by its own files, and the files of one that does not run.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct DiskBootTests {
    private let directory: TemporaryDirectory
    private let disk: String

    private static let path = "export PATH=$PATH:/usr/sbin:/sbin\n"

    /// A disk with a GPT and ext4, whose first entry prints its command line and powers off; the second one is the
    /// bundled guest.
    init() throws {
        directory = try TemporaryDirectory()
        disk = directory("disk.raw")
        let printer = try directory.write(TinyKernel.elf(TinyKernel.commandLinePrinter), to: "printer")
        let configuration = """
            set default=0
            menuentry 'One' --id one { linux /boot/printer from=grub ro }
            menuentry 'Two' --id two { linux /boot/guest from=two }
            """
        let file = try directory.write(configuration.utf8, to: "grub.cfg")
        _ = try shell(
            Self.path + """
                cd '\(directory.path)' && mkdir -p tree/boot/grub tree/etc && cp '\(printer)' '\(Host.guestKernel)' tree/boot
                mv tree/boot/guest.elf tree/boot/guest && cp '\(file)' tree/boot/grub && echo text >tree/etc/file
                truncate -s 16M system && mkfs.ext4 -q -F -d tree system && truncate -s 24M disk.raw
                printf 'label: gpt\\nstart=2048,size=16M' | sfdisk -q disk.raw
                dd if=system of=disk.raw bs=1M seek=1 conv=notrunc status=none
                qemu-img convert -f raw -O qcow2 disk.raw disk.qcow2
                """)
    }

    private func contents(_ path: String) throws -> [UInt8] { try readFile(path, limit: 1 << 30) }

    @Test func anImageBootsAndStaysAsItIs() throws {
        let image = directory("disk.qcow2"), before = try contents(image)
        let machine = try Program.machine([image, "--mem", "64M", "--net", "none", "--append", "more words"])
        try machine.expectEnd(0)
        #expect(machine.output.text == "console=ttyS0 from=grub ro more words", "\(machine.story)")
        // What the guest writes is gone with it.
        let guest = try Program.machine([
            image, "--mem", "64M", "--net", "none", "--boot", "2", "--append", "test=disk",
        ])
        try guest.expectEnd(0)
        #expect(guest.output.text.contains("vda"), "\(guest.story)")
        #expect(try contents(image) == before)
        // Another kernel, with the image as its disk.
        let other = try Program.machine([image, "--kernel", directory("printer"), "--cmdline", "mine"])
        try other.expectEnd(0)
        #expect(other.output.text == "console=ttyS0 mine")
    }

    /// With passt, without it, on a host that leads nowhere, and as the user says.
    @Test func anImageHasTheUsersNetwork() throws {
        let host = try Namespace(), isolated = try Namespace()
        try host.shell(
            """
            ip link add out0 type veth peer name out1; ip link set out0 up; ip link set out1 up
            ip addr add 198.51.100.2/24 dev out0; ip route add default via 198.51.100.1 dev out0
            """)
        let end = ". Choose one with --net, or --net none"
        let none = "swkvm: notice: net0: the guest has no network interface: "
        for (arguments, path, namespace, count, line) in [
            ([], nil, host, 1, nil), (["--net", "none"], nil, host, 0, nil),
            (["--net", "tap=tap0"], nil, isolated, 1, nil),
            (
                [], "/nonexistent", host, 0,
                none + "passt is not installed, which --net user needs: apt install passt" + end
            ),
            (
                [], nil, isolated, 0,
                none
                    + "passt found no network interface of this host with a default route: connect the host to a network, or give --net tap= or --net none"
                    + end
            ),
        ] as [([String], String?, Namespace, Int, String?)] {
            let machine = try Program(
                withoutNATPrograms + (path.map { ["env", "PATH=\($0)"] } ?? []) + [
                    Host.swkvm, "run", disk, "--boot", "2", "--mem", "64M",
                ]
                    + arguments, input: .pipe, in: namespace)
            try machine.wait(for: Program.prompt)
            #expect(
                machine.output.text.contains("1 disk, \(count) network interface\(count == 1 ? "" : "s")"),
                "\(machine.story)")
            try machine.powerOff()
            #expect(machine.errors.lines == (line.map { [$0] } ?? []), "\(machine.story)")
        }
        // For root, a network of the host is the default.
        let home = directory("home")
        try shell("chmod 755 '\(directory.path)'; mkdir -m 755 '\(home)'")
        let machine = try Program(
            ["env", "SWKVM_HOME=\(home)", Host.swkvm, "run", disk, "--boot", "2", "--mem", "64M"], input: .pipe,
            in: isolated)
        try machine.wait(for: Program.prompt)
        #expect(try machine.ask("net eth0 dhcp").first?.contains("gateway 10.213.0.1") == true, "\(machine.story)")
        try machine.powerOff()
        #expect(
            machine.errors.lines.last
                == "swkvm: notice: net0: the guest is in the network default of this host (--net nat); choose another one with --net",
            "\(machine.story)")
        #expect(try eventually { try isolated.linkNames() == [] })
        // Another kernel than the disk's, and a disk that is not the IMAGE, have none by themselves.
        for arguments in [[disk, "--kernel", "bundled"], ["--disk", disk, "--boot", "2"]] {
            let machine = try Program.machine(arguments + ["--mem", "64M"], input: .pipe, in: host)
            try machine.wait(for: Program.prompt)
            #expect(machine.output.text.contains("1 disk, 0 network interfaces"), "\(machine.story)")
            try machine.powerOff()
        }
    }

    @Test func aDiskOfTheMachineBoots() throws {
        let machine = try Program.machine(["--disk", disk, "--boot", "one", "--cmdline", "instead", "--mem", "64M"])
        try machine.expectEnd(0)
        #expect(machine.output.text == "console=ttyS0 instead", "\(machine.story)")
        let list = try Program.machine(["--disk", disk, "--boot", "list"])
        try list.expectEnd(0)
        #expect(
            list.output.lines == [
                "* 1  One  (/boot/printer, /boot/grub/grub.cfg in partition 1)",
                "  2  Two  (/boot/guest, /boot/grub/grub.cfg in partition 1)",
            ])
    }

    /// The entry is read anew at each reboot.
    @Test func aRebootBootsWhatTheDiskHasThen() throws {
        // The same length, in the same blocks.
        _ = try shell("cd '\(directory.path)' && sed -i 's/set default=0/set default=1/' disk.raw")
        let guest = try Program.machine(
            ["--disk", disk, "--boot", "default", "--mem", "64M"], input: .pipe)
        try guest.wait(for: Program.prompt)
        let place = try contents(disk).firstRange(of: "set default=1").lowerBound
        let file = try FileDescriptor.open(disk, O_WRONLY)
        let text = Array("set default=0".utf8)
        #expect(try text.withUnsafeBytes { try file.write($0, at: UInt64(place)) } == text.count)
        try guest.type("reboot\n")
        try guest.wait(for: "from=grub ro")
        try guest.expectEnd(0)
    }

    @Test func whatDoesNotBootIsOneSentence() throws {
        func expect(_ arguments: [String], _ sentence: String, _ status: Int32 = 66) throws {
            let machine = try Program.machine(arguments + ["--mem", "64M"])
            #expect(try machine.waitForEnd() == .status(status), "\(machine.story)")
            #expect(machine.errors.text.contains(sentence) && machine.errors.lines.count == 1, "\(machine.story)")
        }
        let empty = try directory.write([UInt8](repeating: 0, count: 1 << 20), to: "empty.raw")
        try expect(
            [empty], "\(empty) cannot be booted: no kernel was found: the disk has no file system that swkvm reads")
        _ = try shell(
            Self.path + """
                cd '\(directory.path)' && truncate -s 2M table.raw
                printf 'label: gpt\\nstart=64,size=64' | sfdisk -q table.raw
                """)
        try expect(
            [directory("table.raw")], "syslinux.cfg and vmlinuz in unknown contents in partition 1"
        )
        try expect([disk, "--boot", "3"], "there is no boot entry 3: the disk has 2, see --boot list", 64)
        try expect([directory("none.raw")], "No such file")
        _ = try shell(
            """
            cd '\(directory.path)' && cp disk.raw damaged.raw && truncate -s 20M damaged.raw
            printf '\\377' | dd of=damaged.raw bs=1 seek=600 conv=notrunc status=none
            """)
        try expect([directory("damaged.raw")], "the partition table (GPT) is damaged: its primary header: ")
        _ = try shell("cd '\(directory.path)' && sed 's/printer from/missing from/' disk.raw >missing.raw")
        try expect([directory("missing.raw")], "/boot/missing does not exist")
        try expect(["--boot", "list"], "requires a disk", 64)
        try expect([disk, "--boot", "1", "--kernel", "k"], "cannot be combined", 64)
    }

    @Test func filesOfAnImage() throws {
        func image(_ arguments: String...) throws -> Program {
            let program = try Program([Host.swkvm, "image"] + arguments)
            try program.waitForEnd()
            return program
        }
        let qcow2 = directory("disk.qcow2")
        #expect(try image("ls", qcow2).output.lines.last?.hasPrefix("1          16 MiB  ext4") == true)
        #expect(try image("ls", qcow2, "/boot").output.lines == ["grub", "guest", "printer"])
        #expect(try image("ls", "-l", qcow2, "/etc").output.text.hasPrefix("-rw-r--r--            5 "))
        #expect(try image("cat", "--partition", "1", qcow2, "/etc/file").output.text == "text\n")
        #expect(try image("cp-out", qcow2, "/boot", directory("out")).output.text == "")
        _ = try shell("cd '\(directory.path)' && diff -r tree/boot out")
        let refused = try image("cp-out", qcow2, "/etc/file", directory("grub.cfg"))
        #expect(refused.errors.lines == ["swkvm: \(qcow2): cannot write \(directory("grub.cfg")): File exists"])
        #expect(try image("cat", qcow2, "/nothing").errors.text == "swkvm: \(qcow2): /nothing does not exist\n")
    }
}

extension [UInt8] {
    fileprivate func firstRange(of text: String) throws -> Range<Int> {
        let wanted = Array(text.utf8)
        let start = try #require(indices.first { self[$0...].starts(with: wanted) })
        return start..<start + wanted.count
    }
}

// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import HostNetwork
import Linux
import TestSupport
import Testing

/// What a user can get wrong, and what a host can lack: one sentence on standard error, a status that tells, and
/// nothing left behind.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct BadInputTests {
    private let directory: TemporaryDirectory
    private let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

    private enum Status { static let usage: Int32 = 64, input: Int32 = 66, host: Int32 = 71 }

    /// Runs a machine that cannot be, with a console's socket, a bridge and a TAP that would be made for it.
    /// - Parameter sentence: how the only line on standard error begins, after the program's name.
    private func expectRefused(
        _ arguments: [String], _ sentence: String, status: Int32 = Status.host, withNetwork: Bool = true,
        passing: [(descriptor: Int32, number: Int32)] = [], sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        let network = withNetwork ? ["--net", "tap=left0,bridge=left1,create"] : []
        let filesBefore = try directory.contents
        let linksBefore = try host.linkNames()
        let machine = try Program.machine(
            arguments + network + ["--console", "unix:" + directory("left.socket")], in: host, passing: passing)
        try machine.expectEnd(status, sourceLocation: sourceLocation)
        expectSentence(machine, sentence, sourceLocation: sourceLocation)
        #expect(try directory.contents == filesBefore, sourceLocation: sourceLocation)
        #expect(try eventually { try host.linkNames() == linksBefore }, sourceLocation: sourceLocation)
    }

    private func expectSentence(_ machine: Program, _ sentence: String, sourceLocation: SourceLocation) {
        #expect(machine.output.bytes.isEmpty, sourceLocation: sourceLocation)
        #expect(
            machine.errors.text.hasPrefix("swkvm: " + sentence), "\(machine.errors.text)",
            sourceLocation: sourceLocation)
        #expect(machine.errors.lines.count == 1, "\(machine.errors.text)", sourceLocation: sourceLocation)
        #expect(machine.errors.text.hasSuffix("\n"), sourceLocation: sourceLocation)
    }

    // MARK: Kernel

    @Test func kernelMissing() throws {
        try expectRefused(
            ["--kernel", directory("none")], "cannot read \(directory("none")): No such file or directory",
            status: Status.input)
    }

    @Test func kernelIsADirectory() throws {
        try expectRefused(["--kernel", directory.path], "cannot read \(directory.path): ", status: Status.input)
    }

    /// Wherever it is cut.
    @Test func kernelTruncated() throws {
        let whole = try readFile(Host.guestKernel, limit: 16 << 20)
        for size in [whole.count - whole.count / 3, whole.count / 2, 4096, 200, 100, 63, 20] {
            let kernel = try directory.write(whole[..<size], to: "kernel")
            try expectRefused(["--kernel", kernel], "\(kernel) is ", status: Status.input)
        }
    }

    @Test func kernelEmpty() throws {
        let kernel = try directory.write([], to: "kernel")
        try expectRefused(
            ["--kernel", kernel], "\(kernel) is not a kernel: expected an ELF file or a Linux bzImage",
            status: Status.input)
    }

    @Test func kernelForAnotherProcessor() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf, machine: 183), to: "kernel")
        try expectRefused(
            ["--kernel", kernel], "\(kernel) is an ELF for AArch64 (machine 183); expected x86-64 (machine 62)",
            status: Status.input)
    }

    @Test func kernelIsNoELF() throws {
        let kernel = try directory.write(
            Array("#!/bin/sh\n".utf8) + [UInt8](repeating: 0x20, count: 5000), to: "kernel")
        try expectRefused(
            ["--kernel", kernel], "\(kernel) is not a kernel: expected an ELF file or a Linux bzImage",
            status: Status.input)
    }

    @Test func kernelLargerThanTheMemory() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf, memorySize: 1 << 30), to: "kernel")
        try expectRefused(
            ["--kernel", kernel, "--mem", "64M"], "\(kernel) does not fit in the guest's memory", status: Status.usage)
    }

    @Test func kernelWhereThePlatformIs() throws {
        let kernel = try directory.write(TinyKernel.elf(TinyKernel.deaf, address: 0x9000), to: "kernel")
        try expectRefused(["--kernel", kernel], "\(kernel) needs ", status: Status.input)
    }

    @Test func initrdMissing() throws {
        try expectRefused(
            ["--kernel", Host.guestKernel, "--initrd", directory("none")],
            "cannot read \(directory("none")): No such file or directory",
            status: Status.input)
    }

    @Test func initrdLargerThanTheMemory() throws {
        try shell("truncate -s 100M '\(directory("initrd"))'")
        try expectRefused(
            ["--kernel", Host.guestKernel, "--initrd", directory("initrd"), "--mem", "64M"],
            "the initrd \(directory("initrd")) of \(100 << 20) bytes does not fit", status: Status.usage)
    }

    @Test func commandLineTooLong() throws {
        try expectRefused(
            ["--cmdline", String(repeating: "x", count: 70_000)], "the kernel's command line has ", status: Status.usage
        )
    }

    // MARK: Memory and CPUs

    @Test func memoryLargerThanTheHosts() throws {
        let size = Host.memorySize >> 30 + 1000
        try expectRefused(["--mem", "\(size)G"], "\(size) GiB of guest memory exceeds what this host has")
        for size in ["16777215T", "17179869183G"] { try expectRefused(["--mem", size], "") }
    }

    @Test func memoryOfSizeZero() throws {
        try expectRefused(["--mem", "0"], "guest memory cannot be 0 bytes", status: Status.usage)
    }

    @Test func memoryThatIsNoMultipleOfItsPages() throws {
        try expectRefused(
            ["--mem", "67108865"], "67108865 bytes of guest memory is not a multiple of its 4 KiB pages",
            status: Status.usage)
        try expectRefused(
            ["--mem", "65M", "--hugepages"], "\(65 << 20) bytes of guest memory is not a multiple of its 2 MiB pages",
            status: Status.usage)
    }

    @Test(arguments: ["", "M", "-1", "1.5", "12X", "0x10", "99999999999999999999", "16777216T", " 1G"])
    func memorySizeThatIsNone(size: String) throws {
        try expectRefused(["--mem=\(size)"], "", status: Status.usage)
    }

    @Test func tooFewHugePages() throws {
        let pool = try HugePagePool(.twoMiB, free: 0)
        let (available, total) = (try pool.available, try pool.total)
        let pages = available + 512
        try expectRefused(["--mem", "\(pages * 2)M", "--hugepages"], "")
        let machine = try Program.machine(["--mem", "\(pages * 2)M", "--hugepages"])
        try machine.expectEnd(71)
        #expect(
            machine.errors.text.contains(
                "needs \(pages) huge pages, \(available) are free: `sysctl vm.nr_hugepages=\(total + 512)`"))
        #expect(try pool.available == available && pool.total == total)
    }

    @Test func numbersOfCPUs() throws {
        try expectRefused(["--cpus", "0"], "0 vCPUs were requested, a machine needs at least 1", status: Status.usage)
        try expectRefused(["--cpus=-1"], "-1 vCPUs were requested, a machine needs at least 1", status: Status.usage)
        try expectRefused(["--cpus", "5000"], "5000 vCPUs were requested, but this host's KVM allows ")
        try expectRefused(["--cpus", "9223372036854775807"], "9223372036854775807 vCPUs were requested")
        try expectRefused(["--cpus", "two"], "", status: Status.usage)
    }

    // MARK: Disks

    @Test func diskMissing() throws {
        try expectRefused(
            ["--disk", directory("none.raw")], "disk \"\(directory("none.raw"))\": open: No such file or directory",
            status: Status.input)
    }

    @Test func diskThatIsADirectory() throws {
        try expectRefused(
            ["--disk", directory.path + ",format=raw"], "disk \"\(directory.path)\": ", status: Status.input)
    }

    @Test func diskOfUnknownFormat() throws {
        let disk = try directory.write([0], to: "disk")
        try expectRefused(
            ["--disk", disk], "disk \"\(disk)\": its file name does not determine the format", status: Status.usage)
        try expectRefused(["--disk", disk + ",format=qed"], "", status: Status.usage)
    }

    @Test func diskThatIsNotQCOW2() throws {
        let disk = try directory.write([UInt8](repeating: 0x41, count: 70_000), to: "disk.qcow2")
        try expectRefused(
            ["--disk", disk + ",ro"], "disk \"\(disk)\": not a qcow2 image: starts with \"AAAA\"", status: Status.input)
        try directory.write([], to: "disk.qcow2")
        try expectRefused(
            ["--disk", disk + ",ro"], "disk \"\(disk)\": not a qcow2 image: starts with nothing (an empty file)",
            status: Status.input)
    }

    /// Wherever it is cut.
    @Test func diskTruncated() throws {
        let disk = directory("disk.qcow2")
        try shell("qemu-img create -q -f qcow2 '\(disk)' 64M; qemu-io -f qcow2 -c 'write -P 7 0 1M' '\(disk)'")
        let whole = try readFile(disk, limit: 16 << 20)
        for size in [50, 71, 104, 4096, 65536, 196_608] {
            try directory.write(whole[..<size], to: "disk.qcow2")
            try expectRefused(["--disk", disk + ",ro"], "disk \"\(disk)\": ", status: Status.input)
        }
    }

    @Test func diskThatMayNotBeWritten() throws {
        let disk = directory("disk.qcow2")
        // Marked as corrupt: incompatible feature bit 1, in the last byte of the field at 72.
        try shell(
            "qemu-img create -q -f qcow2 '\(disk)' 64M; printf '\\002' | dd of='\(disk)' bs=1 seek=79 conv=notrunc 2>/dev/null"
        )
        try expectRefused(
            ["--disk", disk], "disk \"\(disk)\": it cannot be opened for writing: it is marked as corrupt",
            status: Status.input)
    }

    @Test func diskWhoseBackingFileIsMissing() throws {
        let disk = directory("disk.qcow2")
        try shell(
            "cd '\(directory.path)'; truncate -s 1M base.raw; qemu-img create -q -f qcow2 -b base.raw -F raw disk.qcow2; rm base.raw"
        )
        try expectRefused(["--disk", disk + ",ro"], "disk \"\(disk)\", backing file: disk ", status: Status.input)
    }

    @Test func diskLocked() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let holder = try Program.machineAtPrompt(["--disk", disk])
        try expectRefused(["--disk", disk], "disk \"\(disk)\": another process has it open for writing")
        try holder.powerOff()
    }

    @Test func theSameDiskTwice() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let other = directory("other.raw")
        #expect(link(disk, other) == 0)
        for (second, options) in [(other, ",ro"), (disk, "")] {
            try expectRefused(
                ["--disk", disk, "--disk", second + options],
                "disk \"\(second)\": \"\(second)\" is also used by the disk \"\(disk)\" of the same machine",
                status: Status.usage)
        }
    }

    @Test func tooManyDevices() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 65536), to: "disk.raw")
        let disks = (0..<17).flatMap { _ in ["--disk", disk + ",ro"] }
        try expectRefused(
            disks, "17 disks and other virtio devices were requested, but a machine has 16 slots", status: Status.usage,
            withNetwork: false)
        try expectRefused(
            Array(disks[..<32]), "17 disks and other virtio devices were requested, but a machine has 16 slots",
            status: Status.usage)
        // Sixteen are fine.
        let machine = try Program.machineAtPrompt(Array(disks[..<32]))
        #expect(try machine.ask("disks").count == 16)
        try machine.powerOff()
    }

    // MARK: Network

    @Test func macAddresses() throws {
        for mac in [
            "", "52:54:00:12:34", "52:54:00:12:34:5g", "525400123456", "52:54:00:12:34:56:78", "52:54-00:12:34:56",
        ] {
            try expectRefused(["--net", "tap=tap0,mac=\(mac)"], "", status: Status.usage)
        }
        let machine = try Program.machine(["--net", "tap=tap0,mac=zz"], in: host)
        try machine.expectEnd(Status.usage)
        #expect(machine.errors.text.contains("'zz' is not a MAC address: expected six pairs of hexadecimal digits"))
        let multicast = try Program.machine(["--net", "tap=tap0,mac=01:00:5e:00:00:01"], in: host)
        try multicast.expectEnd(Status.usage)
        #expect(multicast.errors.text.contains("01:00:5e:00:00:01 is a multicast address"))
    }

    @Test func interfaceNames() throws {
        for name in ["", "sixteen-bytes-xx", "with space", "a/b", ".", "..", "per%d"] {
            try expectRefused(["--net", "tap=\(name)"], "", status: Status.usage)
            try expectRefused(["--net", "tap=tap0,bridge=\(name)"], "", status: Status.usage)
        }
        let machine = try Program.machine(["--net", "tap=sixteen-bytes-xx"], in: host)
        try machine.expectEnd(Status.usage)
        #expect(
            machine.errors.text.contains(
                "the interface name 'sixteen-bytes-xx' has 16 bytes, the kernel takes at most 15"))
    }

    @Test func bridges() throws {
        try expectRefused(["--net", "tap=tap0,bridge=none0"], "there is no bridge none0: add `,create`")
        try host.shell("ip link add down0 type bridge; ip link add veth0 type veth peer name veth1")
        try expectRefused(["--net", "tap=tap0,bridge=down0"], "the bridge down0 is down: `ip link set down0 up`")
        try expectRefused(["--net", "tap=tap0,bridge=veth0"], "veth0 exists but is not a bridge (it is of kind veth)")
        try expectRefused(
            ["--net", "tap=tap0,bridge=veth0,create"], "veth0 exists but is not a bridge (it is of kind veth)")
    }

    @Test func taps() throws {
        try host.shell("ip link add veth0 type veth peer name veth1; ip tuntap add tun0 mode tun")
        try expectRefused(["--net", "tap=veth0"], "veth0 exists but is not a TAP (it is of kind veth)")
        try expectRefused(["--net", "tap=tun0"], "tun0 exists but is not a TAP (it is a TUN)")
        try host.shell(
            "ip link add br0 type bridge; ip link add br1 type bridge; ip link set br0 up; ip link set br1 up; ip tuntap add tap0 mode tap; ip link set tap0 master br0"
        )
        try expectRefused(["--net", "tap=tap0,bridge=br1"], "the TAP tap0 is a port of br0, not of br1")
        try expectRefused(
            ["--net", "tap=tap1", "--net", "tap=tap1"],
            "two network interfaces use the TAP tap1: give each a TAP of its own", status: Status.usage)
    }

    @Test func theFirstOfTwoInterfacesIsUndone() throws {
        try expectRefused(
            ["--net", "tap=tap0,bridge=new0,create", "--net", "tap=tap1,bridge=none0"], "there is no bridge none0")
    }

    @Test func descriptorsThatAreNoTAP() throws {
        try expectRefused(["--net", "fd=999"], "descriptor 999 is not open")
        let file = try FileDescriptor.open("/dev/null", O_RDWR)
        try expectRefused(["--net", "fd=9"], "descriptor 9 is not a TAP", passing: [(file.rawValue, 9)])
        try expectRefused(["--net", "fd=0"], "", status: Status.usage)
        try expectRefused(
            ["--net", "fd=9", "--net", "fd=9"], "two network interfaces use the descriptor 9", status: Status.usage)
        try expectRefused(["--net", "fd=-1"], "", status: Status.usage)
        try expectRefused(["--net", "fd=2147483648"], "", status: Status.usage)
        try expectRefused(["--net", "fd=9,bridge=br0"], "", status: Status.usage)
    }

    /// Numbers that were not passed on, some of which swkvm has given to its own descriptors meanwhile.
    @Test func descriptorsThatSwkvmOpenedItself() throws {
        let disk = directory("disk.qcow2")
        try shell(
            "printf secret > '\(directory("key"))'; '\(Host.swkvm)' image create -q --encrypt --iterations 1000 --key-file '\(directory("key"))' '\(disk)' 1M"
        )
        for number in 3...24 {
            for arguments in [["--net", "fd=\(number)"], ["--disk", "\(disk),key-fd=\(number)"]] {
                // Whatever the tests' own runner has passed on is closed first.
                let closing = "for n in {3..63}; do eval \"exec $n>&-\"; done; exec \"$@\""
                let machine = try Program(["bash", "-c", closing, "bash", Host.swkvm, "run"] + arguments, in: host)
                try machine.expectEnd(arguments[0] == "--net" ? Status.host : Status.input)
                let refusals = [
                    "descriptor \(number) is not open", "descriptor \(number) was not passed on",
                    "descriptor \(number): it is not open",
                    "descriptor \(number): it was not passed on",
                ]
                #expect(refusals.contains { machine.errors.text.contains($0) }, "\(machine.errors.text)")
                #expect(machine.errors.lines.count == 1)
            }
        }
    }

    @Test func equalMACAddresses() throws {
        try expectRefused(
            ["--net", "tap=tap0,mac=52:54:00:00:00:01", "--net", "tap=tap1,mac=52:54:00:00:00:01"],
            "two network interfaces have the MAC address 52:54:00:00:00:01: give each one of its own with mac=",
            status: Status.usage)
    }

    // MARK: Options

    @Test(arguments: [
        ["--unknown"], ["argument"], ["--console", "printer"], ["--console", "unix:"], ["--hugepages=4M"],
        ["--log-level", "loud"],
        ["--disk", ""], ["--disk", "a.raw,rw"], ["--disk", "a.raw,queues=0"], ["--disk", "a.raw,queues=65"],
        ["--disk", "a.raw,queues=two"], ["--disk", "a.raw,serial=123456789012345678901"], ["--net", ""],
        ["--net", "bridge=br0"],
        ["--net", "tap=tap0,create"], ["--net", "tap=tap0,mtu=67"], ["--net", "tap=tap0,mtu=many"], ["--mem"],
        // To the parser of single letters these are requests for help; and what other programs have.
        ["-nographic"], ["-machine", "q35"], ["-hda", "disk.raw"], ["-m", "2G", "-smp", "2", "-kernel", "bzImage"],
        ["--ram", "1G"], ["--vcpus=2"],
    ])
    func options(arguments: [String]) throws {
        let machine = try Program([Host.swkvm, "run"] + arguments, in: host)
        try machine.expectEnd(Status.usage)
        #expect(machine.errors.lines.count == 1 && machine.errors.text.hasPrefix("swkvm: "), "\(machine.errors.text)")
        #expect(machine.output.bytes.isEmpty)
    }

    /// As QEMU is called.
    @Test func withoutACommand() throws {
        let machine = try Program([Host.swkvm, "-m", "2G", "-nographic"], in: host)
        try machine.expectEnd(Status.usage)
        #expect(machine.errors.lines.count == 1 && machine.output.bytes.isEmpty)
        #expect(
            machine.errors.text.hasPrefix("swkvm: a machine's options come after `swkvm run`; '-m' is --mem SIZE here"))
    }

    @Test func consoles() throws {
        let taken = try directory.write([1], to: "taken")
        let machines: [([String], String)] = [
            (
                ["--console", "unix:" + taken],
                "the console's socket cannot be \(taken): a file that is not a socket has that name"
            ),
            (
                ["--console", "unix:" + directory("none/socket")],
                "the console \(directory("none/socket")) cannot be opened: No such file"
            ),
            (
                ["--console", "unix:/" + String(repeating: "x", count: 107)],
                "the console's socket has a path of 108 bytes, the limit is 107"
            ),
            (
                ["--console", "file:" + directory.path],
                "the console \(directory.path) cannot be opened: Is a directory"
            ),
        ]
        for (arguments, sentence) in machines {
            let machine = try Program.machine(arguments)
            try machine.expectEnd(arguments[1].contains(taken) ? Status.host : Status.input)
            expectSentence(machine, sentence, sourceLocation: #_sourceLocation)
        }
        #expect(try readFile(taken, limit: 10) == [1])
        #expect(try directory.contents == ["taken"])
    }

    /// A file for the console's output is left as it was by a machine that does not start: absent, or with its
    /// contents.
    @Test func aConsolesFileOfAMachineThatDoesNotStart() throws {
        for (name, before) in [("new.log", nil as [UInt8]?), ("old.log", [1, 2])] {
            if let before { try directory.write(before, to: name) }
            for arguments in [
                ["--kernel", directory("none")], ["--disk", directory("none.raw")], ["--mem", "1000G"],
            ] {
                let machine = try Program.machine(arguments + ["--console", "file:" + directory(name)])
                try machine.expectEnd(arguments[0] == "--mem" ? Status.host : Status.input)
            }
            #expect(try directory.contents.contains(name) == (before != nil))
            if let before { #expect(try readFile(directory(name), limit: 10) == before) }
        }
    }

    /// Also where no image names a file that it would be about.
    @Test func aDirectoryForBackingFilesThatIsMissing() throws {
        let disk = try directory.write([UInt8](repeating: 0, count: 4096), to: "disk.raw")
        try expectRefused(
            ["--disk", "\(disk),backing-dir=\(directory("nowhere"))"],
            "disk \"\(directory("nowhere"))\": open: No such file or directory", status: Status.input)
    }

    // MARK: Rights

    /// Runs swkvm with mounts of its own, which hide or change what is in /dev.
    private func mounted(_ preparation: String, _ command: String) throws -> Program {
        let script = """
            mkdir '\(directory("mnt"))'
            mount -t tmpfs -o mode=755 none '\(directory("mnt"))'
            cd '\(directory("mnt"))'
            cp '\(Host.swkvm)' swkvm
            \(preparation)
            exec \(command)
            """
        return try Program(["unshare", "-m", "sh", "-euc", script], in: host)
    }

    private func expectRefused(
        _ machine: Program, _ sentence: String, sourceLocation: SourceLocation = #_sourceLocation
    ) throws {
        try machine.expectEnd(Status.host, sourceLocation: sourceLocation)
        expectSentence(machine, sentence, sourceLocation: sourceLocation)
        #expect(try eventually { try host.linkNames().isEmpty }, sourceLocation: sourceLocation)
    }

    private static let asNobody =
        "setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set -all --inh-caps -all"
    private static let network = "--net tap=left0,bridge=left1,create"

    @Test func kvmMissing() throws {
        try expectRefused(
            mounted("mount -t tmpfs none /dev", "./swkvm run \(Self.network)"),
            "/dev/kvm does not exist: load the module (`modprobe kvm_intel`")
    }

    @Test func kvmNotReadable() throws {
        try expectRefused(
            mounted("true", "\(Self.asNobody) ./swkvm run \(Self.network)"),
            "/dev/kvm cannot be opened by this user (Permission denied): add the user to the group `kvm`")
    }

    @Test func kvmIsSomethingElse() throws {
        try expectRefused(mounted("touch empty; mount --bind empty /dev/kvm", "./swkvm run"), "")
        try shell("rmdir '\(directory("mnt"))'")
        try expectRefused(mounted("mount --bind /dev/null /dev/kvm", "./swkvm run"), "")
    }

    private static let kvmForAll = "mknod -m 666 kvm c 10 232; mount --bind kvm /dev/kvm; "
    private static let tunForAll = "mknod -m 666 tun c 10 200; mount --bind tun /dev/net/tun; "

    /// A user who may use KVM but not change the network.
    @Test(arguments: [
        (tunForAll, "tap=tap0", "creating the TAP tap0 needs CAP_NET_ADMIN: run as root"),
        (tunForAll, "tap=tap0,bridge=br0,create", "creating the bridge br0 needs CAP_NET_ADMIN: run as root"),
        (
            tunForAll + "ip tuntap add tap0 mode tap user 1; ip link set tap0 up;", "tap=tap0",
            "the TAP tap0 belongs to another user"
        ),
        (
            "mknod -m 600 tun c 10 200; mount --bind tun /dev/net/tun;", "tap=tap0",
            "/dev/net/tun cannot be opened (Permission denied)"
        ),
        ("mount --bind /dev/null /dev/net/tun;", "tap=tap0", "attaching to the TAP tap0 failed"),
        ("mount -t tmpfs none /dev/net;", "tap=tap0", "TAPs are unavailable: /dev/net/tun is missing"),
    ])
    func tapWithoutPermission(preparation: String, net: String, sentence: String) throws {
        let linksKept = preparation.contains("ip tuntap") ? ["tap0"] : []
        let machine = try mounted(Self.kvmForAll + preparation, "\(Self.asNobody) ./swkvm run --net \(net)")
        try machine.expectEnd(Status.host)
        expectSentence(machine, sentence, sourceLocation: #_sourceLocation)
        #expect(try host.linkNames() == linksKept)
    }

    /// The same user has a machine without a network, and one with a TAP that is made for them.
    @Test func anOrdinaryUserHasAMachine() throws {
        let tap = "ip tuntap add tap0 mode tap vnet_hdr user 65534; ip link set tap0 up"
        let machine = try mounted(
            Self.kvmForAll + Self.tunForAll + tap, "\(Self.asNobody) ./swkvm run --net tap=tap0 --cmdline test=irq,cpus"
        )
        try machine.expectSelfTestsPassed()
    }
}

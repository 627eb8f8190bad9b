// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import HostNetwork

@Suite(.timed, .enabled(if: mayMakeNamespaces, rootNeeded)) struct TAPDeviceTests {
    @Test func aCreatedTAPGoesWithItsDescriptor() throws {
        try inNewNamespace { host in
            do {
                let tap = try TAPDevice.create(name("swtap0"))
                #expect(tap.name.text == "swtap0" && tap.headerSize == 12)
                let link = try #require(try host.netlink.link(named: name("swtap0")))
                #expect(link.kind == "tun" && !link.isUp && link.mtu == 1500)
                #expect(
                    link.tun
                        == Link.TUN(
                            isTAP: true, isPersistent: false, hasPacketInformation: false, isMultiQueue: false,
                            queues: 0))
            }
            #expect(try eventually { try host.netlink.link(named: name("swtap0")) == nil })
        }
    }

    @Test func theKernelChoosesAFreeName() throws {
        try inNewNamespace { _ in
            let first = try TAPDevice.create(nil)
            let second = try TAPDevice.create(nil)
            #expect(first.name.text == "swtap0" && second.name.text == "swtap1")
        }
    }

    /// A process that holds the only descriptor is killed: nothing of the TAP stays.
    @Test func killLeavesNoTAP() throws {
        try inNewNamespace { host in
            let child: pid_t
            do {
                let tap = try TAPDevice.create(name("swtap0"))
                child = try spawnSleeper(inheriting: tap.descriptor)
            }
            #expect(try host.netlink.link(named: name("swtap0")) != nil)
            #expect(kill(child, SIGKILL) == 0)
            var status: Int32 = 0
            #expect(unsafe waitpid(child, &status, 0) == child)
            #expect(clinux_wait_signal(status) == SIGKILL)
            #expect(try eventually { try host.netlink.link(named: name("swtap0")) == nil })
        }
    }

    @Test func aPersistentTAPStays() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            let found = try #require(try host.netlink.link(named: name("swtap0")))
            #expect(
                found.tun
                    == Link.TUN(
                        isTAP: true, isPersistent: true, hasPacketInformation: false, isMultiQueue: false, queues: 0))
            do {
                let tap = try TAPDevice.open(found)
                #expect(tap.headerSize == 12)
                #expect((tap.setOffloads([.checksum, .segmentation4])) == true)
            }
            #expect(try host.netlink.link(named: name("swtap0")) == found)
            try TAPDevice.open(found).setPersistent(false)
            #expect(try eventually { try host.netlink.link(named: name("swtap0")) == nil })
        }
    }

    /// Another program finds the header of the size it had.
    @Test func theHeaderSizeIsPutBack() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            _ = try TAPDevice.open(#require(try host.netlink.link(named: name("swtap0"))))
            let other = try openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            var size: Int32 = 0
            try other.ioctl(CLINUX_TUNGETVNETHDRSZ, &size, named: "TUNGETVNETHDRSZ")
            #expect(size == 10)
        }
    }

    @Test(arguments: [0, IFF_MULTI_QUEUE])
    func aBusyTAPIsRefused(_ more: Int32) throws {
        try inNewNamespace { host in
            let other = try openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI | more)
            let link = try #require(try host.netlink.link(named: name("swtap0")))
            let error = failure { () throws(HostNetworkError) in _ = try TAPDevice.open(link) }
            #expect(
                error?.description == "the TAP swtap0 is in use by another process: end that one or name another TAP")
            #expect(
                failure { () throws(HostNetworkError) in _ = try TAPDevice.create(InterfaceName("swtap0")) }
                    == .tapBusy(link.name))
            _ = consume other
        }
    }

    @Test func aMultiQueueTAPIsUsedWithOneQueue() throws {
        try inNewNamespace { host in
            let maker = try openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE)
            try maker.ioctl(CLINUX_TUNSETPERSIST, 1, named: "TUNSETPERSIST")
            _ = consume maker
            let link = try #require(try host.netlink.link(named: name("swtap0")))
            let tap = try TAPDevice.open(link)
            #expect(tap.headerSize == 12)
            #expect(try host.netlink.link(named: tap.name)?.tun?.queues == 1)
            try tap.setPersistent(false)
        }
    }

    /// One that is created, and one that an administrator has created.
    @Test(arguments: [false, true]) func aTAPWithSeveralQueuesBeginsWithOne(isFound: Bool) throws {
        try inNewNamespace { host in
            if isFound {
                let maker = try openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE)
                try maker.ioctl(CLINUX_TUNSETPERSIST, 1, named: "TUNSETPERSIST")
            }
            func attached() throws -> UInt32? { try host.netlink.link(named: name("swtap0"))?.tun?.queues }
            do {
                let found = try host.netlink.link(named: name("swtap0"))
                let tap: TAPDevice
                if let found {
                    tap = try TAPDevice.open(found, queues: 3)
                } else {
                    tap = try TAPDevice.create(name("swtap0"), queues: 3)
                }
                #expect(try tap.queues.count == 3 && attached() == 1)
                for queue in tap.queues { #expect(queue.setAttached(true)) }
                #expect(try attached() == 3)
                // The same again changes nothing.
                for _ in 0..<2 { #expect(tap.queues[2].setAttached(false)) }
                #expect(try attached() == 2)
                #expect((tap.setOffloads([.checksum, .segmentation4])) == true)
            }
            // A process that a test is just starting may have the descriptors for a moment.
            #expect(try eventually { try attached() == (isFound ? 0 : nil) })
        }
    }

    @Test func aTAPWithOneQueueIsRefusedForSeveral() throws {
        try inNewNamespace { host in
            try makePersistentTAP("swtap0")
            let link = try #require(try host.netlink.link(named: name("swtap0")))
            #expect(
                failure { () throws(HostNetworkError) in _ = try TAPDevice.open(link, queues: 2) }?.description
                    == "the TAP swtap0 has one queue, not 2: give queues=1, or recreate it with `ip tuntap add dev swtap0 mode tap multi_queue`"
            )
        }
    }

    @Test func whatIsNoTAPIsRefused() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("swbr0"), kind: "bridge")
            let bridge = try #require(try host.netlink.link(named: name("swbr0")))
            #expect(
                failure { () throws(HostNetworkError) in _ = try TAPDevice.open(bridge) }?.description
                    == "swbr0 exists but is not a TAP (it is of kind bridge): name another interface")
            let tun = try openTUN("tun0", flags: IFF_TUN | IFF_NO_PI)
            let link = try #require(try host.netlink.link(named: name("tun0")))
            #expect(
                failure { () throws(HostNetworkError) in _ = try TAPDevice.open(link) }?.description
                    == "tun0 exists but is not a TAP (it is a TUN): name another interface")
            _ = consume tun
        }
    }

    @Test func withoutTheRightTwoSentencesSayHow() throws {
        try inNewNamespace { host in
            let foreign = try openTUN("theirs", flags: IFF_TAP | IFF_NO_PI)
            try foreign.ioctl(CLINUX_TUNSETOWNER, 12345, named: "TUNSETOWNER")
            try foreign.ioctl(CLINUX_TUNSETPERSIST, 1, named: "TUNSETPERSIST")
            _ = consume foreign
            let link = try #require(try host.netlink.link(named: name("theirs")))
            let creating = failureOnOwnThread({ () throws(HostNetworkError) in
                _ = clinux_drop_thread_capability(CAP_NET_ADMIN)
                _ = try TAPDevice.create(InterfaceName("mine"))
            })
            #expect(
                creating?.description
                    == "creating the TAP mine needs CAP_NET_ADMIN: run as root, or have an administrator create one "
                    + "for this user, `ip tuntap add dev mine mode tap user NAME`")
            let opening = failureOnOwnThread({ () throws(HostNetworkError) in
                _ = clinux_drop_thread_capability(CAP_NET_ADMIN)
                _ = try TAPDevice.open(link)
            })
            #expect(
                opening?.description
                    == "the TAP theirs belongs to another user: run with CAP_NET_ADMIN, or recreate it with "
                    + "`ip tuntap add dev theirs mode tap user NAME`")
        }
    }

    /// A TAP that an administrator made for this user needs no right at all.
    @Test func anOwnTAPNeedsNoRight() throws {
        try inNewNamespace { host in
            let maker = try openTUN("ours", flags: IFF_TAP | IFF_NO_PI)
            try maker.ioctl(CLINUX_TUNSETOWNER, UInt(geteuid()), named: "TUNSETOWNER")
            try maker.ioctl(CLINUX_TUNSETPERSIST, 1, named: "TUNSETPERSIST")
            _ = consume maker
            let link = try #require(try host.netlink.link(named: name("ours")))
            let header = onOwnThread { () throws(HostNetworkError) in
                guard clinux_drop_thread_capability(CAP_NET_ADMIN) == 0 else { return 0 }
                return try TAPDevice.open(link).headerSize
            }
            #expect(header == 12)
        }
    }

    @Test func aMissingDriverFileIsNamed() throws {
        #expect(
            try failureWithDriverFile(mode: nil)
                == "TAPs are unavailable: /dev/net/tun is missing (No such file or directory): load the driver with `modprobe tun`"
        )
    }

    @Test func aDriverFileWithoutPermissionIsNamed() throws {
        #expect(
            try failureWithDriverFile(mode: 0)
                == "/dev/net/tun cannot be opened (Permission denied): give this user read and write permission on it")
    }
}

@Suite(.timed, .enabled(if: mayMakeNamespaces, rootNeeded)) struct InheritedDescriptorTests {
    @Test func aTAPIsTakenOver() throws {
        try inNewNamespace { host in
            let number = try passOn(openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            do {
                let tap = try TAPDevice.inherit(number)
                #expect(tap.name.text == "swtap0" && tap.headerSize == 12 && tap.descriptor == number)
                #expect(fcntl(number, F_GETFD) == FD_CLOEXEC)
                #expect(fcntl(number, F_GETFL) & O_NONBLOCK != 0)
            }
            #expect(try eventually { try host.netlink.link(named: name("swtap0")) == nil })
        }
    }

    @Test func aTAPWithoutHeaderIsTakenOverAsItIs() throws {
        try inNewNamespace { _ in
            let number = try passOn(openTUN("swtap0", flags: IFF_TAP | IFF_NO_PI))
            let tap = try TAPDevice.inherit(number)
            #expect(tap.headerSize == 0)
        }
    }

    @Test func aMacvtapIsTakenOver() throws {
        try inNewNamespace { host in
            try host.netlink.createLink(name("below"), kind: "veth")
            let below = try #require(try host.netlink.link(named: name("below")))
            try host.netlink.createLink(name("swmac0"), kind: "macvtap", parent: below.index)
            let link = try #require(try host.netlink.link(named: name("swmac0")))
            // The kernel puts the device file into /dev by itself; its number is the interface's.
            let descriptor = try FileDescriptor.open("/dev/tap\(link.index)", O_RDWR)
            let tap = try TAPDevice.inherit(passOn(descriptor))
            #expect(tap.name.text == "swmac0" && tap.headerSize == 12)
            #expect((tap.setOffloads([.checksum, .segmentation4, .segmentation6])) == true)
            #expect((tap.setOffloads([])) == true)
        }
    }

    private static let multiQueue = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE

    /// Whatever the state is in which they come.
    @Test func severalQueuesAreTakenOver() throws {
        try inNewNamespace { host in
            let descriptors = try (0..<3).map { _ in try passOn(openTUN("swtap0", flags: Self.multiQueue)) }
            #expect(clinux_tun_use_queue(descriptors[0], 0) == 0 && clinux_tun_use_queue(descriptors[1], 0) == 0)
            let tap = try TAPDevice.inherit(descriptors)
            #expect(tap.queues.map(\.number) == descriptors && tap.headerSize == 12)
            #expect(try host.netlink.link(named: name("swtap0"))?.tun?.queues == 1)
            #expect(tap.queues[1].setAttached(true))
            #expect(try host.netlink.link(named: name("swtap0"))?.tun?.queues == 2)
        }
    }

    @Test func descriptorsThatAreNotQueuesOfOneTAPAreRefused() throws {
        try inNewNamespace { _ in
            func problem(_ numbers: [Int32]) -> String? {
                failure { () throws(HostNetworkError) in _ = try TAPDevice.inherit(numbers) }?.description
            }
            let first = try passOn(openTUN("swtap0", flags: Self.multiQueue))
            let other = try passOn(openTUN("swtap1", flags: Self.multiQueue))
            let problemOfOther = problem([first, other])
            #expect(
                problemOfOther
                    == "descriptor \(other) is not of swtap0, as those before it are: give each interface a --net of its own"
            )
            #expect(problem([first, -1])?.hasPrefix("descriptor -1 is not open") == true)
            // Both are open still; two that are the same queue are not two.
            let copy = dup(first)
            #expect(problem([first, copy])?.contains("is not a queue of its own of swtap0") == true)
            let single = try passOn(openTUN("swtap2", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
            let singleCopy = dup(single)
            #expect(problem([single, singleCopy])?.contains("is not a queue of its own of swtap2") == true)
            #expect(close(other) == 0)
        }
    }

    /// `--net fd=N` given twice, or with the number of a TAP that swkvm has opened itself.
    @Test func aDescriptorHasOneOwner() throws {
        try inNewNamespace { _ in
            func problem(_ number: Int32) -> String? {
                failure { () throws(HostNetworkError) in _ = try TAPDevice.inherit(number) }?.description
            }
            let own = try TAPDevice.create(name("swtap0"))
            let inherited = try TAPDevice.inherit(passOn(openTUN("swtap1", flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)))
            for number in [own.descriptor, inherited.descriptor] {
                #expect(
                    problem(number)
                        == "descriptor \(number) was not passed on by the parent process, or is already in use: give each interface its own"
                )
                #expect(fcntl(number, F_GETFD) == FD_CLOEXEC)
            }
        }
    }

    @Test func othersAreRefusedAndLeftOpen() throws {
        try inNewNamespace { _ in
            func problem(_ number: Int32) -> String? {
                failure { () throws(HostNetworkError) in _ = try TAPDevice.inherit(number) }?.description
            }
            #expect(
                problem(-1) == "descriptor -1 is not open: the parent process must pass it on, without close-on-exec")
            #expect(
                problem(1_000_000)
                    == "descriptor 1000000 is not open: the parent process must pass it on, without close-on-exec")
            // What this process has opened itself is not looked into.
            let own = try FileDescriptor.open("/dev/null", O_RDWR)
            #expect(
                problem(own.rawValue)?.hasPrefix("descriptor \(own.rawValue) was not passed on by the parent process")
                    == true)
            let null = try FileDescriptor(owning: passOn(FileDescriptor.open("/dev/null", O_RDWR)))
            let notATAP = "is not a TAP: open /dev/net/tun with TUNSETIFF, or a macvtap's /dev/tapN"
            #expect(problem(null.rawValue) == "descriptor \(null.rawValue) \(notATAP)")
            let unattached = try FileDescriptor(owning: passOn(FileDescriptor.open("/dev/net/tun", O_RDWR)))
            #expect(problem(unattached.rawValue) == "descriptor \(unattached.rawValue) \(notATAP)")
            let tun = try FileDescriptor(owning: passOn(openTUN("tun0", flags: IFF_TUN | IFF_NO_PI)))
            #expect(
                problem(tun.rawValue)
                    == "descriptor \(tun.rawValue) is a TUN, which carries no Ethernet: open a TAP (IFF_TAP)")
            let packetInformation = try FileDescriptor(owning: passOn(openTUN("tap0", flags: IFF_TAP)))
            #expect(
                problem(packetInformation.rawValue)
                    == "descriptor \(packetInformation.rawValue) is a TAP that puts packet information before each frame: open it with IFF_NO_PI"
            )
            for number in [null.rawValue, unattached.rawValue, tun.rawValue, packetInformation.rawValue] {
                #expect(fcntl(number, F_GETFD) >= 0)
            }
        }
    }
}

/// Starts a process that does nothing but hold a descriptor, in the calling thread's namespace.
private func spawnSleeper(inheriting number: Int32) throws -> pid_t {
    var actions = unsafe posix_spawn_file_actions_t()
    unsafe posix_spawn_file_actions_init(&actions)
    defer { unsafe posix_spawn_file_actions_destroy(&actions) }
    // As descriptor 3 it is without close-on-exec.
    unsafe posix_spawn_file_actions_adddup2(&actions, number, 3)
    var child: pid_t = 0
    let arguments = unsafe [strdup("sleep"), strdup("600"), nil]
    defer { unsafe arguments.forEach { unsafe free($0) } }
    // The argument list ends with nil and lives until the call is back.
    try #require(unsafe posix_spawn(&child, "/bin/sleep", &actions, nil, arguments, nil) == 0)
    return child
}

/// The error that creating a TAP ends with where /dev/net/tun has the given mode, or is missing (nil).
/// The thread that tries it has a directory of its own as root.
private func failureWithDriverFile(mode: mode_t?) throws -> String? {
    let parent = unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? P_tmpdir
    var template = Array("\(parent)/swkvm-test-XXXXXX".utf8CString)
    // The template is NUL-terminated; mkdtemp changes its last six characters. The other calls take Swift strings for
    // their time.
    try #require(unsafe mkdtemp(&template) != nil)
    let root = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    for directory in ["/dev", "/dev/net"] { unsafe mkdir(root + directory, 0o755) }
    // The number of /dev/net/tun: major 10, minor 200.
    if let mode { unsafe mknod(root + "/dev/net/tun", S_IFCHR | mode, 10 << 8 | 200) }
    defer {
        unsafe unlink(root + "/dev/net/tun")
        for directory in ["/dev/net", "/dev", ""] { unsafe rmdir(root + directory) }
    }
    return failureOnOwnThread({ () throws(HostNetworkError) in
        guard clinux_unshare_root() == 0, unsafe chroot(root) == 0, clinux_drop_thread_capability(CAP_DAC_OVERRIDE) == 0
        else { return }
        _ = try TAPDevice.create(nil)
    })?.description
}

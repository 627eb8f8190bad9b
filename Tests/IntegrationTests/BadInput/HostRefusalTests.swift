// SPDX-License-Identifier: Apache-2.0

import TestSupport
import Testing

/// A host that lacks /dev/kvm or TAPs, or does not let this user use them.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct HostRefusalTests: BadInputSuite {
    let directory: TemporaryDirectory
    let host: Namespace

    init() throws {
        directory = try TemporaryDirectory()
        host = try Namespace()
    }

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

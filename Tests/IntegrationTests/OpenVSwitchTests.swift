// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import HostNetwork
import Linux
import TestSupport
import Testing

/// Guests whose frames no kernel finishes: behind their TAP is a program that reads it by itself.
@Suite(
    .timed,
    .enabled(if: Host.isFit, Host.needed),
    .enabled(
        if: VirtualSwitch.isInstalled, "needs Open vSwitch (Debian's openvswitch-switch), whose services need not run"))
struct OpenVSwitchTests {
    private let host: Namespace
    private let bridge: VirtualSwitch

    /// A TAP and the host's 192.168.77.1 at a switch with the userspace datapath.
    init() throws {
        host = try Namespace()
        try host.shell("ip tuntap add tap0 mode tap")
        bridge = try VirtualSwitch(in: host)
        try bridge.control(
            "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", "--", "add-port", "br0", "tap0")
        try host.shell("ip addr add 192.168.77.1/24 dev br0; ip link set br0 up")
    }

    /// The TCP connection of the guest with an echo server in the namespace; what the guest says about it.
    private func exchange(_ net: String) throws -> (answer: String?, log: String) {
        let server = try EchoServer(in: host)
        let machine = try Program.machineAtPrompt(
            ["--net", net, "--log-level", "info"], words: "ip=192.168.77.2/24", in: host)
        // Which needs no offloads, and works in any case.
        #expect(try host.shell("ping -c 2 -i 0.2 -W 10 192.168.77.2").contains("2 received"))
        let answer = try machine.ask("tcp 192.168.77.1 \(server.port) 20000").last
        try machine.powerOff()
        return (answer, machine.errors.text)
    }

    @Test func aUserspaceDatapathGetsNoUnfinishedFrames() throws {
        let (answer, log) = try exchange("tap=tap0")
        #expect(answer == "20000 of 20000 bytes came back")
        #expect(
            log.contains(
                "net0: offloads off: a process reads the frames of tap0 (AF_PACKET), as a userspace datapath does"))
    }

    @Test func offloadsCanBeSwitchedOff() throws {
        let (answer, log) = try exchange("tap=tap0,offload=off")
        #expect(answer == "20000 of 20000 bytes came back")
        #expect(log.contains("net0: offloads off: as requested"))
    }

    /// What the option and the default are for: should this pass one day, neither is needed for this version of Open
    /// vSwitch.
    @Test func offloadsThatAreInsistedOnAreLostThere() throws {
        let (answer, log) = try exchange("tap=tap0,offload=on")
        #expect(answer == "192.168.77.1: no reply from TCP port \(EchoServer.port)")
        #expect(log.contains("net0: offloads on: as requested"))
    }
}

/// The same guest where the kernel finishes frames: with offloads, by default.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct OffloadTests {
    @Test(arguments: [true, false]) func theKernelFinishesFrames(onBridge: Bool) throws {
        let host = try Namespace()
        try host.shell("ip link add br0 type bridge; ip link set br0 up")
        let machine = try Program.machineAtPrompt(
            ["--net", onBridge ? "tap=tap0,bridge=br0" : "tap=tap0", "--log-level", "info"],
            words: "ip=192.168.77.2/24", in: host)
        try host.shell("ip addr add 192.168.77.1/24 dev \(onBridge ? "br0" : "tap0")")
        let server = try EchoServer(in: host)
        #expect(try machine.ask("tcp 192.168.77.1 \(server.port) 20000").last == "20000 of 20000 bytes came back")
        try machine.powerOff()
        let reason = onBridge ? "it is a port of br0, of kind bridge" : "tap0 connects to the host itself"
        #expect(machine.errors.text.contains("net0: offloads on: \(reason)"))
    }
}

/// Open vSwitch's own programs, as children of the test and with a directory of their own.
private final class VirtualSwitch {
    static let isInstalled: Bool = {
        let programs: [String] = ["/usr/sbin/ovs-vswitchd", "/usr/sbin/ovsdb-server", "/usr/bin/ovs-vsctl"]
        return programs.allSatisfy { access($0, X_OK) == 0 }
    }()

    private let directory: TemporaryDirectory
    private let host: Namespace
    private let database: Program
    private let daemon: Program

    init(in host: Namespace) throws {
        self.host = host
        directory = try TemporaryDirectory()
        let path = directory.path
        let environment = ["env"] + ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"].map { "\($0)=\(path)" }
        try host.shell("ovsdb-tool create \(path)/conf.db /usr/share/openvswitch/vswitch.ovsschema")
        database = try Program(
            environment + [
                "ovsdb-server", "\(path)/conf.db", "--remote=punix:\(path)/db.sock", "--unixctl=\(path)/db.ctl",
            ], in: host)
        guard try eventually({ access("\(path)/db.sock", F_OK) == 0 }) else { throw TestFailure(database.story) }
        try host.shell("ovs-vsctl --db=unix:\(path)/db.sock --no-wait init")
        daemon = try Program(
            environment + ["ovs-vswitchd", "unix:\(path)/db.sock", "--unixctl=\(path)/switch.ctl"], in: host)
    }

    /// `ovs-vsctl` with these words; it waits until the daemon has done it.
    func control(_ words: String...) throws {
        try host.shell("ovs-vsctl --timeout=60 --db=unix:\(directory.path)/db.sock \(words.joined(separator: " "))")
    }
}

/// A TCP port of a namespace whose first client gets back what it sends.
private final class EchoServer {
    static let port = 7007
    let port = EchoServer.port
    private let listener: FileDescriptor
    private var thread: Thread?

    init(in host: Namespace) throws {
        let holder = try host.run {
            let socket = FileDescriptor(
                owning: Glibc.socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0))
            var address = sockaddr_in()
            address.sin_family = sa_family_t(AF_INET)
            address.sin_port = UInt16(Self.port).bigEndian
            let bound = withUnsafePointer(to: &address) {
                $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                    bind(socket.rawValue, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
                }
            }
            guard bound == 0, listen(socket.rawValue, 1) == 0 else { throw SystemCallError.last("listen") }
            return Holder(socket)
        }
        listener = try holder.value.duplicate()
        let number = listener.rawValue
        thread = try Thread.start(name: "echo") {
            let client = accept(number, nil, nil)
            guard client >= 0 else { return }
            defer { close(client) }
            var bytes = [UInt8](repeating: 0, count: 4096)
            while true {
                let count = bytes.withUnsafeMutableBytes { recv(client, $0.baseAddress, $0.count, 0) }
                guard count > 0,
                    bytes.withUnsafeBytes({ send(client, $0.baseAddress, count, Int32(MSG_NOSIGNAL)) }) == count
                else { return }
            }
        }
    }

    deinit {
        // Who waits for a client waits no longer.
        shutdown(listener.rawValue, Int32(SHUT_RDWR))
        if let thread = thread.take() { thread.join() }
    }
}

// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

/// `--net user` and `--net stream=`: networks without privileges.
@Suite(.timed, .enabled(if: Host.isFit, Host.needed)) struct UserNetworkTests {
    private let host: Namespace

    /// A namespace with a default route, as passt requires; nothing is behind it but an interface of the host.
    init() throws {
        host = try Namespace()
        try host.shell(
            """
            ip link add out0 type veth peer name out1; ip link set out0 up; ip link set out1 up
            ip addr add 198.51.100.2/24 dev out0; ip addr add 203.0.113.9/32 dev out1
            ip route add default via 198.51.100.1 dev out0
            """)
    }

    private func machine(_ net: String, _ arguments: [String] = []) throws -> Program {
        try Program.machineAtPrompt(["--net", net] + arguments, in: host)
    }

    private func refused(_ arguments: [String], _ sentence: String, in namespace: Namespace? = nil) throws {
        let machine = try Program(arguments, in: namespace ?? host)
        try machine.expectEnd(Status.host)
        #expect(machine.errors.lines == ["swkvm: \(sentence)"], "\(machine.story)")
    }

    /// The numbers of frames that the guest has received and sent.
    private func frames(_ machine: Program) throws -> [Int] {
        try #require(try machine.ask("net").last).split { !$0.isNumber }.dropFirst().compactMap { Int($0) }
    }

    // MARK: passt

    @Test(arguments: ["on", "on,namespaces", "off"]) func theGuestReachesWhatTheUserReaches(sandbox: String) throws {
        let server = try EchoServer(address: (203, 0, 113, 9), in: host)
        let machine = try machine("user", ["--sandbox", sandbox])
        #expect(try machine.ask("net eth0 dhcp").first?.contains("198.51.100.2/24, gateway 198.51.100.1") == true)
        #expect(
            try machine.ask("tcp 203.0.113.9 \(server.port)").last?.hasPrefix("4096 of 4096 bytes came back") == true)
        try machine.powerOff()
    }

    /// A signal cancels the start while passt takes its time.
    @Test func aStartIsCancelledWhilePasstStarts() throws {
        let directory = try TemporaryDirectory(), started = directory("started")
        // It would be ready in the end.
        try directory.write(Array("#!/bin/sh\n: >'\(started)'; sleep 8\n".utf8), to: "passt")
        try shell("chmod +x '\(directory("passt"))'")
        let machine = try Program(
            ["env", "PATH=\(directory.path):/usr/bin:/bin", Host.swkvm, "run", "--mem", "64M", "--net", "user"],
            in: host)
        #expect(try eventually { try directory.contents.contains("started") })
        machine.send(signal: SIGTERM)
        #expect(try machine.waitForEnd() == .status(128 + SIGTERM), "\(machine.story)")
    }

    @Test func aPublishedPortLeadsToTheGuest() throws {
        let machine = try machine("user,publish=8080:80,publish=198.51.100.2:5353:53/udp,mtu=1500")
        #expect(try machine.ask("net eth0 dhcp").first?.contains("MTU 1500, 198.51.100.2/24") == true)
        let listening = try host.shell("ss -Htuln").split(separator: "\n").map { $0.split(separator: " ") }
            .map { "\($0[0]) \($0[4])" }
        #expect(listening.sorted() == ["tcp 127.0.0.1:8080", "udp 198.51.100.2:5353"])
        let before = try frames(machine)
        let client = try host.run { Holder(try connect(toPort: 8080)) }
        #expect(try eventually { try frames(machine)[0] > before[0] })
        withExtendedLifetime(client) {}
        try machine.powerOff()
    }

    @Test func passtEndsWithTheMachine() throws {
        for isKilled in [false, true] {
            let machine = try machine("user,publish=8080:80")
            #expect(try host.shell("ss -Htln").split(separator: "\n").count == 1)
            if isKilled {
                machine.send(signal: SIGKILL)
                try machine.waitForEnd()
            } else {
                try machine.powerOff()
            }
            #expect(try eventually { try host.shell("ss -Htln").isEmpty })
        }
    }

    @Test func theMachineOutlivesPasst() throws {
        let machine = try machine("user,publish=8080:80")
        let line = try host.shell("ss -Htlnp")
        let process = try #require(line.split { !$0.isNumber && $0 != "=" }.first { $0.hasPrefix("=") && $0.count > 1 })
        kill(try #require(pid_t(process.dropFirst())), SIGKILL)
        try machine.waitForError("net0: the link is down: passt has closed the connection")
        #expect(try machine.ask("net").first?.contains("link down") == true)
        try machine.powerOff()
    }

    @Test func whatPreventsPasst() throws {
        let taken = try EchoServer(address: (127, 0, 0, 1), in: host)
        let run = [Host.swkvm, "run", "--mem", "64M", "--net"]
        try refused(
            run + ["user,publish=\(taken.port):80"],
            "port \(taken.port) (TCP) of 127.0.0.1 cannot be published: another program uses it")
        try refused(
            run + ["user,publish=192.0.2.77:8080:80"],
            "port 8080 (TCP) of 192.0.2.77 cannot be published: no interface of this host has that address")
        try refused(
            run + ["user,publish=[::1]:8080:80"],
            "port 8080 (TCP) of ::1 cannot be published: passt uses IPv6 only on a host with a default route for it")
        try refused(
            run + ["user"],
            "passt found no network interface of this host with a default route: connect the host to a network, or give --net tap= or --net none",
            in: try Namespace())
        try refused(
            ["env", "PATH=/nonexistent"] + run + ["user"],
            "passt is not installed, which --net user needs: apt install passt")
        try refused(
            ["unshare", "-m", "sh", "-euc", "umount -l /proc; exec \"$@\"", "sh"] + run + ["user", "--sandbox", "off"],
            "passt reports: readlink /proc/self/exe: No such file or directory")
    }

    @Test(arguments: [
        ("echo first; echo boo >&2; exit 1", "passt reports: boo"), ("exit 3", "passt ended with status 3"),
        ("kill -9 $$", "passt was killed by signal 9"),
        ("printf 'a\\033[31mb\\n' >&2; exit 1", "passt reports: a\\u{1B}[31mb"),
    ])
    func anotherPasst(script: String, sentence: String) throws {
        let directory = try TemporaryDirectory()
        let program = try directory.write("#!/bin/sh\n\(script)\n".utf8, to: "passt")
        try shell("chmod +x '\(program)'")
        try refused(
            ["env", "PATH=\(directory.path):/bin", Host.swkvm, "run", "--mem", "64M", "--net", "user"], sentence)
    }

    @Test func aPasstThatEndsAtOnceIsALinkThatIsDown() throws {
        let directory = try TemporaryDirectory()
        let program = try directory.write("#!/bin/sh\n".utf8, to: "passt")
        try shell("chmod +x '\(program)'")
        let machine = try Program(
            [
                "env", "PATH=\(directory.path):/bin", Host.swkvm, "run", "--mem", "64M", "--net", "user", "--cmdline",
                "ip=192.0.2.2/24",
            ], input: .pipe, in: host)
        try machine.waitForError("net0: the link is down: passt has closed the connection")
        try machine.wait(for: Program.prompt)
        try machine.powerOff()
    }

    // MARK: A stream

    @Test func aProgramAtASocket() throws {
        let directory = try TemporaryDirectory()
        let listener = try StreamListener(directory("net"))
        let machine = try machine("stream=\(directory("net")),mac=52:54:00:00:00:07")
        #expect(try machine.ask("net").first?.contains("MAC 52:54:00:00:00:07, link up, MTU 1500") == true)
        let peer = try listener.accept()
        try machine.type("net eth0 192.0.2.2/24\nping 192.0.2.1 1\n")
        // A question for the address, as a broadcast.
        let question = try peer.next()
        #expect(Array(question.prefix(14)) == [255, 255, 255, 255, 255, 255, 0x52, 0x54, 0, 0, 0, 7, 8, 6])
        try machine.wait(for: "0 of 1 came back")
        try peer.send([0, 0, 0, 5, 1, 2, 3, 4, 5])
        try machine.waitForError(
            "net0: the link is down: \(directory("net")) sent a frame with the length 5, which is impossible; the connection was closed"
        )
        #expect(try machine.ask("net").first?.contains("link down") == true)
        try machine.powerOff()
    }

    @Test func aSocketThatCannotBeUsed() throws {
        let directory = try TemporaryDirectory()
        let run = [Host.swkvm, "run", "--mem", "64M", "--net"]
        let path = directory("net")
        try refused(
            run + ["stream=\(path)"], "there is no socket \(path): start the program that listens there first")
        _ = try StreamListener(path)
        try refused(run + ["stream=\(path)"], "no program listens on the socket \(path): start it first")
        let long = directory(String(repeating: "x", count: 108))
        try refused(
            run + ["stream=\(long)"],
            "the path of a socket has 1 to 107 bytes, \(long) has \(long.utf8.count)")
    }
}

/// Returns what clients send, on a thread that ends with the object.
private final class EchoServer: @unchecked Sendable {
    // Set before the thread is started.
    private let listener: FileDescriptor
    private(set) var port: UInt16 = 0

    init(address: (UInt8, UInt8, UInt8, UInt8), in host: Namespace) throws {
        let number = try host.run { socket(AF_INET, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0) }
        listener = FileDescriptor(owning: number)
        var name = sockaddr_in()
        name.sin_family = sa_family_t(AF_INET)
        withUnsafeMutableBytes(of: &name.sin_addr) {
            $0.copyBytes(from: [address.0, address.1, address.2, address.3])
        }
        var size = socklen_t(MemoryLayout<sockaddr_in>.size)
        let result = withUnsafeMutablePointer(to: &name) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(number, $0, size) < 0 || listen(number, 8) < 0 || getsockname(number, $0, &size) < 0
            }
        }
        if result { throw SystemCallError.last("listen") }
        port = name.sin_port.bigEndian
        try Thread.start(name: "echo", stackSize: 1 << 20) { Self.serve(number) }.detach()
    }

    deinit { shutdown(listener.rawValue, Int32(SHUT_RDWR)) }

    private static func serve(_ listener: Int32) {
        while true {
            let client = accept(listener, nil, nil)
            if client < 0 { return }
            var bytes = [UInt8](repeating: 0, count: 4096)
            while true {
                let count = read(client, &bytes, bytes.count)
                guard count > 0, write(client, bytes, count) == count else { break }
            }
            close(client)
        }
    }
}

/// A socket that a machine's interface is connected to.
private final class StreamListener {
    private let socket: FileDescriptor

    init(_ path: String) throws {
        let number = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        socket = FileDescriptor(owning: number)
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
        let result = withUnsafePointer(to: address) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                bind(number, $0, socklen_t(MemoryLayout<sockaddr_un>.size)) < 0 || listen(number, 1) < 0
            }
        }
        if result { throw SystemCallError.last("listen") }
    }

    func accept() throws -> StreamClient {
        let number = Glibc.accept(socket.rawValue, nil, nil)
        if number < 0 { throw SystemCallError.last("accept") }
        return StreamClient(FileDescriptor(owning: number))
    }
}

private final class StreamClient {
    private let socket: FileDescriptor

    init(_ socket: consuming FileDescriptor) { self.socket = socket }

    func send(_ bytes: [UInt8]) throws { try socket.writeAll(bytes) }

    func next() throws -> [UInt8] {
        let length = try take(4).reduce(0) { $0 << 8 | Int($1) }
        guard length < 70_000 else { throw TestFailure("a length of \(length)") }
        return try take(length)
    }

    private func take(_ count: Int) throws -> [UInt8] {
        var bytes: [UInt8] = []
        var room = [UInt8](repeating: 0, count: count)
        while bytes.count < count {
            let got = try room.withUnsafeMutableBytes {
                try socket.read(into: UnsafeMutableRawBufferPointer(rebasing: $0[..<(count - bytes.count)]))
            }
            guard got > 0 else { throw TestFailure("the machine has closed the connection") }
            bytes += room[..<got]
        }
        return bytes
    }
}

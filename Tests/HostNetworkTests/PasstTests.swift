// SPDX-License-Identifier: Apache-2.0

import CLinux
import Glibc
import Linux
import TestSupport
import Testing

@testable import HostNetwork

@Suite(.timed) struct PasstTests {
    private func port(_ text: String) throws -> PublishedPort { try PublishedPort(parsing: text) }

    @Test func portsAreWrittenAsTheyAreRead() throws {
        for text in ["127.0.0.1:2222:22", "0.0.0.0:1:65535/udp", "[fe80::1]:80:80", "[::]:53:53/udp"] {
            #expect(try port(text).description == text)
        }
        #expect(try port("2222:22").description == "127.0.0.1:2222:22")
        #expect(try port("2222:22/tcp") == port("2222:22"))
    }

    /// No port is forwarded that was not asked for: without -u, those of -t would be by UDP, too.
    @Test func theArguments() throws {
        let start = ["passt", "--quiet", "--stderr", "--no-map-gw", "--fd", "3", "--mtu", "1500"]
        #expect(Passt.arguments([], 1500) == start + ["-t", "none", "-u", "none"])
        #expect(
            try Passt.arguments([port("2222:22"), port("[::1]:80:81/udp"), port("0.0.0.0:90:91")], 1500)
                == start + ["-t", "127.0.0.1/2222:22", "-t", "0.0.0.0/90:91", "-u", "::1/80:81"])
    }

    @Test func nameServersOfAFile() {
        let text = """
            # nameserver 192.0.2.9
            nameserver 127.0.0.53
            nameserver\t192.0.2.1 # a router
            nameserver fe80::1%eth0
            nameserver 2001:db8::1
            nameserver nonsense
            search example.org
            nameserver
            """
        #expect(Passt.nameServers(of: text) == ["127.0.0.53", "192.0.2.1", "2001:db8::1"])
        #expect(["127.0.0.53", "::1", "192.0.2.1", "2001:db8::1"].map(Passt.isLoopback) == [true, true, false, false])
        let words = Passt.arguments([], 1500, nameServers: ["192.0.2.1", "2001:db8::1"])
        #expect(Array(words[8..<12]) == ["--dns", "192.0.2.1", "--dns", "2001:db8::1"])
    }

    @Test func reasonsAreFoundInTheOutput() throws {
        let noise = """
            Failed to send 47 bytes to syslog
            Don't run as root. Changing to nobody...
            No external routable interface for IPv6

            """
        func sentence(_ text: String, _ status: Int32 = 1, _ ports: [PublishedPort] = []) -> String {
            Passt.explanation(of: noise + text, status: status, ports).description
        }
        #expect(sentence("") == "passt ended with status 1")
        #expect(sentence("", 128 + 31) == "passt was killed by signal 31")
        #expect(sentence("Invalid MTU 5\n") == "passt reports: Invalid MTU 5")
        #expect(sentence("External interface not usable\n").hasPrefix("passt found no network interface of this host"))
        let ports = try [port("1:2"), port("3:4/udp")]
        #expect(
            sentence("Failed to bind any port for '-t 127.0.0.1/9:8', exiting\n", 1, ports)
                == "passt reports: Failed to bind any port for '-t 127.0.0.1/9:8', exiting")
        let refusals: [(Int32?, String)] = [
            (EADDRINUSE, "another program uses it"), (EACCES, "ports below 1024 need CAP_NET_BIND_SERVICE"),
            (EADDRNOTAVAIL, "no interface of this host has that address"), (EPERM, "Operation not permitted"),
            (nil, "passt was not allowed to listen there"),
        ]
        for (error, end) in refusals {
            let text = try HostNetworkError.cannotPublish(port("80:80"), errno: error).description
            #expect(text.hasPrefix("port 80 (TCP) of 127.0.0.1 cannot be published: \(end)"))
        }
    }

    @Test func whyAPortCannotBeUsedIsFound() throws {
        #expect(try port("192.0.2.77:8080:80").refusal == EADDRNOTAVAIL)
        let number = socket(AF_INET, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        let holder = FileDescriptor(owning: number)
        var name = sockaddr_in(), size = socklen_t(MemoryLayout<sockaddr_in>.size)
        name.sin_family = sa_family_t(AF_INET)
        name.sin_addr.s_addr = in_addr_t(0x7f00_0001).bigEndian
        let failed = unsafe withUnsafeMutablePointer(to: &name) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe bind(number, $0, size) < 0 || getsockname(number, $0, &size) < 0
            }
        }
        try #require(!failed)
        let taken = name.sin_port.bigEndian
        #expect(try port("\(taken):80/udp").refusal == EADDRINUSE)
        _ = holder
    }

    @Test(.enabled(if: mayMakeNamespaces, rootNeeded)) func aNetworkThatLeadsNowhere() throws {
        try inNewNamespace { _ in
            #expect(
                failure { () throws(HostNetworkError) in _ = try NetworkAttachment(.user()) } == .noExternalInterface)
        }
    }

    @Test func attachmentsOfAStream() throws {
        #expect(
            failure { () throws(HostNetworkError) in _ = try NetworkAttachment(.stream(path: "/nonexistent/socket")) }
                == .streamUnavailable("/nonexistent/socket", SystemCallError("connect", errno: ENOENT)))
        for backend in [.stream(path: "x", mtu: 67), .user(mtu: 65521)] as [NetworkBackend] {
            #expect(
                failure { () throws(HostNetworkError) in _ = try NetworkAttachment(backend) }?.description.hasSuffix(
                    "is not possible: give 68 to 65520") == true)
        }
        let pair = try FrameStream.pair()
        let attachment = NetworkAttachment(stream: FrameStream(try pair.own.duplicate(), name: "peer"))
        #expect(attachment.isStream && attachment.name == "peer" && attachment.mtu == 1500)
        #expect(attachment.queueCount == 1 && attachment.headerSize == 0 && attachment.queue(0) == nil)
        #expect(attachment.setOffloads([]) && !attachment.setOffloads(.checksum) && !attachment.offloads.isOn)
        #expect(attachment.hostDrops == nil && attachment.watchLink() == nil)
        #expect(attachment.restoringDescriptors.isEmpty)
        attachment.endStream()
        var byte: UInt8 = 0
        #expect(unsafe read(pair.peer.rawValue, &byte, 1) == 0)
    }
}

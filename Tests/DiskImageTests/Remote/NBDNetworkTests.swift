// SPDX-License-Identifier: Apache-2.0

import CLinux
@testable import DiskImage
import Glibc
import Linux
import TestSupport
import Testing

/// The network, and TLS with a key that both know or with certificates. It takes root, as networks of tests' own do.
@Suite(.timed, .enabled(if: geteuid() == 0, "needs root to make a network namespace for the test"))
struct NBDNetworkTests {
    private let directory = TemporaryDirectory()
    private let content = randomBytes(1 << 20, seed: 9)

    /// Runs a tool of GnuTLS and expects it to succeed.
    private func tool(_ command: String...) {
        let (status, output) = run(command)
        #expect(status == 0, "\(command): \(output)")
    }

    private func read(_ address: String) throws -> [UInt8] {
        var engine = try DiskEngine(DiskImage(path: address, options: readOnly), depth: 4)
        return try engine.readAll()
    }

    private func reason(_ address: String) -> String { openError(address, readOnly).map { "\($0)" } ?? "" }

    @Test func sharedKeys() throws {
        try directory.write("disk.raw", content)
        let keys = directory.file("keys.psk"), others = directory.file("others.psk")
        tool("psktool", "-u", "alice", "-p", keys)
        tool("psktool", "-u", "alice", "-p", others)
        let server = try NBDServer(
            directory, nbdkit: "--tls=require", "--tls-psk=\(keys)", "file", directory.file("disk.raw"))
        let address = server.address("", "&tls-psk-file=\(keys)").replacing("nbd+unix://", with: "nbds+unix://alice@")
        #expect(try read(address) == content)
        // Another key, another user, none, and no TLS at all.
        #expect(reason(address.replacing(keys, with: others)).contains("gnutls_handshake"))
        #expect(reason(address.replacing("alice@", with: "bob@")) != "")
        #expect(reason(address.replacing("alice@", with: "")).contains("specify the user of the key"))
        #expect(reason(address.replacing(keys, with: directory.file("nowhere"))) != "")
        #expect(reason(server.address()).contains("the server requires TLS: use nbds:"))
    }

    @Test func certificates() throws {
        try directory.write("disk.raw", content)
        try directory.write("ca.info", Array("cn = CA\nca\ncert_signing_key\n".utf8))
        try directory.write(
            "server.info",
            Array("cn = localhost\ndns_name = localhost\ntls_www_server\nencryption_key\nsigning_key\n".utf8))
        for name in ["ca", "other"] {
            tool("mkdir", directory.file(name))
            tool(
                "certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile",
                directory.file("\(name)/ca-key.pem"))
            tool(
                "certtool", "--generate-self-signed", "--load-privkey", directory.file("\(name)/ca-key.pem"),
                "--template", directory.file("ca.info"),
                "--outfile", directory.file("\(name)/ca-cert.pem"))
        }
        tool("certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile", directory.file("ca/server-key.pem"))
        tool(
            "certtool", "--generate-certificate", "--load-ca-certificate", directory.file("ca/ca-cert.pem"),
            "--load-ca-privkey", directory.file("ca/ca-key.pem"),
            "--load-privkey", directory.file("ca/server-key.pem"), "--template", directory.file("server.info"),
            "--outfile", directory.file("ca/server-cert.pem"))
        let security = [
            "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir=\(directory.file("ca"))",
            "--tls-creds", "tls0",
        ]
        let server = try NBDServer(directory, image: directory.file("disk.raw"), ["-r"] + security)
        let local = server.address("", "&tls-verify-peer=no").replacing("nbd+unix://", with: "nbds+unix://")
        #expect(try read(local) == content)
        #expect(reason(server.address()).contains("the server requires TLS: use nbds:"))

        try inOwnNetwork { [self] in
            let command =
                ["qemu-nbd", "-t", "-r", "-f", "raw", "-b", "127.0.0.1"] + security + [directory.file("disk.raw")]
            let server = try NBDServer(command, listening: { SocketAddress.loopback })
            func address(_ host: String, _ name: String, _ options: String = "") -> String {
                "nbds://\(host)/?tls-certificates=\(directory.file(name))\(options)"
            }
            #expect(try read(address("localhost", "ca")) == content)
            // Signed by somebody else, and somebody else's.
            #expect(reason(address("localhost", "other")).contains("certificate"))
            #expect(reason(address("127.0.0.1", "ca")).contains("certificate"))
            // A directory without authorities is none that trusts everybody.
            #expect(
                reason(address("localhost", "nowhere")).contains(
                    "nowhere/ca-cert.pem: access: No such file or directory"))
            #expect(try read(address("127.0.0.1", "other", "&tls-verify-peer=no")) == content)
            #expect(reason("nbd://127.0.0.1/").contains("the server requires TLS: use nbds:"))
            _ = consume server
        }
    }

    @Test func overTheNetwork() throws {
        try directory.write("disk.raw", content)
        try inOwnNetwork { [self] in
            let command = [
                "qemu-nbd", "-t", "-r", "-f", "raw", "-b", "127.0.0.1", "-x", "disk", directory.file("disk.raw"),
            ]
            let server = try NBDServer(command, listening: { SocketAddress.loopback })
            #expect(try read("nbd://127.0.0.1/disk") == content)
            // Wherever the server listens: addresses are tried one after the other.
            #expect(try read("nbd://localhost:10809/disk") == content)
            #expect(reason("nbd://127.0.0.1:10810/disk").contains("Connection refused"))
            server.kill()
            #expect(reason("nbd://127.0.0.1/disk").contains("Connection refused"))
        }
    }

    /// Runs something on a thread with a network of its own, that has nothing but a loopback interface.
    private func inOwnNetwork(_ body: @escaping @Sendable () throws -> Void) throws {
        let thread = try Thread.start(name: "network") {
            do {
                guard clinux_unshare_network() == 0 else { throw SystemCallError.last("unshare") }
                // Programs that this thread starts are in its network.
                #expect(run(["ip", "link", "set", "lo", "up"]).status == 0)
                try body()
            } catch { Issue.record("\(error)") }
        }
        thread.join()
    }
}

extension SocketAddress {
    /// NBD's port of 127.0.0.1.
    fileprivate static var loopback: SocketAddress? {
        try? SocketAddress.resolve(host: "127.0.0.1", port: 10809).get().first
    }
}

@testable import DiskImage
import Testing

/// TLS: with a key that both know, and with certificates.
@Suite struct NBDSecurityTests {
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
        let server = try NBDServer(directory, nbdkit: "--tls=require", "--tls-psk=\(keys)", "file", directory.file("disk.raw"))
        let address = server.address("", "&tls-psk-file=\(keys)").replacing("nbd+unix://", with: "nbds+unix://alice@")
        #expect(try read(address) == content)
        // Another key, another user, none, and no TLS at all.
        #expect(reason(address.replacing(keys, with: others)).contains("gnutls_handshake"))
        #expect(reason(address.replacing("alice@", with: "bob@")) != "")
        #expect(reason(address.replacing(keys, with: directory.file("nowhere"))) != "")
        #expect(reason(server.address()).contains("the server wants TLS: use nbds:"))
    }

    @Test func certificates() throws {
        try directory.write("disk.raw", content)
        try directory.write("ca.info", Array("cn = CA\nca\ncert_signing_key\n".utf8))
        try directory.write("server.info", Array("cn = localhost\ndns_name = localhost\ntls_www_server\nencryption_key\nsigning_key\n".utf8))
        for name in ["ca", "other"] {
            tool("mkdir", directory.file(name))
            tool("certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile", directory.file("\(name)/ca-key.pem"))
            tool(
                "certtool", "--generate-self-signed", "--load-privkey", directory.file("\(name)/ca-key.pem"), "--template", directory.file("ca.info"),
                "--outfile", directory.file("\(name)/ca-cert.pem"))
        }
        tool("certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile", directory.file("ca/server-key.pem"))
        tool(
            "certtool", "--generate-certificate", "--load-ca-certificate", directory.file("ca/ca-cert.pem"), "--load-ca-privkey", directory.file("ca/ca-key.pem"),
            "--load-privkey", directory.file("ca/server-key.pem"), "--template", directory.file("server.info"), "--outfile", directory.file("ca/server-cert.pem"))
        let server = try NBDServer(directory, [
            "qemu-nbd", "-t", "-r", "-k", "SOCKET", "-f", "raw", "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir=\(directory.file("ca"))",
            "--tls-creds", "tls0", directory.file("disk.raw"),
        ])
        func address(_ name: String, _ options: String = "") -> String {
            server.address("", "&tls-certificates=\(directory.file(name))\(options)").replacing("nbd+unix://", with: "nbds+unix://")
        }
        // A UNIX socket has no host whose name the certificate could have: its name is not looked at, its signer is.
        #expect(try read(address("ca")) == content)
        #expect(reason(address("other")).contains("certificate"))
        #expect(try read(address("other", "&tls-verify-peer=no")) == content)
        #expect(reason(server.address()).contains("the server wants TLS: use nbds:"))
    }
}

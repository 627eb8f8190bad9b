// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import TestSupport
import Testing

/// What an address of a remote disk says, and which are none.
@Suite(.timed) struct NBDLocationTests {
    @Test func hostsAndPorts() throws {
        #expect(try NBDLocation("nbd://host").server == .tcp(host: "host", port: 10809))
        #expect(try NBDLocation("nbd://host/").export == "")
        #expect(try NBDLocation("nbd://host:1234/a/b%20c").server == .tcp(host: "host", port: 1234))
        #expect(try NBDLocation("nbd://host:1234/a/b%20c").export == "a/b c")
        #expect(try NBDLocation("nbd://[::1]:65535/x").server == .tcp(host: "::1", port: 65535))
        #expect(try NBDLocation("nbd://[fe80::1%25eth0]/x").server == .tcp(host: "fe80::1%eth0", port: 10809))
        #expect(try NBDLocation("nbd://host//x").export == "/x")
    }

    @Test func sockets() throws {
        let location = try NBDLocation("nbd+unix:///disk?socket=/tmp/a%26b=c&reconnect=0")
        #expect(
            location.server == .unix(path: "/tmp/a&b=c") && location.export == "disk" && location.security == nil
                && location.reconnect == 0)
        #expect(try NBDLocation("nbd+unix://?socket=s").export == "")
    }

    @Test func security() throws {
        let location = try NBDLocation("nbds://alice@host/x?tls-certificates=/pki&tls-verify-peer=no")
        #expect(location.security == NBDLocation.Security(user: "alice", certificates: "/pki", verifiesPeer: false))
        #expect(
            try NBDLocation("nbds+unix://a%40b@/x?socket=/s&tls-psk-file=/keys").security
                == NBDLocation.Security(user: "a@b", keyFile: "/keys"))
        #expect(try NBDLocation("nbd://host/x").security == nil)
    }

    @Test func namesOfFilesAreNone() {
        for name in ["disk.raw", "./nbd://host/x", "/nbd:/x", "nbd", "nbdx://a", "http://x", "NBD"] {
            #expect(!NBDLocation.isAddress(name), "\(name)")
        }
        for name in ["nbd:", "nbd://host", "nbds://host", "nbd+unix:///?socket=x", "nbds+unix:///", "nbd:unix:/s"] {
            #expect(NBDLocation.isAddress(name), "\(name)")
        }
    }

    @Test(arguments: [
        ("nbd:", "no //"), ("nbd:unix:/s", "no //"), ("nbd://", "no host"), ("nbd:///x", "no host"),
        ("nbd://:10/x", "no host"),
        ("nbd://h:0/", "not a port"), ("nbd://h:65536/", "not a port"), ("nbd://h:x/", "not a port"),
        ("nbd://h:/", "not a port"), ("nbd://[::1/x", "without ]"),
        ("nbd://[::1]x/", "not a port"), ("nbd://a@h/x", "a user requires nbds:"), ("nbd://h/x#y", "a #"),
        ("nbd://h/%4", "two hexadecimal"),
        ("nbd://h/%zz", "two hexadecimal"), ("nbd://h/%ff", "UTF-8"), ("nbd://h/%00", "zero byte"),
        ("nbd://h/x?socket=/s", "requires nbd+unix:"),
        ("nbd://h/x?y", "no value"), ("nbd://h/x?y=1", "'y=' is not recognized"),
        ("nbd://h/x?reconnect=-1", "reconnect=-1"),
        ("nbd://h/x?reconnect=86401", "reconnect=86401"), ("nbd://h/x?tls-psk-file=/k", "requires nbds:"),
        ("nbds://h/x?tls-verify-peer=maybe", "expected yes or no"), ("nbds://h/x", "no trust anchor"),
        ("nbds://u@h/x?tls-verify-peer=yes", "no trust anchor"),
        ("nbds+unix:///x?socket=/s", "tls-psk-file=FILE or tls-verify-peer=no"),
        ("nbds+unix:///x?socket=/s&tls-certificates=/pki", "tls-psk-file=FILE or tls-verify-peer=no"),
        ("nbd+unix:///x", "no socket=PATH"), ("nbd+unix:///x?socket=", "no socket=PATH"),
        ("nbd+unix://host/x?socket=/s", "has no host"),
        ("nbd://h/" + String(repeating: "x", count: 4097), "at most 4096 bytes"),
    ])
    func wrongOnesAreRefused(_ text: String, _ reason: String) {
        let error = openError(text)
        guard case .remoteAddress = error else { return #expect(Bool(false), "\(String(describing: error))") }
        #expect(
            error?.description.contains(reason) == true
                && error?.description.contains("expected nbd://HOST[:PORT]/EXPORT") == true,
            "\(String(describing: error))")
    }

    @Test func whatIsDoneToFilesIsRefused() throws {
        let name = "nbd+unix:///x?socket=/nowhere"
        #expect(throws: DiskImageError.remoteNotPossible(path: name, reason: NBDLocation.isRaw)) {
            try DiskImage.check(path: name, options: DiskImageOptions(format: .qcow2))
        }
        // Nobody asks a server first.
        #expect(
            openError(name, DiskImageOptions(format: .qcow2))
                == .remoteNotPossible(path: name, reason: NBDLocation.isRaw))
        #expect(
            openError(name, DiskImageOptions(readOnly: true, snapshot: "1"))
                == .remoteNotPossible(path: name, reason: NBDLocation.isRaw))
    }
}

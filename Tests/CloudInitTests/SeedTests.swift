// SPDX-License-Identifier: Apache-2.0

import Glibc
import Linux
import TestSupport
import Testing

@testable import CloudInit

@Suite(.timed) struct SeedTests {
    private let directory = TemporaryDirectory()
    private static let instance = "6ba7b810-9dad-81d1-80b4-00c04fd430c8"
    /// A key of the right form that belongs to nobody.
    private static let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

    private func files(_ change: (inout Seed.Options) throws -> Void, name: String? = nil) throws -> [String: String] {
        var options = Seed.Options()
        try change(&options)
        let files = try Seed.files(options, instance: Self.instance, defaultHostName: name)
        return Dictionary(uniqueKeysWithValues: files.map { ($0.name, text($0.contents)) })
    }

    private func problem(_ change: (inout Seed.Options) throws -> Void) throws -> String {
        do {
            _ = try files(change)
            return ""
        } catch let error as SeedError { return error.description }
    }

    // MARK: Files

    @Test func keysAndHostNameAreMetaData() throws {
        let keys = try directory.write("keys", "# mine\n\n\(Self.key) alice@example \"x\"\r\n  \(Self.key) ä\n")
        let more = try directory.write("more", Self.key + " ä")
        let files = try files {
            $0.hostName = "web1.example.org"
            $0.keyFiles = [keys, more]
        }
        #expect(
            files == [
                "meta-data": """
                {
                    "instance-id": "\(Self.instance)",
                    "local-hostname": "web1.example.org",
                    "public-keys": [
                        "\(Self.key) alice@example \\"x\\"",
                        "\(Self.key) ä"
                    ]
                }

                """, "user-data": "#cloud-config\n{}\n",
            ])
    }

    @Test func theMachinesNameIsTheHostNameWhereItCanBeOne() throws {
        for (name, isHostName) in [("web1", true), ("web 1", false), ("-x", false), ("", false), ("a_b", false)] {
            let metaData = try #require(files({ $0.user = "alice" }, name: name)["meta-data"])
            #expect(metaData.contains("local-hostname") == isHostName, "\(name)")
        }
    }

    @Test func userAndPasswordAreUserData() throws {
        let password = try directory.write("password", "swordfish\n")
        let data = try #require(
            files {
                $0.user = "alice"
                $0.passwordFile = password
            }["user-data"])
        let start = "#cloud-config\n{\n    \"user\": {\n        \"name\": \"alice\"\n    },\n    \"password\": \"$6$"
        #expect(data.hasPrefix(start))
        #expect(data.hasSuffix("\",\n    \"chpasswd\": {\n        \"expire\": false\n    }\n}\n"))
        #expect(!data.contains("swordfish"))
        #expect(try #require(files { $0.user = "root" }["user-data"]).contains("\"disable_root\": false"))
    }

    /// Byte for byte, and what the options say beside it.
    @Test func theUsersOwnFilesAreNotChanged() throws {
        let bytes: [UInt8] = [0x1f, 0x8b, 0, 0xff, 0x0a, 0x0d]
        let path = try directory.write("data", bytes)
        var options = Seed.Options()
        options.user = "alice"
        options.userDataFile = path
        options.metaDataFile = path
        options.networkConfigFile = path
        let files = try Seed.files(options, instance: Self.instance, defaultHostName: nil)
        #expect(files.map(\.name) == ["meta-data", "user-data", "vendor-data", "network-config"])
        #expect([0, 1, 3].allSatisfy { files[$0].contents == bytes })
        #expect(text(files[2].contents).hasPrefix("#cloud-config\n{\n    \"user\""))
        options.user = nil
        #expect(try Seed.files(options, instance: Self.instance, defaultHostName: nil).count == 3)
    }

    /// Four files of the largest size fit.
    @Test func sizes() throws {
        let path = try directory.write("data", [UInt8](repeating: 0x23, count: Seed.maximumFileSize))
        var options = Seed.Options()
        options.userDataFile = path
        options.networkConfigFile = path
        options.metaDataFile = path
        options.user = "alice"
        #expect(try Seed(options, instance: Self.instance).image.count > 3 << 20)
        try directory.write("data", [UInt8](repeating: 0x23, count: Seed.maximumFileSize + 1))
        #expect(
            try problem { $0.userDataFile = path }
                == "the file of --user-data, \(path), has more than 1048576 bytes, which is the limit")
        // What has no end.
        #expect(try problem { $0.keyFiles = ["/dev/zero"] }.contains("/dev/zero, has more than 65536 bytes"))
    }

    @Test func moreKeysThanFit() throws {
        let comment = String(repeating: "x", count: 60 << 10)
        let files = try (0..<18).map { try directory.write("key\($0)", "\(Self.key) \($0)\(comment)") }
        #expect(
            try problem { $0.keyFiles = files }
                == "the 18 keys of all --ssh-key together have more than a mebibyte, which is the limit")
        // One key in many files is one.
        #expect(try problem { $0.keyFiles = [String](repeating: files[0], count: 18) } == "")
    }

    @Test func aFileMayBeAPipe() throws {
        let path = directory.path + "/pipe"
        #expect(mkfifo(path, 0o600) == 0)
        let writer = try Thread.start(name: "writer") {
            if let file = try? FileDescriptor.open(path, O_WRONLY) { try? file.writeAll(Array("swordfish\n".utf8)) }
        }
        #expect(try #require(files { $0.passwordFile = path }["user-data"]).contains("$6$"))
        writer.join()
    }

    @Test func warnings() throws {
        for (contents, count) in [
            ("#cloud-config\n", 0), ("#!/bin/sh\n", 0), ("## template: jinja\n#cloud-config\n", 0),
            ("Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n", 0), ("", 0),
            ("users:\n  - default\n", 1), ("\n#cloud-config\n", 1),
        ] {
            var options = Seed.Options()
            options.userDataFile = try directory.write("data", contents)
            #expect(try Seed(options, instance: Self.instance).warnings.count == count, "\(contents)")
        }
        for (contents, count) in [("instance-id: i\n", 0), ("{\"instance-id\": 1}", 0), ("local-hostname: a\n", 1)] {
            var options = Seed.Options()
            options.metaDataFile = try directory.write("data", contents)
            #expect(try Seed(options, instance: Self.instance).warnings.count == count, "\(contents)")
        }
    }

    // MARK: Keys

    /// Of keys that ssh-keygen would make: a type, and strings.
    @Test(arguments: [
        key, key + "\n", "from=\"192.0.2.0/24,\\\"x y\" " + key + " name", "restrict,command=\"a b\" \(key)",
        "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAAQE=", "#\n\t\(key)\tname",
        "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAAQAAAAABAA==",
    ]) func aKey(line: String) throws { #expect(try PublicKeys.parse(Array(line.utf8), path: "keys").count == 1) }

    @Test(arguments: [
        ("", "keys contains no public key"), ("# nothing\n\n", "keys contains no public key"),
        ("hello", "keys, line 1, is not a public key of OpenSSH: expected a type"),
        ("\n\(key)\nssh-ed25519", "keys, line 3, is not a public key of OpenSSH: the key itself is missing"),
        (String(key.dropLast(4)), "keys, line 1, is not a public key of OpenSSH: the key behind ssh-ed25519 is"),
        (String(key.dropLast(1)), "keys, line 1, is not a public key of OpenSSH: the key behind ssh-ed25519 is"),
        (key + "AAAA", "keys, line 1, is not a public key of OpenSSH: the key behind ssh-ed25519 is"),
        ("ssh-rsa" + key.dropFirst(11), "keys, line 1, is not a public key of OpenSSH: the key behind ssh-rsa is"),
        (key + " \u{7}", "keys, line 1, is not a public key of OpenSSH: it is not plain text"),
        (key + " \u{85}", "keys, line 1, is not a public key of OpenSSH: it is not plain text"),
        (key + " \u{ffff}", "keys, line 1, is not a public key of OpenSSH: it is not plain text"),
        ("---- BEGIN SSH2 PUBLIC KEY ----\n", "keys, line 1, is not a public key of OpenSSH: it is in another format"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n", "keys is a private key, which no guest may see"),
        ("-----BEGIN RSA PRIVATE KEY-----\n", "keys is a private key, which no guest may see"),
        ("PuTTY-User-Key-File-3: ssh-ed25519\n", "keys is a private key, which no guest may see"),
    ]) func noKey(contents: String, sentence: String) throws {
        let error = #expect(throws: SeedError.self) { try PublicKeys.parse(Array(contents.utf8), path: "keys") }
        #expect(error?.description.hasPrefix(sentence) == true, "\(error?.description ?? "")")
    }

    @Test func bytesThatAreNoText() {
        #expect(throws: SeedError.key(path: "keys", line: 2, reason: "it is not plain text")) {
            try PublicKeys.parse(Array(Self.key.utf8) + [0x0a, 0x80, 0xff], path: "keys")
        }
    }

    @Test func aPrivateKeyWithThePublicOneBesideIt() throws {
        let path = try directory.write("id", "-----BEGIN OPENSSH PRIVATE KEY-----\n")
        #expect(try problem { $0.keyFiles = [path] }.contains("ssh-keygen -y -f \(path)"))
        try directory.write("id.pub", Self.key)
        #expect(try problem { $0.keyFiles = [path] }.hasSuffix("specify the public one, --ssh-key \(path).pub"))
    }

    // MARK: Passwords

    /// As openssl-passwd(1) prints them.
    @Test(arguments: [
        (
            "Hello world!", "saltstring",
            "svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1"
        ),
        (
            "a", "Ab./9",
            "WOgSV0qJjlLcILcZ6EemHO5deNqhkZbDfXiqQODwnPBRq0/R9ucMGb5jsdKnhiq5hsdpknwCkAPYn83JWubE.0"
        ),
        (
            "0123456789", "Ab./9",
            "JDjdgkgBbCNR13Gskd3bWWJ2TI6KRSszWQdoF.5EEBzJaLYp0jxxJxRo021VdPad.8O89OSi6iiVDYVpgcebF0"
        ),
        (
            "ä€𝄞 word", "Ab./9",
            "W3ZNQPnjDs2Ifp7VFCgJ2adAKqPIgA7m3x9vZppd74BfXm74zpAJAs56saYQ4ME6W4Y9XWDZIQT1ASmA2S8CX."
        ),
        (
            String(repeating: "x", count: 130), "Ab./9",
            "yZ9LNe91BrNErfOb34kvfiCXulgoXSSz10v/iLOrvUrna7SobK1zxQeuBsp09.ucigb.1CVkc2CWtFyXWK4uw/"
        ),
        (
            String(repeating: "x", count: 64), "0123456789abcdef",
            "hmNE.PPROh2fRZoO4CdTMCwfayyElBe82a7IIN6INBHhK9cgTY7v75RHFxN7bRngOafwACIdMX/ZEBUOEQHVa1"
        ),
        (
            String(repeating: "y", count: 63), "0123456789abcdef",
            "4Iut0JQs8sJs71xWIlKTmQ72TQjSlmHyviqMVW6s0W0HCUbRDPLBd9qtP10ze8xqtwFjRo5UrU8Vxm54PGtDu1"
        ),
    ]) func hashes(password: String, salt: String, hash: String) {
        #expect(PasswordHash.sha512(Array(password.utf8), salt: salt) == "$6$\(salt)$\(hash)")
        #expect(PasswordHash.isHash("$6$\(salt)$\(hash)"))
    }

    @Test func hashesHaveSaltsOfTheirOwn() {
        let hashes = (0..<4).map { _ in PasswordHash.sha512([0x61]) }
        #expect(Set(hashes).count == 4 && hashes.allSatisfy { PasswordHash.isHash($0) && $0.utf8.count == 106 })
    }

    @Test func aHashIsPassedOn() throws {
        let hash = PasswordHash.sha512([0x61])
        let path = try directory.write("password", hash + "\n")
        #expect(try #require(files { $0.passwordFile = path }["user-data"]).contains("\"\(hash)\""))
        #expect(PasswordHash.isHash("$6$rounds=1000$" + hash.dropFirst(3)))
        #expect(PasswordHash.isHash("$5$salt$" + String(repeating: "x", count: 43)))
        // What only looks like one is a password.
        for text in ["$6$", "$6$salt$short", "$6$a$b$c$d", "$y$", "$1$x"] {
            #expect(!PasswordHash.isHash(text) && !PasswordHash.isOtherHash(text))
        }
    }

    /// cloud-init of Debian 12 would set the hash as the password.
    @Test func aHashOfAnotherMethod() throws {
        let path = try directory.write(
            "password", "$y$j9T$wQwXbSbHnBnSmtkE9dIQF1$JSVhx5owHyZ8BY1edkNhgZaPvnRHrLchhst074ehJq2")
        #expect(try problem { $0.passwordFile = path }.contains("some versions of cloud-init do not support"))
    }

    @Test(arguments: [
        ("", "it is empty"), ("\n", "it is empty"), ("a\nb\n", "the file has more than one line"),
        ("a\n\n", "the file has more than one line"), ("a\r\n", "it has control characters"),
        ("a\0b", "it has control characters"), (String(repeating: "x", count: 513), "it has more than 512 bytes"),
    ]) func noPassword(contents: String, reason: String) throws {
        let path = try directory.write("password", contents)
        #expect(
            try problem { $0.passwordFile = path } == "the password in \(path) cannot be used: \(reason)")
    }

    // MARK: Names

    @Test func names() {
        for name in ["alice", "a", "_x", "user-1_2", String(repeating: "a", count: 32)] {
            #expect(Seed.isUserName(name), "\(name)")
        }
        for name in ["", "Alice", "1a", "-a", "a b", "a\n", "ä", "a:b", String(repeating: "a", count: 33)] {
            #expect(!Seed.isUserName(name), "\(name)")
        }
        let longest = String(repeating: "a", count: 63)
        for name in ["web1", "Web-1.example.org", "1", longest, [longest, longest, longest].joined(separator: ".")] {
            #expect(Seed.isHostName(name), "\(name)")
        }
        for name in [
            "", ".", "a.", ".a", "a..b", "-a", "a-", "a_b", "a b", "ä", "a\n", longest + "a",
            [longest, longest, longest, longest].joined(separator: "."),
        ] { #expect(!Seed.isHostName(name), "\(name)") }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CCrypto
internal import Glibc
public import HostNetwork
internal import Linux

/// The identity of the host, which makes machines of the same name differ between hosts: the host's machine-id
/// (machine-id(5)).
///
/// The identifier is confidential, so that nothing but a keyed hash of it reaches a guest or a network: HMAC with
/// SHA-256 (RFC 2104).
public struct HostIdentity: Sendable {
    private let key: [UInt8]

    /// Reads the host's identity. Where there is no machine-id, as in many containers, the host's name takes its place.
    public init() { self.init(files: ["/etc/machine-id", "/var/lib/dbus/machine-id"]) }

    /// - Parameter files: where a machine-id may be; the first that has one counts.
    init(files: [String]) {
        for file in files {
            if let text = Self.firstLine(of: file), text.count == 32 {
                key = text
                return
            }
        }
        var name = [CChar](repeating: 0, count: 256)
        // As many bytes as the array has room for; the last one stays zero.
        _ = unsafe gethostname(&name, name.count - 1)
        key = name.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }
    }

    /// The identifier of the machine of this name: the same at every start on this host, another one on other hosts.
    public func uuid(ofMachine name: String) -> UUID {
        UUID(ofHash: digest(["uuid", name]).prefix(16).reduce(0) { $0 << 8 | UInt128($1) })
    }

    /// The identifier of the machine without a name whose first disk has this path: the same at every start on this
    /// host, another one for another path.
    public func uuid(ofDisk path: String) -> UUID {
        let resolved = path.withRawCString { path in
            // A name of the call's own, or nil.
            guard let name = unsafe realpath(path, nil) else { return nil as String? }
            defer { unsafe free(name) }
            return unsafe String(
                raw: UnsafeBufferPointer(start: name, count: strlen(name)).map { UInt8(bitPattern: $0) })
        }
        return UUID(ofHash: digest(["disk", resolved ?? path]).prefix(16).reduce(0) { $0 << 8 | UInt128($1) })
    }

    /// The address of a machine's network card: the same at every start on this host for the same name and interface.
    /// - Parameter interface: the name of the host's end of the card, of which a network namespace has one; for a card
    ///   without an interface of the host, what cannot be the name of one.
    public func address(ofMachine name: String, interface: String) -> MACAddress {
        MACAddress(
            locallyAdministered: digest(["mac", name, interface]).prefix(6).reduce(0) { $0 << 8 | UInt64($1) })
    }

    /// HMAC-SHA256 of the words, each with a zero behind it.
    private func digest(_ words: [String]) -> [UInt8] {
        let block = key.prefix(64) + [UInt8](repeating: 0, count: 64 - min(key.count, 64))
        let message = Array("swkvm\0".utf8) + words.flatMap { Array($0.utf8) + [0] }
        let inner = Self.sha256(block.map { $0 ^ 0x36 } + message)
        return Self.sha256(block.map { $0 ^ 0x5c } + inner)
    }

    private static func sha256(_ bytes: [UInt8]) -> [UInt8] {
        var digest = [UInt8](repeating: 0, count: Int(SHA256_DIGEST_LENGTH))
        // Not SHA256(), which goes through EVP and brings that into the binary.
        var state = SHA256_CTX()
        unsafe SHA256_Init(&state)
        // libcrypto reads as many bytes as the first array has, writes a digest's, and keeps no pointer.
        unsafe bytes.withUnsafeBytes { _ = unsafe SHA256_Update(&state, $0.baseAddress, $0.count) }
        unsafe SHA256_Final(&digest, &state)
        return digest
    }

    /// Without its end; nil where there is no such file, or it is empty.
    private static func firstLine(of path: String) -> [UInt8]? {
        guard let file = try? FileDescriptor.open(path, O_RDONLY) else { return nil }
        var bytes = [UInt8](repeating: 0, count: 256)
        // As many bytes as the array has room for.
        guard
            let count = try? unsafe bytes.withUnsafeMutableBytes({ (room) throws(SystemCallError) in
                try unsafe file.read(into: room)
            })
        else { return nil }
        let line = bytes[..<count].prefix { $0 != 0x0a }
        return line.isEmpty ? nil : Array(line)
    }
}

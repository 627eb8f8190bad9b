// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// Where a remote disk is and how it is reached: an NBD address in the manner of libnbd and QEMU
/// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md).
///
///     nbd://HOST[:PORT]/EXPORT                 nbds://[USER@]HOST[:PORT]/EXPORT
///     nbd+unix:///EXPORT?socket=PATH           nbds+unix://[USER@]/EXPORT?socket=PATH
///
/// What follows `?` is separated by `&`: `reconnect=SECONDS`; with `nbds` also `tls-certificates=DIRECTORY`,
/// `tls-psk-file=FILE`, `tls-verify-peer=yes|no`. Characters that mean something else are written `%XX`.
struct NBDLocation: Sendable, Equatable {
    enum Server: Sendable, Equatable {
        case tcp(host: String, port: UInt16)
        case unix(path: String)
    }

    struct Security: Sendable, Equatable {
        var user: String?
        /// A directory with `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` if the server authenticates its
        /// clients.
        var certificates: String?
        var keyFile: String?
        var verifiesPeer = true
    }

    static let standardPort: UInt16 = 10809
    /// NBD's own limit of a string.
    static let maximumNameLength = 4096

    var server: Server
    /// Empty for the server's default.
    var export: String
    /// nil for a connection that anyone on its way can read and change.
    var security: Security?
    /// Seconds for which requests wait for a connection that was lost; nil where the address does not say.
    var reconnect: Int?

    static let possibleReconnect = 0...86400
    /// Why a format is refused there.
    static let isRaw =
        "a remote disk is always raw, without snapshots or a backing file; "
        + "qemu-nbd -f qcow2 exports the disk of a qcow2 file"

    /// Indicates whether a name of a disk is such an address, and no path. A file of that name is `./nbd:…`.
    static func isAddress(_ name: String) -> Bool {
        ["nbd:", "nbds:", "nbd+unix:", "nbds+unix:"].contains { name.hasPrefix($0) }
    }

    init(_ text: String) throws(DiskImageError) {
        func wrong(_ reason: String) -> DiskImageError { .remoteAddress(path: text, reason: reason) }
        func decoded(_ part: Substring, _ what: String, isPath: Bool = false) throws(DiskImageError) -> String {
            guard let plain = percentDecoded(part), isPath || !plain.hasRawScalars else {
                throw wrong("\(what) has a % without two hexadecimal digits, or is not UTF-8")
            }
            guard !plain.utf8.contains(0) else { throw wrong("\(what) has a zero byte") }
            return plain
        }

        guard let start = text.firstOccurrence(of: "://") else { throw wrong("no // after the colon") }
        let scheme = text[..<start.lowerBound]
        let isLocal = scheme.hasSuffix("+unix")
        var rest = text[start.upperBound...]
        guard !rest.contains("#") else { throw wrong("a # in it; write %23") }
        var options: [(key: String, value: String)] = []
        if let mark = rest.firstIndex(of: "?") {
            for word in rest[rest.index(after: mark)...].split(separator: "&") {
                guard let equals = word.firstIndex(of: "=") else { throw wrong("'\(word)' after the ? has no value") }
                options.append(
                    (
                        try decoded(word[..<equals], "an option"),
                        try decoded(word[word.index(after: equals)...], "an option", isPath: true)
                    ))
            }
            rest = rest[..<mark]
        }
        let slash = rest.firstIndex(of: "/") ?? rest.endIndex
        var place = rest[..<slash]
        export = try decoded(rest[slash...].dropFirst(), "the export's name")
        guard export.utf8.count <= Self.maximumNameLength else {
            throw wrong("an export's name has at most \(Self.maximumNameLength) bytes")
        }

        security = scheme.hasPrefix("nbds") ? Security() : nil
        if let at = place.lastIndex(of: "@") {
            guard security != nil else { throw wrong("a user requires nbds:") }
            security?.user = try decoded(place[..<at], "the user's name")
            place = place[place.index(after: at)...]
        }
        var socket: String?
        for (key, value) in options {
            switch (key, security) {
            case ("socket", _):
                socket = value
            case ("reconnect", _):
                guard let seconds = Int(value), Self.possibleReconnect.contains(seconds) else {
                    throw wrong("reconnect=\(value); expected 0 to \(Self.possibleReconnect.upperBound) seconds")
                }
                reconnect = seconds
            case ("tls-certificates", _?):
                security?.certificates = value
            case ("tls-psk-file", _?):
                security?.keyFile = value
            case ("tls-verify-peer", _?):
                guard
                    let verifies = ["yes": true, "true": true, "1": true, "no": false, "false": false, "0": false][
                        value]
                else {
                    throw wrong("tls-verify-peer=\(value); expected yes or no")
                }
                security?.verifiesPeer = verifies
            case ("tls-certificates", nil), ("tls-psk-file", nil), ("tls-verify-peer", nil):
                throw wrong("'\(key)' requires nbds:")
            default:
                throw wrong(
                    "'\(key)=' is not recognized; expected socket=, reconnect=, tls-certificates=, tls-psk-file= or tls-verify-peer="
                )
            }
        }
        if isLocal {
            guard place.isEmpty else { throw wrong("\(scheme): has no host: write \(scheme):///EXPORT?socket=PATH") }
            guard let socket, !socket.isEmpty else { throw wrong("no socket=PATH in it") }
            // libnbd checks a certificate against the host's name, and without one not at all.
            if let security, security.verifiesPeer, security.keyFile == nil {
                throw wrong(
                    "a server on a UNIX socket has no host name to check its certificate against: specify tls-psk-file=FILE or tls-verify-peer=no"
                )
            }
            server = .unix(path: socket)
        } else {
            guard socket == nil else { throw wrong("socket= requires \(scheme)+unix:") }
            let (host, port) = try Self.hostAndPort(place, wrong)
            // Without a directory libnbd takes whatever certificate comes, and says nothing.
            if let security, security.verifiesPeer, security.keyFile == nil, security.certificates == nil {
                throw wrong(
                    "no trust anchor: specify tls-certificates=DIRECTORY with a ca-cert.pem, tls-psk-file=FILE, or tls-verify-peer=no to accept any server"
                )
            }
            server = .tcp(host: try decoded(host, "the host's name"), port: port)
        }
    }

    private static func hostAndPort(
        _ place: Substring, _ wrong: (String) -> DiskImageError
    ) throws(DiskImageError) -> (host: Substring, port: UInt16) {
        var host = place
        var tail = place[place.endIndex...]
        if place.first == "[" {
            // An IPv6 address has colons of its own.
            guard let end = place.firstIndex(of: "]") else { throw wrong("a [ without ]") }
            host = place[place.index(after: place.startIndex)..<end]
            tail = place[place.index(after: end)...]
        } else if let colon = place.firstIndex(of: ":") {
            host = place[..<colon]
            tail = place[colon...]
        }
        guard !host.isEmpty else { throw wrong("no host in it") }
        if tail.isEmpty { return (host, standardPort) }
        guard tail.first == ":", let port = UInt16(tail.dropFirst()), port > 0 else {
            throw wrong("'\(tail)' is not a port; expected :1 to :65535")
        }
        return (host, port)
    }
}

/// The text with the bytes of its `%XX`, or nil if there is a `%` without two digits.
private func percentDecoded(_ text: Substring) -> String? {
    var bytes: [UInt8] = []
    var rest = String(text).rawBytes[...]
    while let byte = rest.popFirst() {
        guard byte == UInt8(ascii: "%") else {
            bytes.append(byte)
            continue
        }
        guard let high = rest.popFirst().flatMap(digit), let low = rest.popFirst().flatMap(digit) else { return nil }
        bytes.append(high << 4 | low)
    }
    return String(raw: bytes)
}

private func digit(_ byte: UInt8) -> UInt8? {
    Character(UnicodeScalar(byte)).hexDigitValue.map(UInt8.init)
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A disk for cloud-init's data source NoCloud: a small FAT file system with the label CIDATA, whose files say who the
/// guest is and how it is configured at its first boot.
///
/// What the options say is JSON, which is YAML as well, so that nothing here parses YAML; files of the user are passed
/// on as they are.
public struct Seed: Sendable {
    /// What a seed is made from.
    public struct Options: Sendable, Equatable {
        /// The name of the image's default user.
        public var user: String?
        public var hostName: String?
        /// Files with public keys for that user.
        public var keyFiles: [String] = []
        /// A file with that user's password.
        public var passwordFile: String?
        public var userDataFile: String?
        public var metaDataFile: String?
        public var networkConfigFile: String?

        public init() {}

        /// Indicates whether there is anything to make a seed of.
        public var isEmpty: Bool { self == Options() }
    }

    /// The bytes of the disk, a multiple of 512.
    public let image: [UInt8]
    /// Sentences about what is probably not as it was meant.
    public let warnings: [String]

    /// The most bytes of each of the user's files.
    static let maximumFileSize = 1 << 20

    /// Reads the files, checks them, and makes the disk.
    /// - Parameters:
    ///   - instance: the instance-id, by which cloud-init recognizes a machine that it has configured before.
    ///   - defaultHostName: the host name without one in the options, if it can be one.
    public init(_ options: Options, instance: String, defaultHostName: String? = nil) throws(SeedError) {
        let files = try Self.files(options, instance: instance, defaultHostName: defaultHostName)
        image = FATVolume.image(label: "CIDATA", files)
        var warnings: [String] = []
        if let path = options.userDataFile, !Self.isUserData(files[1].contents) {
            warnings.append(
                "cloud-init will ignore \(path): it does not begin like user-data, such as with #cloud-config or #!/bin/sh"
            )
        }
        if let path = options.metaDataFile, !Self.hasInstance(files[0].contents) {
            warnings.append(
                "\(path) has no instance-id: cloud-init treats all machines without one as the same machine")
        }
        self.warnings = warnings
    }

    /// `meta-data`, `user-data`, and what there is of the others.
    static func files(
        _ options: Options, instance: String, defaultHostName: String?
    ) throws(SeedError) -> [FATVolume.File] {
        func contents(_ path: String, _ option: String) throws(SeedError) -> [UInt8] {
            try SeedFile.read(path, option: option, limit: maximumFileSize)
        }
        let metaData: [UInt8]
        if let path = options.metaDataFile {
            metaData = try contents(path, "meta-data")
        } else {
            var keys: [String] = [], known: Set<String> = []
            for path in options.keyFiles { keys += try PublicKeys.read(path).filter { known.insert($0).inserted } }
            let hostName = options.hostName ?? defaultHostName.flatMap { isHostName($0) ? $0 : nil }
            metaData = text(
                .object([
                    ("instance-id", .string(instance)), ("local-hostname", hostName.map { .string($0) }),
                    ("public-keys", keys.isEmpty ? nil : .array(keys.map { .string($0) })),
                ]))
            guard metaData.count <= maximumFileSize else { throw .tooManyKeys(keys.count) }
        }
        let ours = try configuration(options).map { Array("#cloud-config\n".utf8) + text($0) }
        var files = [FATVolume.File(name: "meta-data", contents: metaData)]
        if let path = options.userDataFile {
            files.append(FATVolume.File(name: "user-data", contents: try contents(path, "user-data")))
            // cloud-init uses both, of whatever kind the user's is, and prefers the user's where they disagree.
            if let ours { files.append(FATVolume.File(name: "vendor-data", contents: ours)) }
        } else {
            files.append(FATVolume.File(name: "user-data", contents: ours ?? Array("#cloud-config\n{}\n".utf8)))
        }
        if let path = options.networkConfigFile {
            files.append(FATVolume.File(name: "network-config", contents: try contents(path, "network-config")))
        }
        return files
    }

    /// What cloud-init is to do about the user; nil for nothing. `user` changes the image's default user, who has the
    /// groups and the sudo rules that the distribution chose, and to whom `password` and the keys of the meta-data
    /// belong.
    private static func configuration(_ options: Options) throws(SeedError) -> JSON? {
        let password = try options.passwordFile.map { path throws(SeedError) in try readPassword(path) }
        guard options.user != nil || password != nil else { return nil }
        return .object([
            ("user", options.user.map { .object([("name", .string($0))]) }),
            // Otherwise root's keys allow nothing but a message about the default user.
            ("disable_root", options.user == "root" ? false : nil),
            ("password", password.map { .string($0) }),
            // Otherwise the first login asks for another one.
            ("chpasswd", password.map { _ in .object([("expire", false)]) }),
        ])
    }

    private static func text(_ json: JSON) -> [UInt8] { Array("\(json)\n".utf8) }

    /// The first line of a file, hashed; a hash is taken as it is.
    private static func readPassword(_ path: String) throws(SeedError) -> String {
        let bytes = try SeedFile.read(path, option: "password-file", limit: 4096)
        let lines = bytes.split(separator: 0x0a, omittingEmptySubsequences: false)
        let isOneLine = lines.count == 1 || lines.count == 2 && lines[1].isEmpty
        guard isOneLine else { throw .password(path: path, reason: "the file has more than one line") }
        let line = Array(lines[0])
        guard !line.isEmpty else { throw .password(path: path, reason: "it is empty") }
        guard line.count <= 512 else { throw .password(path: path, reason: "it has more than 512 bytes") }
        // A carriage return at the end of the line would be part of it.
        guard line.allSatisfy({ $0 >= 0x20 && $0 != 0x7f }) else {
            throw .password(path: path, reason: "it has control characters")
        }
        let text = String(decoding: line, as: UTF8.self)
        guard !PasswordHash.isOtherHash(text) else {
            throw .password(
                path: path,
                reason:
                    "it is a hash that some versions of cloud-init do not support; `mkpasswd -m sha512crypt` creates one that all support"
            )
        }
        return PasswordHash.isHash(text) ? text : PasswordHash.sha512(line)
    }

    // MARK: Names

    /// Indicates whether useradd(8) of the usual distributions accepts a user's name.
    public static func isUserName(_ text: String) -> Bool {
        let bytes = Array(text.utf8)
        guard let first = bytes.first, bytes.count <= 32, isLetter(first) || first == UInt8(ascii: "_") else {
            return false
        }
        return bytes.allSatisfy {
            isLetter($0) || isDigit($0) || $0 == UInt8(ascii: "_") || $0 == UInt8(ascii: "-")
        }
    }

    /// Indicates whether a text is a host name, with or without a domain (RFC 1123 §2.1): labels of up to 63 letters,
    /// digits and hyphens, of which none is at an end.
    public static func isHostName(_ text: String) -> Bool {
        let labels = text.utf8.split(separator: UInt8(ascii: "."), omittingEmptySubsequences: false)
        return text.utf8.count <= 253
            && labels.allSatisfy { label in
                (1...63).contains(label.count) && label.first != UInt8(ascii: "-") && label.last != UInt8(ascii: "-")
                    && label.allSatisfy { isLetter($0 | 0x20) || isDigit($0) || $0 == UInt8(ascii: "-") }
            }
    }

    private static func isLetter(_ byte: UInt8) -> Bool { (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte) }
    private static func isDigit(_ byte: UInt8) -> Bool { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) }

    // MARK: The user's files

    /// Indicates whether cloud-init finds out what it is: by its first line, as a MIME message, or compressed.
    static func isUserData(_ bytes: [UInt8]) -> Bool {
        if bytes.isEmpty || bytes.starts(with: [0x1f, 0x8b]) { return true }
        let head = String(decoding: bytes.prefix(4096), as: UTF8.self)
        let kinds = [
            "#!", "#cloud-config", "#cloud-boothook", "#include", "#part-handler", "#upstart-job", "## template: jinja",
        ]
        return kinds.contains { head.hasPrefix($0) } || head.lowercased().firstOccurrence(of: "mime-version:") != nil
    }

    private static func hasInstance(_ bytes: [UInt8]) -> Bool {
        let word = Array("instance-id".utf8)
        return bytes.indices.contains { bytes[$0...].starts(with: word) }
    }
}

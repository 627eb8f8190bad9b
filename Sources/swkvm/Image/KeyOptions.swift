// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage

/// The keys of an encrypted image and of its backing files.
struct KeyOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "File with the key (password) of an encrypted image; every byte counts. Repeat for its backing files, in order; the last key is used for all remaining ones.",
            valueName: "file"), completion: .file())
    var keyFile: [String] = []

    @Option(
        help: ArgumentHelp("The same, from an open file descriptor; used after those of --key-file.", valueName: "n"),
        transform: descriptorNumber)
    var keyFd: [Int32] = []

    func load() throws(DiskImageError) -> [DiskKey] { try Self.load(keyFile, keyFd) }

    static func load(_ files: [String], _ descriptors: [Int32]) throws(DiskImageError) -> [DiskKey] {
        try (files.map(KeySource.file) + descriptors.map(KeySource.descriptor)).map { source throws(DiskImageError) in
            try DiskKey(source, report: ImageTool.report)
        }
    }
}

/// How a new image is encrypted, for the verbs that make one.
struct EncryptionOptions: ParsableArguments {
    @Flag(help: "qcow2: encrypt the data with LUKS (AES-256-XTS, PBKDF2 with SHA-256).")
    var encrypt = false

    @Option(
        help: ArgumentHelp(
            "Time that checking a key takes on this computer, in milliseconds. Default: 2000.", valueName: "ms"),
        transform: wholeNumber(0...UInt32.max))
    var iterTime: UInt32?

    @Option(
        help: ArgumentHelp(
            "PBKDF2 iterations instead of a time, \(PasswordCost.minimum) to \(PasswordCost.maximum).", valueName: "n"),
        transform: wholeNumber(0...UInt32.max))
    var iterations: UInt32?

    func validate() throws {
        guard encrypt || (iterTime == nil && iterations == nil) else {
            throw ValidationError("The options --iter-time and --iterations require --encrypt.")
        }
        guard iterTime == nil || iterations == nil else {
            throw ValidationError("The options --iter-time and --iterations cannot be combined.")
        }
    }

    /// - Parameters:
    ///   - option: which one names the key.
    func encryption(_ keys: [DiskKey], _ path: String, option: String) throws(DiskImageError) -> ImageEncryption? {
        guard encrypt else { return nil }
        guard let key = keys.first, keys.count == 1 else {
            throw .impossible(path: path, reason: "--encrypt requires exactly one key: \(option)-file or \(option)-fd")
        }
        var encryption = ImageEncryption(key: key)
        if let iterTime { encryption.cost = .milliseconds(iterTime) }
        if let iterations { encryption.cost = .iterations(iterations) }
        return encryption
    }
}

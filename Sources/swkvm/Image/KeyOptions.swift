// SPDX-License-Identifier: Apache-2.0

internal import ArgumentParser
internal import DiskImage

/// The keys of an encrypted image and of its backing files.
struct KeyOptions: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "A file with the key (the password) of an encrypted image, every byte of it. Again for its backing files, in their order; the last one is for all that follow.",
            valueName: "file"), completion: .file())
    var keyFile: [String] = []

    @Option(help: ArgumentHelp("The same from an open descriptor; after those of --key-file.", valueName: "n"), transform: descriptorNumber)
    var keyFd: [Int32] = []

    func load() throws(DiskImageError) -> [DiskKey] { try Self.load(keyFile, keyFd) }

    static func load(_ files: [String], _ descriptors: [Int32]) throws(DiskImageError) -> [DiskKey] {
        try (files.map(KeySource.file) + descriptors.map(KeySource.descriptor)).map { source throws(DiskImageError) in try DiskKey(source) }
    }
}

/// How a new image is encrypted, for the verbs that make one.
struct EncryptionOptions: ParsableArguments {
    @Flag(help: "qcow2: encrypt the data with LUKS (AES-256-XTS, PBKDF2 with SHA-256).")
    var encrypt = false

    @Option(help: ArgumentHelp("Milliseconds that trying a key is to take on this computer. Default: 2000.", valueName: "ms"), transform: wholeNumber(0...UInt32.max))
    var iterTime: UInt32?

    @Option(help: ArgumentHelp("Iterations of PBKDF2 in place of a time, \(PasswordCost.minimum) to \(PasswordCost.maximum).", valueName: "n"), transform: wholeNumber(0...UInt32.max))
    var iterations: UInt32?

    func validate() throws {
        guard encrypt || (iterTime == nil && iterations == nil) else { throw ValidationError("--iter-time and --iterations go with --encrypt.") }
        guard iterTime == nil || iterations == nil else { throw ValidationError("--iter-time and --iterations are two ways to say the same.") }
    }

    /// - Parameters:
    ///   - option: which one names the key.
    func encryption(_ keys: [DiskKey], _ path: String, option: String) throws(DiskImageError) -> ImageEncryption? {
        guard encrypt else { return nil }
        guard let key = keys.first, keys.count == 1 else { throw .impossible(path: path, reason: "--encrypt takes one key: \(option)-file or \(option)-fd") }
        var encryption = ImageEncryption(key: key)
        if let iterTime { encryption.cost = .milliseconds(iterTime) }
        if let iterations { encryption.cost = .iterations(iterations) }
        return encryption
    }
}

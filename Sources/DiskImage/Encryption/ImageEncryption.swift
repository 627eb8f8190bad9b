// SPDX-License-Identifier: Apache-2.0

/// The encryption of a new image: LUKS, AES-256-XTS and a random key protected by a password.
public struct ImageEncryption: Sendable, Equatable {
    public var key: DiskKey
    /// The cost of checking a password. The default value is qemu-img's.
    public var cost: PasswordCost

    public init(key: DiskKey, cost: PasswordCost = .milliseconds(2000)) {
        self.key = key
        self.cost = cost
    }

    func makeVolume(_ path: String) throws(DiskImageError) -> LUKSVolume {
        try LUKSVolume(password: key.password, cost: cost, path: path)
    }
}

extension QCOW2Options {
    /// Refuses what cannot be encrypted.
    func checkEncryption(_ path: String, preallocation: Preallocation) throws(DiskImageError) {
        guard encryption != nil else { return }
        guard preallocation == .off || preallocation == .full else {
            throw .impossible(
                path: path, reason: "preallocated space that is not written decrypts to noise; use --preallocation full"
            )
        }
        guard !dataFileIsRaw else {
            throw .impossible(path: path, reason: "an encrypted data file is not a valid raw image")
        }
    }
}

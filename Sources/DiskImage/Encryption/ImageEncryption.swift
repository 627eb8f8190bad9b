// SPDX-License-Identifier: Apache-2.0

/// How a new image is encrypted: with LUKS, AES-256-XTS and a key of its own, which a password opens.
public struct ImageEncryption: Sendable, Equatable {
    public var key: DiskKey
    /// What trying a password costs. The default value is qemu-img's.
    public var cost: PasswordCost

    public init(key: DiskKey, cost: PasswordCost = .milliseconds(2000)) {
        self.key = key
        self.cost = cost
    }

    func makeVolume(_ path: String) throws(DiskImageError) -> LUKSVolume { try LUKSVolume(password: key.password, cost: cost, path: path) }
}

extension QCOW2Options {
    /// Refuses what cannot be encrypted.
    func checkEncryption(_ path: String, preallocation: Preallocation) throws(DiskImageError) {
        guard encryption != nil else { return }
        guard preallocation == .off || preallocation == .full else {
            throw .impossible(path: path, reason: "preallocated space that is not written decrypts to noise; use --preallocation full")
        }
        guard !dataFileIsRaw else { throw .impossible(path: path, reason: "an encrypted data file is not a valid raw image") }
    }
}

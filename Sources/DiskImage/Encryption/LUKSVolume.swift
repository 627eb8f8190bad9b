// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A LUKS header with its key material, as it lies in an image: opened with a password, or newly created.
struct LUKSVolume: Sendable {
    let header: LUKSHeader
    /// Header and key material. What is beyond of ``region`` is zeroes.
    let bytes: [UInt8]
    /// Bytes of the file that are reserved.
    let region: UInt64
    /// The key of the disk; nil before the password was given.
    private(set) var masterKey: SecretBytes?

    /// What an image holds.
    /// - Parameter bytes: its beginning, up to the end of the last active slot at least.
    init(_ header: LUKSHeader, bytes: [UInt8], region: UInt64) {
        self.header = header
        self.bytes = bytes
        self.region = region
    }

    /// The cipher for the disk's sectors.
    func cipher(path: String) throws(DiskImageError) -> SectorCipher? {
        guard let masterKey else { return nil }
        return try SectorCipher(header.specification, key: masterKey, path: path)
    }

    // MARK: - Opening

    /// The disk's key, from the first slot that the password fits; nil if there is none.
    static func unlock(
        _ header: LUKSHeader, _ password: SecretBytes, path: String, _ isInterrupted: () -> Bool = { false },
        material: (LUKSHeader.Slot) throws(DiskImageError) -> [UInt8]
    ) throws(DiskImageError) -> SecretBytes? {
        let keySize = header.specification.keySize
        for slot in header.slots where slot.isActive {
            let encrypted = try material(slot)
            let slotKey = try SecretBytes(keySize, of: path) { memory in
                password.withBytes {
                    header.hash.deriveKey($0, salt: slot.salt, iterations: slot.iterations, into: memory, isInterrupted)
                }
            }
            if isInterrupted() { throw .openingInterrupted(path: path) }
            let cipher = try SectorCipher(header.specification, key: slotKey, path: path)
            let split = try SecretBytes(encrypted.count, of: path) { memory in
                encrypted.withReadableIOMemory { memory.copy(from: $0) }
                cipher.decrypt(memory, sector: 0)
            }
            let candidate = try SecretBytes(keySize, of: path) { key in
                split.withBytes { StripedKey.merge($0, into: key, header.hash) }
            }
            let found = try digest(
                candidate, header.hash, header.digestSalt, header.digestIterations, path, isInterrupted)
            if found.isEqual(to: header.digest) { return candidate }
            if isInterrupted() { throw .openingInterrupted(path: path) }
        }
        return nil
    }

    /// By which a key is known.
    private static func digest(
        _ key: SecretBytes, _ hash: HashAlgorithm, _ salt: [UInt8], _ iterations: UInt32, _ path: String,
        _ isInterrupted: () -> Bool = { false }
    ) throws(DiskImageError) -> SecretBytes {
        try SecretBytes(LUKSHeader.digestSize, of: path) { digest in
            key.withBytes { hash.deriveKey($0, salt: salt, iterations: iterations, into: digest, isInterrupted) }
        }
    }

    // MARK: - Making

    /// A volume with a new key for AES-256-XTS, which a password opens.
    /// - Parameters:
    ///   - password: goes into the first slot.
    ///   - cost: what trying a password costs.
    init(password: SecretBytes, cost: PasswordCost, path: String) throws(DiskImageError) {
        let specification = CipherSpecification.standard, hash = HashAlgorithm.sha256
        let iterations = try cost.iterations(hash, keySize: specification.keySize, path)
        let key = try SecretBytes(specification.keySize, of: path) { (memory) throws(DiskImageError) in
            try fillRandomly(memory, path)
        }
        let digestSalt = try randomBytes(LUKSHeader.saltSize, path),
            slotSalt = try randomBytes(LUKSHeader.saltSize, path)
        // As in QEMU: an eighth, as it is the same for all slots and protects a random key that cannot be guessed.
        let digestIterations = max(PasswordCost.minimum, iterations / 8)
        let digest = try Self.digest(key, hash, digestSalt, digestIterations, path)
        header = LUKSHeader(
            specification, cipherMode: "xts-plain64", hash, digest: digest.withBytes { $0.array },
            digestSalt: digestSalt,
            digestIterations: digestIterations, slotSalt: slotSalt, iterations: iterations, uuid: try Self.newUUID(path)
        )
        let slotKey = try SecretBytes(specification.keySize, of: path) { memory in
            password.withBytes { hash.deriveKey($0, salt: slotSalt, iterations: iterations, into: memory) }
        }
        let cipher = try SectorCipher(specification, key: slotKey, path: path)
        let material = try SecretBytes(header.materialSize, of: path) { (memory) throws(DiskImageError) in
            try fillRandomly(memory, path)
            key.withBytes { StripedKey.split($0, into: memory, hash) }
            cipher.encrypt(memory, sector: 0)
        }
        let encoded = header.encoded()
        let padding = [UInt8](repeating: 0, count: Int(header.slots[0].place) - encoded.count)
        bytes = encoded + padding + material.withBytes { $0.array }
        region = header.payloadOffset
        masterKey = key
    }

    /// A random one (RFC 9562 §5.4).
    private static func newUUID(_ path: String) throws(DiskImageError) -> String {
        var bytes = try randomBytes(16, path)
        bytes[6] = bytes[6] & 0x0f | 0x40
        bytes[8] = bytes[8] & 0x3f | 0x80
        let digits = Array("0123456789abcdef")
        let text = bytes.map { "\(digits[Int($0 >> 4)])\(digits[Int($0 & 15)])" }
        return [text[0..<4], text[4..<6], text[6..<8], text[8..<10], text[10..<16]].map { $0.joined() }.joined(
            separator: "-")
    }
}

/// The cost of checking a password: a number of iterations, or as many as this computer computes in a time.
public enum PasswordCost: Sendable, Equatable {
    case iterations(UInt32)
    case milliseconds(UInt32)

    /// The minimum for new images, as in QEMU and cryptsetup.
    public static let minimum: UInt32 = 1000
    /// The maximum allowed by the default of ``DiskImageOptions/maximumKeyWork``, with two digests for a key.
    public static let maximum = UInt32(DiskImageOptions.defaultMaximumKeyWork / 4)

    /// - Parameter keySize: bytes that are derived.
    func iterations(_ hash: HashAlgorithm, keySize: Int, _ path: String) throws(DiskImageError) -> UInt32 {
        switch self {
        case .iterations(let count):
            guard (Self.minimum...Self.maximum).contains(count) else {
                throw .impossible(
                    path: path,
                    reason: "\(count) iterations for a password; \(Self.minimum) to \(Self.maximum) are possible")
            }
            return count
        case .milliseconds(let time):
            // Long enough for the clock, which counts this thread's work alone.
            let key = try SecretBytes(keySize, of: path) { _ in }
            var tried: UInt32 = 4096, seconds = 0.0
            while true {
                let start = threadTime()
                _ = try SecretBytes(keySize, of: path) { derived in
                    key.withBytes { hash.deriveKey($0, salt: [0], iterations: tried, into: derived) }
                }
                seconds = threadTime() - start
                if seconds >= 0.05 || tried >= Self.maximum / 2 { break }
                tried *= 2
            }
            let count = Double(tried) * Double(time) / 1000 / max(seconds, 1e-6)
            return UInt32(min(max(count, Double(Self.minimum)), Double(Self.maximum)))
        }
    }
}

private func threadTime() -> Double {
    var time = timespec()
    // A value of its own.
    unsafe clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}

/// Random bytes from the kernel, good enough for keys.
private func fillRandomly(_ memory: IOMemory, _ path: String) throws(DiskImageError) {
    var done = 0
    while done < memory.count {
        // The rest of the memory.
        let got = unsafe getrandom(memory.from(done).start, memory.count - done, 0)
        if got < 0, errno != EINTR { throw .system(path: path, .last("getrandom")) }
        done += max(0, got)
    }
}

private func randomBytes(_ count: Int, _ path: String) throws(DiskImageError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    try bytes.withIOMemory { (memory) throws(DiskImageError) in try fillRandomly(memory, path) }
    return bytes
}

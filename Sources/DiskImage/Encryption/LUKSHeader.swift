// SPDX-License-Identifier: Apache-2.0

/// The header of LUKS version 1 (LUKS On-Disk Format Specification 1.2.3 §2), checked: what it names is known and lies
/// inside of what it has.
struct LUKSHeader: Equatable, Sendable {
    /// Bytes of the header itself; key material follows.
    static let size = 592
    static let slotCount = 8
    static let saltSize = 32
    static let digestSize = 20
    /// Bytes that an image reserves for header and key material, at most. Eight slots of the longest keys take two MiB.
    static let maximumRegion: UInt64 = 16 << 20

    let specification: CipherSpecification
    /// In the header's words.
    let cipherMode: String
    let hash: HashAlgorithm
    /// By which a key is known to be the right one.
    let digest: [UInt8]
    let digestSalt: [UInt8]
    let digestIterations: UInt32
    let uuid: String
    /// Bytes from the start where a partition's data would begin.
    let payloadOffset: UInt64
    let slots: [Slot]

    /// A place for the key, encrypted with a password.
    struct Slot: Equatable, Sendable {
        let isActive: Bool
        let iterations: UInt32
        let salt: [UInt8]
        /// Bytes from the start of the header.
        let place: UInt64
        let stripes: UInt32
    }

    static let magic: [UInt8] = Array("LUKS".utf8) + [0xba, 0xbe]

    private enum State {
        static let active: UInt32 = 0x00ac_71f3
        static let disabled: UInt32 = 0x0000_dead
    }

    /// Bytes of a slot's key material.
    var materialSize: Int { specification.keySize * StripedKey.stripes }

    /// HMACs to be computed before a password is known to be wrong.
    var work: UInt64 {
        let active = slots.filter(\.isActive)
        let keys = active.reduce(UInt64(0)) {
            $0 + hash.work(iterations: $1.iterations, keySize: specification.keySize)
        }
        return keys + UInt64(active.count) * hash.work(iterations: digestIterations, keySize: Self.digestSize)
    }

    /// Reads and checks a header.
    /// - Parameters:
    ///   - bytes: ``size`` of them.
    ///   - region: bytes that header and key material have together.
    init(_ bytes: [UInt8], region: UInt64, path: String) throws(DiskImageError) {
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .invalid(path: path, reason: "its LUKS header has \(reason())") }
        }
        guard bytes.count >= Self.size, Array(bytes[..<6]) == Self.magic else {
            throw .invalid(path: path, reason: "no LUKS header where one should be")
        }
        let version = bytes.bigEndian16(at: 6)
        guard version == 1 else {
            throw .unsupported(
                path: path,
                feature: version == 2
                    ? "LUKS version 2, whose keys may need Argon2 (qcow2 has version 1)" : "LUKS version \(version)")
        }
        let cipher = try Self.word(bytes[8..<40], "cipher", path),
            mode = try Self.word(bytes[40..<72], "cipher mode", path)
        let hashName = try Self.word(bytes[72..<104], "hash function", path)
        let keySize = bytes.bigEndian32(at: 108)
        try require(keySize <= 64, "a key of \(keySize) bytes")
        guard cipher == "aes", let specification = CipherSpecification(mode: mode, keySize: Int(keySize)) else {
            throw .unsupported(path: path, feature: "encryption with \(cipher)-\(mode) and keys of \(keySize * 8) bits")
        }
        guard let hash = HashAlgorithm(rawValue: hashName) else {
            throw .unsupported(path: path, feature: "the hash function \(hashName) of its LUKS header")
        }
        self.specification = specification
        self.hash = hash
        cipherMode = mode
        payloadOffset = UInt64(bytes.bigEndian32(at: 104)) * 512
        digest = Array(bytes[112..<132])
        digestSalt = Array(bytes[132..<164])
        digestIterations = bytes.bigEndian32(at: 164)
        uuid = try Self.word(bytes[168..<208], "UUID", path)
        try require(digestIterations > 0, "a digest of its key without iterations")

        var slots: [Slot] = []
        for index in 0..<Self.slotCount {
            let fields = bytes[(208 + 48 * index)..<(256 + 48 * index)]
            let state = fields.bigEndian32(at: 0)
            try require(
                state == State.active || state == State.disabled,
                "a key slot \(index) in the state \(state), which is invalid")
            slots.append(
                Slot(
                    isActive: state == State.active, iterations: fields.bigEndian32(at: 4),
                    salt: Array(fields.dropFirst(8).prefix(Self.saltSize)),
                    place: UInt64(fields.bigEndian32(at: 40)) * 512, stripes: fields.bigEndian32(at: 44)))
        }
        self.slots = slots
        let size = UInt64(materialSize)
        for (index, slot) in slots.enumerated() where slot.isActive {
            try require(slot.iterations > 0, "a key slot \(index) without iterations")
            try require(
                slot.stripes == StripedKey.stripes,
                "a key slot \(index) of \(slot.stripes) stripes; there are always \(StripedKey.stripes)")
            try require(
                slot.place >= UInt64(Self.size) && slot.place <= region && size <= region - slot.place,
                "the key of slot \(index) at byte \(slot.place), outside of its \(region) bytes")
            for (other, second) in slots.enumerated().prefix(index) where second.isActive {
                try require(
                    slot.place >= second.place + size || second.place >= slot.place + size,
                    "the keys of slots \(other) and \(index) in the same place")
            }
        }
    }

    /// A new header with one active slot. Its digest, salts and numbers are the caller's.
    init(
        _ specification: CipherSpecification, cipherMode: String, _ hash: HashAlgorithm, digest: [UInt8],
        digestSalt: [UInt8], digestIterations: UInt32, slotSalt: [UInt8], iterations: UInt32, uuid: String
    ) {
        self.specification = specification
        self.cipherMode = cipherMode
        self.hash = hash
        self.digest = digest
        self.digestSalt = digestSalt
        self.digestIterations = digestIterations
        self.uuid = uuid
        // Key material is aligned as cryptsetup and QEMU do, also that of slots without a key.
        let stride = (UInt64(specification.keySize * StripedKey.stripes) + 4095) & ~4095
        let stripes = UInt32(StripedKey.stripes)
        let first = Slot(isActive: true, iterations: iterations, salt: slotSalt, place: 4096, stripes: stripes)
        slots =
            [first]
            + (1..<Self.slotCount).map { (index: Int) -> Slot in
                Slot(
                    isActive: false, iterations: 0, salt: [UInt8](repeating: 0, count: Self.saltSize),
                    place: 4096 + UInt64(index) * stride, stripes: stripes)
            }
        payloadOffset = 4096 + UInt64(Self.slotCount) * stride
    }

    /// The header's bytes in the file.
    func encoded() -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Self.size)
        func put(_ text: String, at place: Int) {
            bytes.replaceSubrange(place..<place + text.utf8.count, with: text.utf8)
        }
        bytes.replaceSubrange(0..<6, with: Self.magic)
        bytes[7] = 1
        put("aes", at: 8)
        put(cipherMode, at: 40)
        put(hash.rawValue, at: 72)
        bytes.store(UInt32(payloadOffset / 512), at: 104)
        bytes.store(UInt32(specification.keySize), at: 108)
        bytes.replaceSubrange(112..<132, with: digest)
        bytes.replaceSubrange(132..<164, with: digestSalt)
        bytes.store(digestIterations, at: 164)
        put(uuid, at: 168)
        for (index, slot) in slots.enumerated() {
            let place = 208 + 48 * index
            bytes.store(slot.isActive ? State.active : State.disabled, at: place)
            bytes.store(slot.iterations, at: place + 4)
            bytes.replaceSubrange(place + 8..<place + 40, with: slot.salt)
            bytes.store(UInt32(slot.place / 512), at: place + 40)
            bytes.store(slot.stripes, at: place + 44)
        }
        return bytes
    }

    /// Text of a field, which a NUL ends.
    private static func word(
        _ field: ArraySlice<UInt8>, _ what: String, _ path: String
    ) throws(DiskImageError) -> String {
        let text = field.prefix { $0 != 0 }
        guard text.count < field.count, text.allSatisfy({ (0x21..<0x7f).contains($0) }) else {
            throw .invalid(path: path, reason: "its LUKS header has a \(what) that is not valid text")
        }
        return String(decoding: text, as: UTF8.self)
    }
}

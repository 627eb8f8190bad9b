// SPDX-License-Identifier: Apache-2.0

internal import CCrypto
internal import Glibc

/// The hash functions that LUKS headers name and libcrypto has.
enum HashAlgorithm: String, Sendable, CaseIterable {
    case sha1, sha224, sha256, sha384, sha512

    /// Bytes of a digest.
    var digestSize: Int {
        switch self {
        case .sha1: 20
        case .sha224: 28
        case .sha256: 32
        case .sha384: 48
        case .sha512: 64
        }
    }

    /// The most bytes of a digest.
    static let maximumDigestSize = 64

    /// The digest of `input`, the first `output.count` bytes of it.
    func hash(_ input: IOMemory, prefix: UInt32? = nil, into output: IOMemory) {
        switch self {
        case .sha1: digest(SHA1Hash.self, input, prefix, output)
        case .sha224: digest(SHA224Hash.self, input, prefix, output)
        case .sha256: digest(SHA256Hash.self, input, prefix, output)
        case .sha384: digest(SHA384Hash.self, input, prefix, output)
        case .sha512: digest(SHA512Hash.self, input, prefix, output)
        }
    }

    /// PBKDF2 with HMAC (RFC 8018 §5.2).
    /// - Parameter isInterrupted: polled many times a second; `output` is not the key if it cancels.
    func deriveKey(
        _ password: IOMemory, salt: [UInt8], iterations: UInt32, into output: IOMemory,
        _ isInterrupted: () -> Bool = { false }
    ) {
        switch self {
        case .sha1: pbkdf2(SHA1Hash.self, password, salt, iterations, output, isInterrupted)
        case .sha224: pbkdf2(SHA224Hash.self, password, salt, iterations, output, isInterrupted)
        case .sha256: pbkdf2(SHA256Hash.self, password, salt, iterations, output, isInterrupted)
        case .sha384: pbkdf2(SHA384Hash.self, password, salt, iterations, output, isInterrupted)
        case .sha512: pbkdf2(SHA512Hash.self, password, salt, iterations, output, isInterrupted)
        }
    }

    /// How often PBKDF2 computes an HMAC for a key.
    func work(iterations: UInt32, keySize: Int) -> UInt64 {
        UInt64(iterations) * UInt64((keySize + digestSize - 1) / digestSize)
    }
}

/// A hash function of libcrypto's, with its state in the value.
private protocol HashFunction {
    static var digestSize: Int { get }
    /// Bytes of a block of the hash function.
    static var blockSize: Int { get }
    init()
    mutating func update(_ bytes: IOMemory)
    /// Writes the digest, to as many bytes at least; the state is of no use then.
    mutating func finalize(_ digest: IOMemory)
}

// libcrypto reads as many bytes as there are, writes a digest's, and keeps no pointer.

private struct SHA1Hash: HashFunction {
    static let digestSize = 20, blockSize = 64
    var state = SHA_CTX()
    // The state of its own, and whole pieces of memory, as above.
    init() { unsafe SHA1_Init(&state) }
    mutating func update(_ bytes: IOMemory) { unsafe SHA1_Update(&state, bytes.start, bytes.count) }
    mutating func finalize(_ digest: IOMemory) { unsafe SHA1_Final(digest.prefix(Self.digestSize).octets, &state) }
}

private struct SHA224Hash: HashFunction {
    static let digestSize = 28, blockSize = 64
    var state = SHA256_CTX()
    // The state of its own, and whole pieces of memory, as above.
    init() { unsafe SHA224_Init(&state) }
    mutating func update(_ bytes: IOMemory) { unsafe SHA224_Update(&state, bytes.start, bytes.count) }
    mutating func finalize(_ digest: IOMemory) { unsafe SHA224_Final(digest.prefix(Self.digestSize).octets, &state) }
}

private struct SHA256Hash: HashFunction {
    static let digestSize = 32, blockSize = 64
    var state = SHA256_CTX()
    // The state of its own, and whole pieces of memory, as above.
    init() { unsafe SHA256_Init(&state) }
    mutating func update(_ bytes: IOMemory) { unsafe SHA256_Update(&state, bytes.start, bytes.count) }
    mutating func finalize(_ digest: IOMemory) { unsafe SHA256_Final(digest.prefix(Self.digestSize).octets, &state) }
}

private struct SHA384Hash: HashFunction {
    static let digestSize = 48, blockSize = 128
    var state = SHA512_CTX()
    // The state of its own, and whole pieces of memory, as above.
    init() { unsafe SHA384_Init(&state) }
    mutating func update(_ bytes: IOMemory) { unsafe SHA384_Update(&state, bytes.start, bytes.count) }
    mutating func finalize(_ digest: IOMemory) { unsafe SHA384_Final(digest.prefix(Self.digestSize).octets, &state) }
}

private struct SHA512Hash: HashFunction {
    static let digestSize = 64, blockSize = 128
    var state = SHA512_CTX()
    // The state of its own, and whole pieces of memory, as above.
    init() { unsafe SHA512_Init(&state) }
    mutating func update(_ bytes: IOMemory) { unsafe SHA512_Update(&state, bytes.start, bytes.count) }
    mutating func finalize(_ digest: IOMemory) { unsafe SHA512_Final(digest.prefix(Self.digestSize).octets, &state) }
}

private func digest<Hash: HashFunction>(_ type: Hash.Type, _ input: IOMemory, _ prefix: UInt32?, _ output: IOMemory) {
    withScratch(HashAlgorithm.maximumDigestSize) { digest in
        var hash = Hash()
        if let prefix {
            digest.store(bigEndian: prefix, 0)
            hash.update(digest.prefix(4))
        }
        hash.update(input)
        hash.finalize(digest)
        output.prefix(min(Hash.digestSize, output.count)).copy(from: digest)
    }
}

private func pbkdf2<Hash: HashFunction>(
    _ type: Hash.Type, _ password: IOMemory, _ salt: [UInt8], _ iterations: UInt32, _ output: IOMemory,
    _ isInterrupted: () -> Bool
) {
    // They are cleared when they go.
    withScratch(Hash.blockSize + 2 * Hash.digestSize) { scratch in
        let padded = scratch.prefix(Hash.blockSize)
        let value = scratch.piece(Hash.blockSize, Hash.digestSize), sum = scratch.from(Hash.blockSize + Hash.digestSize)
        // HMAC (RFC 2104): the states after the key, which all rounds begin with.
        if password.count > Hash.blockSize {
            digest(type, password, nil, padded.prefix(Hash.digestSize))
        } else {
            padded.prefix(password.count).copy(from: password)
        }
        func start(_ pad: UInt8) -> Hash {
            for index in 0..<Hash.blockSize { padded.store(padded.load(index, as: UInt8.self) ^ pad, index) }
            var hash = Hash()
            hash.update(padded)
            return hash
        }
        var innerStart = start(0x36), outerStart = start(0x36 ^ 0x5c)

        var done = 0, block: UInt32 = 1
        while done < output.count {
            var inner = innerStart, outer = outerStart
            salt.withReadableIOMemory { inner.update($0) }
            value.store(bigEndian: block, 0)
            inner.update(value.prefix(4))
            inner.finalize(value)
            outer.update(value)
            outer.finalize(value)
            sum.copy(from: value)
            var round: UInt32 = 1
            while round < iterations {
                inner = innerStart
                inner.update(value)
                inner.finalize(value)
                outer = outerStart
                outer.update(value)
                outer.finalize(value)
                sum.combine(with: value)
                round += 1
                if round & 0x3fff == 0, isInterrupted() {
                    done = output.count
                    break
                }
            }
            guard done < output.count else { break }
            let count = min(Hash.digestSize, output.count - done)
            output.piece(done, count).copy(from: sum)
            done += count
            block += 1
        }
        clear(&innerStart)
        clear(&outerStart)
    }
}

/// Overwrites a state that a password could be guessed from.
private func clear<Hash: HashFunction>(_ state: inout Hash) {
    // Its own bytes.
    unsafe withUnsafeMutableBytes(of: &state) { unsafe IOMemory($0).erase() }
}

/// Zeroed memory for `count` bytes, of which there is at least one; cleared afterwards.
private func withScratch(_ count: Int, _ body: (IOMemory) -> Void) {
    // On the stack, and `body` does not keep it.
    unsafe withUnsafeTemporaryAllocation(byteCount: count, alignment: 16) { buffer in
        let memory = unsafe IOMemory(buffer)
        memory.clear()
        body(memory)
        memory.erase()
    }
}

// MARK: - Anti-forensic splitting

/// How LUKS spreads a key over many stripes, all of which are needed to get it back (LUKS On-Disk Format 1.2.3 §2.4).
enum StripedKey {
    /// Stripes of a key, as every program makes them.
    static let stripes = 4000

    /// Takes a key out of its stripes.
    /// - Parameter split: ``stripes`` times as many bytes as `key` has.
    static func merge(_ split: IOMemory, into key: IOMemory, _ hash: HashAlgorithm) {
        key.clear()
        for stripe in 0..<stripes {
            key.combine(with: split.piece(stripe * key.count, key.count))
            if stripe < stripes - 1 { diffuse(key, hash) }
        }
    }

    /// Fills the last stripe, after the others have been filled with random bytes, such that ``merge(_:into:_:)`` gives
    /// the key.
    static func split(_ key: IOMemory, into split: IOMemory, _ hash: HashAlgorithm) {
        let last = split.piece((stripes - 1) * key.count, key.count)
        last.clear()
        for stripe in 0..<stripes - 1 {
            last.combine(with: split.piece(stripe * key.count, key.count))
            diffuse(last, hash)
        }
        last.combine(with: key)
    }

    /// Each piece as long as a digest becomes the digest of its number and itself.
    private static func diffuse(_ bytes: IOMemory, _ hash: HashAlgorithm) {
        for (number, start) in stride(from: 0, to: bytes.count, by: hash.digestSize).enumerated() {
            let piece = bytes.piece(start, min(hash.digestSize, bytes.count - start))
            hash.hash(piece, prefix: UInt32(number), into: piece)
        }
    }
}

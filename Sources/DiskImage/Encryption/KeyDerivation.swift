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
    func hash(_ input: UnsafeRawBufferPointer, prefix: UInt32? = nil, into output: UnsafeMutableRawBufferPointer) {
        // As the caller says of both buffers.
        switch self {
        case .sha1: unsafe digest(SHA1Hash.self, input, prefix, output)
        case .sha224: unsafe digest(SHA224Hash.self, input, prefix, output)
        case .sha256: unsafe digest(SHA256Hash.self, input, prefix, output)
        case .sha384: unsafe digest(SHA384Hash.self, input, prefix, output)
        case .sha512: unsafe digest(SHA512Hash.self, input, prefix, output)
        }
    }

    /// PBKDF2 with HMAC (RFC 8018 §5.2).
    func deriveKey(_ password: UnsafeRawBufferPointer, salt: [UInt8], iterations: UInt32, into output: UnsafeMutableRawBufferPointer) {
        // As above.
        switch self {
        case .sha1: unsafe pbkdf2(SHA1Hash.self, password, salt, iterations, output)
        case .sha224: unsafe pbkdf2(SHA224Hash.self, password, salt, iterations, output)
        case .sha256: unsafe pbkdf2(SHA256Hash.self, password, salt, iterations, output)
        case .sha384: unsafe pbkdf2(SHA384Hash.self, password, salt, iterations, output)
        case .sha512: unsafe pbkdf2(SHA512Hash.self, password, salt, iterations, output)
        }
    }

    /// How often PBKDF2 computes an HMAC for a key.
    func work(iterations: UInt32, keySize: Int) -> UInt64 { UInt64(iterations) * UInt64((keySize + digestSize - 1) / digestSize) }
}

/// A hash function of libcrypto's, with its state in the value.
private protocol HashFunction {
    static var digestSize: Int { get }
    /// Bytes that are hashed at once.
    static var blockSize: Int { get }
    init()
    mutating func update(_ bytes: UnsafeRawPointer, _ count: Int)
    /// Writes the digest; the state is of no use then.
    mutating func finalize(_ digest: UnsafeMutablePointer<UInt8>)
}

// libcrypto reads `count` bytes and writes a digest's, and keeps no pointer.

private struct SHA1Hash: HashFunction {
    static let digestSize = 20, blockSize = 64
    var state = SHA_CTX()
    init() { unsafe SHA1_Init(&state) }
    mutating func update(_ bytes: UnsafeRawPointer, _ count: Int) { unsafe SHA1_Update(&state, bytes, count) }
    mutating func finalize(_ digest: UnsafeMutablePointer<UInt8>) { unsafe SHA1_Final(digest, &state) }
}

private struct SHA224Hash: HashFunction {
    static let digestSize = 28, blockSize = 64
    var state = SHA256_CTX()
    init() { unsafe SHA224_Init(&state) }
    mutating func update(_ bytes: UnsafeRawPointer, _ count: Int) { unsafe SHA224_Update(&state, bytes, count) }
    mutating func finalize(_ digest: UnsafeMutablePointer<UInt8>) { unsafe SHA224_Final(digest, &state) }
}

private struct SHA256Hash: HashFunction {
    static let digestSize = 32, blockSize = 64
    var state = SHA256_CTX()
    init() { unsafe SHA256_Init(&state) }
    mutating func update(_ bytes: UnsafeRawPointer, _ count: Int) { unsafe SHA256_Update(&state, bytes, count) }
    mutating func finalize(_ digest: UnsafeMutablePointer<UInt8>) { unsafe SHA256_Final(digest, &state) }
}

private struct SHA384Hash: HashFunction {
    static let digestSize = 48, blockSize = 128
    var state = SHA512_CTX()
    init() { unsafe SHA384_Init(&state) }
    mutating func update(_ bytes: UnsafeRawPointer, _ count: Int) { unsafe SHA384_Update(&state, bytes, count) }
    mutating func finalize(_ digest: UnsafeMutablePointer<UInt8>) { unsafe SHA384_Final(digest, &state) }
}

private struct SHA512Hash: HashFunction {
    static let digestSize = 64, blockSize = 128
    var state = SHA512_CTX()
    init() { unsafe SHA512_Init(&state) }
    mutating func update(_ bytes: UnsafeRawPointer, _ count: Int) { unsafe SHA512_Update(&state, bytes, count) }
    mutating func finalize(_ digest: UnsafeMutablePointer<UInt8>) { unsafe SHA512_Final(digest, &state) }
}

private func digest<Hash: HashFunction>(_ type: Hash.Type, _ input: UnsafeRawBufferPointer, _ prefix: UInt32?, _ output: UnsafeMutableRawBufferPointer) {
    var hash = Hash()
    if let prefix {
        // Four bytes of our own.
        unsafe withUnsafeBytes(of: prefix.bigEndian) { if let start = $0.baseAddress { unsafe hash.update(start, $0.count) } }
    }
    if let start = input.baseAddress { unsafe hash.update(start, input.count) }
    unsafe withScratch(HashAlgorithm.maximumDigestSize) { digest in
        unsafe hash.finalize(digest)
        unsafe output.copyMemory(from: UnsafeRawBufferPointer(start: digest, count: min(Hash.digestSize, output.count)))
    }
}

private func pbkdf2<Hash: HashFunction>(
    _ type: Hash.Type, _ password: UnsafeRawBufferPointer, _ salt: [UInt8], _ iterations: UInt32, _ output: UnsafeMutableRawBufferPointer
) {
    // Buffers on the stack with the sizes that are used below; they are cleared when they go.
    unsafe withScratch(Hash.blockSize) { padded in
        unsafe withScratch(2 * Hash.digestSize) { scratch in
            let value = unsafe scratch, sum = unsafe scratch + Hash.digestSize
            // HMAC (RFC 2104): the states after the key, which all rounds begin with.
            if password.count > Hash.blockSize {
                unsafe digest(type, password, nil, UnsafeMutableRawBufferPointer(start: padded, count: Hash.digestSize))
            } else if let start = password.baseAddress {
                unsafe padded.update(from: start.assumingMemoryBound(to: UInt8.self), count: password.count)
            }
            for index in 0..<Hash.blockSize { unsafe padded[index] ^= 0x36 }
            var innerStart = Hash()
            unsafe innerStart.update(padded, Hash.blockSize)
            for index in 0..<Hash.blockSize { unsafe padded[index] ^= 0x36 ^ 0x5c }
            var outerStart = Hash()
            unsafe outerStart.update(padded, Hash.blockSize)

            var done = 0, block: UInt32 = 1
            while done < output.count {
                var inner = innerStart, outer = outerStart
                unsafe salt.withUnsafeBytes { if let start = $0.baseAddress { unsafe inner.update(start, $0.count) } }
                unsafe withUnsafeBytes(of: block.bigEndian) { if let start = $0.baseAddress { unsafe inner.update(start, $0.count) } }
                unsafe inner.finalize(value)
                unsafe outer.update(value, Hash.digestSize)
                unsafe outer.finalize(value)
                unsafe sum.update(from: value, count: Hash.digestSize)
                var round: UInt32 = 1
                while round < iterations {
                    inner = innerStart
                    unsafe inner.update(value, Hash.digestSize)
                    unsafe inner.finalize(value)
                    outer = outerStart
                    unsafe outer.update(value, Hash.digestSize)
                    unsafe outer.finalize(value)
                    for index in 0..<Hash.digestSize { unsafe sum[index] ^= value[index] }
                    round += 1
                }
                let count = min(Hash.digestSize, output.count - done)
                unsafe (output.baseAddress! + done).copyMemory(from: sum, byteCount: count)
                done += count
                block += 1
            }
            clear(&innerStart)
            clear(&outerStart)
        }
    }
}

/// Overwrites a state that a password could be guessed from.
private func clear<Hash: HashFunction>(_ state: inout Hash) {
    // Its own bytes.
    unsafe withUnsafeMutableBytes(of: &state) { if let start = $0.baseAddress { unsafe explicit_bzero(start, $0.count) } }
}

/// Zeroed memory for `count` bytes, cleared afterwards.
private func withScratch(_ count: Int, _ body: (UnsafeMutablePointer<UInt8>) -> Void) {
    unsafe withUnsafeTemporaryAllocation(byteCount: count, alignment: 16) { buffer in
        // It has `count` bytes, of which there is at least one.
        guard let start = buffer.baseAddress else { return }
        let bytes = unsafe start.initializeMemory(as: UInt8.self, repeating: 0, count: count)
        unsafe body(bytes)
        unsafe explicit_bzero(start, count)
    }
}

// MARK: - Anti-forensic splitting

/// How LUKS spreads a key over many stripes, all of which are needed to get it back (LUKS On-Disk Format 1.2.3 §2.4).
enum StripedKey {
    /// Stripes of a key, as every program makes them.
    static let stripes = 4000

    /// Takes a key out of its stripes.
    static func merge(_ split: UnsafeRawBufferPointer, into key: UnsafeMutableRawBufferPointer, _ hash: HashAlgorithm) {
        // `split` has `stripes` times as many bytes as `key`.
        unsafe key.initializeMemory(as: UInt8.self, repeating: 0)
        for stripe in 0..<stripes {
            unsafe add(UnsafeRawBufferPointer(rebasing: split[stripe * key.count..<(stripe + 1) * key.count]), to: key)
            if stripe < stripes - 1 { unsafe diffuse(key, hash) }
        }
    }

    /// Fills the last stripe, after the others have been filled with random bytes, such that ``merge(_:into:_:)`` gives the key.
    static func split(_ key: UnsafeRawBufferPointer, into split: UnsafeMutableRawBufferPointer, _ hash: HashAlgorithm) {
        let last = unsafe UnsafeMutableRawBufferPointer(rebasing: split[((stripes - 1) * key.count)...])
        unsafe last.initializeMemory(as: UInt8.self, repeating: 0)
        for stripe in 0..<stripes - 1 {
            unsafe add(UnsafeRawBufferPointer(rebasing: split[stripe * key.count..<(stripe + 1) * key.count]), to: last)
            unsafe diffuse(last, hash)
        }
        unsafe add(key, to: last)
    }

    private static func add(_ bytes: UnsafeRawBufferPointer, to sum: UnsafeMutableRawBufferPointer) {
        for index in sum.indices { unsafe sum[index] ^= bytes[index] }
    }

    /// Each piece as long as a digest becomes the digest of its number and itself.
    private static func diffuse(_ bytes: UnsafeMutableRawBufferPointer, _ hash: HashAlgorithm) {
        for (number, start) in stride(from: 0, to: bytes.count, by: hash.digestSize).enumerated() {
            let piece = unsafe UnsafeMutableRawBufferPointer(rebasing: bytes[start..<min(start + hash.digestSize, bytes.count)])
            unsafe hash.hash(UnsafeRawBufferPointer(piece), prefix: UInt32(number), into: piece)
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CCrypto
internal import Glibc

/// How the sectors of a disk are encrypted: AES with a mode and a way to make initialization vectors, in the words of dm-crypt.
struct CipherSpecification: Equatable, Sendable {
    enum Mode: String, Sendable { case xts, cbc, ecb, ctr }

    enum Vector: Equatable, Sendable {
        /// The sector's number, 32 bits of it.
        case plain
        /// All of it.
        case plain64
        /// The sector number, encrypted with a digest of the key.
        case essiv(HashAlgorithm)
    }

    let mode: Mode
    let vector: Vector
    /// Bytes of the key; XTS has two in one.
    let keySize: Int

    /// Bits of the AES key.
    var keyBits: Int { mode == .xts ? keySize * 4 : keySize * 8 }

    /// What a new image gets.
    static let standard = CipherSpecification(mode: .xts, vector: .plain64, keySize: 64)
    /// What images have whose header says AES and no more (docs/interop/qcow2.txt, "Data encryption"): QEMU takes 16 bytes for the key.
    static let legacy = CipherSpecification(mode: .cbc, vector: .plain64, keySize: 16)

    init(mode: Mode, vector: Vector, keySize: Int) {
        self.mode = mode
        self.vector = vector
        self.keySize = keySize
    }

    /// Reads the words of a LUKS header, `xts-plain64` for instance; nil for what is not known.
    init?(mode words: String, keySize: Int) {
        let parts = words.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
        guard parts.count == 2, let mode = Mode(rawValue: String(parts[0])) else { return nil }
        let generator = parts[1].split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
        switch generator[0] {
        case "plain": vector = .plain
        case "plain64": vector = .plain64
        case "essiv":
            // Its digest is a key of AES.
            guard generator.count == 2, let hash = HashAlgorithm(rawValue: String(generator[1])), hash.digestSize == 32 else { return nil }
            vector = .essiv(hash)
        default: return nil
        }
        guard (mode == .xts ? [32, 48, 64] : [16, 24, 32]).contains(keySize) else { return nil }
        self.mode = mode
        self.keySize = keySize
    }

    /// Why nothing is to be written with it, if that is so.
    var weakness: String? {
        switch mode {
        case .xts, .cbc: nil
        case .ecb: "ECB shows which sectors are alike"
        case .ctr: "CTR, without a new vector for each write, gives away what is written over something else"
        }
    }
}

/// Encrypts and decrypts sectors of 512 bytes with one key.
@safe struct SectorCipher: ~Copyable, @unchecked Sendable {
    /// What a sector's number, which its vector is made of, is counted from.
    enum Numbering {
        /// The start of the file that has the data.
        case file
        /// The start of the disk.
        case disk
    }

    let specification: CipherSpecification
    private let numbering: Numbering
    // Prepared keys: of the data, of what hides its place (XTS), and of the vectors (ESSIV). They do not change: hence `Sendable`.
    private let keys: SecretBytes

    static let sectorSize = 512

    /// - Parameters:
    ///   - key: as many bytes as the specification says.
    ///   - path: the image's, for errors.
    ///   - usesInstructions: those of the processor, if it has them; a test does without.
    init(_ specification: CipherSpecification, key: SecretBytes, path: String, numbering: Numbering = .file, usesInstructions: Bool = true) throws(DiskImageError) {
        precondition(key.count == specification.keySize)
        let usesInstructions = usesInstructions && ccrypto_has_aes()
        self.specification = specification
        self.numbering = numbering
        keys = try unsafe SecretBytes(3 * MemoryLayout<ccrypto_aes>.stride, of: path) { (memory) throws(DiskImageError) in
            // Room for three.
            guard let start = memory.baseAddress else { return }
            let prepared = unsafe start.bindMemory(to: ccrypto_aes.self, capacity: 3)
            func prepare(_ index: Int, _ secret: SecretBytes, from first: Int, bits: Int) {
                let isPrepared = unsafe secret.withBytes { bytes in
                    // The secret has that many bits behind `first`.
                    guard let start = unsafe bytes.baseAddress?.assumingMemoryBound(to: UInt8.self) else { return false }
                    return unsafe ccrypto_aes_prepare(prepared + index, start + first, Int32(bits), usesInstructions)
                }
                // Sizes are those of AES, so it takes them.
                precondition(isPrepared)
            }
            let bits = specification.keyBits
            prepare(0, key, from: 0, bits: bits)
            if specification.mode == .xts { prepare(1, key, from: bits / 8, bits: bits) }
            if case .essiv(let hash) = specification.vector {
                let digest = try unsafe SecretBytes(hash.digestSize, of: path) { digest in unsafe key.withBytes { unsafe hash.hash($0, into: digest) } }
                prepare(2, digest, from: 0, bits: hash.digestSize * 8)
            }
        }
    }

    /// Encrypts `count` bytes in place, a whole number of sectors (or, of the last one, of blocks), whose first has the number `sector`.
    func encrypt(_ bytes: UnsafeMutableRawPointer, _ count: Int, sector: UInt64) { unsafe apply(bytes, count, sector, encrypts: true) }

    /// Decrypts likewise.
    func decrypt(_ bytes: UnsafeMutableRawPointer, _ count: Int, sector: UInt64) { unsafe apply(bytes, count, sector, encrypts: false) }

    /// Encrypts whole sectors in place, which lie at `place` in the file with the data and at `offset` on the disk.
    func encrypt(_ bytes: UnsafeMutableRawPointer, _ count: Int, place: UInt64, offset: UInt64) {
        unsafe encrypt(bytes, count, sector: (numbering == .file ? place : offset) / UInt64(Self.sectorSize))
    }

    /// Decrypts likewise.
    func decrypt(_ bytes: UnsafeMutableRawPointer, _ count: Int, place: UInt64, offset: UInt64) {
        unsafe decrypt(bytes, count, sector: (numbering == .file ? place : offset) / UInt64(Self.sectorSize))
    }

    /// Fills whole sectors with what zeroes become at a place.
    func encryptZeroes(_ bytes: inout [UInt8], place: UInt64) {
        unsafe bytes.withUnsafeMutableBytes { memory in
            // All of the array's bytes.
            guard let start = memory.baseAddress else { return }
            unsafe start.initializeMemory(as: UInt8.self, repeating: 0, count: memory.count)
            unsafe encrypt(start, memory.count, place: place, offset: place)
        }
    }

    private func apply(_ bytes: UnsafeMutableRawPointer, _ count: Int, _ sector: UInt64, encrypts: Bool) {
        unsafe keys.withBytes { memory in
            // As they were made.
            guard let prepared = unsafe memory.baseAddress?.assumingMemoryBound(to: ccrypto_aes.self) else { return }
            unsafe apply(prepared, bytes, count, sector, encrypts: encrypts)
        }
    }

    private func apply(_ prepared: UnsafePointer<ccrypto_aes>, _ bytes: UnsafeMutableRawPointer, _ count: Int, _ sector: UInt64, encrypts: Bool) {
        var number = sector
        var vector = (UInt64(0), UInt64(0))
        for start in stride(from: 0, to: count, by: Self.sectorSize) {
            switch specification.vector {
            case .plain: vector = (UInt64(UInt32(truncatingIfNeeded: number)).littleEndian, 0)
            case .plain64, .essiv: vector = (number.littleEndian, 0)
            }
            // Inside the caller's bytes; the vector has 16.
            let piece = unsafe (bytes + start).assumingMemoryBound(to: UInt8.self)
            let size = min(Self.sectorSize, count - start)
            unsafe withUnsafeMutableBytes(of: &vector) { buffer in
                guard let iv = unsafe buffer.baseAddress?.assumingMemoryBound(to: UInt8.self) else { return }
                if case .essiv = specification.vector { unsafe ccrypto_aes_encrypt(prepared + 2, iv, iv) }
                switch specification.mode {
                case .xts: unsafe ccrypto_xts(prepared, prepared + 1, iv, piece, size, encrypts)
                case .cbc: unsafe ccrypto_cbc(prepared, iv, piece, size, encrypts)
                case .ecb: for block in stride(from: 0, to: size, by: 16) { unsafe (encrypts ? ccrypto_aes_encrypt : ccrypto_aes_decrypt)(prepared, piece + block, piece + block) }
                case .ctr: unsafe self.count(prepared, iv, piece, size)
                }
            }
            number &+= 1
        }
    }

    /// Counter mode, which is its own inverse: the vector is a number of 128 bits, most significant byte first, that grows with each block.
    private func count(_ key: UnsafePointer<ccrypto_aes>, _ counter: UnsafeMutablePointer<UInt8>, _ bytes: UnsafeMutablePointer<UInt8>, _ size: Int) {
        var mask = (UInt64(0), UInt64(0))
        unsafe withUnsafeMutableBytes(of: &mask) { buffer in
            // Sixteen bytes each: a block, the counter, the mask.
            guard let mask = unsafe buffer.baseAddress?.assumingMemoryBound(to: UInt8.self) else { return }
            for block in stride(from: 0, to: size, by: 16) {
                unsafe ccrypto_aes_encrypt(key, counter, mask)
                for index in 0..<min(16, size - block) { unsafe bytes[block + index] ^= mask[index] }
                for index in (0..<16).reversed() {
                    unsafe counter[index] &+= 1
                    if unsafe counter[index] != 0 { break }
                }
            }
        }
    }
}

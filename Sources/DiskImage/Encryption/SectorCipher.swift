// SPDX-License-Identifier: Apache-2.0

internal import CCrypto
internal import Glibc

/// How the sectors of a disk are encrypted: AES with a mode and a way to make initialization vectors, in the words of
/// dm-crypt.
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
    /// What images have whose header says AES and no more (docs/interop/qcow2.txt, "Data encryption"): QEMU takes 16
    /// bytes for the key.
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
            guard generator.count == 2, let hash = HashAlgorithm(rawValue: String(generator[1])), hash.digestSize == 32
            else { return nil }
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
struct SectorCipher: ~Copyable, @unchecked Sendable {
    /// What a sector's number, which its vector is made of, is counted from.
    enum Numbering {
        /// The start of the file that has the data.
        case file
        /// The start of the disk.
        case disk
    }

    let specification: CipherSpecification
    private let numbering: Numbering
    // Prepared keys: of the data, of what hides its place (XTS), and of the vectors (ESSIV). They do not change: hence
    // `Sendable`.
    private let keys: SecretBytes

    static let sectorSize = 512

    /// - Parameters:
    ///   - key: as many bytes as the specification says.
    ///   - path: the image's, for errors.
    ///   - usesInstructions: those of the processor, if it has them; a test does without.
    init(
        _ specification: CipherSpecification, key: SecretBytes, path: String, numbering: Numbering = .file,
        usesInstructions: Bool = true
    ) throws(DiskImageError) {
        precondition(key.count == specification.keySize)
        let usesInstructions = usesInstructions && ccrypto_has_aes()
        self.specification = specification
        self.numbering = numbering
        keys = try SecretBytes(3 * MemoryLayout<ccrypto_aes>.stride, of: path) { (memory) throws(DiskImageError) in
            // Room for three. A secret has that many bits behind `first`; sizes are those of AES, so it takes them.
            let prepared = unsafe memory.start.bindMemory(to: ccrypto_aes.self, capacity: 3)
            func prepare(_ index: Int, _ secret: SecretBytes, from first: Int, bits: Int) {
                let isPrepared = secret.withBytes { bytes in
                    // As said above.
                    unsafe ccrypto_aes_prepare(
                        prepared + index, bytes.piece(first, bits / 8).octets, Int32(bits), usesInstructions)
                }
                precondition(isPrepared)
            }
            let bits = specification.keyBits
            prepare(0, key, from: 0, bits: bits)
            if specification.mode == .xts { prepare(1, key, from: bits / 8, bits: bits) }
            if case .essiv(let hash) = specification.vector {
                let digest = try SecretBytes(hash.digestSize, of: path) { digest in
                    key.withBytes { hash.hash($0, into: digest) }
                }
                prepare(2, digest, from: 0, bits: hash.digestSize * 8)
            }
        }
    }

    /// Encrypts bytes in place, a whole number of sectors (or, of the last one, of blocks), whose first has the number
    /// `sector`.
    func encrypt(_ bytes: IOMemory, sector: UInt64) { apply(bytes, to: bytes, sector, encrypts: true) }

    /// Decrypts likewise.
    func decrypt(_ bytes: IOMemory, sector: UInt64) { apply(bytes, to: bytes, sector, encrypts: false) }

    /// Encrypts whole sectors in place, which lie at `place` in the file with the data and at `offset` on the disk.
    func encrypt(_ bytes: IOMemory, place: UInt64, offset: UInt64) {
        encrypt(bytes, sector: (numbering == .file ? place : offset) / UInt64(Self.sectorSize))
    }

    /// Decrypts likewise, into other memory of as many bytes, which is only written: it may be a guest's.
    func decrypt(_ bytes: IOMemory, into target: IOMemory, place: UInt64, offset: UInt64) {
        apply(bytes, to: target, (numbering == .file ? place : offset) / UInt64(Self.sectorSize), encrypts: false)
    }

    /// Fills whole sectors with what zeroes become at a place.
    func encryptZeroes(_ bytes: inout [UInt8], place: UInt64) {
        bytes.withIOMemory { memory in
            memory.clear()
            encrypt(memory, place: place, offset: place)
        }
    }

    private func apply(_ bytes: IOMemory, to target: IOMemory, _ sector: UInt64, encrypts: Bool) {
        keys.withBytes { memory in
            // The three keys, as they were made.
            let prepared = unsafe UnsafePointer(memory.start.assumingMemoryBound(to: ccrypto_aes.self))
            var number = sector
            for start in stride(from: 0, to: bytes.count, by: Self.sectorSize) {
                let vector: InlineArray<2, UInt64> =
                    switch specification.vector {
                    case .plain: [UInt64(UInt32(truncatingIfNeeded: number)).littleEndian, 0]
                    case .plain64, .essiv: [number.littleEndian, 0]
                    }
                let count = min(Self.sectorSize, bytes.count - start)
                unsafe apply(
                    prepared, bytes.piece(start, count), to: target.piece(start, count), vector, encrypts: encrypts)
                number &+= 1
            }
        }
    }

    /// A sector, or some blocks of one.
    private func apply(
        _ prepared: UnsafePointer<ccrypto_aes>, _ sector: IOMemory, to target: IOMemory,
        _ vector: consuming InlineArray<2, UInt64>, encrypts: Bool
    ) {
        // The keys are the caller's; the vector has 16 bytes.
        unsafe withUnsafeMutableBytes(of: &vector) { buffer in
            let iv = unsafe IOMemory(buffer).octets, input = unsafe sector.octets, output = unsafe target.octets
            if case .essiv = specification.vector { unsafe ccrypto_aes_encrypt(prepared + 2, iv, iv) }
            switch specification.mode {
            case .xts: unsafe ccrypto_xts(prepared, prepared + 1, iv, input, output, sector.count, encrypts)
            case .cbc: unsafe ccrypto_cbc(prepared, iv, input, output, sector.count, encrypts)
            case .ecb:
                for block in stride(from: 0, to: sector.count, by: 16) {
                    unsafe (encrypts ? ccrypto_aes_encrypt : ccrypto_aes_decrypt)(
                        prepared, sector.piece(block, 16).octets, target.piece(block, 16).octets)
                }
            case .ctr:
                unsafe count(prepared, IOMemory(buffer), sector)
                if unsafe input != output { target.copy(from: sector) }
            }
        }
    }

    /// Counter mode, which is its own inverse: the vector is a number of 128 bits, most significant byte first, that
    /// grows with each block.
    private func count(_ key: UnsafePointer<ccrypto_aes>, _ counter: IOMemory, _ sector: IOMemory) {
        var bytes = InlineArray<2, UInt64>(repeating: 0)
        // Sixteen bytes each: a block, the counter, the mask.
        unsafe withUnsafeMutableBytes(of: &bytes) { buffer in
            let mask = unsafe IOMemory(buffer)
            for block in stride(from: 0, to: sector.count, by: 16) {
                unsafe ccrypto_aes_encrypt(key, counter.octets, mask.octets)
                sector.piece(block, min(16, sector.count - block)).combine(with: mask)
                let (low, overflow) = counter.load(bigEndian: 8, as: UInt64.self).addingReportingOverflow(1)
                counter.store(bigEndian: low, 8)
                if overflow { counter.store(bigEndian: counter.load(bigEndian: 0, as: UInt64.self) &+ 1, 0) }
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

import CCrypto
@testable import DiskImage
import TestSupport
import Testing

/// Ciphers and key derivation, by the examples of their standards.
@Suite(.timed) struct CipherTests {
    private func secret(_ bytes: [UInt8]) throws -> SecretBytes { try SecretBytes(bytes, of: "test") }

    private func apply(
        _ specification: CipherSpecification, key: [UInt8], _ bytes: [UInt8], sector: UInt64, encrypts: Bool = true,
        usesInstructions: Bool
    ) throws -> [UInt8] {
        let cipher = try SectorCipher(specification, key: secret(key), path: "test", usesInstructions: usesInstructions)
        var bytes = bytes
        bytes.withIOMemory {
            if encrypts { cipher.encrypt($0, sector: sector) } else { cipher.decrypt($0, sector: sector) }
        }
        return bytes
    }

    /// IEEE 1619-2007, Annex B, vectors 1 and 2.
    @Test(arguments: [true, false]) func xts(usesInstructions: Bool) throws {
        let specification = CipherSpecification(mode: .xts, vector: .plain64, keySize: 32)
        let first = try apply(
            specification, key: [UInt8](repeating: 0, count: 32), [UInt8](repeating: 0, count: 32), sector: 0,
            usesInstructions: usesInstructions)
        #expect(first == hexadecimal("917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"))
        let key = [UInt8](repeating: 0x11, count: 16) + [UInt8](repeating: 0x22, count: 16)
        let second = try apply(
            specification, key: key, [UInt8](repeating: 0x44, count: 32), sector: 0x33_3333_3333,
            usesInstructions: usesInstructions)
        #expect(second == hexadecimal("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"))
    }

    /// NIST SP 800-38A, F.1.1, F.2.1 and F.5.1, as far as vectors of whole sectors' numbers can say it: the first block
    /// of CBC with a vector of zeroes is that of ECB.
    @Test(arguments: [true, false]) func ecb(usesInstructions: Bool) throws {
        let key = hexadecimal("2b7e151628aed2a6abf7158809cf4f3c"),
            text = hexadecimal("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
        let ecb = try apply(
            CipherSpecification(mode: .ecb, vector: .plain64, keySize: 16), key: key, text, sector: 9,
            usesInstructions: usesInstructions)
        #expect(ecb == hexadecimal("3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf"))
        let cbc = try apply(
            CipherSpecification(mode: .cbc, vector: .plain64, keySize: 16), key: key, text, sector: 0,
            usesInstructions: usesInstructions)
        #expect(cbc.prefix(16) == ecb.prefix(16) && cbc.dropFirst(16) != ecb.dropFirst(16))
    }

    static let specifications: [CipherSpecification] = [CipherSpecification.Mode.xts, .cbc, .ecb, .ctr].flatMap {
        mode in
        [CipherSpecification.Vector.plain, .plain64, .essiv(.sha256)].flatMap { vector in
            [16, 24, 32].map { CipherSpecification(mode: mode, vector: vector, keySize: mode == .xts ? 2 * $0 : $0) }
        }
    }

    /// With the processor's instructions and without it is the same; what was encrypted can be decrypted, and a
    /// sector's place matters.
    @Test(arguments: specifications) func bothWaysAreTheSame(specification: CipherSpecification) throws {
        try #require(ccrypto_has_aes(), "a processor without instructions for AES")
        let key = randomBytes(specification.keySize, seed: 3), text = randomBytes(5 * 512 + 256, seed: 4)
        for sector in [0, 1 << 32 | 7, .max - 1] as [UInt64] {
            let fast = try apply(specification, key: key, text, sector: sector, usesInstructions: true)
            #expect(try apply(specification, key: key, text, sector: sector, usesInstructions: false) == fast)
            for usesInstructions in [true, false] {
                #expect(
                    try apply(
                        specification, key: key, fast, sector: sector, encrypts: false,
                        usesInstructions: usesInstructions) == text)
            }
            // Sector by sector it is what it is at once.
            let second = try apply(
                specification, key: key, Array(text[512..<1024]), sector: sector &+ 1, usesInstructions: true)
            #expect(second[...] == fast[512..<1024])
            let other = try apply(specification, key: key, text, sector: sector ^ 1 << 40, usesInstructions: true)
            #expect((other == fast) == (specification.mode == .ecb || specification.vector == .plain))
        }
    }

    /// RFC 6070, and what is known for the longer digests.
    @Test(
        arguments: [
            (HashAlgorithm.sha1, "password", "salt", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"),
            (.sha1, "password", "salt", 2, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
            (
                .sha1, "passwordPASSWORDpassword", "saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096,
                "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
            ),
            (.sha1, "pass\0word", "sa\0lt", 4096, "56fa6aa75548099dcc37d7f03425e0c3"),
            (.sha256, "password", "salt", 1, "120fb6cffcf8b32c43e7225256c4f837a86548c92ccc35480805987cb70be17b"),
            (.sha256, "password", "salt", 4096, "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"),
            (
                .sha512, "password", "salt", 1,
                "867f70cf1ade02cff3752599a3a53dc4af34c7a669815ae5d513554e1c8cf252c02d470a285a0501bad999bfe943c08f050235d7d68b1da55e63f73b60a57fce"
            ),
            // Longer passwords than a hash's block, and more than one digest; by Python's hashlib.
            (
                .sha224, String(repeating: "x", count: 200), "salt", 3,
                "60a8d691d97a30932d7368f6382222edda93a811ef5a47250f92f0fdae0057730153e641eefb5183b8a3d64c0eb0d27ec4847e4ac60836ae047ba8d0"
            ),
            (
                .sha384, String(repeating: "x", count: 200), "salt", 3,
                "69fd6e5663f09b879a2c3d920db6a24fc7d333bafcc346ffc34427f58ff9d81e5bc6bd1766166024949078066962c6f657c097ced579ba108c923ed0"
            ),
        ] as [(HashAlgorithm, String, String, UInt32, String)])
    func keyDerivation(hash: HashAlgorithm, password: String, salt: String, iterations: UInt32, expected: String) throws
    {
        let expected = hexadecimal(expected), password = try secret(Array(password.utf8))
        var key = [UInt8](repeating: 0, count: expected.count)
        key.withIOMemory { key in
            password.withBytes { hash.deriveKey($0, salt: Array(salt.utf8), iterations: iterations, into: key) }
        }
        #expect(key == expected)
    }

    @Test(arguments: HashAlgorithm.allCases, [16, 24, 32, 48, 64]) func aKeyComesOutOfItsStripes(
        hash: HashAlgorithm, size: Int
    ) throws {
        let key = randomBytes(size, seed: 7)
        var split = randomBytes(size * StripedKey.stripes, seed: 8)
        func merged() -> [UInt8] {
            var merged = [UInt8](repeating: 0, count: size)
            merged.withIOMemory { memory in split.withReadableIOMemory { StripedKey.merge($0, into: memory, hash) } }
            return merged
        }
        split.withIOMemory { memory in key.withReadableIOMemory { StripedKey.split($0, into: memory, hash) } }
        #expect(merged() == key)
        // All of it is needed.
        split[size * 1234] ^= 1
        #expect(merged() != key)
    }

    @Test func keysAreExactlyWhatAFileHas() throws {
        let directory = TemporaryDirectory()
        let file = try directory.write("key", [1, 0, 2, 10])
        let key = try DiskKey(.file(file))
        #expect(key.password.isEqual(to: [1, 0, 2, 10]) && !key.password.isEqual(to: [1, 0, 2]))
        #expect(
            try DiskKey(.file(directory.write("long", randomBytes(DiskKey.maximumSize, seed: 1)))).password.count
                == DiskKey.maximumSize)
        func problem(_ source: KeySource) -> String {
            do { _ = try DiskKey(source); return "" } catch { return "\(error)" }
        }
        #expect(try problem(.file(directory.write("empty", []))).hasSuffix("it is empty"))
        #expect(
            try problem(.file(directory.write("longer", randomBytes(DiskKey.maximumSize + 1, seed: 1)))).hasSuffix(
                "more than 1048576 bytes"))
        #expect(problem(.file(directory.file("none"))).contains("No such file"))
        #expect(problem(.descriptor(999)) == "key descriptor 999: it is not open")
    }
}

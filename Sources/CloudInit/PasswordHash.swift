// SPDX-License-Identifier: Apache-2.0

internal import CCrypto

/// A password's hash, as `/etc/shadow` has it.
///
/// It is SHA-512 of crypt(5), which every version of cloud-init and every libc knows; yescrypt, which is stronger,
/// older ones take for the password itself.
enum PasswordHash {
    /// What `mkpasswd` and passwd(1) use.
    private static let rounds = 5000
    private static let alphabet = Array("./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz".utf8)

    /// - Parameter salt: 1 to 16 characters of `./0-9A-Za-z`; nil for random ones.
    static func sha512(_ password: [UInt8], salt given: String? = nil) -> String {
        let salt = given.map { Array($0.utf8) } ?? randomSalt()
        return "$6$\(String(decoding: salt, as: UTF8.self))$\(encoded(digest(password, salt)))"
    }

    /// Indicates whether a text is a hash of crypt(5) that every version of cloud-init takes for one: SHA-256 or
    /// SHA-512.
    static func isHash(_ text: String) -> Bool {
        let parts = text.split(separator: "$", omittingEmptySubsequences: false).dropFirst()
        guard text.first == "$", let method = parts.first, (3...4).contains(parts.count) else { return false }
        guard
            parts.dropFirst().allSatisfy({ !$0.isEmpty && $0.utf8.allSatisfy { alphabet.contains($0) || $0 == 0x3d } })
        else { return false }
        return ["5": 43, "6": 86][method] == parts.last?.utf8.count
    }

    /// Indicates whether a text is probably a hash of another method, which cloud-init may take for a password itself.
    static func isOtherHash(_ text: String) -> Bool {
        ["$y$", "$gy$", "$7$", "$2a$", "$2b$", "$2y$", "$1$", "$md5", "$sha1$"].contains { text.hasPrefix($0) }
            && text.utf8.count >= 34
    }

    private static func randomSalt() -> [UInt8] {
        var generator = SystemRandomNumberGenerator()
        return (0..<16).map { _ in alphabet[Int.random(in: 0..<alphabet.count, using: &generator)] }
    }

    /// The algorithm that crypt(5) calls sha512crypt, in the words of its description: B is `inner`, A is `digest`, and
    /// P and S are sequences as long as the password and the salt.
    private static func digest(_ password: [UInt8], _ salt: [UInt8]) -> [UInt8] {
        let inner = SHA512.hash(password + salt + password)
        var message = password + salt + repeated(inner, password.count)
        var bits = password.count
        while bits > 0 {
            message += bits & 1 == 1 ? inner : password
            bits >>= 1
        }
        var digest = SHA512.hash(message)
        var sequence = SHA512()
        for _ in password { sequence.add(password) }
        let passwords = repeated(sequence.finish(), password.count)
        sequence = SHA512()
        for _ in 0..<16 + Int(digest[0]) { sequence.add(salt) }
        let salts = repeated(sequence.finish(), salt.count)
        for round in 0..<rounds {
            var next = SHA512()
            next.add(round & 1 == 1 ? passwords : digest)
            if round % 3 != 0 { next.add(salts) }
            if round % 7 != 0 { next.add(passwords) }
            next.add(round & 1 == 1 ? digest : passwords)
            digest = next.finish()
        }
        return digest
    }

    private static func repeated(_ bytes: [UInt8], _ count: Int) -> [UInt8] {
        (0..<count).map { bytes[$0 % bytes.count] }
    }

    /// Each three bytes become four characters of six bits, the lowest first. The three are 21 apart, and which of them
    /// is the lowest goes around.
    private static func encoded(_ digest: [UInt8]) -> String {
        var text: [UInt8] = []
        func append(_ value: UInt32, _ count: Int) {
            for index in 0..<count { text.append(alphabet[Int(value >> (6 * UInt32(index)) & 63)]) }
        }
        for index in 0..<21 {
            let three = [digest[index], digest[index + 21], digest[index + 42]].map { UInt32($0) }
            let high = three[index % 3], middle = three[(index + 1) % 3], low = three[(index + 2) % 3]
            append(high << 16 | middle << 8 | low, 4)
        }
        append(UInt32(digest[63]), 2)
        return String(decoding: text, as: UTF8.self)
    }
}

/// libcrypto's SHA-512.
private struct SHA512 {
    private var state = SHA512_CTX()

    // It fills the structure, which has no pointer.
    init() { unsafe SHA512_Init(&state) }

    mutating func add(_ bytes: [UInt8]) {
        // libcrypto reads as many bytes as the array has, and keeps no pointer.
        _ = unsafe bytes.withUnsafeBytes { unsafe SHA512_Update(&state, $0.baseAddress, $0.count) }
    }

    mutating func finish() -> [UInt8] {
        var digest = [UInt8](repeating: 0, count: Int(SHA512_DIGEST_LENGTH))
        // It writes a digest's bytes, which the array has.
        unsafe SHA512_Final(&digest, &state)
        return digest
    }

    static func hash(_ bytes: [UInt8]) -> [UInt8] {
        var state = SHA512()
        state.add(bytes)
        return state.finish()
    }
}

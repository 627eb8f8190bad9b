// SPDX-License-Identifier: Apache-2.0

@testable import DiskImage
import TestSupport
import Testing

/// LUKS headers that cannot be right: each is refused by name, and quickly.
@Suite(.timed) struct HostileLUKSTests {
    let directory = TemporaryDirectory(inMemory: true)

    struct Change: CustomTestStringConvertible, Sendable {
        let name: String
        /// Bytes from the start of the LUKS header, or of the file.
        let offset: Int
        var isInFile = false
        let bytes: [UInt8]
        let says: String
        var testDescription: String { "\(name): \(says)" }

        init(_ name: String, _ offset: Int, _ bytes: [UInt8], _ says: String, inFile: Bool = false) {
            (self.name, self.offset, self.bytes, self.says, isInFile) = (name, offset, bytes, says, inFile)
        }
    }

    private static func number(_ value: UInt64, _ width: Int) -> [UInt8] {
        (0..<width).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * (width - 1 - $0))) }
    }
    private static func word(_ text: String) -> [UInt8] {
        Array(text.utf8) + [UInt8](repeating: 0, count: 32 - text.utf8.count)
    }

    /// The pointer is the first header extension, at byte 112.
    static let changes: [Change] = [
        Change("magic", 0, [0x4b], "no LUKS header"), Change("version", 6, [0, 2], "Argon2"),
        Change("version", 6, [0, 3], "LUKS version 3"),
        Change("cipher", 8, word("serpent"), "serpent-xts-plain64"),
        Change("cipher", 8, [UInt8](repeating: 0x61, count: 32), "a cipher that is not valid text"),
        Change("cipher", 8, [0x61, 0x1b, 0], "a cipher that is not valid text"),
        Change("mode", 40, word("lrw-plain64"), "aes-lrw-plain64"),
        Change("mode", 40, word("xts"), "aes-xts"), Change("mode", 40, word("xts-essiv:sha1"), "aes-xts-essiv:sha1"),
        Change("mode", 40, word("cbc-essiv"), "aes-cbc-essiv"),
        Change("hash", 72, word("ripemd160"), "the hash function ripemd160"),
        Change("hash", 72, word("md5"), "the hash function md5"),
        Change("key size", 108, number(65, 4), "a key of 65 bytes"),
        Change("key size", 108, number(.max, 4), "a key of 4294967295 bytes"),
        Change("key size", 108, number(0, 4), "keys of 0 bits"),
        Change("key size", 108, number(16, 4), "keys of 128 bits"),
        Change("digest iterations", 164, number(0, 4), "without iterations"),
        Change("digest iterations", 164, number(.max, 4), "hash iterations"),
        Change("UUID", 168, [UInt8](repeating: 0x61, count: 40), "a UUID that is not valid text"),
        Change("slot state", 208, number(1, 4), "state 1"),
        Change("slot state", 208 + 48 * 7, number(0x00ac_71f4, 4), "state 11301364"),
        Change("slot iterations", 212, number(0, 4), "a key slot 0 without iterations"),
        Change("slot iterations", 212, number(.max, 4), "hash iterations"),
        Change("key material", 248, number(.max, 4), "outside of its"),
        Change("key material", 248, number(0, 4), "outside of its"),
        Change("key material", 248, number(4040 - 499, 4), "outside of its"),
        Change("stripes", 252, number(3999, 4), "3999 stripes"),
        Change("stripes", 252, number(.max, 4), "4294967295 stripes"),
        Change(
            "a second slot", 208 + 48,
            number(0x00ac_71f3, 4) + number(1000, 4) + [UInt8](repeating: 0, count: 32) + number(10, 4)
                + number(4000, 4), "in the same place"),
        Change("pointer's length", 116, number(8, 4), "a pointer to a LUKS header of 8 bytes", inFile: true),
        Change("pointer", 112, number(0x1234_5678, 4), "without a pointer", inFile: true),
        Change("offset", 120, number(65537, 8), "at byte 65537", inFile: true),
        Change("offset", 120, number(0, 8), "at byte 0", inFile: true),
        Change("offset", 120, number(UInt64.max & ~65535, 8), "truncated", inFile: true),
        Change("offset", 120, number(1 << 40, 8), "truncated", inFile: true),
        Change("length", 128, number(591, 8), "LUKS header of 591 bytes", inFile: true),
        Change("length", 128, number(.max, 8), "LUKS header of 18446744073709551615", inFile: true),
        Change("length", 128, number(16 << 20 | 1, 8), "LUKS header of 16777217", inFile: true),
        Change("length", 128, number(100_000, 8), "outside of its 100000 bytes", inFile: true),
        Change("method", 32, number(0, 4), "without LUKS encryption", inFile: true),
        Change("method", 32, number(1, 4), "without LUKS encryption", inFile: true),
        Change("size", 24, number(1 << 20 | 100, 8), "not a multiple of the sector size", inFile: true),
        Change("L1 table", 40, number(65536, 8), "in the same place", inFile: true),
        Change("refcount table", 48, number(131072, 8), "in the same place", inFile: true),
    ]

    @Test(arguments: changes) func isRefused(change: Change) throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        var file = try directory.read("disk.qcow2")
        let place = change.isInFile ? change.offset : 65536 + change.offset
        file.replaceSubrange(place..<place + change.bytes.count, with: change.bytes)
        try directory.write("disk.qcow2", file)
        for readOnly in [true, false] {
            let error = try #require(openError(path, encrypted.options(readOnly: readOnly)))
            #expect("\(error)".contains(change.says), "\(error)")
        }
        // Nor do the tools trip over it.
        _ = try? ImageInformation(path: path)
        _ = try? DiskImage.check(path: path, options: unlocked)
    }

    /// What a header may have computed before a password is known to be wrong has a bound, for all of its slots
    /// together, and nothing is computed beyond it. Who needs no data computes nothing.
    @Test func whatAPasswordCostsIsBounded() throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        var file = try directory.read("disk.qcow2")
        // Of a key of 64 bytes two digests of SHA-256, of the digest one.
        let own: UInt64 = 2 * 1000 + 1000
        var options = encrypted.options()
        options.maximumKeyWork = own
        _ = try DiskImage(path: path, options: options)
        options.maximumKeyWork = own - 1
        #expect(openError(path, options) == .keyTooSlow(path: path, work: own, limit: own - 1))

        // Seven slots more, behind the first one's key: each by itself would be allowed.
        let most = UInt32(DiskImageOptions.defaultMaximumKeyWork / 4), stride = (64 * 4000 + 4095) / 4096 * 8
        for slot in 1..<8 {
            let place = 65536 + 208 + 48 * slot
            file.replaceSubrange(place..<place + 8, with: Self.number(0x00ac_71f3, 4) + Self.number(UInt64(most), 4))
            file.replaceSubrange(
                place + 40..<place + 48, with: Self.number(UInt64(8 + slot * stride), 4) + Self.number(4000, 4))
        }
        try directory.write("disk.qcow2", file)
        let all = own + 7 * (2 * UInt64(most) + 1000)
        for readOnly in [true, false] {
            #expect(
                openError(path, encrypted.options(readOnly: readOnly))
                    == .keyTooSlow(path: path, work: all, limit: DiskImageOptions.defaultMaximumKeyWork))
        }
        #expect(try ImageInformation(path: path).encryption?.luks?.slots.filter(\.isActive).count == 8)
        var sealed = unlocked
        sealed.opensData = false
        _ = try DiskImage(path: path, options: sealed)
    }

    /// What cannot be seen to be wrong makes the key wrong.
    @Test(arguments: [112, 132, 216, 4096, 4096 + 255_999]) func isAnotherKeysHeader(offset: Int) throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        var file = try directory.read("disk.qcow2")
        file[65536 + offset] ^= 0x10
        try directory.write("disk.qcow2", file)
        #expect(openError(path, encrypted.options()) == .wrongKey(path: path))
    }

    /// Whatever the headers say, nothing hangs and nothing stops.
    @Test func randomChangesFailOrRead() throws {
        let encrypted = try Encrypted(directory)
        _ = try encrypted.create("disk.qcow2", size: 1 << 20)
        let file = try directory.read("disk.qcow2")
        var generator = SeededGenerator(seed: UInt64(environment("SWKVM_SEED") ?? 21)), opened = 0
        for _ in 0..<(environment("SWKVM_ROUNDS") ?? 400) {
            var changed = file
            for _ in 0..<Int.random(in: 1...3, using: &generator) {
                // The pointer to the LUKS header, and that.
                let place =
                    Int.random(in: 0..<4, using: &generator) == 0
                    ? Int.random(in: 112..<136, using: &generator) : 65536 + Int.random(in: 0..<592, using: &generator)
                changed[place] = [0, 1, 0x7f, 0x80, 0xff, UInt8.random(in: 0 ... .max, using: &generator)]
                    .randomElement(using: &generator)!
            }
            try directory.write("changed.qcow2", changed)
            // A new key each time, as one remembers what it has opened.
            var options = try Encrypted(directory).options(readOnly: Bool.random(using: &generator))
            options.maximumKeyWork = 4000
            guard let image = try? DiskImage(path: directory.file("changed.qcow2"), options: options) else { continue }
            opened += 1
            var engine = try DiskEngine(image, depth: 2)
            _ = try? engine.readAll()
        }
        // Some fields say nothing: the UUID, slots that are not in use.
        #expect(opened > 0)
    }

    /// A scan counts the header, and finds somebody else's data in it.
    @Test func theHeaderIsCounted() throws {
        let encrypted = try Encrypted(directory)
        let path = try encrypted.create("disk.qcow2", size: 1 << 20)
        #expect(try DiskImage.check(path: path, options: unlocked).isSound)
        do {
            var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 2)
            try engine.write(0, [UInt8](repeating: 1, count: 65536))
        }
        var file = try directory.read("disk.qcow2")
        let l2 = Int(file.bigEndian64(at: Int(file.bigEndian64(at: 40))) & 0x00ff_ffff_ffff_fe00)
        // The guest's first cluster in the place of the key.
        file.replaceSubrange(l2..<l2 + 8, with: [0x80, 0, 0, 0, 0, 1, 0, 0])
        try directory.write("disk.qcow2", file)
        #expect(try DiskImage.check(path: path, options: unlocked).errors > 0)
        var engine = try DiskEngine(DiskImage(path: path, options: encrypted.options()), depth: 2)
        #expect(throws: DiskImageError.self) { try engine.write(0, [UInt8](repeating: 2, count: 512)) }
        #expect(try Array(directory.read("disk.qcow2")[65536..<65536 + 592]) == Array(file[65536..<65536 + 592]))
    }
}

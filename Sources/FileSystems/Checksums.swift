// SPDX-License-Identifier: Apache-2.0

/// A cyclic redundancy check of 32 bits, least significant bit first.
struct CRC32: Sendable {
    private let table: [UInt32]

    /// CRC-32C, of ext4's metadata.
    static let castagnoli = CRC32(polynomial: 0x82f6_3b78)
    /// CRC-32, of a GPT.
    static let ethernet = CRC32(polynomial: 0xedb8_8320)

    private init(polynomial: UInt32) {
        table = (0..<256).map { byte in
            (0..<8).reduce(UInt32(byte)) { value, _ in value & 1 != 0 ? value >> 1 ^ polynomial : value >> 1 }
        }
    }

    /// Goes on with more bytes; neither the start nor the result is inverted.
    func update(_ value: UInt32, _ bytes: some Sequence<UInt8>) -> UInt32 {
        bytes.reduce(value) { table[Int(UInt8(truncatingIfNeeded: $0) ^ $1)] ^ $0 >> 8 }
    }

    func update(_ value: UInt32, little number: UInt32) -> UInt32 { update(value, littleBytes(number)) }
    func update(_ value: UInt32, big number: UInt32) -> UInt32 { update(value, littleBytes(number.byteSwapped)) }

    /// The check as most formats have it: from all ones, inverted.
    func check(_ bytes: some Sequence<UInt8>) -> UInt32 { ~update(.max, bytes) }

    private func littleBytes(_ number: UInt32) -> [UInt8] {
        (0..<4).map { UInt8(truncatingIfNeeded: number >> (8 * UInt32($0))) }
    }
}

/// CRC-16 (polynomial 0xa001), of the group descriptors of ext4 without `metadata_csum`.
func crc16(_ value: UInt16, _ bytes: [UInt8]) -> UInt16 {
    bytes.reduce(value) { value, byte in
        (0..<8).reduce(value ^ UInt16(byte)) { value, _ in value & 1 != 0 ? value >> 1 ^ 0xa001 : value >> 1 }
    }
}

/// CRC-32 with the most significant bit first, not inverted: of jbd2's first kind of checksums.
struct BigEndianCRC32: Sendable {
    private let table: [UInt32] = (0..<256).map { byte in
        (0..<8).reduce(UInt32(byte) << 24) { value, _ in value >> 31 != 0 ? value << 1 ^ 0x04c1_1db7 : value << 1 }
    }

    func update(_ value: UInt32, _ bytes: [UInt8]) -> UInt32 {
        bytes.reduce(value) { table[Int($0 >> 24 ^ UInt32($1))] ^ $0 << 8 }
    }
}

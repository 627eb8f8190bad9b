// SPDX-License-Identifier: Apache-2.0

/// The checksum of VHDX's structures: CRC-32 with Castagnoli's polynomial.
public enum CRC32C {
    /// The checksum of bytes, where a range (the checksum field itself) counts as zeroes.
    /// - Parameter zeroes: offsets from the start of `bytes`.
    public static func checksum(_ bytes: [UInt8], zeroes: Range<Int>) -> UInt32 {
        // A few microseconds, where what is summed has 4 KiB or 64 KiB.
        let table = (0..<UInt32(256)).map { byte in
            (0..<8).reduce(byte) { crc, _ in crc >> 1 ^ (crc & 1 == 1 ? 0x82f6_3b78 : 0) }
        }
        var crc = UInt32.max
        for index in 0..<bytes.count {
            let byte = index >= zeroes.lowerBound && index < zeroes.upperBound ? 0 : UInt32(bytes[index])
            crc = crc >> 8 ^ table[Int((crc ^ byte) & 0xff)]
        }
        return ~crc
    }
}

// SPDX-License-Identifier: Apache-2.0

/// An IPv4 address.
struct IPv4Address: Equatable {
    var value: UInt32

    static let any = IPv4Address(value: 0)
    static let broadcast = IPv4Address(value: 0xffff_ffff)

    init(value: UInt32) { self.value = value }

    /// Parses `a.b.c.d`; nil if the text has another form.
    init?(_ text: Text) {
        let parts = text.split(UInt8(ascii: "."))
        guard parts.count == 4 else { return nil }
        value = 0
        for part in parts {
            guard let number = part.number, number < 256 else { return nil }
            value = value << 8 | UInt32(number)
        }
    }

    var text: Text { "\(value >> 24).\(value >> 16 & 0xff).\(value >> 8 & 0xff).\(value & 0xff)" }
}

/// Reading a packet: a field beyond its end is zero, and lengths are checked before use.
extension [UInt8] {
    func big16(_ index: Int) -> UInt16 {
        index >= 0 && index + 1 < count ? UInt16(self[index]) << 8 | UInt16(self[index + 1]) : 0
    }
    func big32(_ index: Int) -> UInt32 { UInt32(big16(index)) << 16 | UInt32(big16(index + 2)) }

    mutating func append16(_ value: UInt16) {
        append(UInt8(value >> 8))
        append(UInt8(value & 0xff))
    }

    mutating func append32(_ value: UInt32) {
        append16(UInt16(value >> 16))
        append16(UInt16(value & 0xffff))
    }

    mutating func set16(_ value: UInt16, at index: Int) {
        self[index] = UInt8(value >> 8)
        self[index + 1] = UInt8(value & 0xff)
    }

    /// The Internet checksum (RFC 1071) of the bytes from `start` on.
    func checksum(from start: Int = 0, plus seed: UInt32 = 0) -> UInt16 {
        var sum = UInt64(seed)
        var index = start
        while index + 1 < count {
            sum += UInt64(self[index]) << 8 | UInt64(self[index + 1])
            index += 2
        }
        if index < count { sum += UInt64(self[index]) << 8 }
        while sum >> 16 != 0 { sum = sum & 0xffff + sum >> 16 }
        return ~UInt16(sum)
    }
}

/// CRC-32 (IEEE 802.3, the one of zlib and gzip).
struct CRC32 {
    private var table: [UInt32] = []
    private var state: UInt32 = 0xffff_ffff

    init() {
        table.reserveCapacity(256)
        for byte in UInt32(0)..<256 {
            var value = byte
            for _ in 0..<8 { value = value & 1 != 0 ? value >> 1 ^ 0xedb8_8320 : value >> 1 }
            table.append(value)
        }
    }

    mutating func add(_ start: Address, count: UInt64) {
        for offset in 0..<count {
            let byte: UInt8 = start.load(offset)
            state = state >> 8 ^ table[Int(UInt8(truncatingIfNeeded: state) ^ byte)]
        }
    }

    var value: UInt32 { ~state }
}

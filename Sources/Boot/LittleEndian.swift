// SPDX-License-Identifier: Apache-2.0

/// Checked little-endian reads from a copy of untrusted bytes.
extension Array where Element == UInt8 {
    /// The integer at byte `offset`, or nil when it does not lie within the array.
    func load<Value: FixedWidthInteger>(_ type: Value.Type = Value.self, at offset: Int) -> Value? {
        let size = MemoryLayout<Value>.size
        guard offset >= 0, offset <= count - size else { return nil }
        var value: Value = 0
        for index in (0..<size).reversed() { value = value << 8 | Value(truncatingIfNeeded: self[offset + index]) }
        return value
    }

    /// Appends an integer's bytes, the least significant first.
    mutating func append<Value: FixedWidthInteger>(littleEndian value: Value) {
        for index in 0..<MemoryLayout<Value>.size { append(UInt8(truncatingIfNeeded: value >> Value(8 * index))) }
    }

    /// Overwrites the bytes at `offset`, which must lie within the array.
    mutating func store<Value: FixedWidthInteger>(_ value: Value, at offset: Int) {
        for index in 0..<MemoryLayout<Value>.size {
            self[offset + index] = UInt8(truncatingIfNeeded: value >> Value(8 * index))
        }
    }
}

extension UInt64 {
    /// Rounded down to a multiple of `alignment`, a power of two.
    func alignedDown(to alignment: UInt64) -> UInt64 { self & ~(alignment &- 1) }

    /// Rounded up to a multiple of `alignment`, a power of two; nil when 64 bits do not hold it.
    func alignedUp(to alignment: UInt64) -> UInt64? {
        let (sum, overflow) = addingReportingOverflow(alignment &- 1)
        return overflow ? nil : sum.alignedDown(to: alignment)
    }

    /// The sum, or nil when 64 bits do not hold it.
    func adding(_ other: UInt64) -> UInt64? {
        let (sum, overflow) = addingReportingOverflow(other)
        return overflow ? nil : sum
    }
}

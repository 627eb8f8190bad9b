// SPDX-License-Identifier: Apache-2.0

internal import Platform

/// A guest-physical address.
///
/// Comes from registers, descriptors and image headers, so arithmetic on it is checked or wraps; it never traps.
public struct GuestAddress: RawRepresentable, Hashable, Comparable, Sendable, BitwiseCopyable, CustomStringConvertible {
    public let rawValue: UInt64

    public init(rawValue: UInt64) { self.rawValue = rawValue }
    public init(_ rawValue: UInt64) { self.rawValue = rawValue }

    /// The hole in RAM below 4 GiB that belongs to devices (docs/platform.md).
    public static let hole =
        GuestAddress(PhysicalLayout.hole.lowerBound)..<GuestAddress(PhysicalLayout.hole.upperBound)

    /// The address `count` bytes higher, or nil beyond 2^64 − 1.
    public func adding(_ count: UInt64) -> GuestAddress? {
        let (sum, overflow) = rawValue.addingReportingOverflow(count)
        return overflow ? nil : GuestAddress(sum)
    }

    /// The address `count` bytes higher, modulo 2^64.
    public static func &+ (address: GuestAddress, count: UInt64) -> GuestAddress {
        GuestAddress(address.rawValue &+ count)
    }

    /// Indicates whether the address is a multiple of `alignment`, a power of two.
    public func isAligned(to alignment: UInt64) -> Bool { rawValue & (alignment &- 1) == 0 }

    public static func < (left: GuestAddress, right: GuestAddress) -> Bool { left.rawValue < right.rawValue }

    public var description: String { "0x" + String(rawValue, radix: 16) }
}

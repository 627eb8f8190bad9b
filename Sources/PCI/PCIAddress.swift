// SPDX-License-Identifier: Apache-2.0

/// Bus, device and function: the address of a function in configuration space.
public struct PCIAddress: Hashable, Comparable, Sendable, CustomStringConvertible {
    public let bus: UInt8
    /// 0 to 31.
    public let device: UInt8
    /// 0 to 7.
    public let function: UInt8

    public init(bus: UInt8 = 0, device: UInt8, function: UInt8 = 0) {
        (self.bus, self.device, self.function) = (bus, device & 31, function & 7)
    }

    /// - Parameter number: bus, device and function as mechanism #1 and ECAM have them: 8, 5 and 3 bits.
    init(number: UInt32) {
        self.init(
            bus: UInt8(truncatingIfNeeded: number >> 8), device: UInt8(truncatingIfNeeded: number >> 3),
            function: UInt8(truncatingIfNeeded: number))
    }

    private var number: UInt32 { UInt32(bus) << 8 | UInt32(device) << 3 | UInt32(function) }

    public static func < (left: PCIAddress, right: PCIAddress) -> Bool { left.number < right.number }

    /// `00:01.0`, as lspci has it.
    public var description: String { "\(Self.hex(bus)):\(Self.hex(device)).\(function)" }

    private static func hex(_ value: UInt8) -> String { (value < 16 ? "0" : "") + String(value, radix: 16) }
}

/// What a read of nothing gives: every bit of the access set.
func allOnes(size: Int) -> UInt64 { size >= 8 ? .max : (1 << UInt64(8 &* max(0, size))) &- 1 }

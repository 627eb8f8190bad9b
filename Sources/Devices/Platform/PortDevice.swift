// SPDX-License-Identifier: Apache-2.0

/// A device behind a few I/O ports. Its methods are called by vCPU threads, possibly concurrently; none of them waits.
///
/// `offset` counts from the device's first port. Its bus passes only offsets that belong to it, but an access may be
/// wider than what is left of the range: a width that the device lacks is the guest's mistake, never an error here.
public protocol PortDevice: AnyObject, Sendable {
    /// The value of an access of `size` bytes (1, 2 or 4).
    func read(_ offset: UInt16, size: Int) -> UInt32

    /// An access of `size` bytes (1, 2 or 4) with a value of this width.
    func write(_ offset: UInt16, size: Int, value: UInt32)

    /// What one `rep outs` of elements of `size` bytes brings in a single exit.
    func write(_ offset: UInt16, size: Int, string: Span<UInt8>)
}

extension PortDevice {
    public func write(_ offset: UInt16, size: Int, string: Span<UInt8>) {
        writeElements(offset, size: size, string: string)
    }

    /// One access for each element.
    func writeElements(_ offset: UInt16, size: Int, string: Span<UInt8>) {
        guard size == 1 || size == 2 || size == 4 else { return }
        for position in stride(from: 0, through: string.count - size, by: size) {
            var value: UInt32 = 0
            for index in 0..<size {
                value |= UInt32(string[position + index]) << UInt32(8 * index)
            }
            write(offset, size: size, value: value)
        }
    }
}

/// A device whose registers are bytes: a wider access is one byte access after the other, as on the ISA bus.
protocol ByteWideDevice: PortDevice {
    func readByte(_ offset: UInt16) -> UInt8
    func writeByte(_ offset: UInt16, _ value: UInt8)
}

extension ByteWideDevice {
    public func read(_ offset: UInt16, size: Int) -> UInt32 {
        var value: UInt32 = 0
        for index in 0..<UInt16(clamping: min(size, 4)) {
            value |= UInt32(readByte(offset &+ index)) << (8 * UInt32(index))
        }
        return value
    }

    public func write(_ offset: UInt16, size: Int, value: UInt32) {
        for index in 0..<UInt16(clamping: min(size, 4)) {
            writeByte(offset &+ index, UInt8(truncatingIfNeeded: value >> (8 * UInt32(index))))
        }
    }
}

/// A request of the guest to its machine through a platform device.
public enum MachineRequest: Sendable, Equatable {
    case powerOff
    case reset
    /// The exit device's status, 0 … 63.
    case exit(status: UInt8)
}

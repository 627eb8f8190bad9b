// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// A copy of a frame's Ethernet header: destination, source, type or VLAN tag (IEEE 802.3).
struct EthernetHeader: BitwiseCopyable {
    static let size: UInt64 = 14

    /// Bytes 0–7: the destination, and two bytes of the source.
    private var first: UInt64
    /// Bytes 8–11: the rest of the source.
    private var second: UInt32
    /// Bytes 12–13.
    private var third: UInt16

    /// Takes the header off the front of a frame; nil, and nothing taken, when the frame is shorter.
    init?(removedFrom frame: inout IOVectors) {
        guard let first = frame.load(UInt64.self), let second = frame.load(UInt32.self, at: 8),
            let third = frame.load(UInt16.self, at: 12), frame.removeFirst(Self.size)
        else { return nil }
        (self.first, self.second, self.third) = (first.littleEndian, second.littleEndian, third.littleEndian)
    }

    /// The sender's address, as `MACAddress.rawValue` has it.
    var source: UInt64 {
        UInt64(UInt16(truncatingIfNeeded: first.littleEndian >> 48).byteSwapped) << 32
            | UInt64(second.littleEndian.byteSwapped)
    }
}

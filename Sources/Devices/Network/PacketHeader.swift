// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.2 §5.1.6), which is 12 bytes on every packet of a modern
/// device.
struct PacketHeader: BitwiseCopyable {
    static let size: UInt64 = 12
    /// Where `num_buffers` is.
    static let bufferCountOffset: UInt64 = 10

    /// Where `gso_type` is.
    static let segmentationOffset = 1

    private enum Flag {
        static let needsChecksum: UInt8 = 1
    }

    private enum Segmentation {
        static let none: UInt8 = 0
        static let tcp4: UInt8 = 1
        static let udp: UInt8 = 3
        static let tcp6: UInt8 = 4
        static let ecn: UInt8 = 0x80
    }

    /// Bytes 0–7: flags, gso_type, hdr_len, gso_size, csum_start.
    private var first: UInt64
    /// Bytes 8–11: csum_offset, num_buffers.
    private var second: UInt32

    var flags: UInt8 { UInt8(truncatingIfNeeded: first) }
    var segmentation: UInt8 { UInt8(truncatingIfNeeded: first >> 8) }

    /// A driver's header, copied and checked: nil when there are not 12 bytes, or when it asks for what was not
    /// negotiated.
    ///
    /// What a driver must not set is cleared (§5.1.6.2.1): all flags but NEEDS_CSUM, and the number of buffers. Whether
    /// the offsets make sense in the packet is the TAP's to say.
    init?(from packet: IOVectors, features: FeatureSet) {
        guard let first = packet.load(UInt64.self), let second = packet.load(UInt32.self, at: 8) else { return nil }
        self.first = first & ~0xff | first & UInt64(Flag.needsChecksum)
        self.second = second & 0xffff
        if flags != 0, !features.contains(.checksum) { return nil }
        if segmentation & Segmentation.ecn != 0, !features.contains(.hostECN) { return nil }
        let needed: FeatureSet
        switch segmentation & ~Segmentation.ecn {
        case Segmentation.none: needed = []
        case Segmentation.tcp4: needed = .hostTSO4
        case Segmentation.tcp6: needed = .hostTSO6
        case Segmentation.udp: needed = .hostUFO
        default: return nil
        }
        guard features.isSuperset(of: needed) else { return nil }
    }

    /// Indicates whether a packet with this `gso_type` goes on the wire as it is: NONE, or ECN alone.
    static func isWhole(segmentation: UInt8) -> Bool { segmentation & ~Segmentation.ecn == Segmentation.none }

    /// Indicates whether the packet asks nothing of the host that needs a TAP with headers.
    var isPlain: Bool { flags == 0 && segmentation == Segmentation.none }
}

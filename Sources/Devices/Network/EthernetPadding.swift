// SPDX-License-Identifier: Apache-2.0

/// Bytes behind a packet that make its frame as long as Ethernet's shortest (IEEE 802.3 §4.2.3.3): no part of the
/// packet (RFC 894).
enum EthernetPadding {
    /// Bytes, without the checksum.
    static let shortestFrame = 60

    /// The length of a frame without what is behind its IP packet; that of the frame if it has another kind of packet,
    /// or a packet whose header states no length that it could have.
    static func length(ofPacketIn frame: UnsafeRawBufferPointer) -> Int {
        var type = 12
        // A VLAN tag has four bytes (IEEE 802.1Q).
        if unsafe number(at: type, in: frame) == 0x8100 { type += 4 }
        let header = type + 2, length: Int
        switch unsafe number(at: type, in: frame) {
        // The total length (RFC 791), and the length behind the header (RFC 8200).
        case 0x0800: length = unsafe number(at: header + 2, in: frame)
        case 0x86dd: length = unsafe 40 + number(at: header + 4, in: frame)
        default: return frame.count
        }
        return length >= 20 && header + length < frame.count ? header + length : frame.count
    }

    /// Two bytes, big-endian; 0 beyond the end.
    private static func number(at offset: Int, in frame: UnsafeRawBufferPointer) -> Int {
        guard offset + 2 <= frame.count else { return 0 }
        // Both are within the buffer.
        return unsafe Int(frame[offset]) << 8 | Int(frame[offset + 1])
    }
}

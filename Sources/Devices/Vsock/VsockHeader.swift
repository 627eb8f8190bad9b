// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// `struct virtio_vsock_hdr` (virtio 1.2 §5.10.6): the header of every packet, a private copy.
struct VsockHeader: BitwiseCopyable {
    /// Bytes.
    static let size: UInt64 = 44
    /// VIRTIO_VSOCK_TYPE_STREAM, the only one that the device supports.
    static let stream: UInt16 = 1

    /// `op` (§5.10.6).
    enum Operation: UInt16 {
        case request = 1
        case response = 2
        case reset = 3
        case shutdown = 4
        case data = 5
        case creditUpdate = 6
        case creditRequest = 7
    }

    /// Flags of ``Operation/shutdown`` (§5.10.6.6).
    struct Shutdown: OptionSet, BitwiseCopyable {
        let rawValue: UInt32
        /// The sender will receive no more.
        static let receive = Shutdown(rawValue: 1)
        /// The sender will send no more.
        static let send = Shutdown(rawValue: 2)
        static let both: Shutdown = [.receive, .send]
    }

    var source: UInt64
    var destination: UInt64
    var sourcePort: UInt32
    var destinationPort: UInt32
    /// Bytes of data behind the header.
    var length: UInt32 = 0
    var type = stream
    /// As the packet has it, which may be none of ``Operation``.
    var operation: UInt16
    var flags: UInt32 = 0
    /// The size of the sender's receive buffer, in bytes (`buf_alloc`).
    var bufferSize: UInt32 = 0
    /// Bytes that the sender has taken out of that buffer, modulo 2³² (`fwd_cnt`).
    var forwarded: UInt32 = 0

    init(
        _ operation: Operation, from source: UInt64, port sourcePort: UInt32, to destination: UInt64,
        port destinationPort: UInt32
    ) {
        (self.source, self.sourcePort) = (source, sourcePort)
        (self.destination, self.destinationPort) = (destination, destinationPort)
        self.operation = operation.rawValue
    }

    /// The header at the start of a packet; nil when there are not that many bytes. Values are as the sender has them.
    init?(from packet: IOVectors) {
        var words = InlineArray<11, UInt32>(repeating: 0)
        // A copy of whole words, any of whose bit patterns is a value.
        let count = unsafe withUnsafeMutableBytes(of: &words) { unsafe packet.copy(to: $0) }
        guard count == Int(Self.size) else { return nil }
        source = UInt64(words[0]) | UInt64(words[1]) << 32
        destination = UInt64(words[2]) | UInt64(words[3]) << 32
        (sourcePort, destinationPort, length) = (words[4], words[5], words[6])
        type = UInt16(truncatingIfNeeded: words[7])
        operation = UInt16(truncatingIfNeeded: words[7] >> 16)
        (flags, bufferSize, forwarded) = (words[8], words[9], words[10])
    }

    /// Writes the header to the start of a buffer that has room for it.
    func store(in buffers: IOVectors) {
        let words: InlineArray<11, UInt32> = [
            UInt32(truncatingIfNeeded: source), UInt32(truncatingIfNeeded: source >> 32),
            UInt32(truncatingIfNeeded: destination), UInt32(truncatingIfNeeded: destination >> 32),
            sourcePort, destinationPort, length, UInt32(type) | UInt32(operation) << 16, flags, bufferSize, forwarded,
        ]
        unsafe withUnsafeBytes(of: words) { bytes in _ = unsafe buffers.copy(from: bytes) }
    }
}

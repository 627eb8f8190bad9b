// SPDX-License-Identifier: Apache-2.0

internal import Linux
public import Metadata
internal import Virtio

/// The metadata that a network interface's guest finds at an address of the link.
public struct MetadataService: Sendable {
    /// Where the guest's requests are answered from.
    public var store: MetadataStore
    /// IPv4, the first byte the most significant.
    public var address: UInt32

    public init(_ store: MetadataStore, address: UInt32 = MetadataEndpoint.defaultAddress) {
        (self.store, self.address) = (store, address)
    }
}

/// The end of an interface's link that has the metadata: frames of the guest for its address come here and not to the
/// TAP, and its own reach the guest before the TAP's. Used by the thread of the interface's one pair of queues alone.
final class MetadataLink {
    /// The Ethernet, ARP and IPv4 fields that decide, in network byte order.
    private enum Offset {
        static let type: UInt64 = 12
        static let protocolTarget: UInt64 = 38
        static let destination: UInt64 = 30
    }

    /// The longest frame that is looked at.
    private static let longestFrame = 65_536 + 18

    private var endpoint: MetadataEndpoint
    private let address: UInt32
    private let timer: TimerFD
    private var timedDeadline: UInt64?
    private var buffer: [UInt8] = []

    init(_ service: MetadataService) throws(SystemCallError) {
        timer = try TimerFD()
        endpoint = MetadataEndpoint(service.store, address: service.address)
        address = service.address
    }

    /// For the thread's epoll instance; see ``expire()``.
    var descriptor: Int32 { timer.rawValue }

    /// Takes a frame that is for the endpoint's address.
    /// - Returns: false if it is not, for which nothing is allocated.
    func takes(_ frame: IOVectors) -> Bool {
        switch frame.load(UInt16.self, at: Offset.type)?.byteSwapped {
        case 0x0800: guard isAddress(frame, at: Offset.destination) else { return false }
        case 0x0806: guard isAddress(frame, at: Offset.protocolTarget) else { return false }
        default: return false
        }
        // A copy, which the guest cannot change: the endpoint looks at the fields again.
        let count = Int(min(frame.byteCount, UInt64(Self.longestFrame)))
        if buffer.count < count { buffer = [UInt8](repeating: 0, count: max(count, 2048)) }
        let copied = unsafe buffer.withUnsafeMutableBytes { bytes in
            unsafe frame.copy(to: UnsafeMutableRawBufferPointer(rebasing: bytes[..<count]))
        }
        endpoint.receive(buffer[..<copied], now: TimerFD.now)
        return true
    }

    private func isAddress(_ frame: IOVectors, at offset: UInt64) -> Bool {
        frame.load(UInt32.self, at: offset)?.byteSwapped == address
    }

    /// Indicates whether there is a frame for the guest.
    var hasFrame: Bool { endpoint.hasFrame }

    /// The next frame for the guest, behind a packet's header of zeroes.
    func nextPacket() -> [UInt8]? {
        endpoint.nextFrame(now: TimerFD.now).map { [UInt8](repeating: 0, count: Int(PacketHeader.size)) + $0 }
    }

    /// Has the timer expire when something is to be sent again.
    func setTimer() {
        let now = TimerFD.now
        guard let deadline = endpoint.deadline(now: now), deadline != timedDeadline else { return }
        timedDeadline = deadline
        timer.start(milliseconds: Int(clamping: deadline > now ? deadline - now : 1))
    }

    /// The timer is readable: prepares what is sent again.
    func expire() {
        _ = timer.take()
        timedDeadline = nil
        endpoint.expire(now: TimerFD.now)
    }

    /// Forgets all connections: another driver knows nothing of them.
    func reset() {
        endpoint.reset()
        timedDeadline = nil
    }
}

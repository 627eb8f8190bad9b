// SPDX-License-Identifier: Apache-2.0

public import Virtio

/// The counters of a network device. Any thread may read them.
///
/// Frames that the host drops before the device sees them, because the TAP's queue is full, are the TAP's `tx_dropped`
/// (``NetworkDevice/hostDrops``).
public final class NetworkCounters: Sendable {
    /// What one pair of queues has moved.
    public final class Pair: Sendable {
        /// Frames given to the guest, and their bytes without the virtio header.
        public let receivedFrames = DeviceCounters.Counter()
        public let receivedBytes = DeviceCounters.Counter()
        /// Frames given to the host, and their bytes without the virtio header.
        public let sentFrames = DeviceCounters.Counter()
        public let sentBytes = DeviceCounters.Counter()
    }

    /// One for each pair, which its thread alone adds to.
    public let pairs: [Pair]

    /// The sums over the pairs.
    public var receivedFrames: UInt64 { pairs.reduce(0) { $0 &+ $1.receivedFrames.value } }
    public var receivedBytes: UInt64 { pairs.reduce(0) { $0 &+ $1.receivedBytes.value } }
    public var sentFrames: UInt64 { pairs.reduce(0) { $0 &+ $1.sentFrames.value } }
    public var sentBytes: UInt64 { pairs.reduce(0) { $0 &+ $1.sentBytes.value } }

    /// Frames for the guest that no buffer, or not all buffers together, can hold.
    public let receiveTooLong = DeviceCounters.Counter()
    /// Frames for the guest that are larger than the MTU it negotiated: the host's interface has got another since.
    public let receiveAboveMTU = DeviceCounters.Counter()
    /// Frames for the guest that were waiting when the driver started or stopped.
    public let receiveWithoutDriver = DeviceCounters.Counter()
    /// Frames for the guest while the link was down.
    public let receiveLinkDown = DeviceCounters.Counter()
    /// Receive buffers returned unused: readable, or too short for a header. No frame is lost by them.
    public let badReceiveBuffers = DeviceCounters.Counter()

    /// Frames from the guest that are malformed: no header, too short, too long, an offload that was not negotiated,
    /// or offsets that the TAP refuses.
    public let sendMalformed = DeviceCounters.Counter()
    /// Frames from the guest while the link, or the interface, was down.
    public let sendLinkDown = DeviceCounters.Counter()
    /// Frames from the guest with another source address than the interface's, which is locked.
    public let sendForeignSource = DeviceCounters.Counter()
    /// Frames from the guest for which the host had no memory.
    public let sendNoMemory = DeviceCounters.Counter()
    /// Times the device waited because the TAP took no more; no frame is lost by it.
    public let sendWaits = DeviceCounters.Counter()

    /// Numbers of the causes for which frames are lost, for ``DeviceEvents/Kind/lostFrames(_:)``.
    enum Loss {
        static let receiveTooLong: UInt8 = 0
        static let receiveAboveMTU: UInt8 = 1
        static let badReceiveBuffers: UInt8 = 2
        static let sendMalformed: UInt8 = 3
        static let sendLinkDown: UInt8 = 4
        static let sendNoMemory: UInt8 = 5
        static let receiveWithoutDriver: UInt8 = 6
        static let receiveLinkDown: UInt8 = 7
        static let sendForeignSource: UInt8 = 8
        static let hostReceive: UInt8 = 9
        static let hostSend: UInt8 = 10
    }

    /// - Parameter pairs: of queues.
    public init(pairs: Int = 1) { self.pairs = (0..<pairs).map { _ in Pair() } }

    /// Frames for the guest that did not reach it.
    public var receiveDrops: UInt64 {
        receiveTooLong.value + receiveAboveMTU.value + receiveWithoutDriver.value + receiveLinkDown.value
    }
    /// Frames from the guest that did not reach the host.
    public var sendDrops: UInt64 {
        sendMalformed.value + sendLinkDown.value + sendForeignSource.value + sendNoMemory.value
    }
}

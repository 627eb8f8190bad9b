// SPDX-License-Identifier: Apache-2.0

/// A connection between a port of the guest's and a socket of the host's: an entry of ``VsockConnections``.
struct VsockConnection: BitwiseCopyable {
    enum State: UInt8 {
        /// No connection.
        case free
        /// A client of the host has not asked for a port yet.
        case command
        /// The guest has asked for a port; the listener of its socket has no room for a connection yet.
        case connecting
        /// A client of the host has asked for a port, which the guest has not accepted yet.
        case requested
        case established
    }

    /// Packets for the guest that wait for a buffer. Each of a kind is one packet, however often it is needed.
    struct Owed: OptionSet, BitwiseCopyable {
        let rawValue: UInt8
        static let request = Owed(rawValue: 1)
        static let response = Owed(rawValue: 2)
        static let creditUpdate = Owed(rawValue: 4)
        static let creditRequest = Owed(rawValue: 8)
        static let shutdown = Owed(rawValue: 16)
    }

    var state = State.free
    /// Another one for each connection that has this entry: events of its predecessors are recognized.
    var generation: UInt16 = 0
    /// -1 when there is none any more.
    var socket: Int32 = -1
    var hostPort: UInt32 = 0
    var guestPort: UInt32 = 0
    /// Attempts to connect.
    var attempts = 0

    /// The next entry of a bucket of the table, or of the free ones; -1 for none.
    var nextInBucket: Int32 = -1
    /// Neighbours in the list of those with something for the guest; -1 for none.
    var next: Int32 = -1
    var previous: Int32 = -1
    var isListed = false

    var owed: Owed = []
    /// The socket has had something to read since it was last found empty.
    var isReadable = false
    /// The host's end has closed its sending side, or all of it; what it has sent before is read first.
    var hasPeerEnded = false
    var isPeerGone = false
    /// Everything that it has sent was read.
    var hasEnded = false
    /// What the guest was told, and what it has said itself.
    var announced: VsockHeader.Shutdown = []
    var wasShutDown: VsockHeader.Shutdown = []
    /// The socket's sending side is closed.
    var isSendClosed = false

    // MARK: Credit (§5.10.6.3)

    /// The guest's buffer, and bytes that it has taken out of it, modulo 2³².
    var guestBuffer: UInt32 = 0
    var guestForwarded: UInt32 = 0
    /// Bytes given to the guest, modulo 2³².
    var sent: UInt32 = 0
    /// Bytes of the guest that a socket has taken, modulo 2³², and what of it the guest knows.
    var forwarded: UInt32 = 0
    var announcedForwarded: UInt32 = 0
    /// The guest was asked for its credit since it was found used up.
    var hasAskedForCredit = false

    /// Bytes of the guest that the socket has not taken yet: where they begin in the ring, and how many there are.
    var bufferStart = 0
    var buffered = 0
    /// The buffer has ever held something.
    var hasUsedBuffer = false
    /// The socket is watched for room.
    var isWatchingRoom = false

    /// Receive buffers that the next read takes, as reads before found data.
    var readAhead = 1

    /// The largest part of the guest's buffer that is used, so that counts modulo 2³² can be compared.
    static let largestWindow: UInt32 = 1 << 30

    /// Bytes that the guest has room for.
    var credit: UInt32 {
        let window = min(guestBuffer, Self.largestWindow), inFlight = sent &- guestForwarded
        return inFlight < window ? window - inFlight : 0
    }

    /// Takes the guest's figures.
    /// - Returns: false when it has confirmed more than it got. An older figure is ignored: a driver may send packets
    ///   in another order than it has made them.
    mutating func update(bufferSize: UInt32, forwarded: UInt32) -> Bool {
        guestBuffer = bufferSize
        let step = forwarded &- guestForwarded
        if step <= sent &- guestForwarded {
            guestForwarded = forwarded
        } else if step < 1 << 31 {
            return false
        }
        if credit > 0 { hasAskedForCredit = false }
        return true
    }

    /// Indicates whether there is something for the guest that only waits for a receive buffer.
    var hasWork: Bool {
        !owed.isEmpty
            || state == .established && isReadable && !hasEnded && credit > 0
                && !wasShutDown.contains(.receive)
    }
}

// SPDX-License-Identifier: Apache-2.0

public import Virtio

/// The counters of a ``VsockDevice``. Any thread may read them.
public final class VsockCounters: Sendable {
    /// Bytes of data given to the guest, and taken from it.
    public let receivedBytes = DeviceCounters.Counter()
    public let sentBytes = DeviceCounters.Counter()
    /// Connections that the guest has opened to a socket of the host's, and that the host has opened to the guest.
    public let guestConnections = DeviceCounters.Counter()
    public let hostConnections = DeviceCounters.Counter()
    /// Connections that were opened and have ended; a guest's reset ends all.
    let endedConnections = DeviceCounters.Counter()
    /// Requests of the guest that the host has refused: nobody listens on the port's socket, for example.
    public let guestRefusals = DeviceCounters.Counter()
    /// Clients of the host that were refused: by the guest, or for what they have sent.
    public let hostRefusals = DeviceCounters.Counter()
    /// Packets of the guest that are malformed, or that break a rule of the connection.
    public let badPackets = DeviceCounters.Counter()
    /// Connections reset because the guest sent more than its credit allowed, or confirmed what was not sent.
    public let creditViolations = DeviceCounters.Counter()
    /// Receive buffers returned unused: readable, or too short for a packet.
    public let badReceiveBuffers = DeviceCounters.Counter()

    /// Connections of now.
    public var connections: UInt64 {
        // Three loads, one after the other: never below zero.
        let ended = endedConnections.value
        let opened = guestConnections.value &+ hostConnections.value
        return opened >= ended ? opened &- ended : 0
    }

    public init() {}
}

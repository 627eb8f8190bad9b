// SPDX-License-Identifier: Apache-2.0

public import Linux
public import Virtio

/// A virtio socket device (virtio 1.2 §5.10): stream connections between ports of the guest's and UNIX sockets of the
/// host's, in user space.
///
/// A connection of the guest to port P of the host (CID 2) goes to the UNIX socket `PATH_P`. A client of the host
/// connects to `PATH`, writes `CONNECT P` and a newline, and gets `OK H` and a newline when the guest has accepted, H
/// being its own port; from then on the socket is the stream.
public final class VsockDevice: VirtioDevice {
    public let name: String
    public let deviceID: UInt32 = 19
    /// VIRTIO_VSOCK_F_STREAM (§5.10.3).
    public let features = FeatureSet(bit: 0)
    public let maximumQueueSizes: [UInt16] = [256, 256, 64]
    public let configuration: ConfigurationSpace
    public let deviceEvents: DeviceEvents
    public let counters = VsockCounters()
    /// The guest's address.
    public let guestCID: UInt32

    private let worker: DeviceWorker

    /// Addresses that a guest may have: 0 is reserved, 1 is for loopback, 2 is the host, and the largest one means any
    /// (§5.10.4; AF_VSOCK's `VMADDR_CID_ANY`).
    public static let possibleCIDs: ClosedRange<UInt32> = 3...UInt32.max - 1
    /// Bytes that the path of the sockets may have, so that those of ports are possible, too.
    public static let longestPath = VsockAddress.longestPath
    /// Connections at a time, those included that are being opened; each has a descriptor.
    public static let maximumConnections = VsockTable.capacity

    /// Creates the device; ``start()`` starts its I/O thread.
    /// - Parameters:
    ///   - name: of the device and its I/O thread: `vsock0`.
    ///   - guestCID: of ``possibleCIDs``.
    ///   - path: of the sockets of the host's ports, without `_PORT`; at most ``longestPath`` bytes. It is looked up at
    ///     each connection of the guest, so it should be absolute.
    ///   - listener: a listening UNIX socket that does not block, for clients of the host.
    ///   - events: receives events for the log.
    public init(
        name: String, guestCID: UInt32, path: String, listener: consuming FileDescriptor,
        events: DeviceEvents = .none
    ) throws(SystemCallError) {
        self.name = name
        self.guestCID = guestCID
        deviceEvents = events
        configuration = ConfigurationSpace((0..<8).map { UInt8(truncatingIfNeeded: UInt64(guestCID) >> (8 * $0)) })
        let engine = try VsockEngine(
            guestCID: UInt64(guestCID), path: path, listener: listener, queueSizes: maximumQueueSizes,
            counters: counters, events: events)
        worker = try DeviceWorker(name: name, engine: engine, events: events)
    }

    /// Ends all connections, and notifies the driver by VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7) as soon as it
    /// has a buffer for that: for a guest that continues from a snapshot. The guest's listening sockets stay. Without
    /// effect while no driver is active; in a pause, the driver is notified afterwards.
    public func resetTransport() { worker.perform(VsockTransportReset()) }

    // MARK: VirtioDevice

    public func start(first: @escaping @Sendable () -> Void) throws(SystemCallError) {
        try worker.start(first: first)
    }

    public func activate(_ activation: Activation) { worker.activate(activation) }
    public func reset() { worker.reset() }
    public func stopQueue(_ index: Int) { worker.stopQueue(index) }
    public func startQueue(_ configuration: QueueConfiguration) { worker.startQueue(configuration) }
    public func pause(onQuiet: @escaping @Sendable () -> Void) { worker.pause(onQuiet: onQuiet) }
    public func resume() { worker.resume() }
}

// SPDX-License-Identifier: Apache-2.0

public import Linux
public import Virtio

/// The rate limit of an ``EntropyDevice``: a number of bytes in each period.
public struct EntropyLimit: Sendable, Equatable {
    /// The number of bytes, at least 1.
    public var bytes: UInt64
    /// Milliseconds, from 1 on.
    public var period: Int

    public init(bytes: UInt64, period: Int) { (self.bytes, self.period) = (bytes, period) }
}

/// A virtio entropy device (virtio 1.2 §5.4): one queue, whose buffers are filled from the host's generator by
/// getrandom(2).
///
/// That generator is what every source of the host feeds, it does not run dry, and it is the one that the host trusts
/// itself; a source of one's own choice could only be worse.
public final class EntropyDevice: VirtioDevice {
    public let name: String
    public let deviceID: UInt32 = 4
    public let features: FeatureSet = []
    public let maximumQueueSizes: [UInt16] = [64]
    public let configuration = ConfigurationSpace([])
    public let deviceEvents: DeviceEvents

    private let worker: DeviceWorker

    /// Creates the device; ``start()`` starts its I/O thread.
    /// - Parameters:
    ///   - name: of the device and its I/O thread: `rng0`.
    ///   - limit: nil for none.
    ///   - events: receives events for the log.
    public init(name: String, limit: EntropyLimit? = nil, events: DeviceEvents = .none) throws(SystemCallError) {
        self.name = name
        self.deviceEvents = events
        let engine = try EntropyEngine(queueSize: maximumQueueSizes[0], limit: limit, events: events)
        worker = try DeviceWorker(name: name, engine: engine, events: events)
    }

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

// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
public import Linux

/// The values that a device gets at DRIVER_OK, from which its I/O thread creates its queues.
public struct Activation: Sendable {
    /// The negotiated features.
    public let features: FeatureSet
    /// One for each queue of the device; a driver need not make all of them ready.
    public let queues: [QueueConfiguration]
    /// Guest RAM; an activation keeps it mapped.
    public let memory: GuestMemory
    public let interrupts: DeviceInterrupts
    /// One for each queue.
    public let doorbells: [Doorbell]
    public let counters: DeviceCounters

    public var ram: GuestRAM { memory.ram }

    /// The device's side of a queue, or nil when the driver has not made it ready.
    public func makeQueue(_ index: Int) throws(VirtqueueError) -> Virtqueue? {
        guard queues.indices.contains(index), queues[index].isReady else { return nil }
        return try Virtqueue(queues[index], features: features, ram: ram)
    }

    /// The part of one queue, for a device with an I/O thread for each: the others are not ready.
    public func only(queue index: Int) -> Activation { only(queues: [index]) }

    /// The part of some queues: the others are not ready.
    public func only(queues wanted: [Int]) -> Activation {
        let queues = queues.map {
            wanted.contains($0.index) ? $0 : QueueConfiguration(index: $0.index, maximumSize: $0.maximumSize)
        }
        return Activation(
            features: features, queues: queues, memory: memory, interrupts: interrupts, doorbells: doorbells,
            counters: counters)
    }
}

/// A device as its ``VirtioFunction`` sees it. Methods are called on vCPU threads, one at a time, under the function's
/// lock.
///
/// A device has an I/O thread, usually a ``DeviceWorker``, that alone touches the queues from ``activate(_:)`` to
/// ``reset()``. It reports a driver that breaks the rules by ``ConfigurationInterrupt/markNeedsReset()``.
public protocol VirtioDevice: AnyObject, Sendable {
    /// For threads, logs and the status line: `blk0`.
    var name: String { get }
    /// The device type (virtio 1.2 §5): 1 network, 2 block, …
    var deviceID: UInt32 { get }
    /// Features of the device's type; those of every device are added to them.
    var features: FeatureSet { get }
    /// The largest size of each queue, a power of two up to 32,768; as many as the device has queues.
    var maximumQueueSizes: [UInt16] { get }
    var configuration: ConfigurationSpace { get }
    /// What the device reports to the host's log.
    var deviceEvents: DeviceEvents { get }

    /// Starts the device's threads. What they need of the host is there before.
    /// - Parameter first: what each of them does before anything else.
    func start(first: @escaping @Sendable () -> Void) throws(SystemCallError)

    /// Indicates whether the device works with these features, a subset of those offered. Refusing leaves FEATURES_OK
    /// unset.
    func accepts(_ features: FeatureSet) -> Bool
    /// FEATURES_OK is set: what the driver has negotiated, until ``reset()``, also for what comes before
    /// ``activate(_:)``.
    func negotiated(_ features: FeatureSet)
    /// A write of 1, 2, 4 or 8 bytes to the configuration space, at any time and on any vCPU thread; by default without
    /// effect.
    func writeConfiguration(_ value: UInt64, at offset: Int, size: Int)

    /// Begins to work on the queues. Kicks that came before are still in the doorbells.
    func activate(_ activation: Activation)
    /// Ends all work; returns when no request is in flight and guest RAM is not touched any more. Harmless when not
    /// active.
    func reset()
    /// The same for one queue (QueueReset, or QueueReady written 0).
    func stopQueue(_ index: Int)
    /// A queue that was stopped has been set up again; called only while active.
    func startQueue(_ configuration: QueueConfiguration)

    /// Begins a pause: the device takes nothing more from its queues and its back-end. Called by the machine when no
    /// vCPU runs; returns immediately.
    /// - Parameter onQuiet: called once, on any thread, when what was in flight has ended; also when a reset has ended
    ///   the pause before.
    func pause(onQuiet: @escaping @Sendable () -> Void)
    /// Ends a pause, as a reset does. Harmless when there is none.
    func resume()
}

extension VirtioDevice {
    /// Starts the device's threads, which begin with their work.
    public func start() throws(SystemCallError) { try start(first: {}) }

    public var deviceEvents: DeviceEvents { .none }
    public func accepts(_ features: FeatureSet) -> Bool { true }
    public func negotiated(_ features: FeatureSet) {}
    public func writeConfiguration(_ value: UInt64, at offset: Int, size: Int) {}
}

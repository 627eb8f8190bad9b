// SPDX-License-Identifier: Apache-2.0

public import GuestMemory

/// The device's side of a virtqueue, split or packed (virtio 1.2 §2.6 to §2.8).
///
/// It belongs to the device's I/O thread, which makes it when the queue starts and drops it when the queue stops.
/// Nothing here allocates, locks or waits. The device's way:
///
///     repeat {
///         queue.disableNotifications()
///         while let chain = try queue.pop(into: list) { … queue.push(chain.head, written: n) }
///         if queue.publish() { interrupt.signal() }
///     } while queue.enableNotifications()
public struct Virtqueue: ~Copyable, Sendable {
    /// The queue's number within its device.
    public let index: Int
    /// Descriptors in the queue; a power of two in a split virtqueue.
    public let size: UInt16
    /// Chains that were popped and not pushed yet.
    public private(set) var inFlight: UInt16 = 0

    // One of the two, as negotiated.
    private var split: SplitRing?
    private var packed: PackedRing?

    /// - Parameter features: what was negotiated; ``FeatureSet/packedRing``, ``FeatureSet/eventIndex`` and
    ///   ``FeatureSet/indirectDescriptors`` count.
    /// - Throws: what is wrong with the size or the rings' places.
    public init(_ configuration: QueueConfiguration, features: FeatureSet, ram: GuestRAM) throws(VirtqueueError) {
        let rings = try configuration.rings(features, in: ram)
        index = configuration.index
        size = UInt16(truncatingIfNeeded: configuration.size)
        if features.contains(.packedRing) {
            packed = PackedRing(rings, size: size, features: features, ram: ram)
        } else {
            split = SplitRing(rings, size: size, features: features, ram: ram)
        }
    }

    // MARK: Taking requests

    /// Takes the next chain that the driver has made available.
    /// - Parameters:
    ///   - list: gets the chain's buffers; room for ``size`` of them is always enough.
    ///   - first: the entry of the list to begin with.
    /// - Returns: nil when there is none.
    /// - Throws: the rule that the driver broke; the device needs a reset then.
    public mutating func pop(into list: IOVectorList, from first: Int = 0) throws(VirtqueueError) -> DescriptorChain? {
        let chain: DescriptorChain?
        if packed == nil {
            chain = try split?.pop(into: list, from: first, inFlight: inFlight)
        } else {
            chain = try packed?.pop(into: list, from: first)
        }
        if chain != nil { inFlight &+= 1 }
        return chain
    }

    /// Indicates whether a chain is available.
    public mutating func hasAvailable() throws(VirtqueueError) -> Bool {
        if let isAvailable = packed?.isAvailable { return isAvailable }
        return try split?.hasAvailable() ?? false
    }

    /// Undoes the last pops: the next pop returns the first of these chains again.
    ///
    /// For a network device that finds no packet for the buffers it holds. The chains must not have been pushed.
    public mutating func rewind(_ chains: UInt16 = 1) {
        let count = min(chains, inFlight)
        split?.rewind(count)
        packed?.rewind(count)
        inFlight &-= count
    }

    // MARK: Returning them

    /// Puts a chain on the used ring; the driver sees it after ``publish()``.
    /// - Parameters:
    ///   - head: ``DescriptorChain/head``.
    ///   - written: bytes from the start of the writable buffers that the device has written.
    public mutating func push(_ head: UInt16, written: UInt32) {
        split?.push(head, written: written)
        packed?.push(head, written: written)
        if inFlight > 0 { inFlight &-= 1 }
    }

    /// Publishes all pushed chains to the driver together.
    /// - Returns: whether the driver wants an interrupt for it.
    public mutating func publish() -> Bool { split?.publish() ?? packed?.publish() ?? false }

    /// Indicates whether the driver has taken all that was published without an interrupt, as one does that polls the
    /// ring. Known only with ``FeatureSet/eventIndex``.
    public var hasDriverSeenAll: Bool { split?.hasDriverSeenAll ?? packed?.hasDriverSeenAll ?? false }

    // MARK: Kicks

    /// Disables kicks while the device polls the ring anyway (a hint to the driver).
    public mutating func disableNotifications() {
        split?.disableNotifications()
        packed?.disableNotifications()
    }

    /// Asks for a kick when the next chain comes.
    /// - Returns: true when one has come meanwhile, for which no kick may follow: the device must look again.
    ///   An available index that makes no sense counts as one, so that the next ``pop(into:from:)`` reports it.
    public mutating func enableNotifications() -> Bool {
        split?.enableNotifications() ?? packed?.enableNotifications() ?? false
    }
}

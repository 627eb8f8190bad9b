// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import GuestMemory

/// The device's side of a split virtqueue (virtio 1.2 §2.7).
///
/// It belongs to the device's I/O thread, which makes it when the queue starts and drops it when the queue stops.
/// Nothing here allocates, locks or waits. The device's way:
///
///     repeat {
///         queue.disableNotifications()
///         while let chain = try queue.pop(into: list) { … queue.push(chain.head, written: n) }
///         if queue.publish() { interrupt.signal() }
///     } while queue.enableNotifications()
///
/// Indices run modulo 2^16 and are compared by wrapping differences only.
public struct Virtqueue: ~Copyable, Sendable {
    /// The queue's number within its device.
    public let index: Int
    /// Descriptors in the queue, a power of two.
    public let size: UInt16
    /// Chains that were popped and not pushed yet.
    public private(set) var inFlight: UInt16 = 0

    private let walk: ChainWalk
    private let available: GuestSlice
    private let used: GuestSlice
    private let eventIndex: Bool

    /// The next entry of the available ring to be taken.
    private var nextAvailable: UInt16 = 0
    /// The driver's `avail.idx` as last read: entries before it can be taken without looking again.
    private var knownAvailable: UInt16 = 0
    /// The next entry of the used ring to be filled.
    private var nextUsed: UInt16 = 0
    /// `used.idx` as the driver sees it, and so where the last decision about an interrupt was made.
    private var publishedUsed: UInt16 = 0

    /// - Parameter features: what was negotiated; ``FeatureSet/eventIndex`` and ``FeatureSet/indirectDescriptors``
    ///   count.
    /// - Throws: what is wrong with the size or the rings' places.
    public init(_ configuration: QueueConfiguration, features: FeatureSet, ram: GuestRAM) throws(VirtqueueError) {
        let rings = try configuration.rings(in: ram)
        index = configuration.index
        size = UInt16(truncatingIfNeeded: configuration.size)
        available = rings.available
        used = rings.used
        eventIndex = features.contains(.eventIndex)
        walk = ChainWalk(
            ram: ram, table: rings.descriptors, size: size, allowsIndirect: features.contains(.indirectDescriptors))
        // With EVENT_IDX the flags are 0 from here on (§2.7.10.1), whatever the driver has left there; without, until
        // they are needed.
        used.store16(0, RingOffset.flags)
    }

    // MARK: Taking requests

    /// Takes the next chain that the driver has made available.
    /// - Parameters:
    ///   - list: gets the chain's buffers; room for ``size`` of them is always enough.
    ///   - first: the entry of the list to begin with.
    /// - Returns: nil when there is none.
    /// - Throws: the rule that the driver broke; the device needs a reset then.
    public mutating func pop(into list: IOVectorList, from first: Int = 0) throws(VirtqueueError) -> DescriptorChain? {
        guard try hasAvailable() else { return nil }
        guard inFlight < size else { throw .tooManyInFlight(size: size) }
        let head = available.load16(4 &+ 2 &* Int(nextAvailable & (size &- 1)))
        guard head < size else { throw .headOutOfRange(head, size: size) }
        let chain = try walk.chain(at: head, into: list, from: first)
        nextAvailable &+= 1
        inFlight &+= 1
        return chain
    }

    /// Indicates whether a chain is available.
    public mutating func hasAvailable() throws(VirtqueueError) -> Bool {
        if nextAvailable != knownAvailable { return true }
        // Acquire: the entries and descriptors are read after the index that announces them.
        let index = available.loadAcquire16(RingOffset.index)
        guard index &- nextAvailable <= size else {
            throw .availableIndexJumped(from: nextAvailable, to: index, size: size)
        }
        knownAvailable = index
        return index != nextAvailable
    }

    /// Undoes the last pops: the next pop returns the first of these chains again.
    ///
    /// For a network device that finds no packet for the buffers it holds. The chains must not have been pushed.
    public mutating func rewind(_ chains: UInt16 = 1) {
        let count = min(chains, inFlight)
        nextAvailable &-= count
        inFlight &-= count
    }

    // MARK: Returning them

    /// Puts a chain on the used ring; the driver sees it after ``publish()``.
    /// - Parameters:
    ///   - head: ``DescriptorChain/head``.
    ///   - written: bytes from the start of the writable buffers that the device has written.
    public mutating func push(_ head: UInt16, written: UInt32) {
        let entry = 4 &+ 8 &* Int(nextUsed & (size &- 1))
        used.store32(UInt32(head), entry)
        used.store32(written, entry &+ 4)
        nextUsed &+= 1
        if inFlight > 0 { inFlight &-= 1 }
    }

    /// Publishes all pushed chains to the driver together.
    /// - Returns: whether the driver wants an interrupt for it (§2.7.7.1, §2.7.10).
    public mutating func publish() -> Bool {
        let before = publishedUsed
        guard nextUsed != before else { return false }
        used.storeRelease16(nextUsed, RingOffset.index)
        publishedUsed = nextUsed
        // The index must be visible before the driver's notification suppression is read: it writes its suppression,
        // then checks the index.
        clinux_full_fence()
        if eventIndex {
            let event = available.load16(4 &+ 2 &* Int(size))
            // Whether `event` is one of the entries before … nextUsed − 1.
            return nextUsed &- event &- 1 < nextUsed &- before
        }
        return available.load16(RingOffset.flags) & RingFlag.noInterrupt == 0
    }

    // MARK: Kicks

    /// Says that no kick is needed while the device looks at the ring anyway (a hint to the driver).
    ///
    /// With VIRTIO_F_EVENT_IDX there is nothing to do, and nothing that may be done (§2.7.10.1): the driver kicks when
    /// it passes the index last named.
    public mutating func disableNotifications() {
        if !eventIndex { used.store16(RingFlag.noNotify, RingOffset.flags) }
    }

    /// Asks for a kick when the next chain comes.
    /// - Returns: true when one has come meanwhile, for which no kick may follow: the device must look again.
    ///   An available index that makes no sense counts as one, so that the next ``pop(into:from:)`` reports it.
    public mutating func enableNotifications() -> Bool {
        if eventIndex {
            used.store16(nextAvailable, 4 &+ 8 &* Int(size))
        } else {
            used.store16(0, RingOffset.flags)
        }
        // The suppression must be visible before the index is read: the driver writes the index, then reads the
        // suppression.
        clinux_full_fence()
        return available.loadAcquire16(RingOffset.index) != nextAvailable
    }

    private enum RingOffset {
        static let flags = 0
        static let index = 2
    }

    private enum RingFlag {
        /// VIRTQ_AVAIL_F_NO_INTERRUPT
        static let noInterrupt: UInt16 = 1
        /// VIRTQ_USED_F_NO_NOTIFY
        static let noNotify: UInt16 = 1
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory

/// The rings of a split virtqueue (virtio 1.2 §2.7): what ``Virtqueue`` does if VIRTIO_F_RING_PACKED was not
/// negotiated.
///
/// Indices run modulo 2^16 and are compared by wrapping differences only.
struct SplitRing: Sendable {
    private let size: UInt16
    private let walk: SplitChainWalk
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

    init(_ rings: QueueConfiguration.Rings, size: UInt16, features: FeatureSet, ram: GuestRAM) {
        self.size = size
        available = rings.driverArea
        used = rings.deviceArea
        eventIndex = features.contains(.eventIndex)
        walk = SplitChainWalk(
            ram: ram, table: rings.descriptors, size: size, allowsIndirect: features.contains(.indirectDescriptors))
        // With EVENT_IDX the flags are 0 from here on (§2.7.10.1), whatever the driver has left there; without, until
        // they are needed.
        used.store16(0, RingOffset.flags)
    }

    // MARK: Taking requests

    /// - Parameter inFlight: chains that were popped and not pushed yet.
    mutating func pop(
        into list: IOVectorList, from first: Int, inFlight: UInt16
    ) throws(VirtqueueError) -> DescriptorChain? {
        guard try hasAvailable() else { return nil }
        guard inFlight < size else { throw .tooManyInFlight(size: size) }
        let head = available.load16(4 &+ 2 &* Int(nextAvailable & (size &- 1)))
        guard head < size else { throw .headOutOfRange(head, size: size) }
        let chain = try walk.chain(at: head, into: list, from: first)
        nextAvailable &+= 1
        return chain
    }

    mutating func hasAvailable() throws(VirtqueueError) -> Bool {
        if nextAvailable != knownAvailable { return true }
        // Acquire: the entries and descriptors are read after the index that announces them.
        let index = available.loadAcquire16(RingOffset.index)
        guard index &- nextAvailable <= size else {
            throw .availableIndexJumped(from: nextAvailable, to: index, size: size)
        }
        knownAvailable = index
        return index != nextAvailable
    }

    mutating func rewind(_ chains: UInt16) { nextAvailable &-= chains }

    // MARK: Returning them

    mutating func push(_ head: UInt16, written: UInt32) {
        let entry = 4 &+ 8 &* Int(nextUsed & (size &- 1))
        used.store32(UInt32(head), entry)
        used.store32(written, entry &+ 4)
        nextUsed &+= 1
    }

    /// §2.7.7.1, §2.7.10.
    mutating func publish() -> Bool {
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

    /// The index that the driver named as it last looked (§2.7.10.1) is that of the next entry, or one behind it.
    var hasDriverSeenAll: Bool {
        eventIndex && available.load16(4 &+ 2 &* Int(size)) &- publishedUsed < 0x8000
    }

    // MARK: Kicks

    /// With VIRTIO_F_EVENT_IDX there is nothing to do, and nothing that may be done (§2.7.10.1): the driver kicks when
    /// it passes the index last named.
    mutating func disableNotifications() {
        if !eventIndex { used.store16(RingFlag.noNotify, RingOffset.flags) }
    }

    mutating func enableNotifications() -> Bool {
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

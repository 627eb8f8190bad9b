// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import GuestMemory

/// The ring of a packed virtqueue (virtio 1.2 §2.8): what ``Virtqueue`` does if VIRTIO_F_RING_PACKED was negotiated.
///
/// Driver and device write the same descriptors. The driver makes one available, and the device marks it used, by the
/// flags AVAIL and USED, whose meaning changes each time that a side reaches the end of the ring (the wrap counters).
///
/// Chains may be returned in any order. The device writes one descriptor for each chain, at the next place of its own,
/// and skips as many as the chain had. So the queue keeps the ID and the length of each chain in flight.
struct PackedRing: Sendable {
    private let size: UInt16
    private let walk: PackedChainWalk
    private let ring: GuestSlice
    private let driverEvents: GuestSlice
    private let deviceEvents: GuestSlice
    private let eventIndex: Bool

    /// The next descriptor that the driver makes available.
    private var nextAvailable: Position
    /// The next descriptor to be marked as used.
    private var nextUsed: Position
    /// The first used descriptor that the driver cannot see yet, and so where the last decision about an interrupt was
    /// made; ``nextUsed`` if there is none.
    private var published: Position
    /// The flags of the descriptor at ``published``. They are written last, since the driver reads the ring in order.
    private var withheldFlags: UInt16 = 0

    /// A chain in flight, or an unused place.
    private struct InFlight: BitwiseCopyable {
        var id: UInt16 = 0
        /// Descriptors in the ring; 0 if the place is unused.
        var length: UInt16 = 0
        /// The place of the chain that was popped before, or the next unused place.
        var link: UInt16
    }

    /// Chains in flight by ``DescriptorChain/head``. A buffer ID will not do: it may be any number of 16 bits.
    private var chains: [InFlight]
    private var firstUnused: UInt16 = 0
    /// The place of the chain that was popped last.
    private var lastPopped: UInt16 = 0
    /// Descriptors of all chains in flight.
    private var descriptorsInFlight: UInt16 = 0

    init(_ rings: QueueConfiguration.Rings, size: UInt16, features: FeatureSet, ram: GuestRAM) {
        self.size = size
        ring = rings.descriptors
        driverEvents = rings.driverArea
        deviceEvents = rings.deviceArea
        eventIndex = features.contains(.eventIndex)
        walk = PackedChainWalk(
            ram: ram, ring: rings.descriptors, size: size, allowsIndirect: features.contains(.indirectDescriptors))
        nextAvailable = Position(size: size)
        nextUsed = nextAvailable
        published = nextAvailable
        // The last link leads nowhere: it is followed only if more chains were in flight than there are descriptors.
        chains = (0..<size).map { InFlight(link: $0 &+ 1) }
        deviceEvents.store32(0, 0)
    }

    // MARK: Taking requests

    mutating func pop(into list: IOVectorList, from first: Int) throws(VirtqueueError) -> DescriptorChain? {
        guard isAvailable else { return nil }
        // Only a driver that makes descriptors available again before they are used gets there.
        guard descriptorsInFlight < size else { throw .tooManyInFlight(size: size) }
        let head = firstUnused
        let (chain, place) = try walk.chain(at: nextAvailable.index, as: head, into: list, from: first)
        guard place.length <= size &- descriptorsInFlight else { throw .tooManyInFlight(size: size) }

        firstUnused = chains[Int(head)].link
        chains[Int(head)] = InFlight(id: place.id, length: place.length, link: lastPopped)
        lastPopped = head
        descriptorsInFlight &+= place.length
        nextAvailable.advance(by: place.length)
        return chain
    }

    /// Indicates whether the driver has made the next descriptor available (§2.8.1).
    ///
    /// Acquire: the rest of the chain is read after the flags that announce it.
    var isAvailable: Bool {
        let flags = ring.loadAcquire16(nextAvailable.offset &+ DescriptorField.flags)
        return flags & Position.bothFlags == (nextAvailable.wrapCounter ? Position.available : Position.used)
    }

    mutating func rewind(_ count: UInt16) {
        for _ in 0..<count {
            let head = lastPopped, chain = chains[Int(head)]
            guard chain.length > 0 else { return }
            nextAvailable.retreat(by: chain.length)
            lastPopped = chain.link
            release(head)
        }
    }

    /// Takes a chain out of those in flight.
    private mutating func release(_ head: UInt16) {
        descriptorsInFlight &-= chains[Int(head)].length
        chains[Int(head)] = InFlight(link: firstUnused)
        firstUnused = head
    }

    // MARK: Returning them

    /// Writes a used descriptor (§2.8.4, §2.8.7). The driver ignores the length without the flag WRITE.
    mutating func push(_ head: UInt16, written: UInt32) {
        let chain = chains[Int(head)]
        guard chain.length > 0 else { return }
        let flags = (nextUsed.wrapCounter ? Position.bothFlags : 0) | (written > 0 ? DescriptorField.write : 0)
        ring.store32(written, nextUsed.offset &+ DescriptorField.length)
        ring.store16(chain.id, nextUsed.offset &+ DescriptorField.id)
        if nextUsed == published {
            withheldFlags = flags
        } else {
            ring.store16(flags, nextUsed.offset &+ DescriptorField.flags)
        }
        nextUsed.advance(by: chain.length)
        release(head)
    }

    /// §2.8.10, §2.8.14.
    mutating func publish() -> Bool {
        let before = published
        guard nextUsed != before else { return false }
        // Release: the other fields and descriptors are visible before the flags that announce them.
        ring.storeRelease16(withheldFlags, before.offset &+ DescriptorField.flags)
        published = nextUsed
        // The flags must be visible before the driver's notification suppression is read: it writes its suppression,
        // then checks the flags.
        clinux_full_fence()
        let event = driverEvents.load32(0)
        switch UInt16(truncatingIfNeeded: event >> 16) & EventFlags.mask {
        case EventFlags.disable: return false
        case EventFlags.descriptor where eventIndex:
            // A place beyond the ring, which no rule-abiding driver names, gets its interrupt.
            guard let wanted = before.position(event: UInt16(truncatingIfNeeded: event)) else { return true }
            return before.distance(to: wanted) < before.distance(to: nextUsed)
        default: return true
        }
    }

    /// The place that the driver named as it last looked (§2.8.14) is the next one, or one behind it.
    var hasDriverSeenAll: Bool {
        let event = driverEvents.load32(0)
        guard eventIndex, UInt16(truncatingIfNeeded: event >> 16) & EventFlags.mask == EventFlags.descriptor,
            let place = published.position(event: UInt16(truncatingIfNeeded: event))
        else { return false }
        return published.distance(to: place) < UInt32(size)
    }

    // MARK: Kicks

    /// With VIRTIO_F_EVENT_IDX the driver kicks when it passes the place last named, so there is no need to touch the
    /// area that it reads.
    mutating func disableNotifications() {
        if !eventIndex { deviceEvents.store32(UInt32(EventFlags.disable) << 16, 0) }
    }

    mutating func enableNotifications() -> Bool {
        // Place and flags in one store, since they belong together.
        deviceEvents.store32(
            eventIndex ? UInt32(EventFlags.descriptor) << 16 | UInt32(nextAvailable.event) : 0, 0)
        // The suppression must be visible before the flags are read: the driver writes the flags, then reads the
        // suppression.
        clinux_full_fence()
        return isAvailable
    }

    /// A place in the ring together with the wrap counter: places of two laps, the first of which has the counter 1.
    private struct Position: Equatable, BitwiseCopyable {
        private let size: UInt32
        /// From 0 to 2 · size − 1.
        private var value: UInt32 = 0

        /// VIRTQ_DESC_F_AVAIL
        static let available: UInt16 = 1 << 7
        /// VIRTQ_DESC_F_USED
        static let used: UInt16 = 1 << 15
        static let bothFlags = available | used

        /// The start of a ring: place 0 with the wrap counter 1 (§2.8.1).
        init(size: UInt16) { self.size = UInt32(size) }

        var wrapCounter: Bool { value < size }
        var index: UInt16 { UInt16(truncatingIfNeeded: wrapCounter ? value : value &- size) }
        /// The descriptor's offset in the ring.
        var offset: Int { Int(index) &* 16 }
        /// The place as the event suppression structures have it: the index, and the wrap counter as bit 15 (§2.8.14).
        var event: UInt16 { index | (wrapCounter ? 0x8000 : 0) }

        /// The place that an event suppression structure names; nil if there is no such place.
        func position(event: UInt16) -> Position? {
            let index = UInt32(event & 0x7fff)
            guard index < size else { return nil }
            var position = self
            position.value = event & 0x8000 != 0 ? index : index &+ size
            return position
        }

        /// - Parameter count: at most the size.
        mutating func advance(by count: UInt16) {
            value &+= UInt32(count)
            if value >= 2 &* size { value &-= 2 &* size }
        }

        /// - Parameter count: at most the size.
        mutating func retreat(by count: UInt16) {
            if value < UInt32(count) { value &+= 2 &* size }
            value &-= UInt32(count)
        }

        /// Places from this one forward to another.
        func distance(to other: Position) -> UInt32 {
            other.value >= value ? other.value &- value : other.value &+ 2 &* size &- value
        }
    }

    /// A descriptor's fields (§2.8.13).
    private enum DescriptorField {
        static let length = 8
        static let id = 12
        static let flags = 14
        /// VIRTQ_DESC_F_WRITE
        static let write: UInt16 = 2
    }

    /// Of an event suppression structure (§2.8.14): RING_EVENT_FLAGS_DISABLE and _DESC; 0 is _ENABLE, 3 is reserved.
    private enum EventFlags {
        static let disable: UInt16 = 1
        static let descriptor: UInt16 = 2
        static let mask: UInt16 = 3
    }
}

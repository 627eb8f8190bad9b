// SPDX-License-Identifier: Apache-2.0

public import GuestMemory

/// The register values that a driver wrote for one queue, not yet validated.
public struct QueueConfiguration: Equatable, Sendable, BitwiseCopyable {
    /// The queue's number within its device.
    public let index: Int
    /// The largest size that the device supports; 0 if there is no such queue.
    public let maximumSize: UInt16
    /// Descriptors in the queue.
    public var size: UInt32
    /// The descriptor area (virtio 1.2 §2.7.5, §2.8).
    public var descriptorTable = GuestAddress(0)
    /// The driver area (§2.7.6, §2.8.10).
    public var availableRing = GuestAddress(0)
    /// The device area (§2.7.8, §2.8.10).
    public var usedRing = GuestAddress(0)
    /// Indicates whether the driver has enabled the queue.
    public var isReady = false

    /// A queue after reset.
    public init(index: Int, maximumSize: UInt16) {
        self.index = index
        self.maximumSize = maximumSize
        size = UInt32(maximumSize)
    }

    /// The queue's three parts as ranges of RAM.
    struct Rings: BitwiseCopyable {
        /// The descriptor table, or the descriptor ring of a packed virtqueue.
        let descriptors: GuestSlice
        /// The available ring, or the driver event suppression structure of a packed virtqueue.
        let driverArea: GuestSlice
        /// The used ring, or the device event suppression structure of a packed virtqueue.
        let deviceArea: GuestSlice
    }

    /// Checks size, alignment and place of the rings (virtio 1.2 §2.7, §2.8.10.1).
    ///
    /// Both rings of a split virtqueue are taken with the two bytes of `used_event` and `avail_event` at their ends,
    /// which belong to their layout whether or not VIRTIO_F_EVENT_IDX was negotiated.
    /// - Parameter features: what was negotiated; ``FeatureSet/packedRing`` counts.
    func rings(_ features: FeatureSet, in ram: GuestRAM) throws(VirtqueueError) -> Rings {
        let isPacked = features.contains(.packedRing)
        guard size >= 1, size <= maximumSize, isPacked || size.nonzeroBitCount == 1 else {
            throw .invalidSize(size, maximum: maximumSize)
        }
        func ring(
            _ part: VirtqueueError.RingPart, _ address: GuestAddress, _ count: UInt64, _ alignment: UInt64
        ) throws(VirtqueueError) -> GuestSlice {
            guard address.isAligned(to: alignment) else { throw .ringMisaligned(part, address, alignment: alignment) }
            guard let slice = ram.slice(at: address, count: count) else {
                throw .ringOutsideRAM(part, address, count: count)
            }
            return slice
        }
        let entries = UInt64(size)
        if isPacked {
            return Rings(
                descriptors: try ring(.descriptorRing, descriptorTable, 16 * entries, 16),
                driverArea: try ring(.driverEvents, availableRing, 4, 4),
                deviceArea: try ring(.deviceEvents, usedRing, 4, 4))
        }
        return Rings(
            descriptors: try ring(.descriptorTable, descriptorTable, 16 * entries, 16),
            driverArea: try ring(.availableRing, availableRing, 6 + 2 * entries, 2),
            deviceArea: try ring(.usedRing, usedRing, 6 + 8 * entries, 4))
    }

    /// Throws what is wrong with the queue, if anything is.
    public func validate(_ features: FeatureSet, in ram: GuestRAM) throws(VirtqueueError) {
        _ = try rings(features, in: ram)
    }
}

// SPDX-License-Identifier: Apache-2.0

/// Feature bits of a device, bit n of the specification being bit n here (virtio 1.2 §2.2).
///
/// There are 128, as virtio 1.4 has features beyond bit 63. A transport shows them in words of 32 bits.
public struct FeatureSet: OptionSet, Sendable, BitwiseCopyable, CustomStringConvertible {
    public let rawValue: UInt128

    public init(rawValue: UInt128) { self.rawValue = rawValue }
    /// The set of one feature, by its number from 0 to 127.
    public init(bit: Int) { rawValue = 1 << UInt128(bit) }

    /// How many words there are.
    public static let words: UInt32 = 4

    /// Bits 32 · `word` to 32 · `word` + 31; 0 for a word that does not exist.
    public subscript(word word: UInt32) -> UInt32 {
        guard word < Self.words else { return 0 }
        return UInt32(truncatingIfNeeded: rawValue >> UInt128(32 * word))
    }

    /// The set with one word replaced; the same for a word that does not exist.
    public func replacing(word: UInt32, with bits: UInt32) -> FeatureSet {
        guard word < Self.words else { return self }
        let mask = UInt128(UInt32.max) << UInt128(32 * word)
        return FeatureSet(rawValue: rawValue & ~mask | UInt128(bits) << UInt128(32 * word))
    }

    /// VIRTIO_F_INDIRECT_DESC: a descriptor may refer to a table of descriptors (§2.7.5.3).
    public static let indirectDescriptors = FeatureSet(bit: 28)
    /// VIRTIO_F_EVENT_IDX: each side names the index at which it wants to be notified (§2.7.7, §2.7.10).
    public static let eventIndex = FeatureSet(bit: 29)
    /// VIRTIO_F_VERSION_1: not a legacy device; without it nothing works here (§6.1).
    public static let version1 = FeatureSet(bit: 32)
    /// VIRTIO_F_RING_PACKED: the queues are packed virtqueues (§2.8).
    public static let packedRing = FeatureSet(bit: 34)
    /// VIRTIO_F_RING_RESET: a single queue can be reset (§2.6.1).
    public static let ringReset = FeatureSet(bit: 40)

    /// The features that the transport and the queues of this module offer for every device.
    public static let transport: FeatureSet = [.indirectDescriptors, .eventIndex, .version1, .ringReset]

    public var description: String { "0x" + String(rawValue, radix: 16) }
}

/// The kind of queues that devices offer. A driver may decline packed ones.
public enum VirtqueueFormat: String, Sendable, CaseIterable {
    /// A descriptor table and two rings (virtio 1.2 §2.7).
    case split
    /// One ring that driver and device write (§2.8).
    case packed

    var features: FeatureSet { self == .packed ? .packedRing : [] }
}

/// The device status field (virtio 1.2 §2.1).
public struct DeviceStatus: OptionSet, Sendable, BitwiseCopyable {
    public let rawValue: UInt32

    public init(rawValue: UInt32) { self.rawValue = rawValue }

    public static let acknowledge = DeviceStatus(rawValue: 1)
    public static let driver = DeviceStatus(rawValue: 2)
    public static let driverOK = DeviceStatus(rawValue: 4)
    public static let featuresOK = DeviceStatus(rawValue: 8)
    public static let needsReset = DeviceStatus(rawValue: 64)
    public static let failed = DeviceStatus(rawValue: 128)
}

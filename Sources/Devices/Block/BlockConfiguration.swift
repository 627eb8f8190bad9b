// SPDX-License-Identifier: Apache-2.0

internal import Virtio

/// The configuration space of a block device (virtio 1.2 §5.2.4), and the figures in it.
struct BlockConfiguration {
    /// Bytes of the disk, a multiple of 512.
    let capacity: UInt64
    /// Descriptors of a request besides header and status.
    let maximumSegments: UInt32
    /// Bytes that a host file likes to be read and written in, or nil when any size is as good.
    let optimalSize: UInt64?
    /// Queues, at least 1.
    let queueCount: Int

    static let logicalBlockSize: UInt32 = 512
    /// The host's pages and most disks have 4 KiB: 2^3 logical blocks.
    static let physicalBlockExponent: UInt8 = 3
    /// Bytes of one segment. The device takes more in one, as long as the request has no more than all segments
    /// together; this keeps single operations within what a host does in one go.
    static let maximumSegmentSize: UInt32 = 4 << 20
    static let maximumRanges: UInt32 = 64
    /// 1 GiB in a range of a DISCARD, in sectors.
    static let maximumDiscardSectors: UInt32 = 1 << 21
    /// 128 MiB in a range of a WRITE_ZEROES, which may have to be written.
    static let maximumWriteZeroesSectors: UInt32 = 1 << 18
    /// Where the driver may switch the write cache off and on.
    static let writebackOffset = 32

    /// Bytes of data in a request that keeps to what is announced; requests with more are refused.
    var largestTransfer: UInt64 { UInt64(Self.maximumSegmentSize) * UInt64(maximumSegments) }

    /// Puts another capacity into the fields.
    static func setCapacity(_ capacity: UInt64, in bytes: inout [UInt8]) {
        for index in 0..<8 { bytes[index] = UInt8(truncatingIfNeeded: (capacity / 512) >> UInt64(8 * index)) }
    }

    /// The fields in their order.
    var bytes: [UInt8] {
        var bytes: [UInt8] = []
        func put(_ value: some FixedWidthInteger) {
            for shift in stride(from: 0, to: value.bitWidth, by: 8) {
                bytes.append(UInt8(truncatingIfNeeded: value >> shift))
            }
        }
        let unit = Self.logicalBlockSize
        let pageInBlocks: UInt32 = 1 << UInt32(Self.physicalBlockExponent)
        let optimalInBlocks = UInt32(clamping: (optimalSize ?? 0) / UInt64(unit))
        put(capacity / 512)
        put(Self.maximumSegmentSize)
        put(maximumSegments)
        put(UInt32(0))  // geometry: not offered
        put(unit)
        put(Self.physicalBlockExponent)
        put(UInt8(0))  // alignment offset
        put(UInt16(truncatingIfNeeded: pageInBlocks))  // minimum I/O size
        put(optimalInBlocks)
        put(UInt8(1))  // writeback
        put(UInt8(0))
        put(UInt16(clamping: queueCount))
        put(Self.maximumDiscardSectors)
        put(Self.maximumRanges)
        put(max(pageInBlocks, optimalInBlocks))  // discard alignment
        put(Self.maximumWriteZeroesSectors)
        put(Self.maximumRanges)
        put(UInt32(1))  // WRITE_ZEROES may unmap; 3 bytes unused
        return bytes
    }
}

extension FeatureSet {
    // Feature bits of block devices (virtio 1.2 §5.2.3).
    static let blockSizeMax = FeatureSet(bit: 1)
    static let blockSegmentsMax = FeatureSet(bit: 2)
    static let blockReadOnly = FeatureSet(bit: 5)
    static let blockBlockSize = FeatureSet(bit: 6)
    static let blockFlush = FeatureSet(bit: 9)
    static let blockTopology = FeatureSet(bit: 10)
    static let blockConfigurableWriteback = FeatureSet(bit: 11)
    static let blockMultiqueue = FeatureSet(bit: 12)
    static let blockDiscard = FeatureSet(bit: 13)
    static let blockWriteZeroes = FeatureSet(bit: 14)
}

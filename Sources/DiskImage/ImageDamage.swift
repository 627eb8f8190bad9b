// SPDX-License-Identifier: Apache-2.0

/// Something in an image that cannot be right, met while it was used.
enum ImageDamage: Equatable, Sendable, CustomStringConvertible {
    case l2TableMisaligned(offset: UInt64)
    case l2TableBeyondEnd(offset: UInt64)
    case clusterMisaligned(offset: UInt64)
    case clusterBeyondEnd(offset: UInt64)
    case zeroFlagInVersion2
    case subclusterBothZeroAndAllocated
    case compressedClusterBroken(offset: UInt64)
    case clusterInMetadata(offset: UInt64)
    case tableCountedAsFree(offset: UInt64)
    case clusterMisplaced(offset: UInt64)
    case entryMissing
    case blockTableBeyondEnd(offset: UInt64)
    case blockBeyondEnd(offset: UInt64)
    case blockInMetadata(offset: UInt64)
    case blockState(UInt64)
    case compressedGrainBroken(offset: UInt64)

    /// Indicates whether the image's tables are wrong, and not only what a cluster holds.
    var isOfMetadata: Bool {
        switch self {
        case .compressedClusterBroken, .compressedGrainBroken: false
        default: true
        }
    }

    var description: String {
        switch self {
        case .l2TableMisaligned(let offset): "an L2 table at byte \(offset), which is not cluster-aligned"
        case .l2TableBeyondEnd(let offset): "an L2 table at byte \(offset), beyond the end of the file"
        case .clusterMisaligned(let offset): "a data cluster at byte \(offset), which is not cluster-aligned"
        case .clusterBeyondEnd(let offset): "a data cluster at byte \(offset), beyond the end of the file"
        case .entryMissing: "the end of the file is before that of a table"
        case .zeroFlagInVersion2: "a zero cluster in an image of version 2"
        case .subclusterBothZeroAndAllocated: "a subcluster that is both zero and allocated"
        case .compressedClusterBroken(let offset): "a compressed cluster at byte \(offset) that does not decompress"
        case .clusterInMetadata(let offset): "a data cluster at byte \(offset), which overlaps a table"
        case .blockTableBeyondEnd(let offset): "a table of blocks at byte \(offset), beyond the end of the file"
        case .blockBeyondEnd(let offset): "a block at byte \(offset), beyond the end of the file"
        case .blockInMetadata(let offset): "a block at byte \(offset), which overlaps a table"
        case .blockState(let state): "a block in the state \(state), which is invalid"
        case .compressedGrainBroken(let offset): "a compressed grain at byte \(offset) that does not decompress"
        case .clusterMisplaced(let offset):
            "a data cluster at byte \(offset) of the data file, which is not its offset on the disk"
        case .tableCountedAsFree(let offset): "a table at byte \(offset), whose cluster has a refcount of 0"
        }
    }
}

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
    case clusterInMetadata(offset: UInt64, QCOW2Metadata)
    case countedAsFree(QCOW2Metadata, offset: UInt64)
    case countedBeyondEnd(offset: UInt64)
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
        // They are lost space.
        case .countedBeyondEnd: false
        default: true
        }
    }

    var description: String {
        switch self {
        case .l2TableMisaligned(let offset): "an L2 table at byte \(offset), which is not cluster-aligned"
        case .l2TableBeyondEnd(let offset): "an L2 table at byte \(offset), beyond the end of the file"
        case .clusterMisaligned(let offset): "a data cluster at byte \(offset), which is not cluster-aligned"
        case .clusterBeyondEnd(let offset): "a data cluster at byte \(offset), beyond the end of the file"
        case .entryMissing: "the file ends before this entry"
        case .zeroFlagInVersion2: "a zero cluster in an image of version 2"
        case .subclusterBothZeroAndAllocated: "a subcluster that is both zero and allocated"
        case .compressedClusterBroken(let offset): "a compressed cluster at byte \(offset) that does not decompress"
        case .clusterInMetadata(let offset, let metadata):
            "a data cluster at byte \(offset), which overlaps \(metadata.rawValue)"
        case .blockTableBeyondEnd(let offset): "a table of blocks at byte \(offset), beyond the end of the file"
        case .blockBeyondEnd(let offset): "a block at byte \(offset), beyond the end of the file"
        case .blockInMetadata(let offset): "a block at byte \(offset), which overlaps a table"
        case .blockState(let state): "a block in the state \(state), which is invalid"
        case .compressedGrainBroken(let offset): "a compressed grain at byte \(offset) that does not decompress"
        case .clusterMisplaced(let offset):
            "a data cluster at byte \(offset) of the data file, which is not its offset on the disk"
        case .countedAsFree(let metadata, let offset):
            "\(metadata.rawValue) at byte \(offset), whose cluster has a refcount of 0"
        case .countedBeyondEnd(let offset):
            "clusters from byte \(offset) on, beyond the end of the file, have refcounts"
        }
    }
}

/// What a cluster of a qcow2 image's own metadata has.
enum QCOW2Metadata: String, Sendable {
    case header = "the header"
    case l1Table = "the L1 table"
    case l2Table = "an L2 table"
    case refcountTable = "the refcount table"
    case refcountBlock = "a refcount block"
    /// That of snapshots, or of the encryption.
    case other = "other metadata"
}

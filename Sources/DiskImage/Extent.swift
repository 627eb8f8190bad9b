// SPDX-License-Identifier: Apache-2.0

/// How the start of a range of a disk is stored: the answer of an image's metadata, which does no I/O.
/// Lengths are in bytes, at least 1 and at most what was asked for; what comes after is asked for again.
@safe enum Extent {
    /// Data at this offset of the layer's file.
    case data(offset: UInt64, length: UInt64)
    /// Nowhere: it reads as zeroes.
    case zero(length: UInt64)
    /// Not allocated in this layer: ask the next one of the chain.
    case unallocated(length: UInt64)
    /// Here, until the image is next asked anything.
    case memory(UnsafeRawPointer, length: UInt64)
    /// The answer needs this read first.
    case load(MetadataLoad)
    /// The answer needs a read that is under way.
    case wait
    /// The answer needs room in the caches, which a commit makes.
    case commit
    /// The lookup failed with an errno value.
    case failed(Int32)
}

/// A read that an image needs before it can answer. Who carries it out reports to ``DiskImage/finish(_:bytes:error:)``.
@safe struct MetadataLoad {
    enum Kind { case l2Slice, compressedCluster }

    /// Whose file; filled in by the chain.
    var layer = 0
    let kind: Kind
    /// The slot of the kind's cache that it fills.
    let slot: Int
    let offset: UInt64
    let length: Int
    /// `length` bytes that live as long as the image.
    let buffer: UnsafeMutableRawPointer
    /// The disk offset that was asked for, for the report of a damage.
    let diskOffset: UInt64
    /// Indicates whether it could be decompressed, once ``DiskImage/decompress(_:bytes:)`` has tried that.
    var isIntact: Bool?
}

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
        case .clusterMisplaced(let offset): "a data cluster at byte \(offset) of the data file, which is not its offset on the disk"
        case .tableCountedAsFree(let offset): "a table at byte \(offset), whose cluster has a refcount of 0"
        }
    }
}

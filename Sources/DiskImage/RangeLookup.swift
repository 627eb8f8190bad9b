// SPDX-License-Identifier: Apache-2.0

/// How the start of a range of a disk is stored: the answer of an image's metadata, which does no I/O.
/// Lengths are in bytes, at least 1 and at most what was requested; what comes after is asked for again.
enum RangeLookup {
    /// Data at this offset of the layer's file.
    case data(offset: UInt64, length: UInt64)
    /// Nowhere: it reads as zeroes.
    case zero(length: UInt64)
    /// Not allocated in this layer: ask the next one of the chain.
    case unallocated(length: UInt64)
    /// Here, until the image is next asked anything.
    case memory(IOMemory)
    /// The answer needs this read first.
    case load(MetadataLoad)
    /// The answer needs a read that is under way.
    case wait
    /// The answer needs room in the caches, which a commit makes.
    case commit
    /// The lookup failed with an errno value.
    case failed(Int32)
}

/// A read that an image needs before it can answer. The caller that makes it reports to
/// ``DiskImage/complete(_:bytes:error:)``.
struct MetadataLoad {
    /// What is read: a piece of a format's table, or a compressed cluster.
    enum Kind { case table, compressed }

    /// Whose file; filled in by the chain.
    var layer = 0
    let kind: Kind
    /// The slot of the kind's cache that it fills.
    let slot: Int
    let offset: UInt64
    var length: Int { buffer.count }
    /// Where what is read goes: as long a piece, which lives as long as the image.
    let buffer: IOMemory
    /// The disk offset that was requested, for the report of a damage.
    let diskOffset: UInt64
    /// Indicates whether it could be decompressed, once ``DiskImage/decompress(_:bytes:)`` has tried that.
    var isIntact: Bool?
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The layout of a new qcow2 image. The default values are qemu-img's.
public struct QCOW2Options: Sendable, Equatable {
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    public var clusterSize: UInt64 = 65536
    /// Bits of a reference count: 1, 2, 4, 8, 16, 32 or 64; 16 in version 2.
    public var refcountBits = 16
    public var compatibility = QCOW2Compatibility.version3
    /// The image allows that reference counts are written lazily, for programs that do.
    public var lazyRefcounts = false
    /// L2 entries with 32 subclusters each.
    public var extendedL2 = false
    /// The compression type of clusters that are compressed later.
    public var compression = CompressionType.zlib
    /// The data lies in this file, and only metadata in the image; relative to the image's directory.
    public var dataFile: String?
    /// Keep the data file valid as a raw image by itself.
    public var dataFileIsRaw = false
    /// nil: the data is not encrypted.
    public var encryption: ImageEncryption?

    public init() {}
}

/// The version of a qcow2 image, in qemu-img's words.
public enum QCOW2Compatibility: String, Sendable, CaseIterable {
    case version2 = "0.10"
    case version3 = "1.1"
}

/// The compression type of qcow2 clusters.
public enum CompressionType: String, Sendable, CaseIterable {
    case zlib
    case zstd
}

/// The backing file of a new image.
public struct BackingReference: Sendable, Equatable {
    /// The name as it is put into the image: relative to the new image's directory.
    public var name: String
    public var format: ImageFormat
    /// Indicates whether the user has specified it. A format that is only derived from the name is refused if the
    /// contents contradict it.
    public var isFormatStated: Bool

    public init(name: String, format: ImageFormat, isFormatStated: Bool = true) {
        self.name = name
        self.format = format
        self.isFormatStated = isFormatStated
    }

    /// Resolves a name in an image, or returns nil if it is not followed.
    public static func path(_ name: String, of image: String) -> String? { try? backingPath(name, of: image) }

    /// - Parameters:
    ///   - stated: nil for what the name stands for.
    ///   - option: of `swkvm image`, which would state it.
    public init(name: String, stated: ImageFormat?, option: String = "--backing-format") throws(DiskImageError) {
        self.init(
            name: name, format: try ImageFormat(stated, orExtensionOf: name, option: option),
            isFormatStated: stated != nil)
    }
}

extension QCOW2Options {
    /// Refuses what the format does not allow, for a disk of `size` bytes.
    func check(
        _ path: String, size: UInt64, preallocation: Preallocation, backing: BackingReference?
    ) throws(DiskImageError) {
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .impossible(path: path, reason: reason()) }
        }
        try require(size <= DiskImage.maximumSize, "\(size) bytes; a disk has \(DiskImage.maximumSize) at most")
        try require(
            clusterSize.nonzeroBitCount == 1 && (512...2 << 20).contains(clusterSize),
            "clusters of \(clusterSize) bytes; expected a power of two from 512 to 2097152")
        try require(
            (1...64).contains(refcountBits) && refcountBits.nonzeroBitCount == 1,
            "reference counts of \(refcountBits) bits; 1, 2, 4, 8, 16, 32 or 64 are possible")
        if compatibility == .version2 {
            for (isAsked, feature) in [
                (refcountBits != 16, "reference counts of \(refcountBits) bits"),
                (lazyRefcounts, "lazy reference counts"),
                (extendedL2, "subclusters"), (compression != .zlib, "\(compression) compression"),
                (dataFile != nil, "external data file"),
            ] where isAsked {
                throw .impossible(path: path, reason: "version 2 (compat 0.10) has no \(feature); compat 1.1 does")
            }
        }
        try require(
            !extendedL2 || clusterSize >= 16384,
            "subclusters require clusters of 16384 bytes or more, not \(clusterSize)")
        try require(!dataFileIsRaw || dataFile != nil, "a raw data file requires --data-file")
        try require(
            !dataFileIsRaw || backing == nil, "a raw data file holds the whole disk, so it cannot have a backing file")
        try require(
            backing == nil || preallocation == .off || extendedL2,
            "preallocated clusters would hide the backing file; with subclusters (extended_l2) they do not")
        let entries = clusterSize / (extendedL2 ? 16 : 8)
        let l1Count = size / clusterSize / entries + 1
        try require(
            l1Count * 8 <= UInt64(QCOW2Header.maximumL1Size),
            "\(size) bytes are more than clusters of \(clusterSize) bytes can map; use larger ones")
        try checkEncryption(path, preallocation: preallocation)
        try require(
            (backing?.name.rawBytes.count ?? 0) <= QCOW2Header.maximumBackingName,
            "the backing file's name is longer than \(QCOW2Header.maximumBackingName) bytes")
        try require(backing?.name.isEmpty != true, "the backing file's name is empty")
        try require(dataFile?.isEmpty != true, "the data file's name is empty")
    }
}

// SPDX-License-Identifier: Apache-2.0

/// The kinds of VMDK and VDI images that are made, in the words of VMware and qemu-img.
public enum ImageSubformat: String, Sendable, CaseIterable {
    /// VMDK: one file, whose grains are allocated on demand. The default.
    case monolithicSparse
    /// VMDK: the disk as it is in NAME-flat.vmdk, and a descriptor.
    case monolithicFlat
    /// VMDK: files NAME-s001.vmdk … for 2 GiB each, with grains as they are needed, and a descriptor.
    case twoGbMaxExtentSparse
    /// VMDK: files NAME-f001.vmdk … with 2 GiB of the disk each, and a descriptor.
    case twoGbMaxExtentFlat
    /// VMDK: one file with compressed grains, which is only read: what an OVF package (OVA) has.
    case streamOptimized
    /// VDI: blocks are allocated on demand. The default.
    case dynamic
    /// VDI: every block in its place.
    case fixed = "static"

    /// The words of a format's kinds.
    public static func names(of format: ImageFormat) -> String {
        kinds(of: format).map(\.rawValue).joined(separator: ", ")
    }

    static func kinds(of format: ImageFormat) -> [ImageSubformat] {
        switch format {
        case .vmdk: [.monolithicSparse, .monolithicFlat, .twoGbMaxExtentSparse, .twoGbMaxExtentFlat, .streamOptimized]
        case .vdi: [.dynamic, .fixed]
        case .raw, .qcow2, .vhd, .vhdx: []
        }
    }

    /// Indicates whether the disk's bytes lie one after the other, so that space can be preallocated.
    var isFlat: Bool { self == .monolithicFlat || self == .twoGbMaxExtentFlat || self == .fixed }

    /// The kind that is made.
    /// - Returns: nil for formats without kinds.
    static func resolve(
        _ stated: ImageSubformat?, format: ImageFormat, compresses: Bool, _ path: String
    ) throws(DiskImageError) -> ImageSubformat? {
        let kinds = kinds(of: format)
        guard let usual = kinds.first else {
            if let stated {
                throw .impossible(path: path, reason: "\(format.name) has no subformat \(stated.rawValue)")
            }
            return nil
        }
        let kind = stated ?? (compresses && format == .vmdk ? .streamOptimized : usual)
        guard kinds.contains(kind) else {
            throw .impossible(
                path: path, reason: "\(format.name) has no subformat \(kind.rawValue); \(names(of: format)) are")
        }
        guard !compresses || kind == .streamOptimized else {
            throw .impossible(
                path: path,
                reason:
                    "\(kind.rawValue) \(format.name) images are not compressed; qcow2 and streamOptimized VMDK images can be"
            )
        }
        return kind
    }

    /// Refuses what this kind of image does not have, for a disk of `size` bytes.
    func check(
        _ path: String, size: UInt64, preallocation: Preallocation, options: QCOW2Options, backing: BackingReference?
    ) throws(DiskImageError) {
        func require(_ condition: Bool, _ reason: @autoclosure () -> String) throws(DiskImageError) {
            if !condition { throw .impossible(path: path, reason: reason()) }
        }
        try require(backing == nil, "a \(rawValue) image has no backing file; qcow2 does")
        try require(options == QCOW2Options(), "qcow2 options do not apply to a \(rawValue) image")
        try require(
            preallocation == .off || (isFlat && preallocation != .metadata),
            isFlat
                ? "a \(rawValue) image has no metadata to preallocate; use falloc or full"
                : "a \(rawValue) image cannot be preallocated")
        let maximum: UInt64, isVDI = self == .dynamic || self == .fixed
        switch self {
        // As many blocks of 1 MiB, or tables of grains, as are read back.
        case .dynamic, .fixed: maximum = BlockMapBuilder.maximumBlocks << 20
        case .monolithicSparse, .streamOptimized:
            maximum =
                UInt64(GrainDirectory.maximumTables) * UInt64(GrainDirectory.entriesPerTable)
                * BlockMapBuilder.grainSize
        case .twoGbMaxExtentSparse, .twoGbMaxExtentFlat:
            maximum = UInt64(VMDKDescriptor.maximumExtents) * VMDKDescriptor.splitSize
        case .monolithicFlat: maximum = DiskImage.maximumSize >> 11
        }
        try require(size <= maximum, "\(size) bytes; such a disk has \(maximum) at most")
        try require(size > 0 || isVDI, "a disk of 0 bytes, which VMDK does not support")
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// How one file of an image stores its part of a disk: a case for each kind of format. The cases are distinguished
/// where they are used, without a table of functions and without counting references: a request passes here.
///
/// A raw file needs nothing said, and is written in place. What is stored in several files is asked of the file that
/// has it: ``piece(at:)``.
enum Layout: ~Copyable {
    /// The disk's bytes are the file's.
    case raw
    case qcow2(Cell<QCOW2Image>)
    /// VDI, VHD, VHDX, and VMDK's sparse files.
    case blocks(Cell<BlockMapImage>)
    /// A VMDK descriptor of several files.
    case extents(Cell<VMDKExtents>)

    init(_ qcow2: consuming QCOW2Image) { self = .qcow2(Cell(qcow2)) }
    init(_ blocks: consuming BlockMapImage) { self = .blocks(Cell(blocks)) }
    init(_ extents: consuming VMDKExtents) { self = .extents(Cell(extents)) }

    /// Indicates whether the file has no metadata.
    var isRaw: Bool {
        switch self {
        case .raw: true
        case .qcow2: false
        case .blocks: false
        case .extents: false
        }
    }

    /// Indicates whether the disk is in other files.
    var hasExtents: Bool {
        switch self {
        case .extents: true
        case .raw: false
        case .qcow2: false
        case .blocks: false
        }
    }

    /// The piece with an offset of a disk that is in other files; nil of any other.
    func piece(at offset: UInt64) -> DiskPiece? {
        switch self {
        case .extents(let extents): extents.value.piece(at: offset)
        case .raw: nil
        case .qcow2: nil
        case .blocks: nil
        }
    }

    // MARK: - What the format says

    /// Bytes of a cluster or block, in a format that has them.
    var clusterSize: UInt64? {
        switch self {
        case .qcow2(let image): image.value.clusterSize
        case .blocks(let image): image.value.clusterSize
        case .raw: nil
        case .extents: nil
        }
    }

    /// The counters of the caches, of a file that has metadata.
    var statistics: FileStatistics? {
        switch self {
        case .qcow2(let image): image.value.statistics
        case .blocks(let image): image.value.statistics
        case .raw: nil
        case .extents: nil
        }
    }

    var damage: FoundDamage? {
        switch self {
        case .qcow2(let image): image.value.damage
        case .blocks(let image): image.value.damage
        case .raw: nil
        case .extents: nil
        }
    }

    // MARK: - Reading

    @inline(__always) func locate(_ offset: UInt64, _ length: UInt64, _ compressed: inout UInt64) -> RangeLookup {
        switch self {
        case .raw: .data(offset: offset, length: length)
        case .qcow2(let image): image.value.locate(offset, length, &compressed)
        case .blocks(let image): image.value.locate(offset, length, &compressed)
        // A file with a piece was to be asked.
        case .extents: .failed(EIO)
        }
    }

    func decompress(_ load: MetadataLoad, _ bytes: Int) -> Bool {
        switch self {
        case .qcow2(let image): image.value.decompress(load, bytes)
        case .blocks(let image): image.value.decompress(load, bytes)
        case .raw: false
        case .extents: false
        }
    }

    func complete(_ load: MetadataLoad, bytes: Int, error: Int32) -> Int32 {
        switch self {
        case .qcow2(let image): image.value.complete(load, bytes: bytes, error: error)
        case .blocks(let image): image.value.complete(load, bytes: bytes, error: error)
        case .raw: error
        case .extents: error
        }
    }

    func unpin(_ load: MetadataLoad) {
        switch self {
        case .qcow2(let image): image.value.unpin(load)
        case .blocks(let image): image.value.unpin(load)
        case .raw: break
        case .extents: break
        }
    }

    func unreadableLength(at offset: UInt64, isTable: Bool) -> UInt64 {
        switch self {
        case .qcow2(let image): image.value.unreadableLength(at: offset, isTable: isTable)
        case .blocks(let image): image.value.unreadableLength(at: offset, isTable: isTable)
        case .raw: 4096 - offset % 4096
        case .extents: 4096 - offset % 4096
        }
    }

    // MARK: - Changes

    @inline(__always) var isPrepared: Bool {
        switch self {
        case .raw: true
        case .qcow2(let image): image.value.isPrepared
        case .blocks(let image): image.value.isPrepared
        case .extents(let extents): extents.value.contentID.isReplaced
        }
    }

    func prepareChange(_ file: MetadataFile) throws(MetadataError) -> [String]? {
        switch self {
        case .qcow2(let image): return try image.value.prepareChange(file)
        case .blocks(let image): return try image.value.prepareChange(file)
        case .extents(let extents):
            try extents.value.contentID.replace(file)
            return nil
        case .raw: return nil
        }
    }

    func target(
        _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, diskSize: UInt64, sequence: UInt64,
        _ file: MetadataFile
    ) -> WriteTarget {
        switch self {
        case .raw: .inPlace(offset: offset, length: length)
        case .qcow2(let image):
            image.value.target(operation, offset, length, diskSize: diskSize, sequence: sequence, file)
        case .blocks(let image):
            image.value.target(operation, offset, length, diskSize: diskSize, sequence: sequence, file)
        case .extents: .unresolved(.failed(EROFS))
        }
    }

    func allocate(
        _ count: UInt64, at offset: UInt64, for part: WriteTarget.Part?, _ file: MetadataFile
    ) throws(MetadataError) -> ClusterRun {
        switch self {
        case .qcow2(let image): try image.value.allocate(count, at: offset, for: part, file)
        case .blocks(let image): try image.value.allocate(count, at: offset, for: part, file)
        case .raw: throw .failed(EROFS)
        case .extents: throw .failed(EROFS)
        }
    }

    func place(of run: ClusterRun) -> UInt64 {
        switch self {
        case .qcow2(let image): image.value.place(of: run)
        case .blocks(let image): image.value.place(of: run)
        case .raw: 0
        case .extents: 0
        }
    }

    func link(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        switch self {
        case .qcow2(let image): image.value.link(run, at: offset, sequence: sequence)
        case .blocks(let image): image.value.link(run, at: offset, sequence: sequence)
        case .raw: break
        case .extents: break
        }
    }

    func abandon(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        switch self {
        case .qcow2(let image): image.value.abandon(run, at: offset, sequence: sequence)
        case .blocks(let image): image.value.abandon(run, at: offset, sequence: sequence)
        case .raw: break
        case .extents: break
        }
    }

    // MARK: - The steps of a commit

    var isLocked: Bool {
        switch self {
        case .qcow2(let image): image.value.isLocked
        case .blocks(let image): image.value.isLocked
        case .raw: false
        case .extents: false
        }
    }

    func unlock() {
        switch self {
        case .qcow2(let image): image.value.isLocked = false
        case .blocks(let image): image.value.isLocked = false
        case .raw: break
        case .extents: break
        }
    }

    var failure: Int32 {
        switch self {
        case .qcow2(let image): image.value.failure
        case .blocks(let image): image.value.failure
        case .raw: 0
        case .extents: 0
        }
    }

    func failWriting(_ error: Int32) {
        switch self {
        case .qcow2(let image): image.value.failure = error
        case .blocks(let image): image.value.failure = error
        case .raw: break
        case .extents: break
        }
    }

    func beginCommit(_ file: MetadataFile) throws(MetadataError) -> Bool {
        switch self {
        case .qcow2(let image): try image.value.beginCommit(file)
        case .blocks(let image): try image.value.beginCommit(file)
        case .raw: false
        case .extents: false
        }
    }

    func writeAllocationTable(_ file: MetadataFile) throws(MetadataError) -> Bool {
        switch self {
        case .qcow2(let image): try image.value.writeAllocationTable(file)
        case .blocks(let image): try image.value.writeAllocationTable(file)
        case .raw: false
        case .extents: false
        }
    }

    func writeMapping(_ file: MetadataFile) throws(MetadataError) {
        switch self {
        case .qcow2(let image): try image.value.writeMapping(file)
        case .blocks(let image): try image.value.writeMapping(file)
        case .raw: break
        case .extents: break
        }
    }

    func release(before sequence: UInt64, _ file: MetadataFile) throws(MetadataError) {
        switch self {
        case .qcow2(let image): try image.value.release(before: sequence, file)
        case .blocks(let image): try image.value.release(before: sequence, file)
        case .raw: break
        case .extents: break
        }
    }

    // MARK: - The end

    func markDamage(_ file: MetadataFile) {
        switch self {
        case .qcow2(let image): image.value.markDamage(file)
        case .blocks(let image): image.value.markDamage(file)
        case .raw: break
        case .extents: break
        }
    }

    func close(_ file: MetadataFile, _ data: MetadataFile) throws(MetadataError) {
        switch self {
        case .qcow2(let image): try image.value.close(file, data)
        case .blocks(let image): try image.value.close(file, data)
        case .raw: break
        case .extents: break
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// What is wrong with an image, and where.
extension QCOW2Image {
    /// The entry that maps an offset: that of the L1 table if it leads to no L2 table.
    func entry(at offset: UInt64) -> TableEntry {
        let index = offset >> tableCover, table = l1[Int(index)] & L1Entry.offset
        guard table != 0, canBeTable(table) else {
            return TableEntry(table: .l1, start: header.l1Offset, offset: header.l1Offset + index * 8)
        }
        let inTable = offset >> UInt64(header.clusterBits) & (1 << UInt64(header.l2Bits) - 1)
        return TableEntry(table: .l2, start: table, offset: table + inTable * (header.hasExtendedL2 ? 16 : 8))
    }

    /// Indicates whether an L2 table can begin at a byte of the file.
    func canBeTable(_ place: UInt64) -> Bool {
        place & (header.clusterSize - 1) == 0 && place <= fileSize && header.clusterSize <= fileSize - place
    }

    /// The damage that a data cluster is where metadata is.
    func inMetadata(_ place: UInt64) -> ImageDamage { .clusterInMetadata(offset: place, metadata(at: place)) }

    /// Which metadata a cluster has.
    private func metadata(at place: UInt64) -> QCOW2Metadata {
        let cluster = place >> UInt64(header.clusterBits)
        func isIn(_ start: UInt64, _ length: UInt64) -> Bool {
            let first = start >> UInt64(header.clusterBits)
            return cluster >= first && cluster - first < header.clusters(for: length)
        }
        if cluster == 0 { return .header }
        if isIn(header.l1Offset, UInt64(header.l1TableSize) * 8) { return .l1Table }
        let kind: QCOW2Metadata? =
            switch refcounts {
            case .some(let refcounts): refcounts.kind(ofCluster: cluster)
            case nil: nil
            }
        if let kind { return kind }
        for index in 0..<header.l1Count
        where l1[index] & L1Entry.offset != 0 && (l1[index] & L1Entry.offset) >> UInt64(header.clusterBits) == cluster {
            return .l2Table
        }
        return .other
    }

    /// Marks an image as damaged (incompatible feature bit 1, which version 2 does not have), and stops all writes.
    mutating func markDamage(_ file: MetadataFile) {
        if damage == nil, let found = damageOfRefcounts { note(found) }
        guard let damage, damage.damage.isOfMetadata, refcounts != nil, !isMarked else { return }
        isMarked = true
        if failure == 0 { failure = EIO }
        guard header.version >= 3 else { return }
        // The last byte of the field. A failure to write it is ignored: the requests fail anyway.
        let bits =
            UInt8(QCOW2Header.Incompatible.corrupt) | (header.isDirty ? UInt8(QCOW2Header.Incompatible.dirty) : 0)
            | (header.hasDataFile ? UInt8(QCOW2Header.Incompatible.externalData) : 0)
            | (header.compression == .zlib ? 0 : UInt8(QCOW2Header.Incompatible.compression))
            | (header.hasExtendedL2 ? UInt8(QCOW2Header.Incompatible.extendedL2) : 0)
        do throws(MetadataError) {
            try file.write([bits], at: 79)
            try file.synchronize()
        } catch {}
    }

    private var damageOfRefcounts: FoundDamage? {
        let found: Refcounts.Damage? =
            switch refcounts {
            case .some(let refcounts): refcounts.damage
            case nil: nil
            }
        switch found {
        case .countedAsFree(let cluster, let entry)?:
            let place = cluster << UInt64(header.clusterBits)
            return FoundDamage(damage: .countedAsFree(metadata(at: place), offset: place), entry: entry)
        case .countedBeyondEnd(let cluster, let entry)?:
            return FoundDamage(
                damage: .countedBeyondEnd(offset: cluster << UInt64(header.clusterBits)), entry: entry)
        case nil: return nil
        }
    }
}

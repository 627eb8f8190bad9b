// SPDX-License-Identifier: Apache-2.0

/// What is left of an image that was cut short.
extension QCOW2Image {
    /// What a table has where the file ends before it does, so that it is known to be missing.
    static var missingEntry: UInt64 { L2Entry.offset }

    func unreadableLength(at offset: UInt64, isTable: Bool) -> UInt64 {
        let table = l1[Int(offset >> tableCover)] & L1Entry.offset
        guard canBeTable(table) else { return restOfTable(offset) }
        let unit = isTable ? UInt64(1) << UInt64(header.clusterBits + sliceBits) : header.clusterSize
        return unit - offset % unit
    }

    /// Has what a slice was to have beyond the end of the file be known to be missing.
    func markMissing(_ load: MetadataLoad, from bytes: Int) {
        let words = header.hasExtendedL2 ? 2 : 1
        for index in stride(from: bytes / (8 * words) * words, to: load.length / 8, by: words) {
            // With subclusters all are said to be data of a cluster that is nowhere.
            load.buffer.store(bigEndian: Self.missingEntry, index * 8)
            if words == 2 { load.buffer.store(bigEndian: UInt64(UInt32.max), index * 8 + 8) }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// A repair of an image whose file ends too early: what is beyond the end is discarded.
extension QCOW2Check {
    /// Discards one kind of what is beyond the end: the rest of a table, then snapshots, then bitmaps. Each is a write
    /// or two that can be made again.
    /// - Returns: whether anything has changed.
    func dropLosses(_ scan: borrowing QCOW2Scan) throws(DiskImageError) -> Bool {
        if let cut = scan.cut { return try complete(cut, scan.fileSize) }
        if scan.lostSnapshots > 0 { return try dropSnapshots(scan) }
        // Their extension stays in the header, where it means nothing without this.
        var features = [UInt8](repeating: 0, count: 8)
        features.store(try file.read(8, at: 88).bigEndian64(at: 0) & ~QCOW2Header.Autoclear.bitmaps, at: 0)
        try file.write(features, at: 88)
        if let place = header.bitmaps?.lastExtension { try file.write([UInt8](repeating: 0, count: 8), at: place) }
        try file.synchronize()
        return true
    }

    /// Has a table end where it should, with entries that say that nothing is there. Of the last one that is left a
    /// part may be missing.
    private func complete(_ cut: QCOW2Scan.Cut, _ fileSize: UInt64) throws(DiskImageError) -> Bool {
        let torn = fileSize % cut.unit
        if torn != 0 { try file.write([UInt8](repeating: 0, count: Int(torn)), at: fileSize - torn) }
        try file.truncate(to: cut.end)
        try file.synchronize()
        return true
    }

    /// Leaves those snapshots out whose entry or whose L1 table is beyond the end.
    private func dropSnapshots(_ scan: borrowing QCOW2Scan) throws(DiskImageError) -> Bool {
        let kept = scan.keptSnapshots
        if kept.count == scan.snapshots.entries.count {
            // They were the last ones of the table, which stays where it is.
            var fields = try file.read(header.fixedLength, at: 0)
            fields.store(UInt32(kept.count), at: 60)
            if kept.isEmpty { fields.store(UInt64(0), at: 64) }
            try file.write(fields, at: 0)
            try file.synchronize()
            return true
        }
        var table = scan.snapshots
        table.entries = kept
        var new = try MetadataReplacement(scan, counting: .countedOrUsed)
        do throws(DiskImageError) {
            try new.setSnapshots(table)
            try new.commit()
        } catch {
            if !new.isCommitted { new.abandon() }
            throw error
        }
        return true
    }
}

extension QCOW2Scan {
    /// Indicates whether something is beyond the end of the file, and is to be discarded before anything else is
    /// repaired.
    var hasLosses: Bool { cut != nil || lostSnapshots > 0 || bitmapsAreCut }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// A repair in a file system that has no room for new counts and tables beside the old: what is there already is
/// changed.
extension QCOW2Check {
    /// Makes one step of a repair, each of which can be interrupted: refcounts are incremented; clusters without a
    /// reference are freed, so that there may be room for the rest; the remaining refcounts are decremented, with the
    /// flags that depend on them.
    /// - Returns: whether anything has changed.
    func repairInPlace(_ scan: borrowing QCOW2Scan, _ repair: CheckReport.Repair) throws(DiskImageError) -> Bool {
        let all = 0..<scan.countedEnd
        if all.contains(where: { scan.wanted($0, repair) > scan.counts[$0] }) {
            for cluster in all where UInt64(scan.wanted(cluster, repair)) > header.maximumCount {
                throw .countsTooNarrow(
                    path: file.path, bits: 1 << header.refcountOrder, needed: UInt64(scan.wanted(cluster, repair)))
            }
            guard try scan.store(in: all, { max(scan.wanted($0, repair), scan.counts[$0]) }) else { return false }
            try file.synchronize()
            return true
        }
        if try scan.store(in: all, { scan.wanted($0, repair) == 0 ? 0 : scan.counts[$0] }) {
            try file.synchronize()
            if repair == .all || scan.report.errors == 0 { releaseSpace(scan, repair) }
            return true
        }
        // Flags go by counts, so they wait for those to be right.
        guard repair == .all || scan.report.errors == 0 else {
            let isChanged = try scan.store(in: all) { scan.wanted($0, repair) }
            if isChanged { try file.synchronize() }
            return isChanged
        }
        // While the two may differ the image is marked dirty, and the next opening repairs it. In
        // version 2 it cannot: clusters whose flag is missing are copied once more than they would have to be.
        let marks = header.version >= 3 && !header.isDirty
        if marks { try setDirty(true) }
        var isChanged = try scan.store(in: all) { scan.wanted($0, repair) }
        try file.synchronize()
        if try storeFlags(scan, repair) { isChanged = true }
        try file.synchronize()
        if marks { try setDirty(false) }
        return isChanged
    }

    private func setDirty(_ isDirty: Bool) throws(DiskImageError) {
        let old = try file.read(8, at: 72).bigEndian64(at: 0)
        var features = [UInt8](repeating: 0, count: 8)
        features.store(isDirty ? old | QCOW2Header.Incompatible.dirty : old & ~QCOW2Header.Incompatible.dirty, at: 0)
        try file.write(features, at: 72)
        try file.synchronize()
    }

    /// Sets the flags in the disk's own tables for clusters with a refcount of one.
    private func storeFlags(_ scan: borrowing QCOW2Scan, _ repair: CheckReport.Repair) throws(DiskImageError) -> Bool {
        let copied = QCOW2Image.L1Entry.copied
        let offset = QCOW2Image.L1Entry.offset
        let bits = UInt64(header.clusterBits)
        let words = header.hasExtendedL2 ? 2 : 1
        let perSector = 64
        var isChanged = false
        var seen: Set<UInt64> = []
        for (index, entry) in try file.readL1(header, scan.fileSize).enumerated() {
            let table = entry & offset
            guard table != 0, table & (header.clusterSize - 1) == 0, table < scan.fileSize,
                header.clusterSize <= scan.fileSize - table
            else { continue }
            if (entry & copied != 0) != (scan.wanted(table >> bits, repair) == 1) {
                try file.writeTable([entry ^ copied], at: header.l1Offset + UInt64(index * 8))
                isChanged = true
            }
            guard !header.hasDataFile, seen.insert(table).inserted else { continue }
            var entries = try file.readTable(Int(header.clusterSize / 8), at: table)
            var sectors: Set<Int> = []
            for place in stride(from: 0, to: entries.count, by: words)
            where entries[place] & offset != 0 && entries[place] & QCOW2Image.L2Entry.compressed == 0 {
                let isOnce = scan.wanted((entries[place] & offset) >> bits, repair) == 1
                guard (entries[place] & copied != 0) != isOnce else { continue }
                entries[place] ^= copied
                sectors.insert(place / perSector)
            }
            for sector in sectors.sorted() {
                try file.writeTable(
                    Array(entries[sector * perSector..<(sector + 1) * perSector]),
                    at: table + UInt64(sector * perSector * 8))
                isChanged = true
            }
        }
        return isChanged
    }

    /// Frees the space of clusters without a refcount. A failure only costs space.
    private func releaseSpace(_ scan: borrowing QCOW2Scan, _ repair: CheckReport.Repair) {
        let bits = UInt64(header.clusterBits)
        var end = scan.countedEnd
        while end > 0, scan.wanted(end - 1, repair) == 0 { end -= 1 }
        var hole: Range<UInt64> = 0..<0
        func punch() { if !hole.isEmpty { file.file.punch(hole.lowerBound << bits, UInt64(hole.count) << bits) } }
        for cluster in 0..<end where scan.counts[cluster] != 0 && scan.wanted(cluster, repair) == 0 {
            if hole.upperBound != cluster {
                punch()
                hole = cluster..<cluster
            }
            hole = hole.lowerBound..<cluster + 1
        }
        punch()
        if end << bits < scan.fileSize { _ = try? file.truncate(to: end << bits) }
    }
}

extension QCOW2Scan {
    /// A cluster's refcount after a repair.
    borrowing func wanted(_ cluster: UInt64, _ repair: CheckReport.Repair) -> UInt32 {
        switch repair {
        case .leaks: min(references[cluster], counts[cluster])
        case .all: isIncomplete ? max(references[cluster], counts[cluster]) : references[cluster]
        }
    }
}

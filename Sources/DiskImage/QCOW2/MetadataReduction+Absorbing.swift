// SPDX-License-Identifier: Apache-2.0

internal import Linux

/// The deletion of a snapshot if no other method is possible: the next entry absorbs the bytes of its entry, as unknown
/// extra data, and nothing else moves.
extension MetadataReduction {
    private typealias Entry = QCOW2SnapshotTable.Entry
    private typealias Write = (place: UInt64, bytes: [UInt8])

    /// Writes that make two entries one.
    private struct Merger {
        /// In their order. The last is in one sector, which is stored as a whole or not at all, and is what does it.
        /// Those before it change what the first of the two entries says, but not how long it is.
        var writes: [Write]
        /// What is known of extra data and was not there.
        var rest: Write
        /// Unknown extra data.
        var unknown: Range<UInt64>
    }

    /// Has the next entry take in one that is not the last. The table has as many entries as before: behind the others
    /// comes one that says that it has nothing, which is gone when the header counts one less. If the power fails just
    /// then the snapshot is still listed, cannot be read any more, and can be deleted again.
    /// - Returns: whether that could be done; if not, nothing has changed.
    mutating func absorb(_ index: Int, _ scan: borrowing QCOW2Scan) throws(DiskImageError) -> Bool {
        let entries = scan.snapshots.entries
        var places = [header.snapshotTableOffset]
        for entry in entries { places.append(places[places.count - 1] + UInt64(entry.encoded.count)) }
        guard
            let merger = self.merger(
                entries[index + 1], from: places[index], length: places[index + 1] - places[index]),
            try append(entries[index], at: places[entries.count])
        else { return false }
        try file.synchronize()
        isCommitted = true
        if merger.writes.count > 1 {
            // The number of its L1 entries: from here on the rest of it means nothing.
            try file.write([0, 0, 0, 0], at: places[index] + 8)
            try file.synchronize()
        }
        for write in merger.writes where !write.bytes.isEmpty {
            try file.write(write.bytes, at: write.place)
            try file.synchronize()
        }
        let unknown: Write = (merger.unknown.lowerBound, [UInt8](repeating: 0, count: merger.unknown.count))
        for write in [merger.rest, unknown] where !write.bytes.isEmpty { try file.write(write.bytes, at: write.place) }
        return true
    }

    /// How an entry comes to begin `length` bytes before where it does, with its id and name where they are.
    private func merger(_ entry: Entry, from place: UInt64, length: UInt64) -> Merger? {
        var merged = entry
        let known = entry.completeExtra, count = Int(length) + entry.extra.count, fixed = QCOW2SnapshotTable.fixedLength
        guard known.count <= count, count <= QCOW2SnapshotTable.maximumExtra else { return nil }
        merged.extra = known + [UInt8](repeating: 0, count: count - known.count)
        let unknown = place + UInt64(fixed + known.count)..<place + UInt64(fixed + count)
        let bytes = Array(merged.encoded.prefix(fixed + known.count)), cut = Self.sector - Int(place) % Self.sector
        if bytes.count <= cut {
            return Merger(writes: [(place, bytes)], rest: (unknown.lowerBound, []), unknown: unknown)
        }
        // An instruction count can come later: here may be the other's name.
        let needed = fixed + max(entry.extra.count, 16)
        let first: Write = (place, Array(bytes[..<min(cut, needed)]))
        let second: Write = (place + UInt64(cut), Array(bytes[min(cut, needed)..<needed]))
        let rest: Write = (place + UInt64(needed), Array(bytes[needed...]))
        guard second.bytes.count <= Self.sector else { return nil }
        // The place of an L1 table says nothing as long as that has no entries; nor does extra data as long as it is
        // not counted. What is between says how long the entry is.
        if cut == 8 { return Merger(writes: [first, second], rest: rest, unknown: unknown) }
        guard cut >= fixed, needed <= Int(length) else { return nil }
        return Merger(writes: [second, first], rest: rest, unknown: unknown)
    }

    /// Writes an entry without anything behind the table, where there is room.
    private func append(_ entry: Entry, at place: UInt64) throws(DiskImageError) -> Bool {
        var empty = entry
        empty.l1Size = 0
        var short = empty
        short.name = []
        short.extra = Array(entry.completeExtra.prefix(16))
        let start = header.snapshotTableOffset
        let end = start + header.clusters(for: place - start) << UInt64(header.clusterBits)
        for bytes in [empty.encoded, short.encoded] where place + UInt64(bytes.count) <= end {
            do throws(DiskImageError) {
                try file.write(bytes, at: place)
                return true
            } catch { guard error.isOutOfSpace else { throw error } }
        }
        return false
    }
}

extension QCOW2SnapshotTable.Entry {
    /// The extra data with all that is known of: what was not there means what is there now.
    fileprivate var completeExtra: [UInt8] {
        guard extra.count < 24 else { return extra }
        var fields = [UInt8](repeating: 0, count: 24)
        fields.store(snapshot.stateSize, at: 0)
        fields.store(snapshot.size, at: 8)
        // No instruction count.
        fields.store(UInt64.max, at: 16)
        let whole = extra.count & ~7
        return Array(extra[..<whole] + fields[whole...])
    }
}

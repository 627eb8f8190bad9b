// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// Another size for the disk of a qcow2 image, whose tables and header have to change with it.
extension DiskEngine {
    mutating func shrink(to newSize: UInt64) throws(DiskImageError) {
        try requireSizedSnapshots()
        var hasRest = false
        try replaceMetadata { (new, scan) throws(DiskImageError) in
            try Self.shrink(&new, scan, to: newSize)
        } inPlace: { (reduction, scan) throws(DiskImageError) in
            hasRest = try reduction.shrink(to: newSize, scan)
        }
        // The freed space may be sufficient to copy tables that are shared with snapshots. Entries that remain in them
        // are not visible.
        if hasRest {
            _ = try? replaceMetadata { (new, scan) throws(DiskImageError) in try Self.shrink(&new, scan, to: newSize) }
        }
        // What the disk does not have any more. Best effort: the mapping no longer refers to it.
        if image.hasDataFile { _ = try? dataFile.truncate(to: newSize) } else { try clearLastCluster(from: newSize) }
    }

    /// The metadata of a disk that ends earlier.
    private static func shrink(
        _ new: inout MetadataReplacement, _ scan: borrowing QCOW2Scan, to newSize: UInt64
    ) throws(DiskImageError) {
        let header = scan.header
        let tableCover = UInt64(header.clusterBits + header.l2Bits)
        let kept = Int(header.l1Entries(for: newSize))
        let old = try scan.file.readL1(header, scan.fileSize)
        try new.refer(Array(old[min(kept, old.count)...]), -1)
        var l1 = Array(old.prefix(max(1, kept)))
        if kept == 0 { l1 = [0] }
        // Of the last table the entries of clusters that are beyond the end in full.
        let last = newSize >> tableCover
        let firstGone = Int(header.clusters(for: newSize & ((1 << tableCover) - 1)))
        let isPartial = newSize & ((1 << tableCover) - 1) != 0
        if isPartial, l1[Int(last)] & QCOW2Image.L1Entry.offset != 0 {
            let table = try scan.file.readTable(
                Int(header.clusterSize / 8), at: l1[Int(last)] & QCOW2Image.L1Entry.offset)
            try new.refer(table: table, from: firstGone, -1)
        }
        let words = header.hasExtendedL2 ? 2 : 1
        try new.setL1(l1) { index, entries in
            guard isPartial, index == Int(last), entries[(firstGone * words)...].contains(where: { $0 != 0 }) else {
                return false
            }
            for place in firstGone * words..<entries.count { entries[place] = 0 }
            return true
        }
        new.setSize(newSize)
        new.clearBitmaps(scan)
    }

    /// Makes what the last cluster has beyond the end zeroes, as others who make the disk longer may show it. Best
    /// effort too: nothing that belongs to the
    /// disk depends on it.
    private mutating func clearLastCluster(from size: UInt64) throws(DiskImageError) {
        // A longer backing file is hidden by who makes the disk longer, and with it what is here.
        guard let clusterSize = image.clusterSize, size % clusterSize != 0, image.backingSize <= size else { return }
        let end = size / clusterSize * clusterSize + clusterSize
        do throws(DiskImageError) {
            try image.reload(size: end)
            try perform(.writeZeroesUnmapping, at: size, length: end - size)
            try perform(.flush)
        } catch {}
        do throws(DiskImageError) { try image.reload() } catch {
            image.failWriting(EIO)
            throw error
        }
    }

    mutating func grow(from oldSize: UInt64, to newSize: UInt64, _ preallocation: Preallocation) throws(DiskImageError)
    {
        try requireSizedSnapshots()
        guard let header = image.header else { return }
        let needed = header.l1Entries(for: newSize)
        guard needed <= UInt64(QCOW2Header.maximumL1Size / 8) else {
            throw .resize(
                path: image.path,
                reason:
                    "with clusters of \(header.clusterSize) bytes a disk has at most \(UInt64(QCOW2Header.maximumL1Size / 8) << UInt64(header.clusterBits + header.l2Bits)) bytes"
            )
        }
        if needed > UInt64(header.l1TableSize) {
            try replaceMetadata { (new, scan) throws(DiskImageError) in
                let l1 = try scan.file.readL1(scan.header, scan.fileSize)
                try new.setL1(l1 + [UInt64](repeating: 0, count: Int(needed) - l1.count))
            }
        }
        // In memory the disk is as long as it will be: the added part can be prepared before the header includes it.
        let dataSize = image.hasDataFile ? try? dataFile.size() : nil
        do throws(DiskImageError) {
            try image.reload(size: newSize)
            if image.hasDataFile { try growDataFile(to: newSize) }
            try clear(oldSize..<newSize)
            if preallocation != .off { try preallocate(oldSize..<newSize, preallocation) }
            // Before the commit, which frees the space of bitmaps.
            try clearAutoclearFeatures()
            try perform(.flush)
        } catch {
            // All of it is beyond the end of the disk, and so not visible; its space is freed, best effort.
            _ = try? perform(.discard, at: oldSize, length: newSize - oldSize)
            _ = try? perform(.flush)
            removeUnused(from: oldSize)
            if let dataSize { _ = try? dataFile.truncate(to: dataSize) }
            do throws(DiskImageError) { try image.reload() } catch { image.failWriting(EIO) }
            throw error
        }
        do throws(DiskImageError) {
            var size = [UInt8](repeating: 0, count: 8)
            size.store(newSize, at: 0)
            try tableFile.write(size, at: 24)
            try tableFile.synchronize()
        } catch {
            // The file has the one size or the other.
            image.failWriting(EIO)
            throw error
        }
        try image.reload()
    }

    /// Takes what is beyond the end of the disk out of the tables, frees its clusters, and truncates the file after the
    /// last one in use. Best effort: nothing of it is visible, and a failure costs space.
    private func removeUnused(from size: UInt64) {
        do throws(DiskImageError) {
            let header = try image.readHeader(), file = tableFile
            let scan = try QCOW2Scan.scan(header, file, fileSize: fileSize())
            guard scan.report.errors == 0 else { return }
            let l1 = try file.readL1(header, fileSize())
            let kept = Int(header.l1Entries(for: size))
            if kept < l1.count {
                try file.writeTable(
                    [UInt64](repeating: 0, count: l1.count - kept), at: header.l1Offset + UInt64(kept) * 8)
            }
            // Of the last table the clusters beyond the end in full; one that snapshots have too is not changed.
            let tableSize = UInt64(1) << UInt64(header.clusterBits + header.l2Bits)
            if size % tableSize != 0, kept <= l1.count, l1[kept - 1] & QCOW2Image.L1Entry.copied != 0 {
                let words = header.hasExtendedL2 ? 2 : 1
                let first = Int(header.clusters(for: size % tableSize)) * words
                try file.writeTable(
                    [UInt64](repeating: 0, count: Int(header.clusterSize / 8) - first),
                    at: l1[kept - 1] & QCOW2Image.L1Entry.offset + UInt64(first) * 8)
            }
            try file.synchronize()
            var check = QCOW2Check(header: header, file: file)
            _ = try check.run(.leaks)
            let left = try QCOW2Scan.scan(header, file, fileSize: fileSize())
            var end = left.countedEnd
            while end > 0, left.counts[end - 1] == 0, left.references[end - 1] == 0 { end -= 1 }
            if left.report.errors == 0, end << UInt64(header.clusterBits) < left.fileSize {
                try file.truncate(to: end << UInt64(header.clusterBits))
            }
        } catch {}
    }

    private func growDataFile(to newSize: UInt64) throws(DiskImageError) {
        do throws(MetadataError) {
            if try dataFile.size() < newSize { try dataFile.truncate(to: newSize) }
        } catch {
            throw error.asError(image.path, "ftruncate")
        }
    }

    /// Snapshots of version 2 do not record the size of their disk, so it must not change.
    private func requireSizedSnapshots() throws(DiskImageError) {
        guard let header = image.header, header.version < 3, header.snapshotCount > 0 else { return }
        throw .resize(
            path: image.path, reason: "it is version 2 and has snapshots, which do not record the size of their disk")
    }

    /// Makes a range that was beyond the end read as zeroes: the rest of the last cluster, a backing file that is
    /// longer, and whatever another program has left there.
    private mutating func clear(_ range: Range<UInt64>) throws(DiskImageError) {
        guard let clusterSize = image.clusterSize else { return }
        let clusterEnd = min(range.upperBound, (range.lowerBound + clusterSize - 1) & ~(clusterSize - 1))
        let shown = max(clusterEnd, min(range.upperBound, image.backingSize))
        if shown > range.lowerBound {
            try perform(.writeZeroesUnmapping, at: range.lowerBound, length: shown - range.lowerBound)
        }
        if range.upperBound > shown { try perform(.discard, at: shown, length: range.upperBound - shown) }
    }

    private func clearAutoclearFeatures() throws(DiskImageError) {
        do throws(MetadataError) { try image.prepareChange(calls) } catch {
            throw error.asError(image.path, "pwrite")
        }
    }

    /// Allocates the unallocated clusters of a range that reads as zeroes.
    private mutating func preallocate(_ range: Range<UInt64>, _ preallocation: Preallocation) throws(DiskImageError) {
        guard let clusterSize = image.clusterSize else { return }
        let file = metadataFile
        image.withQCOW2 { $0.refcounts?.allocateAtEnd() }
        // The last cluster before the range is there if it needs to be.
        var position = (range.lowerBound + clusterSize - 1) & ~(clusterSize - 1)
        while position < range.upperBound {
            let left = range.upperBound - position
            var search = DiskImage.Search(limit: left)
            switch image.target(.write, position, left, sequence: sequence, calls, &search) {
            case .inPlace(_, let length), .done(let length):
                position += length
            case .clusters(let count):
                position += try preallocate(count, at: position, preallocation, file) * clusterSize
            case .part(let part) where part.place == nil:
                // The disk ends in this one.
                position += try preallocate(1, at: position, preallocation, file) * clusterSize
            case .unresolved(.load(let load)):
                do throws(MetadataError) {
                    try file.read(into: load.buffer, at: load.offset)
                } catch {
                    image.complete(load, bytes: 0, error: error.code)
                    image.unpin(load)
                    throw error.asError(image.path, "pread")
                }
                let outcome = image.complete(load, bytes: load.length, error: 0)
                image.unpin(load)
                if outcome != 0 {
                    throw image.damage ?? .request(path: image.path, SystemCallError("pread", errno: outcome))
                }
            case .unresolved(.commit):
                try perform(.flush)
            case .unresolved(.failed(let error)):
                throw .system(path: image.path, SystemCallError("pwrite", errno: error))
            case .part:
                // Subclusters of a cluster that is there.
                position = (position & ~(clusterSize - 1)) + clusterSize
            case .unresolved:
                throw .system(path: image.path, SystemCallError("pwrite", errno: EIO))
            }
        }
    }

    /// Allocates as many contiguous new clusters as possible; returns how many.
    private mutating func preallocate(
        _ count: UInt64, at position: UInt64, _ preallocation: Preallocation, _ file: MetadataFile
    ) throws(DiskImageError) -> UInt64 {
        guard let clusterSize = image.clusterSize else { return count }
        let run: ClusterRun
        do throws(MetadataError) {
            guard
                let allocated = try image.withQCOW2({ qcow2 throws(MetadataError) in
                    try qcow2.allocate(count, at: position, file)
                })
            else { return count }
            run = allocated
        } catch {
            guard error == .needsCommit else { throw error.asError(image.path, "pwrite") }
            try perform(.flush)
            return 0
        }
        do throws(DiskImageError) {
            let place = run.first * clusterSize..<(run.first + run.count) * clusterSize
            // Clusters have to be in the file; what was never written there is zeroes.
            if !image.hasDataFile, try fileSize() < place.upperBound { try tableFile.truncate(to: place.upperBound) }
            try reserve(place, run.isPristine ? preallocation : .full)
        } catch {
            image.withQCOW2 { $0.abandon(run, at: position, sequence: sequence) }
            throw error
        }
        image.withQCOW2 { $0.link(run, at: position, sequence: sequence) }
        return run.count
    }
}

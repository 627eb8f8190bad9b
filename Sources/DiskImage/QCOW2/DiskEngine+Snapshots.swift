// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The internal snapshots of a qcow2 image. The engine has the image for itself and nothing else is in flight while one
/// is made, applied or deleted, and each of these has happened in full or not at all, whenever the power fails:
/// ``MetadataReplacement``.
extension DiskEngine {
    /// The image's snapshots, oldest first.
    public func snapshots() throws(DiskImageError) -> [DiskSnapshot] {
        guard let header = image.header else { return [] }
        return try QCOW2SnapshotTable(header, tableFile, fileSize: fileSize()).entries.map(\.snapshot)
    }

    /// Keeps the disk's current state under a name, which need not be the only one of its kind.
    /// - Parameters:
    ///   - name: 1 … 255 bytes.
    ///   - seconds: the time since 1970; now by default.
    @discardableResult
    public mutating func createSnapshot(
        named name: String, seconds: UInt32? = nil
    ) throws(DiskImageError) -> DiskSnapshot {
        guard (1...255).contains(name.rawBytes.count) else {
            throw .snapshot(
                path: image.path, name: name, reason: "a name has 1 to 255 bytes, this one \(name.rawBytes.count)")
        }
        var now = timespec()
        // A value of its own.
        unsafe clock_gettime(CLOCK_REALTIME, &now)
        let time = (seconds ?? UInt32(clamping: now.tv_sec), seconds == nil ? UInt32(clamping: now.tv_nsec) : 0)
        var made: DiskSnapshot?
        try requireSnapshots(name)
        try replaceMetadata { (new, scan) throws(DiskImageError) in
            var table = scan.snapshots
            guard table.entries.count < QCOW2SnapshotTable.maximumCount else {
                throw .snapshot(
                    path: scan.file.path, name: name,
                    reason: "the image has \(table.entries.count) snapshots already, which is the maximum")
            }
            let old = try scan.file.readL1(scan.header, scan.fileSize)
            // Two refer now to what one did: nothing of it is written in place any more.
            try new.refer(old, 1)
            let l1 = try new.setL1(old, uses: 2)
            let id = table.freeID
            let snapshot = DiskSnapshot(
                id: id, name: name, seconds: time.0, nanoseconds: time.1, guestNanoseconds: 0, stateSize: 0,
                size: scan.header.size)
            var extra = [UInt8](repeating: 0, count: 16)
            extra.store(scan.header.size, at: 8)
            table.entries.append(
                QCOW2SnapshotTable.Entry(
                    snapshot: snapshot, id: Array(id.utf8), name: name.rawBytes, l1Offset: try new.writeL1(l1),
                    l1Size: l1.count, extra: extra, stateSize32: 0))
            try new.setSnapshots(table)
            made = snapshot
        }
        guard let made else { throw .snapshot(path: image.path, name: name, reason: "it was not created") }
        return made
    }

    /// Gives the disk the state, and the size, that it had when a snapshot was made, which stays. The current state is
    /// lost.
    /// - Parameter word: the snapshot's id or else its name.
    public mutating func applySnapshot(_ word: String) throws(DiskImageError) {
        try requireSnapshots(word)
        try replaceMetadata { (new, scan) throws(DiskImageError) in
            let entry = try scan.snapshot(word)
            try new.refer(try scan.file.readL1(scan.header, scan.fileSize), -1)
            let l1 = try scan.file.readL1(entry.l1Offset, entry.l1Size, scan.fileSize)
            try new.refer(l1, 1)
            let needed = Int(scan.header.l1Entries(for: entry.snapshot.size))
            guard l1.count >= needed else {
                throw .invalid(
                    path: scan.file.path, reason: "snapshot \(entry.snapshot.id) has no L1 table for its disk")
            }
            try new.setL1(l1)
            new.setSize(entry.snapshot.size)
            new.clearBitmaps(scan)
        }
    }

    /// Deletes a snapshot and frees what only it used.
    /// - Parameter word: the snapshot's id or else its name.
    public mutating func deleteSnapshot(_ word: String) throws(DiskImageError) {
        try requireSnapshots(word)
        try replaceMetadata { (new, scan) throws(DiskImageError) in
            let entry = try scan.snapshot(word)
            try new.refer(try scan.file.readL1(entry.l1Offset, entry.l1Size, scan.fileSize), -1)
            new.free(entry.l1Offset, bytes: UInt64(entry.l1Size) * 8)
            try new.setL1(try scan.file.readL1(scan.header, scan.fileSize))
            var table = scan.snapshots
            table.entries.removeAll { $0.l1Offset == entry.l1Offset && $0.id == entry.id && $0.name == entry.name }
            guard table.entries.count == scan.snapshots.entries.count - 1 else {
                throw .invalid(path: scan.file.path, reason: "two snapshots have the same ID, name and L1 table")
            }
            try new.setSnapshots(table)
        } inPlace: { (reduction, scan) throws(DiskImageError) in
            do throws(DiskImageError) { try reduction.remove(try scan.snapshot(word), scan) } catch {
                guard error.isOutOfSpace, !reduction.isCommitted else { throw error }
                throw .snapshot(
                    path: scan.file.path, name: word,
                    reason:
                        "its file system is full, and rewriting the snapshot table needs space: free \(scan.header.clusterSize) bytes there, "
                        + "or delete the newest snapshot first, which needs no space")
            }
        }
    }

    private func requireSnapshots(_ name: String) throws(DiskImageError) {
        guard let header = image.header else {
            throw .snapshot(
                path: image.path, name: name,
                reason: "\(image.format.name) images have no snapshots; only qcow2 images do")
        }
        if header.hasDataFile {
            throw .snapshot(
                path: image.path, name: name, reason: "an image whose data is in another file has no snapshots")
        }
    }

    // MARK: - Replacing

    var tableFile: TableFile { TableFile(path: image.path, file: metadataFile) }

    func fileSize() throws(DiskImageError) -> UInt64 {
        do throws(MetadataError) { return try metadataFile.size() } catch {
            throw .system(path: image.path, SystemCallError("lseek", errno: EIO))
        }
    }

    /// Makes everything durable, has `body` prepare new metadata, puts that in place and continues with it. What is
    /// damaged is not touched.
    /// - Parameter inPlace: does the same in a file system that has no room for new metadata.
    mutating func replaceMetadata(
        _ body: (inout MetadataReplacement, borrowing QCOW2Scan) throws(DiskImageError) -> Void,
        inPlace: ((inout MetadataReduction, borrowing QCOW2Scan) throws(DiskImageError) -> Void)? = nil
    ) throws(DiskImageError) {
        precondition(inFlight == 0)
        guard let header = image.header else {
            throw .request(path: image.path, SystemCallError("snapshot", errno: EINVAL))
        }
        guard isImageQuiet else { throw .request(path: image.path, SystemCallError("snapshot", errno: EBUSY)) }
        guard !image.isReadOnly else { throw .request(path: image.path, SystemCallError("snapshot", errno: EROFS)) }
        try perform(.flush)
        image.withQCOW2 { $0.trim(metadataFile) }
        let scan = try QCOW2Scan.scan(header, tableFile, fileSize: fileSize())
        guard scan.report.errors == 0 else {
            throw .notWritable(
                path: image.path, reason: "it has \(scan.report.errors) errors: swkvm image check --repair all")
        }
        var new = try MetadataReplacement(scan)
        var failure: DiskImageError?, isCommitted = false, lostBitmaps: [String] = []
        do throws(DiskImageError) {
            try body(&new, scan)
            try new.commit()
            lostBitmaps = new.lostBitmaps
        } catch {
            failure = error
        }
        isCommitted = new.isCommitted
        if failure != nil, !isCommitted { new.abandon() }
        if let error = failure, !isCommitted, error.isOutOfSpace, let inPlace {
            var reduction = MetadataReduction(scan)
            do throws(DiskImageError) {
                try inPlace(&reduction, scan)
                lostBitmaps = reduction.lostBitmaps
                failure = nil
            } catch { failure = error }
            isCommitted = reduction.isCommitted
            if failure == nil { release() }
        }
        do throws(DiskImageError) {
            if isCommitted, let failure { throw failure }
            try image.reload()
        } catch {
            // The state of the file is unknown: nothing that is written from now on would be reliable.
            image.failWriting(EIO)
            throw failure ?? error
        }
        if let failure { throw failure }
        image.reportLostBitmaps(lostBitmaps)
    }

    /// After a change in place: clusters that are not used any more are freed. Those that cannot be freed are leaked,
    /// which a repair finds.
    private func release() {
        do throws(DiskImageError) {
            var check = QCOW2Check(header: try image.readHeader(), file: tableFile)
            _ = try check.run(.leaks)
        } catch {
            image.report?(
                "\(error); the change was made, but unused clusters remain allocated: swkvm image check --repair leaks")
        }
    }
}

extension QCOW2Scan {
    func snapshot(_ word: String) throws(DiskImageError) -> QCOW2SnapshotTable.Entry {
        guard let index = snapshots.index(of: word) else { throw .noSnapshot(path: file.path, name: word) }
        return snapshots.entries[index]
    }
}

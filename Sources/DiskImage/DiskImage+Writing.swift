// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// What is done to the metadata of the topmost image when it is written, whatever its format: ``ImageMetadata`` has the
/// same operations for one file. Offsets are bytes of the disk, which lead to the file that has them.
extension DiskImage {
    /// Indicates whether writing changes metadata: ``target(_:_:_:sequence:_:_:)`` says how a range is written, and a
    /// flush is a commit.
    var managesClusters: Bool { !isReadOnly && format != .raw }

    /// How many files a commit synchronises; their numbers are those of ``descriptor(_:)``.
    var writtenFiles: Int {
        // Nothing is under an image in several files.
        layers[0].layout.hasExtents ? layers.count : 1
    }

    /// How the start of a range is written; `search.file` becomes the number of the file that this is about.
    func target(
        _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, sequence: UInt64, _ calls: FileCalls,
        _ search: inout Search
    ) -> WriteTarget {
        // Only the topmost is written.
        guard let place = place(of: offset) else { return .unresolved(.failed(EROFS)) }
        search.file = place.file
        let target = layers[place.file].layout.target(
            operation, place.offset, min(length, place.length), diskSize: size, sequence: sequence,
            metadataFile(place.file, calls))
        guard case .unresolved(.load(var load)) = target else { return target }
        load.layer = place.file
        return .unresolved(.load(load))
    }

    /// Comes before every change: what is no longer true once there was one.
    func prepareChange(_ calls: FileCalls) throws(MetadataError) {
        guard !layers[0].layout.isPrepared else { return }
        if let lost = try layers[0].layout.prepareChange(metadataFile(0, calls)) { reportLostBitmaps(lost) }
    }

    /// New clusters for at most `count` of the disk's from `offset` on, which ``target(_:_:_:sequence:_:_:)`` has asked
    /// for, or the one that `part` is of.
    func allocate(
        _ count: UInt64, at offset: UInt64, for part: WriteTarget.Part?, _ calls: FileCalls
    ) throws(MetadataError) -> ClusterRun {
        guard let place = place(of: offset) else { throw .failed(EROFS) }
        return try layers[place.file].layout.allocate(
            count, at: place.offset, for: part, metadataFile(place.file, calls))
    }

    /// The byte of the file where new clusters begin.
    func place(of run: ClusterRun, _ file: Int) -> UInt64 { layers[file].layout.place(of: run) }

    /// New clusters have been written: they are the disk's from `offset` on.
    func link(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        if let place = place(of: offset) { layers[place.file].layout.link(run, at: place.offset, sequence: sequence) }
    }

    /// New clusters could not be written.
    func abandon(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        if let place = place(of: offset) {
            layers[place.file].layout.abandon(run, at: place.offset, sequence: sequence)
        }
    }

    // MARK: - Commits

    /// While a commit has written what counts clusters and not yet what refers to them, the mapping does not change.
    var isLocked: Bool { (0..<writtenFiles).contains { layers[$0].layout.isLocked } }

    func unlock() {
        for file in 0..<writtenFiles { layers[file].layout.unlock() }
    }

    /// Why nothing can be written any more, an errno value, or 0.
    var failure: Int32 {
        for file in 0..<writtenFiles where layers[file].layout.failure != 0 { return layers[file].layout.failure }
        return 0
    }

    /// Nothing can be written any more, for a reason that has an errno value.
    func failWriting(_ error: Int32) {
        for file in 0..<writtenFiles { layers[file].layout.failWriting(error) }
    }

    /// Writes what has to be durable before the mapping is written, and locks the mapping. Returns whether there is any
    /// such thing.
    func beginCommit(_ calls: FileCalls) throws(MetadataError) -> Bool {
        var isAny = false
        for file in 0..<writtenFiles where try layers[file].layout.beginCommit(metadataFile(file, calls)) {
            isAny = true
        }
        return isAny
    }

    /// Returns whether the table of what counts clusters had to be written.
    func writeAllocationTable(_ calls: FileCalls) throws(MetadataError) -> Bool {
        var isAny = false
        for file in 0..<writtenFiles where try layers[file].layout.writeAllocationTable(metadataFile(file, calls)) {
            isAny = true
        }
        return isAny
    }

    /// What it refers to is durable.
    func writeMapping(_ calls: FileCalls) throws(MetadataError) {
        for file in 0..<writtenFiles { try layers[file].layout.writeMapping(metadataFile(file, calls)) }
    }

    /// The mapping is durable: clusters that it no longer refers to are freed. A failure only costs space.
    func release(before sequence: UInt64, _ calls: FileCalls) {
        for file in 0..<writtenFiles {
            do throws(MetadataError) {
                try layers[file].layout.release(before: sequence, metadataFile(file, calls))
            } catch { failures.forget() }
        }
    }

    /// Marks an image as damaged, if its format supports that, and stops all writes.
    func markDamage(_ calls: FileCalls) { layers[0].layout.markDamage(metadataFile(0, calls)) }

    /// Writes everything to the file, as far as possible. What could not be written is reported, since no request waits
    /// for it any more.
    func close(_ calls: FileCalls) {
        for file in 0..<writtenFiles {
            let data = MetadataFile(calls: calls, number: dataDescriptor(file), file: file, failures: failures)
            do throws(MetadataError) {
                try layers[file].layout.close(metadataFile(file, calls), data)
            } catch {
                let access = failures.access(of: error.code)
                let reason = error.asError(path(ofFile: file), access?.call.name ?? FailedAccess.Call.write.name)
                report?(
                    "\(reason): the last metadata was not written; what was written since the last flush may be lost")
            }
        }
    }

    private func metadataFile(_ file: Int, _ calls: FileCalls) -> MetadataFile {
        MetadataFile(calls: calls, number: descriptor(file), file: file, failures: failures)
    }

    /// The file that has an offset of the topmost image's disk, and where in its part; nil when nothing can be written
    /// there.
    private func place(of offset: UInt64) -> (file: Int, offset: UInt64, length: UInt64)? {
        guard layers[0].layout.hasExtents else { return (0, offset, size - offset) }
        guard let piece = layers[0].layout.piece(at: offset), let file = piece.file else { return nil }
        return (file, piece.place(of: offset), piece.end - offset)
    }
}

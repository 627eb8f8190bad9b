// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// What an engine does to the metadata of the topmost image, whatever its format. Offsets are bytes of the disk, which lead to the file
/// that has them.
extension DiskImage {
    /// Indicates whether writing changes metadata: ``target(_:_:_:sequence:_:_:)`` says how a range is written, and a
    /// flush is a commit.
    var managesClusters: Bool { !isReadOnly && format != .raw }

    /// How many files a commit synchronises; their numbers are those of ``descriptor(_:)``.
    var writtenFiles: Int {
        // Only VMDK has several, and then nothing is under it.
        format == .vmdk ? layers.count : 1
    }

    /// How the start of a range is written; `search.file` becomes the number of the file that this is about.
    func target(
        _ operation: DiskOperation, _ offset: UInt64, _ length: UInt64, sequence: UInt64, _ calls: FileCalls, _ search: inout Search
    ) -> WriteTarget {
        // Only the topmost is written.
        search.file = 0
        let metadata = metadataFile(0, calls)
        if layers[0].qcow2 != nil {
            return layers[0].qcow2?.target(operation, offset, length, diskSize: size, sequence: sequence, metadata) ?? .unresolved(.failed(EROFS))
        }
        guard let place = piece(at: offset) else { return .unresolved(.failed(EROFS)) }
        search.file = place.file
        let length = min(length, place.length)
        if layers[place.file].blocks == nil { return .inPlace(offset: place.offset, length: length) }
        let file = metadataFile(place.file, calls)
        return switch layers[place.file].blocks?.target(operation, place.offset, length, file) {
        case .unresolved(.load(var load)):
            { load.layer = place.file; return .unresolved(.load(load)) }()
        case let target?: target
        case nil: .unresolved(.failed(EROFS))
        }
    }

    /// Comes before every change: what is no longer true once there was one.
    func prepareChange(_ calls: FileCalls) throws(MetadataError) {
        let lost = try withMetadata { qcow2 throws(MetadataError) in
            qcow2.autoclearFeatures == 0 ? nil : try qcow2.clearAutoclearFeatures(metadataFile(0, calls))
        }
        if case let lost?? = lost { reportLostBitmaps(lost.names) }
        // An ID that links to this image keep, by which they would see that it has changed.
        let place = layers[0].contentIDPlace
        if place != 0 {
            try metadataFile(0, calls).write(VMDKDescriptor.newContentID(), at: place)
            layers[0].contentIDPlace = 0
        }
    }

    /// New clusters for at most `count` of the disk's from `offset` on, which ``target(_:_:_:sequence:_:_:)`` has asked for, or the one that
    /// `part` is of.
    func allocate(_ count: UInt64, at offset: UInt64, for part: WriteTarget.Part?, _ calls: FileCalls) throws(MetadataError) -> ClusterRun {
        let metadata = metadataFile(0, calls)
        let run = try withMetadata { qcow2 throws(MetadataError) in
            if let part, let place = part.place { return try qcow2.extend(part, place, at: offset) }
            var run = try qcow2.allocate(count, at: offset, metadata)
            if let part { run.units = qcow2.header.units(part.range) }
            qcow2.growAhead(metadata)
            return run
        }
        if let run { return run }
        guard let place = piece(at: offset) else { throw .failed(EROFS) }
        let file = metadataFile(place.file, calls)
        let blocks = try layers[place.file].blocks?.allocate(count, at: place.offset, file)
        guard let blocks else { throw .failed(EROFS) }
        return blocks
    }

    /// The byte of the file where new clusters begin.
    func place(of run: ClusterRun, _ file: Int) -> UInt64 {
        layers[file].blocks?.place(of: run) ?? run.first * (clusterSize ?? 0)
    }

    /// New clusters have been written: they are the disk's from `offset` on.
    func link(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        withMetadata { $0.link(run, at: offset, sequence: sequence) }
        if let place = piece(at: offset) { layers[place.file].blocks?.link(run, at: place.offset) }
    }

    /// New clusters could not be written.
    func abandon(_ run: ClusterRun, at offset: UInt64, sequence: UInt64) {
        withMetadata { $0.abandon(run, at: offset, sequence: sequence) }
        if let place = piece(at: offset) { layers[place.file].blocks?.abandon(run, at: place.offset) }
    }

    // MARK: - Commits

    /// While a commit has written what counts clusters and not yet what refers to them, the mapping does not change.
    var isLocked: Bool {
        if let isLocked = withMetadata({ $0.isLocked }) { return isLocked }
        return layers.indices.contains { layers[$0].blocks?.isLocked ?? false }
    }

    func unlock() {
        withMetadata { $0.isLocked = false }
        for file in layers.indices { layers[file].blocks?.isLocked = false }
    }

    /// Why nothing can be written any more, an errno value, or 0.
    var failure: Int32 {
        if let failure = withMetadata({ $0.failure }) { return failure }
        for file in layers.indices {
            if let failure = layers[file].blocks?.failure, failure != 0 { return failure }
        }
        return 0
    }

    /// Nothing can be written any more, for a reason that has an errno value.
    func failWriting(_ error: Int32) {
        withMetadata { $0.failure = error }
        for file in layers.indices { layers[file].blocks?.failure = error }
    }

    /// Writes what has to be durable before the mapping is written, and locks the mapping. Returns whether there is any such thing.
    func beginCommit(_ calls: FileCalls) throws(MetadataError) -> Bool {
        let metadata = metadataFile(0, calls)
        let needsBarrier = try withMetadata { qcow2 throws(MetadataError) in
            guard qcow2.failure == 0 else { throw .failed(qcow2.failure) }
            // Data in a file of its own is made durable by every flush, and before the mapping.
            guard qcow2.needsBarrier || qcow2.header.hasDataFile else { return false }
            try qcow2.refcounts?.writeSlices(metadata)
            qcow2.isLocked = true
            return true
        }
        if let needsBarrier { return needsBarrier }
        var isAny = false
        for file in layers.indices where try layers[file].blocks?.beginCommit(metadataFile(file, calls)) == true { isAny = true }
        return isAny
    }

    /// Returns whether the refcount table had to be written.
    func writeRefcountTable(_ calls: FileCalls) throws(MetadataError) -> Bool {
        let metadata = metadataFile(0, calls)
        return try withMetadata { qcow2 throws(MetadataError) in
            guard qcow2.refcounts?.isTableDirty == true else { return false }
            try qcow2.refcounts?.writeTable(metadata)
            return true
        } ?? false
    }

    /// What it refers to is durable.
    func writeMapping(_ calls: FileCalls) throws(MetadataError) {
        let metadata = metadataFile(0, calls)
        try withMetadata { qcow2 throws(MetadataError) in
            if qcow2.isLocked { qcow2.refcounts?.needsBarrier = false }
            try qcow2.writeMapping(metadata)
        }
        for file in layers.indices { try layers[file].blocks?.writeMapping(metadataFile(file, calls)) }
    }

    /// The mapping is durable: what it no longer refers to is given back. Failing costs space and nothing else.
    func release(before: UInt64, _ calls: FileCalls) {
        let metadata = metadataFile(0, calls)
        let isReleased = (try? withMetadata { qcow2 throws(MetadataError) in try qcow2.refcounts?.release(before: before, metadata) }) != nil
        if !isReleased { failures.forget() }
    }

    /// Has an image that was found damaged say so, if its format can, and nothing be written any more.
    func markDamage(_ calls: FileCalls) {
        let metadata = metadataFile(0, calls)
        withMetadata { $0.markDamage(metadata) }
    }

    /// Brings everything to the file, as far as that can be done.
    func close(_ calls: FileCalls) {
        let metadata = metadataFile(0, calls), data = MetadataFile(calls: calls, number: dataDescriptor(0))
        _ = try? withMetadata { qcow2 throws(MetadataError) in try qcow2.close(metadata, data) }
        for file in layers.indices { _ = try? layers[file].blocks?.close(metadataFile(file, calls)) }
    }

    private func metadataFile(_ file: Int, _ calls: FileCalls) -> MetadataFile {
        MetadataFile(calls: calls, number: descriptor(file), file: file, failures: failures)
    }

    // MARK: - Pieces

    /// Where an offset of the topmost image's disk is; nil when nothing can be written there, or clusters of qcow2 say.
    private func piece(at offset: UInt64) -> (file: Int, offset: UInt64, length: UInt64)? {
        guard layers[0].qcow2 == nil else { return nil }
        if layers[0].pieces.isEmpty { return (0, offset, size - offset) }
        guard let piece = DiskPiece.containing(offset, layers[0].pieces), let file = piece.file else { return nil }
        return (file, piece.place &+ (offset - piece.start), piece.end - offset)
    }

    /// ``locate(_:_:)`` for a disk in several files.
    func locatePiece(_ offset: UInt64, _ search: inout Search) -> RangeLookup {
        // The layer is one of the chain; files of pieces are the image's.
        guard let piece = DiskPiece.containing(offset, layers[search.layer].pieces) else { return .zero(length: search.limit) }
        search.limit = min(search.limit, piece.end - offset)
        guard let file = piece.file else { return .zero(length: search.limit) }
        search.file = file
        let place = piece.place &+ (offset - piece.start)
        return layers[file].blocks?.locate(place, search.limit, &search.compressedEntry) ?? .data(offset: place, length: search.limit)
    }
}

/// A part of a disk that is in a file of its own.
struct DiskPiece: Equatable, Sendable {
    /// Bytes of the disk.
    let start: UInt64
    let end: UInt64
    /// The number of the file in the image; nil for zeroes.
    let file: Int?
    /// Where in the file, or in the disk that the file's own table maps, it begins.
    let place: UInt64

    /// The piece with an offset; they are in order and without gaps.
    static func containing(_ offset: UInt64, _ pieces: [DiskPiece]) -> DiskPiece? {
        var low = 0, high = pieces.count
        while low < high {
            let middle = (low + high) / 2
            if pieces[middle].end <= offset { low = middle + 1 } else { high = middle }
        }
        return low < pieces.count && pieces[low].start <= offset ? pieces[low] : nil
    }
}

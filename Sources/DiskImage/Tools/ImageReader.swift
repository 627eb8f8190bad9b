// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// A range of a disk and its allocation, for tools.
public struct ImageExtent: Sendable, Equatable {
    /// The kind of allocation.
    public enum Kind: Sendable, Equatable {
        /// A range that no image of the chain allocates: it reads as zeroes.
        case unallocated
        /// Zeroes without data: a zero cluster, or a hole of the file.
        case zero
        case data
        case compressed
    }

    public var kind: Kind
    /// Bytes from the start of the disk.
    public var offset: UInt64
    public var length: UInt64
    /// The depth in the chain: 0 is the topmost image.
    public var depth: Int
    /// The offset in the image's file, if the range has one.
    public var fileOffset: UInt64?
    /// The index of the file in ``ImageMap/files``.
    public var file = 0

    public var readsAsZeroes: Bool { kind == .unallocated || kind == .zero }
}

/// Reads a disk image for a tool, one call after the other in the calling thread, and distinguishes zeroes from data
/// before they are read.
struct ImageReader: ~Copyable {
    let image: DiskImage
    /// What is known of each file's holes: from `start` to `end` all is data, or nothing is.
    private var known: [Known]
    private let calls: FileCalls
    /// Where what cannot be read is noted, which reads as zeroes then; nil when it is an error.
    private let salvage: SalvageLog?

    /// Bytes from which on a read may go around the page cache that need not.
    private static let smallest = 64 << 10

    private struct Known {
        var start: UInt64 = 0
        var end: UInt64 = 0
        var isData = true
    }

    /// Where the host could not read something it is tried again in such pieces.
    private static let pieces = [64 << 10, 4096]

    /// - Parameters:
    ///   - calls: a test's system calls for reading.
    ///   - salvage: where what cannot be read is noted.
    init(_ image: DiskImage, calls: FileCalls = .host, salvage: SalvageLog? = nil) {
        known = [Known](repeating: Known(), count: image.fileCount)
        self.calls = calls
        self.salvage = salvage
        self.image = image
    }

    /// The image, after the last read.
    consuming func takeImage() -> DiskImage { image }

    /// How the range from `offset` begins; it is inside the disk and not empty.
    mutating func extent(at offset: UInt64, limit: UInt64) throws(DiskImageError) -> ImageExtent {
        var search = DiskImage.Search(limit: limit)
        while true {
            let extent = image.locate(offset, &search)
            let depth = search.layer
            func found(_ kind: ImageExtent.Kind, _ length: UInt64, at place: UInt64? = nil) -> ImageExtent {
                ImageExtent(
                    kind: kind, offset: offset, length: min(length, limit), depth: depth, fileOffset: place,
                    file: search.file)
            }
            switch extent {
            case .data(let place, var length):
                if salvage != nil, let end = image.dataEnd(search.file) {
                    guard place < end else {
                        let lost = min(length, limit)
                        try self.lose(offset, lost, "the file ends at byte \(end), before it") {
                            .truncated(path: image.path, what: "data", needed: place, size: end)
                        }
                        return found(.zero, lost)
                    }
                    length = min(length, end - place)
                }
                let (isData, end) = try hole(at: place, search.file)
                return found(isData ? .data : .zero, min(length, end - place), at: place)
            case .zero(let length):
                // Past the last image, or past the end of one below the topmost: neither the one above nor another has
                // data.
                if depth == image.chainLength || (depth > 0 && offset >= image.size(ofLayer: depth)) {
                    return ImageExtent(kind: .unallocated, offset: offset, length: min(length, limit), depth: depth - 1)
                }
                return found(.zero, length)
            case .memory(let bytes):
                return found(.compressed, UInt64(bytes.count))
            case .load(let load) where load.kind == .compressed:
                // It is known to be there, which is enough: nothing is read.
                image.complete(load, bytes: 0, error: ECANCELED)
                image.unpin(load)
                let cluster = image.clusterSize(ofLayer: load.layer)
                return found(.compressed, min(search.limit, cluster - offset % cluster), at: load.offset)
            case .load(let load):
                do throws(DiskImageError) { try self.load(load) } catch {
                    return found(.zero, try lose(offset, limit, search, isTable: load.kind == .table, error))
                }
            case .unallocated, .wait, .commit:
                throw .request(path: image.path, SystemCallError("read", errno: EIO))
            case .failed(let error):
                let failure = image.damage ?? .request(path: image.path, SystemCallError("read", errno: error))
                return found(.zero, try lose(offset, limit, search, isTable: false, failure))
            }
        }
    }

    /// Reads a range of the disk, which is inside it.
    mutating func read(_ buffer: IOMemory, at offset: UInt64) throws(DiskImageError) {
        var done = 0
        var search = DiskImage.Search(limit: UInt64(buffer.count))
        while done < buffer.count {
            let extent = image.locate(offset + UInt64(done), &search)
            var moved = 0
            switch extent {
            case .data(let place, let length):
                moved = Int(length)
                try transfer(buffer.piece(done, moved), at: place, search.file, diskOffset: offset + UInt64(done))
            case .zero(let length):
                moved = Int(length)
                buffer.piece(done, moved).clear()
            case .memory(let bytes):
                moved = bytes.count
                buffer.piece(done, moved).copy(from: bytes)
            case .load(let load):
                do throws(DiskImageError) { try self.load(load) } catch {
                    moved = Int(
                        try lose(
                            offset + UInt64(done), UInt64(buffer.count - done), search, isTable: load.kind == .table,
                            error))
                    buffer.piece(done, moved).clear()
                }
            case .unallocated, .wait, .commit:
                throw .request(path: image.path, SystemCallError("read", errno: EIO))
            case .failed(let error):
                let failure = image.damage ?? .request(path: image.path, SystemCallError("read", errno: error))
                moved = Int(
                    try lose(offset + UInt64(done), UInt64(buffer.count - done), search, isTable: false, failure))
                buffer.piece(done, moved).clear()
            }
            if moved > 0 {
                done += moved
                search = DiskImage.Search(limit: UInt64(buffer.count - done))
            }
        }
    }

    /// Reads what an extent of data says, from the file that has it.
    /// - Parameter diskOffset: where that is on the disk.
    func read(_ buffer: IOMemory, from offset: UInt64, ofFile file: Int, diskOffset: UInt64) throws(DiskImageError) {
        try transfer(buffer, at: offset, file, diskOffset: diskOffset)
    }

    /// The descriptor for what an extent of data says, if that is read around the page cache; ``read(_:from:ofFile:)``
    /// does it either way.
    func direct(_ memory: IOMemory, from place: UInt64, ofFile file: Int) -> Int32? {
        // What is encrypted is not done when it has been read.
        if image.isEncrypted(file) { return nil }
        if isCached(place, memory.count, file) { return nil }
        let number = image.dataDescriptor(file, for: memory, offset: place)
        return number == image.dataDescriptor(file) ? nil : number
    }

    // MARK: - What cannot be read

    /// Notes that the disk cannot be read at an offset.
    /// - Returns: for how many bytes, at most `limit`.
    /// - Throws: the failure, where that is what is wanted.
    private func lose(
        _ offset: UInt64, _ limit: UInt64, _ search: DiskImage.Search, isTable: Bool, _ failure: DiskImageError
    ) throws(DiskImageError) -> UInt64 {
        let length = min(limit, image.unreadableLength(at: offset, search, isTable: isTable))
        let reason: String =
            if case .request(_, let error) = failure { "\(error)" } else {
                image.damageReason(at: offset) ?? "the image is damaged there"
            }
        try lose(offset, length, reason) { failure }
        return length
    }

    private func lose(
        _ offset: UInt64, _ length: UInt64, _ reason: String, _ failure: () -> DiskImageError
    ) throws(DiskImageError) {
        guard let salvage else { throw failure() }
        salvage.add(offset, length, reason)
    }

    // MARK: - Files

    private func load(_ load: MetadataLoad) throws(DiskImageError) {
        var done = 0
        var error: Int32 = 0
        while done < load.length {
            let got = calls.transfer(
                image.descriptor(load.layer), load.buffer.from(done), at: load.offset + UInt64(done), isRead: true)
            if got == -Int(EINTR) { continue }
            if got < 0 { error = Int32(clamping: -got) }
            if got <= 0 { break }
            done += got
        }
        let outcome = image.complete(load, bytes: done, error: error)
        image.unpin(load)
        if error != 0 { throw .request(path: image.path, SystemCallError("pread", errno: error)) }
        // Unpinning discards a failure, so another lookup would return the same load again, without end.
        if outcome != 0 { throw image.damage ?? .request(path: image.path, SystemCallError("pread", errno: outcome)) }
    }

    /// Reads from the file with a layer's data; when salvaging, pieces that cannot be read are zeroes.
    private func transfer(
        _ buffer: IOMemory, at offset: UInt64, _ layer: Int, diskOffset: UInt64
    ) throws(DiskImageError) {
        do throws(DiskImageError) { try transferAll(buffer, at: offset, layer, diskOffset: diskOffset) } catch {
            guard let salvage, case .request = error else { throw error }
            try transferPieces(buffer, at: offset, layer, diskOffset: diskOffset, Self.pieces[...], salvage)
        }
    }

    private func transferPieces(
        _ buffer: IOMemory, at offset: UInt64, _ layer: Int, diskOffset: UInt64, _ pieces: ArraySlice<Int>,
        _ salvage: SalvageLog
    ) throws(DiskImageError) {
        guard let piece = pieces.first else { return }
        var done = 0
        while done < buffer.count {
            let place = offset + UInt64(done), length = min(buffer.count - done, piece - Int(place % UInt64(piece)))
            do throws(DiskImageError) {
                try transferAll(buffer.piece(done, length), at: place, layer, diskOffset: diskOffset + UInt64(done))
            } catch {
                guard case .request(_, let failure) = error else { throw error }
                if pieces.count > 1 {
                    try transferPieces(
                        buffer.piece(done, length), at: place, layer, diskOffset: diskOffset + UInt64(done),
                        pieces.dropFirst(), salvage)
                } else {
                    buffer.piece(done, length).clear()
                    salvage.add(diskOffset + UInt64(done), UInt64(length), "\(failure)")
                }
            }
            done += length
        }
    }

    private func transferAll(
        _ buffer: IOMemory, at offset: UInt64, _ layer: Int, diskOffset: UInt64
    ) throws(DiskImageError) {
        if let remote = image.remote(ofFile: layer) { return try remote.read(buffer, at: offset) }
        let isEncrypted = image.isEncrypted(layer)
        if isEncrypted { try image.requireOpenData() }
        var done = 0
        let isCached = isCached(offset, buffer.count, layer)
        while done < buffer.count {
            let place = offset + UInt64(done)
            let rest = buffer.from(done)
            let file = isCached ? image.dataDescriptor(layer) : image.dataDescriptor(layer, for: rest, offset: place)
            let got = calls.transfer(file, rest, at: place, isRead: true)
            if got < 0 {
                if got == -Int(EINTR) { continue }
                throw .request(path: image.path, SystemCallError("pread", errno: Int32(clamping: -got)))
            }
            if got == 0 {
                // Zeroes follow the end of the file, unless it was cut since it was opened.
                guard image.isEnd(place, layer) else {
                    throw .request(path: image.path, SystemCallError("pread", errno: EIO))
                }
                rest.clear()
                break
            }
            done += got
        }
        // Whole sectors, as all of an encrypted disk is made of.
        if isEncrypted { image.decrypt(buffer, into: buffer, file: layer, place: offset, offset: diskOffset) }
    }

    /// Indicates whether a read that need not go through the page cache does.
    private func isCached(_ offset: UInt64, _ count: Int, _ layer: Int) -> Bool {
        // Small pieces are left to the kernel, which reads ahead.
        image.asksCacheFirst(layer)
            && (count < Self.smallest
                || clinux_is_cached(image.dataDescriptor(layer), off_t(truncatingIfNeeded: offset), count) != 0)
    }

    /// Indicates whether a file has data at a place, and up to where it is the same; what the file system cannot report
    /// is data.
    private mutating func hole(at place: UInt64, _ layer: Int) throws(DiskImageError) -> (isData: Bool, end: UInt64) {
        // Holes of what is encrypted are no zeroes.
        if image.isEncrypted(layer) { return (true, .max) }
        let last = known[layer]
        if last.start <= place, place < last.end { return (last.isData, last.end) }
        if let remote = image.remote(ofFile: layer) { return try remote.extent(at: place) }
        let file = image.dataDescriptor(layer)
        let data = lseek(file, off_t(truncatingIfNeeded: place), CLINUX_SEEK_DATA)
        var found = Known(start: place, end: .max, isData: true)
        if data > off_t(truncatingIfNeeded: place) {
            found = Known(start: place, end: UInt64(data), isData: false)
        } else if data >= 0 {
            let hole = lseek(file, data, CLINUX_SEEK_HOLE)
            if hole > data { found.end = UInt64(hole) }
        } else if errno == ENXIO {
            // Nothing but a hole up to the end, or the end itself.
            found.isData = false
        }
        known[layer] = found
        return (found.isData, found.end)
    }
}

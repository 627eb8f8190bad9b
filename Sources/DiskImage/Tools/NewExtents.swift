// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import Glibc
internal import Linux

/// The files of a new VMDK in several files, which get their names together. The disk's data goes to places in one
/// space, of which each file has a window.
final class NewExtents: Sendable {
    /// One of the files.
    final class Extent: @unchecked Sendable {
        /// Changed by ``NewExtents/publish(durably:)`` alone, when no thread writes any more: hence `Sendable`.
        fileprivate(set) var file: NewFile
        /// Bytes of the disk that are in it.
        let size: UInt64

        fileprivate init(_ file: consuming NewFile, size: UInt64) {
            self.file = file
            self.size = size
        }
    }

    let files: [Extent]
    /// The file with the number n begins at the place n × `window`.
    let window: UInt64
    /// Bytes of the disk in each file but the last.
    let extentSize: UInt64

    /// Makes the files, which have no names yet.
    /// - Parameters:
    ///   - path: of the image, in whose directory they are.
    ///   - window: nil for files that have the disk as it is.
    ///   - sources: the files that are read, none of which can be replaced.
    init(
        _ names: [String], of path: String, diskSize: UInt64, extentSize: UInt64, window: UInt64?, replacing: Bool,
        cache: ToolCache,
        sources: [ImageFile.Identity]
    ) throws(DiskImageError) {
        self.extentSize = extentSize
        self.window = window ?? extentSize
        var files: [Extent] = []
        for (index, name) in names.enumerated() {
            let path = try VMDKDescriptor.path(name, of: path)
            // Before our own lock of the source makes it appear in use.
            if replacing, let old = ImageFile.Identity(ofPath: path), sources.contains(old) {
                throw .sameFile(path: path, other: path)
            }
            let file = try NewFile(path: path, replacing: replacing, cache: cache)
            guard file.deviceSize == nil else { throw .notAFile(path: path) }
            files.append(Extent(file, size: min(extentSize, diskSize - (index == 0 ? 0 : UInt64(index) * extentSize))))
        }
        self.files = files
    }

    /// Gives files that have the disk as it is their lengths, and their space.
    func prepare(reserves: Bool) throws(DiskImageError) {
        for extent in files {
            try extent.file.setSize(extent.size)
            if reserves { try extent.file.reserve(0, extent.size) }
        }
    }

    /// Writes a buffer at a place, from any thread; it may continue in the next file.
    func write(_ bytes: IOMemory, at place: UInt64) throws(DiskImageError) {
        try forEachPart(place, UInt64(bytes.count)) { index, offset, part throws(DiskImageError) in
            try files[index].file.write(
                bytes.piece(Int(part.lowerBound), Int(part.upperBound - part.lowerBound)), at: offset)
        }
    }

    /// Writes zeroes as data.
    func writeZeroes(_ place: UInt64, _ length: UInt64) throws(DiskImageError) {
        try forEachPart(place, length) { index, offset, part throws(DiskImageError) in
            try files[index].file.writeZeroes(offset, UInt64(part.count))
        }
    }

    private func forEachPart(
        _ place: UInt64, _ length: UInt64,
        _ body: (_ index: Int, _ offset: UInt64, _ part: Range<UInt64>) throws(DiskImageError) -> Void
    ) throws(DiskImageError) {
        var done: UInt64 = 0
        while done < length {
            let offset = (place + done) % window, count = min(length - done, window - offset)
            try body(Int((place + done) / window), offset, done..<done + count)
            done += count
        }
    }

    /// Gives the files their names. After an error none has one, but for those that were replaced.
    func publish(durably: Bool) throws(DiskImageError) {
        for (index, extent) in files.enumerated() {
            do throws(DiskImageError) { try extent.file.publish(durably: durably) } catch {
                withdraw(files.prefix(index))
                throw error
            }
        }
    }

    /// Takes names away again: without the descriptor the files are of no use.
    func withdraw() { withdraw(files[...]) }

    private func withdraw(_ files: ArraySlice<Extent>) {
        for extent in files where extent.file.replacedIdentity == nil { removeName(extent.file.path) }
    }
}

// SPDX-License-Identifier: Apache-2.0

internal import Glibc
internal import Linux

/// The preallocation of a part of a disk.
public enum Preallocation: String, Sendable, CaseIterable {
    /// Nothing.
    case off
    /// The format's tables and places in the file, which stays sparse.
    case metadata
    /// The host's blocks as well.
    case falloc
    /// Zeroes are written.
    case full
}

/// Another size for the disk. The engine has the image for itself: if it has other engines, all are idle, and start
/// nothing meanwhile.
extension DiskEngine {
    /// Makes the disk longer, by what reads as zeroes, or shorter. It has the one size or the other, whenever the power
    /// fails.
    /// - Parameters:
    ///   - newSize: bytes, a multiple of 512.
    ///   - preallocation: for what is added.
    ///   - shrinks: whether the disk may get shorter, at the cost of what is beyond its new end.
    public mutating func resize(
        to newSize: UInt64, preallocation: Preallocation = .off, shrinks: Bool = false
    ) throws(DiskImageError) {
        precondition(inFlight == 0)
        func refuse(_ reason: String) -> DiskImageError { .resize(path: image.path, reason: reason) }
        guard image.format == .raw || image.format == .qcow2 else {
            throw refuse(
                "\(image.format.name) images have a fixed size; convert it to qcow2 or raw with swkvm image convert")
        }
        guard isImageQuiet else { throw refuse("other engines use it") }
        guard !image.isReadOnly else { throw refuse("it was opened read-only") }
        guard newSize % 512 == 0, newSize <= DiskImage.maximumSize else {
            throw refuse(
                "\(newSize) bytes are not a whole number of sectors of 512 bytes up to \(DiskImage.maximumSize)")
        }
        let oldSize = image.exactSize
        if newSize < oldSize {
            guard shrinks else { throw refuse("data beyond byte \(newSize) would be lost; --shrink allows that") }
            guard preallocation == .off else { throw refuse("preallocation does not apply when shrinking") }
        }
        try image.requireOpenData()
        if image.isEncrypted(0), preallocation == .metadata || preallocation == .falloc {
            throw refuse("preallocated space that is not written decrypts to noise; use --preallocation full")
        }
        try perform(.flush)
        if image.header == nil {
            try resizeRaw(from: oldSize, to: newSize, preallocation)
        } else if newSize < oldSize {
            try shrink(to: newSize)
        } else if newSize > oldSize {
            try grow(from: oldSize, to: newSize, preallocation)
        }
    }

    /// The path of the image.
    public var path: String { image.path }

    /// Bytes of the disk.
    public var size: UInt64 { image.size }

    /// Takes the size that the file of a raw image, or a block device, has now, after another program has enlarged it.
    public mutating func measure() throws(DiskImageError) {
        precondition(inFlight == 0)
        func refuse(_ reason: String) -> DiskImageError { .resize(path: image.path, reason: reason) }
        guard image.format == .raw, !image.isRemote else {
            throw refuse("only the size of a raw image on this host, or of a block device, changes by itself")
        }
        guard isImageQuiet else { throw refuse("other engines use it") }
        let now = try fileSize()
        guard now >= image.exactSize else {
            throw refuse("it has shrunk, from \(image.exactSize) to \(now) bytes")
        }
        try image.measure()
    }

    private mutating func resizeRaw(
        from oldSize: UInt64, to newSize: UInt64, _ preallocation: Preallocation
    ) throws(DiskImageError) {
        guard preallocation != .metadata else {
            throw .resize(path: image.path, reason: "a raw image has no metadata to preallocate")
        }
        guard !image.isRemote else {
            throw .resize(path: image.path, reason: "the server determines the size of a remote disk; change it there")
        }
        guard image.isRegularFile else {
            throw .resize(path: image.path, reason: "the size of a block device is fixed")
        }
        let file = tableFile
        do throws(DiskImageError) {
            if newSize > oldSize { try reserve(oldSize..<newSize, preallocation) }
            try file.truncate(to: newSize)
            try file.synchronize()
        } catch {
            if newSize > oldSize { _ = try? file.truncate(to: oldSize) }
            throw error
        }
        try image.measure()
    }

    /// Gives a range of the file, beyond whose start nothing was ever written, the host's blocks.
    func reserve(_ range: Range<UInt64>, _ preallocation: Preallocation) throws(DiskImageError) {
        let file = TableFile(path: image.path, file: dataFile)
        switch preallocation {
        case .off, .metadata:
            break
        case .falloc:
            do throws(MetadataError) {
                try file.file.reserve(range.lowerBound, range.upperBound - range.lowerBound)
            } catch {
                throw error.asError(image.path, "fallocate")
            }
        case .full:
            var zeroes = [UInt8](repeating: 0, count: Int(min(1 << 20, range.upperBound - range.lowerBound)))
            for offset in stride(from: range.lowerBound, to: range.upperBound, by: 1 << 20) {
                let count = Int(min(UInt64(zeroes.count), range.upperBound - offset))
                if image.isEncrypted(0) { image.encryptZeroes(&zeroes, place: offset) }
                try file.write(count == zeroes.count ? zeroes : Array(zeroes.prefix(count)), at: offset)
            }
        }
    }
}

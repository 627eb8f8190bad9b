// SPDX-License-Identifier: Apache-2.0

/// The disks of one machine that are open already: they show whether a locked file belongs to one of them.
public struct OpenDisks: Sendable {
    private struct Disk {
        let path: String
        let isRaw: Bool
        let files: [(path: String, identity: ImageFile.Identity)]
        /// Those of the files that the disk writes to.
        let written: [ImageFile.Identity]

        init(_ image: DiskImage, _ path: String) {
            self.path = path
            isRaw = image.format == .raw
            files = Array(zip(image.files, image.identities))
            written = image.writtenIdentities
        }
    }

    private var disks: [Disk] = []

    public init() {}

    /// Adds a disk that has been opened.
    ///
    /// Locks keep one file from being two disks, one of which writes to it. Without them (`lock=off`) the files are
    /// compared: two engines would each keep tables of their own for one image. Raw disks have no tables, so one file
    /// may be several of them then, as one disk with several paths is.
    /// - Parameter path: what the user calls it, where that is not its path: an overlay of swkvm's own has another.
    /// - Throws: ``DiskImageError/sameDisk(path:file:other:)``.
    public mutating func add(_ image: DiskImage, as path: String? = nil) throws(DiskImageError) {
        let new = Disk(image, path ?? image.path)
        for other in disks where !(other.isRaw && new.isRaw) {
            for (file, identity) in new.files where other.files.contains(where: { $0.identity == identity }) {
                guard new.written.contains(identity) || other.written.contains(identity) else { continue }
                throw .sameDisk(path: new.path, file: file, other: other.path)
            }
        }
        disks.append(new)
    }

    /// Explains why a further disk of the machine could not be opened.
    public func explain(_ error: DiskImageError, opening path: String) -> DiskImageError {
        guard case .locked(let file, _) = error.cause, let other = self.path(ofDiskUsing: file) else { return error }
        return .sameDisk(path: path, file: file, other: other)
    }

    /// The disk that a file is a part of; nil if it is of none.
    public func path(ofDiskUsing file: String) -> String? {
        guard let identity = ImageFile.Identity(ofPath: file) else { return nil }
        return disks.first { $0.files.contains { $0.identity == identity } }?.path
    }
}
